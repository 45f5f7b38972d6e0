// The largest logit of each row and the first place that has it, without computing most logits; the bits of those of linear.cpp.
//
// A product of whole numbers of 8 bits costs half of one in bfloat16, and says where every logit lies: with x = s n + e and
// w = r q + d, whole numbers n and q, |w.x - s r (q.n)| <= |d| |x| + |r q| |e| (Cauchy and Schwarz). Outputs whose upper bound is
// below another's lower bound are out, and the few that are left are computed as linear.cpp does, in the same order of addition.
//
// Layout: a panel of 48 outputs is three vectors of 16 lanes; a lane holds four neighbouring inputs of one output, a byte each, the
// first in the lowest bits, plus 128. The numbers n of a row are l + 256 h in bytes l and h with signs; few rows have an h that is
// not zero at more than a handful of inputs, and only there it is multiplied.

#include <algorithm>
#include <atomic>
#include <vector>

#include "../linear/bytes.h"
#include "../linear/panels.h"
#include "../linear/transpose.h"

namespace waypost {
namespace {

// The structure of kernels/greedy/cpu.py.
struct Screen {
  const uint8_t *panels;               // (P, quads, 48, 4)
  const float *scales, *lost, *sizes;  // (P, 48): r, at least |d| and what float32 rounds, at least |r q|; lost is infinite past the end
  const float *most_lost, *most_size;  // (P,): the largest of each panel
  const Pair *weight;                  // (outputs, pairs)
  long outputs, pairs;

  long quads() const { return (pairs + 1) / 2; }
};

constexpr float kSlack = 1.002f;            // over norms that were added up in float32
constexpr float kRounding = 0x1p-22f;       // an input's part in what float32 loses on the way, with room
constexpr float kTie = 0x1.02p-7f;          // logits that far apart, relatively, differ in bfloat16
constexpr float kNear = 4.0f / 127.0f;      // s of a row whose root mean square is 1: h is zero up to four times that
// Of a row: with more of them all logits are as cheap. Whether it comes to that may depend on threads and their timing, for they
// raise a row's floor together; what is found never does.
constexpr size_t kMostCandidates = 1 << 11;
constexpr long kAhead = 4096;  // bytes of a panel that are asked for before one tile uses them
constexpr float kInfinite = std::numeric_limits<float>::infinity();

typedef int8_t Bytes __attribute__((vector_size(kLanes)));

// f (place, vector) of every vector of a row, the last one filled with zeros.
template <class F> inline void each_vector(const bf16 *x, long inputs, F f) {
  for (long k = 0; k < inputs; k += kLanes) f(k, load_some(x + k, (int)std::min<long>(kLanes, inputs - k)));
}

// A row in whole numbers, padded with zeros to whole vectors; not bounded where nothing can be said of its logits.
struct Row {
  std::vector<int8_t> low;
  std::vector<std::pair<long, Pair>> high;  // quads that have one
  float scale, size, lost;
  int32_t offset;  // what the 128 of the weights add
  bool bounded;

  void code(const bf16 *x, long inputs) {
    low.resize((inputs + kLanes - 1) / kLanes * kLanes);
    Vec<float> squares{}, errors{};
    each_vector(x, inputs, [&](long, Vec<float> v) { squares = fma<float>(v, v, squares); });
    const float sum = sum_lanes<float>(squares);
    bounded = sum < 1e30f && (sum > 1e-20f || sum == 0);
    scale = bounded && sum > 0 ? kNear * std::sqrt(sum / (float)inputs) : 1.0f;
    if (!bounded) return;
    const Vec<float> magic = splat(12582912.0f), inverse = splat(1.0f / scale);  // 1.5 * 2^23: the sum rounds to a whole number
    VecI total{};
    each_vector(x, inputs, [&](long k, Vec<float> v) {
      const Vec<float> n = fma<float>(v, inverse, magic) - magic, e = fma<float>(-n, splat(scale), v);
      errors = fma<float>(e, e, errors);
      const VecI whole = __builtin_convertvector(n, VecI), l = whole << 24 >> 24, h = (whole - l) >> 8;
      total += whole;
      const Bytes bytes = __builtin_convertvector(l, Bytes);
      std::memcpy(low.data() + k, &bytes, sizeof bytes);
      if (mask_of(h != 0)) {
        const Bytes more = __builtin_convertvector(h, Bytes);
        Pair quads[kLanes / 4];
        std::memcpy(quads, &more, sizeof quads);
        for (int i = 0; i < kLanes / 4; ++i)
          if (quads[i]) high.push_back({k / 4 + i, quads[i]});
      }
    });
    offset = 128 * fold_lanes<int32_t>(total, [](VecI a, VecI b) { return a + b; });
    size = kSlack * std::sqrt(sum) + 1e-30f, lost = kSlack * std::sqrt(sum_lanes<float>(errors));
  }
};

inline Vec<float> larger(Vec<float> a, Vec<float> b) { return a > b ? a : b; }

struct Candidate {
  int32_t place;
  float most;
};

// Outputs that may be a row's largest, of those that one thread has seen.
struct Found : std::vector<Candidate> {
  void drop(float below) {
    erase(std::remove_if(begin(), end(), [&](const Candidate &c) { return c.most < below; }), end());
  }
};

// What a row's largest logit is not below, as far as all threads know; infinite: too many outputs come into question.
class Floor {
  std::atomic<float> value_{-kInfinite};

