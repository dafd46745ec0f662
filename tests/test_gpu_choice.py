"""Which GPU backend computes a call: by the table, with made-up measurements, and where it tells nothing."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

import tilewise
from tilewise.benchmarks import gpu_choices
from tilewise.kernels import activation, dispatch, estimate, gpu_choice, machine, operation
from tilewise.kernels.arrays import bfloat16
from tilewise.kernels.device_arrays import DeviceArray
from tilewise.kernels.gpu_choice import Call, Measurements, Row

DEVICE = "Made Up 1000"
SMALL = np.ones((2, 3, 4, 4), np.float32)
KIND = "relu float32 small"


def table(**seconds: float) -> dict[str, Measurements]:
    return {DEVICE: Measurements("2026-01-02", "make gpu-check", {"cupy": "14"}, {KIND: Row(seconds, 3)})}


@pytest.fixture
def machine_with(monkeypatch):
    """machine_with(table, missing): a machine with that GPU, and the choice left free there."""
    forget = dispatch.choose_backend.cache_clear, operation.forget_plans

    def make(shipped=None, missing=None):
        monkeypatch.setattr(gpu_choice, "shipped", lambda: shipped or {})
        monkeypatch.setattr(machine, "unavailable_backends", lambda: missing or {})
        monkeypatch.setattr(machine, "cuda_devices", lambda: ((DEVICE,), None))
        for each in forget:
            each()

    yield make
    for each in forget:
        each()


def decided(function, *operands, **options):
    with tilewise.using(device="gpu"):
        return tilewise.explain(function, *operands, **options)


# ---- kinds of calls


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (Call("relu", "activation", "float32", bytes=1 << 20), "relu float32 small"),
        (Call("relu", "activation", "float32", bytes=(1 << 20) + 1), "relu float32 medium"),
        (Call("relu", "activation", "float32", bytes=(32 << 20) + 1, tf32=True), "relu float32 large"),
        (Call("max_pool2d", "pool", "bfloat16", "NHWC", bytes=9), "max_pool2d bfloat16 NHWC small"),
        (Call("matmul", "gemm", "float32", flops=21 << 20, bytes=9, tf32=True), "matmul float32 TF32 medium"),
        (Call("matmul", "gemm", "float16", flops=20 << 20, bytes=9, tf32=True), "matmul float16 small"),
    ],
)
def test_kind_of_a_call(call, kind):
    assert call.kind == kind


# ---- the file


def test_shipped_table_is_one():
    shipped = gpu_choice.read(gpu_choice.FILE.read_text(encoding="utf-8"))
    assert gpu_choice.shipped() == shipped
    for name, measured in shipped.items():
        assert measured.command == "make gpu-check", name
        assert DEVICE not in name, "made up"


def test_a_table_is_read_as_it_was_written():
    one = table(cuda=2e-5, cupy=1e-5)
    assert gpu_choice.read(gpu_choice.written(one)) == one


ABOUT = {"date": "2026-01-02", "command": "make gpu-check", "versions": {}, "rows": {}}


def with_row(row) -> dict:
    return {"format": 1, "devices": {"D": {**ABOUT, "rows": {"relu": row}}}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ([], "format must be 1"),
        ({"format": 2, "devices": {}}, "format must be 1"),
        ({"format": 1}, "devices must be an object"),
        ({"format": 1, "devices": {"D": {**ABOUT, "date": ""}}}, "D: date must be a text"),
        ({"format": 1, "devices": {"D": {**ABOUT, "rows": []}}}, "D: rows must be an object"),
        (with_row({"seconds": {"cuda": 1.0}}), "D: relu must be"),
        (with_row({"seconds": {"cpu": 1.0}, "cases": 1}), "seconds must be of cuda, cupy"),
        (with_row({"seconds": {"cuda": 0.0}, "cases": 1}), "seconds must be positive and finite"),
        (with_row({"seconds": {"cuda": float("nan")}, "cases": 1}), "seconds must be positive and finite"),
        (with_row({"seconds": {"cuda": "1"}, "cases": 1}), "seconds must be positive and finite"),
        (with_row({"seconds": {"cuda": 1.0}, "cases": 0}), "cases must be a positive whole number"),
    ],
)
def test_wrong_tables(content, message):
    with pytest.raises(ValueError, match=f"table of GPU backends: .*{message}"):
        gpu_choice.read(content if isinstance(content, str) else json.dumps(content))


# ---- the choice


def test_no_measurement_on_this_device(machine_with):
    machine_with({"Another": table(cuda=2e-5, cupy=1e-5)[DEVICE]})
    decision = decided(tilewise.relu, SMALL)
    assert decision.backend == "cuda"
    reason = "no measurement on this device yet: cuda is the default"
    assert decision.rejected == {"cupy": reason}
    assert f"not cupy: {reason}" in str(decision)


@pytest.mark.parametrize(
    ("seconds", "backend"),
    [
        ({"cuda": 2e-5, "cupy": 1e-5}, "cupy"),
        ({"cuda": 1e-5, "cupy": 2e-5}, "cuda"),
        ({"cuda": 1e-5, "cupy": 0.99e-5}, "cuda"),  # less than noise
    ],
)
def test_the_faster_one_by_the_table(machine_with, seconds, backend):
    machine_with(table(**seconds))
    decision = decided(tilewise.relu, SMALL)
    assert decision.backend == backend
    (other,) = {"cuda", "cupy"} - {backend}
    told = (
        f"from the table: measured on {DEVICE} by make gpu-check, 2026-01-02: {KIND}, cuda {seconds['cuda'] * 1e6:.3g}"
    )
    assert decision.rejected[other].startswith(told)


def test_arrays_on_two_devices_have_two_plans(machine_with, monkeypatch):
    one, other = table(cuda=2e-5, cupy=1e-5)[DEVICE], table(cuda=1e-5, cupy=2e-5)[DEVICE]
    machine_with({DEVICE: one, "Made Up 2000": other})
    monkeypatch.setattr(machine, "cuda_devices", lambda: ((DEVICE, "Made Up 2000"), None))
    lying = [DeviceArray(SimpleNamespace(ordinal=n), 0, SMALL.shape, SMALL.dtype, None) for n in (0, 1, 0)]
    with tilewise.using(device="gpu"):
        plans = [activation._RELU.device_plan((x,), (), None) for x in lying]
    assert [plan.backend for plan in plans] == ["cupy", "cuda", "cupy"]
    assert plans[0] is plans[2]


def test_what_the_table_does_not_tell(machine_with):
    machine_with(table(cuda=2e-5, cupy=1e-5))
    decision = decided(tilewise.relu, SMALL.astype(np.float64))
    assert decision.backend == "cuda"
    assert decision.rejected["cupy"].startswith(f"no measurement of relu float64 small on {DEVICE} yet: cuda is the")
    machine_with(table(cupy=1e-5))
    assert decided(tilewise.relu, SMALL).backend == "cuda", "one backend's time alone tells nothing"


def test_a_pinned_backend_is_taken(machine_with):
    machine_with(table(cuda=2e-5, cupy=1e-5))
    with tilewise.using(backend="cuda"):
        decision = tilewise.explain(tilewise.relu, SMALL)
    assert (decision.backend, decision.rejected) == ("cuda", {})


@pytest.mark.parametrize(("lacks", "has"), [("cuda", "cupy"), ("cupy", "cuda")])
def test_what_one_backend_alone_has(machine_with, monkeypatch, lacks, has):
    machine_with(table(**{lacks: 1e-5, has: 2e-5}))
    module_of = dispatch.implementation_module
    monkeypatch.setattr(
        dispatch, "implementation_module", lambda b, f: SimpleNamespace() if b == lacks else module_of(b, f)
    )
    decision = decided(tilewise.relu, SMALL)
    assert (decision.backend, decision.rejected) == (has, {lacks: "it does not have relu"})


def test_bfloat16_is_the_one_backends_that_has_it(machine_with):
    if bfloat16() is None:
        pytest.skip("ml_dtypes is not installed (extra: gpu)")
    machine_with()
    decision = decided(tilewise.relu, SMALL.astype(bfloat16()))
    assert (decision.backend, decision.rejected) == ("cupy", {"cuda": "its relu has no bfloat16"})
    machine_with(missing={"cupy": "not here"})
    with pytest.raises(NotImplementedError, match="relu: x is bfloat16, which the backend 'cuda' does not have"):
        decided(tilewise.relu, SMALL.astype(bfloat16()))


@pytest.mark.parametrize("rates", [estimate.GpuRates(67e12, 3e12, 0.5, 80 << 30), None], ids=["rates", "no rates"])
def test_host_arrays_of_bfloat16_go_where_it_is_whatever_their_size(machine_with, monkeypatch, rates):
    if bfloat16() is None:
        pytest.skip("ml_dtypes is not installed (extra: gpu)")
    machine_with()
    monkeypatch.setattr(machine, "gpu_rates", lambda: rates)
    decision = tilewise.explain(tilewise.relu, SMALL.astype(bfloat16()))
    assert (decision.device, decision.backend) == ("gpu", "cupy")
    assert decision.rejected["cpu"] == "its relu has no bfloat16"
    assert decision.rejected["cuda"] == "its relu has no bfloat16"
    assert tilewise.explain(tilewise.relu, SMALL).backend == "cpu"
    for missing in ({"cupy": "not here"}, {"cupy": "not here", "cuda": "not here"}):
        machine_with(missing=missing)
        with pytest.raises(NotImplementedError, match=r'\'cpu\' does not have; use float32, .* using\(device="gpu"\)'):
            tilewise.explain(tilewise.relu, SMALL.astype(bfloat16()))


def test_where_there_is_cupy_alone(machine_with, monkeypatch):
    """It is taken, also for arrays of the host that are worth sending; nothing asks for numba.cuda's files."""
    machine_with(table(cuda=1e-5, cupy=2e-5), missing={"cuda": "not here"})
    asked, module_of = [], dispatch.implementation_module
    monkeypatch.setattr(dispatch, "implementation_module", lambda b, f: asked.append(b) or module_of(b, f))
    assert decided(tilewise.relu, SMALL).rejected == {"cuda": "not here"}
    monkeypatch.setattr(machine, "gpu_rates", lambda: estimate.GpuRates(67e12, 3e12, 0.5, 80 << 30))
    monkeypatch.setattr(estimate, "AHEAD", 0.0)
    operation.forget_plans()
    assert tilewise.explain(tilewise.relu, SMALL).backend == "cupy"
    assert asked == ["cupy"] * 2
    monkeypatch.setattr(dispatch, "implementation_module", lambda b, f: module_of(b, f) if b == "cpu" else None)
    operation.forget_plans()
    decision = tilewise.explain(tilewise.relu, SMALL)
    assert (decision.backend, decision.rejected["cupy"]) == ("cpu", "it does not have relu")


