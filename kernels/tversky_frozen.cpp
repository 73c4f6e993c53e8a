// fxfreeze::tversky_frozen on a CPU, eight objects at a time: for them each measure of a prototype is read once, and only
// where one has the feature. Names and formulas are those of _tversky.py; a is [rows, K], b [K, P], both contiguous.
//
// A thread has some columns of b, and goes through them in chunks whose sums stay in its cache. Absent measures are
// multiplied by 0, not left out, so that infinities and NaN show as they do in the reference. (An infinite measure of a
// prototype shows only where the object has the feature.)
//
// AOTInductor compiles this text at -O1 as a part of its own. There, too, the loops marked `omp simd` become vectors, but
// for those with a square root, which may set errno there.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string_view>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
// AOTInductor turns it off, and with it `omp simd`.
#pragma GCC optimize("tree-loop-vectorize")
#endif

namespace tversky {

// Measured on a Zen 3 at K = 1024, P = 50257: fewer columns lose time to the pages that a chunk begins on.
constexpr int64_t COLUMNS = 4096;
// Of rows of b that one object after another takes from the cache.
constexpr int64_t FEATURES = 16;
// Objects at a time; their sums fill the cache.
constexpr int64_t OBJECTS = 8;

struct How {
  std::string_view model, intersection, difference, semantics;

