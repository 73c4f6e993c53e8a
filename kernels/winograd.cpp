// fxfreeze::winograd on a CPU: a convolution with windows of 3x3 and stride 1, by Winograd's minimal filtering.
//
// Outputs are computed in tiles of SIZE x SIZE. The inputs of a tile are transformed, multiplied with filters that were
// transformed when they were frozen, and what comes out is transformed back: for 4x4 outputs 36 products of one input
// channel with one output channel in the place of 144, for 2x2 16 in the place of 36.
//
// Channels lie next to each other, in x [batch, height, width, in] and in the result, so vectors run along channels in
// the transforms, and along outputs in the products. Of some tiles the transformed inputs stay in the second cache while
// they meet all filters, 64 outputs at a time. Every sum has its order, whatever the number of tiles, rows or threads.
//
// AOTInductor compiles this text at -O1, and without contraction, as a part of its own. The vectors are written out, but
// there the sums would stay in memory, and a product and its sum be two instructions.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("O2", "fp-contract=fast")
#endif

namespace winograd {

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
constexpr int64_t LANES = BYTES / sizeof(float);
// Outputs whose filters lie together, and, within, those of one strip: whole vectors, the widest that there are. What a
// strip holds is read from start to end, whatever the width of vectors.
constexpr int64_t BLOCK = 64, WHOLE = 16;
// Bytes of transformed inputs, and of products with one block of filters, of the tiles that are done together. Fewer
// tiles than FEWEST would read the filters too often.
constexpr int64_t ROOM = 512 << 10, FEWEST = 18, MOST = 48;
// Floats between what is stored at once for several frequencies, so that these do not all fall into one set of a cache.
constexpr int64_t APART = 16;

typedef float Vec __attribute__((vector_size(BYTES), aligned(alignof(float)), may_alias));

inline Vec load(const float* from) { return *reinterpret_cast<const Vec*>(from); }
inline void store(float* to, Vec value) { *reinterpret_cast<Vec*>(to) = value; }

// Polynomials are multiplied through their values at 0, ±√½, ±√2 and infinity. These points lose less to rounding than
// ±1 and ±2 do. Rows are scaled to have simple factors; those of the filters (`transform` in winograd.py) make up for it.
constexpr float ROOT = 1.41421356237309505f, HALF_ROOT = 0.70710678118654752f;

template <int SIZE>
struct Transform;

template <>
struct Transform<4> {
  static constexpr int WINDOW = 6;
  static inline void inputs(const Vec* d, Vec* out) {
    const Vec even = 2.f * d[2] - d[4], odd = ROOT * d[1] - HALF_ROOT * d[3];
    const Vec further_even = d[4] - 0.5f * d[2], further_odd = ROOT * d[3] - HALF_ROOT * d[1];
    out[0] = d[0] + (d[4] - 2.5f * d[2]);
    out[1] = even + odd;
    out[2] = even - odd;
    out[3] = further_even + further_odd;
    out[4] = further_even - further_odd;
    out[5] = d[1] + (d[5] - 2.5f * d[3]);
  }
  static inline void outputs(const Vec* m, Vec* out) {
    const Vec even = m[1] + m[2], odd = m[1] - m[2], further_even = m[3] + m[4], further_odd = m[3] - m[4];
    out[0] = m[0] + (even + further_even);
    out[1] = HALF_ROOT * odd + ROOT * further_odd;
    out[2] = 0.5f * even + 2.f * further_even;
    out[3] = m[5] + (0.5f * HALF_ROOT * odd + 2.f * ROOT * further_odd);
  }
};

// At 0, ±1 and infinity.
template <>
struct Transform<2> {
  static constexpr int WINDOW = 4;
  static inline void inputs(const Vec* d, Vec* out) {
    out[0] = d[0] - d[2];
    out[1] = d[1] + d[2];
    out[2] = d[2] - d[1];
    out[3] = d[3] - d[1];
  }
  static inline void outputs(const Vec* m, Vec* out) {
    out[0] = m[0] + (m[1] + m[2]);
    out[1] = m[3] + (m[1] - m[2]);
  }
};

struct Layer {
  const float *x, *filters, *bias, *residual;  // residual: null where nothing is added
  float* out;
  int64_t batch, height, width, inputs, outputs, top, left, out_height, out_width;
  bool relu;
};

inline int64_t pieces(int64_t value, int64_t of) { return (value + of - 1) / of; }
inline int64_t rounded(int64_t value, int64_t to) { return pieces(value, to) * to; }

// Where a tile begins, in outputs.
struct Tile {
  int64_t image, row, column;
};

template <int SIZE>
Tile tile_at(const Layer& layer, int64_t index) {
  const int64_t across = pieces(layer.out_width, SIZE), down = pieces(layer.out_height, SIZE);
  return {index / (across * down), index / across % down * SIZE, index % across * SIZE};
}

// One vector of channels of one tile: from WINDOW² places to as many frequencies, `apart` floats from each other.
template <int SIZE>
void transform_inputs(const float* const* places, int64_t channel, float* to, int64_t apart) {
  constexpr int WINDOW = Transform<SIZE>::WINDOW;
  Vec half[WINDOW][WINDOW], line[WINDOW], out[WINDOW];
#pragma GCC unroll 6
  for (int j = 0; j < WINDOW; ++j) {
#pragma GCC unroll 6
    for (int i = 0; i < WINDOW; ++i) line[i] = load(places[i * WINDOW + j] + channel);
    Transform<SIZE>::inputs(line, out);
#pragma GCC unroll 6
    for (int i = 0; i < WINDOW; ++i) half[i][j] = out[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < WINDOW; ++i) {
    Transform<SIZE>::inputs(half[i], out);
#pragma GCC unroll 6
    for (int j = 0; j < WINDOW; ++j) store(to + (i * WINDOW + j) * apart, out[j]);
  }
}

// All channels of one tile; those that do not fill a vector go through `edge`, WINDOW² vectors.
template <int SIZE>
void gather(const Layer& layer, const Tile& tile, const float* zeros, float* edge, float* to, int64_t apart) {
  constexpr int WINDOW = Transform<SIZE>::WINDOW;
  const float* places[WINDOW * WINDOW];
  const int64_t row = tile.row - layer.top, column = tile.column - layer.left;
  const int64_t corner = ((tile.image * layer.height + row) * layer.width + column) * layer.inputs;
  const bool inside = row >= 0 && row + WINDOW <= layer.height && column >= 0 && column + WINDOW <= layer.width;
  for (int i = 0; i < WINDOW; ++i)
    for (int j = 0; j < WINDOW; ++j) {
      const int64_t y = row + i, x = column + j;
      const bool within = inside || (y >= 0 && y < layer.height && x >= 0 && x < layer.width);
      places[i * WINDOW + j] = within ? layer.x + corner + (i * layer.width + j) * layer.inputs : zeros;
    }
  int64_t channel = 0;
  for (; channel + LANES <= layer.inputs; channel += LANES)
    transform_inputs<SIZE>(places, channel, to + channel, apart);
  if (channel < layer.inputs) {
    for (int p = 0; p < WINDOW * WINDOW; ++p) {
      std::memcpy(edge + p * LANES, places[p] + channel, (layer.inputs - channel) * sizeof(float));
      places[p] = edge + p * LANES;
    }
    transform_inputs<SIZE>(places, 0, to + channel, apart);
  }
}

struct Operands {
  const float *values, *filters;  // [tiles, depth] at `stride`, and [strips, depth, WHOLE]
  float* sums;                    // [tiles, width]
  int64_t stride, width, depth, output;  // output: where the vectors begin that are computed

  Operands at(int64_t row) const {
    Operands moved = *this;
    moved.values += row * stride;
    moved.sums += row * width;
    return moved;
  }
  const float* filters_of(int64_t vector) const {
    const int64_t first = output + vector * LANES;
    return filters + first / WHOLE * WHOLE * depth + first % WHOLE;
  }
};

// COUNT tiles times N vectors of outputs.
template <int COUNT, int N>
void multiply(const Operands& o) {
  Vec sums[COUNT][N] = {}, values[N];
  const float* filters[N];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) filters[n] = o.filters_of(n);
  // What comes next, while these are met by more tiles: filters are too many for a cache.
  const int64_t ahead = std::max(N * LANES, WHOLE) * o.depth;
  for (int64_t k = 0; k < o.depth; ++k) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) values[n] = load(filters[n] + k * WHOLE);
#pragma GCC unroll 4
    for (int n = 0; n < N; n += WHOLE / LANES) __builtin_prefetch(filters[n] + k * WHOLE + ahead);
#pragma GCC unroll 32
    for (int i = 0; i < COUNT; ++i) {
      const float x = o.values[i * o.stride + k];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[i][n] += x * values[n];
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < COUNT; ++i) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(o.sums + i * o.width + o.output + n * LANES, sums[i][n]);
  }
}

