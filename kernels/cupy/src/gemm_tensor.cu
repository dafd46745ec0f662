// Products of matrices on tensor cores (tensor.cuh): C[z] = activation(A[z] B[z] + bias).
#include "gemm.cuh"
#include "tensor_loader.cuh"

namespace tilewise {

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
