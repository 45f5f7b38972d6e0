// x W^T of few rows over a weight in bfloat16 that lies in 12 bits: the same bits from three quarters of the bytes.
//
// Few rows wait for the memory. The exponents of a trained weight carry two or three of their eight bits (Zhang et al. 2025,
// arXiv:2504.11651, sec. 2.2), so here they are coded in four: fifteen exponents in a row, those that most weights of a panel
// have, and zero. A weight with another one stands in a list beside its panel. Codes of one length, unlike those of the paper, are
// undone in registers on the way to the product, faster than the memory brings them.
//
// Layout: a panel of 48 outputs (panels.h) is groups of four pairs of inputs, a group its three vectors of 16 outputs, a vector
// 192 bytes: sixteen-bit lane l holds, of weight l of pair i, the sign and the mantissa in byte i % 2 of words i / 2, and the
// code in bits 4 i to 4 i + 3 of the third word.

#include <algorithm>

#include "linear.h"
#include "panels.h"

namespace waypost {
namespace {

constexpr int kGroup = 4;  // pairs
constexpr long kGroupBytes = 192 * kVectors;
constexpr int kCodes = 15;  // exponents in a row; the code behind them is zero's
constexpr long kAhead = 16 * kGroupBytes;  // bytes that are asked for before they are used

long bytes_of(const Compact &w) { return (w.pairs + kGroup - 1) / kGroup * kGroupBytes; }  // of a panel

// The exponent of each code where it stands in a weight. A lane is looked up by its five lowest bits, of which the fifth is the
// next code's: both halves are equal.
inline VecW exponents(uint16_t top) {
  VecW table;
  for (int i = 0; i < 2 * kLanes; ++i) table[i] = i % kLanes < kCodes ? (uint16_t)((top - i % kLanes) << 7) : 0;
  return table;
}

// The weights of pair i of a vector's four.
template <int I> inline VecU weights_of(const uint8_t *vector, VecW table) {
  const VecW both = load_wide(vector + I / 2 * 64), codes = load_wide(vector + 128) >> (4 * I);
  const VecW moved = I % 2 ? both >> 8 : both << 8, sign = I % 2 ? both : moved, mantissa = I % 2 ? moved : both;
  return (VecU)((sign & 0x8000) | __builtin_shuffle(table, codes) | (mantissa & 0x007f));
}

// One weight of a pair's vectors. In registers: with eight rows none is free to hold them across a call.
inline void put(VecU (&w)[kVectors], int place, uint16_t bits) {
#pragma GCC unroll 3
  for (int v = 0; v < kVectors; ++v)
    if (place / (2 * kLanes) == v) {
      VecW lanes = (VecW)w[v];
      lanes[place % (2 * kLanes)] = bits;
      w[v] = (VecU)lanes;
    }
}

// A panel's codes end here, and those that its thread reads after them, as far as it knows, begin there.
struct Reading {
  const uint8_t *end, *then;
};

// The compiler moves no request for memory that is made from `p` past this.
inline void stay(const uint8_t *&p) { asm volatile("" : "+r"(p)); }

// R rows times one panel, in the order of `tile` (panels.h).
template <int R>
void few_rows(const bf16 *x, long pairs, const uint8_t *group, uint16_t top, const Escape *next, bf16 *out, long outputs, int here,
              const Reading &reading) {
  Vec<float> acc[R][kVectors];
  clear(acc);
  const VecW table = exponents(top);
  for (long k = 0; k < pairs; k += kGroup, group += kGroupBytes) {
    const long over = group + kAhead - reading.end;
    const uint8_t *const ahead = over < 0 ? group + kAhead : reading.then + over;
    const auto add = [&](auto i) __attribute__((always_inline)) {
      constexpr int I = decltype(i)::count;
      constexpr long from = kGroupBytes / 64 * I / kGroup, to = kGroupBytes / 64 * (I + 1) / kGroup;
      if (k + I >= pairs) return;
      stay(group);  // the compiler would ask for the whole group at once, and the memory brings it later
#pragma GCC unroll 3
      for (long line = from; line < to; ++line) __builtin_prefetch(ahead + 64 * line, 0, 0);
      VecU w[kVectors];
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) w[v] = weights_of<I>(group + 192 * v, table);
      while (__builtin_expect(next->at < (k + I + 1) * 2 * kPanel, 0)) put(w, (int)(next->at - (k + I) * 2 * kPanel), next->bits), ++next;
      add_pairs(acc, x + 2 * (k + I), 2 * pairs, w);
    };
    add(Rows<0>()), add(Rows<1>()), add(Rows<2>()), add(Rows<3>());
  }
  store_tile<R>(out, outputs, acc, here);
}

// The largest of the exponents in a row that most of a panel's weights have; of a large panel an eighth is looked at.
uint16_t likely_top(const Pair *panel, long pairs) {
  long count[256 + kCodes] = {};
  for (long k = 0; k < pairs; k += pairs < 256 ? 1 : 8)
    for (int l = 0; l < 2 * kPanel; ++l) {
      uint16_t bits;
      std::memcpy(&bits, (const uint16_t *)(panel + k * kPanel) + l, sizeof bits);
      ++count[kCodes + (bits >> 7 & 255)];
    }
  count[kCodes] = 0;  // zero has a code of its own
  long most = 0, here = 0;
  int top = 0;
  for (int e = 0; e < 256; ++e) {
    here += count[kCodes + e] - count[e];
    if (here > most) most = here, top = e;
  }
  return (uint16_t)top;
}

inline bool any(VecW lanes) {
  uint64_t parts[sizeof lanes / 8], all = 0;
  std::memcpy(parts, &lanes, sizeof lanes);
  for (uint64_t part : parts) all |= part;
  return all;
}

// Codes one panel; false where more than `most` weights have exponents without a code.
bool code_panel(const Pair *panel, long pairs, uint8_t *to, uint16_t &top, Escape *escapes, long most) {
  long count = 0;
  top = likely_top(panel, pairs);
  for (long k = 0; k < pairs; k += kGroup) {
    Escape *const here = escapes + count;
    for (int v = 0; v < kVectors; ++v, to += 192) {
      VecW bytes[2] = {}, codes{};
      for (int i = 0; i < kGroup && k + i < pairs; ++i) {
        const Pair *from = panel + (k + i) * kPanel + v * kLanes;
        const VecW w = load_wide(from), exponent = w >> 7 & 255, code = top - exponent;
        const VecW zero = (VecW)(exponent == 0), coded = (VecW)(code < kCodes), neither = ~(zero | coded);
        bytes[i / 2] |= ((w & 0x7f) | (w >> 8 & 0x80)) << (i % 2 * 8);
        codes |= ((zero & kCodes) | (~zero & coded & code)) << (4 * i);
        if (!any(neither)) continue;
        for (int lane = 0; lane < 2 * kLanes; ++lane)
          if (neither[lane]) {
            if (count == most) return false;
            escapes[count++] = {(uint32_t)(((k + i) * kPanel + v * kLanes) * 2 + lane), w[lane]};
          }
      }
      std::memcpy(to, bytes, sizeof bytes), std::memcpy(to + sizeof bytes, &codes, sizeof codes);
    }
    std::sort(here, escapes + count, [](const Escape &a, const Escape &b) { return a.at < b.at; });  // as the product meets them
  }
  escapes[count] = {~0u, 0};
  return true;
}

}  // namespace
}  // namespace waypost

