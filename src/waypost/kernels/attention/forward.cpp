// Causal attention over pages of sixteen keys, walked in absolute order with an online softmax, four pages at a time; and the
// writing of pages.
//
// A single row reads the pages as they lie; a block of rows puts each into units once and shares it. The bits are the same.

#include "attention.h"

namespace waypost {
namespace {

// One block of keys of the online softmax for M <= 4 queries, in two halves. The first scales their scores (M, N vectors), hides
// those of unseen keys and gives the new tops; the second turns them into weights, which it adds to the sums and rounds to the type
// of the values. `seen(i)` says which keys query i sees.
template <int M, class A, class F> inline void highest(Vec<A> *s, A scale, F seen, const A *top, A *here) {
  Vec<A> high[4] = {};
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i, s += N) {
    for (int b = 0; b < N; ++b) s[b] *= scale;
    seen(i).hide(s, -std::numeric_limits<A>::infinity());
    high[i] = s[0] > s[1] ? s[0] : s[1];
    for (int b = 2; b < N; ++b) high[i] = high[i] > s[b] ? high[i] : s[b];
  }
  A highest_of[4];
  fold_four<A>(high, [](Vec<A> x, Vec<A> y) { return x > y ? x : y; }, highest_of);
  for (int i = 0; i < M; ++i) here[i] = std::max(top[i], highest_of[i]);
}
template <int M, class T>
inline void weigh(const Vec<Wide<T>> *s, const Wide<T> *top, const Wide<T> *shrink, Wide<T> *sum, T *weights) {
  typedef Wide<T> A;
  Vec<A> total[4] = {};
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i, s += N, weights += K) {
    Vec<A> w[N];
    for (int b = 0; b < N; ++b) w[b] = exp_lanes(s[b] - top[i]);
    for (int b = 0; b < N; b += 2) store_factors(weights + b * P, w[b], w[b + 1]);
    total[i] = (w[0] + w[1]) + (w[2] + w[3]);
  }
  A totals[4];
  fold_four<A>(total, [](Vec<A> x, Vec<A> y) { return x + y; }, totals);
  for (int i = 0; i < M; ++i) sum[i] = sum[i] * shrink[i] + totals[i];
}

template <class T> inline void fetch(const T *from, long count) {
  for (long i = 0; i < count; i += 64 / (long)sizeof(T)) __builtin_prefetch(from + i);
}

