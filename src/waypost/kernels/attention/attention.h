// What attention's forward and backward share: blocks of rows, what a row sees, products with fixed orders.
//
// Invariant: a row's bits depend on its own query and on keys 0 .. position alone. A work item is a block of rows and one
// key/value head; which rows share a block only decides how often a page is loaded. Sums are in float (double for double).
// bfloat16 is multiplied in pairs, which for the sums over keys rounds the weights of the softmax, as FlashAttention does (Dao et
// al. 2022, arXiv:2205.14135, whose kernels hold P in the type of V). Lane j of a page holds the key at position 16 * page + j.
//
// Layouts: q (T, H, D), k and v (T, G, D) with a row stride; k_pages (pages, G, D, 16); v_pages (pages, G, 16, D).
#pragma once

#include "paged.h"

namespace waypost {
namespace {

// The d-th unit of a row.
template <class T> inline Unit<T> unit_at(const T *row, int d) {
  Unit<T> unit;
  std::memcpy(&unit, row + d * kUnit<T>, sizeof unit);
  return unit;
}

// Which of the keys first_key .. first_key + N * 16 a position sees: lanes [low, high).
template <int N> struct Visible {
  int low, high;
  Visible(int position, int first_key, int window) {
    low = window > 0 ? std::max(0, position - window + 1 - first_key) : 0;
    high = std::min(N * P, position - first_key + 1);
  }
  bool all() const { return low == 0 && high == N * P; }
  template <class A> void hide(Vec<A> *scores, A hidden) const {
    if (all()) return;
    A x[N * P];
    std::memcpy(x, scores, sizeof x);
    for (int j = 0; j < N * P; ++j) x[j] = j >= low && j < high ? x[j] : hidden;
    std::memcpy(scores, x, sizeof x);
  }
};

// out[i * N + b] = sum_d x[i][d] * column(b, d), d ascending by units, for M queries and N pages.
template <int M, int N, class T, class F>
inline void dots_of(const T *const *x, int units, F column, Vec<Wide<T>> *out) {
  Vec<Wide<T>> acc[M][N];  // in registers: constant indices only
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
    for (int b = 0; b < N; ++b) acc[i][b] = splat(Wide<T>(0));
  for (int d = 0; d < units; ++d) {
    Units<T> here[N];
#pragma GCC unroll 16
    for (int b = 0; b < N; ++b) hold(here[b] = column(b, d));
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      Units<T> one = splat(unit_at(x[i], d));
      hold(one);
#pragma GCC unroll 16
      for (int b = 0; b < N; ++b) acc[i][b] = add_product(one, here[b], acc[i][b]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
    for (int b = 0; b < N; ++b) out[i * N + b] = acc[i][b];
}
// Over columns in units, (N, units, 16).
template <int M, int N, class T>
ALONE void dots(const T *const *x, const Unit<T> *columns, int units, Vec<Wide<T>> *out) {
  dots_of<M, N, T>(x, units, [&](int b, int d) { return load(columns + (b * units + d) * P); }, out);
}
// Over pages (D, 16) as they lie; D is a multiple of the unit.
template <int M, int N, class T>
ALONE void page_dots(const T *const *x, const T *const *pages, int width, Vec<Wide<T>> *out) {
  const auto column = [&](int b, int d) { return zip_next(pages[b] + d * kUnit<T> * P); };
  dots_of<M, N, T>(x, width / kUnit<T>, column, out);
}
template <int N, class T>
inline void all_dots(int n, const T *const *x, const Unit<T> *columns, int units, Vec<Wide<T>> *out) {
  for (; n >= 4; n -= 4, x += 4, out += 4 * N) dots<4, N, T>(x, columns, units, out);
  for (; n > 0; --n, ++x, out += N) dots<1, N, T>(x, columns, units, out);
}

// acc[i] = acc[i] * shrink[i] + sum_{low <= j < high} p[i][j] * row(j / unit)[w] for X queries, j ascending by units, and W
// vectors w of each, which `row` puts into an array. acc (X, stride), p (X, keys). What rows hold outside of low .. high is not
// looked at.
template <int X, int W, class T, class F>
inline void add_rows_of(Wide<T> *acc, int stride, const Wide<T> *shrink, const T *p, int keys, int low, int high, F row) {
  constexpr int U = kUnit<T>;
  Vec<Wide<T>> a[X][W];
#pragma GCC unroll 16
  for (int i = 0; i < X; ++i)
#pragma GCC unroll 16
    for (int w = 0; w < W; ++w) a[i][w] = load(acc + i * stride + w * P) * shrink[i];
  const auto add = [&](int j, auto seen) {  // a lambda is inlined, and so are its constant indices
    Units<T> here[W];
    row(j, here);
#pragma GCC unroll 16
    for (int w = 0; w < W; ++w) hold(here[w] = seen(here[w]));
#pragma GCC unroll 16
    for (int i = 0; i < X; ++i) {
      Units<T> one = splat(unit_at(p + i * keys, j));
      hold(one);
#pragma GCC unroll 16
      for (int w = 0; w < W; ++w) a[i][w] = add_product(one, here[w], a[i][w]);
    }
  };
  if (low % U) add(low / U, only_last<T>);
  for (int j = (low + U - 1) / U; j < high / U; ++j) add(j, [](Units<T> all) { return all; });
  if (high % U) add(high / U, only_first<T>);
#pragma GCC unroll 16
  for (int i = 0; i < X; ++i)
#pragma GCC unroll 16
    for (int w = 0; w < W; ++w) store(acc + i * stride + w * P, a[i][w]);
}
// Over rows in units, (keys / unit, padded).
template <int X, int W, class T>
ALONE void add_some(Wide<T> *acc, const Wide<T> *shrink, const T *p, const Unit<T> *rows, int padded, int keys, int low, int high) {
  const auto row = [&](int j, Units<T> (&out)[W]) {
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) out[w] = load(rows + j * padded + w * P);
  };
  add_rows_of<X, W, T>(acc, padded, shrink, p, keys, low, high, row);
}
template <int X, class T>
inline void add_rows(Wide<T> *acc, const Wide<T> *shrink, const T *p, const Unit<T> *rows, int padded, int keys, int low, int high) {
  int d = 0;
  for (; d + 4 * P <= padded; d += 4 * P) add_some<X, 4, T>(acc + d, shrink, p, rows + d, padded, keys, low, high);
  for (; d < padded; d += P) add_some<X, 1, T>(acc + d, shrink, p, rows + d, padded, keys, low, high);
}

// Rows (count, width) `stride` apart -> (count, padded), zeros past the width.
template <class T> void copy_rows(const T *rows, long stride, int count, int width, int padded, T *out) {
  for (int j = 0; j < count; ++j) {
    std::memcpy(out + (long)j * padded, rows + j * stride, width * sizeof(T));
    std::memset((void *)(out + (long)j * padded + width), 0, (padded - width) * sizeof(T));
  }
}
// Rows (count, width) of `size` elements each, `stride` apart -> units of neighbouring rows (ceil(count / unit), size); zeros
// past the last. `size` is a multiple of 16 and may lie beyond the width: those lanes are zero.
template <class T> void zip_rows(const T *rows, long stride, int count, int width, int size, Unit<T> *out) {
  T part[2][P] = {};
  for (int j = 0; j < count; j += kUnit<T>, out += size)
    for (int d = 0; d < size; d += P) {
      const T *x = rows + j * stride + d, *y = x + stride;
      const bool last = j + 1 >= count;
      if (!last && stride == P && size == P && width == P) {
        store(out, zip_next(x));
        continue;
      }
      if (!last && d + 4 * P <= width) {
        Units<T> four[4];
        zip_many(x, y, four);
        for (int i = 0; i < 4; ++i) store(out + d + i * P, four[i]);
        d += 3 * P;
        continue;
      }
      if (d + P > width || (kUnit<T> == 2 && last)) {
        const int n = std::max(0, std::min(P, width - d));
        std::memset((void *)part, 0, sizeof part);
        std::memcpy(part[0], x, n * sizeof(T));
        if (kUnit<T> == 2 && !last) std::memcpy(part[1], y, n * sizeof(T));
        x = part[0], y = part[1];
      }
      store(out + d, zip(x, y));
    }
}

// add_rows for queries [low, high), R a row, the first row at position `first`, over B pages of keys from `key`: four at a
// time over the keys that all four see, in whole units, and one at a time over the others; every query takes its keys in the
// same order and the same units. acc (queries, padded), shrink (queries,), p (high - low, 16 B), rows in units of keys.
template <int B, class T>
void add_all(Wide<T> *acc, const Wide<T> *shrink, const T *p, const Unit<T> *rows, int padded, int low, int high, int R, int first,
             int key, int window) {
  constexpr int U = kUnit<T>;
  const Wide<T> ones[4] = {1, 1, 1, 1};
  const auto add_one = [&](int x, const Wide<T> *by, int from, int to) {
    if (from < to) add_rows<1, T>(acc + (size_t)x * padded, by, p + (size_t)(x - low) * B * P, rows, padded, B * P, from, to);
  };
  const auto add_four = [&](int x, const Wide<T> *by, int from, int to) {
    add_rows<4, T>(acc + (size_t)x * padded, by, p + (size_t)(x - low) * B * P, rows, padded, B * P, from, to);
  };
  for (int x = low; x < high; x += 4) {
    const Visible<B> seen(first + x / R, key, window), last(first + (x + 3) / R, key, window);
    const int from = (last.low + U - 1) / U * U, to = seen.high / U * U;
    if (x + 4 <= high && seen.all() && last.all()) {
      add_four(x, shrink + x, 0, B * P);
    } else if (x + 4 <= high && from < to) {
      const bool before = seen.low < from;  // then the first sums of a query are these, and shrink what is there
      for (int i = 0; i < 4; ++i) {
        const Visible<B> own(first + (x + i) / R, key, window);
        if (before) add_one(x + i, shrink + x + i, own.low, from);
      }
      add_four(x, before ? ones : shrink + x, from, to);
      for (int i = 0; i < 4; ++i) add_one(x + i, ones, to, Visible<B>(first + (x + i) / R, key, window).high);
    } else {
      for (int i = x; i < std::min(x + 4, high); ++i) {
        const Visible<B> own(first + i / R, key, window);
        add_rows<1, T>(acc + (size_t)i * padded, shrink + i, p + (size_t)(i - low) * B * P, rows, padded, B * P, own.low, own.high);
      }
    }
  }
}

}  // namespace
}  // namespace waypost