# ---- from measurements to a table


def record(op, seconds, dtype="float32", family="pool", images=True, moved=100, kernels=None):
    return {
        "op": op, "family": family, "dtype": dtype, "images": images, "seconds": seconds,
        "kernels": seconds if kernels is None else kernels,
        "dispatched": {"flops": 0, "bytes": moved},
    }  # fmt: skip


RESULT = {
    "device": DEVICE, "date": "2026-01-02", "command": "make gpu-check", "cupy": "14.2.0", "numpy": "2",
    "peers": [
        record("max_pool2d", {"cuda": 1e-6, "cupy": 4e-6, "cuda NHWC": 3e-6, "cupy NHWC": 2e-6, "torch": 1.0}),
        record("max_pool2d", {"cuda": 4e-6, "cupy": 4e-6}),
        record("max_pool2d", {"cuda": 9.0}),  # one of the two failed
        record("matmul", {"cuda": 1.0, "cuda TF32": 1.0, "cupy TF32": 2.0}, family="gemm", images=False, moved=1 << 30),
        record("relu", {"cuda": 1e-5}, images=False),
        {"op": "relu", "family": "activation", "dtype": "float32", "error": "AssertionError"},
    ],
}  # fmt: skip


def test_a_result_becomes_a_table(tmp_path, capsys, machine_with):
    source, target = tmp_path / "result.json", tmp_path / "table.json"
    source.write_text(json.dumps(RESULT))
    target.write_text(gpu_choice.written({"Another": table(cuda=1.0, cupy=1.0)[DEVICE]}))
    assert gpu_choices.main([str(source), "--table", str(target)]) == 0
    assert capsys.readouterr().out == f"{DEVICE}: 3 kinds of calls, 2026-01-02\n"
    made = gpu_choice.read(target.read_text())
    assert set(made) == {"Another", DEVICE}
    assert made[DEVICE].versions == {"cupy": "14.2.0"}
    rows = made[DEVICE].rows
    assert set(rows) == {"max_pool2d float32 NCHW small", "max_pool2d float32 NHWC small", "matmul float32 TF32 large"}
    assert rows["max_pool2d float32 NCHW small"].seconds == pytest.approx({"cuda": 2e-6, "cupy": 4e-6})
    assert [r.cases for r in rows.values()] == [1, 2, 1]
    machine_with(made)
    assert decided(tilewise.max_pool2d, SMALL, 2).backend == "cuda"
    assert decided(tilewise.max_pool2d, SMALL, 2, layout="NHWC").backend == "cupy"


