// Memory that a thread will read soon, asked for a little at a time while it computes something else.
#pragma once

#include <vector>

namespace waypost {

class Upcoming {
  struct Range {
    const char *at, *end;
  };
  std::vector<Range> ranges_;
  size_t now_ = 0;
  long bytes_ = 0, pace_ = 0;

 public:
  void clear() { ranges_.clear(), now_ = 0, bytes_ = pace_ = 0; }
  void add(const void *from, long bytes) {
    ranges_.push_back({(const char *)from, (const char *)from + bytes});
    bytes_ += bytes;
  }
  // From now on `fetch` will be called about so many times.
  void spread(long times) { pace_ = times > 0 ? (bytes_ / 64 + times - 1) / times : 0; }
  void fetch() {
    for (long lines = pace_; lines > 0 && now_ < ranges_.size(); --lines) {
      Range &here = ranges_[now_];
      __builtin_prefetch(here.at, 0, 2);
      here.at += 64;
      if (here.at >= here.end) ++now_;
    }
  }
};

}  // namespace waypost
