"""`make gpu-check` as far as it goes without a GPU: the checkout made importable, the steps, timings on an emulator."""

import contextlib
import json
import time

import gpu_check
import pytest
from installation import ROOT, run_python

import tilewise
from tilewise.benchmarks import cases, gpu_peers
from tilewise.benchmarks.layers import Activation, Conv, Matmul


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


class Event:
    """torch.cuda.Event, on the host's clock."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.seconds = time.perf_counter()

    def elapsed_time(self, end):
        return 1e3 * (end.seconds - self.seconds)


@pytest.fixture
def on_the_host(gpu, torch, monkeypatch):
    """PyTorch's CUDA is the host; tilewise's is the emulator."""
    if gpu.schedule == "real":
        pytest.skip("only without a GPU")
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


def test_timings_beside_pytorch(on_the_host, tmp_path, capsys):
    status, written = timed(tmp_path, "--only", "relu|sigmoid")
    printed = capsys.readouterr().out
    assert status == 0
    assert [(r["key"], r["dtype"]) for r in written["peers"]] == [("relu tiny", "float32"), ("sigmoid tiny", "float32")]
    assert all(set(r["seconds"]) == {"ours", "torch"} for r in written["peers"])
    assert set(written["launches"]) == {
        "launch of an empty kernel with four arguments", "tilewise.relu of 32 numbers", "torch.relu of 32 numbers"
    }  # fmt: skip
    assert "activation forward float32: geometric mean" in printed


def test_wrong_result_is_not_timed_and_fails(on_the_host, tmp_path, monkeypatch, capsys):
    relu = tilewise.relu
    monkeypatch.setattr(tilewise, "relu", lambda x: relu(x) + float(x.numel() == 30))
    status, written = timed(tmp_path, "--only", "relu|sigmoid")
    assert status == 1
    assert "AssertionError: relu tiny float32: off by" in written["peers"][0]["error"]
    assert "seconds" in written["peers"][1], "the others are measured all the same"
    assert "FAILED relu tiny" in capsys.readouterr().err


def test_missing_kernel_is_named(on_the_host, tmp_path, monkeypatch):
    def missing(x, **options):
        raise NotImplementedError("softmax: backend 'cuda' does not have it")

    monkeypatch.setattr(tilewise, "softmax", missing)
    status, written = timed(tmp_path, "--only", "softmax")
    assert (status, written["peers"][0]["missing"]) == (0, "softmax: backend 'cuda' does not have it")


def test_budget_ends_with_names(on_the_host, tmp_path, capsys):
    assert timed(tmp_path, "--budget", "-1")[1]["peers"] == []
    assert "not measured, no time left: matmul square.8 float32" in capsys.readouterr().err


def test_row_of_a_convolution():
    conv = Conv("conv2d", "c", 2, 4, 8, 4, 3)
    record = {
        "key": conv.key,
        "shape": conv.shape,
        "dtype": "float32",
        "rate_unit": "GFLOP/s",
        "flops": 2e9,
        "bytes": 1,
    }
    record["seconds"] = {
        "ours": 1e-3, "torch": 2e-3, "ours TF32": 1e-3, "torch TF32": 5e-4, "ours NHWC": 2e-3,
        "torch channels_last": 4e-3,
    }  # fmt: skip
    expected = ("float32", "1.00 ms", "2000 GFLOP/s", "2.00 ms", "2.00", "1.00 ms", "0.50", "2.00 ms", "2.00")
    assert gpu_peers._row(record)[1:] == expected


def test_half_operands(on_the_host):
    torch = on_the_host
    case = Activation("relu", "tiny", 2, (3, 5))
    assert set(gpu_peers.measure(torch, case, "float16", 0.001, "cpu")) == {"ours", "torch"}


def test_convolution_in_both_layouts_and_with_tf32(on_the_host):
    torch = on_the_host
    case = Conv("conv2d", "tiny", 2, 4, 5, 8, 3, padding=1)
    names = {"ours", "ours TF32", "ours NHWC", "torch", "torch TF32", "torch channels_last"}
    assert set(gpu_peers.measure(torch, case, "float32", 0.001, "cpu")) == names


def test_what_was_measured_is_written_as_it_goes(on_the_host, tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(tilewise, "sigmoid", stop)
    with pytest.raises(KeyboardInterrupt):
        timed(tmp_path, "--only", "relu|sigmoid")
    assert [r["key"] for r in json.loads((tmp_path / "cpu.json").read_text())["peers"]] == ["relu tiny"]
