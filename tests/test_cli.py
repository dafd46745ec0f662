"""`python -m tilewise`: its three commands, their help and their errors."""

import json
import subprocess
import sys

import pytest
from installation import run_python

import tilewise
from tilewise import cli, warmup
from tilewise.benchmarks import cases, timing
from tilewise.kernels import dispatch
from tilewise.kernels.cpu import jit, simd
from tilewise.progress import Progress


def test_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "tilewise", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"tilewise {tilewise.__version__}\n"


@pytest.mark.parametrize("command", [[], ["info"], ["warmup"], ["bench"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([*command, "--help"])
    assert capsys.readouterr().out.startswith(" ".join(["usage: python -m tilewise", *command]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["run"], "invalid choice: 'run'"),
        (["info", "--all"], "unrecognized arguments: --all"),
        (["warmup", "--dtype", "float16"], "invalid choice: 'float16'"),
        (["bench", "--batch", "0"], "must be a whole number of at least 1, got '0'"),
        (["bench", "--threads", "two"], "must be a whole number of at least 1, got 'two'"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert message in capsys.readouterr().err


def test_info(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    for expected in (
        f"tilewise {tilewise.__version__}",
        "numpy ",
        "numba ",
        f"{simd.VECTOR_BYTES * 8} bits",
        *simd.features(),
        "layer ",
        str(jit.cache_folder()),
        *(device.name for device in tilewise.devices()),
        "cupy      not available: ",
    ):
        assert expected in printed


def test_info_without_a_cache_folder(tmp_path):
    (tmp_path / "file").write_text("")
    code = "import tilewise.cli; tilewise.cli.main(['info'])"
    assert "no folder can be written" in run_python(code, tmp_path, NUMBA_CACHE_DIR=str(tmp_path / "file" / "below"))


def test_warmup_without_a_cache_folder(tmp_path):
    (tmp_path / "file").write_text("")
    code = "import tilewise.cli; print(tilewise.cli.main(['warmup']))"
    assert run_python(code, tmp_path, NUMBA_CACHE_DIR=str(tmp_path / "file" / "below")) == "1"


def test_warmup_calls_every_public_function():
    called = {name.split()[0].rstrip(",") for job in warmup.jobs(("float32",)) for name, _ in warmup.calls(job)}
    functions = {name for name in tilewise.kernels.__all__ if getattr(tilewise, name).__module__ != dispatch.__name__}
    assert called == functions


def test_warmup_for_the_benchmark_calls_its_cases():
    called = [name for job in warmup.jobs(("float32",), for_bench=True) for name, _ in warmup.calls(job)]
    assert sorted(called) == sorted(cases.QUICK)


def test_warmup_compiles_every_kernel_in_both_forms(tmp_path):
    """In a process of its own, with the tests' cache: what other tests have compiled is only loaded."""
    code = """
        from tilewise import cli
        status = cli.main(["warmup", "--jobs", "1"])
        from tilewise.kernels.cpu import jit
        cold = [f"{k.__name__} {form}" for k in jit.KERNELS for form in ("serial", "parallel")[:1 + k.has_parallel]
                if form not in vars(k) or not getattr(k, form).signatures]
        print(status, cold)
        halves = [k for k in jit.KERNELS if k.__module__.startswith("tilewise.kernels.cpu.batchnorm")]
        print([k.__name__ for k in halves for form in (k.serial, k.parallel)
               if not any("uint16" in str(s) for s in form.signatures)], len(halves))
    """
    summary, last, halves = run_python(code, tmp_path).splitlines()
    assert last == "0 []"
    assert halves == "[] 6"
    assert " kernels are ready in " in summary


def test_warmup_in_two_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(warmup, "FAMILIES", {"padding": warmup.FAMILIES["padding"]})
    outcomes = dict(warmup.run(warmup.jobs(("float32",)), processes=2))
    assert {job.form for job in outcomes} == {"serial", "parallel"}
    for job, outcome in outcomes.items():
        assert outcome.compiled
        assert all(name.endswith(job.form) for name in outcome.compiled)
        assert outcome.missing == {}


def test_bench_prints_a_table_and_writes_json(tmp_path, capsys):
    file = tmp_path / "out.json"
    assert cli.main(["bench", "--match", "linear lenet5.fc1", "--batch", "3", "--json", str(file)]) == 0
    printed = capsys.readouterr()
    assert "3x400 -> 120" in printed.out
    assert "GFLOP/s" in printed.out
    assert "no GPU" in printed.out or "GPU: " in printed.out
    assert "[1/1] linear lenet5.fc1" in printed.err
    written = json.loads(file.read_text())
    (comparison,) = written["comparisons"]
    assert comparison["flops"] == 2 * 3 * 400 * 120
    assert 0 < comparison["ours"]["best"] <= comparison["ours"]["median"]
    assert written["device"] in printed.out


def test_bench_of_nothing_names_what_there_is(capsys):
    assert cli.main(["bench", "--match", "alexnet"]) == 2
    error = capsys.readouterr().err
    assert "no case has 'alexnet' in its name" in error
    assert "resnet50.conv1" in error


def test_bench_reports_a_case_that_fails(monkeypatch, capsys):
    def wrong(case, dtype, ours, reference):
        raise AssertionError("off by 0.5")

    monkeypatch.setattr(timing, "check", wrong)
    assert cli.main(["bench", "--match", "softmax resnet50"]) == 1
    assert "softmax resnet50.classes: AssertionError: off by 0.5" in capsys.readouterr().err


def test_a_backend_that_is_not_there_is_an_error_with_its_reason(tmp_path):
    code = "import tilewise.cli; print(tilewise.cli.main(['bench', '--match', 'lenet5.fc1']))"
    assert run_python(code, tmp_path, TILEWISE_BACKEND="cuda").endswith("1")


def test_progress_without_a_terminal_is_one_line_a_step(capsys):
    with Progress("working", 10) as progress:
        progress.step("first")
        progress.step("second")
    assert capsys.readouterr().err.splitlines() == ["working [ 1/10] first  (0 s)", "working [ 2/10] second  (0 s)"]


def test_progress_on_a_terminal_is_a_bar(tmp_path):
    pytest.importorskip("rich", reason="rich is not installed (extra: bench)")
    code = """
        from tilewise.progress import Progress
        with Progress("working", 2) as progress:
            progress.step("first")
        print(progress.bar is not None, progress.bar.tasks[0].completed)
    """
    assert run_python(code, tmp_path, FORCE_COLOR="1") == "True 1"
