// fxfreeze::quantized_linear on a CPU: x [rows, in] in float32 times a weight of 8 or 4 bits with scales.
//
// For few rows integers become floats in registers, 32 at a time, and meet up to ROWS rows of x there. A group's sum is
// scaled once. Every sum is added up in the same order, whatever the number of rows or threads.
//
// For MANY rows or more, a tile of the weight becomes floats in memory, scaled, and turned so that neighbours are
// outputs. It is made once for all rows, and a sum stays in one lane of a vector. The order of a sum is another one, but
// it does not hang on the number of rows or threads either.
//
// AOTInductor compiles this text at -O1, and without contraction, as a part of its own.

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

namespace quantized {

constexpr int64_t LANES = 16, CHUNK = 2 * LANES;
constexpr int OUTS = 4, ROWS = 4;
// Multiplications that are done before a second thread has begun.
constexpr int64_t WORTH = 1 << 18;

typedef float Floats __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef int16_t Shorts __attribute__((vector_size(LANES * 2)));
typedef int8_t Bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

// In two steps: of one from 8 to 32 bits GCC makes 16 scalar ones.
inline void widen(const int8_t* bytes, Ints& ints) {
  ints = __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const Bytes*>(bytes), Shorts), Ints);
}

struct Operands {
  const float *x, *scale, *bias;
  const int8_t* weight;
  float* out;
  int64_t inputs, outputs, groups;
};

// `COUNT` outputs from `output` on, of `N` rows from `row` on.
template <int BITS, int COUNT, int N>
void strip(const Operands& all, int64_t output, int64_t row) {
  const int64_t block = all.inputs / all.groups, stride = all.inputs * BITS / 8;
  const float* x = all.x + row * all.inputs;
  Floats total[COUNT][N] = {};
  for (int64_t group = 0; group < all.groups; ++group) {
    Floats sums[COUNT][N] = {};
    for (int64_t i = group * block; i < (group + 1) * block; i += CHUNK) {
      Floats halves[2][COUNT];
#pragma GCC unroll 4
      for (int o = 0; o < COUNT; ++o) {
        const int8_t* w = all.weight + (output + o) * stride + i * BITS / 8;
        Ints first, second;
        widen(w, first);
        if (BITS == 8) {
          halves[0][o] = __builtin_convertvector(first, Floats);
          widen(w + LANES, second);
          halves[1][o] = __builtin_convertvector(second, Floats);
        } else {
          halves[0][o] = __builtin_convertvector((first << 28) >> 28, Floats);
          halves[1][o] = __builtin_convertvector(first >> 4, Floats);
        }
      }
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half)
#pragma GCC unroll 4
        for (int r = 0; r < N; ++r) {
          const Floats value = *reinterpret_cast<const Floats*>(x + r * all.inputs + i + half * LANES);
#pragma GCC unroll 4
          for (int o = 0; o < COUNT; ++o) sums[o][r] += halves[half][o] * value;
        }
    }
#pragma GCC unroll 4
    for (int o = 0; o < COUNT; ++o)
#pragma GCC unroll 4
      for (int r = 0; r < N; ++r) total[o][r] += sums[o][r] * all.scale[(output + o) * all.groups + group];
  }
#pragma GCC unroll 4
  for (int o = 0; o < COUNT; ++o)
#pragma GCC unroll 4
    for (int r = 0; r < N; ++r) {
      float sum = 0;
      for (int lane = 0; lane < LANES; ++lane) sum += total[o][r][lane];
      all.out[(row + r) * all.outputs + output + o] = sum + all.bias[output + o];
    }
}

template <int BITS, int COUNT>
void outputs(const Operands& all, int64_t output, int64_t rows) {
  int64_t row = 0;
  for (; row + ROWS <= rows; row += ROWS) strip<BITS, COUNT, ROWS>(all, output, row);
  for (; row < rows; ++row) strip<BITS, COUNT, 1>(all, output, row);
}

// ---- many rows

