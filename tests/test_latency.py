"""What `make latency` and `make ladder` are made of. Nothing here asserts how long anything takes."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from installation import ROOT

import tilewise
from tilewise.benchmarks import first_calls, ladder, latency, report
from tilewise.benchmarks.cases import ALL
from tilewise.benchmarks.latency import Figure


def test_every_op_family_has_a_first_call():
    families = {getattr(tilewise, op).__module__ for _, op, _ in first_calls._calls(first_calls.SERIAL)}
    assert families == {f"tilewise.kernels.{family}" for family in tilewise.kernels._EXPORTS if family != "dispatch"}
    assert len(first_calls.names()) == len(set(first_calls.names()))


@pytest.mark.parametrize("form", [first_calls.SERIAL, first_calls.PARALLEL])
@pytest.mark.parametrize("name", first_calls.names())
def test_first_calls_are_valid(name, form):
    """Planned, which checks the operands, and not run: that would compile every kernel."""
    call = first_calls.prepared(name, form)
    decision = tilewise.explain(call.func, *call.args, **call.keywords)
    assert decision.backend == "cpu"
    if call.func is tilewise.conv2d_backward:  # explained as such: each gradient has its own algorithm
        return
    for algorithm in ("gemm", "winograd", "depthwise"):
        assert algorithm not in name.split() or decision.algorithm == algorithm


@pytest.mark.parametrize("form", [first_calls.SERIAL, first_calls.PARALLEL])
def test_probe_of_a_first_call_names_the_kernels_of_its_form(form, tmp_path):
    cold, warm = (latency._probe("first", "relu", form, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2))
    assert cold["kernels"]
    assert all(kernel.endswith(form) for kernel in cold["kernels"])
    assert cold["misses"] == len(cold["kernels"])
    assert (warm["kernels"], warm["misses"]) == (cold["kernels"], 0)


def test_probe_beside_blas():
    run = latency._probe("beside", "relu", "0.01")
    assert run["ratio"] == pytest.approx(run["pair"] / (run["ours"] + run["blas"]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_calls_a_kernel():
    figure = latency.after_fork()
    assert figure.measured > 0
    assert "the child's kernels" in figure.note


def test_a_failing_process_is_an_error():
    with pytest.raises(RuntimeError, match="no such thing"):
        latency._run(["-c", "raise SystemExit('no such thing')"])


def test_rows_tell_whether_the_goal_is_reached():
    assert Figure("import", "best", 0.02, 0.03).row() == ("import", "best", "", "20.0 ms", "30.0 ms", "reached")
    assert Figure("beside", "default", 1.7, 1.6, "x", "tbb").row() == (
        "beside", "default", "tbb", "1.70x", "1.60x", "MISSED",
    )  # fmt: skip
    assert Figure("beside", "other", 1.7, None, "x").row()[4:] == ("", "")


def test_a_part_measured_again_replaces_only_itself(tmp_path):
    of = report.machine()
    first, second = Figure("import", "best", 1.0, 2.0), Figure("fork", "", 1.0, 2.0)
    latency.save(of, [first, second], tmp_path)
    path = latency.save(of, [Figure("fork", "", 3.0, 2.0)], tmp_path)
    saved = json.loads(path.read_text())
    assert [(f["what"], f["measured"]) for f in saved["figures"]] == [("import", 1.0), ("fork", 3.0)]
    assert saved["command"] == "make latency"


@pytest.mark.parametrize("step", [ladder.three_loops, ladder.rows_in_order, ladder.blocked, ladder.register_tile])
def test_steps_of_the_matrix_product(step, rng):
    m, n = 2 * ladder.MR, 3 * ladder.NR
    a, b = (rng.standard_normal(shape, dtype=np.float32) for shape in ((m, 300), (300, n)))
    np.testing.assert_allclose(ladder._into(step, (m, n), a, b), a @ b, atol=1e-3)


def test_the_definition_of_the_convolution():
    case = replace(ladder.CONVOLUTION, batch=1, channels=3, outputs=4, size=5)
    (x, weight, bias), options = case.arguments(np.random.default_rng(0), np.float32)
    with tilewise.using(backend="reference"):
        right = tilewise.conv2d(x, weight, bias, **options)
    np.testing.assert_allclose(ladder._into(ladder.definition, right.shape, x, weight, bias), right, atol=1e-5)


def test_the_page_is_filled_between_its_markers():
    page = (ROOT / ladder.PAGE).read_text(encoding="utf-8")
    step = {"step": "one step", "seconds": 1e-3, "rate": 20.0}
    shape = ALL["conv2d resnet50.conv2.3x3"].shape
    ladders = {name: {"shape": shape, "steps": [step]} for name in ("ladder-matmul", "ladder-conv2d")}
    result = report.machine() | {"command": "make ladder", "peak": 200.0, "ladders": ladders}
    filled = ladder.fill(page, [result, result | {"device": "another", "peak": 100.0}])
    assert filled.count("| one step | 1.00 ms | 20 GFLOP/s | 10% |") == 2
    assert filled.count("| one step | 1.00 ms | 20 GFLOP/s | 20% |") == 2
    assert filled.splitlines()[0] == page.splitlines()[0]
    with pytest.raises(ValueError, match="the page must have the markers <!-- ladder-matmul:begin -->"):
        ladder.fill("no markers", [result])