 public:
  float value() const { return value_.load(std::memory_order_relaxed); }
  void raise(float to) {
    float known = value();
    while (to > known && !value_.compare_exchange_weak(known, to, std::memory_order_relaxed)) {}
  }
};
// An upper bound below this is no tie after rounding to bfloat16 either.
inline float threshold(float least) { return least - std::fabs(least) * kTie - 1e-30f; }

// Takes in what may be a row's largest logit of a panel's, which are near `near`.
ALONE void keep(const Screen &s, const Row &row, const Vec<float> (&near)[kVectors], long panel, Floor &floor, Found &found) {
  Vec<float> most[kVectors], least = splat(-kInfinite);
  for (int v = 0; v < kVectors; ++v) {
    const long at = panel * kPanel + kLanes * v;
    const Vec<float> apart = fma<float>(splat(row.size), load(s.lost + at), splat(row.lost) * load(s.sizes + at));
    most[v] = near[v] + apart, least = larger(near[v] - apart, least);
  }
  floor.raise(max_lanes<float>(least));
  const float below = threshold(floor.value());
  for (int v = 0; v < kVectors; ++v)
    for (uint32_t left = mask_of(most[v] >= splat(below)); left; left &= left - 1) {
      const int lane = __builtin_ctz(left);
      const long place = panel * kPanel + kLanes * v + lane;
      if (place < s.outputs) found.push_back({(int32_t)place, most[v][lane]});
    }
  if (found.size() > 2 * kMostCandidates) found.drop(below);
  if (found.size() > 2 * kMostCandidates) floor.raise(kInfinite), found.clear();
}

// R rows times one panel. `next` is the panel after it, of which `burst` bytes are asked for with every kBurst quads; of the panel
// itself, where no other tile has read it, `stream` bytes of every quad (panels.h).
template <int R>
void tile(const Screen &s, const Row *rows, long panel, Floor *floors, Found *found, const char *next, long burst, long stream) {
  const long quads = s.quads();
  const uint8_t *const weights = s.panels + panel * quads * 4 * kPanel, *w = weights;
  VecI acc[R][kVectors] = {};
  const int8_t *x[R];
  for (int r = 0; r < R; ++r) x[r] = rows[r].low.data();
  for (long k = 0; k < quads;) {
    for (const char *end = next + burst; next < end; next += 64) __builtin_prefetch(next, 0, 2);
    for (const long stop = std::min(k + kBurst, quads); k < stop; ++k, w += 4 * kPanel) {
      for (long line = 0; line < stream; line += 64) __builtin_prefetch(w + kAhead + line, 0, 0);
      VecU lanes[kVectors];
      for (int v = 0; v < kVectors; ++v) lanes[v] = load_bytes(w + 64 * v);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        Pair quad;
        std::memcpy(&quad, x[r] + 4 * k, sizeof quad);
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) acc[r][v] = add_bytes(acc[r][v], lanes[v], splat(quad));
      }
    }
  }
  Vec<float> scales[kVectors];
  for (int v = 0; v < kVectors; ++v) scales[v] = load(s.scales + panel * kPanel + kLanes * v);
  for (int r = 0; r < R; ++r) {
    const Row &row = rows[r];
    if (!row.bounded) continue;
    VecI high[kVectors] = {};
    for (const auto &[k, quad] : row.high)
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) high[v] = add_bytes(high[v], load_bytes(weights + 64 * (k * kVectors + v)), splat(quad));
    Vec<float> near[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      const VecI whole = acc[r][v] + (high[v] << 8) - row.offset;
      near[v] = __builtin_convertvector(whole, Vec<float>) * (scales[v] * splat(row.scale));
    }
    const float reach = row.size * s.most_lost[panel] + row.lost * s.most_size[panel];  // no output of the panel is farther
    const float below = threshold(floors[r].value()) - reach * kSlack;
    if (mask_of(larger(larger(near[0], near[1]), near[2]) >= splat(below))) keep(s, row, near, panel, floors[r], found[r]);
  }
}

