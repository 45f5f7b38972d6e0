// x W^T for weights in 8 or 4 bits with one scale for every group of inputs, widened in registers.
//
// A weight becomes bfloat16(float32(q) * float32(scale)), so the bits are those of the dense product (linear.cpp) over the
// weights that a reader of the folder would compute.
//
// Layout: a panel of 48 outputs is three vectors of 16, each two halves of 8. A block of 64 bytes holds, for one half, 32 / Bits
// pairs of inputs: its 32-bit lane l holds input l % 2 of each pair for output l / 2, the first pair in the lowest bits. Two
// halves widened and rounded are then, without a shuffle, the pairs that the dot product of bfloat16 takes.

#include <vector>

#include "panels.h"

namespace waypost {
namespace {

constexpr int kHalves = 2 * kVectors;  // of a panel
constexpr long kAhead = 4096;  // bytes of a panel that are asked for before they are widened

template <int Bits> struct Code {
  static constexpr int pairs = 32 / Bits;  // in a block
  static constexpr long bytes = 64L * kHalves;  // of one block of all halves
  static long blocks(long group_pairs) { return (group_pairs + pairs - 1) / pairs; }
};

// The numbers of pair s of a block, each plus 2^Bits: the code becomes the top of a mantissa.
template <int Bits> inline Vec<float> numbers(VecU block, int s) {
  constexpr uint32_t mask = ((1u << Bits) - 1) << (23 - Bits), base = (127u + Bits) << 23;
  const int left = 23 - Bits - Bits * s;
  const VecU at = left >= 0 ? block << (left & 31) : block >> (-left & 31);
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_ternarylogic_epi32((__m512i)at, _mm512_set1_epi32(mask), _mm512_set1_epi32(base), 0xea);
#else
  return (Vec<float>)((at & mask) | base);
#endif
}

// Sixteen outputs of one pair of inputs in bfloat16, from the two halves of a vector, rounded to nearest even.
inline VecU rounded_pairs(Vec<float> low, Vec<float> high) {
#if defined(__AVX512BF16__)
  return (VecU)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
#else
  VecU out;
  const VecU halves[2] = {(VecU)low, (VecU)high};
  for (int j = 0; j < kLanes; ++j) {
    const uint32_t even = halves[j / 8][2 * j % kLanes], odd = halves[j / 8][2 * j % kLanes + 1];
    out[j] = ((even + 0x7fffu + ((even >> 16) & 1u)) >> 16) | ((odd + 0x7fffu + ((odd >> 16) & 1u)) & 0xffff0000u);
  }
  return out;
#endif
}

inline void spread(Vec<float> v, Vec<float> &low, Vec<float> &high) {  // every lane twice
#if defined(__AVX512F__)
  low = (Vec<float>)_mm512_permutexvar_ps(_mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0), (__m512)v);
  high = (Vec<float>)_mm512_permutexvar_ps(
      _mm512_set_epi32(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8), (__m512)v);
#else
  for (int j = 0; j < kLanes; ++j) low[j] = v[j / 2], high[j] = v[8 + j / 2];
#endif
}

// Calls f(k, w) for the pairs k of a panel in ascending order, w their weights for 48 outputs. blocks: groups x blocks of one
// group x halves x 64 bytes; scales (groups, 48).
template <int Bits, class F>
inline void for_pairs(const uint8_t *blocks, const bf16 *scales, long pairs, long group_pairs, F f) {
  constexpr int many = Code<Bits>::pairs;
  for (long at = 0; at < pairs; at += group_pairs, scales += kPanel) {
    Vec<float> scale[kHalves], shift[kHalves];
    for (int v = 0; v < kVectors; ++v) spread(load(scales + kLanes * v), scale[2 * v], scale[2 * v + 1]);
    for (int h = 0; h < kHalves; ++h) shift[h] = scale[h] * -(float)((1 << Bits) + (1 << (Bits - 1)));
    const auto pair = [&](const VecU(&block)[kHalves], long k, int s) {
      VecU w[kVectors];
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v)
        w[v] = rounded_pairs(fma<float>(numbers<Bits>(block[2 * v], s), scale[2 * v], shift[2 * v]),
                             fma<float>(numbers<Bits>(block[2 * v + 1], s), scale[2 * v + 1], shift[2 * v + 1]));
      f(k, w);
    };
    for (long k = at; k < at + group_pairs; k += many, blocks += Code<Bits>::bytes) {
      for (long line = 0; line < Code<Bits>::bytes; line += 64) __builtin_prefetch(blocks + kAhead + line, 0, 0);
      VecU block[kHalves];
      std::memcpy(block, blocks, sizeof block);
      if (k + many <= at + group_pairs) {
#pragma GCC unroll 8
        for (int s = 0; s < many; ++s) pair(block, k + s, s);
      } else {
        for (int s = 0; s < at + group_pairs - k; ++s) pair(block, k + s, s);
      }
    }
  }
}

