// fxfreeze::tversky_integer on a CPU. Names and formulas are those of tversky_integer.py; a is uint8 [rows, K], b uint8
// [K, P], both contiguous.
//
// Vectors of neighbouring prototypes are added up in 16 bits for SPAN features, which cannot overflow, and then in 32.
// To widen one, its even and its odd bytes are taken apart, which costs less than to keep their order. Features that an
// object has not are not read. All sums are exact, so their order does not matter; the floats behind them are computed
// in the order of the reference, and without contraction, so that they are the same bits.
//
// AOTInductor compiles this text at -O1 as a part of its own.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("O2", "tree-loop-vectorize", "fp-contract=off")
#endif

namespace integers {

// Prototypes whose sums stay in registers while features are added.
constexpr int64_t TILE = 64, HALF = TILE / 2, QUARTER = TILE / 4;
// 255 · SPAN fits into 16 bits.
constexpr int64_t SPAN = 256;
// Of rows of b that one object after another takes from the cache; a divisor of SPAN.
constexpr int64_t FEATURES = 16;
// Columns that a thread goes through at a time, so that their part of FEATURES rows stays in the first cache.
constexpr int64_t COLUMNS = 2048;
// Objects at a time; their sums fill the second cache.
constexpr int64_t OBJECTS = 8;
// Codes that are compared before a second thread has begun.
constexpr int64_t WORTH = 1 << 18;

typedef uint8_t Bytes __attribute__((vector_size(TILE)));
typedef uint16_t Shorts __attribute__((vector_size(TILE)));
typedef uint32_t Words __attribute__((vector_size(TILE)));
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the even byte is taken for the low one");

// Of a vector's alignment nothing is known.
template <class Vector>
inline __attribute__((always_inline)) void load(Vector& to, const void* from) {
  std::memcpy(&to, from, sizeof(to));
}

template <class Vector>
inline __attribute__((always_inline)) void store(void* to, const Vector& from) {
  std::memcpy(to, &from, sizeof(from));
}

struct How {
  std::string_view model, intersection, difference, semantics;

  bool aggregate() const { return semantics == "aggregate"; }
  bool subtract() const { return difference != "ignorematch"; }
  bool product() const { return intersection == "product"; }
  bool minimum() const { return !aggregate() && (intersection == "min" || intersection == "max" || subtract()); }
  bool common() const {
    return semantics != "inclusive" || !subtract() || intersection == "max" || intersection == "mean";
  }
};

struct Arguments {
  const uint8_t *a, *b;
  const int32_t* total_b;
  int64_t rows, features, columns;
  // A tile may reach beyond its row of b: the rows from `safe` on, of which that would be beyond b, and zeros.
  int64_t safe = 0;
  std::vector<uint8_t> tail;

  void pad() {
    const int64_t reach = (columns + TILE - 1) / TILE * TILE;
    safe = std::max<int64_t>(0, features - (reach + columns - 1) / columns + 1);
    tail.resize((features - safe) * columns + TILE);
    std::memcpy(tail.data(), b + safe * columns, (features - safe) * columns);
  }

  const uint8_t* row(int64_t k) const { return k < safe ? b + k * columns : tail.data() + (k - safe) * columns; }
};

// The features that an object has among some, and where their rows of b begin.
struct Present {
  int64_t count = 0;
  uint8_t code[FEATURES];
  const uint8_t* row[FEATURES];
};

// Sums of one object. In `near` and `products` those of a tile lie in the order in which add() has them: first the even
// columns, then the odd ones, and of these again the even and the odd.
struct Sums {
  uint16_t *near_a, *near_b, *near_minimum;
  uint32_t* products;
  int32_t *common_a, *common_b, *minimum, *product;
  int32_t total;
};

// The memory of some objects' sums: 30 bytes per column of each.
struct Memory {
  std::vector<uint16_t> near;
  std::vector<uint32_t> products;
  std::vector<int32_t> whole;

  Memory(int64_t objects, int64_t columns)
      : near(3 * objects * columns), products(objects * columns), whole(4 * objects * columns) {}

  Sums of(int64_t object, int64_t columns) {
    uint16_t* low = near.data() + 3 * object * columns;
    int32_t* high = whole.data() + 4 * object * columns;
    return {low, low + columns, low + 2 * columns, products.data() + object * columns,
            high, high + columns, high + 2 * columns, high + 3 * columns, 0};
  }

