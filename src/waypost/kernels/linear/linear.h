// x W^T over packed weights, for callers that are in a parallel region already.
#pragma once

#include "../common.h"
#include "../turns.h"
#include "../upcoming.h"

namespace waypost {

// This thread's share of x (rows, 2 * pairs) -> out (rows, outputs); the threads meet at the end. On the way the memory works on
// `also`. Defined in linear.cpp for the element type at hand; `panels` are those of panels.h.
template <class X> void share_linear(Turn &turn, const X *x, long rows, long pairs, const Pair *panels, long outputs, X *out,
                                     Upcoming &also);

// silu(x G^T) * (x U^T) over panels of G and, behind them, of U; each has `width` outputs, a whole number of panels. What a
// thread makes of both it gates while that is in its cache. bias (2 width,) or null.
template <class X> void share_gated(Turn &turn, const X *x, long rows, long pairs, const Pair *panels, long width, const X *bias,
                                    X *out, Upcoming &also);
// Whether that pays and is possible: weights that one tile uses stream best as they lie, and a panel must not hold both.
bool gates_on_the_way(long rows, long width);

// Adds to `later` the weights with which this thread would begin share_linear.
void add_first(long rows, long pairs, const Pair *panels, long outputs, Upcoming &later);

// A weight in bfloat16 a second time, in 12 bits (compact.cpp), for at most kFewRows rows.
constexpr long kFewRows = 8;
struct Escape {
  uint32_t at;  // of the bfloat16 in its panel; the last of a panel's lies behind it
  uint16_t bits;
};
struct Compact {
  // This thread's share of x (rows, 2 * pairs) -> out (rows, outputs); on the way the memory begins with `then`, which may be null.
  void (*share)(Turn &, const Compact *, const bf16 *x, long rows, bf16 *out, const Compact *then);
  const uint8_t *codes;
  const uint16_t *tops;   // (panels,): the largest exponent with a code
  const Escape *escapes;  // (panels, most + 1), in the order of their places
  long most, pairs, outputs;
};

// The same over weights in few bits; quantized.cpp says how they lie.
typedef void ShareQuantized(Turn &turn, int bits, const bf16 *x, long rows, long pairs, const void *panels, const void *scales,
                            long group_pairs, long outputs, bf16 *out);

}  // namespace waypost
