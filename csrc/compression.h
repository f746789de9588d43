// The codes of a gallery, once for all calls.
#pragma once
#include "retrieval.h"

namespace attribution {

// Where to write what Codes holds, of all rows of the gallery.
struct CodesOut {
  unsigned char* codes;
  float* step;
  float* residual;
  float* norm;
};

// center: [dim]. Throws std::invalid_argument naming the first row that is not finite.
void compress(const Gallery& gallery, const float* center, int threads, const Interrupt& interrupted, const CodesOut& out);

// What the filter of codes says of every score, and how much that may be wrong: [queries, rows] each. NaN where it says
// nothing. For the test of the proof.
void coded_scores(const Gallery& gallery, const Queries& queries, float* scores, float* errors);

}  // namespace attribution