  void clear() {
    std::memset(near.data(), 0, near.size() * sizeof(near[0]));
    std::memset(products.data(), 0, products.size() * sizeof(products[0]));
    std::memset(whole.data(), 0, whole.size() * sizeof(whole[0]));
  }
};

void carry(uint16_t* from, int32_t* to, int64_t columns) {
  for (int64_t p = 0; p < columns; p += TILE)
    for (int64_t i = 0; i < HALF; ++i) to[p + 2 * i] += from[p + i], to[p + 2 * i + 1] += from[p + HALF + i];
  std::memset(from, 0, columns * sizeof(from[0]));
}

void carry(const Sums& sums, int64_t columns) {
  carry(sums.near_a, sums.common_a, columns);
  carry(sums.near_b, sums.common_b, columns);
  carry(sums.near_minimum, sums.minimum, columns);
}

void order(const Sums& sums, int64_t columns) {
  for (int64_t p = 0; p < columns; p += TILE)
    for (int64_t i = 0; i < QUARTER; ++i)
      for (int64_t part = 0; part < 4; ++part)
        sums.product[p + 4 * i + part / 2 + part % 2 * 2] = sums.products[p + part * QUARTER + i];
}

// The even and the odd of a tile's sums, and how one more vector of bytes gets into them.
struct Pair {
  Shorts even = {}, odd = {};

  inline __attribute__((always_inline)) explicit Pair(const uint16_t* from) {
    load(even, from), load(odd, from + HALF);
  }

  inline __attribute__((always_inline)) void keep(uint16_t* to) const { store(to, even), store(to + HALF, odd); }

