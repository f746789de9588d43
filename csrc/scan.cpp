#include "scan.h"

#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>

namespace attribution {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

// Upwards to three bits of mantissa, so that thresholds seldom change from block to block.
float coarse(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = (bits + 0xfffffu) & ~0xfffffu;
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

float Scan::low(double threshold, float error) { return below(threshold - double(error)); }
float Scan::high(double threshold, float error) { return -below(-(threshold + double(error))); }

// One thread's own memory.
struct Scan::Member {
  Member(const Scan& scan, int thresholds)
      : scratch(scan.batch_.kernels.scratch_bytes(scan.gallery_.storage, scan.batch_.dim)),
        threshold(scan.batch_.padded, infinity),
        error(scan.batch_.padded, 0.0f),
        low(size_t(thresholds) * scan.batch_.padded, infinity),
        high(size_t(thresholds) * scan.batch_.padded, infinity),
        larger(size_t(thresholds) * scan.batch_.padded, 0) {}

  AlignedBytes scratch;
  std::vector<float> threshold, error, low, high;
  std::vector<uint32_t> larger;
  const double* thresholds = nullptr;  // [queries][count], when counting
  int count = 0;
  bool fresh = true;  // the cuts have moved since `threshold` was made
  float norm = -1, scale = -1, shift = -1;
};

Scan::Scan(const Run& run, const Gallery& gallery, const Batch& batch, int64_t keep, int64_t fresh)
    : run_(run),
      gallery_(gallery),
      batch_(batch),
      capacity_(capacity(keep, fresh, run.team->size())),
      high_water_(uint32_t(keep + fresh)),
      buffer_(new Candidate[size_t(batch.count * capacity_)]),
      fill_(size_t(batch.count), 0) {}

void Scan::refuse(int64_t row, const std::string& why) {
  std::lock_guard<std::mutex> lock(refusal_mutex_);
  // Blocks are begun in order and finished once begun: the lowest row found is the first there is.
  if (refused_row_ < 0 || row < refused_row_) {
    refused_row_ = row;
    refusal_ = why;
  }
  stop_ = true;
}

void Scan::carefully(const Block& block, const std::vector<float>& cut, Member& member) {
  for (int r = 0; r < block.count; ++r) {
    const std::string where = "gallery row " + std::to_string(block.first_row + r);
    if (block.scale && !(std::isfinite(block.scale[r]) && block.scale[r] >= 0))
      return refuse(block.first_row + r, where + ": wanted a finite scale >= 0, got " + std::to_string(block.scale[r]));
    if (!finite_row(block.rows + r * block.stride, gallery_.storage, batch_.dim))
      return refuse(block.first_row + r, where + ": wanted finite values, got NaN or infinity");
  }
  for (int r = 0; r < block.count; ++r) {
    const Block row{block.rows + r * block.stride, block.stride, 1, block.first_row + r,
                    block.scale ? block.scale + r : nullptr};
    for (int q = 0; q < batch_.count; ++q) {
      float score;
      try {
        score = batch_.canonical(gallery_, row, q);
      } catch (const std::invalid_argument& error) {
        return refuse(row.first_row, error.what());
      }
      if (member.thresholds == nullptr && score < cut[q]) continue;
      const uint32_t slot = __atomic_fetch_add(&fill_[q], 1u, __ATOMIC_RELAXED);
      if (slot + 1 >= high_water_) __atomic_store_n(&full_, 1, __ATOMIC_SEQ_CST);
      buffer_[q * capacity_ + slot] = Candidate{row.first_row, score, 0.0f};
    }
  }
}

void Scan::take(const Block& block, const std::vector<float>& cut, Member& member) {
  Prepared prepared;
  batch_.kernels.prepare(block, gallery_.storage, batch_.dim, member.scratch.data(), &prepared);
  if (batch_.overflows(prepared)) return carefully(block, cut, member);
  prepared.largest_norm = coarse(prepared.largest_norm);
  prepared.largest_scale = coarse(prepared.largest_scale);
  prepared.largest_shift = coarse(prepared.largest_shift);
  if (member.fresh || member.norm != prepared.largest_norm || member.scale != prepared.largest_scale ||
      member.shift != prepared.largest_shift) {
    member.fresh = false;
    member.norm = prepared.largest_norm;
    member.scale = prepared.largest_scale;
    member.shift = prepared.largest_shift;
    batch_.bound(prepared, member.error.data());
    for (int q = 0; q < batch_.count; ++q) {
      if (member.thresholds == nullptr) member.threshold[q] = below(double(cut[q]) - double(member.error[q]));
      float lowest = infinity;
      for (int t = 0; t < member.count; ++t) {
        const double threshold = member.thresholds[int64_t(q) * member.count + t];
        const int64_t at = int64_t(t) * batch_.padded + q;
        member.low[at] = low(threshold, member.error[q]);
        member.high[at] = high(threshold, member.error[q]);
        lowest = std::fmin(lowest, member.low[at]);
      }
      if (member.thresholds != nullptr) member.threshold[q] = lowest;
    }
  }
  const Emission to{member.threshold.data(), member.error.data(), batch_.offset.empty() ? nullptr : batch_.offset.data(),
                    buffer_.get(), capacity_, fill_.data(), high_water_, &full_};
  if (member.thresholds == nullptr) {
    batch_.kernels.emit(prepared, batch_.panels.data(), batch_.count, batch_.dim, to);
  } else {
    const Counting counting{member.count, member.low.data(), member.high.data(), member.larger.data()};
    batch_.kernels.count(prepared, batch_.panels.data(), batch_.count, batch_.dim, to, counting);
  }
}

void Scan::stretches(int64_t first_rows, const std::vector<float>& cut, std::vector<Member>& members, const Settle& settle,
                     const std::function<void()>& after) {
  const int64_t blocks = gallery_.blocks(), longest = (int64_t(1) << 31) / block_rows;  // 32-bit counters hold it
  int64_t begin = 0, length = std::max<int64_t>(1, first_rows / block_rows);
  bool interrupted = false;
  auto asked = std::chrono::steady_clock::now();
  while (begin < blocks) {
    const int64_t end = std::min(blocks, begin + std::min(length, longest));
    std::atomic<int64_t> next{begin};
    full_ = 0;
    for (Member& member : members) member.fresh = true;
    run_.team->run([&](int id) {
      while (!stop_ && __atomic_load_n(&full_, __ATOMIC_SEQ_CST) == 0) {
        const int64_t block = next.fetch_add(1);
        if (block >= end) break;
        take(gallery_.block(block), cut, members[size_t(id)]);
        if (id != 0) continue;
        const auto now = std::chrono::steady_clock::now();
        if (now - asked < std::chrono::milliseconds(50)) continue;
        asked = now;
        if (run_.interrupted && run_.interrupted()) interrupted = stop_ = true;
      }
    });
    if (interrupted) throw Interrupted();
    if (refused_row_ >= 0) throw std::invalid_argument(refusal_);
    begin = std::min(end, next.load());
    length = 3 * begin;
    std::atomic<int> next_query{0};
    run_.team->run([&](int) {
      for (int q; (q = next_query.fetch_add(1)) < batch_.count;)
        fill_[size_t(q)] = settle(q, buffer_.get() + q * capacity_, fill_[size_t(q)]);
    });
    after();
  }
}

void Scan::walk(std::vector<float>& cut, int64_t first_rows, const Settle& settle) {
  std::vector<Member> members;
  for (int id = 0; id < run_.team->size(); ++id) members.emplace_back(*this, 0);
  stretches(first_rows, cut, members, settle, [] {});
}

void Scan::walk_counting(const double* thresholds, int count, std::vector<int64_t>& larger, const Settle& settle) {
  std::vector<Member> members;
  for (int id = 0; id < run_.team->size(); ++id) {
    members.emplace_back(*this, count);
    members.back().thresholds = thresholds;
    members.back().count = count;
  }
  stretches(gallery_.rows(), {}, members, settle, [&] {
    for (Member& member : members) {
      for (int q = 0; q < batch_.count; ++q)
        for (int t = 0; t < count; ++t)
          larger[size_t(q) * size_t(count) + size_t(t)] += member.larger[size_t(t) * size_t(batch_.padded) + size_t(q)];
      std::fill(member.larger.begin(), member.larger.end(), 0u);
    }
  });
}

}  // namespace attribution
