"""The numbers of activations in src/activation.cuh."""

NONE, RELU, LEAKY_RELU, SIGMOID, TANH, STEP, SIGN = range(7)
# The activations that batch_norm applies to its result.
ACTIVATION_CODES = {None: NONE, "relu": RELU, "leaky_relu": LEAKY_RELU, "sigmoid": SIGMOID, "tanh": TANH}
LEAKY_SLOPE = 0.01
