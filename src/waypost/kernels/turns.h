// How the threads of a parallel region share the pieces of a loop, and wait for each other.
//
// Of a loop's pieces each thread has neighbours of its own, which it takes from the front, and who has none left takes another's
// last. Cores are not equally fast, by their kind or because others use them too; of pieces that are merely divided the slowest
// would keep all waiting. Whose piece is whose changes no bits: a piece is computed alone.
#pragma once

#include <omp.h>
#include <sched.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace waypost {

// Of a region: what is taken of each thread's pieces, and who has come to a meeting. Made before the region for the most threads
// that it may have.
class Turns {
  friend class Turn;
  struct alignas(64) Taken {  // a cache line each: a thread that nobody helps waits for nobody
    std::atomic<uint64_t> ends{0};  // how many from the front, and 2^32 times how many from behind; may exceed what there is
  };
  struct alignas(64) Count {
    std::atomic<long> value{0};
  };
  std::vector<Taken> taken_;  // of this loop and the next, in turn
  Count next_[2];             // the same for loops in order
  Count came_, meetings_;

 public:
  explicit Turns(int threads) : taken_(2 * (size_t)threads) {}
};

// A thread's own view of it, made inside the region. Every thread of the region goes through the same loops and meetings, with a
// meeting between two loops whose pieces are taken (`each`, `in_order`).
class Turn {
  static constexpr uint64_t kBehind = (uint64_t)1 << 32;
  static constexpr int kSpins = 100, kYields = 5000;  // some microseconds, some milliseconds
  Turns &turns_;
  const long me_ = omp_get_thread_num(), threads_ = omp_get_num_threads();
  bool odd_ = false;

  std::atomic<uint64_t> &taken(long thread, bool odd) { return turns_.taken_[2 * thread + odd].ends; }
  static long front(uint64_t taken) { return (long)(taken % kBehind); }
  static long behind(uint64_t taken) { return (long)(taken / kBehind); }

  void make_next_ready() {  // nobody is in the loop before this one any more
    taken(me_, !odd_).store(0, std::memory_order_relaxed);
    turns_.next_[!odd_].value.store(0, std::memory_order_relaxed);
  }
  static void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
  static void nap() {
    const timespec time{0, 50000};
    nanosleep(&time, nullptr);
  }

 public:
  explicit Turn(Turns &turns) : turns_(turns) {}

  long me() const { return me_; }
  long threads() const { return threads_; }

  // Waits until every thread of the region has come. Who waits longer lets others have its processor, and in the end sleeps: one
  // that only looks may keep it from the very thread that it waits for. OpenMP's barriers look for milliseconds, so that beside a
  // busy program, which brings two threads onto one core, each of the hundreds of barriers in a pass took a time slice.
  void meet() {
    const long meetings = turns_.meetings_.value.load(std::memory_order_relaxed);
    if (turns_.came_.value.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      turns_.came_.value.store(0, std::memory_order_relaxed);
      turns_.meetings_.value.store(meetings + 1, std::memory_order_release);
      return;
    }
    for (int i = 0; turns_.meetings_.value.load(std::memory_order_acquire) == meetings; ++i) {
      if (i < kSpins) relax();
      else if (i < kSpins + kYields) sched_yield();
      else nap(), i = kSpins + kYields;
    }
  }

  // Calls f(i) for this thread's share of `count` equal pieces.
  template <class F> void divide(long count, F f) {
    for (long i = count * me_ / threads_; i < count * (me_ + 1) / threads_; ++i) f(i);
  }

  // Calls f(i) for the pieces i of `count` that this thread takes; all together take them in ascending order.
  template <class F> void in_order(long count, F f) {
    make_next_ready();
    std::atomic<long> &next = turns_.next_[odd_].value;
    for (long i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(i);
    odd_ = !odd_;
  }

  // Calls f(i, stop) for the pieces i of `count` that this thread takes; as far as is known it takes those up to `stop` next.
  template <class F> void each(long count, F f) {
    make_next_ready();
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
