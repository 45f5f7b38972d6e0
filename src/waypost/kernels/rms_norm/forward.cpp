// RMSNorm of rows. Lanes add in a fixed tree.

#include "row.h"

namespace waypost {
namespace {

template <class T> void forward(const T *x, const T *weight, long rows, int width, double eps, T *out, Wide<T> *scale, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > 32768)
  for (long t = 0; t < rows; ++t) {
    const Wide<T> s = norm_row(x + t * width, weight, width, eps, out + t * width);
    if (scale) scale[t] = s;
  }
}

}  // namespace
}  // namespace waypost

using namespace waypost;

extern "C" void EXPORT(rms_norm_forward)(const Element *x, const Element *weight, long rows, int width, double eps, Element *out,
                                         Wide<Element> *scale, int threads) {
  forward(x, weight, rows, width, eps, out, scale, threads);
}