// What a thread needs for its share of the work.
template <class T> class Walker {
  typedef Wide<T> A;
  std::vector<Unit<T>> columns_, rows_;
  std::vector<T> queries_, weights_;
  std::vector<A> acc_, sum_, top_, here_, shrink_;  // the last three are read and written by whole vectors
  std::vector<const T *> at_;
  std::vector<Vec<A>> scores_;

 public:
  // Not to be copied for the one walker that there is of a thread: each access would ask anew where that thread has it.
  __attribute__((noipa)) void share(Turn &turn, const Paged<T> &call, const std::vector<Item> &items, const Before *before) {
    const int G = call.shape.groups;
    const long total = (long)items.size() * G, rows = call.starts[call.sequences];
    if (call.single()) return share_single(turn, call, items, before);
    if (before) {
      turn.divide(rows * G, [&](long i) { (*before)(i / G, (int)(i % G)); });
      turn.meet();
    }
    turn.in_order(total, [&](long i) {
      const long w = total - 1 - i;  // the last rows of a sequence see most keys: first, so that the threads end together
      const Item &item = items[w / G];
      if (item.end - item.begin == 1 && call.shape.width % P == 0) row(call, {&item, (int)(w % G)}, {});
      else block(call, item, (int)(w % G));
    });
    turn.meet();
  }

 private:
  struct Head {
    const Item *item = nullptr;
    int g = 0;
  };

  // A row a sequence: each thread knows which heads come next, and nothing needs to be done for all rows before the first attends.
  void share_single(Turn &turn, const Paged<T> &call, const std::vector<Item> &items, const Before *before) {
    Head now;
    own_heads(call, items, [&](const Item &item, int g) {
      if (now.item) placed_row(call, now, {&item, g}, before);
      now = {&item, g};
    });
    if (now.item) placed_row(call, now, {}, before);
    turn.meet();
  }
  void placed_row(const Paged<T> &call, Head here, Head next, const Before *before) {
    if (before) (*before)(here.item->begin, here.g);
    row(call, here, next);
  }

  void load_queries(const Paged<T> &call, const Item &item, int g, int padded) {
    const int n = item.end - item.begin, R = call.shape.share(), D = call.shape.width;
    queries_.resize((size_t)n * R * padded);
    at_.resize(n * R);
    for (int i = 0; i < n; ++i)
      copy_rows(call.q + (item.begin + i) * call.q_stride + (long)g * R * D, D, R, D, padded, &queries_[(size_t)i * R * padded]);
    for (int x = 0; x < n * R; ++x) at_[x] = &queries_[(size_t)x * padded];
    acc_.assign((size_t)n * R * padded, A(0));
    sum_.assign(n * R, A(0));
    top_.assign(n * R + P, -std::numeric_limits<A>::infinity());
    here_.assign(n * R + P, -std::numeric_limits<A>::infinity());
    shrink_.resize(n * R + P);
    scores_.resize(std::max(R, kSome) * N);
    weights_.resize(std::max(R, kSome) * K);
  }

  void store_rows(const Paged<T> &call, const Item &item, int g, int padded) {
    const int n = item.end - item.begin, R = call.shape.share(), D = call.shape.width;
    for (int x = 0; x < n * R; ++x) {
      const long at = (long)(item.begin + x / R) * call.shape.heads + g * R + x % R;
      for (int d = 0; d < D; d += P) store_some(call.out + at * D + d, load(&acc_[(size_t)x * padded + d]) / sum_[x], D - d);
      if (call.lse) call.lse[at] = top_[x] + std::log(sum_[x]);
    }
  }

  // Calls f(x, how many from it on), four queries of [from, to) at a time and then one.
  template <class F> static void by_four(int from, int to, F f) {
    for (; from + 4 <= to; from += 4) f(from, std::integral_constant<int, 4>());
    for (; from < to; ++from) f(from, std::integral_constant<int, 1>());
  }

  // A block of rows: the pages are put into units once for all of its queries, of which so many go from the scores to the sums at
  // once: what they need of both stays in the first cache.
  static constexpr int kSome = P;
  void block(const Paged<T> &call, const Item &item, int g) {
    const int R = call.shape.share(), D = call.shape.width, padded = call.shape.padded(), window = call.window;
    const int n = item.end - item.begin, first = call.position(item), units = (D + kUnit<T> - 1) / kUnit<T>;
    columns_.resize(N * units * P);
    rows_.resize(K / kUnit<T> * padded);
    load_queries(call, item, g, padded);
    for (int key = call.first_key(first); key < first + n; key += K) {
      for (int b = 0; b < N && key + b * P < first + n; ++b) {
        const long at = call.page(item, key + b * P, g);
        zip_rows(call.k_pages + at, P, D, P, P, &columns_[b * units * P]);
        zip_rows(call.v_pages + at, D, P, D, padded, &rows_[(size_t)b * P / kUnit<T> * padded]);
      }
      const int low = std::max(0, key - first);  // rows before this one end before the block
      const int high = window > 0 ? std::min(n, key + K - 1 + window - first) : n;
      if (low >= high) continue;
      for (int from = low * R; from < high * R; from += kSome) {
        const int to = std::min(high * R, from + kSome);
        all_dots<N, T>(to - from, &at_[from], columns_.data(), units, scores_.data());
        by_four(from, to, [&](int x, auto count) {
          const auto seen = [&](int i) { return Visible<N>(first + (x + i) / R, key, window); };
          highest<count.value>(&scores_[(x - from) * N], call.scale, seen, &top_[x], &here_[x]);
        });
        for (int x = from; x < to; x += P) store(&shrink_[x], exp_lanes(load(&top_[x]) - load(&here_[x])));
        by_four(from, to, [&](int x, auto count) {
          weigh<count.value, T>(&scores_[(x - from) * N], &here_[x], &shrink_[x], &sum_[x], &weights_[(x - from) * K]);
        });
        std::copy(&here_[from], &here_[to], &top_[from]);
        add_all<N, T>(acc_.data(), shrink_.data(), weights_.data(), rows_.data(), padded, from, to, R, first, key, window);
      }
    }
    store_rows(call, item, g, padded);
  }

  // A block of keys from `key` on.
  void fetch_keys(const Paged<T> &call, Head head, int key) {
    const int D = call.shape.width, position = call.position(*head.item);
    for (int b = 0; b < N && key + b * P <= position; ++b) fetch(call.k_pages + call.page(*head.item, key + b * P, head.g), D * P);
  }

  // One row: up to four of its queries at a time over the pages as they lie. `next`: what this thread does after it, if it knows.
  void row(const Paged<T> &call, Head head, Head next) {
    const Item &item = *head.item;
    const int R = call.shape.share(), g = head.g;
    load_queries(call, item, g, call.shape.width);
    int x = 0;
    for (; x + 4 <= R; x += 4) queries<4>(call, head, next, x);
    if (R - x == 3) queries<3>(call, head, next, x);
    else if (R - x == 2) queries<2>(call, head, next, x);
    else if (R - x == 1) queries<1>(call, head, next, x);
    store_rows(call, item, g, call.shape.width);
  }

  template <int M> void queries(const Paged<T> &call, Head head, Head next, int x) {
    const Item &item = *head.item;
    const int D = call.shape.width, position = call.position(item), g = head.g;
    Vec<A> *scores = &scores_[(size_t)x * N];
    for (int key = call.first_key(position); key <= position; key += K) {
      const T *k[N], *v[N];
      for (int b = 0; b < N; ++b) {  // past the last key: any page, none of whose lanes is seen
        const long at = call.page(item, std::min(key + b * P, position), g);
        k[b] = call.k_pages + at, v[b] = call.v_pages + at;
      }
      const Visible<N> seen(position, key, call.window);
      if (x == 0) {  // what is needed next is on its way while this is computed: pages lie anywhere in memory
        for (int b = 0; b < N && key + b * P <= position; ++b) fetch(v[b], D * P);
        if (key + K <= position) fetch_keys(call, head, key + K);
        else if (next.item) fetch_keys(call, next, call.first_key(call.position(*next.item)));
      }
      page_dots<M, N, T>(&at_[x], k, D, scores);
      highest<M>(scores, call.scale, [&](int) { return seen; }, &top_[x], &here_[x]);
      store(&shrink_[x], exp_lanes(load(&top_[x]) - load(&here_[x])));  // of these M; the lanes beyond come later
      weigh<M, T>(scores, &here_[x], &shrink_[x], &sum_[x], &weights_[(size_t)x * K]);
      std::copy(&here_[x], &here_[x + M], &top_[x]);
      A *acc = &acc_[(size_t)x * D];
      int d = 0;
      for (; d + 4 * P <= D; d += 4 * P) add_part<M, 4>(acc, x, v, D, d, seen);
      for (; d < D; d += P) add_part<M, 1>(acc, x, v, D, d, seen);
    }
  }

  template <int M, int W> ALONE void add_part(A *acc, int x, const T *const *v, int D, int d, const Visible<N> &seen) {
    const auto row = [&](int j, Units<T> (&out)[W]) {
      const T *at = v[j * kUnit<T> / P] + (long)(j * kUnit<T> % P) * D + d;
      zip_many(at, at + D, out);
    };
    add_rows_of<M, W, T>(acc + d, D, &shrink_[x], &weights_[(size_t)x * K], K, seen.low, seen.high, row);
  }
};

