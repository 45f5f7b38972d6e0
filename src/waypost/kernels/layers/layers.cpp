// Whole layers in one call, for serving: one parallel region walks all of them, its threads meet between the steps below.
//
//   h += part; normed = norm(h)      part is what the step before left for the residual sum
//   qkv = normed W_qkv
//   queries rotate; keys rotate and go to their page, as values do; biases and norms of heads on the way
//   mixed = attention over pages
//   part = mixed W_o
//   h += part; normed = norm(h)
//   wide = normed W_gate_up
//   gated = silu(gate) * up
//   part = gated W_down
//
// Behind each product comes what the rows' adapters add to it, where a pass has any.
//
// Every step is the row kernel of its own operator with the same roundings, so the bits are those of the operators one by one.

#include <time.h>

#include <utility>

#include "../attention/paged.h"
#include "../linear/linear.h"
#include "../low_rank/low_rank.h"
#include "../rms_norm/row.h"
#include "../rope/head.h"
#include "../swiglu/row.h"

namespace waypost {
namespace {

// The structures of kernels/layers/cpu.py. A null pointer is a bias or a norm that is not there.
struct Product {
  const void *panels, *scales, *bias;
  long pairs, outputs, group_pairs;
  int bits;  // of a weight: 16 is bfloat16, 8 and 4 have scales and rows in bfloat16
  ShareQuantized *share;  // for 8 and 4
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
  int table_width, sequences;
  double *seconds;  // by kind of work, each pass adds what it took; null: nobody asks
  const int32_t *which;  // (rows,): the adapter of each row, -1 none; null: no row has any
  const void *const *factors;  // (layers, kSites, adapters), null where an adapter changes nothing
  long adapters;
  void *share_low_rank;
};
constexpr int kSites = 7;  // q, k, v, out, gate, up, down
enum Kind { kNorms, kProducts, kHeads, kAttention, kGates };

// Seconds by kind of work as a region's first thread sees them, its waiting for the others included.
class Clock {
  double *seconds_ = nullptr;
  double last_ = 0;

  static double now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
  }

