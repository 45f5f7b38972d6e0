// Squares of sixteen by sixteen units, transposed in registers.
#pragma once

#include "../common.h"

namespace waypost {

// Row i of the sixteen becomes lane i, in four exchanges of ever larger squares beside the diagonal.
template <int S> inline void exchange(VecU (&rows)[kLanes]) {
  VecI low, high;
  for (int j = 0; j < kLanes; ++j) low[j] = j & S ? kLanes + j - S : j, high[j] = j & S ? kLanes + j : j + S;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & S)) {
      const VecU a = rows[i], b = rows[i + S];
      rows[i] = __builtin_shuffle(a, b, low), rows[i + S] = __builtin_shuffle(a, b, high);
    }
}
inline void transpose(VecU (&rows)[kLanes]) { exchange<1>(rows), exchange<2>(rows), exchange<4>(rows), exchange<8>(rows); }

}  // namespace waypost
