// A token from each row of logits: temperature, top-k, top-p, min-p, and the inverse of the cumulative distribution.
//
// Nothing is sorted. What a truncation keeps is all from some probability on; which one is found by halving the interval of its
// bits, among the few tokens that may be it. A block of tokens knows its mass and its largest, so most are passed over. Sums are
// in float64 and in the order of the vocabulary, each row by one thread.

#include <algorithm>
#include <vector>

#include "../common.h"

namespace waypost {
namespace {

constexpr long kBlock = 256;

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

  double mass() const {
    double total = 0;
    for (const Block &block : blocks_) total += block.mass;
    return total;
  }

  // The mass of a block without what is below `cut`.
  double mass(const float *p, float cut) const {
    Vec<double> sum{};
    for (long k = 0; k < kBlock; k += kLanes) {
      const Vec<float> v = load(p + k);
      sum += __builtin_convertvector(v >= cut ? v : splat(0.0f), Vec<double>);
    }
    return sum_lanes<double>(sum);
  }

  // Into the pool what is at least `least`.
  void gather(float least) {
    pool_.clear();
    for (size_t b = 0; b < blocks_.size(); ++b)
      if (blocks_[b].largest >= least)
        for (long k = b * kBlock; k < (long)(b + 1) * kBlock; k += kLanes)
          for (uint32_t left = mask_of(load(p_.data() + k) >= splat(least)); left; left &= left - 1)
            pool_.push_back(p_[k + __builtin_ctz(left)]);
  }

  // The largest v so that what weighs `weigh` each, of all in the pool from v on, is `wanted` in sum. Uses the pool up.
  template <class F> float last_kept(double wanted, F weigh) {
    uint32_t low = ~0u, high = 0;  // of numbers that are not negative the bits have their order
    for (float p : pool_) low = std::min(low, bits_of(p)), high = std::max(high, bits_of(p));
    for (double above = 0; low < high;) {
      const uint32_t middle = high - (high - low) / 2;
      double upper = above;
      for (float p : pool_) upper += bits_of(p) >= middle ? weigh(p) : 0.0;
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

  float last_of(double k) {  // the k-th largest
    float least = 0;
    if (k <= (double)blocks_.size()) {  // that many blocks have one at least as large as this
      for (const Block &block : blocks_) pool_.push_back(block.largest);
      std::nth_element(pool_.begin(), pool_.begin() + ((long)k - 1), pool_.end(), std::greater<float>());
      least = pool_[(long)k - 1];
    }
    gather(least);
    return last_kept(k, [](float) { return 1.0; });
  }

 public:
  template <class T> void weigh(const T *x, long width, double temperature) {
    const long count = (width + kBlock - 1) / kBlock;
    width_ = width, cut_ = 0;
    p_.resize(count * kBlock), blocks_.resize(count), pool_.clear();
    const Vec<Wide<T>> peak = splat(peak_of(x, width));
    const Vec<float> inverse = splat((float)(1 / temperature));
    for (long b = 0; b < count; ++b) {
      Vec<double> sum{};
      Vec<float> largest{};
      for (long i = 0; i < kBlock; i += kLanes) {
        const long k = b * kBlock + i;
        Vec<float> p{};
        if (k < width) {
          p = exp_lanes(__builtin_convertvector(load_some(x + k, (int)std::min<long>(kLanes, width - k)) - peak, Vec<float>) * inverse);
          for (long past = width - k; past < kLanes; ++past) p[past] = 0;
        }
        store(p_.data() + k, p);
        sum += __builtin_convertvector(p, Vec<double>);
        largest = p > largest ? p : largest;
      }
      blocks_[b] = {sum_lanes<double>(sum), max_lanes<float>(largest)};
    }
  }

  void truncate(const Wish &wish) {
    float cut = 0;
    if (wish.top_k > 0 && wish.top_k < (double)width_) cut = last_of(wish.top_k);
    if (wish.top_p < 1) {
      const auto itself = [](float p) { return (double)p; };
      double total = mass();
      // What is rarer than the average of all that top-p removes cannot end the nucleus.
      float least = (float)((1 - wish.top_p) * total / (double)width_ * 0.999);
      if (cut > 0) {
        gather(cut), least = cut, total = 0;
        for (float p : pool_) total += p;
      } else {
        gather(least);
      }
      cut = std::max(cut, last_kept(wish.top_p * total, itself));
    }
    cut_ = std::max(cut, (float)wish.min_p);
    if (cut_ > 0)
      for (size_t b = 0; b < blocks_.size(); ++b)
        blocks_[b].mass = blocks_[b].largest >= cut_ ? mass(p_.data() + b * kBlock, cut_) : 0;
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
