// The operations behind attribution/similarity.py. Pointers are the caller's; every array is C-contiguous.
#pragma once
#include "scan.h"
#include "weight.h"

namespace attribution {

struct Queries {
  const float* values;  // [count, dim]
  const float* offset;  // [count] or null
  int64_t count;
};

struct Limits {
  int threads;
  int64_t window;         // a query with more members than this outside its top k gets its sum from a second walk
  int64_t query_batch;    // queries that share a walk
};

struct Found {
  int64_t* ids;       // [queries, k], -1 beyond the gallery
  float* scores;      // [queries, k], -inf beyond the gallery
  float* influence;   // [queries, k]; this and the rest may be null together: search only
  int64_t* support;   // [queries]
  float* shown;       // [queries] the influence of the k together
  float* remainder;   // [queries] all other influence
};

void retrieve(const Gallery& gallery, const Queries& queries, int64_t k, const Calibration* calibration,
              const Limits& limits, const std::function<bool()>& interrupted, const Found& found);

// thresholds: [queries, count] -> larger: [queries, count], scores > threshold (or >=)
void count_larger(const Gallery& gallery, const Queries& queries, const double* thresholds, int count, bool or_equal,
                  const Limits& limits, const std::function<bool()>& interrupted, int64_t* larger);

// ids: [queries, count] -> scores: [queries, count]; -inf for id -1
void canonical_scores(const Gallery& gallery, const Queries& queries, const int64_t* ids, int64_t count, float* scores);

}  // namespace attribution
