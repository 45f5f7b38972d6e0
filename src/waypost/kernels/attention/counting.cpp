// What each key receives: the weights of the softmax, summed over the heads of a group and over rows, for KV policies.
//
// A page of sixteen keys and a key/value head are one piece of work, over all rows that see the page; the sum goes over heads
// first, then over rows, both ascending, on top of what the page has. Scores are those of the forward, bit for bit.

#include "attention.h"

namespace waypost {
namespace {

template <class T> struct Counting {
  typedef Wide<T> A;
  const T *q;
  long q_stride;
  const T *k_pages;
  long page_stride;
  const A *lse;  // (T, H)
  const int32_t *table;
  int table_width;
  const int32_t *starts, *context;
  Shape shape;
  A scale;
  int window;
  A *sums;  // (pages, G, 16)

  // The rows of sequence s over its page `number`, of head g.
  void page(int s, int number, int g, std::vector<Unit<T>> &columns, std::vector<const T *> &at, std::vector<Vec<A>> &scores) const {
    const int D = shape.width, R = shape.share(), units = (D + kUnit<T> - 1) / kUnit<T>, key = number * P;
    const int rows = starts[s + 1] - starts[s], first = std::max(0, key - context[s]);
    const int last = window > 0 ? std::min(rows, key + P - 1 + window - context[s]) : rows;
    const long page = table[(long)s * table_width + number], where = page * shape.groups + g;  // among the sums
    columns.resize((size_t)units * P);
    zip_rows(k_pages + page * page_stride + (long)g * D * P, P, D, P, P, columns.data());
    A total[P];
    for (int j = 0; j < P; ++j) total[j] = key + j < context[s] ? sums[where * P + j] : A(0);
    Vec<A> sum = load(total);
    at.resize(R), scores.resize(R);
    for (int i = first; i < last; ++i) {
      const long row = starts[s] + i;
      for (int r = 0; r < R; ++r) at[r] = q + row * q_stride + ((long)g * R + r) * D;
      all_dots<1, T>(R, at.data(), columns.data(), units, scores.data());
      const Visible<1> seen(context[s] + i, key, window);
      Vec<A> received = splat(A(0));
      for (int r = 0; r < R; ++r) {
        Vec<A> weight = exp_lanes(scores[r] * scale - lse[row * shape.heads + g * R + r]);
        seen.hide(&weight, A(0));
        received += weight;
      }
      sum += received;
    }
    store(sums + where * P, sum);
  }
};

template <class T> void count(const Counting<T> &call, int sequences, int threads) {
  std::vector<std::pair<int, int>> pages;  // (sequence, number of the page)
  for (int s = 0; s < sequences; ++s) {
    const int keys = call.context[s] + call.starts[s + 1] - call.starts[s];
    for (int number = 0; number * P < keys; ++number) pages.push_back({s, number});
  }
  const long total = (long)pages.size() * call.shape.groups;
#pragma omp parallel num_threads(threads) if (total > 1)
  {
    std::vector<Unit<T>> columns;
    std::vector<const T *> at;
    std::vector<Vec<Wide<T>>> scores;
#pragma omp for schedule(dynamic, 4)
    for (long w = 0; w < total; ++w) {
      const auto &[s, number] = pages[w / call.shape.groups];
      call.page(s, number, (int)(w % call.shape.groups), columns, at, scores);
    }
  }
}

}  // namespace
}  // namespace waypost

using namespace waypost;

extern "C" void EXPORT(count_attention)(const Element *q, long q_stride, const Element *k_pages, long page_stride,
                                        const Wide<Element> *lse, const int32_t *table, int table_width, const int32_t *starts,
                                        const int32_t *context, int sequences, int heads, int groups, int width, double scale,
                                        int window, Wide<Element> *sums, int threads) {
  count<Element>({q, q_stride, k_pages, page_stride, lse, table, table_width, starts, context, {heads, groups, width},
                  (Wide<Element>)scale, window, sums}, sequences, threads);
}
