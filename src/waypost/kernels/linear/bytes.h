// Products of bytes, four at a time.
#pragma once

#include "../common.h"

namespace waypost {

// Lane by lane, sum + the four bytes of `a`, without signs, times those of `b`, with signs. Exact.
inline VecI add_bytes(VecI sum, VecU a, VecU b) {
#if defined(__AVX512VNNI__)
  return (VecI)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#else
  for (int i = 0; i < 4; ++i) sum += (VecI)((a >> (8 * i)) & 255u) * ((VecI)(b << (24 - 8 * i)) >> 24);
  return sum;
#endif
}

inline VecU load_bytes(const void *p) { return load((const Pair *)p); }

}  // namespace waypost
