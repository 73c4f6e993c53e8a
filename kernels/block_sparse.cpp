// fxfreeze::block_sparse on a CPU: x [rows, in] times the tiles of a weight that hold anything else than zeros.
//
// A tile lies input by input: what one input adds to the outputs of the tile is one piece, so that vectors run along the
// outputs, and neither x nor the result is turned. Of a tile and some rows of x the sums stay in registers; of a row of
// tiles they stay in the first cache, beside the tile. Every sum is added up in the order of the tiles, whatever the
// number of rows, threads or vectors.
//
// AOTInductor compiles this text at -O1, and without contraction, as a part of its own. The vectors are written out, but
// there the sums would stay in memory, and a product and its sum be two instructions.

#include <algorithm>
#include <cstdint>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("O2", "fp-contract=fast")
#endif

namespace tiled {

// A vector register, and how many sums of its size are kept in registers at once; as many again are for the operands.
#if defined(__AVX512F__)
constexpr int BYTES = 64, SUMS = 24, WIDEST = 4;
#elif defined(__AVX__)
constexpr int BYTES = 32, SUMS = 12, WIDEST = 2;
#elif defined(__aarch64__)
constexpr int BYTES = 16, SUMS = 24, WIDEST = 4;
#else
constexpr int BYTES = 16, SUMS = 12, WIDEST = 2;
#endif
// Rows of x that one tile meets before the next is read: their sums, their values and the tile share the first cache.
constexpr int64_t ROWS = 64;
// Multiplications that are done before a second thread has begun.
constexpr int64_t WORTH = 1 << 18;

template <class T>
struct Vector {
  // Any address that a T may have; clang reads the attribute of a type in a template only from a typedef.
  typedef T type __attribute__((vector_size(BYTES), aligned(alignof(T)), may_alias));
};
template <class T>
constexpr int64_t LANES = BYTES / sizeof(T);

template <class T>
struct Operands {
  const T *x, *tile;
  T* sums;
  int64_t x_stride, tile_stride, sums_stride, depth;

  Operands at(int64_t row) const {
    Operands moved = *this;
    moved.x += row * x_stride;
    moved.sums += row * sums_stride;
    return moved;
  }
};

// COUNT rows of x times N vectors of columns of the tile.
template <class T, int COUNT, int N>
void multiply(const Operands<T>& o) {
  using Vec = typename Vector<T>::type;
  Vec sums[COUNT][N], values[N];
#pragma GCC unroll 32
  for (int i = 0; i < COUNT; ++i) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sums[i][n] = *reinterpret_cast<const Vec*>(o.sums + i * o.sums_stride + n * LANES<T>);
  }
  for (int64_t k = 0; k < o.depth; ++k) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) values[n] = *reinterpret_cast<const Vec*>(o.tile + k * o.tile_stride + n * LANES<T>);
#pragma GCC unroll 32
    for (int i = 0; i < COUNT; ++i) {
      const T x = o.x[i * o.x_stride + k];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[i][n] += x * values[n];
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < COUNT; ++i) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) *reinterpret_cast<Vec*>(o.sums + i * o.sums_stride + n * LANES<T>) = sums[i][n];
  }
}

// COUNT rows at a time, then half as many, ...
template <class T, int COUNT, int N>
void down(const Operands<T>& o, int64_t rows) {
  int64_t row = 0;
  for (; row + COUNT <= rows; row += COUNT) multiply<T, COUNT, N>(o.at(row));
  if constexpr (COUNT > 1) {
    if (row < rows) down<T, COUNT / 2, N>(o.at(row), rows - row);
  }
}

// N vectors of columns at a time, then half as many, ...; the width is a number of whole vectors.
template <class T, int N>
void across(Operands<T> o, int64_t rows, int64_t width) {
  for (; width >= N * LANES<T>; width -= N * LANES<T>) {
    down<T, SUMS / N, N>(o, rows);
    o.tile += N * LANES<T>;
    o.sums += N * LANES<T>;
  }
  if constexpr (N > 1) {
    if (width > 0) across<T, N / 2>(o, rows, width);
  }
}

struct Sizes {
  int64_t rows, inputs, outputs, tiles, depth, width;  // a tile is [depth, width]

  int64_t tile_rows() const { return (outputs + width - 1) / width; }
  int64_t tile_columns() const { return (inputs + depth - 1) / depth; }
};

// Whether the indices stay within the tiles and the inputs.
inline bool are_valid(const int32_t* crow, const int32_t* col, const Sizes& sizes) {
  bool valid = crow[0] == 0 && crow[sizes.tile_rows()] == sizes.tiles;
  for (int64_t r = 0; r < sizes.tile_rows(); ++r) valid &= crow[r] <= crow[r + 1];
  for (int64_t t = 0; t < sizes.tiles; ++t) valid &= col[t] >= 0 && col[t] < sizes.tile_columns();
  return valid;
}

