"""The dispatcher: using, explain, devices, the environment, the plan cache; one signature for every backend."""

import asyncio
import inspect
import threading
from importlib import import_module

import numpy as np
import pytest
from installation import run_python

import tilewise
from tilewise import kernels
from tilewise.kernels import machine, operation, settings

a32 = np.arange(6, dtype=np.float32).reshape(2, 3)
image, weight = np.ones((1, 3, 8, 8), np.float32), np.ones((4, 3, 3, 3), np.float32)
FAMILIES = {family: names for family, names in kernels._EXPORTS.items() if family != "dispatch"}
# prepare_conv2d makes an operation of its own, of the backends' conv2d
FUNCTIONS = [(family, name) for family, names in FAMILIES.items() for name in names if name != "prepare_conv2d"]
NO_GPU = bool(machine.unavailable_backends())


def backend_now() -> str:
    return tilewise.explain(kernels.matmul, a32, a32.T).backend


# ------------------------------------------------------------------------------------------------ public names


def test_every_public_name_is_there():
    assert len(kernels.__all__) == len(set(kernels.__all__))
    for name in kernels.__all__:
        assert callable(getattr(kernels, name)), name
        assert getattr(tilewise, name) is getattr(kernels, name)
        assert name in dir(kernels)
        assert name in dir(tilewise)
        assert name in tilewise.__all__
    with pytest.raises(AttributeError, match="has no attribute 'conv5d'"):
        kernels.conv5d  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'conv5d'"):
        tilewise.conv5d  # noqa: B018


@pytest.mark.parametrize(("family", "name"), FUNCTIONS)
def test_backends_have_the_same_signatures(family, name):
    both = [getattr(import_module(f"tilewise.kernels.{backend}.{family}"), name) for backend in ("reference", "cpu")]
    ours, theirs = ([(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()] for f in both)
    assert ours == theirs
    assert ours, name
    # arrays are positional, options are keywords
    found = next(
        o for o in vars(import_module(f"tilewise.kernels.{family}")).values()
        if isinstance(o, operation.Operation) and o.name == name
    )  # fmt: skip
    assert tuple(p[0] for p in ours if p[1] is inspect.Parameter.POSITIONAL_OR_KEYWORD) == found.operands
    assert all(p[1] is inspect.Parameter.KEYWORD_ONLY for p in ours[len(found.operands) :])


def test_every_public_function_is_documented():
    for name in kernels.__all__:
        assert inspect.getdoc(getattr(kernels, name)), name


# ------------------------------------------------------------------------------------------------------- using


def test_innermost_using_wins_field_by_field():
    outside = backend_now()
    with tilewise.using(backend="reference", threads=2):
        assert settings.active().threads == 2
        with tilewise.using(threads=1):
            assert (backend_now(), settings.active().threads) == ("reference", 1)
            with tilewise.using(backend="cpu"):
                assert (backend_now(), settings.active().threads) == ("cpu", 1)
            with tilewise.using(device="cpu"):  # the reference runs on the cpu
                assert backend_now() == "reference"
        assert (backend_now(), settings.active().threads) == ("reference", 2)
    assert (backend_now(), settings.active().threads) == (outside, None)


def test_using_ends_with_an_exception():
    outside = backend_now()
    with pytest.raises(ZeroDivisionError), tilewise.using(backend="reference"):
        raise ZeroDivisionError
    assert backend_now() == outside


def test_one_using_may_be_entered_again():
    chosen = tilewise.using(backend="reference")
    with chosen, chosen:
        assert backend_now() == "reference"
    assert backend_now() != "reference"
    with chosen:
        assert backend_now() == "reference"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "tpu"}, ValueError, r"using: device must be one of auto, cpu, gpu, got 'tpu'"),
        ({"device": ""}, ValueError, r"using: device must be one of auto, cpu, gpu, got ''"),
        ({"backend": "torch"}, ValueError, r"using: backend must be one of cpu, reference, cuda, cupy, got 'torch'"),
        (
            {"backend": "cuda", "device": "cpu"},
            ValueError,
            r"using: backend 'cuda' runs on the gpu, but device is 'cpu'",
        ),
        ({"threads": 0}, ValueError, r"using: threads must be at least 1, got 0"),
        ({"threads": 1.0}, TypeError, r"using: threads must be an int, got float"),
        ({"threads": True}, TypeError, r"using: threads must be an int, got bool"),
        ({"tf32": 1}, TypeError, r"using: tf32 must be True or False, got int"),
        ({"threads": 10_000}, ValueError, r"using: threads must be at most \d+ \(NUMBA_NUM_THREADS\), got 10000"),
    ],
)
def test_wrong_choices(options, error, message):
    with pytest.raises(error, match=message):
        tilewise.using(**options)


