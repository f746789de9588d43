#include <cmath>
#include <cstring>
#include <utility>

#include "scan_member.h"

namespace attribution {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

// Neighbouring blocks that a thread takes in one turn: memory is read at its full pace only by those who jump seldom. Of
// 512 MB in turns of 96 kB two threads read 0.65 of what they read in turns of 1.5 MB.
constexpr int64_t turn_bytes = 8 << 20;
constexpr int64_t turn_candidates = (4 << 20) / int64_t(sizeof(Candidate));  // of all queries and threads

// Upwards to three bits of mantissa, so that thresholds seldom change from block to block; never to infinity.
float coarse(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t up = (bits + 0xfffffu) & ~0xfffffu;
  if (up < 0x7f800000u) bits = up;
  std::memcpy(&value, &bits, 4);
  return value;
}

float below(double value) {
  return std::isfinite(value) ? float(value - std::fabs(value) * 0x1p-22 - 0x1p-148) : float(value);
}

bool finite_row(const unsigned char* row, Storage storage, int dim) {
  const uint32_t exponent = storage == Storage::float32 ? 0x7f800000u : storage == Storage::float16 ? 0x7c00u : 0x7f80u;
  for (int d = 0; d < dim; ++d) {
    uint32_t bits = 0;
    std::memcpy(&bits, row + d * bytes_of(storage), size_t(bytes_of(storage)));
    if ((bits & exponent) == exponent) return false;
  }
  return true;
}

}  // namespace

Scan::Scan(const Run& run, const Batch& batch, const Batch* codes, const Sieve* sieve)
    : run_(run), gallery_(batch.gallery), batch_(batch), codes_(codes), sieve_(sieve), order_(batch.gallery.blocks(), false) {
  always_codes_ = told_of_codes("always");
  const int64_t row_bytes = sieve ? sketch_bytes(gallery_.dim) : codes && gallery_.center ? code_bytes(gallery_.dim) : gallery_.dim * bytes_of(gallery_.storage);
  longest_turn_ = std::max<int64_t>(1, turn_bytes / (block_rows * row_bytes));
}

float Scan::low(double threshold, float error) { return below(threshold - double(error)); }
float Scan::high(double threshold, float error) { return -below(-(threshold + double(error))); }

std::vector<Scan::Member> Scan::members(int thresholds) {
  std::vector<Member> all;
  all.reserve(size_t(run_.team->size()));
  for (int id = 0; id < run_.team->size(); ++id) {
    all.emplace_back(*this, id, thresholds);
    if (tally_ != nullptr) all.back().dense = AlignedBytes(run_.set->canonical_scratch_bytes(gallery_.dim) + dense_bytes);
    if (sieve_ != nullptr) {
      all.back().promising.resize(size_t(batch_.count));
      all.back().promise.assign(size_t(batch_.count), -infinity);
      all.back().codes_of_passed = AlignedBytes(block_rows * code_bytes(gallery_.dim));
    }
  }
  return all;
}

void Scan::refuse(int64_t row, const std::string& why) {
  std::lock_guard<std::mutex> lock(refusal_mutex_);
  // Turns are begun in order and finished once begun: the lowest row found is the first there is.
  if (refused_row_ < 0 || row < refused_row_) {
    refused_row_ = row;
    refusal_ = why;
  }
  stop_ = true;
}

void Scan::push_exact(Member& member, int query, const Candidate& item) {
  member.buffer[size_t(query * own_capacity) + member.fill[size_t(query)]++] = item;
}

// Adds the member's candidates of a query to those of all.
void Scan::pour(Member& member, int query) {
  uint32_t& fill = member.fill[size_t(query)];
  const uint32_t slot = __atomic_fetch_add(&fill_[size_t(query)], fill, __ATOMIC_RELAXED);
  // Whoever writes past the mark has raised `full` in its own sight: turns under way end beyond it, and no others.
  if (slot + fill >= high_water_) __atomic_store_n(&full_, 1, __ATOMIC_SEQ_CST);
  std::copy_n(member.buffer.get() + query * own_capacity, fill, candidates(query) + slot);
  fill = 0;
}

void Scan::pour_many(Member& member, int query) {
  if (member.fill[size_t(query)] >= own_candidates) pour(member, query);
}

