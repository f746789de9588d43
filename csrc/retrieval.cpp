#include "retrieval.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace attribution {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

bool better(const Candidate& a, const Candidate& b) { return a.score > b.score || (a.score == b.score && a.row < b.row); }

// The top k of what a query has seen so far, and the window of scores that have weight beside the best one.
class Selection {
 public:
  Selection(const Gallery& gallery, const Batch& batch, int64_t k, const Calibration* calibration, int64_t window)
      : gallery_(gallery), batch_(batch), k_(k), calibration_(calibration), window_(window),
        wide_(size_t(batch.count), calibration != nullptr && calibration->b == 0) {}

  bool wide(int q) const { return wide_[size_t(q)]; }

  // A prefix's k-th best never exceeds the final one and its best score neither: what falls below both cuts now has
  // k better items and no weight in the end.
  uint32_t settle(int q, Candidate* items, uint32_t fill, float& cut) {
    Candidate* end = drop_hopeless(q, items, items + fill);
    for (Candidate* item = items; item != end; ++item) {
      if (item->error == 0) continue;
      item->score = batch_.canonical(gallery_, gallery_.row(item->row), q);
      item->error = 0;
    }
    if (end - items > k_) std::nth_element(items, items + (k_ - 1), end, better);
    Candidate* top = items + std::min<int64_t>(k_, end - items);
    const float kth = end - items >= k_ ? std::max_element(items, top, better)->score : -infinity;
    if (calibration_ == nullptr || wide(q) || top == items) {
      cut = kth;
      return uint32_t(top - items);
    }
    const float best = std::min_element(items, top, better)->score;
    Candidate* kept = std::partition(top, end, [&](const Candidate& item) { return calibration_->weight(item.score, best) > 0; });
    if (kept - top > window_) {
      wide_[size_t(q)] = true;
      cut = kth;
      return uint32_t(top - items);
    }
    cut = std::min(kth, calibration_->lowest(best));
    return uint32_t(kept - items);
  }

 private:
  // Without re-scoring: k items are certainly as good as `floor`, so an item that is certainly worse can go.
  Candidate* drop_hopeless(int q, Candidate* items, Candidate* end) const {
    if (end - items <= k_) return end;
    std::vector<float> surely(size_t(end - items));
    std::transform(items, end, surely.begin(), [](const Candidate& item) { return std::nextafter(item.score - item.error, -infinity); });
    std::nth_element(surely.begin(), surely.begin() + (k_ - 1), surely.end(), std::greater<float>());
    float floor = surely[size_t(k_ - 1)];
    if (calibration_ != nullptr && !wide(q))
      floor = std::min(floor, calibration_->lowest(*std::max_element(surely.begin(), surely.begin() + k_)));
    return std::partition(items, end, [&](const Candidate& item) { return std::nextafter(item.score + item.error, infinity) >= floor; });
  }

  const Gallery& gallery_;
  const Batch& batch_;
  const int64_t k_;
  const Calibration* calibration_;
  const int64_t window_;
  std::vector<char> wide_;
};

struct Mass {
  WeightSum sum = 0;
  int64_t count = 0;

  void add(double weight) {
    if (!(weight > 0)) return;
    sum += quantized(weight);
    ++count;
  }
};

// All the weight in the gallery for queries whose best score is known: the second walk.
std::vector<Mass> weigh(const Run& run, const Gallery& gallery, const Batch& batch, const Calibration& calibration,
                        const std::vector<float>& best, int64_t fresh) {
  std::vector<Mass> masses(size_t(batch.count));
  std::vector<float> cut;
  for (float score : best) cut.push_back(calibration.lowest(score));
  Scan scan(run, gallery, batch, 0, fresh);
  scan.walk(cut, gallery.rows(), [&](int q, Candidate* items, uint32_t fill) {
    for (uint32_t i = 0; i < fill; ++i) {
      const float score = items[i].error == 0 ? items[i].score : batch.canonical(gallery, gallery.row(items[i].row), q);
      masses[size_t(q)].add(calibration.weight(score, best[size_t(q)]));
    }
    return 0u;
  });
  return masses;
}

void write_items(const Candidate* items, int64_t count, int64_t k, int64_t q, const Found& found) {
  for (int64_t i = 0; i < k; ++i) {
    found.ids[q * k + i] = i < count ? items[i].row : -1;
    found.scores[q * k + i] = i < count ? items[i].score : -infinity;
  }
}

void write_influence(const Candidate* items, int64_t count, int64_t k, int64_t q, const Calibration& calibration,
                     const Mass& all, const Found& found) {
  WeightSum shown = 0;
  const double total = as_double(all.sum);
  for (int64_t i = 0; i < k; ++i) {
    const double weight = i < count ? calibration.weight(items[i].score, items[0].score) : 0;
    shown += quantized(weight);
    found.influence[q * k + i] = weight > 0 ? float(weight / total) : 0.0f;
  }
  found.support[q] = all.count;
  found.shown[q] = count > 0 ? float(as_double(shown) / total) : 0.0f;
  found.remainder[q] = count > 0 ? float(as_double(all.sum - shown) / total) : 0.0f;
}

int useful_threads(const Limits& limits, const Gallery& gallery) {
  return int(std::max<int64_t>(1, std::min<int64_t>(limits.threads, gallery.blocks())));
}

