// Whole layers in one call, for serving: one parallel region walks all of them, its threads meet between the steps below.
//
//   h += part; normed = norm(h)      part is what the step before left for the residual sum
//   qkv = normed W_qkv
//   queries rotate; keys rotate and go to their page, as values do; biases and norms of heads on the way
//   mixed = attention over pages             with the line above, head by head, where every sequence has one row
//   part = mixed W_o
//   h += part; normed = norm(h)
//   wide = normed W_gate_up
//   gated = silu(gate) * up                  with the line above, panel by panel, where they are in 16 bits without adapters
//   part = gated W_down
//
// From the attention of the last layer on, only the rows go on whose logits are asked for (asked.h).
//
// Behind each product comes what the rows' adapters add to it, where a pass has any. While a product computes, the memory works on
// what comes after it: the weights with which a thread begins the next, and the pages of the next layer.
//
// Every step is the row kernel of its own operator with the same roundings, so the bits are those of the operators one by one.

#include <optional>
#include <utility>

#include "../attention/paged.h"
#include "../linear/linear.h"
#include "../low_rank/low_rank.h"
#include "../rms_norm/row.h"
#include "../rope/head.h"
#include "../swiglu/row.h"
#include "asked.h"
#include "given.h"

namespace waypost {
namespace {

constexpr long kMostPages = 1 << 20;  // bytes of cached keys and values that a thread asks for before it needs them
enum Kind { kNorms, kProducts, kAttention, kHead };

// Seconds by kind of work as a region's first thread sees them, its waiting for the others included.
class Clock {
  double *seconds_ = nullptr;
  double last_ = 0;

