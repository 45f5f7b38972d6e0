// The gradients of causal attention, from q, k, v, the log-sum-exp of the forward pass and the gradient of its output.
// Sequence s has keys 0 .. context[s] + rows; its queries are those of its last rows.

#include "attention.h"

namespace waypost {
namespace {

template <class T> struct Backward {
  typedef Wide<T> A;
  const T *q, *k, *v, *grad;
  const A *lse, *delta;  // (T, H): log-sum-exp and sum_d grad * out
  const int32_t *starts, *context;
  int sequences;
  Shape shape;
  A scale;
  int window;
  T *grad_q, *grad_k, *grad_v;

  // Turns one query's scores and dp against M pages of keys into p and ds, in place; zero where a key is not seen.
  template <int M> void weigh(Vec<A> *score, Vec<A> *dp, Visible<M> seen, long at) const {
    for (int b = 0; b < M; ++b) {
      score[b] = exp_lanes(score[b] * scale - lse[at]);
      dp[b] = score[b] * (dp[b] - delta[at]) * scale;
    }
    seen.hide(score, A(0));
    seen.hide(dp, A(0));
  }

  // Everything arranged once, by sequence and key/value head. Query x of a sequence is head x % R of row x / R. Queries and
  // gradients as rows (G, queries, padded) and as units of neighbouring queries (G, queries / unit, padded), each sequence with a
  // whole number of Q queries and zeros past the end; keys as units of neighbouring rows (G, keys / unit, padded); keys and
  // values as columns (G, pages, units, 16), a whole number of blocks of N pages and zeros past the end.
  static constexpr int U = kUnit<T>, Q = 4 * U, M = 2;
  std::vector<T> qs, gs;
  std::vector<Unit<T>> q_units, g_units, k_rows, k_columns, v_columns;
  std::vector<long> first_query, first_page, first_key;  // of each sequence, counted over the batch

  int length_of(int sequence) const { return starts[sequence + 1] - starts[sequence]; }
  int keys_of(int sequence) const { return context[sequence] + length_of(sequence); }
  int units() const { return (shape.width + U - 1) / U; }
  long query_at(int sequence, int g, long x) const { return ((long)g * first_query.back() + first_query[sequence] + x) * shape.padded(); }
  long page_at(int sequence, int g, int page) const { return (long)g * first_page.back() + first_page[sequence] + page; }
  const Unit<T> *columns_at(const std::vector<Unit<T>> &columns, int sequence, int g, int key) const {
    return &columns[page_at(sequence, g, key / P) * units() * P];
  }
  const Unit<T> *rows_at(int sequence, int g, int key) const {
    return &k_rows[page_at(sequence, g, key / P) * P / U * shape.padded()];
  }
  long scalar_at(int sequence, int g, long x) const {  // of lse and delta
    return (starts[sequence] + x / shape.share()) * shape.heads + (long)g * shape.share() + x % shape.share();
  }

  void pack(int threads) {
    const int D = shape.width, padded = shape.padded(), G = shape.groups, R = shape.share();
    first_query.assign(1, 0), first_page.assign(1, 0), first_key.assign(1, 0);
    for (int s = 0; s < sequences; ++s) {
      first_query.push_back(first_query.back() + ((long)length_of(s) * R + Q - 1) / Q * Q);
      first_page.push_back(first_page.back() + (keys_of(s) + K - 1) / K * N);
      first_key.push_back(first_key.back() + keys_of(s));
    }
    qs.assign(first_query.back() * G * padded, T()), gs = qs;
    q_units.resize(qs.size() / U), g_units.resize(qs.size() / U);
    const long pages = first_page.back() * G;
    k_rows.assign(pages * P / U * padded, Unit<T>(0));
    k_columns.assign(pages * units() * P, Unit<T>(0)), v_columns = k_columns;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int s = 0; s < sequences; ++s)
      for (int g = 0; g < G; ++g) {
        const int length = length_of(s), num_keys = keys_of(s);
        const long first = starts[s], count = first_query[s + 1] - first_query[s], at = query_at(s, g, 0);
        for (int row = 0; row < length; ++row) {
          const long from = ((first + row) * shape.heads + (long)g * R) * D, to = at + (long)row * R * padded;
          copy_rows(q + from, D, R, D, padded, &qs[to]);
          copy_rows(grad + from, D, R, D, padded, &gs[to]);
        }
        zip_rows(&qs[at], padded, (int)count, padded, padded, &q_units[at / U]);
        zip_rows(&gs[at], padded, (int)count, padded, padded, &g_units[at / U]);
        const long keys = (first_key[s] * G + g) * D;
        zip_rows(k + keys, (long)G * D, num_keys, D, padded, &k_rows[page_at(s, g, 0) * P / U * padded]);
        for (int j = 0; j < num_keys; ++j) {
          const long to = page_at(s, g, j / P) * units() * P + j % P;
          for (int d = 0; d < D; ++d) {
            place(&k_columns[to + d / U * P], d % U, k[keys + (long)j * G * D + d]);
            place(&v_columns[to + d / U * P], d % U, v[keys + (long)j * G * D + d]);
          }
        }
      }
  }
  static void place(Unit<T> *unit, int which, T value) { std::memcpy((char *)unit + which * sizeof(T), &value, sizeof value); }

