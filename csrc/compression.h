// The codes of a gallery, once for all calls.
#pragma once
#include "retrieval.h"

namespace attribution {

// center: [dim]; codes, sketches: of all rows. Throws std::invalid_argument naming the first row that is not finite.
void compress(const Gallery& gallery, const float* center, int threads, const Interrupt& interrupted, const CodesOut& codes,
              const SketchesOut& sketches);

// What the filter of codes says of every score, and how much that may be wrong: [queries, rows] each. NaN where it says
// nothing. For the test of the proof.
void coded_scores(const Gallery& gallery, const Queries& queries, float* scores, float* errors);
// What the sieve says no score exceeds, by sketches and by their refinements: [queries, rows] each. NaN where there is no sieve.
void sketched_bounds(const Gallery& gallery, const Queries& queries, float* bounds, float* refined);

}  // namespace attribution