// Of a block whose codes were made just now the values are in cache: float32 shows that few candidates reach the cut.
void Scan::look_closely(const Block& block, const Side& side, Member& member, int query) {
  Candidate* items = member.buffer.get() + query * own_capacity;
  uint32_t& fill = member.fill[size_t(query)];
  uint32_t first = fill;  // of this block's, which were added last
  while (first > 0 && items[first - 1].row >= block.first_row && items[first - 1].row < block.first_row + block.count) --first;
  if (first == fill) return;
  float scores[block_rows];
  side.batch->close_scores(block, items + first, int(fill - first), query, scores);
  const float error = side.close_error[size_t(query)], lowest = low(double((*cut_)[size_t(query)]), error);
  const float* score = scores;
  for (const uint32_t end = std::exchange(fill, first); first < end; ++first, ++score)
    if (*score >= lowest) items[fill++] = Candidate{items[first].row, *score, error};
}

void Scan::hand_over(const Block& block, const Side& side, Member& member, int first, int queries) {
  for (int q = first; q < first + queries; ++q) {
    uint32_t& fill = member.fill[size_t(q)];
    if (thresholds_ == nullptr && visit_ == nullptr) {
      pour_many(member, q);
    } else if (fill != 0) {
      if (thresholds_ != nullptr)
        decide(block, side, member, q);
      else
        (*visit_)(member.id, q, member.buffer.get() + q * own_capacity, fill);
      fill = 0;
    }
  }
}

// A block in which something is not finite, or so large that the fast kernel could overflow; queries from `first` on.
void Scan::carefully(const Block& block, int first, Member& member) {
  for (int r = 0; r < block.count; ++r) {
    const std::string where = "gallery row " + std::to_string(block.first_row + r);
    if (block.scale && !(std::isfinite(block.scale[r]) && block.scale[r] >= 0))
      return refuse(block.first_row + r, where + ": wanted a finite scale >= 0, got " + std::to_string(block.scale[r]));
    if (!finite_row(block.rows + r * block.stride, gallery_.storage, gallery_.dim))
      return refuse(block.first_row + r, where + ": wanted finite values, got NaN or infinity");
  }
  for (int q = first; q < batch_.count; ++q) {
    for (int r = 0; r < block.count; ++r) {
      Candidate item{block.first_row + r, 0, 0};
      try {
        batch_.rescore(&item, 1, q);
      } catch (const std::invalid_argument& error) {
        refuse(item.row, error.what());
        break;
      }
      if (cut_ == nullptr || item.score >= (*cut_)[size_t(q)]) push_exact(member, q, item);
    }
    hand_over(block, member.values, member, q, 1);
  }
}

void Scan::densely(const Block& block, Member& member) {
  double* dots = reinterpret_cast<double*>(member.dense.data());
  float* scores = reinterpret_cast<float*>(dots + dense_values);
  double* scratch = reinterpret_cast<double*>(member.dense.data() + dense_bytes);
  for (int r = 0; r < block.count && block.scale != nullptr; ++r)
    if (!(std::isfinite(block.scale[r]) && block.scale[r] >= 0)) return carefully(block, 0, member);
  for (int first = 0; first < batch_.count; first += Batch::dense_group) {
    const int some = std::min(Batch::dense_group, batch_.count - first);
    if (!batch_.dense(block, first, some, scratch, dots, scores)) return carefully(block, 0, member);
    for (int q = 0; q < some; ++q) {
      const float* line = scores + q * block_rows;
      (*tally_)(member.id, first + q, line, block.count);
      if (visit_ != nullptr) continue;
      const float cut = (*cut_)[size_t(first + q)];
      for (int r = 0; r < block.count; ++r)
        if (line[r] >= cut) push_exact(member, first + q, Candidate{block.first_row + r, line[r], 0});
      hand_over(block, member.values, member, first + q, 1);
    }
  }
}

void Scan::set_thresholds(Prepared& prepared, Side& side) const {
  prepared.largest_norm = coarse(prepared.largest_norm);
  prepared.largest_scale = coarse(prepared.largest_scale);
  prepared.largest_shift = coarse(prepared.largest_shift);
  if (!side.stale && side.norm == prepared.largest_norm && side.scale == prepared.largest_scale &&
      side.shift == prepared.largest_shift)
    return;
  side.stale = false;
  side.norm = prepared.largest_norm;
  side.scale = prepared.largest_scale;
  side.shift = prepared.largest_shift;
  side.batch->bound(prepared, side.error.data());
  if (thresholds_ != nullptr || codes_are_made()) side.batch->bound_closely(prepared, side.close_error.data());
  for (int q = 0; q < batch_.count; ++q) {
    const float error = side.error[size_t(q)];
    float lowest = cut_ != nullptr ? low(double((*cut_)[size_t(q)]), error) : infinity;
    for (int t = 0; t < threshold_count_; ++t) {
      const double threshold = thresholds_[int64_t(q) * threshold_count_ + t];
      const size_t at = size_t(t) * size_t(batch_.padded) + size_t(q);
      side.low[at] = low(threshold, error);
      side.high[at] = high(threshold, error);
      lowest = std::fmin(lowest, side.low[at]);
    }
    side.threshold[size_t(q)] = lowest;
  }
}

