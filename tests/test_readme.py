"""The README: its snippets run, and the commands and files that it names exist."""

import re

import pytest
from installation import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("snippet", snippets("python"), ids=lambda text: text.strip().splitlines()[-1][:40])
def test_python_snippet_runs(snippet):
    if "import torch" in snippet:
        pytest.importorskip("torch", reason="PyTorch is not installed (extra: peers)")
    exec(compile(snippet, "README.md", "exec"), {})


def test_there_are_snippets_to_run():
    assert len(snippets("python")) >= 3
    assert snippets("sh")


def test_make_targets_exist():
    targets = set(re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[0].split())
    named = set(re.findall(r"^(?:make|.*`make) ([a-z-]+)", "\n".join(snippets("sh")), re.MULTILINE))
    named |= set(re.findall(r"`make ([a-z-]+)", README + CONTRIBUTING))
    assert {"bench", "test", "targets", "report", "lint", "typecheck"} <= named
    assert named <= targets
    assert all(re.search(rf"^{target}:", MAKEFILE, re.MULTILINE) for target in targets)


def test_commands_exist():
    from tilewise.cli import main

    named = re.findall(r"python -m tilewise ([a-z]+)", README)
    assert set(named) == {"info", "warmup", "bench"}
    for command in named:
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])


def test_named_files_exist():
    paths = set(re.findall(r"`((?:kernels|nn|benchmarks|tests|examples)/[\w./]*)`", README + CONTRIBUTING))
    paths |= set(re.findall(r"\]\(([\w./]+)\)", README))
    assert len(paths) >= 8
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
