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

// Rows that one thread takes at a time. A multiple of every kernel's tile height (6, 12, 24, 32).
static constexpr int block_rows = 96;

static inline int64_t padded_dim(int dim) { return (int64_t(dim) + 7) / 8 * 8; }

// The codes of a row, in whole cache lines.
static inline int64_t code_bytes(int dim) { return (int64_t(dim) + 63) / 64 * 64; }
static constexpr int most_coded_dim = 65536;  // of sums of their products in 32 bits

// The sketch of a row: four bits for each value, by trellis-coded quantization (Marcellin and Fischer, 1990): the levels among
// which a value's code chooses are higher by 4, 8 or 12, as the upper two bits of the code before it say. The levels lie where
// least is missing of normally distributed values, as far as seven bits and this simple a rule can say.
static constexpr unsigned char sketch_levels[16] = {28, 48, 63, 81, 39, 56, 71, 102, 13, 44, 59, 76, 34, 52, 67, 87};
static constexpr int raising_bits = 12;
static constexpr int level_of(int code, int before) { return sketch_levels[code] + (before & raising_bits); }
static constexpr int twice_mid_level = 127;

// For every 128 values come 64 bytes: byte i holds the code of value i in its lower half, that of value 64 + i in its upper
// half. Every eight bytes are a ring of sixteen codes: before a byte's upper half comes its lower, before that the upper half of
// the byte before, and before the first byte the last.
static constexpr int codes_of_ring = 16, rings_of_group = 8;
static inline int64_t sketch_groups(int dim) { return (int64_t(dim) + 127) / 128; }
static inline int64_t sketch_bytes(int dim) { return sketch_groups(dim) * 64; }

// Two more bits for each value: of what a sketch misses, in steps of so many of the sketch's. For every 256 values come 64
// bytes: byte i holds, from its lowest bits on, values i, 64 + i, 128 + i and 192 + i.
static constexpr double refinement_step = 1.25;
static inline int64_t refinement_groups(int dim) { return (int64_t(dim) + 255) / 256; }
static inline int64_t refinement_bytes(int dim) { return refinement_groups(dim) * 64; }

// What a compressed gallery holds of some rows. Value d of a row is, as the kernel for codes reads it,
// center[d] + step * (code[d] - 128).
struct Codes {
  const unsigned char* codes;  // [rows][code_bytes], 128 after dim
  const float* step;           // [rows]
  const float* residual;       // [rows], >= |x - x as the kernel reads it|
  const float* norm;           // [rows], >= |x - center| and >= |x as the kernel reads it - center|
};
// And as the kernel for sketches does, center[d] + step * (level[d] - 63.5), to which a refinement adds
// step * refinement_step * (code[d] - 1.5).
struct Sketches {
  const unsigned char* codes;        // [rows][sketch_bytes]
  const unsigned char* refinements;  // [rows][refinement_bytes]
  const uint16_t* facts;             // [rows][facts_of_sketch], the upper halves of floats
};
// The step; and upper bounds, as in Codes: of the residual, of the norm, and of the residual with the refinement. The norm is
// also at least |x as refined - center| and |step * level| / 4.
enum { fact_step, fact_residual, fact_norm, fact_refined_residual, facts_of_sketch };

struct Block {
  const unsigned char* rows;  // [count] rows, `stride` bytes apart, in the gallery's storage type; or their codes
  int64_t stride;
  int count;
  int64_t first_row;           // index of rows[0] in the whole gallery
  const float* scale;          // [count], or null: 1
  const unsigned char* ahead;  // what this thread will probably read next, or null
  Codes coded;                 // of these rows, where `rows` are codes
  Sketches sketched;           // where they are sketches
  int64_t ahead_bytes = 0;     // of `ahead`, where `rows` are codes made of values: how many of values

  const float* row_scale(int row) const { return scale ? scale + row : nullptr; }
};

// Where to write it.
struct CodesOut {
  unsigned char* codes;
  float* step;
  float* residual;
  float* norm;
};
struct SketchesOut {
  unsigned char* codes;
  unsigned char* refinements;
  uint16_t* facts;
};

// Of a query whose scores are bounded by sketches: the step of its codes; what the middles of the levels and of the refinements add to each
// dot; and what is added to every row's score, and to it for each unit of the row's residual and of its norm.
struct SketchedQuery {
  float step, middle, refined_middle, offset, per_residual, per_norm;
};
static constexpr int most_sketched = 4;  // queries
// Norms and scales beyond this might lead out of the range of float.
static constexpr float plain_limit = 0x1p30f;

struct Candidate {
  int64_t row;
  float score;
  float error;  // |score - canonical score| <= error; 0 once the score is the canonical one
};

// A block with the scores of the first group of queries, and what the error bound of all of them needs.
struct Prepared {
  Block block;
  const unsigned char* rows;  // as the fast kernel reads them: in place, or converted into the thread's scratch
  int64_t stride;
  unsigned char* tail;        // the rows after the last whole tile, copied and padded with zero rows
  float* scores;              // [block_rows][queries of the group], before offset and scale
  float largest_norm;   // max over rows of scale * |x|; not finite if a value is not, or the square overflows
  float largest_scale;  // max over rows of scale; NaN if one is negative
  float largest_shift;  // max over rows of scale * |x - x as the kernel reads it|
  const float* shift;   // [block.count] the same of each row, where that varies; or null
  bool arranged = false;  // `rows` are copied as kernel_matrices.inc likes them
};