// The outputs of the r-th row of tiles, for some rows of x.
template <class T>
void row_of_tiles(int64_t r, int64_t first, int64_t rows, const Sizes& sizes, const T* x, const T* tiles,
                  const int32_t* crow, const int32_t* col, const T* bias, T* out, T* sums) {
  const int64_t begin = r * sizes.width, width = std::min(sizes.width, sizes.outputs - begin);
  for (int64_t i = 0; i < rows; ++i) {
    std::copy(bias + begin, bias + begin + width, sums + i * sizes.width);
    std::fill(sums + i * sizes.width + width, sums + (i + 1) * sizes.width, T(0));
  }
  for (int64_t t = crow[r]; t < crow[r + 1]; ++t) {
    const int64_t start = col[t] * sizes.depth, depth = std::min(sizes.depth, sizes.inputs - start);
    const Operands<T> operands = {x + first * sizes.inputs + start, tiles + t * sizes.depth * sizes.width, sums,
                                  sizes.inputs, sizes.width, sizes.width, depth};
    across<T, WIDEST>(operands, rows, sizes.width);
  }
  for (int64_t i = 0; i < rows; ++i)
    std::copy(sums + i * sizes.width, sums + i * sizes.width + width, out + (first + i) * sizes.outputs + begin);
}

// The width of a tile is a number of whole vectors.
template <class T>
bool run(void* out, const void* x, const void* tiles, const void* crow, const void* col, const void* bias,
         const Sizes& sizes, int64_t threads) {
  const auto rows_of = static_cast<const int32_t*>(crow), columns_of = static_cast<const int32_t*>(col);
  if (!are_valid(rows_of, columns_of, sizes)) return false;
  const int64_t parts = (sizes.rows + ROWS - 1) / ROWS, items = parts * sizes.tile_rows();
  threads = std::max<int64_t>(1, std::min(threads, sizes.tiles * sizes.depth * sizes.width * sizes.rows / WORTH));
#pragma omp parallel num_threads(threads)
  {
    // On a boundary of a vector, as the tiles are.
    std::vector<T> memory(std::min(sizes.rows, ROWS) * sizes.width + LANES<T>);
    T* sums = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.data()) + BYTES - 1) / BYTES * BYTES);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < items; ++item) {
      const int64_t first = item / sizes.tile_rows() * ROWS;
      row_of_tiles(item % sizes.tile_rows(), first, std::min(ROWS, sizes.rows - first), sizes,
                   static_cast<const T*>(x), static_cast<const T*>(tiles), rows_of, columns_of,
                   static_cast<const T*>(bias), static_cast<T*>(out), sums);
    }
  }
  return true;
}

}  // namespace tiled

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif

// `bytes` per number: 4 for float, 8 for double. 0, and nothing is written, where an index leads outside, else 1.
extern "C" int block_sparse(void* out, const void* x, const void* tiles, const void* crow, const void* col,
                            const void* bias, int64_t bytes, int64_t rows, int64_t inputs, int64_t outputs,
                            int64_t count, int64_t depth, int64_t width, int64_t threads) {
  const auto run = bytes == 4 ? tiled::run<float> : tiled::run<double>;
  return run(out, x, tiles, crow, col, bias, {rows, inputs, outputs, count, depth, width}, threads);
}

#ifdef FXFREEZE_AOTI
// The operator as a compiled package calls it; as many threads as OpenMP would take.
extern "C" AOTITorchError aoti_torch_cpu_block_sparse_native(AtenTensorHandle x, AtenTensorHandle tiles,
                                                                    AtenTensorHandle crow, AtenTensorHandle col,
                                                                    AtenTensorHandle bias, AtenTensorHandle* result) {
  const AtenTensorHandle tensors[] = {x, tiles, crow, col, bias};
  void *data[5], *out;
  int64_t *sizes_x, *sizes_tiles, *sizes_bias;
  int32_t dtype;
  for (int i = 0; i < 5; ++i) AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensors[i], &data[i]));
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(x, &sizes_x));
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tiles, &sizes_tiles));
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(bias, &sizes_bias));
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x, &dtype));
  const int64_t sizes[] = {sizes_x[0], sizes_bias[0]}, strides[] = {sizes_bias[0], 1};
  AOTI_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(2, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, result));
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(*result, &out));
#ifdef _OPENMP
  const int64_t threads = omp_get_max_threads();
#else
  const int64_t threads = 1;
#endif
  const int bytes = dtype == aoti_torch_dtype_float32() ? 4 : 8;
  return block_sparse(out, data[0], data[1], data[2], data[3], data[4], bytes, sizes_x[0], sizes_x[1], sizes_bias[0],
                      sizes_tiles[0], sizes_tiles[1], sizes_tiles[2], threads)
             ? AOTI_TORCH_SUCCESS
             : AOTI_TORCH_FAILURE;
}
#endif