  bool aggregate() const { return semantics == "aggregate"; }
  bool subtract() const { return difference != "ignorematch"; }
  bool roots() const { return intersection == "gmean" && !aggregate(); }
  bool product() const { return intersection == "product" || roots(); }
  bool minimum() const { return !aggregate() && (intersection == "min" || intersection == "max" || subtract()); }
  bool common() const {
    return semantics != "inclusive" || !subtract() || intersection == "max" || intersection == "mean";
  }
};

template <class T>
struct Sums {
  T *product, *common_a, *common_b, *minimum;
};

template <class T>
struct Object {
  std::vector<int64_t> features;  // those it has, in ascending order
  std::vector<T> measures, roots;
  T total = 0;  // NaN if a measure is one, present or not
};

template <class T>
Object<T> object(const T* a, int64_t count, T threshold) {
  Object<T> result;
  double total = 0;
  for (int64_t k = 0; k < count; ++k) {
    const bool has = a[k] > threshold;
    total += double(a[k]) * has;
    if (!has) continue;
    result.features.push_back(k);
    result.measures.push_back(a[k]);
    result.roots.push_back(std::sqrt(a[k]));
  }
  result.total = T(total);
  return result;
}

// Adds features first, ..., first + COUNT − 1 of an object's own to its sums; b begins at the first column.
template <class T>
using Add = void (*)(const Object<T>&, int64_t first, const T* b, int64_t stride, T threshold, int64_t columns, Sums<T>);

template <class T, bool PRODUCT, bool ROOTS, bool COMMON, bool MINIMUM, int COUNT>
void add(const Object<T>& object, int64_t first, const T* b, int64_t stride, T threshold, int64_t columns, Sums<T> to) {
  const T* row[4];
  T measure[4], factor[4];
  for (int64_t i = 0; i < COUNT; ++i) {
    row[i] = b + object.features[first + i] * stride;
    measure[i] = object.measures[first + i];
    factor[i] = ROOTS ? object.roots[first + i] : measure[i];
  }
#pragma omp simd
  for (int64_t p = 0; p < columns; ++p) {
    T product = 0, common_a = 0, common_b = 0, minimum = 0;
    auto term = [&](int i) __attribute__((always_inline)) {
      const T a = measure[i], b = row[i][p], has = b > threshold ? T(1) : T(0), present = b * has;
      if (PRODUCT) product += factor[i] * (ROOTS ? std::sqrt(present) : present);
      if (COMMON) common_a += a * has, common_b += present;
      if (MINIMUM) minimum += (a < b ? a : b) * has;
    };
    term(0);
    if (COUNT == 4) term(1), term(2), term(3);
    if (PRODUCT) to.product[p] += product;
    if (COMMON) to.common_a[p] += common_a, to.common_b[p] += common_b;
    if (MINIMUM) to.minimum[p] += minimum;
  }
}

template <class T, bool PRODUCT, bool ROOTS, int COUNT>
Add<T> add_for(const How& how) {
  if (!how.minimum()) return add<T, PRODUCT, ROOTS, true, false, COUNT>;
  if (!how.common()) return add<T, PRODUCT, ROOTS, false, true, COUNT>;
  return add<T, PRODUCT, ROOTS, true, true, COUNT>;
}

template <class T, int COUNT>
Add<T> add_for(const How& how) {
  if (how.roots()) return add_for<T, true, true, COUNT>(how);
  return how.product() ? add_for<T, true, false, COUNT>(how) : add_for<T, false, false, COUNT>(how);
}

template <class T, class Function>
inline __attribute__((always_inline)) void each(T* to, int64_t columns, Function function) {
#pragma omp simd
  for (int64_t p = 0; p < columns; ++p) to[p] = function(p);
}

// f(A∩B).
template <class T>
void intersect(const How& how, Sums<T> s, int64_t columns, T* common) {
  const T *a = s.common_a, *b = s.common_b;
  if (how.product()) {
    std::copy(s.product, s.product + columns, common);
  } else if (how.intersection == "mean") {
    each(common, columns, [=](int64_t p) { return (a[p] + b[p]) / 2; });
  } else if (how.intersection == "min") {
    if (how.aggregate())
      each(common, columns, [=](int64_t p) { return a[p] < b[p] ? a[p] : b[p]; });
    else
      std::copy(s.minimum, s.minimum + columns, common);
  } else if (how.intersection == "max") {
    if (how.aggregate())
      each(common, columns, [=](int64_t p) { return a[p] > b[p] ? a[p] : b[p]; });
    else
      each(common, columns, [=](int64_t p) { return a[p] + b[p] - s.minimum[p]; });
  } else if (how.intersection == "gmean") {
    each(common, columns, [=](int64_t p) { return std::sqrt(a[p]) * std::sqrt(b[p]); });
  } else {
    for (int64_t p = 0; p < columns; ++p)
      common[p] = std::min(a[p], b[p]) - std::log1p(std::exp(-std::abs(a[p] - b[p])));
  }
}

// f(A−B) and f(B−A).
template <class T>
void subtract(const How& how, Sums<T> s, T total_a, const T* total_b, int64_t columns, T* only_a, T* only_b) {
  if (how.subtract() && how.semantics == "per_feature") {
    each(only_a, columns, [=](int64_t p) { return s.common_a[p] - s.minimum[p]; });
    each(only_b, columns, [=](int64_t p) { return s.common_b[p] - s.minimum[p]; });
  } else if (how.subtract() && how.semantics == "inclusive") {
    each(only_a, columns, [=](int64_t p) { return total_a - s.minimum[p]; });
    each(only_b, columns, [=](int64_t p) { return total_b[p] - s.minimum[p]; });
  } else {
    const T surplus = how.subtract();
    auto positive = [](T x) { return x > 0 ? x : T(0); };
    each(only_a, columns, [=](int64_t p) {
      return total_a - s.common_a[p] + surplus * positive(s.common_a[p] - s.common_b[p]);
    });
    each(only_b, columns, [=](int64_t p) {
      return total_b[p] - s.common_b[p] + surplus * positive(s.common_b[p] - s.common_a[p]);
    });
  }
}

template <class T>
struct Arguments {
  const T *a, *b, *total_b;
  T theta, alpha, beta, threshold;
  int64_t features, columns;
};

// The similarities of one object to the prototypes of one chunk, from their sums; scratch has 3 · COLUMNS.
template <class T>
void finish(const How& how, const Arguments<T>& given, Sums<T> s, T total_a, const T* total_b, int64_t columns,
            T* scratch, T* out) {
  T *common = scratch, *only_a = scratch + COLUMNS, *only_b = scratch + 2 * COLUMNS;
  intersect(how, s, columns, common);
  subtract(how, s, total_a, total_b, columns, only_a, only_b);
  const T theta = given.theta, alpha = given.alpha, beta = given.beta;
  if (how.model == "contrast")
    each(out, columns, [=](int64_t p) { return theta * common[p] - alpha * only_a[p] - beta * only_b[p]; });
  else
    each(out, columns, [=](int64_t p) {
      return common[p] / (common[p] + alpha * only_a[p] + beta * only_b[p] + 1);
    });
  // What is NaN was not read where it is absent.
  each(out, columns, [=](int64_t p) {
    const T totals = total_a != total_a ? total_a : total_b[p];
    return totals != totals ? totals : out[p];
  });
}

// Columns begin, ..., end − 1 of the similarities of some objects.
template <class T>
void columns(const How& how, const Arguments<T>& given, const std::vector<Object<T>>& objects, int64_t begin,
             int64_t end, T* out) {
  const Add<T> four = add_for<T, 4>(how), one = add_for<T, 1>(how);
  const int64_t P = given.columns, count = objects.size(), block = count == 1 ? given.features : FEATURES;
  std::vector<T> buffer((4 * count + 3) * COLUMNS);
  std::vector<int64_t> done(count);
  for (int64_t start = begin; start < end; start += COLUMNS) {
    const int64_t width = std::min(COLUMNS, end - start);
    auto sums = [&](int64_t i) {
      T* to = &buffer[4 * i * COLUMNS];
      return Sums<T>{to, to + COLUMNS, to + 2 * COLUMNS, to + 3 * COLUMNS};
    };
    std::fill(buffer.begin(), buffer.end(), T(0));
    std::fill(done.begin(), done.end(), 0);
    for (int64_t limit = block; limit < given.features + block; limit += block) {
      for (int64_t i = 0; i < count; ++i) {
        const Object<T>& object = objects[i];
        const int64_t size = object.features.size();
        for (; done[i] + 4 <= size && object.features[done[i] + 3] < limit; done[i] += 4)
          four(object, done[i], given.b + start, P, given.threshold, width, sums(i));
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      for (; done[i] < int64_t(objects[i].features.size()); ++done[i])
        one(objects[i], done[i], given.b + start, P, given.threshold, width, sums(i));
      finish(how, given, sums(i), objects[i].total, given.total_b + start, width, &buffer[4 * count * COLUMNS],
             out + i * P + start);
    }
  }
}

template <class T>
void similarity(const How& how, const Arguments<T>& given, int64_t rows, int64_t threads, T* out) {
  const int64_t P = given.columns;
  // Less than this is done before a second thread has begun.
  threads = std::max(int64_t(1), std::min(threads, rows * given.features * P / 32768));
  for (int64_t first = 0; first < rows; first += OBJECTS) {
    std::vector<Object<T>> objects;
    for (int64_t i = first; i < std::min(first + OBJECTS, rows); ++i)
      objects.push_back(object(given.a + i * given.features, given.features, given.threshold));
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int64_t part = 0; part < threads; ++part)
      columns(how, given, objects, P * part / threads, P * (part + 1) / threads, out + first * P);
  }
}

template <class T>
void run(void* out, const void* a, const void* b, const void* total_b, const void* theta, const void* alpha,
         const void* beta, int64_t rows, int64_t features, int64_t columns, const How& how, double threshold,
         int64_t threads) {
  auto values = [](const void* data) { return static_cast<const T*>(data); };
  const Arguments<T> given = {values(a), values(b), values(total_b), *values(theta), *values(alpha), *values(beta),
                              T(threshold), features, columns};
  similarity(how, given, rows, threads, static_cast<T*>(out));
}

}  // namespace tversky

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif

