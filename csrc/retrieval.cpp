#include "retrieval.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <numeric>
#include <optional>

#include "coded_blocks.h"
#include "selection.h"

namespace attribution {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
// Where there are fewer, candidates cost less than jumps in memory do.
constexpr int64_t guessed_queries = 16, guessed_k = 32;

int useful_threads(const Limits& limits, const Gallery& gallery) {
  return int(std::max<int64_t>(1, std::min<int64_t>(limits.threads, gallery.blocks())));
}

std::vector<std::vector<int64_t>> batches(const std::vector<int64_t>& rows, int64_t size) {
  std::vector<std::vector<int64_t>> all;
  for (size_t first = 0; first < rows.size(); first += size_t(size))
    all.emplace_back(rows.begin() + int64_t(first), rows.begin() + int64_t(std::min(first + size_t(size), rows.size())));
  return all;
}

std::vector<int64_t> all_of(const Queries& queries) {
  std::vector<int64_t> rows(size_t(queries.count));
  std::iota(rows.begin(), rows.end(), 0);
  return rows;
}

// Some queries, for the filters that a walk uses.
struct Filters {
  Filters(const Run& run, const Gallery& gallery, const Queries& queries, const std::vector<int64_t>& rows)
      : values(*run.set, gallery, queries.values, rows, queries.offset) {
    if (CodedBlocks::has(*run.set, gallery, values.count))
      codes.emplace(*run.set, gallery, queries.values, rows, queries.offset, Filter::codes);
    if (codes && Sieve::has(*run.set, gallery, values.count))
      sieve.emplace(*run.set, gallery, queries.values, rows, queries.offset);
  }
  const Batch* of_codes() const { return codes ? &*codes : nullptr; }

  Batch values;
  std::optional<Batch> codes;
  std::optional<Sieve> sieve;
};

// The first walk, of one batch. guess: whether cuts may be guesses. Returns whether they were right; the part is as it was if not.
bool gather(const Run& run, const Filters& filters, const Request& request, int64_t fresh, int64_t first_row, bool guess, Part* part) {
  const Batch& batch = filters.values;
  const int64_t rows = batch.gallery.rows(), top = std::max<int64_t>(1, std::min(request.k, rows));
  const bool softmax = request.calibration != nullptr && request.calibration->b == 0;
  Selection selection(batch, top, request.calibration, request.window, filters.codes && batch.gallery.center);
  std::vector<float> cut(size_t(batch.count), -infinity);
  std::vector<std::vector<SoftmaxSum>> sums(softmax ? size_t(run.team->size()) : 0, std::vector<SoftmaxSum>(size_t(batch.count)));
  Scan::Tally tally;
  if (softmax)
    tally = [&](int member, int q, const float* scores, int64_t count) {
      sums[size_t(member)][size_t(q)].add(*run.set, scores, count, request.calibration->inv_tau);
    };
  Scan scan(run, batch, filters.of_codes(), filters.sieve && !softmax ? &*filters.sieve : nullptr);
  const Scan::Settle settle = [&](int q, Candidate* items, uint32_t fill, double sampled) {
    return selection.settle(q, items, fill, cut[size_t(q)], sampled);
  };
  scan.select(cut, selection.keep(), fresh, 2 * top, settle, tally, guess);

  std::vector<uint32_t> left(size_t(batch.count));
  std::atomic<bool> missed{false};
  run.team->share(batch.count, [&](int q) {
    Candidate* items = scan.candidates(q);
    left[size_t(q)] = selection.finish(q, items, scan.fill(q), cut[size_t(q)]);
    if (selection.missed(q, cut[size_t(q)])) missed = true;
    put_in_order(request.k, items, items + left[size_t(q)]);
  });
  if (missed) return false;
  for (int q = 0; q < batch.count; ++q) {
    Candidate* items = scan.candidates(q);
    for (uint32_t i = 0; i < left[size_t(q)]; ++i) items[i].row += first_row;
    part->append(request, items, items + left[size_t(q)], selection.wide(q) && !softmax);
    if (!softmax) continue;
    part->sums.emplace_back();
    for (const std::vector<SoftmaxSum>& member : sums) part->sums.back().add(member[size_t(q)]);
  }
  return true;
}

// With guesses where they save something.
void gather(const Run& run, const Filters& filters, const Request& request, int64_t fresh, int64_t first_row, Part* part) {
  const bool softmax = request.calibration && request.calibration->b == 0;
  try {
    if (filters.values.count >= guessed_queries && request.k >= guessed_k && !softmax &&
        gather(run, filters, request, fresh, first_row, true, part))
      return;
  } catch (const std::invalid_argument&) {
    // of some row: the walk that takes them in order names the first
  }
  gather(run, filters, request, fresh, first_row, false, part);
}

// The second walk, of one batch: all the weight in the gallery for queries whose best score is known.
std::vector<Mass> weigh_batch(const Run& run, const Filters& filters, const Calibration& calibration, const std::vector<float>& best) {
  std::vector<float> cut;
  for (float score : best) cut.push_back(calibration.lowest(score));
  std::vector<std::vector<Mass>> masses(size_t(run.team->size()), std::vector<Mass>(best.size()));
  const Scan::Tally tally = [&](int member, int q, const float* scores, int64_t count) {
    masses[size_t(member)][size_t(q)].add(*run.set, calibration, scores, count, best[size_t(q)]);
  };
  const Scan::Visit visit = [&](int member, int q, Candidate* items, int64_t count) {
    if (items->error != 0) filters.values.rescore(items, count, q);
    float scores[block_rows];
    std::transform(items, items + count, scores, [](const Candidate& item) { return item.score; });
    masses[size_t(member)][size_t(q)].add(*run.set, calibration, scores, count, best[size_t(q)]);
  };
  Scan(run, filters.values, filters.of_codes(), nullptr).visit(cut, visit, tally);
  for (size_t member = 1; member < masses.size(); ++member)
    for (size_t q = 0; q < best.size(); ++q) masses[0][q].add(masses[member][q]);
  return masses[0];
}

int64_t fresh_of(const Request& request, const Gallery& gallery) {
  return std::max<int64_t>(1024, 2 * std::min(request.k, gallery.rows()));
}

// So many that their candidates stay within 32 MB.
int64_t batch_size(const Request& request, const Gallery& gallery, const Limits& limits, int threads) {
  const int64_t k = std::min(request.k, gallery.rows());
  const int64_t keep = gallery.center ? Selection::kept(k, request.window, true) : 2 * k + request.window;
  const int64_t bytes = Scan::capacity(keep, fresh_of(request, gallery), threads) * int64_t(sizeof(Candidate));
  return std::max<int64_t>(1, std::min(limits.query_batch, (int64_t(32) << 20) / bytes));
}

}  // namespace

