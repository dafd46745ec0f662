"""Products that CUDA C++ alone has: bfloat16, and float32 by three products of TF32."""

from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from fake_arrays import FakePlace
from test_cuda_gemm import ORDERS, launched, product, random, reference, wide
from test_cuda_gemm_tensor import assert_tf32
from tolerances import assert_close, tolerance

import tilewise
from tilewise import kernels
from tilewise.kernels import conv_plan, device_arrays
from tilewise.kernels.cupy import driver, gemm_parts, gemm_plan, gemm_tensor, gemm_tile, gemm_wgmma

GPU_BACKENDS = ("cupy",)
B = np.dtype(ml_dtypes.bfloat16)
LAID = {"tf32": 64, "split": 64}  # rows, from which right operands are laid out
SPLIT = [(128, 128, 64), (136, 120, 72), (120, 260, 136)]


@pytest.fixture(params=["mma", "wgmma"])
def split(gpu, monkeypatch, request):
    """A device where float32 is split, whichever it is: the name of the kernel that does it, before its orders."""
    if request.param == "wgmma":
        need(gpu, gemm_wgmma.SINGLES["split", gemm_wgmma.NARROW][True, True])
        return "matmul_wgmma_single<SplitMath, 128"
    need(gpu, gemm_tensor.MATMULS["split", gemm_tensor.MEDIUM][True, True])
    if gpu.capability == gemm_wgmma.HOPPER:
        monkeypatch.setattr(gpu, "capability", (8, 0))
    monkeypatch.setattr(gemm_plan, "SPLIT_ON", (gpu.capability,))
    return "matmul_tensor<SplitMath, Medium"


@pytest.fixture
def hopper(gpu):
    need(gpu, gemm_wgmma.MATMULS[gemm_wgmma.WIDE][True, True])


def need(gpu, kernel):
    if not kernel.runs_on(gpu.capability):  # the emulated GPU runs them all
        pytest.skip(f"{kernel.name} does not run on compute capability {gpu.capability}")


def is_launched(gpu, kernel, order, dtype=np.float32):
    """Whether it was; kernel: its name, before the operands' orders."""
    names = ", ".join(str(by_k).lower() for by_k in order)
    return launched(gpu, {"cupy": f"cupy {kernel}, {names}>"}, dtype)


def without_tensor_cores(gpu, monkeypatch, *operands):
    with monkeypatch.context() as plain:
        plain.setattr(gemm_plan, "SPLIT_ON", ())
        plain.setattr(gemm_parts, "split", lambda _, tile, size, itemsize: (0, 1, size[2]))  # a part is more exact
        return product(gpu, *operands)


def assert_rounded(actual, expected, depth):
    """The bfloat16 nearest to what float32 gives."""
    assert actual.dtype == B
    error, size = np.abs(actual.astype(np.float64) - expected), np.abs(expected)
    assert (error <= 2.0**-8 * size + 2 * tolerance(np.float32, depth) * size.max()).all()


# ------------------------------------------------------------------------------------------- three products of TF32


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_float32_by_three_products(gpu, split, rng, one_multiprocessor, order):
    for m, n, depth in SPLIT:
        a, b = random(rng, np.float32, m, depth), random(rng, np.float32, depth, n)
        assert_close(product(gpu, a, b, order), np.matmul(*wide(a, b)), reduction=depth)
        assert is_launched(gpu, split, order)