  // Gradients of the queries of one block of rows: keys ascending.
  void queries(Item item, int g) const {
    const int R = shape.share(), padded = shape.padded(), n = (item.end - item.begin) * R, s = item.sequence;
    const int first = context[s] + item.begin - starts[s];  // position of the first row
    const long x0 = (long)(item.begin - starts[s]) * R;
    std::vector<A> acc((size_t)n * padded, A(0)), ones(n, A(1));
    std::vector<Vec<A>> score((size_t)n * N), dp((size_t)n * N);
    std::vector<T> ds((size_t)n * K);
    std::vector<const T *> q_at(n), g_at(n);
    for (int x = 0; x < n; ++x) q_at[x] = &qs[query_at(s, g, x0 + x)], g_at[x] = &gs[query_at(s, g, x0 + x)];
    for (int key = window > 0 ? std::max(0, first - window + 1) / K * K : 0; key < first + n / R; key += K) {
      const int low = R * std::max(0, key - first);
      const int high = window > 0 ? std::min(n, R * (key + K - 1 + window - first)) : n;
      if (low >= high) continue;
      all_dots<N, T>(high - low, &q_at[low], columns_at(k_columns, s, g, key), units(), &score[(size_t)low * N]);
      all_dots<N, T>(high - low, &g_at[low], columns_at(v_columns, s, g, key), units(), &dp[(size_t)low * N]);
      for (int x = low; x < high; ++x) {
        weigh<N>(&score[(size_t)x * N], &dp[(size_t)x * N], Visible<N>(first + x / R, key, window), scalar_at(s, g, x0 + x));
        for (int b = 0; b < N; ++b) store_factors(&ds[(size_t)x * K + b * P], dp[(size_t)x * N + b]);
      }
      add_all<N, T>(acc.data(), ones.data(), &ds[(size_t)low * K], rows_at(s, g, key), padded, low, high, R, first, key, window);
    }
    store_queries(acc.data(), item.begin, n, g);
  }

  void store_queries(const A *acc, int row, int n, int g) const {
    const int R = shape.share(), D = shape.width, padded = shape.padded();
    for (int x = 0; x < n; ++x) {
      T *to = grad_q + ((long)(row + x / R) * shape.heads + g * R + x % R) * D;
      for (int d = 0; d < D; d += P) store_some(to + d, load(&acc[(size_t)x * padded + d]), D - d);
    }
  }

