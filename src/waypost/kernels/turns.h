// How the threads of a parallel region share the pieces of a loop: each has neighbours of its own, which it takes from the front,
// and who has none left takes another's last. Cores are not equally fast, by their kind or because others use them too; of pieces
// that are merely divided the slowest would keep all waiting. Whose piece is whose changes no bits: a piece is computed alone.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace waypost {

// Of a region: what is taken of each thread's pieces. Made before the region for the most threads that it may have.
class Turns {
  friend class Turn;
  struct alignas(64) Taken {  // a cache line each: a thread that nobody helps waits for nobody
    std::atomic<uint64_t> ends{0};  // how many from the front, and 2^32 times how many from behind; may exceed what there is
  };
  std::vector<Taken> taken_;  // of this loop and the next, in turn

 public:
  explicit Turns(int threads) : taken_(2 * (size_t)threads) {}
};

// A thread's own view of it, made inside the region. Every thread of the region calls `each` for the same loops, with a barrier
// between them.
class Turn {
  static constexpr uint64_t kBehind = (uint64_t)1 << 32;
  Turns &turns_;
  const long me_ = omp_get_thread_num(), threads_ = omp_get_num_threads();
  bool odd_ = false;

  std::atomic<uint64_t> &taken(long thread, bool odd) { return turns_.taken_[2 * thread + odd].ends; }
  static long front(uint64_t taken) { return (long)(taken % kBehind); }
  static long behind(uint64_t taken) { return (long)(taken / kBehind); }

 public:
  explicit Turn(Turns &turns) : turns_(turns) {}

  // Calls f(i, stop) for the pieces i of `count` that this thread takes; as far as is known it takes those up to `stop` next.
  template <class F> void each(long count, F f) {
    taken(me_, !odd_).store(0, std::memory_order_relaxed);  // nobody is in the loop before this one any more
    for (long k = 0; k < threads_; ++k) {
      const long from = (me_ + k) % threads_, first = count * from / threads_, pieces = count * (from + 1) / threads_ - first;
      std::atomic<uint64_t> &ends = taken(from, odd_);
      for (;;) {
        uint64_t now = ends.load(std::memory_order_relaxed);
        const long left = pieces - front(now) - behind(now);
        if (left <= 0) break;
        // Half of its own at once: taking waits for all that was read before.
        now = ends.fetch_add(k ? kBehind : (uint64_t)(left + 1) / 2, std::memory_order_relaxed);
        const long stop = pieces - behind(now), at = k ? std::max(front(now), stop - 1) : front(now);
        for (long i = at; i < std::min(stop, at + (k ? 1 : (left + 1) / 2)); ++i) f(first + i, first + stop);
      }
    }
    odd_ = !odd_;
  }
};

}  // namespace waypost