 public:
  explicit Clock(double *seconds) {
#pragma omp master
    if (seconds) seconds_ = seconds, last_ = now_s();
  }
  void took(Kind kind) {
    if (!seconds_) return;
    const double time = now_s();
    seconds_[kind] += time - last_, last_ = time;
  }
};

template <class T> class Pass {
  struct Placing;
  const Step &step_;
  const Ends *ends_;  // null: from hidden states to hidden states
  const Some<T> all_;
  const long hidden_;
  std::optional<Asked<T>> asked_;  // none: every row goes all the way
  int widest_ = 0;  // head
  T *memory_;
  T *normed_, *qkv_, *q_, *mixed_, *wide_, *gated_, *part_;
  std::vector<std::pair<Shape, std::vector<Item>>> items_;  // by heads and groups

 public:
  Pass(const Layer *layers, int count, const Step &step, const Ends *ends, T *h, long rows, long hidden, int threads)
      : step_(step), ends_(ends), all_{h, rows, step.which, step.table, step.starts, step.context, step.sequences}, hidden_(hidden) {
    if (ends && ends->answers < rows)
      asked_.emplace(all_, step.table_width, hidden, ends->wanted, ends->answers);
    long heads = 0, qkv = 0, wide = 0;
    for (int i = 0; i < count; ++i) {
      heads = std::max(heads, (long)layers[i].heads * layers[i].width);
      qkv = std::max(qkv, layers[i].qkv.outputs);
      wide = std::max(wide, layers[i].gate_up.outputs), widest_ = std::max(widest_, layers[i].width);
      const Shape shape{layers[i].heads, layers[i].groups, layers[i].width};
      if (!items_of(shape)) items_.push_back({shape, cut(all_.starts, all_.sequences, rows_per_item(shape, rows, threads))});
    }
    const long widths[] = {hidden, qkv, heads, heads, wide, wide / 2, hidden};
    T **const parts[] = {&normed_, &qkv_, &q_, &mixed_, &wide_, &gated_, &part_};
    long total = 0;
    for (long width : widths) total += aligned(width * rows);
    T *next = memory_ = new T[total];
    for (int i = 0; i < 7; ++i) *parts[i] = next, next += aligned(widths[i] * rows);
  }

  ~Pass() { delete[] memory_; }
  Pass(const Pass &) = delete;

  // By every thread of a parallel region.
  void run(Turn turn, const Layer *layers, const int32_t *order, int count, void *const *k_pages, void *const *v_pages) {
    Clock clock(step_.seconds);
    Some<T> now = all_;
    if (ends_) {
      turn.divide(now.rows, [&](long t) {
        std::memcpy(now.h + t * hidden_, (const T *)ends_->embedding + ends_->tokens[t] * hidden_, hidden_ * sizeof(T));
      });
      turn.meet();
    }
    Placing place{this, nullptr, nullptr, nullptr, std::vector<T>(2 * widest_)};
    const Before before_heads{[](const void *self, long t, int g) { ((Placing *)self)->row(t, g); }, &place};
    const Product *before = nullptr;
    Upcoming also;
    const auto attention = [&](const Some<T> &some, int i) {
      const Layer &layer = layers[i];
      return Paged<T>{q_, (long)layer.heads * layer.width, (const T *)k_pages[i], (const T *)v_pages[i], step_.page_stride,
                      some.table, step_.table_width, some.starts, some.context, some.sequences,
                      {layer.heads, layer.groups, layer.width}, (Wide<T>)layer.scale, layer.window, mixed_, nullptr};
    };
    for (int i = 0; i < count; ++i) {
      const int at = order[i];
      const Layer &layer = layers[at];
      add_and_norm(turn, now, before, (const T *)layer.attention_norm, layer.eps);
      clock.took(kNorms);
      also.clear();
      expect(layer.out, asked_ && i + 1 == count ? asked_->some.rows : now.rows, also);
      multiply(turn, layer.qkv, now.rows, normed_, qkv_, also, &layer.out);
      const long D = layer.width;
      adapt(turn, now, at, 0, {layer.heads * D, layer.groups * D, layer.groups * D}, layer.qkv, normed_, qkv_);
      clock.took(kProducts);
      place.layer = &layer, place.k_pages = (T *)k_pages[at], place.v_pages = (T *)v_pages[at];
      if (asked_ && i + 1 == count) {
        now = leave(turn, place);
        const Paged<T> call = attention(now, at);
        if (now.rows) share_attention<T>(turn, call, call.items((int)turn.threads()), nullptr);
      } else {
        const Paged<T> call = attention(now, at);
        share_attention<T>(turn, call, *items_of(call.shape), &before_heads);
      }
      clock.took(kAttention);
      if (!now.rows) return;
      also.clear();
      expect(layer.gate_up, now.rows, also);
      multiply(turn, layer.out, now.rows, mixed_, part_, also, &layer.gate_up);
      adapt(turn, now, at, 3, {hidden_}, layer.out, mixed_, part_);
      clock.took(kProducts);
      add_and_norm(turn, now, &layer.out, (const T *)layer.ffn_norm, layer.eps);
      clock.took(kNorms);
      also.clear();
      expect(layer.down, now.rows, also);
      if (i + 1 < count) {
        const Paged<T> pages = attention(now, order[i + 1]);
        if (pages.single()) add_pages(pages, *items_of(pages.shape), kMostPages, also);
      }
      multiply_and_gate(turn, now, at, layer, also);
      clock.took(kProducts);
      also.clear();
      if (i + 1 < count) expect(layers[order[i + 1]].qkv, now.rows, also);
      else if (ends_ && !ends_->greedy) expect(ends_->head, ends_->answers, also);
      multiply(turn, layer.down, now.rows, gated_, part_, also, i + 1 < count ? &layers[order[i + 1]].qkv : nullptr);
      adapt(turn, now, at, 6, {hidden_}, layer.down, gated_, part_);
      clock.took(kProducts);
      before = &layer.down;
    }
    add_and_norm(turn, now, before, nullptr, 0);
    clock.took(kNorms);
    if (!ends_) return;
    T *const normed = (T *)ends_->normed;
    const int64_t *const wanted = now.h == all_.h ? ends_->wanted : nullptr;  // else they are all that is left
    turn.divide(ends_->answers, [&](long i) {
      norm_row(now.h + (wanted ? wanted[i] : i) * hidden_, (const T *)ends_->norm, (int)hidden_, ends_->eps, normed + i * hidden_);
    });
    turn.meet();
    if (ends_->greedy) return;
    also.clear();
    multiply(turn, ends_->head, ends_->answers, normed, (T *)ends_->logits, also, nullptr);
    clock.took(kHead);
  }

 private:
  static long aligned(long elements) { return (elements + 63) / 64 * 64; }

  const std::vector<Item> *items_of(const Shape &shape) const {
    for (const auto &[of, items] : items_)
      if (of.heads == shape.heads && of.groups == shape.groups) return &items;
    return nullptr;
  }

  ALONE void multiply(Turn &turn, const Product &p, long rows, const T *x, T *out, Upcoming &also, const Product *then) {
    if constexpr (std::is_same_v<T, bf16>) {
      if (p.compact && rows <= kFewRows) return p.compact->share(turn, p.compact, x, rows, out, then ? then->compact : nullptr);
      if (p.bits < 16) return p.share(turn, p.bits, x, rows, p.pairs, p.panels, p.scales, p.group_pairs, p.outputs, out);
    }
    share_linear(turn, x, rows, p.pairs, (const Pair *)p.panels, p.outputs, out, also);
  }

  // Both products of the feed-forward's first half, and their gate.
  void multiply_and_gate(Turn &turn, const Some<T> &some, int at, const Layer &layer, Upcoming &also) {
    const Product &p = layer.gate_up;
    const long width = p.outputs / 2;
    if (p.bits == 16 && !some.which && gates_on_the_way(some.rows, width))
      return share_gated(turn, normed_, some.rows, p.pairs, (const Pair *)p.panels, width, (const T *)p.bias, gated_, also);
    multiply(turn, p, some.rows, normed_, wide_, also, &layer.down);
    adapt(turn, some, at, 4, {width, width}, p, normed_, wide_);
    gate(turn, some, p);
  }

  // What a product reads first joins what is upcoming.
  void expect(const Product &p, long rows, Upcoming &later) const {
    if (p.bits == 16) add_first(rows, p.pairs, (const Pair *)p.panels, p.outputs, later);
  }

  // What the rows' adapters add to a product, whose outputs are `widths` side by side: projections `site` and after.
  ALONE void adapt(Turn &turn, const Some<T> &some, int layer, int site, std::initializer_list<long> widths, const Product &p,
                   const T *x, T *y) {
    if (!some.which) return;
    if (p.bias) {
      turn.divide(some.rows, [&](long t) {
        if (some.adapted(t)) add_row(y + t * p.outputs, (const T *)p.bias, p.outputs, y + t * p.outputs);
      });
      turn.meet();
    }
    const long inputs = 2 * p.pairs;
    ((ShareLowRank<T> *)step_.share_low_rank)(turn, x, inputs, inputs, y, p.outputs, widths.begin(), (int)widths.size(), some.which,
                                              some.rows, step_.factors + ((long)layer * kSites + site) * step_.adapters, step_.adapters);
  }

  // Takes what `before` gave into the residual stream; null: nothing came before. A null weight leaves out the norm.
  ALONE void add_and_norm(Turn &turn, const Some<T> &some, const Product *before, const T *weight, double eps) {
    turn.divide(some.rows, [&](long t) {
      T *h = some.h + t * hidden_, *part = part_ + t * hidden_;
      if (before && before->bias && !some.adapted(t)) add_row(part, (const T *)before->bias, hidden_, part);
      if (before) add_row(h, part, hidden_, h);
      if (weight) norm_row(h, weight, (int)hidden_, eps, normed_ + t * hidden_);
    });
    turn.meet();
  }

  // Puts what one row has for a key/value head in its place. A thread's own.
  struct Placing {
    const Pass *pass;
    const Layer *layer;
    T *k_pages, *v_pages;
    std::vector<T> memory;

    ALONE void row(long t, int g) {
      queries(t, t, g);
      key_and_value(t, g);
    }

    // The queries of row t that share head g, rotated, as those of row `to` of the attention.
    void queries(long t, long to, int g) {
      const int H = layer->heads, R = H / layer->groups;
      for (int j = g * R; j < (g + 1) * R; ++j) rotate(t, j, layer->q_norm, pass->q_ + (to * H + j) * layer->width);
    }

    // The key, rotated, and the value of row t to their page.
    void key_and_value(long t, int g) {
      const int H = layer->heads, D = layer->width;
      const Step &step = pass->step_;
      T *turned = memory.data() + D;
      rotate(t, H + g, layer->k_norm, turned);
      write_key(turned, k_pages, step.page_stride, step.slots[t], g, D);
      write_value(biased(t, H + layer->groups + g), v_pages, step.page_stride, step.slots[t], g, D);
    }

   private:
    // Head j of a row of qkv, with its bias.
    const T *biased(long t, int j) {
      const int D = layer->width;
      const T *x = pass->qkv_ + (t * (layer->heads + 2 * layer->groups) + j) * D;
      if (!layer->qkv.bias || pass->all_.adapted(t)) return x;
      add_row(x, (const T *)layer->qkv.bias + (long)j * D, D, memory.data());
      return memory.data();
    }
    void rotate(long t, int j, const void *norm, T *to) {
      const int D = layer->width;
      const T *x = biased(t, j);
      if (norm) norm_row(x, (const T *)norm, D, layer->eps, memory.data()), x = memory.data();
      rotate_head(x, pass->step_.cosine + t * (D / 2), pass->step_.sine + t * (D / 2), D, 1.0f, to);
    }
  };

  // Every row's key and value to their page; of the rows that are asked for, the queries and the residual stream to where they go
  // on alone.
  Some<T> leave(Turn &turn, Placing &place) const {
    const Some<T> &some = asked_->some;
    const int G = place.layer->groups;
    turn.divide(some.rows * G, [&](long i) { place.queries(ends_->wanted[i / G], i / G, (int)(i % G)); });
    turn.divide(some.rows, [&](long i) { std::memcpy(some.h + i * hidden_, all_.h + ends_->wanted[i] * hidden_, hidden_ * sizeof(T)); });
    turn.divide(all_.rows * G, [&](long i) { place.key_and_value(i / G, (int)(i % G)); });
    turn.meet();
    return some;
  }

  ALONE void gate(Turn &turn, const Some<T> &some, const Product &p) {
    constexpr long piece = 512;  // so that the threads share a single row too
    const long width = p.outputs / 2, pieces = (width + piece - 1) / piece;
    turn.divide(some.rows * pieces, [&](long i) {
      const long f = i % pieces * piece, n = std::min(piece, width - f);
      T *g = wide_ + i / pieces * p.outputs + f, *u = g + width;
      if (p.bias && !some.adapted(i / pieces)) add_row(g, (const T *)p.bias + f, n, g), add_row(u, (const T *)p.bias + width + f, n, u);
      gate_row(g, u, (int)n, gated_ + i / pieces * width + f);
    });
    turn.meet();
  }
};

}  // namespace
}  // namespace waypost

using namespace waypost;

// Runs the layers that `order` (count,) names over h (rows, hidden), in place; weights in bfloat16 or fewer bits. k_pages and
// v_pages have one pointer for each of the layer_count layers. With `ends`, h is where the hidden states go, and is read by nobody.
// Returns of how many rows the largest logit is asked for and not known.
extern "C" long EXPORT(run_layers)(const Layer *layers, int layer_count, const int32_t *order, int count, void *const *k_pages,
                                   void *const *v_pages, const Step *step, const Ends *ends, Element *h, long rows, long hidden,
                                   int threads) {
  {
    Pass<Element> pass(layers, layer_count, *step, ends, h, rows, hidden, threads);
    Turns turns(threads);
#pragma omp parallel num_threads(threads)
    pass.run(Turn(turns), layers, order, count, k_pages, v_pages);
  }
  if (!ends || !ends->greedy) return 0;
  Clock clock(step->seconds);
  const long unknown = ends->greedy((const bf16 *)ends->normed, ends->answers, ends->screen, ends->peaks, ends->places, threads);
  clock.took(kHead);
  return unknown;
}
