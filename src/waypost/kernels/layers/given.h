// What a call over layers is given: the structures of kernels/layers/weights.py and kernels/layers/passes.py.
// A null pointer is a bias or a norm that is not there.
#pragma once

#include <time.h>

#include "../linear/linear.h"

namespace waypost {
namespace {

struct Product {
  const void *panels, *scales, *bias;
  long pairs, outputs, group_pairs;
  int bits;  // of a weight: 16 is bfloat16, 8 and 4 have scales and rows in bfloat16
  ShareQuantized *share;  // for 8 and 4
  const Compact *compact;  // of 16 bits, for few rows; null: none
};
struct Layer {
  const void *attention_norm, *ffn_norm, *q_norm, *k_norm;
  Product qkv, out, gate_up, down;
  int heads, groups, width, window;
  double scale, eps;
};
struct Step {
  const int32_t *table;
  const int32_t *starts, *context;
  const int64_t *slots;
  const float *cosine, *sine;
  long page_stride;  // elements from a page to the next, of keys and of values, in every layer
  int table_width, sequences;
  double *seconds;  // by kind of work, each pass adds what it took; null: nobody asks
  const int32_t *which;  // (rows,): the adapter of each row, -1 none; null: no row has any
  const void *const *factors;  // (layers, kSites, adapters), null where an adapter changes nothing
  long adapters;
  void *share_low_rank;
};
constexpr int kSites = 7;  // q, k, v, out, gate, up, down
// The largest logit of each row and its first place (greedy/greedy.cpp); returns how many of them are not known.
typedef long Greedy(const bf16 *x, long rows, const void *screen, float *peaks, int64_t *places, int threads);
// What is around the layers, where a call runs from tokens to logits.
struct Ends {
  const int64_t *tokens;  // (rows,)
  const void *embedding;  // (vocabulary, hidden)
  const void *norm;
  double eps;
  Product head;
  const int64_t *wanted;  // (answers,): rows whose logits are asked for; null: every row's, or, without answers, none
  long answers;
  void *normed;  // (answers, hidden): their rows after the last norm
  void *logits;  // (answers, vocabulary)
  Greedy *greedy;  // not null: the largest logits alone are asked for, of a head in bfloat16, and `logits` is nobody's
  const void *screen;
  float *peaks;     // (answers,)
  int64_t *places;  // (answers,), -1 where it is not known
};
// A sequence that several passes carry on.
struct Text {
  int64_t *tokens;         // its last ones, with room for those to come
  long known;              // how many there are
  long room;               // how many more may come
  long most;               // guesses in a pass
  long found;              // tokens that have come
  float *peaks;            // (room,): their logits
  int *guessed, *accepted;  // (passes,): guesses that were run, and those of them that came true
};
// Passes that follow each other; `starts`, `slots`, `cosine`, `sine` and `sequences` of Step and what is the rows' in Ends are
// made for each of them.
struct Going {
  Text *texts;       // (sequences,)
  int32_t *context;  // (sequences,): cached keys, kept up to date
  const float *cosine, *sine;  // (sequences, angles, width / 2): from each sequence's first position on
  long angles;
  long passes, ran;
  long plain;             // so many of them have no guesses before others may have some
  int longest, shortest;  // ends of a text that are looked for further up
  double credit;          // in passes without guesses: what guesses may still lose
  double gain;            // in the same: a guess's coming true, where it does for every sequence
  double plain_s;         // what such a pass takes; 0: not known, until there is one
  double *seconds;        // (passes,): what each took
  bool open;              // whether what the last one has found is not taken yet
};

inline double now_s() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

}  // namespace
}  // namespace waypost

extern "C" long EXPORT(run_layers)(const waypost::Layer *layers, int layer_count, const int32_t *order, int count,
                                   void *const *k_pages, void *const *v_pages, const waypost::Step *step,
                                   const waypost::Ends *ends, waypost::Element *h, long rows, long hidden, int threads);
