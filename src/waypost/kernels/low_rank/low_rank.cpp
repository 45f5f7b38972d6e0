// y + scale * (x A^T) B^T of rows that each have a pair (A, B) of their own, or none.
//
// Vectors lie in segments of at most `width` elements, at any address. A dot product has sixteen lanes that take elements in
// order, segment after segment; what B adds comes component by component. So the bits of a row depend on its own numbers and
// its own pair: neither on the rows beside it, nor on where the segments were cut (at multiples of sixteen) or lie.

#include "low_rank.h"

#include <vector>

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

// One row by one pair.
template <class T> void change(const T *x, long inputs, T *y, long outputs, const Factors &f) {
  thread_local std::vector<Wide<T>> u;
  u.resize(f.rank);
  long j = 0;
  for (; j + kGroup <= f.rank; j += kGroup) shrink<T, kGroup>(x, inputs, f, j, u.data());
  for (; j < f.rank; ++j) shrink<T, 1>(x, inputs, f, j, u.data());
  expand<T>(y, outputs, f, u.data());
}

}  // namespace
}  // namespace waypost

using namespace waypost;

extern "C" {

// See low_rank.h.
void EXPORT(share_low_rank)(Turn &turn, const Element *x, long x_stride, long inputs, Element *y, long y_stride, const long *widths,
                            int parts, const int32_t *which, long rows, const void *const *factors, long adapters) {
  turn.in_order(rows * parts, [&](long i) {
    const long t = i / parts, part = i % parts;
    const Factors *f = which[t] < 0 ? nullptr : (const Factors *)factors[part * adapters + which[t]];
    if (!f) return;
    Element *to = y + t * y_stride;
    for (long before = 0; before < part; ++before) to += widths[before];
    change(x + t * x_stride, inputs, to, widths[part], *f);
  });
  turn.meet();
}

// The same in a region of its own, for one part.
void EXPORT(low_rank)(const Element *x, long x_stride, long inputs, Element *y, long y_stride, long outputs, const int32_t *which,
                      long rows, const void *const *factors, int threads) {
  long work = 0;  // waking the other threads costs as much as some hundred thousand products
  for (long t = 0; t < rows; ++t)
    if (which[t] >= 0) work += ((const Factors *)factors[which[t]])->rank * (inputs + outputs);
  Turns turns(threads);
#pragma omp parallel num_threads(threads) if (work > (1 << 20))
  {
    Turn turn(turns);
    EXPORT(share_low_rank)(turn, x, x_stride, inputs, y, y_stride, &outputs, 1, which, rows, factors, 0);
  }
}
}
