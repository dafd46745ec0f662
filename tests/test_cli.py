"""`python -m tilewise`: its three commands, their help and their errors."""

import json
import subprocess
import sys

import pytest
from installation import run_python

import tilewise
from tilewise import cli, warmup
from tilewise.kernels import dispatch
from tilewise.kernels.cpu import jit, simd


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
    called = {name.split()[0].rstrip(",") for name, _ in warmup.calls("float32")}
    functions = {name for name in tilewise.kernels.__all__ if getattr(tilewise, name).__module__ != dispatch.__name__}
    assert called == functions


def test_warmup_compiles_every_kernel_in_both_forms(tmp_path):
    """In a process of its own, with the tests' cache: what other tests have compiled is only loaded."""
    code = """
        import sys
        from tilewise import cli, warmup
        status = cli.main(["warmup"])
        from tilewise.kernels.cpu import jit
        cold = [f"{k.__name__} {form}" for k in jit.KERNELS for form in ("serial", "parallel")[:1 + k.has_parallel]
                if form not in vars(k) or not getattr(k, form).signatures]
        print(status, cold)
    """
    *_, summary, last = run_python(code, tmp_path).splitlines()
    assert last == "0 []"
    assert " kernels are in " in summary


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
    monkeypatch.setattr(tilewise, "softmax", lambda x, axis: x, raising=False)
    assert cli.main(["bench", "--match", "softmax resnet50"]) == 1
    assert "softmax resnet50.classes: AssertionError: " in capsys.readouterr().err


def test_a_backend_that_is_not_there_is_an_error_with_its_reason(tmp_path):
    code = "import tilewise.cli; print(tilewise.cli.main(['bench', '--match', 'lenet5.fc1']))"
    assert run_python(code, tmp_path, TILEWISE_BACKEND="cuda").endswith("1")


def test_progress_without_a_terminal_is_one_line_a_step(capsys):
    from tilewise.progress import steps

    assert list(steps([("first", 1), ("second", 2)], "working")) == [1, 2]
    lines = capsys.readouterr().err.splitlines()
    assert [line.rsplit(" ", 2)[0] for line in lines] == ["working [1/2] first", "working [2/2] second"]
