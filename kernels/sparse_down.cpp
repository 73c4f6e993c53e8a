// fxfreeze::sparse_down on a CPU: the sum of the weight's rows that belong to nonzero values of h, each times its value.
// h is [rows, K], the weight [K, P], both contiguous.
//
// A thread has some columns of the weight, so that no two threads add to the same number, and goes through them in
// chunks whose sums stay in its cache. Sums of a row of h are added up in the same order whatever the other rows are.
//
// AOTInductor compiles this text at -O1 as a part of its own. There, too, the loops marked `omp simd` become vectors.

#include <algorithm>
#include <cstdint>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
// AOTInductor turns it off, and with it `omp simd`.
#pragma GCC optimize("tree-loop-vectorize")
#endif

namespace sparse {

// Rows of the weight that are added up in registers before the sums are touched.
constexpr int AT_ONCE = 8;
// A chunk's sums of one row of h, and as much of the weight at a time, fill half of a 32 KiB cache in float.
constexpr int64_t COLUMNS = 2048;
// Of rows of the weight that one row of h after another takes from the cache.
constexpr int64_t NEURONS = 16;

template <class T>
struct Active {
  std::vector<int64_t> neurons;  // those that fire, in ascending order
  std::vector<T> values;
};

// The neurons that fire in each row of h; nothing if they are more than `limit` altogether. A NaN fires.
template <class T>
std::vector<Active<T>> active(const T* h, int64_t rows, int64_t neurons, double limit) {
  std::vector<Active<T>> found(rows);
  int64_t total = 0;
  for (int64_t i = 0; i < rows; ++i, h += neurons) {
    int64_t count = 0;
#pragma omp simd reduction(+ : count)
    for (int64_t k = 0; k < neurons; ++k) count += h[k] != 0;
    total += count;
    if (double(total) > limit) return {};
    // One more, for the loop below writes before it knows.
    found[i].neurons.resize(count + 1);
    found[i].values.resize(count + 1);
    int64_t *to = found[i].neurons.data(), at = 0;
    T* value = found[i].values.data();
    for (int64_t k = 0; k < neurons; ++k) {
      to[at] = k, value[at] = h[k];
      at += h[k] != 0;
    }
    found[i].neurons.resize(count);
  }
  return found;
}

// Adds the firing neurons first, ..., first + COUNT − 1 to the sums; the weight begins at the first column.
template <class T, int COUNT>
void add(const Active<T>& active, int64_t first, const T* weight, int64_t stride, int64_t columns, T* sums) {
  const T* row[COUNT];
  T value[COUNT];
  for (int i = 0; i < COUNT; ++i) {
    row[i] = weight + active.neurons[first + i] * stride;
    value[i] = active.values[first + i];
  }
#pragma omp simd
  for (int64_t p = 0; p < columns; ++p) {
    T sum = value[0] * row[0][p];
    auto term = [&](int i) __attribute__((always_inline)) { sum += value[i] * row[i][p]; };
    if (COUNT == 8) term(1), term(2), term(3), term(4), term(5), term(6), term(7);
    sums[p] += sum;
  }
}

// Columns begin, ..., end − 1 of the result.
template <class T>
void columns(const std::vector<Active<T>>& active, const T* weight, const T* bias, int64_t neurons, int64_t stride,
             int64_t begin, int64_t end, T* out) {
  const int64_t rows = active.size(), block = rows == 1 ? neurons : NEURONS;
  std::vector<int64_t> done(rows);
  for (int64_t start = begin; start < end; start += COLUMNS) {
    const int64_t width = std::min(COLUMNS, end - start);
    std::fill(done.begin(), done.end(), 0);
    for (int64_t i = 0; i < rows; ++i) std::copy(bias + start, bias + start + width, out + i * stride + start);
    for (int64_t limit = block; limit < neurons + block; limit += block) {
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t size = active[i].neurons.size();
        for (; done[i] + AT_ONCE <= size && active[i].neurons[done[i] + AT_ONCE - 1] < limit; done[i] += AT_ONCE)
          add<T, AT_ONCE>(active[i], done[i], weight + start, stride, width, out + i * stride + start);
      }
    }
    for (int64_t i = 0; i < rows; ++i)
      for (; done[i] < int64_t(active[i].neurons.size()); ++done[i])
        add<T, 1>(active[i], done[i], weight + start, stride, width, out + i * stride + start);
  }
}

// False, and nothing is done, if more than `limit` values of h are not 0.
template <class T>
bool run(void* out, const void* h, const void* weight, const void* bias, int64_t rows, int64_t neurons, int64_t width,
         double limit, int64_t threads) {
  const auto found = active(static_cast<const T*>(h), rows, neurons, limit);
  if (int64_t(found.size()) < rows) return false;
  int64_t total = 0;
  for (const auto& row : found) total += row.neurons.size();
  // Less than this is done before a second thread has begun.
  threads = std::max(int64_t(1), std::min(threads, total * width / 32768));
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t part = 0; part < threads; ++part)
    columns(found, static_cast<const T*>(weight), static_cast<const T*>(bias), neurons, width, width * part / threads,
            width * (part + 1) / threads, static_cast<T*>(out));
  return true;
}

}  // namespace sparse

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif

// `bytes` per number: 4 for float, 8 for double. `done` is 0 where more than `limit` values of h are not 0.
extern "C" void sparse_down(void* out, int32_t* done, const void* h, const void* weight, const void* bias,
                            int64_t bytes, int64_t rows, int64_t neurons, int64_t columns, double limit,
                            int64_t threads) {
  const auto run = bytes == 4 ? sparse::run<float> : sparse::run<double>;
  *done = run(out, h, weight, bias, rows, neurons, columns, limit, threads);
}

#ifdef FXFREEZE_AOTI
// The operator as a compiled package calls it; as many threads as OpenMP would take.
extern "C" AOTITorchError aoti_torch_cpu_sparse_down_native(AtenTensorHandle h, AtenTensorHandle weight,
                                                            AtenTensorHandle bias, double crossover,
                                                            AtenTensorHandle* result) {
  const AtenTensorHandle tensors[] = {h, weight, bias};
  void *data[3], *out;
  int64_t *sizes_h, *sizes_weight;
  int32_t dtype, done;
  for (int i = 0; i < 3; ++i) AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensors[i], &data[i]));
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(h, &sizes_h));
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(weight, &sizes_weight));
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(h, &dtype));
  const int64_t rows = sizes_h[0], neurons = sizes_weight[0], columns = sizes_weight[1];
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  AOTI_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(2, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, result));
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(*result, &out));
#ifdef _OPENMP
  const int64_t threads = omp_get_max_threads();
#else
  const int64_t threads = 1;
#endif
  sparse_down(out, &done, data[0], data[1], data[2], dtype == aoti_torch_dtype_float32() ? 4 : 8, rows, neurons,
              columns, crossover * neurons, threads);
  return done ? AOTI_TORCH_SUCCESS : aoti_torch_cpu_addmm_out(*result, bias, h, weight, 1, 1);
}
#endif