template <int Bits>
void share(Turn &turn, const bf16 *x, long rows, long pairs, const uint8_t *panels, const bf16 *scales, long group_pairs, long outputs,
           bf16 *out) {
  const long groups = pairs / group_pairs, panel_bytes = groups * Code<Bits>::blocks(group_pairs) * Code<Bits>::bytes;
  share_panels(turn, rows, outputs, [&](long panel, int here, long first, long last, long) {
    const uint8_t *blocks = panels + panel * panel_bytes;
    const bf16 *own = scales + panel * groups * kPanel, *from = x + first * pairs * 2;
    bf16 *to = out + first * outputs + panel * kPanel;
    if (last - first <= kTileRows) {
      with_rows(last - first, [&](auto count) {
        constexpr int R = decltype(count)::count;
        Vec<float> acc[R][kVectors];
        clear(acc);
        for_pairs<Bits>(blocks, own, pairs, group_pairs,
                        [&](long k, const VecU(&w)[kVectors]) { add_pairs(acc, from + 2 * k, 2 * pairs, w); });
        store_tile<R>(to, outputs, acc, here);
      });
      return;
    }
    thread_local std::vector<Pair> dense;  // widened once for all rows; stays in the cache
    dense.resize(pairs * kPanel);
    for_pairs<Bits>(blocks, own, pairs, group_pairs, [&](long k, const VecU(&w)[kVectors]) {
      for (int v = 0; v < kVectors; ++v) std::memcpy(dense.data() + k * kPanel + kLanes * v, &w[v], sizeof w[v]);
    });
    tiles(from, last - first, pairs, dense.data(), to, outputs, here);
  });
}

// One panel of outputs first .. first + 48 of a weight (outputs, words) as the folder holds it.
template <int Bits>
void pack_panel(const uint32_t *weight, long outputs, long words, long pairs, long group_pairs, long first, uint32_t *to) {
  constexpr int many = Code<Bits>::pairs;
  constexpr uint32_t mask = (1u << Bits) - 1;
  for (long at = 0; at < pairs; at += group_pairs)
    for (long k = at; k < at + group_pairs; k += many)
      for (int h = 0; h < kHalves; ++h)
        for (int l = 0; l < kLanes; ++l, ++to) {
          const long row = first + 8 * h + l / 2;
          *to = 0;
          if (row >= outputs) continue;
          for (int s = 0; s < many && k + s < at + group_pairs; ++s) {
            const long input = 2 * (k + s) + l % 2;
            *to |= ((weight[row * words + input / many] >> (input % many * Bits)) & mask) << (Bits * s);
          }
        }
}

template <int Bits>
void pack(const uint32_t *weight, long outputs, long words, long pairs, long group_pairs, uint32_t *panels, int threads) {
  const long count = (outputs + kPanel - 1) / kPanel;
  const long lanes = pairs / group_pairs * Code<Bits>::blocks(group_pairs) * Code<Bits>::bytes / 4;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long p = 0; p < count; ++p) pack_panel<Bits>(weight, outputs, words, pairs, group_pairs, p * kPanel, panels + p * lanes);
}

}  // namespace
}  // namespace waypost

using namespace waypost;

extern "C" {

// This thread's share of x (rows, 2 * pairs) -> out (rows, outputs), inside a parallel region; the threads meet at the end. panels
// (P, blocks) in the layout above; scales (P, pairs / group_pairs, 48), those past the last output zero.
void EXPORT(share_quantized)(Turn &turn, int bits, const bf16 *x, long rows, long pairs, const void *panels, const void *scales,
                             long group_pairs, long outputs, bf16 *out) {
  const auto call = bits == 4 ? share<4> : share<8>;
  call(turn, x, rows, pairs, (const uint8_t *)panels, (const bf16 *)scales, group_pairs, outputs, out);
}

// The same in a region of its own.
void EXPORT(linear_quantized)(int bits, const bf16 *x, long rows, long pairs, const void *panels, const void *scales, long group_pairs,
                              long outputs, bf16 *out, int threads) {
  Turns turns(threads);
#pragma omp parallel num_threads(threads) if (outputs > kPanel || rows > kBlockRows)
  {
    Turn turn(turns);
    EXPORT(share_quantized)(turn, bits, x, rows, pairs, panels, scales, group_pairs, outputs, out);
  }
}

// weight (outputs, words) in 32-bit words of 32 / bits inputs each, q + 2^(bits - 1), the first input in the lowest bits ->
// panels.
void EXPORT(pack_quantized)(int bits, const uint32_t *weight, long outputs, long words, long pairs, long group_pairs, uint32_t *panels,
                            int threads) {
  const auto call = bits == 4 ? pack<4> : pack<8>;
  call(weight, outputs, words, pairs, group_pairs, panels, threads);
}
}