@pytest.mark.parametrize("kind", ["normal", "positive", "wide"])
def test_three_products_are_as_good_as_float32(gpu, split, rng, one_multiprocessor, monkeypatch, kind):
    """At most twice the error of FFMA, although what tensor cores add is cut off: at worst what has one sign."""
    draw = {
        "normal": lambda *s: rng.standard_normal(s),
        "positive": lambda *s: rng.random(s),
        "wide": lambda *s: rng.standard_normal(s) * np.exp(4 * rng.standard_normal(s)),
    }[kind]
    for depth in (64, 480):
        a, b = draw(72, depth).astype(np.float32), draw(depth, 72).astype(np.float32)
        exact = np.matmul(*wide(a, b))
        size = np.matmul(*(np.abs(x) for x in wide(a, b)))
        ours = np.abs(product(gpu, a, b, (True, False)) - exact) / size
        assert is_launched(gpu, split, (True, False))
        plain = np.abs(without_tensor_cores(gpu, monkeypatch, a, b, (True, False)) - exact) / size
        assert not is_launched(gpu, split, (True, False))
        assert ours.max() <= 2 * plain.max()
        assert np.sqrt((ours**2).mean()) <= 2 * np.sqrt((plain**2).mean())


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
def test_three_products_of_numbers_at_the_limits(gpu, split, rng, one_multiprocessor, monkeypatch):
    largest = float(np.finfo(np.float32).max)
    a, b = rng.uniform(0.5, 1, (72, 64)).astype(np.float32), rng.uniform(0.5, 1, (64, 72)).astype(np.float32)
    a[0, 1], a[1, 2], a[2, 3], a[3, 4] = np.inf, -np.inf, np.nan, largest
    b[5, 0], b[6, 1], b[7, 2] = np.inf, np.nan, -largest
    a[4, 5], b[1, 4] = 0, 0  # times Infinity
    a[5, 5], b[1, 5] = np.inf, -np.inf
    a[6] *= np.float32(1e-33)  # below 2**-113 there are fewer digits
    y = product(gpu, a, b, (True, False))
    assert is_launched(gpu, split, (True, False))
    plain = without_tensor_cores(gpu, monkeypatch, a, b, (True, False))
    np.testing.assert_array_equal(np.isnan(y), np.isnan(plain))
    finite = np.isfinite(plain)
    np.testing.assert_array_equal(y[~finite], plain[~finite])
    np.testing.assert_allclose(y[finite], plain[finite], rtol=1e-5, atol=1e-45)


# ---------------------------------------------------------------------------------------------------------- bfloat16


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_bfloat16(gpu, rng, one_multiprocessor, monkeypatch, order):
    """On tensor cores; before them, and where rows are not whole vectors, on the plain kernels."""
    device = gpu.capability
    for capability, sizes in (((8, 0), [(8, 8, 8), (136, 120, 72), (5, 7, 3)]), ((7, 5), [(40, 72, 48), (24, 8, 16)])):
        monkeypatch.setattr(gpu, "capability", min(capability, device))
        for m, n, depth in sizes:
            a, b = random(rng, np.float32, m, depth).astype(B), random(rng, np.float32, depth, n).astype(B)
            assert_rounded(product(gpu, a, b, order), np.matmul(*wide(a, b)), depth)


def test_bfloat16_layer(gpu, rng):
    for rows, features, outputs in ((2, 24, 40), (33, 1600, 8), (65, 21, 9)):
        x, weight, bias = (
            random(rng, np.float32, *s).astype(B) for s in ((rows, features), (outputs, features), (outputs,))
        )
        expected = reference("linear", *wide(x, weight, bias), activation="relu")
        assert_rounded(kernels.linear(x, weight, bias, activation="relu"), expected, features)
        grad = random(rng, np.float32, rows, outputs).astype(B)
        ours, theirs = kernels.linear_backward(grad, x, weight), reference("linear_backward", *wide(grad, x, weight))
        for actual, gradient in zip(ours, theirs, strict=True):
            assert_rounded(actual, gradient, features)


# --------------------------------------------------------------------------------------- Hopper, and the oldest devices


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_wgmma(gpu, hopper, rng, one_multiprocessor, order):
    """Of 128 and 256 columns, beyond both; steps of the depth to go around the stages once, and part of one."""
    for m, n, depth, columns, dtype in (
        (136, 72, 264, 128, np.float16),
        (72, 264, 336, 256, np.float16),
        (72, 72, 72, 128, B),
        (72, 136, 72, 256, B),
    ):
        for eager in (True, False):
            gpu.eager_copies = eager
            a, b = random(rng, np.float32, m, depth).astype(dtype), random(rng, np.float32, depth, n).astype(dtype)
            y, exact = product(gpu, a, b, order), np.matmul(*wide(a, b))
            if dtype is B:
                assert_rounded(y, exact, depth)
            else:
                assert_close(y, exact, reduction=depth)
            assert is_launched(gpu, f"matmul_wgmma<T, {columns}", order, dtype)


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_wgmma_in_tf32(gpu, hopper, rng, one_multiprocessor, order):
    """The same of float32, whose vectors are four long. Sums of one sign would show operands that are cut off."""
    for m, n, depth, columns, sign in ((136, 72, 72, 128, False), (68, 264, 168, 256, False), (100, 76, 36, 128, True)):
        for eager in (True, False):
            gpu.eager_copies = eager
            a, b = random(rng, np.float32, m, depth), random(rng, np.float32, depth, n)
            a, b = (abs(a), abs(b)) if sign else (a, b)
            with tilewise.using(tf32=True):
                assert_tf32(product(gpu, a, b, order), a, b)
            assert is_launched(gpu, f"matmul_wgmma_single<Tf32Math, {columns}", order)


