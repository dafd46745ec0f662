// Products of matrices by tiles (product.cuh): C[z] = activation(A[z] B[z] + bias).
#include "gemm.cuh"

namespace tilewise {

// How an operand comes: one by one; in vectors, of either order; in vectors of an order known here; by cp.async.
enum Way : int { SINGLY, VECTORS, ALONG_K, ALONG_ROWS, COPIED };

template <class S, class T, class Tile, int SIZE, int WAY> struct LoaderOf {
    static constexpr int ORDER = WAY == ALONG_K ? BY_K : WAY == ALONG_ROWS ? BY_ROW : EITHER;
    using type = MatrixLoader<S, T, Tile, SIZE, WAY == SINGLY ? 1 : LANES<T>, ORDER>;
};
template <class Tile, int SIZE> struct LoaderOf<float, float, Tile, SIZE, COPIED> {
    using type = CopyingLoader<Tile, SIZE>;
};

template <class T, class Tile, int LEFT, int RIGHT>
__global__ void __launch_bounds__(Tile::THREADS, RESIDENT_BLOCKS<Tile, (LEFT == COPIED || RIGHT == COPIED), Sum<T>>)
matmul(const T *__restrict__ a, const T *__restrict__ b, T *__restrict__ c, Sum<T> *__restrict__ partial,
       const T *__restrict__ bias, Sum<T> slope, const Gemm it) {
    __shared__ TileRoom<Sum<T>, Tile> room;
    Sum<T> sums[Tile::DOWN][Tile::ACROSS];
    const GemmBlock block(it, Tile::ROWS, Tile::COLUMNS);
    typename LoaderOf<Sum<T>, T, Tile, Tile::ROWS, LEFT>::type left({a + block.left, it.m, it.a_row, it.a_k},
                                                                    block.first_row);
    typename LoaderOf<Sum<T>, T, Tile, Tile::COLUMNS, RIGHT>::type right(
        {b + block.right, it.n, it.b_column, it.b_k}, block.first_column);
    multiply_tile<Tile>(sums, room, left, right, block.begin, block.end);
    const MatrixResult<T, Sum<T>, Finish<T>> result{
        c + block.result, partial ? partial + block.sums : nullptr, it.m, it.n, block.first_row, block.first_column,
        it.vectors, {bias, slope, it.code}};
    store_tile<Tile>(sums, room, result);
}

template <class T>
__global__ void __launch_bounds__(Small::THREADS, 2)
matmul_integers(const T *__restrict__ a, const T *__restrict__ b, WholeResult<T> *__restrict__ c,
                WholeSum<T> *__restrict__ partial, const Gemm it) {
    using S = WholeSum<T>;
    __shared__ TileRoom<S, Small> room;
    S sums[Small::DOWN][Small::ACROSS];
    const GemmBlock block(it, Small::ROWS, Small::COLUMNS);
    MatrixLoader<S, T, Small, Small::ROWS, 1, EITHER> left({a + block.left, it.m, it.a_row, it.a_k}, block.first_row);
    MatrixLoader<S, T, Small, Small::COLUMNS, 1, EITHER> right({b + block.right, it.n, it.b_column, it.b_k},
                                                               block.first_column);
    multiply_tile<Small>(sums, room, left, right, block.begin, block.end);
    const MatrixResult<WholeResult<T>, S, Cut<T>> result{
        c + block.result, partial ? partial + block.sums : nullptr, it.m, it.n, block.first_row, block.first_column,
        it.vectors, {}};
    store_tile<Small>(sums, room, result);
}

}   // namespace tilewise
