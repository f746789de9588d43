// Rows as codes of eight bits, once for all calls; what they miss is measured in double and rounded upwards.
#include "exact.h"

namespace attribution::cuda {
namespace {

constexpr int warps = 8;

__device__ float above(double value) { return float(value * (1 + 0x1p-23) + 0x1p-149); }

// One block, one stripe, whose rows share a step: of the largest value of x - center, 127 make one.
__global__ void __launch_bounds__(warps * 32) encode_kernel(Slab slab, int storage, int dim, const float* center, signed char* codes, Stripe* stripes) {
  double* of_warps = reinterpret_cast<double*>(shared_memory());  // [2][warps]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first = int64_t(blockIdx.x) * stripe_rows, left = slab.count - first;
  const int count = int(left < stripe_rows ? left : stripe_rows);
  double most = 0;
  for (int r = warp; r < count; r += warps) {
    const unsigned char* row = slab.rows + (first + r) * slab.stride;
#pragma unroll 4
    for (int d = lane; d < dim; d += 32) most = larger(most, fabs(value_at(row, storage, d) - double(center[d])));
  }
  most = warp_max(most);
  if (lane == 0) of_warps[warp] = most;
  __syncthreads();
  for (int w = 0; w < warps; ++w) most = larger(most, of_warps[w]);
  __syncthreads();
  // A smaller step is zero, so that no product with it is too small for a normal number.
  const float step = most / 127 < 0x1p-60 ? 0.0f : float(most / 127);
  const double inverse = step > 0 ? 1.0 / double(step) : 0.0;
  double residual = 0, norm = 0;
  for (int r = warp; r < count; r += warps) {
    const unsigned char* row = slab.rows + (first + r) * slab.stride;
    signed char* to = codes + (first + r) * slab.code_stride;
    double missed = 0, held = 0, size = 0;
#pragma unroll 4
    for (int d = lane; d < dim; d += 32) {
      const double x = value_at(row, storage, d) - double(center[d]);
      int code = int(floor(x * inverse + 0.5));
      code = code > 127 ? 127 : code < -127 ? -127 : code;
      to[d] = static_cast<signed char>(code);
      const double value = double(code) * double(step);  // exact
      missed += (x - value) * (x - value);
      held += value * value;
      size += x * x;
    }
    missed = sqrt(warp_sum(missed)) * (1 + 1e-6);
    held = sqrt(warp_sum(held)) * (1 + 1e-6);
    size = sqrt(warp_sum(size)) * (1 + 1e-6);
    residual = larger(residual, missed + size * 0x1p-50);  // x itself is rounded, in proportion to it
    norm = larger(norm, larger(size, held));
  }
  if (lane == 0) {
    of_warps[warp] = residual;
    of_warps[warps + warp] = norm;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < warps; ++w) {
    residual = larger(residual, of_warps[w]);
    norm = larger(norm, of_warps[warps + w]);
  }
  stripes[blockIdx.x] = Stripe{above(norm), 1, above(residual), step};
}

}  // namespace

void encode_rows(const Slab& slab, int storage, int dim, const float* center, signed char* codes, Stripe* stripes, cudaStream_t stream) {
  const int64_t blocks = (slab.count + stripe_rows - 1) / stripe_rows;
  if (blocks > 0)
    launch("encode rows", encode_kernel, blocks, warps * 32, 2 * warps * sizeof(double), stream, 1, slab, storage, dim, center, codes, stripes);
}

}  // namespace attribution::cuda