// COUNT tiles at a time, then about half as many, ...; 4, which is all of a small image, at once.
template <int COUNT, int N>
void down(const Operands& o, int64_t rows) {
  int64_t row = 0;
  for (; row + COUNT <= rows; row += COUNT) multiply<COUNT, N>(o.at(row));
  if constexpr (COUNT > 1) {
    if (row < rows) down<COUNT == 6 ? 4 : COUNT / 2, N>(o.at(row), rows - row);
  }
}

// N vectors of outputs at a time, then half as many, ...; the width is a number of whole vectors.
template <int N>
void across(Operands o, int64_t rows) {
  for (; o.output + N * LANES <= o.width; o.output += N * LANES) down<SUMS / N, N>(o, rows);
  if constexpr (N > 1) {
    if (o.output < o.width) across<N / 2>(o, rows);
  }
}

// The first `count` numbers of a vector, which may be all; the others are 0.
inline Vec load_some(const float* from, int64_t count) {
  if (count >= LANES) return load(from);
  Vec value = {};
  std::memcpy(&value, from, count * sizeof(float));
  return value;
}

inline void store_some(float* to, Vec value, int64_t count) {
  if (count >= LANES) return store(to, value);
  std::memcpy(to, &value, count * sizeof(float));
}

// One vector of outputs of one tile, from `sums`, as many frequencies `apart` from each other.
template <int SIZE>
void transform_outputs(const Layer& layer, const Tile& tile, const float* sums, int64_t apart, int64_t output) {
  constexpr int WINDOW = Transform<SIZE>::WINDOW;
  Vec half[SIZE][WINDOW], line[WINDOW], out[SIZE];
#pragma GCC unroll 6
  for (int j = 0; j < WINDOW; ++j) {
#pragma GCC unroll 6
    for (int i = 0; i < WINDOW; ++i) line[i] = load(sums + (i * WINDOW + j) * apart);
    Transform<SIZE>::outputs(line, out);
#pragma GCC unroll 4
    for (int i = 0; i < SIZE; ++i) half[i][j] = out[i];
  }
  const int64_t count = layer.outputs - output;
  const int64_t corner = (tile.image * layer.out_height + tile.row) * layer.out_width + tile.column;
  const int64_t place = corner * layer.outputs + output;
  const int64_t rows = layer.out_height - tile.row, columns = layer.out_width - tile.column;
  const Vec bias = load_some(layer.bias + output, count);
#pragma GCC unroll 4
  for (int i = 0; i < SIZE; ++i) {
    if (i >= rows) break;
    Transform<SIZE>::outputs(half[i], out);
    const int64_t first = place + i * layer.out_width * layer.outputs;
#pragma GCC unroll 4
    for (int j = 0; j < SIZE; ++j) {
      if (j >= columns) break;
      const int64_t at = first + j * layer.outputs;
      Vec value = out[j] + bias;
      if (layer.residual) value += load_some(layer.residual + at, count);
      if (layer.relu) value = value < 0.f ? Vec{} : value;  // NaN stays
      store_some(layer.out + at, value, count);
    }
  }
}

