// A token from each row of logits: temperature, top-k, top-p, min-p, and the inverse of the cumulative distribution.
//
// Nothing is sorted. What a truncation keeps is all from some probability on; which one is found by halving the interval of its
// bits, among the few tokens that may be it: top-k's too, so that logits which a temperature brings closer than float32 tells
// apart stay together. A block of tokens knows its mass and its largest, so most are passed over. Sums are in float64 and in one
// fixed order, each row by one thread.

#include <algorithm>
#include <vector>

#include "../common.h"

namespace waypost {
namespace {

constexpr long kBlock = 256;
constexpr float kTiny = 0x1p-126f;  // a probability is zero, or larger than this: exp_lanes

// The columns of DrawOp's wishes.
struct Wish {
  double temperature, top_k, top_p, min_p, uniform;
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Lanes of float32 summed in float64, by halves: of a vector that is wider than any register the compiler makes memory.
class Sum {
  typedef float Floats __attribute__((vector_size(kLanes * 2)));
  typedef double Doubles __attribute__((vector_size(kLanes * 4)));
  Doubles halves_[2] = {};

 public:
  void add(Vec<float> x) {
    Floats half[2];
    std::memcpy(half, &x, sizeof half);
    for (int i = 0; i < 2; ++i) halves_[i] += __builtin_convertvector(half[i], Doubles);
  }
  double total() const {
    const Doubles both = halves_[0] + halves_[1];
    return ((both[0] + both[4]) + (both[2] + both[6])) + ((both[1] + both[5]) + (both[3] + both[7]));
  }
};

// What a truncation adds up: of one token, and of a block's from `least` on.
struct Mass {
  static double one(float p) { return p; }
  static double many(const float *p, float least) {
    Sum sum;
    for (long k = 0; k < kBlock; k += kLanes) {
      const Vec<float> v = load(p + k);
      sum.add(v >= least ? v : splat(0.0f));
    }
    return sum.total();
  }
};
struct Count {
  static double one(float) { return 1; }
  static double many(const float *p, float least) {
    long count = 0;
    for (long k = 0; k < kBlock; k += kLanes) count += __builtin_popcount(mask_of(load(p + k) >= splat(least)));
    return (double)count;
  }
};

// The probabilities of a row relative to the largest, which is 1.
class Row {
  struct Block {
    double mass;
    float largest;
  };
  std::vector<float> p_, pool_;  // p_: (blocks, kBlock), zeros past the end
  std::vector<Block> blocks_;
  long width_ = 0;
  float cut_ = 0;  // what is less likely is removed

  template <class T> ALONE void weigh_block(const T *x, Wide<T> peak, float inverse, long b) {
    Sum sum;
    Vec<float> largest{};
    for (long i = 0; i < kBlock; i += kLanes) {
      const Vec<float> p = exp_lanes(__builtin_convertvector(load(x + i) - splat(peak), Vec<float>) * splat(inverse));
      store(p_.data() + b * kBlock + i, p);
      sum.add(p);
      largest = p > largest ? p : largest;
    }
    blocks_[b] = {sum.total(), max_lanes<float>(largest)};
  }

  // f (number, first probability) of the blocks that have one of at least `least`.
  template <class F> void each_block(float least, F f) const {
    for (size_t b = 0; b < blocks_.size(); ++b)
      if (blocks_[b].largest >= least) f(b, p_.data() + b * kBlock);
  }

  double mass() const {
    double total = 0;
    for (const Block &block : blocks_) total += block.mass;
    return total;
  }

  template <class What> double sum(float least) const {
    double total = 0;
    each_block(least, [&](size_t, const float *p) { total += What::many(p, least); });
    return total;
  }

