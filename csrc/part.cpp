#include "part.h"

#include <algorithm>
#include <limits>

namespace attribution {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

}  // namespace

// partial_sort is a heap sort, which takes longer where k are most of them.
void put_in_order(int64_t k, Candidate* first, Candidate* last) {
  Candidate* top = first + std::min<int64_t>(k, last - first);
  if (top != last) std::nth_element(first, top, last, better);
  std::sort(first, top, better);
}

void Part::append(const Request& request, Candidate* first, Candidate* last, bool is_wide) {
  Candidate* top = first + std::min<int64_t>(request.k, last - first);
  Candidate* end = top;
  if (request.calibration != nullptr && request.calibration->b < 0 && !is_wide && top != first) {
    end = std::partition(top, last, [&](const Candidate& item) { return request.calibration->weight(item.score, first->score) > 0; });
    if (end - top > request.window) {
      is_wide = true;
      end = top;
    }
  }
  items.insert(items.end(), first, end);
  begin.push_back(int64_t(items.size()));
  wide.push_back(is_wide);
}

Part merge(const Request& request, const std::vector<const Part*>& parts) {
  Part merged;
  std::vector<Candidate> items;
  for (int64_t q = 0; q < parts[0]->queries(); ++q) {
    items.clear();
    bool wide = false;
    SoftmaxSum sum;
    for (const Part* part : parts) {
      items.insert(items.end(), part->of(q), part->of(q) + part->count(q));
      wide |= part->wide[size_t(q)] != 0;
      if (!part->sums.empty()) sum.add(part->sums[size_t(q)]);
    }
    put_in_order(request.k, items.data(), items.data() + items.size());
    merged.append(request, items.data(), items.data() + items.size(), wide);
    if (request.calibration != nullptr && request.calibration->b == 0) merged.sums.push_back(sum);
  }
  return merged;
}

bool needs_mass(const Request& request, const Part& part, int64_t q) {
  if (request.calibration == nullptr || part.count(q) == 0) return false;
  return part.wide[size_t(q)] || (!part.sums.empty() && part.sums[size_t(q)].beyond);
}

void conclude(const InstructionSet& set, const Request& request, const Part& part, int64_t q, const Mass* mass, int64_t all_rows, const Found& found,
              int64_t to) {
  const Candidate* items = part.of(q);
  const int64_t k = request.k, shown = std::min(k, part.count(q));
  for (int64_t i = 0; i < k; ++i) {
    found.ids[to * k + i] = i < shown ? items[i].row : -1;
    found.scores[to * k + i] = i < shown ? items[i].score : -infinity;
  }
  if (request.calibration == nullptr) return;
  const Calibration& calibration = *request.calibration;
  float* influence = found.influence + to * k;
  std::fill(influence, influence + k, 0.0f);
  found.support[to] = calibration.b == 0 ? all_rows : 0;
  found.shown[to] = found.remainder[to] = 0;
  if (shown == 0) return;

  if (!part.sums.empty() && !part.sums[size_t(q)].beyond) {
    const SoftmaxSum& all = part.sums[size_t(q)];
    const double total = all.value(all.top);
    SoftmaxSum together;
    for (int64_t i = 0; i < shown; ++i) {
      SoftmaxSum one;
      one.add(set, &items[i].score, 1, calibration.inv_tau);
      together.add(one);
      influence[i] = float(one.value(all.top) / total);
    }
    found.shown[to] = float(together.value(all.top) / total);
    found.remainder[to] = float(all.without(together).value(all.top) / total);
    return;
  }
  Mass own;
  if (mass == nullptr) {
    for (int64_t i = 0; i < part.count(q); ++i) own.add(calibration.weight(items[i].score, items[0].score));
    mass = &own;
  }
  const double total = as_double(mass->sum) * 0x1p-62;
  WeightSum together = 0;
  for (int64_t i = 0; i < shown; ++i) {
    const double weight = calibration.weight(items[i].score, items[0].score);
    together += Mass::quantized(weight);
    influence[i] = float(weight / total);
  }
  if (calibration.b < 0) found.support[to] = mass->count;
  found.shown[to] = float(as_double(together) * 0x1p-62 / total);
  found.remainder[to] = float(as_double(mass->sum - together) * 0x1p-62 / total);
}

}  // namespace attribution
