#include "selection.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace attribution {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

// What items certainly reach, as a histogram: nth_element took as long as the multiplication at k = 1000.
class Certain {
 public:
  Certain(const Candidate* items, const Candidate* end) {
    for (const Candidate* item = items; item != end; ++item) {
      const float surely = item->score - item->error;
      low_ = surely < low_ ? surely : low_;
      best_ = surely > best_ ? surely : best_;
    }
    std::fill(least_, least_ + bins, infinity);
    const float range = best_ - low_, scale = range > 0 && range < infinity ? (bins - 1) / range : 0.0f;
    for (const Candidate* item = items; item != end; ++item) {
      const float surely = item->score - item->error;
      const int bin = std::min(std::max(int((surely - low_) * scale), 0), bins - 1);
      ++counts_[bin];
      least_[bin] = surely < least_[bin] ? surely : least_[bin];
    }
  }

  float best() const { return best_; }

  // A value that at least k of the items reach, not far below the largest such value.
  float floor(int64_t k) const {
    int64_t seen = 0;
    float floor = infinity;
    for (int bin = bins - 1; bin >= 0 && seen < k; --bin) {
      seen += counts_[bin];
      floor = std::min(floor, least_[bin]);
    }
    return floor;
  }

 private:
  static constexpr int bins = 512;
  float low_ = infinity, best_ = -infinity;
  uint32_t counts_[bins] = {};
  float least_[bins];
};

// How many blocks have items that certainly reach `floor`, or some fewer.
int64_t blocks_that_reach(const Gallery& gallery, const Candidate* items, const Candidate* end, float floor) {
  constexpr uint64_t places = 4096;
  uint64_t seen[places / 64] = {};
  for (const Candidate* item = items; item != end; ++item)
    if (item->score - item->error >= floor) {
      const uint64_t place = uint64_t(gallery.block_of_row(item->row)) % places;
      seen[place / 64] |= uint64_t(1) << place % 64;
    }
  int64_t count = 0;
  for (uint64_t bits : seen) count += __builtin_popcountll(bits);
  return count;
}

}  // namespace

Selection::Selection(const Batch& batch, int64_t k, const Calibration* calibration, int64_t window, bool coarse)
    : batch_(batch), k_(k), calibration_(calibration), window_(window), coarse_(coarse),
      wide_(size_t(batch.count), calibration != nullptr && calibration->b == 0),
      guess_(size_t(batch.count), -infinity) {
  const char* variable = std::getenv("ATTRIBUTION_GUESSES");
  wrong_guesses_ = variable != nullptr && std::strcmp(variable, "wrong") == 0;
}

// k items are certainly as good as `cut`, so an item that is certainly worse can go; no re-scoring.
Candidate* Selection::drop_hopeless(int q, Candidate* items, Candidate* end, float& cut) const {
  if (end - items <= k_) return end;
  const Certain certain(items, end);
  float floor = certain.floor(k_);
  if (windowed(q)) floor = std::min(floor, calibration_->lowest(certain.best()));
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

// The k best of the whole gallery lie in k blocks at most, of which a random sample has about k * sampled; that it has `rank`
// of them happens less than four times in a million (by Poisson's distribution). So many blocks of the sample hardly ever
// reach a score beyond the k-th best.
Candidate* Selection::guess(int q, Candidate* items, Candidate* end, float& cut, double sampled) {
  const double expected = double(k_) * sampled;
  const int64_t rank = wrong_guesses_ ? 1 : int64_t(expected + 4.5 * std::sqrt(expected)) + 6;
  if (rank >= k_ || end - items < rank) return end;
  if (const int64_t some = rank + rank / 4 + 4; coarse_ && end - items > some + some / 2) {
    Candidate* top = items + some;
    std::nth_element(items, top - 1, end, better);
    Candidate* doubtful = std::partition(items, top, [](const Candidate& item) { return item.error == 0; });
    batch_.rescore(doubtful, top - doubtful, q);
  }
  const Certain certain(items, end);
  float floor = certain.floor(rank);
  const int64_t lacking = rank - blocks_that_reach(batch_.gallery, items, end, floor);
  if (lacking > 0) {
    floor = certain.floor(rank + 2 * lacking);
    if (blocks_that_reach(batch_.gallery, items, end, floor) < rank) return end;
  }
  if (windowed(q)) floor = std::min(floor, calibration_->lowest(certain.best()));
  if (!(floor > cut)) return end;
  guess_[size_t(q)] = cut = floor;
  return std::partition(items, end, [&](const Candidate& item) { return item.score + item.error >= floor; });
}

uint32_t Selection::settle(int q, Candidate* items, uint32_t fill, float& cut, double sampled) {
  Candidate* end = sharpen(q, items, drop_hopeless(q, items, items + fill, cut), cut);
  if (sampled > 0) end = guess(q, items, end, cut, sampled);
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