  // The largest v so that all from v on are `wanted` in sum; it is known to be no less than `least`.
  template <class What> float last_kept(double wanted, float least) {
    for (float v = 0x1p-4f; v > least; v *= 0x1p-5f)  // most tokens are rarer than it by far
      if (sum<What>(v) >= wanted) least = v;
    pool_.clear();
    each_block(least, [&](size_t, const float *p) {
      for (long k = 0; k < kBlock; k += kLanes)
        for (uint32_t left = mask_of(load(p + k) >= splat(least)); left; left &= left - 1)
          pool_.push_back(p[k + __builtin_ctz(left)]);
    });
    uint32_t low = ~0u, high = 0;  // of numbers that are not negative the bits have their order
    for (float p : pool_) low = std::min(low, bits_of(p)), high = std::max(high, bits_of(p));
    for (double above = 0; low < high;) {
      const uint32_t middle = high - (high - low) / 2;
      double upper = above;
      for (float p : pool_) upper += bits_of(p) >= middle ? What::one(p) : 0.0;
      const bool enough = upper >= wanted;
      if (enough) low = middle;
      else above = upper, high = middle - 1;
      size_t left = 0;
      for (float p : pool_) {
        pool_[left] = p;
        left += (bits_of(p) >= middle) == enough;
      }
      pool_.resize(left);
    }
    return low == ~0u ? 0.0f : float_of(low);
  }

 public:
  template <class T> void weigh(const T *x, long width, double temperature) {
    const long count = (width + kBlock - 1) / kBlock, whole = width / kBlock;
    width_ = width, cut_ = 0;
    p_.resize(count * kBlock), blocks_.resize(count);
    const Wide<T> peak = peak_of(x, width);
    const float inverse = std::max((float)(1 / temperature), kTiny);  // zero times what is forbidden would be no number
    for (long b = 0; b < whole; ++b) weigh_block(x + b * kBlock, peak, inverse, b);
    if (whole == count) return;
    Wide<T> rest[kBlock];
    for (long i = 0; i < kBlock; ++i)
      rest[i] = whole * kBlock + i < width ? widen(x[whole * kBlock + i]) : -std::numeric_limits<Wide<T>>::infinity();
    weigh_block(rest, peak, inverse, whole);
  }

  void truncate(const Wish &wish) {
    if (wish.top_k > 0 && wish.top_k < (double)width_) cut_ = last_kept<Count>(wish.top_k, kTiny);
    if (wish.top_p < 1) {
      const double total = cut_ > 0 ? sum<Mass>(cut_) : mass();
      // What is rarer than the average of all that top-p removes cannot end the nucleus.
      const float least = (float)((1 - wish.top_p) * total / (double)width_ * 0.999);
      cut_ = std::max(cut_, last_kept<Mass>(wish.top_p * total, std::max(cut_, least)));
    }
    cut_ = std::max(cut_, (float)wish.min_p);
    if (cut_ == 0) return;
    for (Block &block : blocks_) block.mass = 0;
    each_block(cut_, [&](size_t b, const float *p) { blocks_[b].mass = Mass::many(p, cut_); });
  }

  // The token at which the running sum first exceeds uniform times the total, the last with mass where rounding leaves none.
  int64_t draw(double uniform, double &share) const {
    const double total = mass(), target = uniform * total;
    double before = 0, running = 0;
    long at = 0;
    for (size_t b = 0; b < blocks_.size() && !(running > target); ++b)
      if (blocks_[b].mass > 0) before = running, running += blocks_[b].mass, at = (long)b * kBlock;
    int64_t token = at;
    running = before;
    for (long k = at; k < at + kBlock && !(running > target); ++k)
      if (p_[k] > 0 && p_[k] >= cut_) running += p_[k], token = k;
    share = p_[token] / total;
    return token;
  }
};

}  // namespace
}  // namespace waypost

using namespace waypost;

// Of each row logits[t] (width,), or where that is null edited[t], one token and its share of what is kept.
extern "C" void EXPORT(draw)(const Element *const *logits, const Wide<Element> *const *edited, const Wish *wishes, int64_t *tokens,
                             double *shares, long rows, long width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (rows > 1)
  for (long t = 0; t < rows; ++t) {
    static thread_local Row row;  // half a megabyte for most vocabularies, which the system would clear every time
    if (logits[t]) row.weigh(logits[t], width, wishes[t].temperature);
    else row.weigh(edited[t], width, wishes[t].temperature);
    row.truncate(wishes[t]);
    tokens[t] = row.draw(wishes[t].uniform, shares[t]);
  }
}