def test_calls_that_may_be_the_hosts_time_say_nothing():
    """Where the kernels were not timed alone, for both backends."""
    some = [
        record("relu", {"cuda": 2e-4, "cupy": 1e-4}, kernels={"cupy": 1e-6}),
        record("relu", {"cuda": 9e-4, "cupy": 1e-4}, kernels={}),
        *[record("tanh", {"cuda": 2e-4, "cupy": 1e-4}, kernels={}) for _ in range(4)],
        record("tanh", {"cuda": 9e-4, "cupy": 1e-4}, kernels={}),
        record("sign", {"cuda": 2e-4, "cupy": 1e-4}, kernels={"cuda": 1e-6, "cupy": 2e-6}),
    ]
    rows = gpu_choices.measurements(RESULT | {"peers": some}).rows
    assert {kind: (row.seconds, row.cases) for kind, row in rows.items()} == {
        "relu float32 NCHW small": (pytest.approx({"cuda": 9e-4, "cupy": 1e-4}), 1),
        "sign float32 NCHW small": (pytest.approx({"cuda": 1e-6, "cupy": 2e-6}), 1),
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nonsense", "nothing was written: Expecting value"),
        ('{"peers": []}', "not a result of make gpu-check: it has no 'device'"),
        (json.dumps({**RESULT, "peers": []}), "not a result of make gpu-check: it has no 'peers'"),
    ],
)
def test_what_is_no_result_changes_nothing(tmp_path, capsys, content, message):
    source, target = tmp_path / "result.json", tmp_path / "table.json"
    source.write_text(content)
    assert gpu_choices.main([str(source), "--table", str(target)]) == 1
    assert message in capsys.readouterr().err
    assert not target.exists()
