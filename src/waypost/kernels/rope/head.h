// Rotary positions of one head: pairs channel i with channel i + D/2.
#pragma once

#include "../common.h"

namespace waypost {

// cosine, sine (width / 2,); `sign` is 1 forward and -1 for the gradient (the inverse rotation). `to` is not `from`.
template <class T> ALONE void rotate_head(const T *from, const float *cosine, const float *sine, int width, float sign, T *to) {
  typedef Wide<T> A;
  const int half = width / 2;
  for (int d = 0; d < half; d += kLanes) {
    const int n = half - d;
    const Vec<A> c = __builtin_convertvector(load_some(cosine + d, n), Vec<A>);
    const Vec<A> s = __builtin_convertvector(load_some(sine + d, n), Vec<A>) * (A)sign;
    const Vec<A> a = load_some(from + d, n), b = load_some(from + half + d, n);
    store_some(to + d, a * c - b * s, n);
    store_some(to + half + d, b * c + a * s, n);
  }
}

}  // namespace waypost