@pytest.mark.parametrize("schedule", ["reverse", "shuffled", "warps reversed"])
def test_wgmma_in_every_schedule(gpu, hopper, rng, one_multiprocessor, schedule):
    for dtype, depth in ((np.float16, 400), (np.float32, 200)):
        a, b = random(rng, dtype, 72, depth), random(rng, dtype, depth, 72)
        gpu.schedule = "forward"
        expected = product(gpu, a, b, (True, False))
        gpu.schedule = schedule
        np.testing.assert_array_equal(product(gpu, a, b, (True, False)), expected)


def test_wgmma_with_what_follows(gpu, hopper, rng, one_multiprocessor):
    """A batch, broadcast; parts of the depth; bias and activation; a row that is not whole vectors of the result."""

    def by_wgmma(function, *operands, **options):
        gpu.launched.clear()
        y = function(*operands, **options)
        assert any("wgmma" in name for name, _ in gpu.launched)
        return y

    for dtype in (np.float16, np.float32):
        a, b = random(rng, dtype, 2, 80, 72), random(rng, dtype, 72, 88)
        assert_close(by_wgmma(kernels.matmul, a.swapaxes(1, 2), a), np.matmul(*wide(a.swapaxes(1, 2), a)), reduction=80)
        assert_close(by_wgmma(kernels.matmul, a, b), np.matmul(*wide(a, b)), reduction=72)
        x, weight, bias = random(rng, dtype, 72, 560), random(rng, dtype, 77, 560), random(rng, dtype, 77)
        y = by_wgmma(kernels.linear, x, weight, bias, activation="relu")
        expected = reference("linear", *wide(x, weight, bias), activation="relu")
        assert_close(y, expected, reduction=560)


def test_explain(gpu, monkeypatch, one_multiprocessor):
    def explained(function, *shapes, dtype=np.float32, **options):
        return tilewise.explain(function, *(np.empty(s, dtype) for s in shapes), **options)

    monkeypatch.setattr(gpu, "capability", (9, 0))
    square = (256, 256), (256, 256)
    decision = explained(kernels.matmul, *square, dtype=np.float16)
    assert (decision.algorithm, decision.rejected.get("wgmma")) == ("wgmma", None)
    assert decision.note == "tiles of 128 x 256: cupy matmul_wgmma<T, 256, true, false>"
    decision = explained(kernels.matmul, *square)
    assert decision.algorithm == "wgmma in 3xTF32"
    assert decision.note == "tiles of 128 x 128: cupy matmul_wgmma_single<SplitMath, 128, true, false>"
    assert decision.rejected["wgmma in TF32"] == "using(tf32=True) would allow it"
    assert explained(kernels.linear, (1, 512), (300, 512)).algorithm == "few vectors"
    assert explained(kernels.matmul, (3, 64, 64), (3, 64, 64), dtype=np.float64).algorithm == "tiles"
    monkeypatch.setattr(gpu, "capability", (8, 6))
    decision = explained(kernels.linear, *square, activation="relu")
    assert decision.algorithm == "tiles"
    assert decision.rejected["mma in 3xTF32"] == "predicted to be slower than float32 on this device"
    decision = explained(kernels.matmul, *square, dtype=np.float16)
    assert decision.rejected == {"wgmma": NO_HOPPER}


def test_explain_looks_at_the_device_of_the_arrays(gpu, monkeypatch, one_multiprocessor):
    if gpu.schedule == "real":
        pytest.skip("the second device is made up")
    monkeypatch.setattr(gpu, "capability", (9, 0))
    old = SimpleNamespace(capability=(7, 5), multiprocessors=1, name="old")
    monkeypatch.setattr(driver, "engine", lambda ordinal=0: (gpu, old)[ordinal])
    places = FakePlace(gpu, 0), FakePlace(gpu, 1)
    monkeypatch.setattr(device_arrays, "place_of", lambda library, ordinal: places[ordinal])
    square, images = np.ones((256, 256), np.float32), np.ones((1, 128, 9, 9), np.float32)
    monkeypatch.setattr(conv_plan, "ENOUGH_TILES", 1)
    prepared = kernels.prepare_conv2d(np.ones((128, 128, 1, 1), np.float32))
    for place, algorithm, side in ((places[0], "wgmma in 3xTF32", 128), (places[1], "tiles", 64)):
        a, x = place.array(square), place.array(images)
        for function in (kernels.matmul, kernels.linear):
            assert tilewise.explain(function, a, a).algorithm == algorithm
        assert f"tiles of {side} x {side} outputs x pixels" in tilewise.explain(prepared, x).note
    assert set(tilewise.explain(kernels.matmul, a, a).rejected.values()) == {"needs compute capability 8.0"}
    assert tilewise.explain(kernels.matmul, square, square).algorithm == "wgmma in 3xTF32"