// Candidates of one block and the group of queries that begins at `first`. Returns how many there are.
int64_t Scan::propose(const Prepared& prepared, int first, const Side& side, Member& member) {
  const Batch& batch = *side.batch;
  const Emission to{side.threshold.data(), side.error.data(), batch.offset.empty() ? nullptr : batch.offset.data(),
                    member.buffer.get(), own_capacity, member.fill.data(), prepared.shift ? batch.weight.data() : nullptr, batch.per_norm.data()};
  if (thresholds_ == nullptr)
    return batch.kernels.emit(prepared, batch.panels.data(), batch.count, gallery_.dim, first, to);
  const Counting counting{threshold_count_, side.low.data(), side.high.data(), member.larger.data()};
  return batch.kernels.count(prepared, batch.panels.data(), batch.count, gallery_.dim, first, to, counting);
}

// By its codes. Returns the first query that must be taken without them: those for which codes say too little, and all of
// a block whose numbers could leave the range of float.
int Scan::take_codes(int64_t index, int64_t following, Member& member) {
  if (member.uncoded_blocks > 0) {
    --member.uncoded_blocks;
    return 0;
  }
  Side& side = *member.codes;
  const Block values = gallery_.block(index);
  const Block block = member.coded_blocks->block(index, following);
  Prepared prepared;
  codes_->kernels.prepare(block, gallery_.storage, codes_->panels.data(), batch_.count, gallery_.dim, side.scratch.data(),
                          &prepared);
  if (codes_->overflows(prepared)) return 0;
  // Counts compare with one threshold for all rows, which knows the block's largest shift; candidates bring their own.
  if (thresholds_ == nullptr)
    prepared.largest_shift = 0;
  else
    prepared.shift = nullptr;
  set_thresholds(prepared, side);
  for (int first = 0; first < batch_.count;) {
    const int some = std::min(batch_.kernels.group(batch_.count - first), batch_.count - first);
    const int64_t found = propose(prepared, first, side, member);
    const bool at_once = visit_ != nullptr || thresholds_ != nullptr;
    if (found > 0 && codes_are_made() && !at_once)
      for (int q = first; q < first + some; ++q) look_closely(values, side, member, q);
    hand_over(values, side, member, first, some);
    first += some;
    // A candidate costs what codes save on so many products, and less is saved where more queries share a row's bytes.
    // One that is visited or decided is scored at once.
    const int products = (codes_are_made() ? 6144 : batch_.count < 4 ? 4096 : batch_.count <= 8 ? 8192 : 24576) * (at_once ? 4 : 1);
    const int64_t dearer = std::max(1, products / gallery_.dim);
    if (dearer * found > int64_t(block.count) * some && !always_codes_) {
      member.uncoded_blocks = member.patience;
      member.patience = std::min(2 * member.patience, 4096);
      return first;
    }
  }
  member.patience = std::max(8, member.patience - 1);
  return batch_.count;
}

void Scan::take(int64_t index, int64_t following, Member& member) {
  Block block = gallery_.block(index);
  if (following < gallery_.blocks()) block.ahead = gallery_.block(following).rows;
  if (tally_ != nullptr && (visit_ == nullptr || member.dense_blocks > 0)) {
    --member.dense_blocks;
    return densely(block, member);
  }
  int first = codes_ != nullptr ? take_codes(index, following, member) : 0;
  if (first == batch_.count) return;
  Prepared prepared;
  batch_.kernels.prepare(block, gallery_.storage, batch_.panels.data(), batch_.count, gallery_.dim, member.values.scratch.data(),
                         &prepared);
  if (batch_.overflows(prepared)) return carefully(block, first, member);
  set_thresholds(prepared, member.values);
  int64_t found = 0;
  for (; first < batch_.count; first += batch_.kernels.group(batch_.count - first)) {
    found += propose(prepared, first, member.values, member);
    hand_over(block, member.values, member, first, std::min(batch_.kernels.group(batch_.count - first), batch_.count - first));
  }
  // One by one, a candidate costs about eight times its share of a block scored as a whole, less so for few queries.
  const int64_t dearer = batch_.count < 4 ? 2 : 8;
  if (tally_ != nullptr && dearer * found > int64_t(block.count) * batch_.count) member.dense_blocks = 15;
}

