// silu(gate) * up and its backward, element by element.

#include "row.h"

namespace waypost {
namespace {

template <class T>
void forward(const T *gate, long gate_stride, const T *up, long up_stride, long rows, int width, T *out, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > 32768)
  for (long t = 0; t < rows; ++t) gate_row(gate + t * gate_stride, up + t * up_stride, width, out + t * width);
}

// d silu(g) = s (1 + g (1 - s)), s = sigmoid(g)
template <class T>
void backward(const T *gate, long gate_stride, const T *up, long up_stride, const T *grad, long rows, int width, T *grad_gate,
              T *grad_up, int threads) {
  typedef Wide<T> A;
#pragma omp parallel for num_threads(threads) if (rows * width > 32768)
  for (long t = 0; t < rows; ++t)
    for (int f = 0; f < width; f += kLanes) {
      const int n = width - f;
      const Vec<A> g = load_some(gate + t * gate_stride + f, n), u = load_some(up + t * up_stride + f, n);
      const Vec<A> d = load_some(grad + t * width + f, n), s = sigmoid<A>(g);
      store_some(grad_gate + t * width + f, d * u * s * (A(1) + g * (A(1) - s)), n);
      store_some(grad_up + t * width + f, d * g * s, n);
    }
}

}  // namespace
}  // namespace waypost

using namespace waypost;

extern "C" {

void EXPORT(swiglu_forward)(const Element *gate, long gate_stride, const Element *up, long up_stride, long rows, int width,
                            Element *out, int threads) {
  forward(gate, gate_stride, up, up_stride, rows, width, out, threads);
}

void EXPORT(swiglu_backward)(const Element *gate, long gate_stride, const Element *up, long up_stride, const Element *grad, long rows,
                             int width, Element *grad_gate, Element *grad_up, int threads) {
  backward(gate, gate_stride, up, up_stride, grad, rows, width, grad_gate, grad_up, threads);
}
}
