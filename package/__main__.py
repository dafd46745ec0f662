"""`python -m tilewise`."""

import sys

from tilewise.cli import main

sys.exit(main())
