// Products of matrices on tensor cores (tensor.cuh): C[z] = activation(A[z] B[z] + bias).
#include "gemm.cuh"
#include "tensor.cuh"

namespace tilewise {

// tensor.cuh's loader for a matrix: `rows` from the pointer on; stride: of what is not contiguous. The pointer, the stride
// and the length of what is contiguous are multiples of 16 bytes.
template <class E, class Tile, int SIZE, bool BY_K> struct TensorLoader {
    static constexpr int WIDTH = LANES<E>, STEP = 4 * WIDTH, PITCH = BY_K ? STEP + WIDTH : SIZE + GAP;
    static constexpr int LINE = (BY_K ? STEP : SIZE) / WIDTH;   // vectors in a row of the tile
    static constexpr int COUNT = SIZE * STEP / WIDTH / Tile::THREADS;

    const E *pointer;
    long long rows, stride, first;

    __device__ __forceinline__ void copy(E *tile, long long k, long long end) const {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int vector = threadIdx.x + i * Tile::THREADS, outer = vector / LINE, inner = vector % LINE * WIDTH;
            const long long row = first + (BY_K ? outer : inner), mine = k + (BY_K ? inner : outer);
            const bool inside = row < rows && mine < end;
            const long long offset = BY_K ? row * stride + mine : mine * stride + row;
            copy_16_bytes(tile + outer * PITCH + inner, pointer + (inside ? offset : 0), inside);
        }
    }
};

template <class Math, class Tile, bool LEFT_BY_K, bool RIGHT_BY_K, class E = typename Math::Element>
__global__ void __launch_bounds__(Tile::THREADS, Tile::RESIDENT)
matmul_tensor(const E *__restrict__ a, const E *__restrict__ b, E *__restrict__ c, float *__restrict__ partial,
              const E *__restrict__ bias, float slope, const Gemm it) {
    using Room = TensorRoom<Math, Tile, LEFT_BY_K, RIGHT_BY_K>;
    float sums[Tile::HIGH][4][4];
    const GemmBlock block(it, Tile::ROWS, Tile::COLUMNS);
    const TensorLoader<E, Tile, Tile::ROWS, LEFT_BY_K> left{a + block.left, it.m, LEFT_BY_K ? it.a_row : it.a_k,
                                                            block.first_row};
    const TensorLoader<E, Tile, Tile::COLUMNS, RIGHT_BY_K> right{
        b + block.right, it.n, RIGHT_BY_K ? it.b_column : it.b_k, block.first_column};
    multiply_tensor_tile<Room>(sums, left, right, block.begin, block.end);
    const MatrixResult<E, float, Finish<E>> result{
        c + block.result, partial ? partial + block.sums : nullptr, it.m, it.n, block.first_row, block.first_column,
        it.vectors, {bias, slope, it.code}};
    store_tensor_tile<Room>(sums, result);
}

}   // namespace tilewise
