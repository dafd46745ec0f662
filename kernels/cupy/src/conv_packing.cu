// Operands of a convolution in the order of its product: the weights as (group, tap, channel, output), an image with its
// channels last. Both are matrices that are transposed, one for each of a batch, with zeros beyond:
//
//     target[b, i, j] = source[b, i, j] for i < rows and j < columns, else 0      i < padded_rows, j < padded_columns
//
// by tiles of 32 x 32 in shared memory, so that neighbouring threads read along what is contiguous in the source, rows
// mostly, and write along the columns, which are contiguous in the target. Where the rows of the source are contiguous and
// both sides come in vectors of 16 bytes, conv_pack_vectors has tiles of 256 bytes of rows by 64 columns:
//
//     shared memory   column c: 16 vectors of rows, vector v at place v ^ s, s = c / vector % 8
//     a warp reads    vectors of 8 columns 0 V 2V ... of 4 rows: s is another one for each, so each bank once
#include "element.cuh"

namespace tilewise {

constexpr int SIDE = 32;

// The batch counts n0 x n1 x ... matrices; from and to: elements from one to the next along its three axes.
struct Matrix {
    long long rows, columns, padded_rows, padded_columns, row_step, column_step, to_row;
    long long n0, n1, from[3], to[3];
};

// Block (tile of columns, then tile of rows, then matrix). T: as many bytes as an element has.
template <class T>
__global__ void __launch_bounds__(THREADS, 1)
conv_pack(const T *__restrict__ source, T *__restrict__ target, const Matrix it) {
    __shared__ T tile[SIDE][SIDE + 1];
    const int lane = threadIdx.x % SIDE, warp = threadIdx.x / SIDE;
    long long b = blockIdx.x;
    const long long first_column = take_axis(b, (it.padded_columns + SIDE - 1) / SIDE) * SIDE;
    const long long first_row = take_axis(b, (it.padded_rows + SIDE - 1) / SIDE) * SIDE;
    const long long b0 = take_axis(b, it.n0), b1 = take_axis(b, it.n1);
    source += b0 * it.from[0] + b1 * it.from[1] + b * it.from[2];
    target += b0 * it.to[0] + b1 * it.to[1] + b * it.to[2];
    const bool by_columns = it.column_step == 1;
#pragma unroll
    for (int n = 0; n < SIDE; n += THREADS / SIDE) {
        const int i = by_columns ? warp + n : lane, j = by_columns ? lane : warp + n;
        const long long row = first_row + i, column = first_column + j;
        const bool there = row < it.rows && column < it.columns;
        tile[i][j] = there ? source[row * it.row_step + column * it.column_step] : T{};
    }
    __syncthreads();
#pragma unroll
    for (int i = warp; i < SIDE; i += THREADS / SIDE) {
        const long long row = first_row + i, column = first_column + lane;
        if (row < it.padded_rows && column < it.padded_columns) target[row * it.to_row + column] = tile[i][lane];
    }
}

constexpr int TURNED_COLUMNS = 64, TURNED_VECTORS = 16;   // of a tile: columns, and vectors of rows in each

template <class T>
__global__ void __launch_bounds__(THREADS, 4)
conv_pack_vectors(const T *__restrict__ source, T *__restrict__ target, const Matrix it) {
    constexpr int WIDTH = LANES<T>, ROWS = TURNED_VECTORS * WIDTH, EACH = TURNED_COLUMNS * TURNED_VECTORS / THREADS;
    alignas(16) __shared__ T tile[TURNED_COLUMNS * ROWS];
    const int thread = threadIdx.x;
    long long b = blockIdx.x;
    const long long first_column = take_axis(b, (it.padded_columns + TURNED_COLUMNS - 1) / TURNED_COLUMNS) * TURNED_COLUMNS;
    const long long first_row = take_axis(b, (it.rows + ROWS - 1) / ROWS) * ROWS;
    const long long b0 = take_axis(b, it.n0), b1 = take_axis(b, it.n1);
    source += b0 * it.from[0] + b1 * it.from[1] + b * it.from[2] + first_row + first_column * it.column_step;
    target += b0 * it.to[0] + b1 * it.to[1] + b * it.to[2] + first_row * it.to_row + first_column;
    const int rows = it.rows - first_row < ROWS ? static_cast<int>(it.rows - first_row) : ROWS;
    const long long columns = it.columns - first_column, padded = it.padded_columns - first_column;
    Pack<T, WIDTH> kept[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int unit = thread + i * THREADS, c = unit / TURNED_VECTORS, row = unit % TURNED_VECTORS * WIDTH;
        kept[i] = Pack<T, WIDTH>{};
        if (row < rows && c < columns) kept[i] = load<WIDTH>(source + c * it.column_step + row);
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int unit = thread + i * THREADS, c = unit / TURNED_VECTORS, v = unit % TURNED_VECTORS;
        store_shared(tile + c * ROWS + (v ^ c / WIDTH % 8) * WIDTH, kept[i]);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int unit = thread + i * THREADS, row = unit / 8 % ROWS, vector = unit % 8 + unit / 8 / ROWS * 8;
        const int c = vector * WIDTH, place = (row / WIDTH ^ vector % 8) * WIDTH + row % WIDTH;
        Pack<T, WIDTH> turned;
#pragma unroll
        for (int k = 0; k < WIDTH; ++k) turned.lane[k] = tile[(c + k) * ROWS + place];
        if (row < rows && c < padded) store(target + row * it.to_row + c, turned);
    }
}

}   // namespace tilewise
