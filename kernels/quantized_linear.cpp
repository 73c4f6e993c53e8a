// fxfreeze::quantized_linear on a CPU: x [rows, in] in float32 times a weight of 8 or 4 bits with scales.
//
// Integers become floats in registers, 32 at a time, and meet up to ROWS rows of x there. A group's sum is scaled once.
// Every sum is added up in the same order, whatever the number of rows or threads.
//
// AOTInductor compiles this text at -O1, and without contraction, as a part of its own.

#include <algorithm>
#include <cstdint>
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

template <int BITS>
void run(const Operands& all, int64_t rows, int64_t threads) {
  const int64_t items = (all.outputs + OUTS - 1) / OUTS;
  threads = std::max<int64_t>(1, std::min(threads, rows * all.inputs * all.outputs / WORTH));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < items; ++item) {
    const int64_t first = item * OUTS;
    if (first + OUTS <= all.outputs) {
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