@pytest.mark.skipif(not NO_GPU, reason="this machine has a usable GPU backend")
@pytest.mark.parametrize("options", [{"device": "gpu"}, {"backend": "cuda"}, {"backend": "cupy"}], ids=str)
def test_asking_for_a_gpu_that_is_not_there_says_why(options):
    reason = next(iter(machine.unavailable_backends().values()))
    with pytest.raises(RuntimeError, match="is not available: ") as caught, tilewise.using(**options):
        pass
    assert reason in str(caught.value)
    assert backend_now() == "cpu"  # the failed choice left nothing behind


def test_tf32_is_off_until_asked_for(monkeypatch):
    assert not settings.active().tf32
    with tilewise.using(tf32=True):
        assert settings.active().tf32
        with tilewise.using(backend="reference"):
            assert settings.active().tf32  # an inner choice of something else leaves it
        with tilewise.using(tf32=False):
            assert not settings.active().tf32
    assert not settings.active().tf32
    monkeypatch.setenv("TILEWISE_TF32", "1")
    assert settings.from_environment.__wrapped__().tf32


def test_threads_see_their_own_using():
    seen, inside, done = {}, threading.Barrier(3, timeout=20), threading.Barrier(3, timeout=20)

    def work(backend):
        with tilewise.using(backend=backend):
            inside.wait()
            seen[backend] = backend_now()
            done.wait()

    others = [threading.Thread(target=work, args=(backend,)) for backend in ("reference", "cpu")]
    for thread in others:
        thread.start()
    inside.wait()
    here = backend_now()
    done.wait()
    for thread in others:
        thread.join()
    assert seen == {"reference": "reference", "cpu": "cpu"}
    assert here == "cpu"


def test_one_using_in_two_threads_at_once():
    chosen, failures = tilewise.using(backend="reference"), []
    entered, left = threading.Barrier(2, timeout=5), threading.Barrier(2, timeout=5)

    def work(first):
        try:
            with chosen:
                entered.wait()
                assert backend_now() == "reference"
                if not first:
                    left.wait()
            assert backend_now() == "cpu"
            if first:
                left.wait()
        except BaseException as error:
            failures.append(error)

    both = [threading.Thread(target=work, args=(first,)) for first in (True, False)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(10)
    assert not failures


def test_tasks_see_their_own_using():
    async def work(backend, other):
        with tilewise.using(backend=backend):
            await other.wait()  # both are inside now
            await asyncio.sleep(0)
            return backend_now()

    async def main():
        go = asyncio.Event()
        tasks = [asyncio.create_task(work(backend, go)) for backend in ("reference", "cpu")]
        await asyncio.sleep(0)
        outside = backend_now()
        go.set()
        return outside, await asyncio.gather(*tasks)

    assert asyncio.run(main()) == ("cpu", ["reference", "cpu"])


# -------------------------------------------------------------------------------------------------- the environment

ASK = """
import numpy as np, tilewise
x = np.ones((2, 2), np.float32)
try:
    print(tilewise.explain(tilewise.matmul, x, x).backend, tilewise.kernels.settings.active().threads)
    with tilewise.using(backend="reference"):
        print(tilewise.explain(tilewise.matmul, x, x).backend, tilewise.kernels.settings.active().threads)
except Exception as error:
    print(type(error).__name__, error)
"""


def asked(tmp_path, **environment) -> list[str]:
    names = ("TILEWISE_DEVICE", "TILEWISE_BACKEND", "TILEWISE_THREADS", "TILEWISE_TF32")
    return run_python(ASK, tmp_path, **{name: environment.get(name) for name in names}).splitlines()


def test_environment(tmp_path):
    assert asked(tmp_path) == ["cpu None", "reference None"]
    assert asked(tmp_path, TILEWISE_BACKEND="reference", TILEWISE_THREADS="2") == ["reference 2", "reference 2"]
    assert asked(tmp_path, TILEWISE_DEVICE="cpu", TILEWISE_THREADS="") == ["cpu None", "reference None"]


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (
            "TILEWISE_DEVICE",
            "tpu",
            "ValueError environment TILEWISE_*: device must be one of auto, cpu, gpu, got 'tpu'",
        ),
        ("TILEWISE_BACKEND", "torch", "ValueError environment TILEWISE_*: backend must be one of"),
        ("TILEWISE_THREADS", "two", "ValueError TILEWISE_THREADS must be a whole number, got 'two'"),
        ("TILEWISE_THREADS", "0", "ValueError environment TILEWISE_*: threads must be at least 1, got 0"),
        ("TILEWISE_THREADS", "9999", "ValueError environment TILEWISE_*: threads must be at most "),
        ("TILEWISE_TF32", "yes", "ValueError TILEWISE_TF32 must be 0 or 1, got 'yes'"),
    ],
)
def test_wrong_environment(tmp_path, variable, value, message):
    (line,) = asked(tmp_path, **{variable: value})
    assert line.startswith(message)


