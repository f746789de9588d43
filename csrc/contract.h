// What every part of the extension agrees on: the records that cross a translation unit, and what a score is.
//
// A score is defined once, for every instruction set and device:
//     lane[j] = sum over d = j, j + 8, j + 16, ... of double(q[d]) * double(x[d])      in this order, from +0.0
//     dot     = ((lane0 + lane4) + (lane2 + lane6)) + ((lane1 + lane5) + (lane3 + lane7))
//     score   = float((dot + offset_of_query) * scale_of_row) + 0.0f
// A product of two floats is exact in double, so fused and unfused multiply-adds agree to the last bit. The fast
// kernels only propose candidates, within a proven error; order and influence come from these scores alone.
//
// Included by kernels that are compiled for newer machines than this one: nothing here may leave a shared
// (comdat) function behind, or the linker could hand an AVX-512 copy of it to everyone. Hence `static inline`.
#pragma once
#include <cstddef>
#include <cstdint>

namespace attribution {

enum class Storage : int { float32, float16, bfloat16 };
static inline int64_t bytes_of(Storage storage) { return storage == Storage::float32 ? 4 : 2; }

// Rows that one thread takes at a time. A multiple of every kernel's tile height (6 and 12).
static constexpr int block_rows = 96;

struct Block {
  const unsigned char* rows;  // [count] rows, `stride` bytes apart, in the gallery's storage type
  int64_t stride;
  int count;
  int64_t first_row;   // index of rows[0] in the whole gallery
  const float* scale;  // [count], or null: 1
};

struct Candidate {
  int64_t row;
  float score;
  float error;  // |score - canonical score| <= error; 0 once the score is the canonical one
};

// A block made ready for the fast kernel, and what its error bound needs.
struct Prepared {
  Block block;
  const unsigned char* rows;  // as the fast kernel reads them: in place, or converted into the thread's scratch
  int64_t stride;
  const unsigned char* tail;  // the rows after the last whole tile, copied and padded with zero rows
  float largest_norm;   // max over rows of scale * |x|; not finite if a value is not, or the square overflows
  float largest_scale;  // max over rows of scale
  float largest_shift;  // max over rows of scale * |x - x as the kernel reads it|
};

// Where the fast kernel puts every (row, query) whose score reaches the query's threshold.
struct Emission {
  const float* threshold;  // [queries, padded with +inf to a whole number of groups]
  const float* error;      // the same shape: what to write into Candidate::error
  const float* offset;     // the same shape, or null: 0
  Candidate* buffer;       // [queries][capacity]
  int64_t capacity;
  uint32_t* fill;      // [queries]
  uint32_t high_water; // reaching it raises `full`; the engine then starts no further block
  int* full;
};

// For `count_larger`. A score above `high` certainly exceeds the threshold, below `low` certainly does not;
// between them it is emitted and settled by its canonical score.
struct Counting {
  int thresholds;
  const float* low;   // [thresholds][padded queries]
  const float* high;
  uint32_t* larger;   // [thresholds][padded queries], this thread's
};

struct Kernels {
  const char* name;
  int group;  // queries in one packed panel
  int64_t (*panel_bytes)(int dim);
  void (*pack)(const float* queries, int count, int dim, unsigned char* panels);
  int64_t (*scratch_bytes)(Storage storage, int dim);
  void (*prepare)(const Block& block, Storage storage, int dim, unsigned char* scratch, Prepared* prepared);
  void (*emit)(const Prepared& prepared, const unsigned char* panels, int queries, int dim, const Emission& to);
  void (*count)(const Prepared& prepared, const unsigned char* panels, int queries, int dim, const Emission& to,
                const Counting& counting);
  double (*canonical_dot)(const unsigned char* row, Storage storage, const float* query, int dim);
};

const Kernels* kernels_portable();

// The fastest kernels this machine runs, or the ones that ATTRIBUTION_ISA names. Throws std::invalid_argument for a
// name that is unknown or that this machine cannot run.
const Kernels* choose_kernels();

}  // namespace attribution
