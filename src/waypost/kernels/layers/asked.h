// The rows that go through a layer together: those of the batch, or those of them whose logits are asked for.
//
// Nobody reads what the last layer makes of the other rows; only their keys and values in its pages are needed later. Of a prompt
// that is one row, so a prefill has one layer's products less.
#pragma once

#include <algorithm>
#include <vector>

#include "../common.h"

namespace waypost {

template <class T> struct Some {
  T *h;  // (rows, hidden): the residual stream
  long rows;
  const int32_t *which;  // (rows,): their adapters; null: none has one
  const int32_t *table;  // (sequences, width of the batch's table)
  const int32_t *starts, *context;
  int sequences;

  // A row with an adapter has its biases as soon as it has a product, for what the adapter adds comes after them.
  bool adapted(long t) const { return which && which[t] >= 0; }
};

// The rows `wanted` of a batch, each as a sequence of its own over the pages of the one that it comes from.
template <class T> class Asked {
  std::vector<T> h_;
  std::vector<int32_t> which_, table_, starts_, context_;

 public:
  Some<T> some;

  Asked(const Some<T> &all, int table_width, long hidden, const int64_t *wanted, long count) : h_(count * hidden), starts_(1, 0) {
    table_.reserve(count * table_width);
    for (long i = 0; i < count; ++i) {
      const int32_t row = (int32_t)wanted[i];
      const int sequence = (int)(std::upper_bound(all.starts, all.starts + all.sequences + 1, row) - all.starts) - 1;
      const int32_t *pages = all.table + (long)sequence * table_width;
      table_.insert(table_.end(), pages, pages + table_width);
      context_.push_back(all.context[sequence] + row - all.starts[sequence]);
      starts_.push_back((int32_t)i + 1);
      if (all.which) which_.push_back(all.which[row]);
    }
    some = {h_.data(), count, all.which ? which_.data() : nullptr, table_.data(), starts_.data(), context_.data(), (int)count};
  }
  Asked(const Asked &) = delete;
};

}  // namespace waypost
