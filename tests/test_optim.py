"""Updates of one parameter: every backend against formulas written out here, in place, whatever the strides."""

import numpy as np
import pytest
from tolerances import assert_close

import tilewise
from tilewise import kernels

DTYPES = [np.float16, np.float32, np.float64]
# name -> (function, operands beside param and grad, options)
STEPS = {
    "sgd": ("sgd_step", (), {"lr": 0.1}),
    "sgd, decay": ("sgd_step", (), {"lr": 0.1, "weight_decay": 0.2}),
    "momentum": ("sgd_step", ("velocity",), {"lr": 0.1, "momentum": 0.9}),
    "nesterov": ("sgd_step", ("velocity",), {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adagrad": ("adagrad_step", ("square",), {"lr": 0.1, "weight_decay": 0.1}),
    "rmsprop": ("rmsprop_step", ("square",), {"lr": 0.1}),
    "rmsprop, momentum": ("rmsprop_step", ("square", "velocity"), {"alpha": 0.9, "momentum": 0.8, "weight_decay": 0.1}),
    "adam": ("adam_step", ("mean", "square"), {"step": 3, "weight_decay": 0.1}),
    "adamw": (
        "adam_step",
        ("mean", "square"),
        {"step": 2, "betas": (0.8, 0.9), "weight_decay": 0.1, "decoupled": True},
    ),
}
SIZES = [0, 1, 7, 8, 257, 40_000]


def expected(name, p, g, state, o):
    """The new param and state, from the formulas in the docstrings, in float64."""
    if o.get("weight_decay") and not o.get("decoupled"):
        g = g + o["weight_decay"] * p
    lr, new = o.get("lr", 1e-3 if name == "adam_step" else 1e-2), dict(state)
    if name == "sgd_step":
        if "velocity" in state:
            new["velocity"] = v = o["momentum"] * state["velocity"] + g
            g = g + o["momentum"] * v if o.get("nesterov") else v
        return p - lr * g, new
    if name == "adam_step":
        (first, second), t = o.get("betas", (0.9, 0.999)), o["step"]
        new["mean"] = first * state["mean"] + (1 - first) * g
        new["square"] = second * state["square"] + (1 - second) * g**2
        if o.get("decoupled"):
            p = p * (1 - lr * o["weight_decay"])
        corrected = np.sqrt(new["square"] / (1 - second**t)) + 1e-8
        return p - lr * new["mean"] / (1 - first**t) / corrected, new
    old, rest, eps = (1, 1, 1e-10) if name == "adagrad_step" else (o.get("alpha", 0.99), 1 - o.get("alpha", 0.99), 1e-8)
    new["square"] = old * state["square"] + rest * g**2
    g = g / (np.sqrt(new["square"]) + eps)
    if "velocity" in state:
        new["velocity"] = g = o["momentum"] * state["velocity"] + g
    return p - lr * g, new


def arrays(rng, dtype, names, shape):
    """param, grad and state; squares are not negative."""
    made = [rng.standard_normal(shape) for _ in range(2 + len(names))]
    return [
        (np.abs(a) + 0.1 if name == "square" else a).astype(dtype)
        for a, name in zip(made, ("", "", *names), strict=True)
    ]


def check_step(rng, case, dtype, shape, change=lambda a: a):
    name, names, options = STEPS[case]
    given = [change(a) for a in arrays(rng, dtype, names, shape)]
    before = [np.array(a, np.float64) for a in given]
    assert getattr(kernels, name)(given[0], given[1], **dict(zip(names, given[2:], strict=True)), **options) is None
    p, state = expected(name, before[0], before[1], dict(zip(names, before[2:], strict=True)), options)
    np.testing.assert_array_equal(given[1], before[1], err_msg="the gradient was changed")
    for actual, right in zip((given[0], *given[2:]), (p, *state.values()), strict=True):
        assert actual.dtype == dtype
        assert_close(actual, right, reduction=16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", STEPS)
def test_steps(backend, rng, case, dtype):
    for size in SIZES:
        check_step(rng, case, dtype, (size,))
    check_step(rng, case, dtype, (6, 8), lambda a: a.T)
    check_step(rng, case, dtype, (6, 8), lambda a: a[::2, ::-1])


@pytest.mark.parametrize("case", STEPS)
def test_cpu_has_the_references_bits(rng, split_everything, case):
    name, names, options = STEPS[case]
    for dtype in (np.float32, np.float64):
        given = arrays(rng, dtype, names, 40_000)
        results = []
        for backend in ("cpu", "reference"):
            copies = [a.copy() for a in given]
            with tilewise.using(backend=backend):
                getattr(kernels, name)(*copies[:2], **dict(zip(names, copies[2:], strict=True)), **options)
            results.append(copies)
        for ours, theirs in zip(*results, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_numbers_belong_to_no_plan(rng):
    from tilewise.kernels import optim

    given = arrays(rng, np.float32, ("mean", "square"), 21)
    kernels.adam_step(*given, step=1)
    plans = len(optim._ADAM.plans)
    for step in range(2, 9):
        kernels.adam_step(*given, step=step, lr=0.1 / step)
    assert len(optim._ADAM.plans) == plans


def test_tensors(torch):
    param, grad = torch.ones(3), torch.ones(3)
    kernels.sgd_step(param, grad, lr=0.5)
    assert param.tolist() == [0.5] * 3


def test_read_only_arrays_stay_as_they_are():
    param, velocity = np.ones(3), np.zeros(3)
    velocity.flags.writeable = False
    for _ in range(2):  # also where a plan is there already
        with pytest.raises(ValueError, match="sgd_step: velocity is read-only, but the update changes it in place"):
            kernels.sgd_step(param, np.ones(3), velocity, lr=0.5, momentum=0.9)
        assert param.tolist() == [1, 1, 1]
        assert velocity.tolist() == [0, 0, 0]
        kernels.sgd_step(param, np.zeros(3), np.zeros(3), lr=0.5, momentum=0.9)


ONE = np.ones(3)
WRONG = [
    (lambda: kernels.sgd_step(ONE, ONE, lr=-1), ValueError, "sgd_step: lr must be finite and at least 0, got -1"),
    (lambda: kernels.sgd_step(ONE, ONE, lr=float("nan")), ValueError, "lr must be finite"),
    (lambda: kernels.sgd_step(ONE, ONE, lr="1"), TypeError, "sgd_step: lr must be a number, got '1'"),
    (lambda: kernels.sgd_step(ONE, ONE, lr=1, momentum=0.5), ValueError, "a momentum needs velocity"),
    (lambda: kernels.sgd_step(ONE, ONE, ONE, lr=1), ValueError, "only a momentum, got momentum 0"),
    (lambda: kernels.sgd_step(ONE, ONE, lr=1, nesterov=True), ValueError, "nesterov needs a momentum"),
    (lambda: kernels.rmsprop_step(ONE, ONE, ONE, ONE), ValueError, "rmsprop_step: a momentum needs velocity"),
    (lambda: kernels.adam_step(ONE, ONE, ONE, ONE, step=0), ValueError, "step counts from 1, got 0"),
    (lambda: kernels.adam_step(ONE, ONE, ONE, ONE, step=1, betas=(0.9, 1.0)), ValueError, "betas must be below 1"),
    (lambda: kernels.adam_step(ONE, ONE, ONE, ONE[:2], step=1), ValueError, r"square must have param's shape \(3,\)"),
    (lambda: kernels.adagrad_step(ONE, ONE, np.ones(3, np.float32)), TypeError, "dtypes must match"),
    (lambda: kernels.adagrad_step(ONE, ONE, None), TypeError, "adagrad_step: square must be an array, got None"),
    (lambda: kernels.sgd_step(np.ones(3, int), np.ones(3, int), lr=1), TypeError, "int64, which is not supported"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()