std::vector<std::vector<int64_t>> batches(int64_t count, int64_t size) {
  std::vector<std::vector<int64_t>> all;
  for (int64_t first = 0; first < count; first += size) {
    all.emplace_back(size_t(std::min(size, count - first)));
    std::iota(all.back().begin(), all.back().end(), first);
  }
  return all;
}

}  // namespace

void retrieve(const Gallery& gallery, const Queries& queries, int64_t k, const Calibration* calibration,
              const Limits& limits, const std::function<bool()>& interrupted, const Found& found) {
  Team team(useful_threads(limits, gallery));
  const Run run{choose_kernels(), &team, interrupted};
  const int64_t window = calibration != nullptr && calibration->b < 0 ? limits.window : 0;
  const int64_t top = std::max<int64_t>(1, std::min(k, gallery.rows()));
  const int64_t fresh = std::max<int64_t>(1024, 2 * top);
  const int64_t bytes_per_query = Scan::capacity(top + window, fresh, team.size()) * int64_t(sizeof(Candidate));
  const int64_t batch_size = std::max<int64_t>(1, std::min(limits.query_batch, (int64_t(32) << 20) / bytes_per_query));
  for (const std::vector<int64_t>& rows : batches(queries.count, batch_size)) {
    const Batch batch(*run.kernels, queries.values, gallery.dim, rows, queries.offset);
    Selection selection(gallery, batch, top, calibration, window);
    Scan scan(run, gallery, batch, top + window, fresh);
    std::vector<float> cut(rows.size(), -infinity);
    scan.walk(cut, 2 * top, [&](int q, Candidate* items, uint32_t fill) { return selection.settle(q, items, fill, cut[size_t(q)]); });

    std::vector<int64_t> wide_rows;
    std::vector<float> wide_best;
    std::vector<std::vector<Candidate>> kept(rows.size());
    for (int q = 0; q < batch.count; ++q) {
      kept[size_t(q)].assign(scan.candidates(q), scan.candidates(q) + scan.fill(q));
      std::sort(kept[size_t(q)].begin(), kept[size_t(q)].end(), better);
      if (!selection.wide(q) || kept[size_t(q)].empty()) continue;
      wide_rows.push_back(rows[size_t(q)]);
      wide_best.push_back(kept[size_t(q)][0].score);
    }
    std::vector<Mass> wide_masses;
    if (!wide_rows.empty()) {
      const Batch wide(*run.kernels, queries.values, gallery.dim, wide_rows, queries.offset);
      wide_masses = weigh(run, gallery, wide, *calibration, wide_best, top + window + fresh);
    }
    size_t next_wide = 0;
    for (int q = 0; q < batch.count; ++q) {
      const std::vector<Candidate>& items = kept[size_t(q)];
      const int64_t count = std::min<int64_t>(k, int64_t(items.size()));
      write_items(items.data(), count, k, rows[size_t(q)], found);
      if (calibration == nullptr) continue;
      Mass mass;
      if (selection.wide(q) && !items.empty())
        mass = wide_masses[next_wide++];
      else
        for (const Candidate& item : items) mass.add(calibration->weight(item.score, items[0].score));
      write_influence(items.data(), count, k, rows[size_t(q)], *calibration, mass, found);
    }
  }
}

void count_larger(const Gallery& gallery, const Queries& queries, const double* thresholds, int count, bool or_equal,
                  const Limits& limits, const std::function<bool()>& interrupted, int64_t* larger) {
  Team team(useful_threads(limits, gallery));
  const Run run{choose_kernels(), &team, interrupted};
  for (const std::vector<int64_t>& rows : batches(queries.count, limits.query_batch)) {
    const Batch batch(*run.kernels, queries.values, gallery.dim, rows, queries.offset);
    Scan scan(run, gallery, batch, 0, 1024);
    const double* batch_thresholds = thresholds + rows[0] * count;
    std::vector<int64_t> certain(rows.size() * size_t(count), 0);
    std::vector<int64_t> settled(rows.size() * size_t(count), 0);
    scan.walk_counting(batch_thresholds, count, certain, [&](int q, Candidate* items, uint32_t fill) {
      for (uint32_t i = 0; i < fill; ++i) {
        // A candidate of the careful path carries its canonical score and was counted nowhere.
        const bool canonical = items[i].error == 0;
        const float score = canonical ? items[i].score : batch.canonical(gallery, gallery.row(items[i].row), q);
        for (int t = 0; t < count; ++t) {
          const size_t at = size_t(q) * size_t(count) + size_t(t);
          const double threshold = batch_thresholds[at];
          if (!canonical && (items[i].score > Scan::high(threshold, items[i].error) ||
                             !(items[i].score >= Scan::low(threshold, items[i].error))))
            continue;  // the kernel was certain
          settled[at] += or_equal ? double(score) >= threshold : double(score) > threshold;
        }
      }
      return 0u;
    });
    for (size_t i = 0; i < certain.size(); ++i) larger[rows[0] * count + int64_t(i)] = certain[i] + settled[i];
  }
}

void canonical_scores(const Gallery& gallery, const Queries& queries, const int64_t* ids, int64_t count, float* scores) {
  const Kernels* kernels = choose_kernels();
  for (const std::vector<int64_t>& rows : batches(queries.count, 256)) {
    const Batch batch(*kernels, queries.values, gallery.dim, rows, queries.offset);
    for (int q = 0; q < batch.count; ++q)
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = rows[size_t(q)] * count + i;
        scores[at] = ids[at] < 0 ? -infinity : batch.canonical(gallery, gallery.row(ids[at]), q);
      }
  }
}

}  // namespace attribution