  // Gradients of M pages of keys and values: rows ascending, heads ascending, Q at a time. With `acc`, (rows of the
  // sequence, R, padded), also their part of the gradients of the queries, in the order of queries(): the same bits.
  void keys(int sequence, int key, int g, A *acc) const {
    const int R = shape.share(), D = shape.width, cached = context[sequence];
    const int end = keys_of(sequence), count = std::min(M * P, end - key);
    const long last = (long)R * ((window > 0 ? std::min(end, key + M * P - 1 + window) : end) - cached);
    const long seen = (long)R * std::max(0, key - cached);  // the first query that sees any of them
    const Unit<T> *k_at = columns_at(k_columns, sequence, g, key), *v_at = columns_at(v_columns, sequence, g, key);
    std::vector<A> dk(M * D * P, A(0)), dv(M * D * P, A(0));
    for (long x = seen / Q * Q; x < last; x += Q) {
      const T *q_at[Q], *g_at[Q];
      Vec<A> p[Q * M], ds[Q * M];
      const int ahead = (int)std::max<long>(0, seen - x), n = (int)std::min<long>(Q, last - x);
      for (int i = 0; i < Q; ++i) q_at[i] = &qs[query_at(sequence, g, x + i)], g_at[i] = &gs[query_at(sequence, g, x + i)];
      dots<Q, M, T>(q_at, k_at, units(), p);
      dots<Q, M, T>(g_at, v_at, units(), ds);
      for (int i = ahead; i < n; ++i)
        weigh<M>(&p[i * M], &ds[i * M], Visible<M>(cached + (int)((x + i) / R), key, window), scalar_at(sequence, g, x + i));
      for (int i = 0; i < ahead * M; ++i) p[i] = ds[i] = splat(A(0));
      for (int i = n * M; i < Q * M; ++i) p[i] = ds[i] = splat(A(0));
      if (acc) add_to_queries(acc, ds + ahead * M, sequence, g, key, x + ahead, n - ahead);
      add_to_keys(dk.data(), dv.data(), p, ds, &q_units[query_at(sequence, g, x) / U], &g_units[query_at(sequence, g, x) / U]);
    }
    store_columns(dk.data(), first_key[sequence] + key, count, g, grad_k);
    store_columns(dv.data(), first_key[sequence] + key, count, g, grad_v);
  }

  // acc[x + i] += sum_j ds[i][j] k[j] for i < n and the keys of M pages.
  void add_to_queries(A *acc, const Vec<A> *ds, int sequence, int g, int key, long x, int n) const {
    const int R = shape.share(), padded = shape.padded(), ahead = (int)(x % R);  // `first` counts whole rows
    T rounded[Q * M * P];
    A ones[Q];
    std::fill(ones, ones + Q, A(1));
    for (int i = 0; i < n * M; ++i) store_factors(rounded + i * P, ds[i]);
    add_all<M, T>(acc + (x - ahead) * padded, ones - ahead, rounded, rows_at(sequence, g, key), padded, ahead,
                  ahead + n, R, context[sequence] + (int)(x / R), key, window);
  }

  // dk[d][j] += sum_i q[i][d] ds[i][j] and dv[d][j] += sum_i g[i][d] p[i][j] over Q queries in units, for M pages of columns.
  void add_to_keys(A *dk, A *dv, const Vec<A> *p, const Vec<A> *ds, const Unit<T> *q_at, const Unit<T> *g_at) const {
    const int D = shape.width, padded = shape.padded();
    Units<T> p_units[4][M], ds_units[4][M];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
#pragma GCC unroll 2
      for (int b = 0; b < M; ++b)
        p_units[i][b] = zip_factors<T>(p[i * U * M + b], p[(i * U + U - 1) * M + b]),
        ds_units[i][b] = zip_factors<T>(ds[i * U * M + b], ds[(i * U + U - 1) * M + b]);
    for (int d = 0; d < D; ++d) {
      Vec<A> sum_k[M], sum_v[M];
#pragma GCC unroll 2
      for (int b = 0; b < M; ++b) sum_k[b] = load(&dk[(b * D + d) * P]), sum_v[b] = load(&dv[(b * D + d) * P]);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Units<T> q_d = splat(q_at[i * padded + d]), g_d = splat(g_at[i * padded + d]);
#pragma GCC unroll 2
        for (int b = 0; b < M; ++b) {
          sum_k[b] = add_product(q_d, ds_units[i][b], sum_k[b]);
          sum_v[b] = add_product(g_d, p_units[i][b], sum_v[b]);
        }
      }
#pragma GCC unroll 2
      for (int b = 0; b < M; ++b) store(&dk[(b * D + d) * P], sum_k[b]), store(&dv[(b * D + d) * P], sum_v[b]);
    }
  }