constexpr int64_t MANY = 9, DEPTH = 256;
constexpr int WIDTH = 2;
#ifdef __AVX512F__
constexpr int HIGH = 12, LOW = 4;
#else
constexpr int HIGH = 3, LOW = 1;
#endif
constexpr int64_t TILE = WIDTH * LANES;

// Of 16 vectors: element j of the i-th becomes element i of the j-th.
inline void turn(Bytes* rows) {
  Bytes other[LANES];
#pragma GCC unroll 4
  for (int stage = 0; stage < 4; ++stage) {
    Bytes *from = stage % 2 ? other : rows, *to = stage % 2 ? rows : other;
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
#ifdef __clang__
      to[2 * i] = __builtin_shufflevector(from[i], from[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      to[2 * i + 1] =
          __builtin_shufflevector(from[i], from[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
      typedef int8_t Order __attribute__((vector_size(LANES)));
      const Order low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
      to[2 * i] = __builtin_shuffle(from[i], from[i + 8], low);
      to[2 * i + 1] = __builtin_shuffle(from[i], from[i + 8], low + 8);
#endif
    }
  }
}

// Inputs from `start` to `end` of the TILE outputs from `output` on, as floats [input][output]. Outputs that are not
// there are those of the last one again.
template <int BITS>
void unpack(const Operands& all, int64_t output, int64_t start, int64_t end, float* tile) {
  const int64_t block = all.inputs / all.groups, stride = all.inputs * BITS / 8;
  for (int part = 0; part < WIDTH; ++part)
    for (int64_t i = start; i < end; i += CHUNK) {
      Floats scale;
      int64_t index[LANES];
      for (int o = 0; o < LANES; ++o) {
        index[o] = std::min(output + part * LANES + o, all.outputs - 1);
        scale[o] = all.scale[index[o] * all.groups + i / block];
      }
      float* out = tile + (i - start) * TILE + part * LANES;
      for (int half = 0; half < (BITS == 8 ? 2 : 1); ++half) {
        Bytes bytes[LANES];
        for (int o = 0; o < LANES; ++o)
          bytes[o] = *reinterpret_cast<const Bytes*>(all.weight + index[o] * stride + i * BITS / 8 + half * LANES);
        turn(bytes);
        for (int j = 0; j < LANES; ++j) {
          Ints ints;
          widen(reinterpret_cast<const int8_t*>(&bytes[j]), ints);
          const Ints low = BITS == 8 ? ints : (ints << 28) >> 28;
          *reinterpret_cast<Floats*>(out + (half * LANES + j) * TILE) = __builtin_convertvector(low, Floats) * scale;
          if (BITS == 4)
            *reinterpret_cast<Floats*>(out + (LANES + j) * TILE) = __builtin_convertvector(ints >> 4, Floats) * scale;
        }
      }
    }
}

// Adds `depth` inputs of a tile to `N` rows of `sums` [row][TILE], `across` floats apart.
template <int N>
void tiled(const float* x, int64_t inputs, const float* tile, int64_t depth, float* sums, int64_t across) {
  Floats total[N][WIDTH];
#pragma GCC unroll 12
  for (int r = 0; r < N; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < WIDTH; ++v) total[r][v] = *reinterpret_cast<const Floats*>(sums + r * across + v * LANES);
  for (int64_t i = 0; i < depth; ++i) {
    Floats weight[WIDTH];
#pragma GCC unroll 2
    for (int v = 0; v < WIDTH; ++v) weight[v] = *reinterpret_cast<const Floats*>(tile + i * TILE + v * LANES);
#pragma GCC unroll 12
    for (int r = 0; r < N; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < WIDTH; ++v) total[r][v] += weight[v] * x[r * inputs + i];
  }
#pragma GCC unroll 12
  for (int r = 0; r < N; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < WIDTH; ++v) *reinterpret_cast<Floats*>(sums + r * across + v * LANES) = total[r][v];
}

template <int BITS>
void many(const Operands& all, int64_t output, int64_t rows, float* tile, float* spare) {
  const int64_t count = std::min(TILE, all.outputs - output);
  // The last outputs are no whole tile: their sums lie elsewhere until they are done.
  float* sums = count == TILE ? all.out + output : spare;
  const int64_t across = count == TILE ? all.outputs : TILE;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t o = 0; o < count; ++o) sums[row * across + o] = all.bias[output + o];
  for (int64_t start = 0; start < all.inputs; start += DEPTH) {
    const int64_t end = std::min(start + DEPTH, all.inputs);
    unpack<BITS>(all, output, start, end, tile);
    int64_t row = 0;
    for (; row + HIGH <= rows; row += HIGH)
      tiled<HIGH>(all.x + row * all.inputs + start, all.inputs, tile, end - start, sums + row * across, across);
    for (; row + LOW <= rows; row += LOW)
      tiled<LOW>(all.x + row * all.inputs + start, all.inputs, tile, end - start, sums + row * across, across);
    for (; row < rows; ++row)
      tiled<1>(all.x + row * all.inputs + start, all.inputs, tile, end - start, sums + row * across, across);
  }
  if (count < TILE)
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t o = 0; o < count; ++o) all.out[row * all.outputs + output + o] = spare[row * TILE + o];
}

template <int BITS>
void run(const Operands& all, int64_t rows, int64_t threads) {
  const int64_t size = rows < MANY ? OUTS : TILE, items = (all.outputs + size - 1) / size;
  std::vector<float> spare(rows >= MANY && all.outputs % TILE ? rows * TILE : 0);
  threads = std::max<int64_t>(1, std::min(threads, rows * all.inputs * all.outputs / WORTH));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < items; ++item) {
    const int64_t first = item * size;
    if (rows >= MANY) {
      alignas(64) float tile[DEPTH * TILE];
      many<BITS>(all, first, rows, tile, spare.data());
    } else if (first + OUTS <= all.outputs) {
      outputs<BITS, OUTS>(all, first, rows);
    } else {
      for (int64_t output = first; output < all.outputs; ++output) outputs<BITS, 1>(all, output, rows);
    }
  }
}

}  // namespace quantized

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif

