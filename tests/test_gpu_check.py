"""`make gpu-check` as far as it goes without a GPU: the checkout made importable, the steps, timings on an emulator."""

import contextlib
import json
import time
from types import SimpleNamespace

import gpu_check
import pytest
from installation import ROOT, run_python
from simt.installed import emulated_gpu

import tilewise
from tilewise.benchmarks import cases, gpu_choices, gpu_kernels, gpu_peers, gpu_report
from tilewise.benchmarks.layers import Activation, BatchNorm, Conv, Dropout, Matmul, Pool
from tilewise.kernels import dispatch, settings


def test_checkout_is_importable_without_an_installation(tmp_path):
    links = gpu_check.link_packages(tmp_path)
    code = """
        import numpy as np, tilewise, tilewise.benchmarks.cases, tilewise.nn.models
        from pathlib import Path
        print(Path(tilewise.__file__).resolve(), tilewise.relu(np.ones(3)).sum(), tilewise.kernels.__file__)
    """
    printed = run_python(code, tmp_path, links).split()
    assert printed == [
        str(ROOT / "package" / "__init__.py"),
        "3.0",
        str(links / "tilewise" / "kernels" / "__init__.py"),
    ]


def test_all_steps_run_and_what_fails_is_told(tmp_path):
    mark = "from pathlib import Path; Path({!r}).touch()"
    out = tmp_path / "out"
    side_by_side = {"also fails": ["-c", "print('why'); raise SystemExit(4)"], "goes on": ["-c", "print('{seconds}')"]}
    chosen = [
        gpu_check.Step({"fails": ["-c", "raise SystemExit(3)"]}, 0.5),
        gpu_check.Step({"hangs": ["-c", "import time; time.sleep(60)"]}, 0.05),
        gpu_check.Step(side_by_side, 0.5, out / "tests.log"),
        gpu_check.Step({"works": ["-c", mark.format(str(tmp_path / "there"))]}, 0.5),
    ]
    outcomes = gpu_check.run_all(chosen, {}, out, seconds=20)
    assert outcomes == {
        "fails": "exit status 3", "hangs": "ended after 1 s", "also fails": "exit status 4", "goes on": "ok",
        "works": "ok",
    }  # fmt: skip
    assert (tmp_path / "there").exists()
    assert json.loads((out / "gpu-check.json").read_text())["outcomes"] == outcomes
    log = (out / "tests.log").read_text()
    assert "==== also fails: exit status 4\nwhy" in log
    assert "==== goes on: ok\n1\n" in log, "the time that is left, but never less than a second"


def test_without_a_gpu_nothing_else_is_run(tmp_path, capsys):
    first, second = gpu_check.steps([], [])[0], gpu_check.Step({"next": ["-c", "pass"]}, 0.5)
    for status, ran in ((3, False), (0, True)):
        here = gpu_check.Step(
            {name: ["-c", f"raise SystemExit({status})"] for name in first.commands}, 0.5, None, first.needed
        )
        assert ("next" in gpu_check.run_all([here, second], {}, tmp_path, seconds=20)) == ran
        assert ("no GPU that tilewise can use" in capsys.readouterr().out) != ran


def test_a_file_that_hangs_leaves_time_to_others(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check.os, "cpu_count", lambda: 2)  # one after the other
    commands = {"hangs": ["-c", "import time; time.sleep(60)"], "other": ["-c", "pass"]}
    step = gpu_check.Step(commands, 1.0, tmp_path / "tests.log")
    assert gpu_check.run_all([step], {}, tmp_path, seconds=5) == {"hangs": "ended after 3 s", "other": "ok"}


def test_steps_use_no_plugin_and_only_tests_of_gpu_kernels():
    tests = next(step for step in gpu_check.steps([], []) if step.log is not None).commands
    assert not any("benchmark-disable" in a or "xdist" in a for arguments in tests.values() for a in arguments)
    assert {"test_cuda_activation.py", "test_cuda_conv_tensor.py", "test_cuda_operands.py"} <= set(tests)
    assert "test_cupy_pool.py" in tests
    assert not [name for name in tests if name.endswith(("_compile.py", "_driver.py", "_module.py", "_mutations.py"))]
    assert gpu_check.SECONDS < 480


class Here:
    """A pool of processes that is this one."""

    map = staticmethod(map)


