// The largest of each row of logits, and the first place that has it. A NaN counts as larger than everything.

#include "../common.h"

namespace waypost {
namespace {

constexpr int kMany = 4;  // vectors at once: one comparison does not wait for another
constexpr int kAtOnce = kMany * kLanes;

// Whether any lane is set, of lanes that are all ones or all zeros.
template <class Lanes> inline bool any(Lanes lanes) {
  uint64_t parts[sizeof lanes / 8], found = 0;
  std::memcpy(parts, &lanes, sizeof lanes);
  for (uint64_t part : parts) found |= part;
  return found != 0;
}

template <class T> void largest(const T *row, long width, Wide<T> &peak, int64_t &place) {
  typedef Wide<T> A;
  const long whole = width / kAtOnce * kAtOnce;
  Vec<A> top[kMany];
  for (Vec<A> &each : top) each = splat(-std::numeric_limits<A>::infinity());
  auto nan = top[0] != top[0];
  for (long k = 0; k < whole; k += kAtOnce)
#pragma GCC unroll 4
    for (int i = 0; i < kMany; ++i) {
      const Vec<A> x = load(row + k + i * kLanes);
      top[i] = x > top[i] ? x : top[i];
      nan |= x != x;
    }
  for (int i = 1; i < kMany; ++i) top[0] = top[i] > top[0] ? top[i] : top[0];
  peak = max_lanes<A>(top[0]);
  bool missing = any(nan);
  for (long k = whole; k < width; ++k) {
    const A x = widen(row[k]);
    peak = x > peak ? x : peak;
    missing |= x != x;
  }
  for (place = 0; place < whole; place += kAtOnce) {
    auto found = top[0] != top[0];
#pragma GCC unroll 4
    for (int i = 0; i < kMany; ++i) {
      const Vec<A> x = load(row + place + i * kLanes);
      found |= missing ? x != x : x == splat(peak);
    }
    if (any(found)) break;
  }
  const auto here = [&](A x) { return missing ? x != x : x == peak; };
  while (!here(widen(row[place]))) ++place;
  peak = widen(row[place]);
}

}  // namespace
}  // namespace waypost

using namespace waypost;

// logits (rows, width) -> peaks and places (rows,); width is at least 1.
extern "C" void EXPORT(largest)(const Element *logits, long stride, long rows, long width, Wide<Element> *peaks, int64_t *places,
                                int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 1)
  for (long t = 0; t < rows; ++t) largest(logits + t * stride, width, peaks[t], places[t]);
}
