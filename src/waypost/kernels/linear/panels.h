// x W^T over weights in panels of 48 outputs: any number of rows, one order of addition.
//
// Every output is one lane of one accumulator that takes the pairs of inputs in ascending order, so its bits depend on its row
// of x and its row of W alone, never on how many rows there are, how they are cut into tiles, or on the number of threads.
#pragma once

#include <omp.h>

#include <algorithm>

#include "../common.h"
#include "../turns.h"
#include "../upcoming.h"

namespace waypost {

constexpr int kPanel = 48, kVectors = kPanel / kLanes;
#if defined(__AVX512F__)
constexpr int kTileRows = 8;  // 24 accumulators, 3 vectors of weights and a row's pair fill the 32 registers
#else
constexpr int kTileRows = 2;
#endif
constexpr long kBlockRows = 256;  // rows that go through all panels before the next are touched: they stay in the cache

template <int R> inline void clear(Vec<float> (&acc)[R][kVectors]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) acc[r][v] = Vec<float>{};
}

// acc[r] += x[r][0] w[., 0] + x[r][1] w[., 1] for R rows, `stride` apart, and the pairs w of one panel.
template <int R> inline void add_pairs(Vec<float> (&acc)[R][kVectors], const float *x, long stride, const VecU (&w)[kVectors]) {
  Vec<float> even[kVectors], odd[kVectors];
#pragma GCC unroll 3
  for (int v = 0; v < kVectors; ++v) {
    const VecU low = w[v] << 16, high = w[v] & 0xffff0000u;
    even[v] = (Vec<float>)low, odd[v] = (Vec<float>)high;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      acc[r][v] = fma<float>(splat(x[r * stride]), even[v], acc[r][v]);
      acc[r][v] = fma<float>(splat(x[r * stride + 1]), odd[v], acc[r][v]);
    }
}
template <int R> inline void add_pairs(Vec<float> (&acc)[R][kVectors], const bf16 *x, long stride, const VecU (&w)[kVectors]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    Pair row;
    std::memcpy(&row, x + r * stride, sizeof row);
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) acc[r][v] = add_product(splat(row), w[v], acc[r][v]);
  }
}

template <int R> struct Rows { static constexpr int count = R; };

// Calls f with the number of rows, 1 .. kTileRows, as a type.
template <class F> inline void with_rows(long rows, F f) {
  switch (rows) {
    case 1: f(Rows<1>()); break;
#if defined(__AVX512F__)
    case 2: f(Rows<2>()); break;
    case 3: f(Rows<3>()); break;
    case 4: f(Rows<4>()); break;
    case 5: f(Rows<5>()); break;
    case 6: f(Rows<6>()); break;
    case 7: f(Rows<7>()); break;
#endif
    default: f(Rows<kTileRows>());
  }
}

// Stores R rows of one panel, the first `outputs` of its 48.
template <int R, class X> inline void store_tile(X *out, long stride, const Vec<float> (&acc)[R][kVectors], int outputs) {
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kVectors && kLanes * v < outputs; ++v)
      store_some(out + r * stride + kLanes * v, acc[r][v], outputs - kLanes * v);
}

// R rows times one panel (pairs, 48). `next` is where the first of the weights needed later lie, `burst` bytes of them are asked
// for with every kBurst pairs, 0: none; and with them some of `also`, which may be null. Asked for pair by pair they would cost
// the inner loop a twelfth of its speed. That is what a panel costs that nobody asked for before: of each pair `stream` bytes are
// asked for kStream before they are used, into the first cache alone.
constexpr long kBurst = 16, kStream = 8192;
template <int R, class X>
inline void tile(const X *x, long pairs, const Pair *panel, X *out, long outputs, int here, const char *next, long burst,
                 Upcoming *also, long stream) {
  Vec<float> acc[R][kVectors];
  clear(acc);
  for (long k = 0; k < pairs;) {
    for (const char *end = next + burst; next < end; next += 64) __builtin_prefetch(next, 0, 2);
    if (also) also->fetch();
    for (const long stop = std::min(k + kBurst, pairs); k < stop; ++k, panel += kPanel) {
      for (long line = 0; line < stream; line += 64) __builtin_prefetch((const char *)panel + kStream + line, 0, 0);
      VecU w[kVectors];
      for (int v = 0; v < kVectors; ++v) std::memcpy(&w[v], panel + kLanes * v, sizeof w[v]);
      add_pairs(acc, x + 2 * k, 2 * pairs, w);
    }
  }
  store_tile<R>(out, outputs, acc, here);
}

// Any number of rows times one panel, a tile at a time. `next` is the panel that will be used after it, or null: while the
// later tiles find this one in the cache, the memory works on the next, and on `also`.
template <class X>
inline void tiles(const X *x, long rows, long pairs, const Pair *panel, X *out, long outputs, int here, const Pair *next = nullptr,
                  Upcoming *also = nullptr) {
  const long count = (rows + kTileRows - 1) / kTileRows, share = std::max<long>(1, std::min<long>(count, 4));
  const long own = kPanel * sizeof(Pair) / share, burst = next && count > 1 ? kBurst * own : 0;  // of a pair, of a burst
  const long stream = count > 1 ? 0 : kPanel * sizeof(Pair);
  for (long i = 0; i < count; ++i)
    with_rows(std::min<long>(kTileRows, rows - i * kTileRows), [&](auto rows_here) {
      const long t = i * kTileRows;
      tile<decltype(rows_here)::count>(x + t * pairs * 2, pairs, panel, out + t * outputs, outputs, here,
                                       (const char *)next + i * pairs * own, i < share ? burst : 0, count > 1 ? also : nullptr, stream);
    });
}

// What a thread begins with of panels x blocks of rows: neighbours, the panels of one block first.
struct Share {
  long panels, begin, end;  // of panels x blocks

  Share(long rows, long outputs) {
    const long blocks = (rows + kBlockRows - 1) / kBlockRows, me = omp_get_thread_num(), threads = omp_get_num_threads();
    panels = (outputs + kPanel - 1) / kPanel;
    begin = panels * blocks * me / threads, end = panels * blocks * (me + 1) / threads;
  }
  long first_panel() const { return begin % panels; }
  // Bursts (tile) of so many rows over all that is this thread's. None for a single tile, whose weights keep the memory busy.
  long bursts(long rows, long pairs) const {
    if (rows <= kTileRows) return 0;
    return (end - begin) * ((std::min(rows, kBlockRows) + kTileRows - 1) / kTileRows) * ((pairs + kBurst - 1) / kBurst);
  }
};

// Calls f(panel, outputs of it, first row, last row, stop) for the panels and blocks of rows that this thread of a region takes;
// after the panel come those up to `stop`, as far as is known. The threads meet at the end.
template <class F> inline void share_panels(Turn &turn, long rows, long outputs, F f) {
  const long panels = (outputs + kPanel - 1) / kPanel, blocks = (rows + kBlockRows - 1) / kBlockRows;
  turn.each(panels * blocks, [&](long i, long stop) {
    const long panel = i % panels, first = i / panels * kBlockRows;
    f(panel, (int)std::min<long>(kPanel, outputs - panel * kPanel), first, std::min(rows, first + kBlockRows),
      std::min(panels, panel + stop - i));
  });
  turn.meet();
}

// Rows that other threads have just written, all at once.
template <class X> inline void fetch_rows(const X *x, long elements) {
  if (elements * (long)sizeof(X) > 1 << 17) return;
  for (long i = 0; i < elements; i += 64 / (long)sizeof(X)) __builtin_prefetch(x + i, 0, 3);
}

}  // namespace waypost
