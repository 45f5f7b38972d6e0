// What adapters add to a product, for callers that are in a parallel region already.
#pragma once

#include "../common.h"
#include "../turns.h"

namespace waypost {

// This thread's share of y[t] += what factors[part * adapters + which[t]] make of x[t], for every part of the outputs: parts lie
// side by side in y, `widths` wide. Rows with which < 0 stay, and so do parts whose factors are null. The threads meet at the end.
template <class T>
using ShareLowRank = void(Turn &turn, const T *x, long x_stride, long inputs, T *y, long y_stride, const long *widths, int parts,
                          const int32_t *which, long rows, const void *const *factors, long adapters);

}  // namespace waypost
