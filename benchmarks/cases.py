"""What is measured: layers of LeNet-5, VGG-16, ResNet-50, GoogLeNet and MobileNet, each shape written once.

The asv classes, the pytest-benchmark tests and `python -m tilewise bench` all take their work from here.

Sources: LeCun et al. 1998 (LeNet-5), Simonyan and Zisserman 2015 (VGG-16, configuration D), He et al. 2016 (ResNet-50,
with the stride in the 3x3 layers, as torchvision has it), Szegedy et al. 2015 (GoogLeNet), Howard et al. 2017
(MobileNet v1).
"""

import os

from .layers import Activation, BatchNorm, Case, Conv, Dropout, Linear, Matmul, Pool

_MATMUL: tuple[Case, ...] = (
    # batch, m, k, n
    Matmul("matmul", "square.128", 1, 128, 128, 128),
    Matmul("matmul", "square.256", 1, 256, 256, 256),
    Matmul("matmul", "square.512", 1, 512, 512, 512),
    Matmul("matmul", "square.1024", 1, 1024, 1024, 1024),
    Matmul("matmul", "square.2048", 1, 2048, 2048, 2048),
    Matmul("matmul", "tall", 1, 16384, 64, 64),
    Matmul("matmul", "wide", 1, 64, 576, 16384),
    Matmul("matmul", "outer", 1, 2048, 16, 2048),
    Matmul("matmul", "inner", 1, 64, 16384, 64),
    Matmul("matmul", "matrix.vector", 1, 4096, 4096, 1),
    Matmul("matmul", "vector.matrix", 1, 1, 4096, 4096),
    Matmul("matmul", "batched.64", 64, 64, 64, 64),
    Matmul("matmul", "batched.16", 512, 16, 16, 16),
)

_LINEAR: tuple[Case, ...] = (
    # batch, inputs, outputs
    Linear("linear", "lenet5.fc1", 64, 400, 120),
    Linear("linear", "lenet5.fc3", 64, 84, 10),
    Linear("linear", "vgg16.fc6", 8, 25088, 4096),
    Linear("linear", "vgg16.fc7", 32, 4096, 4096),
    Linear("linear", "resnet50.fc", 64, 2048, 1000),
)

_CONV: tuple[Case, ...] = (
    # batch, channels, size, outputs, kernel, stride, padding, groups
    Conv("conv2d", "lenet5.conv1", 64, 1, 28, 6, 5, 1, 2),
    Conv("conv2d", "lenet5.conv2", 64, 6, 14, 16, 5),
    Conv("conv2d", "vgg16.conv1_1", 1, 3, 224, 64, 3, 1, 1),
    Conv("conv2d", "vgg16.conv1_2", 1, 64, 224, 64, 3, 1, 1),
    Conv("conv2d", "vgg16.conv2_2", 1, 128, 112, 128, 3, 1, 1),
    Conv("conv2d", "vgg16.conv3_2", 2, 256, 56, 256, 3, 1, 1),
    Conv("conv2d", "vgg16.conv4_2", 2, 512, 28, 512, 3, 1, 1),
    Conv("conv2d", "vgg16.conv5_2", 8, 512, 14, 512, 3, 1, 1),
    Conv("conv2d", "resnet50.conv1", 8, 3, 224, 64, 7, 2, 3),
    Conv("conv2d", "resnet50.conv2.reduce", 8, 256, 56, 64, 1),
    Conv("conv2d", "resnet50.conv2.3x3", 8, 64, 56, 64, 3, 1, 1),
    Conv("conv2d", "resnet50.conv2.expand", 8, 64, 56, 256, 1),
    Conv("conv2d", "resnet50.conv3.shortcut", 8, 256, 56, 512, 1, 2),
    Conv("conv2d", "resnet50.conv3.stride", 8, 128, 56, 128, 3, 2, 1),
    Conv("conv2d", "resnet50.conv3.3x3", 8, 128, 28, 128, 3, 1, 1),
    Conv("conv2d", "resnet50.conv4.3x3", 8, 256, 14, 256, 3, 1, 1),
    Conv("conv2d", "resnet50.conv4.expand", 8, 256, 14, 1024, 1),
    Conv("conv2d", "resnet50.conv5.3x3", 8, 512, 7, 512, 3, 1, 1),
    Conv("conv2d", "googlenet.conv2", 8, 64, 56, 192, 3, 1, 1),
    Conv("conv2d", "googlenet.3a.1x1", 8, 192, 28, 64, 1),
    Conv("conv2d", "googlenet.3a.3x3", 8, 96, 28, 128, 3, 1, 1),
    Conv("conv2d", "googlenet.3a.5x5", 8, 16, 28, 32, 5, 1, 2),
    Conv("conv2d", "googlenet.4e.3x3", 8, 160, 14, 320, 3, 1, 1),
    Conv("conv2d", "googlenet.5b.1x1", 8, 832, 7, 384, 1),
    Conv("conv2d", "mobilenet.conv1", 8, 3, 224, 32, 3, 2, 1),
    Conv("conv2d", "mobilenet.dw1", 8, 32, 112, 32, 3, 1, 1, 32),
    Conv("conv2d", "mobilenet.pw1", 8, 32, 112, 64, 1),
    Conv("conv2d", "mobilenet.dw2", 8, 64, 112, 64, 3, 2, 1, 64),
    Conv("conv2d", "mobilenet.dw3", 8, 128, 56, 128, 3, 1, 1, 128),
    Conv("conv2d", "mobilenet.dw7", 8, 512, 14, 512, 3, 1, 1, 512),
    Conv("conv2d", "mobilenet.pw7", 8, 512, 14, 512, 1),
    Conv("conv2d", "mobilenet.pw13", 8, 1024, 7, 1024, 1),
)