  void store_columns(const A *columns, long first, int count, int g, T *out) const {
    const int D = shape.width;
    A row[P];
    for (int j = 0; j < count; ++j)
      for (int d = 0; d < D; d += P) {
        const int some = std::min(P, D - d);
        for (int i = 0; i < some; ++i) row[i] = columns[(j / P * D + d + i) * P + j % P];
        store_some(out + ((first + j) * shape.groups + g) * D + d, load(row), some);
      }
  }

  // One pass over a sequence: every product of queries and keys once. Without it, twice, in pieces that more threads share.
  void whole(int sequence, int g) const {
    const int n = length_of(sequence) * shape.share(), end = keys_of(sequence);
    std::vector<A> acc((size_t)n * shape.padded(), A(0));
    for (int key = 0; key < end; key += M * P) keys(sequence, key, g, acc.data());
    store_queries(acc.data(), starts[sequence], n, g);
  }

  void run(int threads) {
    pack(threads);
    double total_work = 0, longest_work = 0;  // of sequences: about the pairs of a query and a key, twice
    for (int s = 0; s < sequences; ++s) {
      const double work = (double)length_of(s) * (keys_of(s) + context[s]);
      total_work += work;
      longest_work = std::max(longest_work, work);
    }
    // One pass does 5 of 7 products; its pieces are coarse, so at the end threads may wait for the longest of them.
    const double fair = total_work * shape.groups / threads;
    if (fair + longest_work * (threads - 1) / threads <= 1.4 * fair) {
      const long heads = (long)sequences * shape.groups;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
      for (long w = 0; w < heads; ++w) whole((int)(w / shape.groups), (int)(w % shape.groups));
      return;
    }
    const std::vector<Item> blocks = cut(starts, sequences, std::max(1, 64 / shape.share()));
    std::vector<Item> pages;
    for (int s = 0; s < sequences; ++s)
      for (int key = 0; key < keys_of(s); key += M * P) pages.push_back({s, key, 0});
    const long first = (long)blocks.size() * shape.groups, total = first + (long)pages.size() * shape.groups;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (total > 2)
    for (long w = 0; w < total; ++w) {
      if (w < first) {
        queries(blocks[w / shape.groups], (int)(w % shape.groups));
      } else {
        const Item page = pages[(w - first) / shape.groups];
        keys(page.sequence, page.begin, (int)((w - first) % shape.groups), nullptr);
      }
    }
  }
};

}  // namespace
}  // namespace waypost

using namespace waypost;

extern "C" {

// q, grad, grad_q (T, H, D) and k, v, grad_k, grad_v (all keys, G, D) of Element; lse and delta (T, H).
void EXPORT(attention_backward)(const Element *q, const Element *k, const Element *v, const Element *grad, const Wide<Element> *lse,
                                const Wide<Element> *delta, const int32_t *starts, const int32_t *context, int sequences, int heads,
                                int groups, int width, double scale, int window, Element *grad_q, Element *grad_k, Element *grad_v,
                                int threads) {
  Backward<Element>{q, k, v, grad, lse, delta, starts, context, sequences, {heads, groups, width}, (Wide<Element>)scale, window,
                    grad_q, grad_k, grad_v}.run(threads);
}
}
