// What a thread of a walk keeps to itself.
#pragma once
#include <limits>
#include <optional>

#include "coded_blocks.h"
#include "scan.h"

namespace attribution {

// The dots and the scores of one block and a group of queries.
constexpr int64_t dense_values = int64_t(Batch::dense_group) * block_rows;
constexpr int64_t dense_bytes = dense_values * 12;

// What a thread needs for one filter.
struct Scan::Side {
  Side(const Batch& batch, int thresholds)
      : batch(&batch),
        scratch(batch.kernels.scratch_bytes(batch.gallery.storage, batch.gallery.dim)),
        threshold(size_t(batch.padded), std::numeric_limits<float>::infinity()),
        error(size_t(batch.padded), 0.0f),
        low(size_t(thresholds) * size_t(batch.padded), std::numeric_limits<float>::infinity()),
        high(size_t(thresholds) * size_t(batch.padded), std::numeric_limits<float>::infinity()),
        close_error(size_t(batch.padded), 0.0f) {}

  const Batch* batch;
  AlignedBytes scratch;
  std::vector<float> threshold, error, low, high;
  std::vector<float> close_error;  // of Batch::close_scores
  bool stale = true;  // the cuts have moved since `threshold` was made
  float norm = -1, scale = -1, shift = -1;
};

// A row whose bound reaches a cut, and what its refinement was asked for; and some of them together.
struct Scan::Reached {
  int64_t block;
  int row;  // of the block
  const unsigned char* refinement;
  const uint16_t* facts;
  const float* scale;  // or null
};
struct Scan::Gathered {
  const unsigned char* refinements[block_rows] = {};
  uint16_t facts[block_rows * facts_of_sketch] = {};
  float scales[block_rows] = {}, bounds[most_sketched * block_rows] = {};
};

// A row by its sketch alone; and one that passed the sieve.
struct Scan::Promising {
  float bound;
  int64_t row;
};
struct Scan::Passed {
  int64_t row;  // of the whole gallery
  Codes coded;
  const float* scale;  // or null
};

// One thread's own memory.
struct Scan::Member {
  Member(const Scan& scan, int id, int thresholds)
      : id(id),
        values(scan.batch_, thresholds),
        larger(size_t(thresholds) * size_t(scan.batch_.padded), 0),
        buffer(new Candidate[size_t(scan.batch_.padded * own_capacity)]),
        fill(size_t(scan.batch_.padded), 0) {
    if (scan.codes_ == nullptr) return;
    codes.emplace(*scan.codes_, thresholds);
    coded_blocks.emplace(*scan.run_.set, scan.gallery_);
  }

  int id;
  Side values;
  std::optional<Side> codes;
  std::optional<CodedBlocks> coded_blocks;
  std::vector<uint32_t> larger;
  std::unique_ptr<Candidate[]> buffer;  // [padded queries][own_capacity]
  std::vector<uint32_t> fill;           // [padded queries]
  AlignedBytes dense{0};                // scratch for densely()
  int dense_blocks = 0;                 // how many more to score whole
  int uncoded_blocks = 0, patience = 8;  // how many more to take without their codes; and how many the next time

  // With a sieve: for each query the rows with the largest bounds; and, until a turn has ended, rows that may pass and that did.
  std::vector<std::vector<Promising>> promising;
  std::vector<float> promise;  // the least that is still welcome
  std::vector<Reached> reached;
  Gathered gathered;
  std::vector<Passed> passed;
  AlignedBytes codes_of_passed{0};  // [block_rows]
};

}  // namespace attribution
