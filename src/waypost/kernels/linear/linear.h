// x W^T over packed weights, for callers that are in a parallel region already.
#pragma once

#include "../common.h"

namespace waypost {

// This thread's share of x (rows, 2 * pairs) -> out (rows, outputs); the threads meet at the end. Defined in linear.cpp for the
// element type at hand; `panels` are those of panels.h.
template <class X> void share_linear(const X *x, long rows, long pairs, const Pair *panels, long outputs, X *out);

// The same over weights in few bits; quantized.cpp says how they lie.
typedef void ShareQuantized(int bits, const bf16 *x, long rows, long pairs, const void *panels, const void *scales, long group_pairs,
                            long outputs, bf16 *out);

}  // namespace waypost