def test_every_kernel_is_loaded_and_a_failure_is_named(gpu, monkeypatch, capsys):
    import gpu_load

    names = []
    monkeypatch.setattr(gpu, "current", contextlib.nullcontext, raising=False)
    monkeypatch.setattr(
        gpu, "_load", lambda form: names.append(form.kernel.name) or 1 / (form.dtype.itemsize != 8), raising=False
    )

    monkeypatch.setattr(gpu_load, "ProcessPoolExecutor", lambda *arguments: contextlib.nullcontext(Here))
    assert gpu_load.main() == 1
    printed = capsys.readouterr().out
    assert "FAILED activate_all float64: ZeroDivisionError" in printed
    assert "FAILED activate_all float32" not in printed
    assert any("tensor" in name for name in names)


@pytest.mark.parametrize(("capability", "hopper"), [((9, 0), True), ((12, 0), False), ((7, 5), False)])
def test_only_kernels_that_run_on_the_device_are_loaded(monkeypatch, capability, hopper):
    """Code for sm_90a is refused by later devices, too."""
    import gpu_load

    from tilewise.kernels.cupy import driver

    loaded = []
    engine = SimpleNamespace(capability=capability, current=contextlib.nullcontext, _load=loaded.append)
    monkeypatch.setattr(driver, "engine", lambda ordinal: engine)
    forms = [("cupy matmul_wgmma<T, 256, true, true>", "float16"), ("cupy activate_all<T>", "float32")]
    assert [gpu_load._load(form)[2] for form in forms] == ["", ""]
    assert [(form.kernel.name, form.dtype.name) for form in loaded] == forms[0 if hopper else 1 :]