// `bits` is 8 or 4, and inputs / groups a multiple of 32.
extern "C" int quantized_linear(void* out, const void* x, const void* weight, const void* scale, const void* bias,
                                int64_t bits, int64_t rows, int64_t inputs, int64_t outputs, int64_t groups,
                                int64_t threads) {
  const quantized::Operands all = {static_cast<const float*>(x), static_cast<const float*>(scale),
                                   static_cast<const float*>(bias), static_cast<const int8_t*>(weight),
                                   static_cast<float*>(out), inputs, outputs, groups};
  (bits == 8 ? quantized::run<8> : quantized::run<4>)(all, rows, threads);
  return 1;
}

#ifdef FXFREEZE_AOTI
// The operator as a compiled package calls it; as many threads as OpenMP would take.
extern "C" AOTITorchError aoti_torch_cpu_quantized_linear_native(AtenTensorHandle x, AtenTensorHandle weight,
                                                                 AtenTensorHandle scale, AtenTensorHandle bias,
                                                                 AtenTensorHandle* result) {
  const AtenTensorHandle tensors[] = {x, weight, scale, bias};
  void *data[4], *out;
  int64_t *sizes_x, *sizes_weight, *sizes_scale;
  for (int i = 0; i < 4; ++i) AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensors[i], &data[i]));
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(x, &sizes_x));
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(weight, &sizes_weight));
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(scale, &sizes_scale));
  const int64_t outputs = sizes_weight[0], sizes[] = {sizes_x[0], outputs}, strides[] = {outputs, 1};
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(2, sizes, strides, aoti_torch_dtype_float32(),
                                                       aoti_torch_device_type_cpu(), 0, result));
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(*result, &out));
#ifdef _OPENMP
  const int64_t threads = omp_get_max_threads();
#else
  const int64_t threads = 1;
#endif
  quantized_linear(out, data[0], data[1], data[2], data[3], sizes_weight[1] == sizes_x[1] ? 8 : 4, sizes_x[0],
                   sizes_x[1], outputs, sizes_scale[1], threads);
  return AOTI_TORCH_SUCCESS;
}
#endif