// How the work is cut: tiles that are done together, and parts of the blocks of filters, where tiles are few.
struct Cut {
  int64_t tiles, together, width, blocks, parts;  // width: outputs of a block, of the widest one

  int64_t items() const { return pieces(tiles, together) * parts; }
};

template <int SIZE>
Cut cut(const Layer& layer, int64_t threads) {
  constexpr int64_t AREA = Transform<SIZE>::WINDOW * Transform<SIZE>::WINDOW;
  const int64_t tiles = layer.batch * pieces(layer.out_height, SIZE) * pieces(layer.out_width, SIZE);
  const int64_t width = std::min(BLOCK, rounded(layer.outputs, WHOLE));
  const int64_t rows = SUMS / WIDEST, each = AREA * (layer.inputs + width) * sizeof(float);
  int64_t together = std::clamp(ROOM / each / rows * rows, FEWEST, MOST);
  together = std::min(together, std::max(FEWEST, pieces(tiles, threads)));
  const int64_t blocks = pieces(layer.outputs, BLOCK), groups = std::max<int64_t>(1, pieces(tiles, together));
  return {tiles, together, width, blocks, std::clamp<int64_t>(pieces(threads, groups), 1, blocks)};
}

// What one thread works in: transformed inputs, products, zeros in the place of padding, the edge of the channels. A
// thread keeps the memory: to get it anew takes longer than a small layer.
template <int SIZE>
struct Room {
  static constexpr int64_t AREA = Transform<SIZE>::WINDOW * Transform<SIZE>::WINDOW;
  int64_t depth, inputs_apart, sums_apart;
  float *inputs, *sums, *zeros, *edge;

  Room(const Layer& layer, const Cut& cut)
      : depth(rounded(layer.inputs, LANES)),
        inputs_apart(cut.together * depth + APART),
        sums_apart(cut.together * cut.width + APART) {
    static thread_local std::unique_ptr<float[]> memory;
    static thread_local int64_t size = 0;
    const int64_t wanted = AREA * (inputs_apart + sums_apart + LANES) + depth + LANES;
    if (size < wanted) {
      memory.reset();
      memory.reset(new float[wanted]);
      size = wanted;
    }
    // On a boundary of a vector.
    const auto start = (reinterpret_cast<uintptr_t>(memory.get()) + BYTES - 1) / BYTES * BYTES;
    inputs = reinterpret_cast<float*>(start);
    sums = inputs + AREA * inputs_apart;
    edge = sums + AREA * sums_apart;
    zeros = edge + AREA * LANES;
    std::fill(edge, zeros + depth, 0.f);
  }
};

