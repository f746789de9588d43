// What host and device agree on: the records in device memory, and how a launch is made and checked.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef ATTRIBUTION_EMULATED
#include "emulate.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif
#include "../contract.h"

namespace attribution::cuda {

// Rows that share an error bound. A multiple of it is the height of every tile.
constexpr int stripe_rows = 128;
// Packed queries come in tiles of so many, and in lines of a multiple of so many bytes.
constexpr int query_tile = 128;
constexpr int line_bytes = 128;

struct alignas(16) Stripe {
  float norm;      // largest |x|, upwards; infinite where a value is not finite or the square overflows
  float scale;     // largest scale; NaN where one is negative or not finite
  float residual;  // largest |x - x as the filter reads it|, upwards, beyond what is in proportion to norm: of codes
  float step;      // what one unit of a row's codes counts; 1 of values
};

// What the filter multiplies: values as they are stored; or codes, of 8 bits, of queries of 16 bits in two lines.
enum class Operand : int { float32, float16, bfloat16, codes, wide_codes };
__host__ __device__ constexpr int64_t bytes_of(Operand operand) { return operand == Operand::float32 ? 4 : operand < Operand::codes ? 2 : 1; }
__host__ __device__ constexpr int planes_of(Operand operand) { return operand == Operand::wide_codes ? 2 : 1; }
template <Operand operand>
struct SumOf {
  typedef float type;
};
template <>
struct SumOf<Operand::codes> {
  typedef int32_t type;
};
template <>
struct SumOf<Operand::wide_codes> {
  typedef int32_t type;
};

// Rows that lie together in device memory.
struct Slab {
  const unsigned char* rows;
  int64_t stride;  // bytes from row to row
  int64_t count;
  int64_t first_row;   // index of its first row in the walk
  const float* scale;  // [count] or null: 1
  const Stripe* stripes;     // of what the filter reads
  const signed char* codes;  // [count] rows of dim, or null
  int64_t code_stride;
};

// A query as the filter sees it, in units of its packed values: 2^-power of a score.
struct alignas(16) Query {
  float cut;      // what a fast score must reach, but for its error; +inf: nothing more is wanted
  float a, b, c;  // |fast score - canonical score| <= (a * norm + size_packed * residual) * scale + b * scale + c
  float offset;
  float unit;  // 2^power; a score is unit * fast score
  float size;  // |q|, upwards, in units of a score
  float shift_of_score;  // |offset|, upwards, likewise
  float size_packed;     // |q|, upwards, in units of the packed query; 0 where the filter reads values
  float step;            // what one unit of the query's codes counts; 1 of values
};

// A candidate is one word, larger for a better one: the score, then the lower row.
typedef unsigned long long Key;

enum Status : uint32_t { fine = 0, overflowed = 1, frozen = 2 };

// Of one query, beside its candidates.
struct Selected {
  float cut;       // as of a score; -inf before k rows were seen
  uint32_t fill;   // candidates, also those that found no room
  uint32_t exact;  // so many of them, the first ones, have canonical scores
  uint32_t before; // fill before the chunk that is being walked: what the last settling left
  uint32_t status;
  uint32_t wide;     // has more weight outside its top k than is kept
  uint32_t pending;  // candidates after the exact ones that are being scored
  uint32_t all;      // whether these are all there are, so that the best k can be told
};

// Everything a batch of queries has in device memory. All pointers are into one workspace.
struct Batch {
  int queries;
  int padded;  // lines of packed queries, a multiple of query_tile
  int dim;
  int storage;
  Operand operand;
  int64_t line;           // bytes of a packed query, or of a plane of it
  const float* center;    // [dim] of the codes, or null
  const float* values;    // [queries][dim] as given
  const float* offset;    // [queries] or null
  unsigned char* packed;  // [padded][line]
  Query* query;           // [padded / planes]
  Selected* selected;     // [padded / planes]
  Key* buffer;            // [queries][capacity]
  uint32_t* scratch;      // [queries][capacity]
  int64_t capacity;
  Key* fault;  // the first (row << 32 | query) whose score is beyond float32, or all ones
  Slab* slabs;  // [slab_count], where candidates' rows lie
  int slab_count;
};

struct Weighing {
  double inv_tau, b;  // inv_tau 0: search only, or b = 0
  double depth;       // no score below best + depth has weight
  int64_t window;
};

#ifdef ATTRIBUTION_EMULATED

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t grid, int block, size_t shared_bytes, cudaStream_t, int cluster,
            Arguments... arguments) {
  const std::function<void()> body = [&] { kernel(arguments...); };
  emulated::run(name, grid, block, shared_bytes, cluster, body);
}
inline unsigned char* shared_memory() { return emulated::machine.current->cta->shared; }
inline float half_bits_to_float(uint16_t bits) {
  const uint32_t exponent = (bits >> 10) & 31u, mantissa = bits & 1023u;
  const float magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                                         : std::ldexp(float(exponent ? mantissa + 1024 : mantissa), int(exponent ? exponent : 1) - 25);
  return bits >> 15 ? -magnitude : magnitude;
}
inline uint16_t float_to_half_bits(float value) {
  const uint32_t sign = (__float_as_uint(value) >> 16) & 0x8000u;
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return uint16_t(sign | 0x7c00u);
  int exponent;
  std::frexp(magnitude, &exponent);
  const int least = exponent - 11 > -24 ? exponent - 11 : -24;  // the weight of the last bit
  const uint32_t whole = uint32_t(std::nearbyint(std::ldexp(magnitude, -least)));
  return uint16_t(sign | (whole + (uint32_t(least + 24) << 10)));
}
inline void check(int, const char*) {}

