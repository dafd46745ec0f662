// Activations of one number: what elementwise kernels apply, and others on the way to their results.
#pragma once
#include "element.cuh"

namespace tilewise {

// activation_plan.py numbers them.
enum Activation : int { NONE, RELU, LEAKY_RELU, SIGMOID, TANH, STEP, SIGN, RELU6 };

// NaN stays NaN. slope: leaky_relu's.
template <class S> __device__ __forceinline__ S activate(S value, int code, S slope) {
    if (code == NONE || value != value) return value;
    switch (code) {
    case RELU:
        return value > 0 ? value : 0;
    case RELU6:
        return value > 6 ? 6 : value > 0 ? value : 0;
    case LEAKY_RELU:
        return value > 0 ? value : value * slope;
    case SIGMOID: {
        const S e = exp(-fabs(value));
        return (value < 0 ? e : 1) / (1 + e);
    }
    case TANH:
        return tanh(value);
    case STEP:
        return value > 0;
    default:
        return static_cast<S>(value > 0) - static_cast<S>(value < 0);
    }
}

// grad times the activation's derivative, from the forward's output y.
template <class S> __device__ __forceinline__ S gradient(S grad, S y, int code, S slope) {
    switch (code) {
    case RELU:
        return y <= 0 ? 0 : grad;
    case LEAKY_RELU:
        return y > 0 ? grad : grad * slope;
    case SIGMOID:
        return grad * y * (1 - y);
    default:
        return grad * (1 - y * y);
    }
}

}   // namespace tilewise
