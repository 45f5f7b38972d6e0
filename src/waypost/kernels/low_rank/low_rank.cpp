// y + scale * (x A^T) B^T of rows that each have a pair (A, B) of their own, or none.
//
// Vectors lie in segments of at most `width` elements, at any address. A dot product has sixteen lanes that take elements in
// order, segment after segment; what B adds comes component by component. So the bits of a row depend on its own numbers and
// its own pair: neither on the rows beside it, nor on where the segments were cut (at multiples of sixteen) or lie.

#include <vector>

#include "../common.h"

namespace waypost {
namespace {

struct Factors {
  const void *const *a, *const *b;  // rank x segments, component by component
  long rank, width;
  double scale;
};

constexpr int kGroup = 4;  // components at once: one reading of the row for all of them

template <class T, int n> void shrink(const T *x, long inputs, const Factors &f, long first, Wide<T> *u) {
  typedef Wide<T> A;
  const long segments = (inputs + f.width - 1) / f.width;
  Vec<A> sums[n] = {};
  for (long s = 0; s < segments; ++s) {
    const long begin = s * f.width, end = begin + f.width < inputs ? begin + f.width : inputs;
    const A *a[n];
    for (int j = 0; j < n; ++j) a[j] = (const A *)f.a[(first + j) * segments + s];
    for (long k = begin; k < end; k += kLanes) {
      const int left = end - k < kLanes ? (int)(end - k) : kLanes;
      const Vec<A> v = load_some(x + k, left);
      for (int j = 0; j < n; ++j) sums[j] = fma<A>(v, load_some(a[j] + (k - begin), left), sums[j]);
    }
  }
  for (int j = 0; j < n; ++j) u[first + j] = sum_lanes<A>(sums[j]);
}

template <class T> void expand(T *y, long outputs, const Factors &f, const Wide<T> *u) {
  typedef Wide<T> A;
  const long segments = (outputs + f.width - 1) / f.width;
  for (long s = 0; s < segments; ++s) {
    const long begin = s * f.width, end = begin + f.width < outputs ? begin + f.width : outputs;
    for (long n = begin; n < end; n += kLanes) {
      const int left = end - n < kLanes ? (int)(end - n) : kLanes;
      Vec<A> sum = {};
      for (long j = 0; j < f.rank; ++j)
        sum = fma<A>(splat(u[j]), load_some((const A *)f.b[j * segments + s] + (n - begin), left), sum);
      store_some(y + n, fma<A>(splat((A)f.scale), sum, load_some(y + n, left)), left);
    }
  }
}

template <class T>
void rows(const T *x, long x_stride, long inputs, T *y, long y_stride, long outputs, const int32_t *which, long count,
          const Factors *const *factors, int threads) {
  long work = 0;  // waking the other threads costs as much as some hundred thousand products
  for (long t = 0; t < count; ++t)
    if (which[t] >= 0) work += factors[which[t]]->rank * (inputs + outputs);
#pragma omp parallel num_threads(threads) if (work > (1 << 20))
  {
    std::vector<Wide<T>> u;
#pragma omp for schedule(static)
    for (long t = 0; t < count; ++t) {
      if (which[t] < 0) continue;
      const Factors &f = *factors[which[t]];
      const T *row = x + t * x_stride;
      u.resize(f.rank);
      long j = 0;
      for (; j + kGroup <= f.rank; j += kGroup) shrink<T, kGroup>(row, inputs, f, j, u.data());
      for (; j < f.rank; ++j) shrink<T, 1>(row, inputs, f, j, u.data());
      expand<T>(y + t * y_stride, outputs, f, u.data());
    }
  }
}

}  // namespace
}  // namespace waypost

using namespace waypost;

extern "C" void EXPORT(low_rank)(const Element *x, long x_stride, long inputs, Element *y, long y_stride, long outputs,
                                 const int32_t *which, long count, const void *const *factors, int threads) {
  rows(x, x_stride, inputs, y, y_stride, outputs, which, count, (const Factors *const *)factors, threads);
}