// Calls f with as many of `rows` as a tile takes, as a type: powers of two, each of which is a loop to compile.
template <class F> inline void with_some(long rows, F f) {
  if (rows >= kTileRows) f(Rows<kTileRows>());
  else if (kTileRows > 4 && rows >= 4) f(Rows<4>());
  else if (rows >= 2) f(Rows<2>());
  else f(Rows<1>());
}

// The largest logit of one row among the candidates of all threads. place is -1 where that is not known.
void decide(const Screen &s, const bf16 *x, const Row &row, float floor, const std::vector<Found *> &found, float &peak, int64_t &place) {
  place = -1, peak = -kInfinite;
  if (!row.bounded || floor == kInfinite) return;
  std::vector<int32_t> places;
  for (Found *each : found) {
    each->drop(threshold(floor));
    for (const Candidate &c : *each) places.push_back(c.place);
  }
  if (places.size() > kMostCandidates) return;
  std::sort(places.begin(), places.end());  // threads took panels as they came
  for (int32_t at : places)  // all at once: the memory is slow to begin
    for (long k = 0; k < s.pairs; k += kLanes) __builtin_prefetch(s.weight + at * s.pairs + k, 0, 3);
  for (size_t first = 0; first < places.size(); first += kLanes) {
    const int here = (int)std::min<size_t>(kLanes, places.size() - first);
    const Pair *weights[kLanes];
    for (int n = 0; n < kLanes; ++n) weights[n] = s.weight + places[first + std::min(n, here - 1)] * s.pairs;
    Vec<float> acc{};
    const auto add = [&](long k, VecU w) {
      Pair pair;
      std::memcpy(&pair, x + 2 * k, sizeof pair);
      acc = add_product(splat(pair), w, acc);
    };
    long k = 0;
    for (; k + kLanes <= s.pairs; k += kLanes) {
      VecU w[kLanes];
      for (int n = 0; n < kLanes; ++n) w[n] = load(weights[n] + k);
      transpose(w);
      for (int i = 0; i < kLanes; ++i) add(k + i, w[i]);
    }
    for (; k < s.pairs; ++k) {
      VecU w;
      for (int n = 0; n < kLanes; ++n) w[n] = weights[n][k];
      add(k, w);
    }
    bf16 rounded[kLanes];
    store(rounded, acc);
    for (int n = 0; n < here; ++n) {
      const float logit = widen(rounded[n]);
      if (!std::isfinite(logit)) {
        place = -1;
        return;
      }
      if (logit > peak) peak = logit, place = places[first + n];  // the first of equals stays
    }
  }
}

}  // namespace
}  // namespace waypost

using namespace waypost;

