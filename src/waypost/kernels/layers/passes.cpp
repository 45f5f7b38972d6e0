// Passes that follow each other with no interpreter in between: each takes the tokens that the one before has found.
//
// A sequence has a row for its newest token and one for each guess of what follows: that which followed the last tokens of its text
// where they stood before (serve/drafting/ngram.py). The largest logit of a row says the token after it, and as long as that is
// what was guessed, the row behind holds as well (serve/speculation.py). What the rows of wrong guesses have put into the pages is
// overwritten by what comes next; so is what they say.

#include <algorithm>
#include <vector>

#include "../attention/paged.h"
#include "given.h"

namespace waypost {
namespace {

// Puts what may follow a text behind it, and says how many tokens that is. A guess that reaches the end goes on with itself.
long guess(const Text &t, int longest, int shortest) {
  const long most = std::min(t.most, t.room - 1);  // the last row finds a token too
  int64_t *const end = t.tokens + t.known;
  for (long size = longest; size >= shortest && most > 0; --size)
    for (const int64_t *at = end - 1; at - size >= t.tokens; --at)
      if (std::equal(at - size, at, end - size)) {
        for (long i = 0; i < most; ++i) end[i] = at[i];
        return most;
      }
  return 0;
}

// The rows of a pass.
struct Batch {
  std::vector<int64_t> tokens, slots;
  std::vector<int32_t> starts;
  std::vector<float> cosine, sine;

  Batch(const Step &step, const Going &going, long half) {
    for (int s = 0; s < step.sequences; ++s) {
      const Text &t = going.texts[s];
      starts.push_back((int32_t)tokens.size());
      for (long i = 0; i <= t.guessed[going.ran]; ++i) {
        const long slot = going.context[s] + i, angles = (s * going.angles + t.found + i) * half;
        tokens.push_back(t.tokens[t.known - 1 + i]);
        slots.push_back((int64_t)step.table[s * step.table_width + slot / P] * P + slot % P);
        cosine.insert(cosine.end(), going.cosine + angles, going.cosine + angles + half);
        sine.insert(sine.end(), going.sine + angles, going.sine + angles + half);
      }
    }
    starts.push_back((int32_t)tokens.size());
  }
};

// Gives each text what the last pass has found.
void take(const Step &step, const Ends &ends, Going &going) {
  const float *peak = ends.peaks;
  const int64_t *place = ends.places;
  const long pass = going.ran - 1;
  long guessed = 0, accepted = 0;
  for (int s = 0; s < step.sequences; ++s) {
    Text &t = going.texts[s];
    int64_t *const end = t.tokens + t.known;
    const int rows = t.guessed[pass] + 1;
    int count = 1;
    while (count < rows && place[count - 1] == end[count - 1]) ++count;
    std::copy(place, place + count, end);
    std::copy(peak, peak + count, t.peaks + t.found);
    t.known += count, t.found += count, t.room -= count, going.context[s] += count;
    t.accepted[pass] = count - 1;
    guessed += rows - 1, accepted += count - 1;
    peak += rows, place += rows;
  }
  const double took_s = going.seconds[pass];
  if (!guessed && going.plain_s == 0) going.plain_s = took_s;
  if (guessed && going.plain_s > 0) going.credit += going.gain * (double)accepted / step.sequences - (took_s / going.plain_s - 1);
  going.open = false;
}

bool full(const Step &step, const Going &going) {
  return std::any_of(going.texts, going.texts + step.sequences, [](const Text &t) { return t.room == 0; });
}

}  // namespace
}  // namespace waypost

using namespace waypost;

// Runs passes of all layers until there have been `passes`, or one sequence has no more room. Returns 0 then; else of how many rows
// the last one does not know the largest logit. Who has filled them in, in `peaks` and `places` of `ends`, calls again.
extern "C" long EXPORT(run_passes)(const Layer *layers, int layer_count, const int32_t *order, void *const *k_pages,
                                   void *const *v_pages, Step *step, Ends *ends, Going *going, Element *h, long hidden,
                                   int threads) {
  for (;;) {
    if (going->open) take(*step, *ends, *going);
    if (going->ran == going->passes || full(*step, *going)) return 0;
    const double began_s = now_s();
    const bool guesses = going->ran >= going->plain && going->credit > 0;
    for (int s = 0; s < step->sequences; ++s) {
      Text &t = going->texts[s];
      t.guessed[going->ran] = guesses ? (int)guess(t, going->longest, going->shortest) : 0;
    }
    const Batch batch(*step, *going, layers[0].width / 2);
    const long rows = (long)batch.tokens.size();
    step->starts = batch.starts.data(), step->context = going->context, step->slots = batch.slots.data();
    step->cosine = batch.cosine.data(), step->sine = batch.sine.data();
    ends->tokens = batch.tokens.data(), ends->answers = rows;
    const long unknown =
        EXPORT(run_layers)(layers, layer_count, order, layer_count, k_pages, v_pages, step, ends, h, rows, hidden, threads);
    going->seconds[going->ran++] = now_s() - began_s, going->open = true;
    if (unknown) return unknown;
  }
}
