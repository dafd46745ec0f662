"""`python -m tilewise`."""

import sys

from tilewise.cli import main

if __name__ == "__main__":  # not in a worker process
    sys.exit(main())
