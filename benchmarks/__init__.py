"""The benchmark suite: what is measured (cases), how (timing), and how it is shown (report)."""
