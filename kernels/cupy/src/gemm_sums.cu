// Sums that follow a product: of the parts of its depth; and over the rows of matrices: the gradient of a bias, and of
// what was broadcast.
#include "matrix_result.cuh"

namespace tilewise {

constexpr int COLUMNS = 32, WALKERS = 8;   // a warp reads 32 neighbouring columns of a row, 8 warps rows of their own

// c[i] = activation(sum over p of partial[p, i] + bias[i % n]), in the order of the parts.
template <class T>
__global__ void __launch_bounds__(THREADS, 1)
add_parts(const Sum<T> *__restrict__ partial, T *__restrict__ c, const T *__restrict__ bias, Sum<T> slope,
          long long count, long long n, long long parts, int code) {
    const long long i = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= count) return;
    Sum<T> total = partial[i];
#pragma unroll 8   // so that as many are loaded before the first is added
    for (long long p = 1; p < parts; ++p) total += partial[p * count + i];
    c[i] = Finish<T>{bias, slope, code}(total, bias ? i % n : 0);
}

template <class T>
__global__ void __launch_bounds__(THREADS, 1)
add_integer_parts(const WholeSum<T> *__restrict__ partial, WholeResult<T> *__restrict__ c, long long count,
                  long long parts) {
    const long long i = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= count) return;
    WholeSum<T> total = partial[i];
    for (long long p = 1; p < parts; ++p) total += partial[p * count + i];
    c[i] = static_cast<WholeResult<T>>(total);
}

// partial[p, z, j] = the sum of x[z, i, j] over the rows i of part p; block (z and tile of columns, p).
template <class T>
__global__ void __launch_bounds__(THREADS, 1)
sum_part(const T *__restrict__ x, Sum<T> *__restrict__ partial, long long rows, long long columns, long long tiles,
         long long batches, long long part) {
    __shared__ Sum<T> sums[THREADS];
    const int lane = threadIdx.x % COLUMNS, walker = threadIdx.x / COLUMNS;
    const long long z = blockIdx.x / tiles, p = blockIdx.y, column = blockIdx.x % tiles * COLUMNS + lane;
    const long long end = p * part + part < rows ? p * part + part : rows;
    Sum<T> total = 0;
    if (column < columns)
        for (long long i = p * part + walker; i < end; i += WALKERS) total += widen(x[(z * rows + i) * columns + column]);
    sums[threadIdx.x] = total;
    __syncthreads();
    if (walker != 0 || column >= columns) return;
#pragma unroll
    for (int w = 1; w < WALKERS; ++w) total += sums[w * COLUMNS + lane];
    partial[(p * batches + z) * columns + column] = total;
}

}   // namespace tilewise
