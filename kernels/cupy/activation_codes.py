"""The numbers of activations in src/activation.cuh."""

NONE, RELU, LEAKY_RELU, SIGMOID, TANH, STEP, SIGN, RELU6 = range(8)
# The activations that batch_norm applies to its result.
ACTIVATION_CODES = {
    None: NONE, "relu": RELU, "relu6": RELU6, "leaky_relu": LEAKY_RELU, "sigmoid": SIGMOID, "tanh": TANH
}  # fmt: skip
LEAKY_SLOPE = 0.01