FEW = "few vectors: a warp for each row of the matrix"
NO_VECTORS = "rows of an operand are not whole vectors of 16 bytes"
NO_HOPPER, NO_TF32 = "needs compute capability 9.0, and no later one", "using(tf32=True) would allow it"
TOO_LITTLE = "too few rows or columns for its tiles, or too few tiles to occupy the device"


@pytest.mark.parametrize(
    ("capability", "tf32", "dtype", "shape", "taken", "rejected"),
    [
        ((7, 5), False, "float32", (256, 256, 256), "tiles", ["needs compute capability 8.0"] * 4),
        ((7, 5), True, "float32", (256, 256, 256), "tiles", ["needs compute capability 8.0"] * 4),
        ((8, 0), True, "float32", (257, 257, 255), "tiles", [NO_VECTORS] * 4),
        ((8, 0), False, "float32", (256, 256, 255), "tiles", [NO_VECTORS] * 4),
        ((8, 0), True, "float32", (256, 256, 256), "mma in TF32",
         [NO_HOPPER, NO_HOPPER, "mma in TF32 needs fewer instructions"]),
        ((8, 0), False, "float32", (256, 256, 256), "mma in 3xTF32", [NO_TF32, NO_TF32, NO_HOPPER]),
        ((9, 0), True, "float32", (256, 256, 256), "wgmma in TF32", ["wgmma in TF32 needs fewer instructions"] * 3),
        ((9, 0), True, "float32", (256, 60, 256), "mma in TF32", [TOO_LITTLE] * 3),
        ((9, 0), True, "float32", (256, 256, 60), "wgmma in TF32",
         ["wgmma in TF32 needs fewer instructions", *["sums of fewer than 64 products"] * 2]),
        ((9, 0), False, "float32", (256, 256, 256), "wgmma in 3xTF32",
         [NO_TF32, NO_TF32, "wgmma in 3xTF32 needs fewer instructions"]),
        ((9, 0), False, "float32", (256, 256, 60), "tiles",
         [NO_TF32, NO_TF32, *["sums of fewer than 64 products"] * 2]),
        ((9, 0), False, "float32", (256, 60, 256), "tiles", [NO_TF32, NO_TF32, TOO_LITTLE, TOO_LITTLE]),
        ((9, 0), False, "float32", (256, 2, 256), "few vectors", [FEW] * 4),
        ((9, 0), False, "float32", (256, 0, 256), "nothing", ["the result is empty"] * 4),
        ((12, 0), False, "float32", (256, 256, 256), "tiles",
         [NO_TF32, NO_TF32, *["predicted to be slower than float32 on this device"] * 2]),
        ((9, 0), False, "float16", (256, 256, 256), "wgmma", ["wgmma needs fewer instructions"]),
        ((9, 0), False, "bfloat16", (256, 56, 256), "mma", [TOO_LITTLE]),
        ((9, 0), False, "float16", (256, 255, 256), "tiles", [NO_VECTORS] * 2),
        ((10, 0), False, "bfloat16", (256, 256, 256), "mma", [NO_HOPPER]),
        ((7, 5), False, "bfloat16", (256, 256, 256), "tiles", ["needs compute capability 8.0"] * 2),
        ((7, 5), False, "float16", (256, 256, 256), "mma", [NO_HOPPER]),
        ((9, 0), False, "float64", (256, 256, 256), "tiles", []),
        ((9, 0), False, "int16", (256, 256, 256), "tiles", []),
    ],
)  # fmt: skip
def test_reasons_are_those_of_the_choice(gpu, monkeypatch, one_multiprocessor, capability, tf32, dtype, shape, taken,
                                         rejected):  # fmt: skip
    monkeypatch.setattr(gpu, "capability", capability)
    (m, n, depth), dtype = shape, B if dtype == "bfloat16" else np.dtype(dtype)
    with tilewise.using(tf32=tf32):
        decision = tilewise.explain(kernels.matmul, np.empty((m, depth), dtype), np.empty((depth, n), dtype))
    assert decision.algorithm == taken
    single = ["wgmma in TF32", "mma in TF32", "wgmma in 3xTF32", "mma in 3xTF32"]
    ways = {"float32": single, "float16": ["wgmma", "mma"], "bfloat16": ["wgmma", "mma"]}
    others = [way for way in ways.get(dtype.name, []) if way != taken]
    assert decision.rejected == dict(zip(others, rejected, strict=True))


