// x W^T over weights in panels of 48 outputs: any number of rows, one order of addition.
//
// Every output is one lane of one accumulator that takes the pairs of inputs in ascending order, so its bits depend on its row
// of x and its row of W alone, never on how many rows there are, how they are cut into tiles, or on the number of threads.
#pragma once

#include <algorithm>

#include "../common.h"

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

// R rows times one panel (pairs, 48). `next` is where the first of the weights needed later lie, `step` bytes of them a pair
// are asked for on the way; 0: none.
template <int R, class X>
inline void tile(const X *x, long pairs, const Pair *panel, X *out, long outputs, int here, const char *next, long step) {
  Vec<float> acc[R][kVectors];
  clear(acc);
  for (long k = 0; k < pairs; ++k, panel += kPanel, next += step) {
    VecU w[kVectors];
    for (int v = 0; v < kVectors; ++v) std::memcpy(&w[v], panel + kLanes * v, sizeof w[v]);
    for (long at = 0; at < step; at += 64) __builtin_prefetch(next + at, 0, 2);
    add_pairs(acc, x + 2 * k, 2 * pairs, w);
  }
  store_tile<R>(out, outputs, acc, here);
}

// Any number of rows times one panel, a tile at a time. `next` is the panel that will be used after it, or null: while the
// later tiles find this one in the cache, the memory works on the next.
template <class X>
inline void tiles(const X *x, long rows, long pairs, const Pair *panel, X *out, long outputs, int here, const Pair *next = nullptr) {
  constexpr long panel_bytes = kPanel * sizeof(Pair);  // of a pair of inputs
  const long count = (rows + kTileRows - 1) / kTileRows, share = std::min<long>(count, 4), step = next && count > 1 ? panel_bytes / share : 0;
  for (long i = 0; i < count; ++i)
    with_rows(std::min<long>(kTileRows, rows - i * kTileRows), [&](auto rows_here) {
      const long t = i * kTileRows;
      tile<decltype(rows_here)::count>(x + t * pairs * 2, pairs, panel, out + t * outputs, outputs, here,
                                       (const char *)next + i * pairs * step, i < share ? step : 0);
    });
}

// Calls f(panel, outputs of it, first row, last row) for every panel and block of rows, shared among the threads of the
// parallel region that this is called in.
template <class F> inline void share_panels(long rows, long outputs, F f) {
  const long panels = (outputs + kPanel - 1) / kPanel, blocks = (rows + kBlockRows - 1) / kBlockRows;
#pragma omp for schedule(static)
  for (long i = 0; i < panels * blocks; ++i) {
    const long panel = i % panels, first = i / panels * kBlockRows;
    f(panel, (int)std::min<long>(kPanel, outputs - panel * kPanel), first, std::min(rows, first + kBlockRows));
  }
}

}  // namespace waypost