// Where the fast kernel puts every (row, query) whose score reaches the query's threshold.
struct Emission {
  const float* threshold;  // [padded queries], +inf in the padding
  const float* error;      // [padded queries]: what to write into Candidate::error
  const float* offset;     // [padded queries], or null: 0
  Candidate* buffer;       // [padded queries][capacity], this thread's; a call adds up to block_rows for each
  int64_t capacity;
  uint32_t* fill;       // [padded queries]
  const float* weight;  // [padded queries] |q|: what Prepared::shift is multiplied by and adds to the error
  const float* per_norm;  // [padded queries] how much smaller an error is for each unit by which a row is below Prepared::largest_norm
};

// For `count_larger`. A score above `high` certainly exceeds the threshold, one below `low` certainly does not;
// one between them is emitted, for a closer look.
struct Counting {
  int thresholds;
  const float* low;  // [thresholds][padded queries]
  const float* high;
  uint32_t* larger;  // [thresholds][padded queries], this thread's
};

// One shape of fast kernel. Queries are padded to a multiple of `pad`; a group is what `emit` and `count` handle at a
// time: group(queries left) of them.
struct Kernels {
  int pad;
  double rounding;  // of one product and its addition, relative to |q| |x|; 0 for codes
  int (*group)(int left);
  int64_t (*panel_bytes)(int padded, int dim);
  // queries: [count] rows of dim, `stride` apart; shift: [count], |q - q as the kernel reads it|
  void (*pack)(const float* queries, int64_t stride, int count, int dim, unsigned char* panels, float* shift);
  int64_t (*scratch_bytes)(Storage storage, int dim);
  void (*prepare)(const Block& block, Storage storage, const unsigned char* panels, int queries, int dim,
                  unsigned char* scratch, Prepared* prepared);
  // The group that begins at query `first`. Group 0 comes first and uses up the scores that `prepare` made. Both return
  // how many candidates they found.
  int64_t (*emit)(const Prepared& prepared, const unsigned char* panels, int queries, int dim, int first, const Emission& to);
  int64_t (*count)(const Prepared& prepared, const unsigned char* panels, int queries, int dim, int first, const Emission& to,
                   const Counting& counting);
};

static constexpr double close_rounding = 0x1p-23;

struct InstructionSet {
  const char* name;
  const Kernels* (*kernels)(Storage storage, int queries);
  // The kernel that reads codes, or null where it would not be faster.
  const Kernels* (*coded_kernels)(int queries);
  // The kernel that reads sketches, or nulls. query: [dim] -> panel: [sketched_bytes], zeros before, for so many queries; step
  // and middles; and shift, the length of what the panel misses.
  int64_t (*sketched_bytes)(int queries, int dim);
  void (*sketch_query)(const float* query, int queries, int dim, unsigned char* panel, SketchedQuery* sketched, float* shift);
  // panels: [count][sketched_bytes] -> bounds: [count], `stride` apart, of [block_rows], which no score exceeds; infinite
  // where a row's numbers are extreme.
  void (*sketched_bounds)(const Block& block, const unsigned char* panels, const SketchedQuery* queries, int count, int dim,
                          float* bounds, int64_t stride);
  // The same bounds, [count] a query, of rows here and there -> by their refinements, in place. Of `facts` and `scales` whole
  // vectors are read.
  void (*refined_bounds)(const unsigned char* const* refinements, const uint16_t* facts, const float* scales, int count,
                         const unsigned char* panels, const SketchedQuery* sketched, int queries, int dim, float* bounds,
                         int64_t stride);
  // bits: of [block_rows] bounds those that are at least as large as a cut, or NaN, are added
  void (*add_reaching)(const float* bounds, float cut, uint32_t* bits);
  // rows of values -> their codes and sketches; center: [padded_dim], scratch: [256 * sketch_groups]. Returns the
  // first row that is not finite, or block.count.
  int (*encode)(const Block& block, Storage storage, const double* center, int dim, double* scratch, CodesOut codes,
                SketchesOut sketches);
  // The codes of a block's rows of values, center 0, fast enough to be made for one walk; null where that does not pay. Of a row
  // that is not finite the norm is NaN.
  void (*quantize_rows)(const Block& block, Storage storage, int dim, const CodesOut& codes);
  // rows: [count] pointers to rows of [dim], query: [dim] -> dots: [count], as defined above
  void (*canonical_dots)(const unsigned char* const* rows, int count, Storage storage, const float* query, int dim,
                         double* dots);
  // The same in float32: products and sums are rounded, `close_rounding` relative to |q| |x| for each value.
  void (*close_dots)(const unsigned char* const* rows, int count, Storage storage, const float* query, int dim, float* dots);
  // canonical_dots for a whole block: queries: [count][padded_dim], zeros after dim -> dots: [count][block_rows]
  int64_t (*canonical_scratch_bytes)(int dim);
  void (*canonical_block)(const Block& block, Storage storage, const float* queries, int count, int dim, double* scratch,
                          double* dots);
  // Sums the weights (weight.h) of up to block_rows scores, times 2^62 and rounded: sum = high * 2^32 + low. Returns how
  // many are positive.
  int64_t (*weigh)(const float* scores, int64_t count, double inv_tau, double b, float best, uint64_t* low, uint64_t* high);
  // exp(inv_tau * score) = fraction * 2^exponent. False if a score is too large for that to be accurate.
  bool (*exponentials)(const float* scores, int64_t count, double inv_tau, double* fractions, int64_t* exponents);
};

const InstructionSet* instruction_set_portable();
const InstructionSet* instruction_set_avx2();
const InstructionSet* instruction_set_avx512f();
const InstructionSet* instruction_set_avx512_bf16();
const InstructionSet* instruction_set_avx512_bf16_zen4();
const InstructionSet* instruction_set_avx512_amx();

// The most capable one that this machine runs, or the one that ATTRIBUTION_ISA names. Throws std::invalid_argument for
// a name that is unknown or that this machine cannot run.
const InstructionSet* choose_instruction_set();

}  // namespace attribution
