// x W^T for weights in bfloat16, rows in bfloat16 or float32.

#include "linear.h"

#include <vector>

#include "../swiglu/row.h"
#include "panels.h"
#include "transpose.h"

namespace waypost {
namespace {

// One panel of a plain weight (outputs, pairs), outputs past the end as zeros.
void pack_panel(const Pair *weight, long outputs, long pairs, long panel, Pair *to) {
  for (int first = 0; first < kPanel; first += kLanes) {
    const long row = panel * kPanel + first;
    const int here = (int)std::max(0L, std::min<long>(kLanes, outputs - row));
    long k = 0;
    for (; k + kLanes <= pairs; k += kLanes) {
      VecU rows[kLanes] = {};
      for (int n = 0; n < here; ++n) rows[n] = load(weight + (row + n) * pairs + k);
      transpose(rows);
      for (int i = 0; i < kLanes; ++i) store(to + (k + i) * kPanel + first, rows[i]);
    }
    for (; k < pairs; ++k)
      for (int n = 0; n < kLanes; ++n) to[k * kPanel + first + n] = n < here ? weight[(row + n) * pairs + k] : 0;
  }
}

// The same tiles over a plain weight: each panel is packed where it is used and forgotten, so there is never a second copy.
template <class X>
void linear_plain(const X *x, long rows, long pairs, const Pair *weight, long outputs, X *out, int threads) {
  const long panels = (outputs + kPanel - 1) / kPanel;
#pragma omp parallel num_threads(threads) if (panels > 1)
  {
    std::vector<Pair> packed(pairs * kPanel);
#pragma omp for schedule(static)
    for (long p = 0; p < panels; ++p) {
      pack_panel(weight, outputs, pairs, p, packed.data());
      tiles(x, rows, pairs, packed.data(), out + p * kPanel, outputs, (int)std::min<long>(kPanel, outputs - p * kPanel));
    }
  }
}

}  // namespace

template <class X>
void share_linear(Turn &turn, const X *x, long rows, long pairs, const Pair *panels, long outputs, X *out, Upcoming &also) {
  const long size = pairs * kPanel;
  fetch_rows(x, rows * pairs * 2);
  also.spread(Share(rows, outputs).bursts(rows, pairs));
  share_panels(turn, rows, outputs, [&](long panel, int here, long first, long last, long stop) {
    const Pair *weights = panels + panel * size;
    tiles(x + first * pairs * 2, last - first, pairs, weights, out + first * outputs + panel * kPanel, outputs, here,
          panel + 1 < stop ? weights + size : nullptr, &also);
  });
}
template void share_linear(Turn &, const Element *, long, long, const Pair *, long, Element *, Upcoming &);

bool gates_on_the_way(long rows, long width) { return rows > kTileRows && width % kPanel == 0; }

template <class X>
void share_gated(Turn &turn, const X *x, long rows, long pairs, const Pair *panels, long width, const X *bias, X *out,
                 Upcoming &also) {
  const long size = pairs * kPanel;
  fetch_rows(x, rows * pairs * 2);
  const Share own(rows, width);
  also.spread(2 * own.bursts(rows, pairs));
  thread_local std::vector<X> both;
  both.resize(2 * kBlockRows * kPanel);
  X *const gates = both.data(), *const ups = gates + kBlockRows * kPanel;
  share_panels(turn, rows, width, [&](long panel, int here, long first, long last, long stop) {
    const Pair *gate = panels + panel * size, *up = gate + own.panels * size;
    const X *from = x + first * pairs * 2;
    tiles(from, last - first, pairs, gate, gates, kPanel, here, up, &also);
    tiles(from, last - first, pairs, up, ups, kPanel, here, panel + 1 < stop ? gate + size : nullptr, &also);
    for (long t = 0; t < last - first; ++t) {
      X *g = gates + t * kPanel, *u = ups + t * kPanel;
      if (bias) add_row(g, bias + panel * kPanel, kPanel, g), add_row(u, bias + width + panel * kPanel, kPanel, u);
      gate_row(g, u, kPanel, out + (first + t) * width + panel * kPanel);
    }
  });
}
template void share_gated(Turn &, const Element *, long, long, const Pair *, long, const Element *, Element *, Upcoming &);

void add_first(long rows, long pairs, const Pair *panels, long outputs, Upcoming &later) {
  const long size = pairs * kPanel;
  later.add(panels + Share(rows, outputs).first_panel() * size, size * (long)sizeof(Pair));
}

}  // namespace waypost

using namespace waypost;

extern "C" {

// weight (outputs, 2 * pairs) bfloat16 -> (panels, pairs, 48, 2), the last panel filled with zeros.
void EXPORT(pack_panels)(const Pair *weight, long outputs, long pairs, Pair *panels, int threads) {
  const long count = (outputs + kPanel - 1) / kPanel;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long p = 0; p < count; ++p) pack_panel(weight, outputs, pairs, p, panels + p * pairs * kPanel);
}

// As linear, over a plain weight (outputs, 2 * pairs); the same bits.
void EXPORT(linear_plain)(const Element *x, long rows, long pairs, const Pair *weight, long outputs, Element *out, int threads) {
  linear_plain(x, rows, pairs, weight, outputs, out, threads);
}

// x (rows, 2 * pairs) -> out (rows, outputs), both contiguous.
void EXPORT(linear)(const Element *x, long rows, long pairs, const Pair *panels, long outputs, Element *out, int threads) {
  Turns turns(threads);
#pragma omp parallel num_threads(threads) if (outputs > kPanel || rows > kBlockRows)
  {
    Turn turn(turns);
    Upcoming nothing;
    share_linear(turn, x, rows, pairs, panels, outputs, out, nothing);
  }
}
}