Part retrieve_part(const Gallery& gallery, const Queries& queries, const Request& request, const Limits& limits,
                   const Interrupt& interrupted, int64_t first_row) {
  const BorrowedTeam team = borrow_team(useful_threads(limits, gallery));
  const Run run{choose_instruction_set(), team.get(), interrupted};
  Part part;
  for (const std::vector<int64_t>& rows : batches(all_of(queries), batch_size(request, gallery, limits, team->size())))
    gather(run, Filters(run, gallery, queries, rows), request, fresh_of(request, gallery), first_row, &part);
  return part;
}

std::vector<Mass> weigh(const Gallery& gallery, const Queries& queries, const Calibration& calibration, const float* best,
                        const std::vector<char>& which, const Limits& limits, const Interrupt& interrupted) {
  const BorrowedTeam team = borrow_team(useful_threads(limits, gallery));
  const Run run{choose_instruction_set(), team.get(), interrupted};
  std::vector<int64_t> wanted;
  for (int64_t q = 0; q < queries.count; ++q)
    if (which[size_t(q)]) wanted.push_back(q);
  std::vector<Mass> masses(size_t(queries.count));
  for (const std::vector<int64_t>& rows : batches(wanted, limits.query_batch)) {
    std::vector<float> batch_best;
    for (int64_t q : rows) batch_best.push_back(best[q]);
    const std::vector<Mass> some = weigh_batch(run, Filters(run, gallery, queries, rows), calibration, batch_best);
    for (size_t i = 0; i < rows.size(); ++i) masses[size_t(rows[i])] = some[i];
  }
  return masses;
}

void retrieve(const Gallery& gallery, const Queries& queries, const Request& request, const Limits& limits,
              const Interrupt& interrupted, const Found& found) {
  const BorrowedTeam team = borrow_team(useful_threads(limits, gallery));
  const Run run{choose_instruction_set(), team.get(), interrupted};
  for (const std::vector<int64_t>& rows : batches(all_of(queries), batch_size(request, gallery, limits, team->size()))) {
    Part part;
    gather(run, Filters(run, gallery, queries, rows), request, fresh_of(request, gallery), 0, &part);
    std::vector<int64_t> wide_rows;
    std::vector<float> wide_best;
    for (int64_t q = 0; q < part.queries(); ++q) {
      if (!needs_mass(request, part, q)) continue;
      wide_rows.push_back(rows[size_t(q)]);
      wide_best.push_back(part.of(q)->score);
    }
    std::vector<Mass> masses;
    if (!wide_rows.empty())
      masses = weigh_batch(run, Filters(run, gallery, queries, wide_rows), *request.calibration, wide_best);
    size_t next = 0;
    for (int64_t q = 0; q < part.queries(); ++q) {
      const Mass* mass = needs_mass(request, part, q) ? &masses[next++] : nullptr;
      conclude(*run.set, request, part, q, mass, gallery.rows(), found, rows[size_t(q)]);
    }
  }
}

void count_larger(const Gallery& gallery, const Queries& queries, const double* thresholds, int count, bool or_equal,
                  const Limits& limits, const Interrupt& interrupted, int64_t* larger) {
  const BorrowedTeam team = borrow_team(useful_threads(limits, gallery));
  const Run run{choose_instruction_set(), team.get(), interrupted};
  for (const std::vector<int64_t>& rows : batches(all_of(queries), limits.query_batch)) {
    const Filters filters(run, gallery, queries, rows);
    Scan(run, filters.values, filters.of_codes(), nullptr)
        .count(thresholds + rows[0] * count, count, or_equal, larger + rows[0] * count);
  }
}

void canonical_scores(const Gallery& gallery, const Queries& queries, const int64_t* ids, int64_t count, float* scores) {
  const InstructionSet* set = choose_instruction_set();
  std::vector<Candidate> items(static_cast<size_t>(count));
  for (const std::vector<int64_t>& rows : batches(all_of(queries), 256)) {
    const Batch batch(*set, gallery, queries.values, rows, queries.offset);
    for (int q = 0; q < batch.count; ++q) {
      const int64_t at = rows[size_t(q)] * count;
      int64_t used = 0;
      for (int64_t i = 0; i < count; ++i)
        if (ids[at + i] >= 0) items[size_t(used++)].row = ids[at + i];
      batch.rescore(items.data(), used, q);
      used = 0;
      for (int64_t i = 0; i < count; ++i) scores[at + i] = ids[at + i] < 0 ? -infinity : items[size_t(used++)].score;
    }
  }
}

}  // namespace attribution
