// Counting scores beyond thresholds: the fast kernel is sure of most, float32 arithmetic of most of the others, and
// canonical scores tell the rest.
#include <algorithm>
#include <cmath>

#include "scan_member.h"

namespace attribution {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

// The float that canonical scores beyond the level, or at it, exceed, and no others.
float last_below(double level, bool or_equal) {
  const float near = float(level);
  return double(near) > level || (or_equal && double(near) == level) ? std::nextafter(near, -infinity) : near;
}

}  // namespace

void Scan::count(const double* thresholds, int count, bool or_equal, int64_t* larger) {
  thresholds_ = thresholds;
  threshold_count_ = count;
  for (int64_t i = 0; i < int64_t(batch_.count) * count; ++i) exceeded_.push_back(last_below(thresholds[i], or_equal));
  std::vector<Member> own = members(count);
  std::atomic<int64_t> next{0};
  const int64_t longest = (int64_t(1) << 31) / block_rows;  // what 32-bit counters hold
  std::fill_n(larger, int64_t(batch_.count) * count, int64_t(0));
  while (next < gallery_.blocks()) {
    stretch(next, std::min(gallery_.blocks(), next + longest), own, next);
    for (Member& member : own) {
      for (int q = 0; q < batch_.count; ++q)
        for (int t = 0; t < count; ++t)
          larger[int64_t(q) * count + t] += member.larger[size_t(t) * size_t(batch_.padded) + size_t(q)];
      std::fill(member.larger.begin(), member.larger.end(), 0u);
    }
  }
}

// Counts a query's candidates in one block, for those thresholds of which the kernel was not sure.
void Scan::decide(const Block& block, const Side& side, Member& member, int query) const {
  Candidate* items = member.buffer.get() + query * own_capacity;
  const int found = int(member.fill[size_t(query)]);
  const double* levels = thresholds_ + int64_t(query) * threshold_count_;
  const float close_error = side.close_error[size_t(query)], error = items->error;
  const bool canonical = error == 0;  // candidates of carefully(), which are counted nowhere
  float fast[block_rows], score[block_rows];
  for (int i = 0; i < found; ++i) score[i] = fast[i] = items[i].score;

  if (!canonical) {
    uint32_t doubtful[block_rows];  // is it too close to a threshold?
    const bool look_closer = close_error < error / 2;
    std::fill(doubtful, doubtful + found, !look_closer);
    if (look_closer) side.batch->close_scores(block, items, found, query, score);
    for (int t = 0; t < threshold_count_ && look_closer; ++t) {
      const float lowest = low(levels[t], close_error), highest = high(levels[t], close_error);
      for (int i = 0; i < found; ++i) doubtful[i] |= uint32_t(score[i] >= lowest) & uint32_t(score[i] <= highest);
    }
    int64_t left = 0;
    for (int i = 0; i < found; ++i)
      if (doubtful[i] != 0) items[left++] = items[i];
    if (left > 0) batch_.rescore(items, left, query);
    for (int i = 0, next = 0; next < left; ++i)
      if (doubtful[i] != 0) score[i] = items[next++].score;
  }
  for (int t = 0; t < threshold_count_; ++t) {
    const size_t at = size_t(t) * size_t(batch_.padded) + size_t(query);
    const float lowest = canonical ? -infinity : side.low[at], highest = canonical ? infinity : side.high[at];
    const float exceeded = exceeded_[size_t(query) * size_t(threshold_count_) + size_t(t)];
    uint32_t larger = 0;
    for (int i = 0; i < found; ++i)
      larger += uint32_t(fast[i] >= lowest) & uint32_t(fast[i] <= highest) & uint32_t(score[i] > exceeded);
    member.larger[at] += larger;
  }
}

}  // namespace attribution
