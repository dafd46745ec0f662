"""Which of a GPU's backends computes a call that several can: the one that measured faster, by a table that is here.

gpu_choices.json has, for each device, what `make gpu-check` measured there (benchmarks/gpu_choices.py makes it of the
results): for an op, a precision, a layout and a size, the seconds of a call in each backend. What it does not tell goes
to the first of `DEFAULT`. Nothing is measured in a user's program.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("gpu_choices.json")
FORMAT = 1
# Where nothing was measured always the same one, so that a program that mixes operations has one compiler's kernels.
DEFAULT = ("cuda", "cupy")
_WHY_DEFAULT = "cuda is the default"
# A backend takes a call from the default one if it needs at most this share of the time: less is noise.
AHEAD = 0.98

# A call's size is its bytes, or its FLOPs at about as many for a byte as GPUs have. Up to the first limit a launch
# takes longer than the work; up to the second, operands may still lie in a cache.
FLOPS_A_BYTE = 20
_SIZES = (("small", 1 << 20), ("medium", 32 << 20))
_TENSOR_FAMILIES = ("gemm", "conv")  # where using(tf32=True) means something


@dataclass(frozen=True, slots=True)
class Call:
    """What a choice depends on."""

    op: str
    family: str
    dtype: str
    layout: str = ""
    flops: int = 0
    bytes: int = 0
    tf32: bool = False

    @property
    def size(self) -> str:
        work = max(self.bytes, self.flops // FLOPS_A_BYTE)
        return next((name for name, most in _SIZES if work <= most), "large")

    @property
    def kind(self) -> str:
        """Its row in a device's table: "max_pool2d float32 NHWC large", "matmul float32 TF32 medium"."""
        tf32 = "TF32" if self.tf32 and self.dtype == "float32" and self.family in _TENSOR_FAMILIES else ""
        return " ".join(part for part in (self.op, self.dtype, tf32, self.layout, self.size) if part)


@dataclass(frozen=True, slots=True)
class Row:
    """Of one kind of call: geometric means of the seconds in each backend, over so many cases."""

    seconds: dict[str, float]
    cases: int


@dataclass(frozen=True, slots=True)
class Measurements:
    """Of one device: when and by which command, the releases it was measured with, and the kinds of calls."""

    date: str
    command: str
    versions: dict[str, str] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)


def _check(right: bool, where: str, wanted: str):
    if not right:
        raise ValueError(f"table of GPU backends: {where} must be {wanted}")


def _row(where: str, value) -> Row:
    _check(isinstance(value, dict) and set(value) == {"seconds", "cases"}, where, '{"seconds": ..., "cases": ...}')
    seconds, cases = value["seconds"], value["cases"]
    _check(isinstance(seconds, dict) and len(seconds) > 0, f"{where}: seconds", "an object")
    _check(set(seconds) <= set(DEFAULT), f"{where}: seconds", f"of {', '.join(DEFAULT)}")
    numbers = all(type(s) is float and 0 < s < float("inf") for s in seconds.values())
    _check(numbers, f"{where}: seconds", "positive and finite")
    _check(type(cases) is int and cases > 0, f"{where}: cases", "a positive whole number")
    return Row(dict(seconds), cases)


def read(text: str) -> dict[str, Measurements]:
    """The table of a file's text, by the device's name. Raises ValueError, with what is wrong, for anything else."""
    try:
        whole = json.loads(text)
    except ValueError as error:
        raise ValueError(f"table of GPU backends: not JSON: {error}") from None
    _check(isinstance(whole, dict) and whole.get("format") == FORMAT, "format", str(FORMAT))
    devices: Any = whole.get("devices")
    _check(isinstance(devices, dict), "devices", "an object")
    table = {}
    for name, about in devices.items():
        _check(isinstance(about, dict), name, "an object")
        for key in ("date", "command"):
            _check(isinstance(about.get(key), str) and about[key], f"{name}: {key}", "a text")
        for key in ("versions", "rows"):
            _check(isinstance(about.get(key), dict), f"{name}: {key}", "an object")
        rows = {kind: _row(f"{name}: {kind}", row) for kind, row in about["rows"].items()}
        table[name] = Measurements(about["date"], about["command"], dict(about["versions"]), rows)
    return table


def written(table: dict[str, Measurements]) -> str:
    """The text of a file with this table: `read`'s inverse."""
    devices = {
        name: {
            "date": m.date, "command": m.command, "versions": m.versions,
            "rows": {kind: {"seconds": r.seconds, "cases": r.cases} for kind, r in sorted(m.rows.items())},
        }
        for name, m in sorted(table.items())
    }  # fmt: skip
    return json.dumps({"format": FORMAT, "devices": devices}, indent=1) + "\n"


@lru_cache(maxsize=1)
def shipped() -> dict[str, Measurements]:
    return read(FILE.read_text(encoding="utf-8"))


def order(call: Call, device: str | None, usable: Iterable[str]) -> tuple[list[str], str]:
    """(the usable backends, the one to take first; why that one). device: its name, None where that is not known."""
    names = [name for name in DEFAULT if name in usable]
    measured = shipped().get(device or "")
    if measured is None:
        return names, f"no measurement on this device yet: {_WHY_DEFAULT}"
    row = measured.rows.get(call.kind)
    if row is None or any(name not in row.seconds for name in names):
        return names, f"no measurement of {call.kind} on {device} yet: {_WHY_DEFAULT}"
    best = names[0]
    for name in names[1:]:
        best = name if row.seconds[name] <= AHEAD * row.seconds[best] else best
    times = ", ".join(f"{name} {row.seconds[name] * 1e6:.3g} us" for name in names)
    why = f"from the table: measured on {device} by {measured.command}, {measured.date}: {call.kind}, {times}"
    return [best, *(name for name in names if name != best)], why


def choose(
    call: Call, device: str | None, usable: Iterable[str], lacks: Callable[[str], str | None]
) -> tuple[str | None, dict[str, str]]:
    """The backend for a call, None where no usable one has it; and for each other one, why not.

    lacks: from a backend to why it cannot compute this call; asked only as far as is needed.
    """
    names, why = order(call, device, usable)
    rejected: dict[str, str] = {}
    for name in names:
        reason = lacks(name)
        if reason is None:
            others = {other: why for other in names if other != name}
            return name, others | rejected
        rejected[name] = reason
    return None, rejected