template <int SIZE>
void one_item(const Layer& layer, const Cut& cut, int64_t item, Room<SIZE>& room) {
  const int64_t first = item / cut.parts * cut.together, part = item % cut.parts;
  const int64_t count = std::min(cut.together, cut.tiles - first);
  Tile tiles[MOST];
  for (int64_t t = 0; t < count; ++t) {
    tiles[t] = tile_at<SIZE>(layer, first + t);
    gather<SIZE>(layer, tiles[t], room.zeros, room.edge, room.inputs + t * room.depth, room.inputs_apart);
  }
  for (int64_t b = part * cut.blocks / cut.parts; b < (part + 1) * cut.blocks / cut.parts; ++b) {
    const int64_t begin = b * BLOCK, width = std::min(BLOCK, rounded(layer.outputs - begin, WHOLE));
    const float* filters = layer.filters + begin * layer.inputs * room.AREA;
    for (int64_t f = 0; f < room.AREA; ++f)
      across<WIDEST>({room.inputs + f * room.inputs_apart, filters + f * layer.inputs * width,
                      room.sums + f * room.sums_apart, room.depth, width, layer.inputs, 0},
                     count);
    for (int64_t t = 0; t < count; ++t)
      for (int64_t n = 0; n < width && begin + n < layer.outputs; n += LANES)
        transform_outputs<SIZE>(layer, tiles[t], room.sums + t * width + n, room.sums_apart, begin + n);
  }
}

template <int SIZE>
void run(const Layer& layer, int64_t threads) {
  const Cut cut = winograd::cut<SIZE>(layer, std::max<int64_t>(threads, 1));
  const int64_t items = cut.items();
#pragma omp parallel num_threads(std::max<int64_t>(1, std::min(threads, items)))
  {
    Room<SIZE> room(layer, cut);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < items; ++item) one_item<SIZE>(layer, cut, item, room);
  }
}

}  // namespace winograd

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif

// `tile`: outputs of one, 4 or 2. `residual`, of the shape of `out`, is read where `adds` says so. All tensors are dense,
// with their channels last.
extern "C" void winograd_conv(void* out, const void* x, const void* filters, const void* bias, const void* residual,
                             int64_t adds, int64_t tile, int64_t batch, int64_t height, int64_t width, int64_t inputs,
                             int64_t outputs, int64_t top, int64_t left, int64_t out_height, int64_t out_width,
                             int64_t relu, int64_t threads) {
  const winograd::Layer layer = {static_cast<const float*>(x), static_cast<const float*>(filters),
                                 static_cast<const float*>(bias), adds ? static_cast<const float*>(residual) : nullptr,
                                 static_cast<float*>(out), batch, height, width, inputs, outputs, top, left,
                                 out_height, out_width, relu != 0};
  (tile == 4 ? winograd::run<4> : winograd::run<2>)(layer, threads);
}

#ifdef FXFREEZE_AOTI
// The operator as a compiled package calls it; as many threads as OpenMP would take.
extern "C" AOTITorchError aoti_torch_cpu_winograd_native(AtenTensorHandle x, AtenTensorHandle filters,
                                                         AtenTensorHandle bias, AtenTensorHandle residual, int64_t tile,
                                                         int64_t top, int64_t left, int64_t adds, int64_t relu,
                                                         AtenTensorHandle* result) {
  const AtenTensorHandle tensors[] = {x, filters, bias, residual};
  void *data[4], *out;
  int64_t *from, *sizes_bias;
  int32_t dtype;
  for (int i = 0; i < 4; ++i) AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensors[i], &data[i]));
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(x, &from));
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(bias, &sizes_bias));
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x, &dtype));
  const int64_t sizes[] = {from[0], from[1] + 2 * top - 2, from[2] + 2 * left - 2, sizes_bias[0]};
  const int64_t strides[] = {sizes[1] * sizes[2] * sizes[3], sizes[2] * sizes[3], sizes[3], 1};
  AOTI_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(4, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, result));
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(*result, &out));
#ifdef _OPENMP
  const int64_t threads = omp_get_max_threads();
#else
  const int64_t threads = 1;
#endif
  winograd_conv(out, data[0], data[1], data[2], data[3], adds, tile, from[0], from[1], from[2], from[3], sizes[3], top,
                left, sizes[1], sizes[2], relu, threads);
  return AOTI_TORCH_SUCCESS;
}
#endif
