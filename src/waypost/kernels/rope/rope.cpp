// Rotary positions of rows of heads.

#include "head.h"

namespace waypost {
namespace {

template <class T>
void rotate(const T *x, long stride, const float *cosine, const float *sine, int rows, int heads, int width, float sign, T *out,
            int threads) {
  const long half = width / 2;
#pragma omp parallel for num_threads(threads) if ((long)rows * heads * width > 32768)
  for (int t = 0; t < rows; ++t)
    for (int h = 0; h < heads; ++h)
      rotate_head(x + t * stride + (long)h * width, cosine + t * half, sine + t * half, width, sign, out + ((long)t * heads + h) * width);
}

}  // namespace
}  // namespace waypost

using namespace waypost;

extern "C" void EXPORT(rope)(const Element *x, long stride, const float *cosine, const float *sine, int rows, int heads, int width,
                             float sign, Element *out, int threads) {
  rotate(x, stride, cosine, sine, rows, heads, width, sign, out, threads);
}
