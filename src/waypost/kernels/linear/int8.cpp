// x W^T where both are whole numbers of 8 bits, with a few columns of each row in full precision (LLM.int8()).
//
// Sums of whole numbers are exact in any order, so an output depends on its row of x and its row of W alone; the columns in full
// precision are added in ascending order, product by product, each rounded once. naive: kernels/linear/int8.py, with equal bits.
//
// Layout: a panel of 48 outputs is three vectors of 16 lanes; a lane holds four neighbouring inputs of one output, a byte each,
// the first in the lowest bits. Codes of x are stored plus 128, which is what the processor's dot product of bytes takes;
// `offsets` has 128 times the sum of each output's weights.

#include "bytes.h"
#include "panels.h"

namespace waypost {
namespace {

// bfloat16(q * scale) of one input of 16 outputs.
inline Vec<float> column(const uint8_t *quad, int byte, Vec<float> scale) {
  const VecI q = (VecI)(load_bytes(quad) << (24 - 8 * byte)) >> 24;
  bf16 rounded[kLanes];
  store(rounded, __builtin_convertvector(q, Vec<float>) * scale);
  return load(rounded);
}

struct Rows8 {
  const uint8_t *codes;  // (rows, 4 * quads)
  const float *scale;    // (rows)
  const int64_t *begins; // (rows + 1)
  const int32_t *columns;
  const float *values;
};

template <int R, class T>
void tile8(const Rows8 &x, long row, long quads, const uint8_t *panel, const int32_t *offsets, const float *scales, T *out,
           long stride, int here) {
  VecI acc[R][kVectors] = {};
  for (long k = 0; k < quads; ++k) {
    VecU w[kVectors];
    for (int v = 0; v < kVectors; ++v) w[v] = load_bytes(panel + 64 * (k * kVectors + v));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Pair quad;
      std::memcpy(&quad, x.codes + 4 * ((row + r) * quads + k), sizeof quad);
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) acc[r][v] = add_bytes(acc[r][v], splat(quad), w[v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kVectors && kLanes * v < here; ++v) {
      const Vec<float> scale = load(scales + kLanes * v);
      Vec<float> full{};
      for (int64_t i = x.begins[row + r]; i < x.begins[row + r + 1]; ++i) {
        const long at = x.columns[i];
        full += splat(x.values[i]) * column(panel + 64 * (at / 4 * kVectors + v), at % 4, scale);
      }
      const VecI sum = acc[r][v] - (VecI)load_bytes(offsets + kLanes * v);
      const Vec<float> narrow = __builtin_convertvector(sum, Vec<float>) * splat(x.scale[row + r]) * scale;
      store_some(out + (row + r) * stride + kLanes * v, narrow + full, here - kLanes * v);
    }
}

}  // namespace
}  // namespace waypost

using namespace waypost;

extern "C" {

// codes (rows, 4 * quads) plus 128, scale (rows); the columns of row t in full precision are columns[i], values[i] for i from
// begins[t] to begins[t + 1], ascending. panels (P, quads, 48, 4), offsets and scales (P, 48). out (rows, outputs).
void EXPORT(linear_int8)(const uint8_t *codes, const float *scale, const int64_t *begins, const int32_t *columns, const float *values,
                         long rows, long quads, const uint8_t *panels, const int32_t *offsets, const float *scales, long outputs,
                         Element *out, int threads) {
  const Rows8 x{codes, scale, begins, columns, values};
  Turns turns(threads);
#pragma omp parallel num_threads(threads) if (outputs > kPanel || rows > kBlockRows)
  {
    Turn turn(turns);
    share_panels(turn, rows, outputs, [&](long panel, int here, long first, long last, long) {
      for (long row = first; row < last; row += kTileRows)
        with_rows(std::min<long>(kTileRows, last - row), [&](auto count) {
          tile8<decltype(count)::count>(x, row, quads, panels + panel * quads * 4 * kPanel, offsets + panel * kPanel,
                                        scales + panel * kPanel, out + panel * kPanel, outputs, here);
        });
    });
  }
}
}