class Event:
    """torch.cuda.Event, on the host's clock."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.seconds = time.perf_counter()

    def elapsed_time(self, end):
        return 1e3 * (end.seconds - self.seconds)


@pytest.fixture
def on_the_host(gpu, emulators, torch, monkeypatch):
    """PyTorch's CUDA is the host; tilewise's are the emulators of both backends."""
    if gpu.schedule == "real":
        pytest.skip("only without a GPU")
    with emulated_gpu(emulators("cupy")):
        yield _on_the_host(torch, monkeypatch)


def _on_the_host(torch, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(
        cases, "ALL", {c.key: c for c in (
            Activation("relu", "tiny", 2, (3, 5)), Activation("sigmoid", "tiny", 2, (3, 5)),
            Activation("softmax", "none", 2, (5,)),
        )}
    )  # fmt: skip
    monkeypatch.setattr(gpu_peers, "LARGE", Matmul("matmul", "square.8", 1, 8, 8, 8))
    return torch


def timed(tmp_path, *arguments) -> tuple[int, dict]:
    options = ["--seconds", "0.001", "--launches", "3", "--results", str(tmp_path), "--batch", "2", *arguments]
    status = gpu_peers.main(options, device="cpu")
    return status, json.loads((tmp_path / "cpu.json").read_text())


def test_timings_of_both_backends_beside_pytorch(on_the_host, tmp_path, capsys, monkeypatch):
    status, written = timed(tmp_path, "--only", "relu|sigmoid")
    printed = capsys.readouterr().out
    assert status == 0
    assert [(r["key"], r["dtype"]) for r in written["peers"]] == [
        (f"{name} tiny", dtype) for names, dtypes in ((("relu", "sigmoid"), ("float32",)),
            (("relu", "sigmoid"), ("float16", "bfloat16"))) for name in names for dtype in dtypes
    ]  # fmt: skip
    for r in written["peers"]:
        half = r["dtype"] == "bfloat16"
        assert set(r["seconds"]) == ({"cupy", "torch"} if half else {"cuda", "cupy", "torch"})
        assert set(r["missing"]) == ({"cuda"} if half else set())
        assert r["dispatched"] == {"flops": 30, "bytes": 60 * (4 if r["dtype"] == "float32" else 2)}
    assert "x is bfloat16" in written["peers"][3]["missing"]["cuda"]
    assert set(written["launches"]) == {
        "cuda: launch of an empty kernel with four arguments", "torch.relu of 32 numbers",
        "cuda: relu of 32 numbers", "cupy: relu of 32 numbers",
    }  # fmt: skip
    assert "activation forward float32 cuda: geometric mean" in printed
    assert "activation forward bfloat16 cupy: geometric mean" in printed
    monkeypatch.setattr(gpu_choices, "HOST_BOUND", 0)
    made = gpu_choices.measurements(written)
    assert {kind: set(row.seconds) for kind, row in made.rows.items()} == {
        f"{name} {dtype} small": {"cuda", "cupy"} for name in ("relu", "sigmoid") for dtype in ("float32", "float16")
    }


def test_wrong_result_is_not_timed_and_fails(on_the_host, tmp_path, monkeypatch, capsys):
    relu = tilewise.relu

    def wrong_in_cupy(x):
        off = x.numel() == 30 and settings.active().backend == "cupy"
        return relu(x) + float(off)

    monkeypatch.setattr(tilewise, "relu", wrong_in_cupy)
    status, written = timed(tmp_path, "--only", "relu|sigmoid")
    first, second, *_ = written["peers"]
    assert status == 1
    assert "AssertionError: relu tiny float32: off by" in first["errors"]["cupy"]
    assert set(first["seconds"]) == {"cuda", "torch"}, "the other backend is measured all the same"
    assert set(second["seconds"]) == {"cuda", "cupy", "torch"}
    printed = capsys.readouterr()
    assert "FAILED relu tiny float32 cupy: AssertionError" in printed.err
    assert "FAILED" in printed.out, "in the table"


def test_missing_kernel_is_named(on_the_host, tmp_path, monkeypatch):
    def missing(x, **options):
        raise NotImplementedError("softmax: backend 'cuda' does not have it")

    monkeypatch.setattr(tilewise, "softmax", missing)
    status, written = timed(tmp_path, "--only", "softmax")
    assert (status, written["peers"][0]["missing"]["cuda"]) == (0, "softmax: backend 'cuda' does not have it")


def test_what_pytorch_cannot_do_is_an_error_and_the_rest_goes_on(on_the_host, tmp_path, monkeypatch):
    def fails(case, *arguments):
        if case.op == "relu":
            raise RuntimeError("out of memory")
        return torch_calls(case, *arguments)

    torch_calls = gpu_peers.engines.torch_calls
    monkeypatch.setattr(gpu_peers.engines, "torch_calls", fails)
    status, written = timed(tmp_path, "--only", "relu|sigmoid")
    assert (status, written["peers"][0]["errors"]) == (1, {"torch": "RuntimeError: out of memory"})
    assert written["peers"][1]["seconds"]


def test_budget_ends_with_names(on_the_host, tmp_path, capsys):
    assert timed(tmp_path, "--budget", "-1")[1]["peers"] == []
    assert "not measured, no time left: matmul square.8 float32" in capsys.readouterr().err


def test_rows_of_a_convolution():
    conv = Conv("conv2d", "c", 2, 4, 8, 4, 3)
    record = {
        "key": conv.key, "shape": conv.shape, "dtype": "float32", "rate_unit": "GFLOP/s", "flops": 2e9, "bytes": 1,
        "seconds": {
            "cuda": 1e-3, "cupy": 5e-4, "torch": 2e-3, "cuda TF32": 1e-3, "torch TF32": 5e-4, "torch NHWC": 4e-3,
        },
        "kernels": {"cuda": 1e-4, "cupy": 2e-4, "torch": 1e-4, "torch NHWC": 1e-4},
        "missing": {"cupy TF32": "no", "cuda NHWC": "no"}, "errors": {"cupy NHWC": "wrong"},
    }  # fmt: skip
    assert [row[1:] for row in gpu_peers._rows(record)] == [
        ("float32", "", "1.00 ms", "500 us", "2.00 ms", "4000 GFLOP/s", "2.00", "4.00", "1.00 0.50"),
        ("float32", "NHWC", "missing", "FAILED", "4.00 ms", "", "", "", ""),
        ("float32", "TF32", "1.00 ms", "missing", "500 us", "2000 GFLOP/s", "0.50", "", ""),
    ]
    record |= {"op": "conv2d", "family": "conv"}
    assert list(gpu_peers._summary([record]))[:2] == [
        "conv forward float32 cuda: geometric mean 2.00, worst 2.00; kernels alone geometric mean 1.00, worst 1.00",
        "conv forward float32 cupy: geometric mean 4.00, worst 4.00; kernels alone geometric mean 0.50, worst 0.50",
    ]


def test_kernels_alone_are_timed_in_a_graph(torch, monkeypatch):
    calls, graph = [], SimpleNamespace(replay="replayed")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda given: contextlib.nullcontext() if given is graph else None)
    timed = {"replayed": 3.0}
    monkeypatch.setattr(gpu_peers, "time_call", lambda torch, call, seconds: timed[call])
    assert gpu_peers.time_kernels(torch, lambda: calls.append(1), 0.01) == 3.0 / len(calls)
    assert len(calls) == gpu_peers.CAPTURED


def names(backends, *variants):
    return {f"{engine} {variant}".strip() for engine in (*backends, "torch") for variant in variants}


def test_convolution_in_both_layouts_and_with_tf32(on_the_host):
    case = Conv("conv2d", "tiny", 2, 4, 5, 8, 3, padding=1)
    record = gpu_peers.measure(on_the_host, case, "float32", 0.001, "cpu", ["cuda"])
    assert set(record["seconds"]) == names(["cuda"], "", "NHWC", "TF32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "case",
    [
        Pool("max_pool2d", "tiny", 2, 8, 6, 3, 2, 1), Pool("max_pool2d_backward", "tiny", 2, 8, 6, 3, 2, 1),
        Pool("adaptive_avg_pool2d_backward", "tiny", 2, 8, 6), BatchNorm("batch_norm", "tiny", 2, 8, 6, True),
    ],
    ids=lambda case: case.op,
)  # fmt: skip
def test_images_in_both_layouts(on_the_host, case, dtype):
    record = gpu_peers.measure(on_the_host, case, dtype, 0.001, "cpu")
    backends = ["cupy"] if dtype == "bfloat16" else ["cuda", "cupy"]
    assert record["errors"] == {}
    assert set(record["seconds"]) == names(backends, "", "NHWC")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_drawn_is_compared_with_our_own(on_the_host, monkeypatch, dtype):
    """PyTorch drops other elements."""
    case, backends = Dropout("dropout", "tiny", 2, (3, 50)), ["cuda", "cupy"]
    record = gpu_peers.measure(on_the_host, case, dtype, 0.001, "cpu", backends)
    assert record["errors"] == {}
    assert set(record["seconds"]) == names(backends, "")
    dropout = tilewise.dropout
    tensor = on_the_host.Tensor
    monkeypatch.setattr(tilewise, "dropout", lambda x, p, seed: dropout(x, p, seed=seed + isinstance(x, tensor)))
    wrong = gpu_peers.measure(on_the_host, case, dtype, 0.001, "cpu", backends)["errors"]
    assert set(wrong) == set(backends)


def test_every_family_is_timed_but_those_without_gpu_kernels():
    missing = {case.family for case in cases.ALL.values()} - set(gpu_peers.FAMILIES)
    assert {f for f in missing for b in gpu_peers.BACKENDS if dispatch.implementation_module(b, f)} == set()


def test_what_was_measured_is_written_as_it_goes(on_the_host, tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(tilewise, "sigmoid", stop)
    with pytest.raises(KeyboardInterrupt):
        timed(tmp_path, "--only", "relu|sigmoid")
    assert [r["key"] for r in json.loads((tmp_path / "cpu.json").read_text())["peers"]] == ["relu tiny"]


def test_report_of_what_was_measured(tmp_path, capsys):
    relu = {"key": "relu a", "op": "relu", "family": "activation", "dtype": "float32"}
    backward = relu | {"op": "relu_backward", "dtype": "bfloat16"}
    about = {"device": "Made Up 1000", "date": "2000-01-01", "command": "make gpu-check", "torch": "2.11.0"}
    peers = [
        relu | {"seconds": {"cuda": 2.0, "cupy": 1.0, "torch": 4.0}, "kernels": {"cuda": 1.0, "torch": 3.0}},
        relu | {"seconds": {"cuda": 2.0, "torch": 1.0}, "kernels": {}},
        backward | {"seconds": {"cupy": 2.0, "torch": 1.0}, "kernels": {"cupy": 1.0, "torch": 1.0}},
    ]
    (tmp_path / "made-up.json").write_text(json.dumps(about | {"peers": peers}))
    (tmp_path / "gpu-check.json").write_text("{}")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n\n{gpu_report.BEGIN}\n\nold\n\n{gpu_report.END}\n\nafter\n")
    assert gpu_report.main(["--results", str(tmp_path), "--readme", str(readme)]) == 0
    filled = readme.read_text()
    assert "| activation | float32 | 2 | 1.00 (0.50) | 3.00 (3.00) | 4.00 (4.00) |  |" in filled
    assert "| activation backward | bfloat16 | 1 |  |  | 0.50 (0.50) | 1.00 (1.00) |" in filled
    assert "old" not in filled
    assert "Made Up 1000" in capsys.readouterr().out
    assert gpu_report.main(["--results", str(tmp_path / "none")]) == 1


def test_kernels_of_calls_are_summed():
    events = [
        ("cudaLaunchKernel", 9),
        ("cuLaunchKernel", 9),
        *[("sum<float>(int)", 3_000)] * 6,
        ("cutlass_gemm", 1_500),
    ]
    assert gpu_kernels.CALLS == 3
    assert gpu_kernels.summed(events) == {"sum<float>(int)": (2.0, 6.0), "cutlass_gemm": (0.33, 0.5)}