  inline __attribute__((always_inline)) void add(const Bytes& bytes) {
    const Shorts both = reinterpret_cast<Shorts>(bytes);
    even += both & 255, odd += both >> 8;
  }
};

inline __attribute__((always_inline)) void add_product(Words* to, const Shorts& products) {
  const Words both = reinterpret_cast<Words>(products);
  to[0] += both & 65535, to[1] += both >> 16;
}

// Of the features that an object has, to the sums of some columns.
template <bool COMMON, bool MINIMUM, bool PRODUCT>
void add(const Present& object, int64_t columns, const Sums& to) {
  for (int64_t p = 0; p < columns; p += TILE) {
    Pair common_a(to.near_a + p), common_b(to.near_b + p), minimum(to.near_minimum + p);
    Words product[4] = {};
    if (PRODUCT)
      for (int part = 0; part < 4; ++part) load(product[part], to.products + p + part * QUARTER);
    for (int64_t i = 0; i < object.count; ++i) {
      const Bytes a = Bytes{} + object.code[i];
      Bytes b;
      load(b, object.row[i] + p);
      if (COMMON) common_a.add(b > 0 ? a : Bytes{}), common_b.add(b);
      if (MINIMUM) minimum.add(a < b ? a : b);
      if (PRODUCT) {  // of two codes, fits into 16 bits
        const Shorts both = reinterpret_cast<Shorts>(b);
        add_product(product, (both & 255) * object.code[i]), add_product(product + 2, (both >> 8) * object.code[i]);
      }
    }
    if (COMMON) common_a.keep(to.near_a + p), common_b.keep(to.near_b + p);
    if (MINIMUM) minimum.keep(to.near_minimum + p);
    if (PRODUCT)
      for (int part = 0; part < 4; ++part) store(to.products + p + part * QUARTER, product[part]);
  }
}

using Add = void (*)(const Present&, int64_t, const Sums&);

template <bool COMMON, bool MINIMUM>
Add add_for(const How& how) {
  return how.product() ? add<COMMON, MINIMUM, true> : add<COMMON, MINIMUM, false>;
}

Add add_for(const How& how) {
  if (!how.minimum()) return add_for<true, false>(how);
  return how.common() ? add_for<true, true>(how) : add_for<false, true>(how);
}

Present present(const Arguments& given, int64_t object, int64_t first, int64_t column) {
  Present found;
  const uint8_t* a = given.a + object * given.features;
  for (int64_t k = first; k < std::min(first + FEATURES, given.features); ++k) {
    if (!a[k]) continue;
    found.code[found.count] = a[k];
    found.row[found.count++] = given.row(k) + column;
  }
  return found;
}

template <class T, class Function>
inline __attribute__((always_inline)) void each(T* to, int64_t columns, Function function) {
#pragma omp simd
  for (int64_t p = 0; p < columns; ++p) to[p] = function(p);
}

// f(A∩B).
template <class T>
void intersect(const How& how, const Sums& s, T step, int64_t columns, T* common) {
  const int32_t *a = s.common_a, *b = s.common_b, *least = s.minimum, *product = s.product;
  if (how.product()) {
    const T square = step * step;
    each(common, columns, [=](int64_t p) { return T(product[p]) * square; });
  } else if (how.intersection == "mean") {
    const T half = step / 2;
    each(common, columns, [=](int64_t p) { return T(a[p] + b[p]) * half; });
  } else if (how.intersection == "min") {
    if (how.aggregate())
      each(common, columns, [=](int64_t p) { return T(a[p] < b[p] ? a[p] : b[p]) * step; });
    else
      each(common, columns, [=](int64_t p) { return T(least[p]) * step; });
  } else if (how.intersection == "max") {
    if (how.aggregate())
      each(common, columns, [=](int64_t p) { return T(a[p] > b[p] ? a[p] : b[p]) * step; });
    else
      each(common, columns, [=](int64_t p) { return T(a[p] + b[p] - least[p]) * step; });
  } else if (how.intersection == "gmean") {
    for (int64_t p = 0; p < columns; ++p) common[p] = std::sqrt(T(a[p]) * step) * std::sqrt(T(b[p]) * step);
  } else {
    for (int64_t p = 0; p < columns; ++p) {
      const T one = T(a[p]) * step, other = T(b[p]) * step;
      common[p] = std::min(one, other) - std::log1p(std::exp(-std::abs(one - other)));
    }
  }
}

// f(A−B) and f(B−A), in steps.
void subtract(const How& how, const Sums& s, const int32_t* total_b, int64_t columns, int32_t* only_a,
              int32_t* only_b) {
  const int32_t *a = s.common_a, *b = s.common_b, *least = s.minimum, total = s.total;
  if (how.subtract() && how.semantics == "per_feature") {
    each(only_a, columns, [=](int64_t p) { return a[p] - least[p]; });
    each(only_b, columns, [=](int64_t p) { return b[p] - least[p]; });
  } else if (how.subtract() && how.semantics == "inclusive") {
    each(only_a, columns, [=](int64_t p) { return total - least[p]; });
    each(only_b, columns, [=](int64_t p) { return total_b[p] - least[p]; });
  } else {
    const int32_t surplus = how.subtract();
    auto positive = [](int32_t x) { return x > 0 ? x : 0; };
    each(only_a, columns, [=](int64_t p) { return total - a[p] + surplus * positive(a[p] - b[p]); });
    each(only_b, columns, [=](int64_t p) { return total_b[p] - b[p] + surplus * positive(b[p] - a[p]); });
  }
}

template <class T>
struct Weights {
  T step, theta, alpha, beta;
};

// Scratch has room for the sums of an object's columns twice, in integers, and once in floats.
template <class T>
void finish(const How& how, const Sums& s, const int32_t* total_b, const Weights<T>& by, int64_t columns,
            int32_t* scratch, T* common, T* out) {
  int32_t *only_a = scratch, *only_b = scratch + columns;
  intersect(how, s, by.step, columns, common);
  subtract(how, s, total_b, columns, only_a, only_b);
  const T step = by.step, theta = by.theta, alpha = by.alpha, beta = by.beta;
  if (how.model == "contrast")
    each(out, columns, [=](int64_t p) {
      return theta * common[p] - alpha * (T(only_a[p]) * step) - beta * (T(only_b[p]) * step);
    });
  else
    each(out, columns, [=](int64_t p) {
      return common[p] / (common[p] + alpha * (T(only_a[p]) * step) + beta * (T(only_b[p]) * step) + 1);
    });
}

// Columns begin, ..., end − 1 of the similarities of some objects.
template <class T>
void columns(const How& how, const Arguments& given, const Weights<T>& by, int64_t first, int64_t count, int64_t begin,
             int64_t end, T* out) {
  const Add add = add_for(how);
  const int64_t most = std::min(COLUMNS, (end - begin + TILE - 1) / TILE * TILE);
  Memory memory(count, most);
  std::vector<int32_t> scratch(2 * most);
  std::vector<T> common(most);
  for (int64_t start = begin; start < end; start += most) {
    const int64_t width = std::min(most, end - start);
    memory.clear();
    for (int64_t k = 0; k < given.features; k += FEATURES) {
      for (int64_t i = 0; i < count; ++i) add(present(given, first + i, k, start), width, memory.of(i, most));
      if ((k + FEATURES) % SPAN == 0)
        for (int64_t i = 0; i < count; ++i) carry(memory.of(i, most), most);
    }
    for (int64_t i = 0; i < count; ++i) {
      const uint8_t* a = given.a + (first + i) * given.features;
      Sums sums = memory.of(i, most);
      carry(sums, most), order(sums, most);
      for (int64_t k = 0; k < given.features; ++k) sums.total += a[k];
      finish(how, sums, given.total_b + start, by, width, scratch.data(), common.data(),
             out + (first + i) * given.columns + start);
    }
  }
}

template <class T>
void run(void* out, const Arguments& given, const void* const* weights, const How& how, int64_t threads) {
  auto value = [&](int i) { return *static_cast<const T*>(weights[i]); };
  const Weights<T> by = {value(0), value(1), value(2), value(3)};
  const int64_t tiles = (given.columns + TILE - 1) / TILE;
  threads = std::max<int64_t>(1, std::min({threads, tiles, given.rows * given.features * given.columns / WORTH}));
  for (int64_t first = 0; first < given.rows; first += OBJECTS) {
    const int64_t count = std::min(OBJECTS, given.rows - first);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int64_t part = 0; part < threads; ++part) {
      // Only the last part may end within a tile: sums beyond the end would be another part's.
      const int64_t begin = tiles * part / threads * TILE;
      const int64_t end = std::min(given.columns, tiles * (part + 1) / threads * TILE);
      columns(how, given, by, first, count, begin, end, static_cast<T*>(out));
    }
  }
}

}  // namespace integers

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif

