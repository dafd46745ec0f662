"""Matrix multiplication and the dense layer on the GPU; gemm_plan.py chooses the kernel."""

from tilewise.kernels.activation_plan import ACTIVATION_CODES
from tilewise.kernels.cuda.copying import contiguous
from tilewise.kernels.cuda.gemm_plan import multiply
from tilewise.kernels.cuda.gemm_sums import sum_rows
from tilewise.kernels.gemm_matrices import Products

_products = Products(multiply, sum_rows, contiguous, ACTIVATION_CODES)
matmul, matmul_backward = _products.matmul, _products.matmul_backward
linear, linear_backward = _products.linear, _products.linear_backward