@pytest.mark.skipif(not NO_GPU, reason="this machine has a usable GPU backend")
def test_a_gpu_asked_for_by_the_environment_is_an_error_with_its_reason(tmp_path):
    (line,) = asked(tmp_path, TILEWISE_DEVICE="gpu")
    assert line.startswith("RuntimeError device 'gpu' is not available: ")
    assert next(iter(machine.unavailable_backends().values())) in line


# ------------------------------------------------------------------------------------------------ explain, devices


def test_explain_tells_the_decision_and_runs_nothing():
    nothing = np.full((1, 4, 6, 6), np.nan, np.float32)
    decision = tilewise.explain(kernels.conv2d, image, weight, out=nothing)
    assert np.isnan(nothing).all()
    assert (decision.operation, decision.device, decision.backend) == ("conv2d", "cpu", "cpu")
    assert decision.flops == 2 * 4 * 6 * 6 * 3 * 9
    assert decision.bytes == 4 * (image.size + weight.size + nothing.size)
    assert decision.algorithm in ("direct", "gemm")
    assert decision.algorithm not in decision.rejected
    assert set(decision.rejected) >= {"depthwise", "reference"}
    text = str(decision)
    assert text.startswith("conv2d -> device cpu, backend cpu, algorithm ")
    assert "7,776 FLOPs" in text
    assert f"not depthwise: {decision.rejected['depthwise']}" in text


def test_explain_says_why_not_the_other_backends():
    decision = tilewise.explain(kernels.matmul, a32, a32.T)
    assert decision.flops == 2 * 2 * 2 * 3
    assert "slower by construction" in decision.rejected["reference"]
    if NO_GPU:
        assert decision.rejected["cuda"] == machine.unavailable_backends()["cuda"]
    with tilewise.using(backend="reference"):
        assert tilewise.explain(kernels.conv2d, image, weight).backend == "reference"


def test_explain_takes_unbatched_images_and_tensors(torch):
    batched = tilewise.explain(kernels.conv2d, image, weight, padding=1)
    assert tilewise.explain(kernels.conv2d, image[0], weight, padding=1) == batched
    tensors = torch.from_numpy(image), torch.from_numpy(weight)
    assert tilewise.explain(kernels.conv2d, *tensors, padding=1) == batched


def test_explain_raises_what_the_call_raises():
    with pytest.raises(ValueError, match="conv2d: stride must be at least 1"):
        tilewise.explain(kernels.conv2d, image, weight, stride=0)
    with pytest.raises(TypeError, match=r"explain: .* is not one of tilewise's dispatched functions"):
        tilewise.explain(len, [])
    np.testing.assert_array_equal(kernels.matmul(a32, a32.T), a32 @ a32.T)  # and calls run again


def test_work_counts_padded_taps_and_only_what_is_needed():
    forward = tilewise.explain(kernels.conv2d, image, weight, padding=1)
    assert forward.flops == 2 * 4 * 8 * 8 * 3 * 9
    grad = np.ones((1, 4, 8, 8), np.float32)
    both = tilewise.explain(kernels.conv2d_backward, grad, image, weight, padding=1)
    assert both.flops == 2 * forward.flops
    assert tilewise.explain(kernels.conv2d_backward, grad, image, weight, padding=1, needs=("bias",)).flops == 0
    transposed = tilewise.explain(kernels.conv_transpose2d, grad, weight, padding=1)
    assert transposed.flops == forward.flops
    assert tilewise.explain(kernels.linear, a32, np.ones((5, 3), np.float32)).flops == 2 * 2 * 3 * 5