def test_float16_before_asynchronous_copies(gpu, rng, one_multiprocessor, monkeypatch):
    monkeypatch.setattr(gpu, "capability", (7, 5))
    a, b = random(rng, np.float16, 136, 72), random(rng, np.float16, 72, 136)
    assert_close(product(gpu, a, b, (True, False)), np.matmul(*wide(a, b)), reduction=72)
    assert launched(gpu, {"cupy": "cupy matmul_tensor<HalfMath, Little, true, false>"}, np.float16)


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_a_right_operand_that_is_laid_out_before(gpu, hopper, rng, one_multiprocessor, monkeypatch, order):
    """Of both ways of float32, and of a batch; the same as where it is not, but for the order of TF32's sums."""
    shapes = (("split", "SplitMath, 128", (72, 136, 200)), ("tf32", "Tf32Math, 256", (136, 264, 136)),
              ("tf32", "Tf32Math, 128", (72, 72, 72)))  # fmt: skip
    for way, name, (m, n, depth) in shapes:
        a, b = random(rng, np.float32, m, depth), random(rng, np.float32, depth, n)
        with tilewise.using(tf32=way == "tf32"):
            plain = product(gpu, a, b, order)
            with monkeypatch.context() as more:
                more.setattr(gemm_plan, "LAID_ROWS", LAID)
                y = product(gpu, a, b, order)
        left = str(order[0]).lower()
        assert launched(gpu, {"cupy": f"cupy matmul_wgmma_laid<{name}, {left}>"}, np.float32)
        np.testing.assert_array_equal(y, plain)


def test_what_is_large_is_not_laid_out(gpu, hopper, rng, one_multiprocessor, monkeypatch):
    """Of 72 x 64 numbers, each taken apart into two."""
    monkeypatch.setattr(gemm_plan, "LAID_ROWS", LAID)
    a, b = random(rng, np.float32, 72, 64), random(rng, np.float32, 64, 72)
    for most, taken in ((2 * 72 * 64 * 4, True), (2 * 72 * 64 * 4 - 1, False)):
        monkeypatch.setattr(gemm_plan, "LAID_BYTES", most)
        gpu.launched.clear()
        kernels.matmul(a, b)
        assert any("lay_out" in name for name, _ in gpu.launched) == taken


def test_a_batch_of_right_operands_that_are_laid_out_before(gpu, hopper, rng, one_multiprocessor, monkeypatch):
    monkeypatch.setattr(gemm_plan, "LAID_ROWS", LAID)
    for left, right in (((2, 3), (2, 3)), ((2, 3), (3,)), ((3,), (2, 1))):
        a, b = random(rng, np.float32, *left, 72, 64), random(rng, np.float32, *right, 64, 72)
        assert_close(kernels.matmul(a, b), np.matmul(*wide(a, b)), reduction=64)
        assert launched(gpu, {"cupy": "cupy matmul_wgmma_laid<SplitMath, 128, true>"}, np.float32)


def test_parts_are_made_where_they_pay():
    """Of 132 multiprocessors 128 tiles leave none idle, and 64 tiles so many, that adding large parts costs more; but
    not adding those of a layer for 32 images."""
    half = 2
    assert gemm_parts.split("wgmma", gemm_wgmma.WIDE, (2048, 2048, 2048, 1), half)[1:] == (1, 2048)
    assert gemm_parts.split("wgmma", gemm_wgmma.NARROW, (1024, 1024, 1024, 1), half)[1:] == (1, 1024)
    assert gemm_parts.split("mma", gemm_tensor.LITTLE, (32, 4096, 4096, 1), half)[1] > 2
    for depth in (1, 31, 32, 33, 500, 16384):
        _, parts, each = gemm_parts.split("tiles", gemm_tile.TINY, (64, 64, depth, 1), 4)
        assert (parts - 1) * each < depth <= parts * each
        assert each % 32 == 0
    assert parts > 32