// `bytes` per number of the result: 4 for float, 8 for double.
extern "C" int tversky_integer(void* out, const void* a, const void* b, const void* total_b, const void* step,
                               const void* theta, const void* alpha, const void* beta, int64_t bytes, int64_t rows,
                               int64_t features, int64_t columns, const char* model, const char* intersection,
                               const char* difference, const char* semantics, int64_t threads) {
  integers::Arguments given = {static_cast<const uint8_t*>(a), static_cast<const uint8_t*>(b),
                               static_cast<const int32_t*>(total_b), rows, features, columns, 0, {}};
  given.pad();
  const void* const weights[] = {step, theta, alpha, beta};
  const auto run = bytes == 4 ? integers::run<float> : integers::run<double>;
  run(out, given, weights, {model, intersection, difference, semantics}, threads);
  return 1;
}

#ifdef FXFREEZE_AOTI
// The operator as a compiled package calls it; as many threads as OpenMP would take.
extern "C" AOTITorchError aoti_torch_cpu_tversky_integer_native(
    AtenTensorHandle a, AtenTensorHandle b, AtenTensorHandle total_b, AtenTensorHandle step, AtenTensorHandle theta,
    AtenTensorHandle alpha, AtenTensorHandle beta, const char* model, const char* intersection, const char* difference,
    const char* semantics, AtenTensorHandle* result) {
  const AtenTensorHandle tensors[] = {a, b, total_b, step, theta, alpha, beta};
  void *data[7], *out;
  int64_t *sizes_a, *sizes_b;
  int32_t dtype;
  for (int i = 0; i < 7; ++i) AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensors[i], &data[i]));
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(a, &sizes_a));
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(b, &sizes_b));
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(step, &dtype));
  const int64_t sizes[] = {sizes_a[0], sizes_b[1]}, strides[] = {sizes_b[1], 1};
  AOTI_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(2, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, result));
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(*result, &out));
#ifdef _OPENMP
  const int64_t threads = omp_get_max_threads();
#else
  const int64_t threads = 1;
#endif
  tversky_integer(out, data[0], data[1], data[2], data[3], data[4], data[5], data[6],
                  dtype == aoti_torch_dtype_float32() ? 4 : 8, sizes_a[0], sizes_a[1], sizes_b[1], model, intersection,
                  difference, semantics, threads);
  return AOTI_TORCH_SUCCESS;
}
#endif
