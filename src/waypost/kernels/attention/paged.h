// Attention over pages as its callers see it: what a call consists of, how its rows are cut into work, and the writing of pages.
#pragma once

#include <omp.h>

#include <algorithm>
#include <vector>

#include "../common.h"
#include "../turns.h"
#include "../upcoming.h"

namespace waypost {

constexpr int P = kLanes;
// The softmax works on blocks of four pages, at absolute multiples of 64 keys.
constexpr int N = 4, K = N * P;

struct Shape {
  int heads, groups, width;
  int share() const { return heads / groups; }
  int padded() const { return (width + P - 1) / P * P; }
};

struct Item {
  int sequence, begin, end;  // rows of the batch
};

// Blocks of rows of each sequence.
inline std::vector<Item> cut(const int32_t *starts, int sequences, int rows_per_item) {
  std::vector<Item> items;
  for (int s = 0; s < sequences; ++s)
    for (int row = starts[s]; row < starts[s + 1]; row += rows_per_item)
      items.push_back({s, row, std::min(row + rows_per_item, starts[s + 1])});
  return items;
}
// As many rows as let about 250 queries share what a page is put into, where `rows` are enough for eight blocks a thread; else fewer,
// but 60 queries.
inline int rows_per_item(const Shape &shape, long rows, int threads) {
  const auto of = [&](int queries) { return std::max(4, queries / shape.share() / 4 * 4); };
  return (int)std::min<long>(of(252), std::max<long>(of(60), rows * shape.groups / (8 * threads) / 4 * 4));
}

// One call: q (T, H, D) with a row stride, pages that begin `page_stride` elements after each other, out (T, H, D), lse (T, H) or null.
template <class T> struct Paged {
  const T *q;
  long q_stride;
  const T *k_pages, *v_pages;
  long page_stride;
  const int32_t *table;
  int table_width;
  const int32_t *starts, *context;
  int sequences;
  Shape shape;
  Wide<T> scale;
  int window;
  T *out;
  Wide<T> *lse;

  bool single() const { return starts[sequences] == sequences && shape.width % P == 0; }  // one row a sequence
  std::vector<Item> items(int threads) const { return cut(starts, sequences, rows_per_item(shape, starts[sequences], threads)); }
  int position(const Item &item) const { return context[item.sequence] + item.begin - starts[item.sequence]; }
  int first_key(int position) const { return window > 0 ? std::max(0, position - window + 1) / K * K : 0; }
  // Where the page of `key` has what belongs to head g: of both, elements from the beginning.
  long page(const Item &item, int key, int g) const {
    return table[(long)item.sequence * table_width + key / P] * page_stride + (long)g * shape.width * P;
  }
};

// Stores head g's key, or value, of a row at (page, lane) = (slot / 16, slot % 16).
template <class T> inline void write_key(const T *k, T *k_pages, long page_stride, long slot, int g, int width) {
  T *page = k_pages + slot / P * page_stride + (long)g * width * P + slot % P;
  for (int d = 0; d < width; ++d) page[d * P] = k[d];
}
template <class T> inline void write_value(const T *v, T *v_pages, long page_stride, long slot, int g, int width) {
  std::memcpy(v_pages + slot / P * page_stride + ((long)g * P + slot % P) * width, v, width * sizeof(T));
}

// What must be done for a row and a key/value head before anything attends there: its queries, and its key and value in their page.
struct Before {
  void (*call)(const void *self, long row, int group);
  const void *self;
  void operator()(long row, int group) const { call(self, row, group); }
};

// This thread's share of the blocks of rows `items` and the key/value heads, inside a parallel region, after `before`, which may be
// null, for each of its own; the threads meet at the end. Defined in forward.cpp for the element type at hand.
template <class T> void share_attention(Turn &turn, const Paged<T> &call, const std::vector<Item> &items, const Before *before);

// Calls f(item, g) for the rows and key/value heads of this thread of a region, where each sequence has one row: neighbours that
// have an equal share of the keys.
template <class T, class F> inline void own_heads(const Paged<T> &call, const std::vector<Item> &items, F f) {
  const long me = omp_get_thread_num(), threads = omp_get_num_threads();
  const auto cost = [&](const Item &item) {  // in keys; what a head takes beside them is as much as two blocks
    const int position = call.position(item);
    return (long)(position - call.first_key(position) + 2 * K);
  };
  long all = 0, passed = 0;
  for (const Item &item : items) all += cost(item) * call.shape.groups;
  for (const Item &item : items)
    for (int g = 0; g < call.shape.groups; ++g, passed += cost(item))
      if (passed * threads / all == me) f(item, g);
}

// Adds to `later` the pages that this thread will read, up to `most` bytes of them; each sequence has one row.
template <class T> inline void add_pages(const Paged<T> &call, const std::vector<Item> &items, long most, Upcoming &later) {
  const long size = (long)call.shape.width * P;
  own_heads(call, items, [&](const Item &item, int g) {
    const int position = call.position(item);
    for (int key = call.first_key(position); key <= position && most > 0; key += P, most -= 2 * size * (long)sizeof(T)) {
      const long page = call.page(item, key, g);
      later.add(call.k_pages + page, size * sizeof(T)), later.add(call.v_pages + page, size * sizeof(T));
    }
  });
}

}  // namespace waypost