#else

// Set by attribution_cuda_debug: every launch is waited for, so that an asynchronous fault surfaces where it happened.
extern bool wait_for_each_launch;
void check(cudaError_t error, const char* what);

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t grid, int block, size_t shared_bytes, cudaStream_t stream,
            int cluster, Arguments... arguments) {
  if (shared_bytes > (48u << 10))
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)), name);
  cudaLaunchConfig_t configuration = {};
  configuration.gridDim = dim3(unsigned(grid));
  configuration.blockDim = dim3(unsigned(block));
  configuration.dynamicSmemBytes = shared_bytes;
  configuration.stream = stream;
  cudaLaunchAttribute attribute = {};
  if (cluster > 1) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = unsigned(cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    configuration.attrs = &attribute;
    configuration.numAttrs = 1;
  }
  check(cudaLaunchKernelEx(&configuration, kernel, Parameters(arguments)...), name);
  if (wait_for_each_launch) check(cudaStreamSynchronize(stream), name);
}

#ifdef __CUDACC__
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}
__device__ __forceinline__ float half_bits_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ __forceinline__ uint16_t float_to_half_bits(float value) { return __half_as_ushort(__float2half_rn(value)); }
#endif
#endif

// Launchers, one for each kernel.

// Fills stripes of [ceil(count / stripe_rows)] and notes the first refused row in `refused` (all ones before): twice its
// number, one more if it is its values rather than its scale. norms: stripes of the same rows with other scales, or null.
void measure_rows(const Slab& slab, int storage, int dim, const Stripe* norms, Stripe* stripes, Key* refused, cudaStream_t stream);
void pack_queries(const Batch& batch, cudaStream_t stream);
// slab.codes: [count][code_stride], written; fills stripes as measure_rows does, of rows that are finite
void encode_rows(const Slab& slab, int storage, int dim, const float* center, signed char* codes, Stripe* stripes, cudaStream_t stream);
// slabs: [batch.slab_count], in host memory
void note_slabs(const Batch& batch, const Slab* slabs, cudaStream_t stream);
// What happens after a chunk: drops what is hopeless, raises cuts. exactly: leaves canonical scores, top k and window alone.
// direct: so many rows went to slots of their own, or 0.
void settle(const Batch& batch, int64_t k, const Weighing& weighing, bool exactly, int64_t direct, int processors, cudaStream_t stream);
// cuts: [queries], or null: those they have. still: [queries], those that are to stay as they are, or null: all go on.
void set_cuts(const Batch& batch, const float* cuts, const uint32_t* still, cudaStream_t stream);
// Sorted candidates, of queries that are settled exactly.
void sort_candidates(const Batch& batch, cudaStream_t stream);

struct Answers {
  int64_t* ids;  // [queries][k]
  float* scores;
  float* influence;  // null: search only
  int64_t* support;  // [queries]
  float* shown;
  float* remainder;
};
void conclude(const Batch& batch, int64_t k, const Weighing& weighing, const Answers& answers, cudaStream_t stream);

// A chunk of a slab.
struct Chunk {
  int64_t begin, end;  // rows of the slab
  bool direct;         // cuts are -inf and buffers empty: row r goes to slot r - begin
  bool unsafe;         // some of its stripes may be unsafe for some queries: their rows are not the filter's
};

// The rows of a chunk against all queries of the batch: emits what reaches the queries' cuts.
void filter_generic(const Batch& batch, const Slab& slab, const Chunk& chunk, int processors, cudaStream_t stream);
#ifndef ATTRIBUTION_NO_HOPPER
bool hopper_can(const Batch& batch, const Slab& slab);
void filter_hopper(const Batch& batch, const Slab& slab, const Chunk& chunk, int processors, cudaStream_t stream);
#endif

// Canonical scores of all rows of a slab against all queries of the batch, and what to do with them.
enum class Tally : int {
  emit_unsafe,  // only of stripes that the filter leaves out: emit what reaches the cut
  mass,         // weights beside the best score: Mass of weight.h
  softmax,      // exponentials, in bins below the top one: SoftmaxSum of weight.h
  count         // scores above thresholds
};
struct Tallied {
  const float* best;             // [queries]
  const int64_t* top;            // [queries], softmax
  const double* thresholds;      // [queries][threshold_count]
  int threshold_count;
  int or_equal;
  double inv_tau, b;
  unsigned long long* sums;  // [queries][words]: mass: low, high, count; softmax: 4 bins of 3 limbs, then `beyond`; counts
};
void tally_rows(const Batch& batch, const Slab& slab, int64_t begin, int64_t end, Tally tally, const Tallied& tallied, bool direct,
                int processors, cudaStream_t stream);
// Counts, of the emitted candidates, the canonical scores above thresholds.
void count_candidates(const Batch& batch, const Tallied& tallied, cudaStream_t stream);
// ids: [queries][count] -> scores, -inf for -1
void score_rows(const Batch& batch, const int64_t* ids, int64_t count, float* scores, cudaStream_t stream);

}  // namespace attribution::cuda
