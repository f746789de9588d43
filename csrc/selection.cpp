#include "selection.h"

#include <algorithm>
#include <limits>

namespace attribution {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

// A value that at least k of the items certainly reach, not far below the largest such value. A histogram finds it in
// two passes; nth_element took as long as the multiplication at k = 1000.
float certain_floor(const Candidate* items, const Candidate* end, int64_t k, float* best) {
  float low = infinity, high = -infinity;
  for (const Candidate* item = items; item != end; ++item) {
    const float surely = item->score - item->error;
    low = surely < low ? surely : low;
    high = surely > high ? surely : high;
  }
  *best = high;
  constexpr int bins = 512;
  uint32_t counts[bins] = {};
  float least[bins];
  std::fill(least, least + bins, infinity);
  const float range = high - low, scale = range > 0 && range < infinity ? (bins - 1) / range : 0.0f;
  for (const Candidate* item = items; item != end; ++item) {
    const float surely = item->score - item->error;
    const int bin = std::min(std::max(int((surely - low) * scale), 0), bins - 1);
    ++counts[bin];
    least[bin] = surely < least[bin] ? surely : least[bin];
  }
  int64_t seen = 0;
  float floor = infinity;
  for (int bin = bins - 1; bin >= 0 && seen < k; --bin) {
    seen += counts[bin];
    floor = std::min(floor, least[bin]);
  }
  return floor;
}

}  // namespace

Selection::Selection(const Batch& batch, int64_t k, const Calibration* calibration, int64_t window, bool coarse)
    : batch_(batch), k_(k), calibration_(calibration), window_(window), coarse_(coarse),
      wide_(size_t(batch.count), calibration != nullptr && calibration->b == 0) {}

// k items are certainly as good as `cut`, so an item that is certainly worse can go; no re-scoring.
Candidate* Selection::drop_hopeless(int q, Candidate* items, Candidate* end, float& cut) const {
  if (end - items <= k_) return end;
  float best;
  float floor = certain_floor(items, end, k_, &best);
  if (windowed(q)) floor = std::min(floor, calibration_->lowest(best));
  cut = floor = std::max(floor, cut);
  return std::partition(items, end, [&](const Candidate& item) { return item.score + item.error >= floor; });
}

// Canonical scores for those of the k that seem best whose errors reach below the k-th: the cut then lies one error below
// the k-th best instead of two, and far fewer get past it.
Candidate* Selection::sharpen(int q, Candidate* items, Candidate* end, float& cut) const {
  if (!coarse_ || end - items <= k_ + k_ / 4 + 16) return end;
  Candidate* top = items + k_;
  std::nth_element(items, top - 1, end, better);
  const float kth = (top - 1)->score, best = std::min_element(items, top, better)->score;
  Candidate* doubtful = std::partition(items, top, [&](const Candidate& item) {
    return item.error == 0 || (item.score - item.error >= kth && item.score < best);
  });
  batch_.rescore(doubtful, top - doubtful, q);
  float floor = infinity, highest = -infinity;
  for (const Candidate* item = items; item != top; ++item) {
    floor = std::min(floor, item->score - item->error);
    highest = std::max(highest, item->score - item->error);
  }
  if (windowed(q)) floor = std::min(floor, calibration_->lowest(highest));
  if (floor <= cut) return end;
  cut = floor;
  return std::partition(items, end, [&](const Candidate& item) { return item.score + item.error >= floor; });
}

uint32_t Selection::settle(int q, Candidate* items, uint32_t fill, float& cut) {
  Candidate* end = sharpen(q, items, drop_hopeless(q, items, items + fill, cut), cut);
  // Usually the doubtful ones are few, and most of what is here now will have gone by the end: re-score later.
  const int64_t most = windowed(q) || coarse_ ? keep() : k_ + k_ / 2 + 64;
  if (end - items <= most) return uint32_t(end - items);
  return finish(q, items, uint32_t(end - items), cut);
}

uint32_t Selection::finish(int q, Candidate* items, uint32_t fill, float& cut) {
  Candidate* end = sharpen(q, items, drop_hopeless(q, items, items + fill, cut), cut);
  Candidate* fresh = std::partition(items, end, [](const Candidate& item) { return item.error == 0; });
  batch_.rescore(fresh, end - fresh, q);
  if (end - items > k_) std::nth_element(items, items + (k_ - 1), end, better);
  Candidate* top = items + std::min<int64_t>(k_, end - items);
  const float kth = end - items >= k_ ? std::max_element(items, top, better)->score : -infinity;
  cut = kth;
  if (!windowed(q) || top == items) return uint32_t(top - items);
  const float best = std::min_element(items, top, better)->score;
  Candidate* kept = std::partition(top, end, [&](const Candidate& item) { return calibration_->weight(item.score, best) > 0; });
  if (kept - top > window_) {
    wide_[size_t(q)] = true;
    return uint32_t(top - items);
  }
  cut = std::min(kth, calibration_->lowest(best));
  return uint32_t(kept - items);
}

}  // namespace attribution
