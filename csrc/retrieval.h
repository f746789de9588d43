// The operations behind attribution/similarity.py. Pointers are the caller's; every array is C-contiguous.
#pragma once
#include "part.h"
#include "scan.h"

namespace attribution {

struct Queries {
  const float* values;  // [count, dim]
  const float* offset;  // [count] or null
  int64_t count;
};

struct Limits {
  int threads;
  int64_t query_batch;  // queries that share a walk
};

using Interrupt = std::function<bool()>;

// first_row: added to the rows' numbers, of a part of a larger gallery
Part retrieve_part(const Gallery& gallery, const Queries& queries, const Request& request, const Limits& limits,
                   const Interrupt& interrupted, int64_t first_row);

// best: [queries]; which: [queries], the others' masses stay empty
std::vector<Mass> weigh(const Gallery& gallery, const Queries& queries, const Calibration& calibration, const float* best,
                        const std::vector<char>& which, const Limits& limits, const Interrupt& interrupted);

// Both, batch by batch.
void retrieve(const Gallery& gallery, const Queries& queries, const Request& request, const Limits& limits,
              const Interrupt& interrupted, const Found& found);

// thresholds: [queries, count] -> larger: [queries, count], scores > threshold (or >=)
void count_larger(const Gallery& gallery, const Queries& queries, const double* thresholds, int count, bool or_equal,
                  const Limits& limits, const Interrupt& interrupted, int64_t* larger);

// ids: [queries, count] -> scores: [queries, count]; -inf for id -1
void canonical_scores(const Gallery& gallery, const Queries& queries, const int64_t* ids, int64_t count, float* scores);

}  // namespace attribution
