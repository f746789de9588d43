// What is known of rows and queries before a walk.
#include "exact.h"

namespace attribution::cuda {
namespace {

// Upwards: the sum itself is rounded, and squares below the smallest float vanish from it.
__device__ float norm_above(float squared, int dim) { return sqrtf(squared * 1.001f + float(dim) * 0x1p-110f); }

__device__ void add_square(float value, float& squared, bool& bad) {
  bad |= !finite(value);
  squared = fmaf(value, value, squared);
}

// One warp, one row -> |x|^2, every lane's share; bad: a value is not finite.
__device__ float squares_of(const unsigned char* row, int storage, int dim, int lane, bool& bad) {
  float squared = 0;
  int d = 0;
  if (reinterpret_cast<uintptr_t>(row) % 16 == 0) {
    const bool wide = storage == int(Storage::float32);
    const int each = wide ? 4 : 8, vectors = dim / each;
#pragma unroll 4
    for (int v = lane; v < vectors; v += 32) {
      const uint4 bits = reinterpret_cast<const uint4*>(row)[v];
      const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
      for (int w = 0; w < 4; ++w) {
        if (wide) {
          add_square(__uint_as_float(words[w]), squared, bad);
        } else if (storage == int(Storage::bfloat16)) {
          add_square(__uint_as_float(words[w] << 16), squared, bad);
          add_square(__uint_as_float(words[w] & 0xffff0000u), squared, bad);
        } else {
          add_square(half_bits_to_float(uint16_t(words[w])), squared, bad);
          add_square(half_bits_to_float(uint16_t(words[w] >> 16)), squared, bad);
        }
      }
    }
    d = vectors * each;
  }
  for (d += lane; d < dim; d += 32) add_square(float(value_at(row, storage, d)), squared, bad);
  return squared;
}

// One block of 8 warps, one stripe. norms: already known, or null
__global__ void __launch_bounds__(256) measure_kernel(Slab slab, int storage, int dim, const Stripe* norms, Stripe* stripes, Key* refused) {
  float* largest = reinterpret_cast<float*>(shared_memory());  // [2][8]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first = int64_t(blockIdx.x) * stripe_rows;
  float norm = 0, scale = 0;
  bool scale_bad = false;
  for (int r = warp; r < stripe_rows && first + r < slab.count; r += 8) {
    const int64_t row = first + r;
    const float own = slab.scale != nullptr ? slab.scale[row] : 1.0f;
    if (!(own >= 0 && finite(own))) {
      scale_bad = true;
      if (lane == 0) atomicMin(refused, Key(slab.first_row + row) * 2);
    }
    scale = fmaxf(scale, own);
    if (norms != nullptr) continue;
    bool bad = false;
    const float squared = warp_sum(squares_of(slab.rows + row * slab.stride, storage, dim, lane, bad));
    if (__ballot_sync(0xffffffffu, bad) != 0 && lane == 0) atomicMin(refused, Key(slab.first_row + row) * 2 + 1);
    norm = fmaxf(norm, squared < ATTRIBUTION_INFINITY ? norm_above(squared, dim) : ATTRIBUTION_INFINITY);
  }
  if (lane == 0) {
    largest[warp] = norm;
    largest[8 + warp] = scale_bad ? ATTRIBUTION_INFINITY : scale;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < 8; ++w) {
    norm = fmaxf(norm, largest[w]);
    largest[8] = fmaxf(largest[8], largest[8 + w]);
  }
  Stripe stripe{norm, 1, 0, 1};
  if (norms != nullptr) stripe = norms[blockIdx.x];
  stripe.scale = largest[8];
  stripes[blockIdx.x] = stripe;
}

__device__ uint32_t bits_packed(float value, int storage) {
  const uint32_t bits = __float_as_uint(value);
  if (storage == int(Storage::float16)) return float_to_half_bits(value);
  if (storage == int(Storage::bfloat16)) return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (bits + 0xfffu + ((bits >> 13) & 1u)) & ~0x1fffu;  // what the tensor cores read of a float: 10 bits
}
__device__ float value_packed(uint32_t bits, int storage) {
  if (storage == int(Storage::float16)) return half_bits_to_float(uint16_t(bits));
  return __uint_as_float(storage == int(Storage::bfloat16) ? bits << 16 : bits);
}

// Where a query's line is, or the first of its two: eight upper halves, then their eight lower ones, so that one thread
// gets the sums of both.
__device__ int line_of(int q, Operand operand) { return operand == Operand::wide_codes ? q / 8 * 16 + q % 8 : q; }

// One warp, one query.
__global__ void __launch_bounds__(256) pack_kernel(Batch batch) {
  const int q = int(blockIdx.x) * 8 + int(threadIdx.x) / 32, lane = threadIdx.x % 32, planes = planes_of(batch.operand);
  if (q == 0 && lane == 0) *batch.fault = ~Key(0);
  if (q >= batch.padded / planes) return;
  const bool coded = batch.operand >= Operand::codes;
  unsigned char *line = batch.packed + line_of(q, batch.operand) * batch.line, *lower = line + 8 * batch.line;
  const int bytes = int(bytes_of(batch.operand));
  bool real = q < batch.queries;
  const float* values = batch.values + int64_t(q) * batch.dim;
  float most = 0;
  double squared = 0, moved = 0, of_center = 0, sizes = 0;
  for (int d = lane; real && d < batch.dim; d += 32) {
    most = fmaxf(most, fabsf(values[d]));
    squared += double(values[d]) * double(values[d]);
    if (!coded) continue;
    const double product = double(values[d]) * double(batch.center[d]);
    of_center += product;
    sizes += fabs(product);
  }
  most = warp_max(most);
  squared = warp_sum(squared);
  of_center = warp_sum(of_center);
  sizes = warp_sum(sizes);
  if (!(squared < double(ATTRIBUTION_INFINITY))) {
    // A query that nobody could check before. Its scores would compare with nothing, and the slots of a first chunk stay
    // unwritten; so it is left out, and is never settled.
    real = false;
    most = 0;
    squared = 0;
  }
  const float own = real && batch.offset != nullptr ? batch.offset[q] : 0.0f;
  const double whole = real && coded ? double(own) + of_center : double(own);  // codes leave out the center
  const float offset = float(whole);
  // The largest value becomes one near 1, so that half precision neither overflows nor vanishes.
  int exponent = 0, offset_exponent = -1000;
  if (most > 0) frexpf(most, &exponent);
  if (offset != 0) frexpf(offset, &offset_exponent);
  int power = -exponent < 60 ? -exponent : 60;
  if (offset_exponent > -1000 && 59 - offset_exponent < power) power = 59 - offset_exponent;
  if (power < -126) power = -126;
  const int largest_code = planes == 2 ? 127 * 256 : 127;
  const float step = coded ? float(ldexp(double(most), power) / largest_code) : 1.0f;
  const double inverse = step > 0 ? 1.0 / double(step) : 0.0;
  for (int d = lane; d < batch.line / bytes; d += 32) {
    const double exact = real && d < batch.dim ? ldexp(double(values[d]), power) : 0.0;
    double held;
    if (coded) {
      int code = int(floor(exact * inverse + 0.5));
      code = code > largest_code ? largest_code : code < -largest_code ? -largest_code : code;
      held = double(code) * double(step);
      const int upper = planes == 2 ? (code + 128) >> 8 : code;
      reinterpret_cast<signed char*>(line)[d] = static_cast<signed char>(upper);
      if (planes == 2) reinterpret_cast<signed char*>(lower)[d] = static_cast<signed char>(code - 256 * upper);
    } else {
      const uint32_t bits = bits_packed(float(exact), batch.storage);
      held = double(value_packed(bits, batch.storage));
      if (bytes == 4) reinterpret_cast<uint32_t*>(line)[d] = bits;
      else reinterpret_cast<uint16_t*>(line)[d] = uint16_t(bits);
    }
    moved += (exact - held) * (exact - held);
  }
  moved = warp_sum(moved);
  if (lane != 0) return;
  const float infinite = ATTRIBUTION_INFINITY;
  // A sum of dim rounded products in any order (tensor cores cut where others round), then the offset, the scale, the
  // rounding of the canonical score, and those of threshold_of. Cauchy and Schwarz bound the sum of the products'
  // magnitudes. Subnormal numbers may be flushed on the way. Of codes, sums are exact; of what their steps make of them, and
  // of what the center adds, some roundings are left, each of 2^-24 of its result.
  const double norm = sqrt(squared) * (1 + 1e-6), size = ldexp(norm, power), depth = sqrt(double(batch.dim));
  const double rounding = coded ? 0x1p-20 : (batch.dim + 16) * 0x1p-22, flushed = 0x1p-120;
  const double shift = batch.operand == Operand::float32 ? 0x1.01p-10 : 0;  // of a row's values, cut to 10 bits
  const double offset_size = ldexp(fabs(double(own)) + sizes, power);
  Query query;
  query.cut = real ? -infinite : infinite;
  query.a = real ? float(1.01 * (size * (rounding + shift) + sqrt(moved) * 1.0001 + flushed * depth)) : 0;
  query.b = real ? float(1.01 * (rounding * offset_size + flushed * (depth * size + 2.0 * batch.dim))) : 0;
  query.c = real ? float(1.01 * (flushed + ldexp(1.0, power - 147))) : 0;
  query.offset = float(ldexp(double(offset), power));
  query.unit = float(ldexp(1.0, -power));
  query.size = float(norm * 1.0001);
  query.shift_of_score = fabsf(offset);
  query.size_packed = coded ? float(1.01 * size) : 0.0f;
  query.step = step;
  batch.query[q] = query;
  batch.selected[q] = Selected{query.cut, 0, 0, 0, real ? fine : frozen, 0, 0, 0};
}

struct SomeSlabs {
  Slab slab[16];
};

// By value, so that a graph can hold them.
__global__ void slab_kernel(SomeSlabs some, int count, Slab* to) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = some.slab[i];
}

}  // namespace

void measure_rows(const Slab& slab, int storage, int dim, const Stripe* norms, Stripe* stripes, Key* refused, cudaStream_t stream) {
  const int64_t blocks = (slab.count + stripe_rows - 1) / stripe_rows;
  if (blocks > 0) launch("measure rows", measure_kernel, blocks, 256, 64, stream, 1, slab, storage, dim, norms, stripes, refused);
}

void pack_queries(const Batch& batch, cudaStream_t stream) {
  launch("pack queries", pack_kernel, batch.padded > 0 ? batch.padded / planes_of(batch.operand) / 8 : 1, 256, 0, stream, 1, batch);
}

void note_slabs(const Batch& batch, const Slab* slabs, cudaStream_t stream) {
  for (int first = 0; first < batch.slab_count; first += 16) {
    SomeSlabs some = {};
    const int count = batch.slab_count - first < 16 ? batch.slab_count - first : 16;
    for (int i = 0; i < count; ++i) some.slab[i] = slabs[first + i];
    launch("note slabs", slab_kernel, 1, 32, 0, stream, 1, some, count, batch.slabs + first);
  }
}

}  // namespace attribution::cuda