def test_devices_are_listed_with_reasons():
    cpu, *others = tilewise.devices()
    assert cpu.kind == "cpu"
    assert cpu.name
    assert cpu.backends == {"cpu": None, "reference": None}
    assert all(device.kind == "gpu" for device in others)
    if NO_GPU:
        assert {name: reason for device in others for name, reason in device.backends.items()} == (
            machine.unavailable_backends() if others else {}
        )


# --------------------------------------------------------------------------------------------------- the plan cache


def test_equal_keys_of_other_types_are_other_calls(backend):
    kernels.conv2d(image, weight, stride=1, padding=(1, 1), groups=1)
    for options in ({"stride": 1.0}, {"stride": True}, {"groups": 1.0}, {"groups": True}, {"dilation": 1.0}):
        with pytest.raises(TypeError, match="must be an int"):
            kernels.conv2d(image, weight, **({"stride": 1, "padding": (1, 1), "groups": 1} | options))
    for padding in ((1, 1.0), (True, 1), ((1, 1), (1, 1.0))):
        kernels.conv2d(image, weight, padding=((1, 1), (1, 1)))
        with pytest.raises(TypeError, match="padding must be an int"):
            kernels.conv2d(image, weight, padding=padding)


def test_lists_and_numpy_integers_are_welcome(backend):
    expected = kernels.conv2d(image, weight, stride=(2, 1), padding=((1, 0), (0, 1)))
    for stride, padding in (([2, 1], [[1, 0], [0, 1]]), ((np.int64(2), np.uint8(1)), ([1, 0], (0, np.int32(1))))):
        np.testing.assert_array_equal(kernels.conv2d(image, weight, stride=stride, padding=padding), expected)


def test_the_same_shapes_with_another_dtype_or_setting_are_another_plan(backend, rng):
    x = rng.standard_normal((3, 3))
    for dtype in (np.float32, np.float64, np.int8, np.int32):
        assert kernels.matmul(x.astype(dtype), x.astype(dtype)).dtype == (np.int32 if dtype == np.int8 else dtype)
    nhwc = kernels.conv2d(np.ones((1, 4, 4, 4)), np.ones((2, 4, 1, 1)), layout="NHWC")
    nchw = kernels.conv2d(np.ones((1, 4, 4, 4)), np.ones((2, 4, 1, 1)))
    assert (nhwc.shape, nchw.shape) == ((1, 4, 4, 2), (1, 2, 4, 4))


@pytest.mark.parametrize(("name", "operands"), [("relu", (a32,)), ("matmul", (a32, a32.T))])
def test_a_plan_belongs_to_its_settings(monkeypatch, name, operands):
    family = next(family for family, names in FAMILIES.items() if name in names)
    found = next(
        o for o in vars(import_module(f"tilewise.kernels.{family}")).values()
        if isinstance(o, operation.Operation) and o.name == name
    )  # fmt: skip
    marker = np.full((1, 1), 7.0)
    monkeypatch.setattr(found, "plans", {})
    monkeypatch.setattr(import_module(f"tilewise.kernels.reference.{family}"), name, lambda *a, **o: marker)
    function = getattr(kernels, name)
    for backend in ("reference", "cpu", "reference"):
        with tilewise.using(backend=backend):
            assert (function(*operands) is marker) == (backend == "reference")
            assert tilewise.explain(function, *operands).backend == backend  # and is no call
            with tilewise.using(threads=1):
                assert (function(*operands) is marker) == (backend == "reference")


def test_plans_are_forgotten_beyond_a_limit(monkeypatch):
    from tilewise.kernels import gemm

    monkeypatch.setattr(operation, "MAX_PLANS", 5)
    gemm._MATMUL.plans.clear()
    with tilewise.using(backend="reference"):
        for n in range(1, 20):
            kernels.matmul(np.ones((1, n)), np.ones((n, 1)))
            assert len(gemm._MATMUL.plans) <= 5


def test_a_wrong_call_leaves_no_plan():
    from tilewise.kernels import gemm

    before = dict(gemm._MATMUL.plans)
    for _ in range(2):
        with pytest.raises(ValueError, match="matmul"):
            kernels.matmul(np.ones((1, 977)), np.ones((976, 1)))
    tilewise.explain(kernels.matmul, np.ones((1, 977)), np.ones((977, 1)))
    assert gemm._MATMUL.plans == before


def test_two_threads_may_call_at_once(rng):
    arrays = [rng.standard_normal((n, n)) for n in range(1, 30)]
    failures = []

    def work():
        try:
            for x in arrays:
                with tilewise.using(backend="reference"):
                    np.testing.assert_allclose(kernels.matmul(x, x), x @ x)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