using namespace waypost;

extern "C" {

// Whether the processor undoes the codes faster than its memory brings them.
int EXPORT(compact_pays)() {
#if defined(__AVX512BW__) && defined(__AVX512BF16__)
  return 1;
#else
  return 0;
#endif
}

// panels (count, pairs, 48, 2) of linear.cpp -> codes (count, groups of four pairs, 576) bytes, aligned to 64; tops (count,);
// escapes (count, most + 1). Returns how many panels have more than `most` weights without a code: with any, all of it is void.
long EXPORT(pack_compact)(const Pair *panels, long count, long pairs, uint8_t *codes, uint16_t *tops, Escape *escapes, long most,
                          int threads) {
  const long bytes = (pairs + kGroup - 1) / kGroup * kGroupBytes;
  long failed = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : failed)
  for (long p = 0; p < count; ++p)
    failed += !code_panel(panels + p * pairs * kPanel, pairs, codes + p * bytes, tops[p], escapes + p * (most + 1), most);
  return failed;
}

// This thread's share of x (rows, 2 * pairs) -> out (rows, outputs), rows <= kFewRows, inside a parallel region; the threads meet at
// the end.
void EXPORT(share_compact)(Turn &turn, const Compact *weight, const bf16 *x, long rows, bf16 *out, const Compact *then) {
  const Compact &w = *weight;
  fetch_rows(x, rows * w.pairs * 2);
  share_panels(turn, rows, w.outputs, [&](long panel, int here, long, long, long stop) {
    const Compact &after = panel + 1 == stop && then ? *then : w;
    const long next = &after == &w ? panel + 1 : Share(rows, after.outputs).begin;
    __builtin_prefetch(after.tops + next), __builtin_prefetch(after.escapes + next * (after.most + 1));
    const Reading reading{w.codes + (panel + 1) * bytes_of(w), after.codes + next * bytes_of(after)};
    for (long t = 0; t < rows; t += kTileRows)  // once, where a tile takes eight
      with_rows(std::min<long>(kTileRows, rows - t), [&](auto these) {
        few_rows<decltype(these)::count>(x + t * 2 * w.pairs, w.pairs, w.codes + panel * bytes_of(w), w.tops[panel],
                                         w.escapes + panel * (w.most + 1), out + t * w.outputs + panel * kPanel, w.outputs, here,
                                         reading);
      });
  });
}

// The same in a region of its own.
void EXPORT(linear_compact)(const Compact *weight, const bf16 *x, long rows, bf16 *out, int threads) {
  Turns turns(threads);
#pragma omp parallel num_threads(threads) if (weight->outputs > kPanel)
  {
    Turn turn(turns);
    EXPORT(share_compact)(turn, weight, x, rows, out, nullptr);
  }
}
}
