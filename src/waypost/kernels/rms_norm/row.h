// RMSNorm of one row.
#pragma once

#include "../common.h"

namespace waypost {

// out = x * s * weight over `width` elements, s = 1 / sqrt(mean(x^2) + eps), which is returned. out may be x.
template <class T> ALONE Wide<T> norm_row(const T *x, const T *weight, int width, double eps, T *out) {
  typedef Wide<T> A;
  Vec<A> square = splat(A(0));
  for (int k = 0; k < width; k += kLanes) {
    const Vec<A> v = load_some(x + k, width - k);
    square = fma<A>(v, v, square);
  }
  const A s = A(1) / std::sqrt(sum_lanes<A>(square) / width + (A)eps);
  for (int k = 0; k < width; k += kLanes)
    store_some(out + k, load_some(x + k, width - k) * s * load_some(weight + k, width - k), width - k);
  return s;
}

}  // namespace waypost
