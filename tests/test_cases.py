"""The benchmark's cases: their formulas against numbers worked out by hand and against the dispatcher's."""

from collections import Counter

import numpy as np
import pytest
from installation import run_python

import tilewise
from tilewise.benchmarks import cases
from tilewise.benchmarks.cases import ALL, QUICK


@pytest.mark.parametrize(
    ("key", "flops", "reduction", "bytes_float32"),
    [
        ("matmul square.1024", 2_147_483_648, 1024, 3 * 4_194_304),
        ("matmul batched.64", 33_554_432, 64, 3 * 64 * 16_384),
        # weight 120x400, bias 120, x 64x400, y 64x120
        ("linear lenet5.fc1", 6_144_000, 400, 4 * (48_000 + 120 + 25_600 + 7_680)),
        ("linear_backward lenet5.fc1", 12_288_000, 120, 4 * (2 * 48_000 + 120 + 2 * 25_600 + 7_680)),
        # 28x28 outputs of 25 products, 6 filters, 64 images
        ("conv2d lenet5.conv1", 15_052_800, 25, 4 * (50_176 + 150 + 6 + 301_056)),
        ("conv2d resnet50.conv2.3x3", 1_849_688_064, 576, 4 * (1_605_632 + 36_864 + 64 + 1_605_632)),
        # 112x112 outputs of 147 products
        ("conv2d resnet50.conv1", 1_888_223_232, 147, 4 * (1_204_224 + 9_408 + 64 + 6_422_528)),
        # depthwise: 9 products an output
        ("conv2d mobilenet.dw3", 57_802_752, 9, 4 * (3_211_264 + 1_152 + 128 + 3_211_264)),
        ("conv2d_backward lenet5.conv1", 30_105_600, 50_176, 4 * (2 * 50_176 + 2 * 150 + 6 + 301_056)),
        ("max_pool2d resnet50.pool1", 0, 9, 4 * (6_422_528 + 1_605_632)),
        # the indices are int64
        ("max_pool2d_backward resnet50.pool1", 0, 9, 4 * (6_422_528 + 1_605_632) + 8 * 1_605_632),
        ("max_pool2d googlenet.pool1", 0, 9, 4 * (6_422_528 + 1_605_632)),  # 56 outputs by ceil_mode, not 55
        ("adaptive_avg_pool2d resnet50.head", 0, 49, 4 * (802_816 + 16_384)),
        ("batch_norm resnet50.bn1.train", 0, 100_352, 4 * (2 * 6_422_528 + 4 * 64)),
        ("batch_norm_backward resnet50.bn1.train", 0, 100_352, 4 * (3 * 6_422_528 + 5 * 64)),
        ("relu resnet50.relu1", 0, 1, 4 * 2 * 6_422_528),
        ("relu_backward resnet50.relu1", 0, 1, 4 * 3 * 6_422_528),
        ("softmax resnet50.classes", 0, 1000, 4 * 2 * 256_000),
        ("dropout_backward vgg16.fc6", 0, 1, 4 * 2 * 262_144),
    ],
)
def test_formulas(key, flops, reduction, bytes_float32):
    case = ALL[key]
    assert (case.flops, case.reduction, case.bytes(4)) == (flops, reduction, bytes_float32)


@pytest.mark.parametrize("key", ALL)
def test_arguments_fit_the_function_and_the_dispatcher_counts_the_same(key):
    case = ALL[key].with_batch(2)
    args, options = case.arguments(np.random.default_rng(0), np.dtype(np.float32))
    decision = tilewise.explain(getattr(tilewise, case.op), *args, **options)
    if case.rate_unit == "GFLOP/s":
        assert decision.flops == case.flops
    assert decision.bytes == case.bytes(4)


def test_every_shape_is_written_once():
    work = Counter((case.op, case.shape) for case in ALL.values())
    assert [shape for shape, count in work.items() if count > 1] == []
    assert len(ALL) == len({case.key for case in ALL.values()})


def test_every_network_and_every_kind_of_operation_is_there():
    assert {case.layer.partition(".")[0] for case in ALL.values()} >= {
        "lenet5",
        "vgg16",
        "resnet50",
        "googlenet",
        "mobilenet",
    }
    families = {case.family for case in ALL.values()}
    assert families == {"gemm", "conv", "pool", "batchnorm", "activation", "dropout_mask"}
    assert {case.family for case in QUICK.values()} == families
    assert {case.family for case in QUICK.values() if case.is_backward} == families


@pytest.mark.parametrize("name", cases.SUITES)
def test_the_asv_classes_measure_every_case_once(name, tmp_path):
    code = """
        from importlib import import_module
        from tilewise.benchmarks import suite
        for family in "activation", "batchnorm", "conv", "dropout_mask", "gemm", "pool":
            module = import_module(f"tilewise.benchmarks.bench_{family}")
            for name, found in vars(module).items():
                if not name.startswith("_") and isinstance(found, type) and issubclass(found, suite._Suite):
                    print(*found.params[0], sep="\\n")
    """
    measured = run_python(code, tmp_path, TILEWISE_BENCH_SUITE=name).splitlines()
    assert sorted(measured) == sorted(cases.SUITES[name])


def test_suite_of_another_name_is_refused(monkeypatch):
    monkeypatch.setenv("TILEWISE_BENCH_SUITE", "fast")
    with pytest.raises(ValueError, match="TILEWISE_BENCH_SUITE must be one of quick, full, got 'fast'"):
        cases.suite()
