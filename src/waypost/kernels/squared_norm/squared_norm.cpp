// Sum of squares of a flat array: fixed blocks in float lanes, blocks added in double in order.

#include <algorithm>
#include <vector>

#include "../common.h"

using namespace waypost;

extern "C" double EXPORT(squared_norm)(const Element *x, long count, int threads) {
  typedef Wide<Element> A;
  constexpr long kBlock = 1 << 14;
  const long blocks = (count + kBlock - 1) / kBlock;
  std::vector<double> parts(blocks);
#pragma omp parallel for schedule(static) num_threads(threads) if (blocks > 4)
  for (long b = 0; b < blocks; ++b) {
    const Element *from = x + b * kBlock;
    const long n = std::min(kBlock, count - b * kBlock);
    Vec<A> sum[4] = {splat(A(0)), splat(A(0)), splat(A(0)), splat(A(0))};
    for (long i = 0; i < n; i += kLanes) {
      const Vec<A> v = load_some(from + i, (int)std::min<long>(kLanes, n - i));
      sum[i / kLanes % 4] = fma<A>(v, v, sum[i / kLanes % 4]);
    }
    parts[b] = (double)sum_lanes<A>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
  double total = 0;
  for (double part : parts) total += part;
  return total;
}