extern "C" {

// Whether the processor multiplies bytes faster than pairs of bfloat16.
int EXPORT(greedy_pays)() {
#if defined(__AVX512VNNI__)
  return 1;
#else
  return 0;
#endif
}

// weight (outputs, 2 * pairs) -> what Screen has of it.
void EXPORT(pack_screen)(const bf16 *weight, long outputs, long pairs, uint8_t *panels, float *scales, float *lost, float *sizes,
                         float *most_lost, float *most_size, int threads) {
  const long inputs = 2 * pairs, quads = (pairs + 1) / 2, count = (outputs + kPanel - 1) / kPanel;
  const auto code = [&](long i) {
    uint8_t *const to = panels + i / kPanel * quads * 4 * kPanel + i % kPanel * 4;
    scales[i] = sizes[i] = 0, lost[i] = kInfinite;
    const bf16 *const row = weight + i * inputs;
    Vec<float> largest{}, squares{}, errors{};
    if (i < outputs)
      each_vector(row, inputs, [&](long, Vec<float> v) {
        const Vec<float> size = v < 0 ? -v : v;
        largest = size > largest ? size : largest, squares = fma<float>(v, v, squares);
      });
    const float top = max_lanes<float>(largest), sum = sum_lanes<float>(squares);
    const bool bounded = i < outputs && sum < 1e30f && (top > 1e-15f || top == 0);  // else `lost` stays infinite: always a candidate
    const float scale = bounded && top > 0 ? top / 127.0f : 1.0f;
    const Vec<float> magic = splat(12582912.0f), inverse = splat(1.0f / scale);
    const auto put = [&](long k, uint32_t quad) { std::memcpy(to + k * 4 * kPanel, &quad, sizeof quad); };
    if (!bounded) {
      for (long k = 0; k < quads; ++k) put(k, 0x80808080u);
      return;
    }
    each_vector(row, inputs, [&](long k, Vec<float> v) {
      const Vec<float> q = fma<float>(v, inverse, magic) - magic, d = fma<float>(-q, splat(scale), v);
      errors = fma<float>(d, d, errors);
      const Bytes bytes = __builtin_convertvector(__builtin_convertvector(q, VecI) ^ 128, Bytes);
      uint32_t four[kLanes / 4];
      std::memcpy(four, &bytes, sizeof four);
      for (int j = 0; j < kLanes / 4 && k / 4 + j < quads; ++j) put(k / 4 + j, four[j]);
    });
    const float size = kSlack * std::sqrt(sum), off = kSlack * std::sqrt(sum_lanes<float>(errors));
    scales[i] = scale, sizes[i] = size + off, lost[i] = off + (float)inputs * kRounding * (size + off);
  };
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long p = 0; p < count; ++p) {
    for (long i = p * kPanel; i < (p + 1) * kPanel; ++i) code(i);
    most_lost[p] = *std::max_element(lost + p * kPanel, lost + (p + 1) * kPanel);
    most_size[p] = *std::max_element(sizes + p * kPanel, sizes + (p + 1) * kPanel);
  }
}

// x (rows, 2 * pairs) -> the largest logit of each row and the first place that has it; the place is -1 where too many outputs may
// be it, or one that may be it is not finite. Returns for how many rows that is so.
long EXPORT(greedy)(const bf16 *x, long rows, const Screen *screen, float *peaks, int64_t *places, int threads) {
  const Screen &s = *screen;
  std::vector<Row> coded(rows);
  std::vector<Found> found(threads * rows);
  std::vector<Floor> floors(rows);
  Turns turns(threads);
#pragma omp parallel num_threads(threads)
  {
    Turn turn(turns);
    turn.divide(rows, [&](long t) { coded[t].code(x + t * 2 * s.pairs, 2 * s.pairs); });
    turn.meet();
    Found *const mine = found.data() + turn.me() * rows;
    const long bytes = s.quads() * 4 * kPanel, share = std::min<long>(rows / kTileRows, 4);
    share_panels(turn, 1, s.outputs, [&](long panel, int, long, long, long stop) {
      const char *const next = (const char *)s.panels + (panel + 1) * bytes;
      for (long t = 0, i = 0; t < rows; ++i) {
        const bool asks = i < share && rows > kTileRows && panel + 1 < stop;  // of a panel that one tile uses nothing is worth asking for
        with_some(rows - t, [&](auto here) {
          constexpr int R = decltype(here)::count;
          tile<R>(s, coded.data() + t, panel, floors.data() + t, mine + t, next + i * (asks ? bytes / share : 0),
                  asks ? kBurst * 4 * kPanel / share : 0, rows <= kTileRows ? 4 * kPanel : 0);
          t += R;
        });
      }
    });
    turn.in_order(rows, [&](long t) {
      std::vector<Found *> all;
      for (long i = 0; i < turn.threads(); ++i) all.push_back(&found[i * rows + t]);
      decide(s, x + t * 2 * s.pairs, coded[t], floors[t].value(), all, peaks[t], places[t]);
    });
  }
  return std::count(places, places + rows, -1);
}
}
