// The backward of RMSNorm. Lanes add in a fixed tree; the weight's gradient adds fixed blocks of rows in order.

#include <algorithm>
#include <vector>

#include "row.h"

namespace waypost {
namespace {

// dx = s * (w g - x s^2 mean(w g x)), dw = sum_t g x s
template <class T>
void backward(const T *x, const T *weight, const Wide<T> *scale, const T *grad, long rows, int width, T *grad_x,
              T *grad_weight, int threads) {
  typedef Wide<T> A;
  constexpr long kBlock = 64;
  const long blocks = (rows + kBlock - 1) / kBlock;
  const int padded = (width + kLanes - 1) / kLanes * kLanes;
  std::vector<A> parts((size_t)blocks * padded, A(0));
#pragma omp parallel for num_threads(threads) if (rows * width > 32768)
  for (long b = 0; b < blocks; ++b) {
    A *part = &parts[(size_t)b * padded];
    for (long t = b * kBlock; t < std::min(rows, (b + 1) * kBlock); ++t) {
      const T *row = x + t * width, *g = grad + t * width;
      const A s = scale[t];
      Vec<A> dot = splat(A(0));
      for (int k = 0; k < width; k += kLanes) {
        const Vec<A> xv = load_some(row + k, width - k), gv = load_some(g + k, width - k);
        dot += xv * gv * load_some(weight + k, width - k);
        store(part + k, load(part + k) + gv * xv * s);
      }
      const A mean = sum_lanes<A>(dot) * s * s / width;
      for (int k = 0; k < width; k += kLanes) {
        const Vec<A> xv = load_some(row + k, width - k), gv = load_some(g + k, width - k);
        store_some(grad_x + t * width + k, (gv * load_some(weight + k, width - k) - xv * mean) * s, width - k);
      }
    }
  }
  for (int k = 0; k < width; k += kLanes) {
    Vec<A> total = splat(A(0));
    for (long b = 0; b < blocks; ++b) total += load(&parts[(size_t)b * padded + k]);
    store_some(grad_weight + k, total, width - k);
  }
}

}  // namespace
}  // namespace waypost

using namespace waypost;

extern "C" void EXPORT(rms_norm_backward)(const Element *x, const Element *weight, const Wide<Element> *scale, const Element *grad,
                                          long rows, int width, Element *grad_x, Element *grad_weight, int threads) {
  backward(x, weight, scale, grad, rows, width, grad_x, grad_weight, threads);
}