template <class T> void forward(const Paged<T> &call, int threads) {
  const std::vector<Item> items = call.items(threads);
  const bool shared = items.size() * call.shape.groups > 1;
  Turns turns(threads);
#pragma omp parallel num_threads(threads) if (shared)
  {
    Turn turn(turns);
    share_attention(turn, call, items, nullptr);
  }
}

}  // namespace

template <class T> void share_attention(Turn &turn, const Paged<T> &call, const std::vector<Item> &items, const Before *before) {
  thread_local Walker<T> walker;  // whose memory is kept for the next call
  walker.share(turn, call, items, before);
}
template void share_attention(Turn &, const Paged<Element> &, const std::vector<Item> &, const Before *);

}  // namespace waypost

using namespace waypost;

extern "C" {

void EXPORT(attention_forward)(const Element *q, long q_stride, const Element *k_pages, const Element *v_pages, long page_stride,
                               const int32_t *table, int table_width, const int32_t *starts, const int32_t *context, int sequences,
                               int heads, int groups, int width, double scale, int window, Element *out, Wide<Element> *lse,
                               int threads) {
  forward<Element>({q, q_stride, k_pages, v_pages, page_stride, table, table_width, starts, context, sequences, {heads, groups, width},
                    (Wide<Element>)scale, window, out, lse}, threads);
}

void EXPORT(write_pages)(const Element *k, long k_stride, const Element *v, long v_stride, Element *k_pages, Element *v_pages,
                         long page_stride, const int64_t *slots, int rows, int groups, int width) {
  for (int t = 0; t < rows; ++t)
    for (int g = 0; g < groups; ++g) {
      write_key(k + t * k_stride + (long)g * width, k_pages, page_stride, slots[t], g, width);
      write_value(v + t * v_stride + (long)g * width, v_pages, page_stride, slots[t], g, width);
    }
}
}