_POOL: tuple[Case, ...] = (
    # batch, channels, size, kernel, stride, padding, ceil_mode
    Pool("avg_pool2d", "lenet5.pool1", 64, 6, 28, 2, 2),
    Pool("max_pool2d", "lenet5.pool2", 64, 16, 10, 2, 2),
    Pool("max_pool2d", "vgg16.pool1", 1, 64, 224, 2, 2),
    Pool("max_pool2d", "vgg16.pool3", 8, 256, 56, 2, 2),
    Pool("max_pool2d", "resnet50.pool1", 8, 64, 112, 3, 2, 1),
    Pool("max_pool2d", "googlenet.pool1", 8, 64, 112, 3, 2, 0, True),
    Pool("max_pool2d", "googlenet.3a.pool", 8, 192, 28, 3, 1, 1),
    Pool("avg_pool2d", "googlenet.aux", 8, 512, 14, 5, 3),
    Pool("adaptive_avg_pool2d", "resnet50.head", 8, 2048, 7),
    Pool("adaptive_avg_pool2d", "googlenet.head", 8, 1024, 7),
)

_BATCHNORM: tuple[Case, ...] = tuple(
    BatchNorm("batch_norm", layer + suffix, batch, channels, size, training)
    for layer, batch, channels, size in (
        ("resnet50.bn1", 8, 64, 112),
        ("resnet50.conv2.bn3", 8, 256, 56),
        ("resnet50.conv4.bn2", 8, 256, 14),
        ("resnet50.conv5.bn3", 8, 2048, 7),
        ("mobilenet.bn1", 8, 32, 112),
    )
    for suffix, training in ((".train", True), (".eval", False))
)

_ACTIVATION: tuple[Case, ...] = (
    Activation("relu", "resnet50.relu1", 8, (64, 112, 112)),
    Activation("relu", "lenet5.relu3", 64, (120,)),
    Activation("leaky_relu", "resnet50.relu1", 8, (64, 112, 112)),
    Activation("sigmoid", "lenet5.act1", 64, (6, 28, 28)),
    Activation("tanh", "lenet5.act1", 64, (6, 28, 28)),
    Activation("softmax", "resnet50.classes", 256, (1000,)),
    Activation("log_softmax", "resnet50.classes", 256, (1000,)),
)

_DROPOUT: tuple[Case, ...] = (
    Dropout("dropout", "vgg16.fc6", 64, (4096,)),
    Dropout("dropout", "vgg16.pool5", 64, (512, 7, 7)),
)


def _with_backward(cases: tuple[Case, ...]) -> tuple[Case, ...]:
    """Each layer forward and backward; batch norm's backward is measured for training only."""
    return cases + tuple(case.backward() for case in cases if getattr(case, "training", True))


ALL: dict[str, Case] = {
    case.key: case
    for case in (
        *_MATMUL,
        *_with_backward(_LINEAR),
        *_with_backward(_CONV),
        *_with_backward(_POOL),
        *_with_backward(_BATCHNORM),
        *_with_backward(_ACTIVATION),
        *_with_backward(_DROPOUT),
    )
}

# Chosen so that every kind of kernel is there and NumPy needs less than half a second for each.
QUICK: dict[str, Case] = {
    key: ALL[key]
    for key in (
        "matmul square.128",
        "matmul square.1024",
        "linear lenet5.fc1",
        "linear vgg16.fc7",
        "linear_backward resnet50.fc",
        "conv2d lenet5.conv1",
        "conv2d lenet5.conv2",
        "conv2d resnet50.conv1",
        "conv2d resnet50.conv2.3x3",
        "conv2d resnet50.conv4.expand",
        "conv2d vgg16.conv5_2",
        "conv2d googlenet.3a.5x5",
        "conv2d mobilenet.dw3",
        "conv2d mobilenet.pw7",
        "conv2d_backward lenet5.conv1",
        "conv2d_backward resnet50.conv3.3x3",
        "max_pool2d lenet5.pool2",
        "max_pool2d resnet50.pool1",
        "max_pool2d googlenet.3a.pool",
        "max_pool2d_backward resnet50.pool1",
        "avg_pool2d lenet5.pool1",
        "avg_pool2d_backward lenet5.pool1",
        "adaptive_avg_pool2d resnet50.head",
        "batch_norm resnet50.bn1.train",
        "batch_norm resnet50.bn1.eval",
        "batch_norm_backward resnet50.bn1.train",
        "relu resnet50.relu1",
        "relu_backward resnet50.relu1",
        "sigmoid lenet5.act1",
        "softmax resnet50.classes",
        "dropout vgg16.fc6",
        "dropout_backward vgg16.fc6",
    )
}

SUITES = {"quick": QUICK, "full": ALL}


def suite() -> dict[str, Case]:
    """The cases that TILEWISE_BENCH_SUITE asks for: "quick" (the default) or "full"."""
    name = os.environ.get("TILEWISE_BENCH_SUITE") or "quick"
    if name not in SUITES:
        raise ValueError(f"TILEWISE_BENCH_SUITE must be one of {', '.join(SUITES)}, got {name!r}")
    return SUITES[name]


def selected(*ops: str) -> dict[str, Case]:
    """The cases of the suite asked for whose function is one of `ops` or its backward."""
    return {key: case for key, case in suite().items() if case.op.removesuffix("_backward") in ops}
