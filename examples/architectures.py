"""Known networks: what each consists of and costs, and the picture of one of them.

    python examples/architectures.py [--model resnet18] [--seed 0] [--out architectures.svg]

LeNet-5, VGG, GoogLeNet, ResNet and MobileNetV2 as tilewise.nn.models builds them, with the state_dict names of
torchvision, so that its trained weights load: `model.load_state_dict(nn.load("resnet18-f37072fd.pth"))`. The table
compares them for one image of 64x64 (LeNet-5: 32x32, grey); the summary of the chosen one lists its layers.
"""

import common

from tilewise import nn

NETWORKS = {
    "lenet5": (1, 1, 32, 32),
    "mobilenet_v2": (1, 3, 64, 64),
    "googlenet": (1, 3, 64, 64),
    "resnet18": (1, 3, 64, 64),
    "resnet50": (1, 3, 64, 64),
    "vgg11": (1, 3, 64, 64),
}


def main(arguments: list[str] | None = None) -> dict[str, int]:
    parser = common.Arguments(__doc__, "architectures.svg")
    parser.add_argument("--model", choices=NETWORKS, default="resnet18", help="of which more is shown")
    options = parser.parse(arguments)
    if options.out.suffix != ".svg":
        parser.error(f"--out must end in .svg, got {options.out}")

    shape = NETWORKS[options.model]
    chosen = getattr(nn.models, options.model)(rng=options.seed)
    print(nn.summary(chosen, shape), end="\n\n")
    nn.plot_model(chosen, options.out, shape)

    results = {}
    for name, shape in NETWORKS.items():
        summary = nn.summary(getattr(nn.models, name)(rng=options.seed), shape)
        results[name] = summary.parameters
        print(f"{name:>12} {summary.parameters / 1e6:7.2f} M parameters, {summary.flops / 1e9:6.3f} GFLOP an image")
    print(f"{options.model} is drawn in {options.out}")
    return results


if __name__ == "__main__":
    main()