 public:
  explicit Clock(double *seconds) {
#pragma omp master
    if (seconds) seconds_ = seconds, last_ = now();
  }
  void took(Kind kind) {
    if (!seconds_) return;
    const double time = now();
    seconds_[kind] += time - last_, last_ = time;
  }
};

template <class T> class Pass {
  const Step &step_;
  T *h_;
  const long rows_, hidden_;
  T *memory_;
  T *normed_, *qkv_, *q_, *mixed_, *wide_, *gated_, *part_;
  std::vector<std::pair<int, std::vector<Item>>> items_;  // by queries that share a key/value head

 public:
  Pass(const Layer *layers, int count, const Step &step, T *h, long rows, long hidden) : step_(step), h_(h), rows_(rows), hidden_(hidden) {
    long heads = 0, qkv = 0, wide = 0;
    for (int i = 0; i < count; ++i) {
      heads = std::max(heads, (long)layers[i].heads * layers[i].width);
      qkv = std::max(qkv, layers[i].qkv.outputs);
      wide = std::max(wide, layers[i].gate_up.outputs);
      const int share = layers[i].heads / layers[i].groups;
      if (!items_of(share)) items_.push_back({share, cut(step.starts, step.sequences, rows_per_item(share))});
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
  void run(const Layer *layers, const int32_t *order, int count, void *const *k_pages, void *const *v_pages) {
    Clock clock(step_.seconds);
    const Product *before = nullptr;
    for (int i = 0; i < count; ++i) {
      const Layer &layer = layers[order[i]];
      T *k = (T *)k_pages[order[i]], *v = (T *)v_pages[order[i]];
      add_and_norm(before, (const T *)layer.attention_norm, layer.eps);
      clock.took(kNorms);
      multiply(layer.qkv, normed_, qkv_);
      const long D = layer.width, F = layer.gate_up.outputs / 2;
      adapt(order[i], 0, {layer.heads * D, layer.groups * D, layer.groups * D}, layer.qkv, normed_, qkv_);
      clock.took(kProducts);
      place_heads(layer, k, v);
      clock.took(kHeads);
      share_attention<T>({q_, (long)layer.heads * layer.width, k, v, step_.table, step_.table_width, step_.starts, step_.context,
                          step_.sequences, {layer.heads, layer.groups, layer.width}, (Wide<T>)layer.scale, layer.window, mixed_, nullptr},
                         *items_of(layer.heads / layer.groups));
      clock.took(kAttention);
      multiply(layer.out, mixed_, part_);
      adapt(order[i], 3, {hidden_}, layer.out, mixed_, part_);
      clock.took(kProducts);
      add_and_norm(&layer.out, (const T *)layer.ffn_norm, layer.eps);
      clock.took(kNorms);
      multiply(layer.gate_up, normed_, wide_);
      adapt(order[i], 4, {F, F}, layer.gate_up, normed_, wide_);
      clock.took(kProducts);
      gate(layer.gate_up);
      clock.took(kGates);
      multiply(layer.down, gated_, part_);
      adapt(order[i], 6, {hidden_}, layer.down, gated_, part_);
      clock.took(kProducts);
      before = &layer.down;
    }
    add_and_norm(before, nullptr, 0);
    clock.took(kNorms);
  }

 private:
  static long aligned(long elements) { return (elements + 63) / 64 * 64; }

  const std::vector<Item> *items_of(int share) const {
    for (const auto &[of, items] : items_)
      if (of == share) return &items;
    return nullptr;
  }

  // to = from + with, `width` elements, rounded.
  static void add(const T *from, const T *with, long width, T *to) {
    for (long k = 0; k < width; k += kLanes) {
      const int n = (int)std::min<long>(kLanes, width - k);
      store_some(to + k, load_some(from + k, n) + load_some(with + k, n), n);
    }
  }

  void multiply(const Product &p, const T *x, T *out) {
    if constexpr (std::is_same_v<T, bf16>)
      if (p.bits < 16) return p.share(p.bits, x, rows_, p.pairs, p.panels, p.scales, p.group_pairs, p.outputs, out);
    share_linear(x, rows_, p.pairs, (const Pair *)p.panels, p.outputs, out);
  }

  // A row with an adapter has its biases as soon as it has a product, for what the adapter adds comes after them.
  bool adapted(long t) const { return step_.which && step_.which[t] >= 0; }

  // What the rows' adapters add to a product, whose outputs are `widths` side by side: projections `site` and after.
  void adapt(int layer, int site, std::initializer_list<long> widths, const Product &p, const T *x, T *y) {
    if (!step_.which) return;
    if (p.bias) {
#pragma omp for schedule(static)
      for (long t = 0; t < rows_; ++t)
        if (adapted(t)) add(y + t * p.outputs, (const T *)p.bias, p.outputs, y + t * p.outputs);
    }
    const long inputs = 2 * p.pairs;
    ((ShareLowRank<T> *)step_.share_low_rank)(x, inputs, inputs, y, p.outputs, widths.begin(), (int)widths.size(), step_.which, rows_,
                                              step_.factors + ((long)layer * kSites + site) * step_.adapters, step_.adapters);
  }

  // Takes what `before` gave into the residual stream; null: nothing came before. A null weight leaves out the norm.
  void add_and_norm(const Product *before, const T *weight, double eps) {
#pragma omp for schedule(static)
    for (long t = 0; t < rows_; ++t) {
      T *h = h_ + t * hidden_, *part = part_ + t * hidden_;
      if (before && before->bias && !adapted(t)) add(part, (const T *)before->bias, hidden_, part);
      if (before) add(h, part, hidden_, h);
      if (weight) norm_row(h, weight, (int)hidden_, eps, normed_ + t * hidden_);
    }
  }

  void place_heads(const Layer &layer, T *k_pages, T *v_pages) {
    const int H = layer.heads, G = layer.groups, D = layer.width, all = H + 2 * G;
    std::vector<T> own(D), turned(D);
#pragma omp for schedule(static)
    for (long i = 0; i < rows_ * all; ++i) {
      const long t = i / all;
      const int j = (int)(i % all);
      const float *cosine = step_.cosine + t * (D / 2), *sine = step_.sine + t * (D / 2);
      const T *x = qkv_ + i * D;
      if (layer.qkv.bias && !adapted(t)) add(x, (const T *)layer.qkv.bias + (long)j * D, D, own.data()), x = own.data();
      const void *norm = j < H ? layer.q_norm : j < H + G ? layer.k_norm : nullptr;
      if (norm) norm_row(x, (const T *)norm, D, layer.eps, own.data()), x = own.data();
      if (j < H) {
        rotate_head(x, cosine, sine, D, 1.0f, q_ + (t * H + j) * D);
      } else if (j < H + G) {
        rotate_head(x, cosine, sine, D, 1.0f, turned.data());
        write_key(turned.data(), k_pages, step_.slots[t], j - H, G, D);
      } else {
        write_value(x, v_pages, step_.slots[t], j - H - G, G, D);
      }
    }
  }

  void gate(const Product &p) {
    constexpr long piece = 512;  // so that the threads share a single row too
    const long width = p.outputs / 2, pieces = (width + piece - 1) / piece;
#pragma omp for schedule(static)
    for (long i = 0; i < rows_ * pieces; ++i) {
      const long f = i % pieces * piece, n = std::min(piece, width - f);
      T *g = wide_ + i / pieces * p.outputs + f, *u = g + width;
      if (p.bias && !adapted(i / pieces)) add(g, (const T *)p.bias + f, n, g), add(u, (const T *)p.bias + width + f, n, u);
      gate_row(g, u, (int)n, gated_ + i / pieces * width + f);
    }
  }
};

}  // namespace
}  // namespace waypost

using namespace waypost;

// Runs the layers that `order` (count,) names over h (rows, hidden), in place; weights in bfloat16 or fewer bits. k_pages and
// v_pages have one pointer for each of the layer_count layers.
extern "C" void EXPORT(run_layers)(const Layer *layers, int layer_count, const int32_t *order, int count, void *const *k_pages,
                                   void *const *v_pages, const Step *step, Element *h, long rows, long hidden, int threads) {
  Pass<Element> pass(layers, layer_count, *step, h, rows, hidden);
#pragma omp parallel num_threads(threads)
  pass.run(layers, order, count, k_pages, v_pages);
}