// `bytes` per number: 4 for float, 8 for double.
extern "C" void tversky_frozen(
    void* out, const void* a, const void* b, const void* total_b, const void* theta, const void* alpha,
    const void* beta, int64_t bytes, int64_t rows, int64_t features, int64_t columns, const char* model,
    const char* intersection, const char* difference, const char* semantics, double threshold, int64_t threads) {
  const auto run = bytes == 4 ? tversky::run<float> : tversky::run<double>;
  run(out, a, b, total_b, theta, alpha, beta, rows, features, columns,
      {model, intersection, difference, semantics}, threshold, threads);
}

#ifdef FXFREEZE_AOTI
// The operator as a compiled package calls it; as many threads as OpenMP would take.
extern "C" AOTITorchError aoti_torch_cpu_tversky_frozen_native(
    AtenTensorHandle a, AtenTensorHandle b, AtenTensorHandle total_b, AtenTensorHandle theta, AtenTensorHandle alpha,
    AtenTensorHandle beta, const char* model, const char* intersection, const char* difference, const char* semantics,
    double threshold, AtenTensorHandle* result) {
  const AtenTensorHandle tensors[] = {a, b, total_b, theta, alpha, beta};
  void *data[6], *out;
  int64_t *sizes_a, *sizes_b;
  int32_t dtype;
  for (int i = 0; i < 6; ++i) AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensors[i], &data[i]));
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(a, &sizes_a));
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(b, &sizes_b));
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(a, &dtype));
  const int64_t sizes[] = {sizes_a[0], sizes_b[1]}, strides[] = {sizes_b[1], 1};
  AOTI_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(2, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, result));
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(*result, &out));
#ifdef _OPENMP
  const int64_t threads = omp_get_max_threads();
#else
  const int64_t threads = 1;
#endif
  tversky_frozen(out, data[0], data[1], data[2], data[3], data[4], data[5],
                 dtype == aoti_torch_dtype_float32() ? 4 : 8, sizes_a[0], sizes_a[1], sizes_b[1], model, intersection,
                 difference, semantics, threshold, threads);
  return AOTI_TORCH_SUCCESS;
}
#endif
