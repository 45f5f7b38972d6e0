// log-sum-exp of rows of logits, and the gradient of cross entropy written over them.

#include <algorithm>

#include "../common.h"

namespace waypost {
namespace {

constexpr int kStep = 4 * kLanes;

// log sum exp of one row: the maximum, then four running sums over lanes, joined in order.
template <class T> Wide<T> log_sum_exp(const T *row, int width) {
  typedef Wide<T> A;
  const A lowest = -std::numeric_limits<A>::infinity();
  const A top = peak_of(row, width);
  int k = 0;
  Vec<A> sum[4] = {splat(A(0)), splat(A(0)), splat(A(0)), splat(A(0))};
  for (; k + kStep <= width; k += kStep)
    for (int i = 0; i < 4; ++i) sum[i] += exp_lanes(load(row + k + i * kLanes) - top);
  for (; k + kLanes <= width; k += kLanes) sum[0] += exp_lanes(load(row + k) - top);
  if (k < width) {
    A x[kLanes];
    for (int i = 0; i < kLanes; ++i) x[i] = k + i < width ? (A)widen(row[k + i]) : lowest;
    sum[1] += exp_lanes(load(x) - top);
  }
  return top + std::log(sum_lanes<A>((sum[0] + sum[1]) + (sum[2] + sum[3])));
}

// row = (exp(row - lse) - [k == target]) * weight
template <class T> void gradient(T *row, int width, Wide<T> lse, long target, Wide<T> weight) {
  typedef Wide<T> A;
  const A hit = std::exp((A)widen(row[target]) - lse) - A(1);
  for (int k = 0; k < width; k += kLanes)
    store_some(row + k, exp_lanes(load_some(row + k, width - k) - lse) * weight, width - k);
  const int begin = (int)(target / kLanes) * kLanes, n = std::min(kLanes, width - begin);
  A x[kLanes];
  store(x, load_some(row + begin, n));
  x[target - begin] = hit * weight;
  store_some(row + begin, load(x), n);
}

}  // namespace
}  // namespace waypost

using namespace waypost;

extern "C" {

void EXPORT(log_sum_exp)(const Element *logits, long stride, long rows, int width, Wide<Element> *out, int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 1)
  for (long t = 0; t < rows; ++t) out[t] = log_sum_exp(logits + t * stride, width);
}

void EXPORT(cross_entropy_gradient)(Element *logits, long rows, int width, const Wide<Element> *lse, const int64_t *targets,
                                    const Wide<Element> *weights, int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 1)
  for (long t = 0; t < rows; ++t) gradient(logits + t * width, width, lse[t], targets[t], weights[t]);
}
}