bool Scan::time_to_ask() {
  if (!run_.interrupted) return false;
  const auto now = std::chrono::steady_clock::now();
  if (now - asked_ < std::chrono::milliseconds(50)) return false;
  asked_ = now;
  return true;
}

// Blocks from begin on, up to end or until a buffer is full; `next` is left at the first block that nobody took. take: of a
// block and the one that the same thread will probably take next; done: after each turn.
void Scan::take_turns(int64_t begin, int64_t end, std::atomic<int64_t>& next, const Take& take, const Done& done) {
  next = begin;
  full_ = 0;
  bool interrupted = false;
  run_.team->run([&](int id) {
    while (!stop_ && __atomic_load_n(&full_, __ATOMIC_SEQ_CST) == 0) {
      int64_t index = next, turn;
      do turn = std::clamp((end - index) / (2 * run_.team->size()), int64_t(1), longest_turn_);
      while (index < end && !next.compare_exchange_weak(index, index + turn));
      if (index >= end) break;
      for (const int64_t after = index + turn; index < after; ++index) {
        take(id, index, index + 1 < after ? index + 1 : index + 1 + (run_.team->size() - 1) * turn);
        if (id == 0 && ++taken_ % 8 == 0 && time_to_ask() && run_.interrupted()) interrupted = stop_ = true;
      }
      if (done) done(id);
    }
  });
  if (interrupted) throw Interrupted();
  if (refused_row_ >= 0) throw std::invalid_argument(refusal_);
  if (next > end) next = end;
}

void Scan::stretch(int64_t begin, int64_t end, std::vector<Member>& members, std::atomic<int64_t>& next) {
  for (Member& member : members) {
    member.values.stale = true;
    if (member.codes) member.codes->stale = true;
  }
  const auto block = [this](int64_t index) { return index < gallery_.blocks() ? order_.block(index) : index; };
  take_turns(begin, end, next,
             [&](int id, int64_t index, int64_t following) { take(block(index), block(following), members[size_t(id)]); }, nullptr);
}

void Scan::select(std::vector<float>& cut, int64_t keep, int64_t fresh, int64_t first_rows, const Settle& settle,
                  const Tally& tally, bool sample) {
  order_ = BlockOrder(gallery_.blocks(), sample);
  cut_ = &cut;
  tally_ = tally ? &tally : nullptr;
  longest_turn_ = std::clamp(turn_candidates / (int64_t(batch_.count) * run_.team->size() * block_rows), int64_t(1), longest_turn_);
  capacity_ = capacity(keep, fresh, run_.team->size() * longest_turn_);
  high_water_ = uint32_t(keep + fresh);
  buffer_.reset(new Candidate[size_t(batch_.count * capacity_)]);
  fill_.assign(size_t(batch_.count), 0);
  std::vector<Member> own = members(0);
  std::atomic<int64_t> next{0};
  int64_t length = (first_rows + block_rows - 1) / block_rows;
  const SettleQuery settle_query = [&](int q) {
    for (Member& member : own) pour(member, q);
    fill_[size_t(q)] = settle(q, candidates(q), fill_[size_t(q)], next <= order_.sampled() ? order_.share(next) : 0);
  };
  if (sieve_ != nullptr && worth_sifting(first_rows)) sift(own, first_rows, next, settle_query);
  while (next < gallery_.blocks()) {
    const int64_t end = next < order_.sampled() ? order_.sampled() : gallery_.blocks();
    stretch(next, std::min(end, next + length), own, next);
    // Fewer candidates come from slow growth, fewer pauses of the team from fast growth.
    length = batch_.count >= 16 ? int64_t(next) : 3 * next;
    run_.team->share(batch_.count, settle_query);
  }
}

void Scan::visit(const std::vector<float>& cut, const Visit& visit, const Tally& tally) {
  cut_ = &cut;
  visit_ = &visit;
  tally_ = &tally;
  std::vector<Member> own = members(0);
  std::atomic<int64_t> next{0};
  stretch(0, gallery_.blocks(), own, next);
}

}  // namespace attribution
