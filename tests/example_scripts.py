"""The scripts in examples/, as modules."""

import importlib.util
import sys
from types import ModuleType

from installation import ROOT

FOLDER = ROOT / "examples"
NOT_SCRIPTS = {"common"}
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in NOT_SCRIPTS)
TRAINING = set(NAMES) - {"architectures", "convolution", "learning_rules"}  # by nn.fit, with a progress bar


def load(name: str) -> ModuleType:
    """examples/<name>.py, with the folder on sys.path as for `python examples/<name>.py`, where it finds common."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(FOLDER))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module
