// Hopper's own instructions: the bulk tensor copy, barriers it completes, and products by four warps together. sm_90a
// only. hopper_emulated.h says what they do.
#pragma once
#include "ptx.h"

#ifndef ATTRIBUTION_EMULATED
#include <cuda.h>
#endif

namespace attribution::cuda {

// A matrix in device memory as the copy engine is told of it: columns first. It takes boxes of it.
struct Boxes {
  const unsigned char* base;
  Operand operand;
  uint64_t sizes[2];
  uint64_t stride;  // bytes from row to row
  uint32_t box[2];

  uint64_t row_bytes() const { return sizes[0] * uint64_t(bytes_of(operand)); }
};

// A matrix in shared memory as the tensor cores are told of it: lines of 128 bytes, swizzled, eight of them every 1024
// bytes. Bits 0 to 13: the address, 16 to 29: nothing that matters here, 32 to 45: the 1024, all in units of 16 bytes;
// 62 to 63: the swizzle. The address is a multiple of 1024, but for `advanced`.
constexpr uint64_t group_bytes = 8 * line_bytes;
__device__ __forceinline__ uint64_t matrix_at(uint32_t address) {
  return uint64_t((address & 0x3ffffu) >> 4) | (uint64_t(1) << 16) | ((group_bytes >> 4) << 32) | (uint64_t(1) << 62);
}
// Along the lines.
__device__ __forceinline__ uint64_t advanced(uint64_t matrix, int bytes) { return matrix + uint64_t(bytes >> 4); }

}  // namespace attribution::cuda

#ifdef ATTRIBUTION_EMULATED
#include "hopper_emulated.h"
#else

namespace attribution::cuda {

typedef CUtensorMap TensorMap;

#ifdef __CUDACC__
__device__ __forceinline__ uint32_t block_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// The same place in the shared memory of another block of the cluster.
__device__ __forceinline__ uint32_t map_to_block(uint32_t address, uint32_t rank) {
  uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}
__device__ __forceinline__ void make_barrier(uint32_t address, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(count) : "memory");
}
// Before a copy engine or another block may use them.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void arrive_expecting(uint32_t address, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes) : "memory");
}
__device__ __forceinline__ void arrive(uint32_t address) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address) : "memory");
}
// What it announces is that the tensor cores have read a stage. There is no store to publish, and a release to the whole
// cluster would wait for all of the device's memory each time; so would an acquire above empty the first-level cache.
__device__ __forceinline__ void arrive_in_cluster(uint32_t address) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address) : "memory");
}
// Until the phase of this parity has ended.
__device__ __forceinline__ void wait(uint32_t address, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(address),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Element `column` of row `row` is the first of the box. Fills with zeros beyond the matrix.
__device__ __forceinline__ void copy_box(const TensorMap& map, uint32_t to, uint32_t barrier, int column, int64_t row) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
               "l"(&map), "r"(column), "r"(int(row)), "r"(barrier)
               : "memory");
}
// To the same place, with the same barrier, in every block of the mask.
__device__ __forceinline__ void copy_box(const TensorMap& map, uint32_t to, uint32_t barrier, int column, int64_t row, uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&map), "r"(column), "r"(int(row)), "r"(barrier), "h"(mask)
      : "memory");
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int left>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory");
}
// The compiler may not move uses of the sums across this.
template <int count>
__device__ __forceinline__ void hold(float (&sums)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}
template <int count>
__device__ __forceinline__ void hold(int32_t (&sums)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+r"(sums[i])::"memory");
}
template <int registers>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

// The sums' names, and the sums, of a product of 64 lines by 128 or 256.
#define ATTRIBUTION_NAMES_64                                                                        \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
  "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, " \
  "%59, %60, %61, %62, %63"
#define ATTRIBUTION_NAMES_128                                                                        \
  ATTRIBUTION_NAMES_64 ", "                                                                          \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, "  \
  "%83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, "      \
  "%101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, " \
  "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define ATTRIBUTION_SUMS_8(sum, i) \
  sum(d[i]), sum(d[i + 1]), sum(d[i + 2]), sum(d[i + 3]), sum(d[i + 4]), sum(d[i + 5]), sum(d[i + 6]), sum(d[i + 7])
#define ATTRIBUTION_SUMS_32(sum, i) \
  ATTRIBUTION_SUMS_8(sum, i), ATTRIBUTION_SUMS_8(sum, i + 8), ATTRIBUTION_SUMS_8(sum, i + 16), ATTRIBUTION_SUMS_8(sum, i + 24)
#define ATTRIBUTION_SUMS_64(sum) ATTRIBUTION_SUMS_32(sum, 0), ATTRIBUTION_SUMS_32(sum, 32)
#define ATTRIBUTION_SUMS_128(sum) ATTRIBUTION_SUMS_64(sum), ATTRIBUTION_SUMS_32(sum, 64), ATTRIBUTION_SUMS_32(sum, 96)
// The operands after the sums are numbered on from them; sum: their constraint.
#define ATTRIBUTION_WGMMA(sums, columns, types, sum, more, a_name, b_name, add_name)                                \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " add_name ", 0;\n"                                                \
               "wgmma.mma_async.sync.aligned.m64n" columns types " {" ATTRIBUTION_NAMES_##sums "}, " a_name ", "     \
               b_name ", p" more ";\n}\n"                                                                           \
               : ATTRIBUTION_SUMS_##sums(sum)                                                                       \
               : "l"(a), "l"(b), "r"(int(add)))
#define ATTRIBUTION_WGMMA_128(types, sum, more) ATTRIBUTION_WGMMA(64, "128", types, sum, more, "%64", "%65", "%66")
#define ATTRIBUTION_WGMMA_256(types, sum, more) ATTRIBUTION_WGMMA(128, "256", types, sum, more, "%128", "%129", "%130")

// d = d + a . b, or a . b, over 32 bytes of each line; 64 lines of a, 2 count of b. Asynchronous.
template <Operand operand, class Sum, int count>
__device__ __forceinline__ void multiply_add(Sum (&d)[count], uint64_t a, uint64_t b, bool add) {
  static_assert(count == 64 || count == 128, "");
  if constexpr (count == 128) {
    if constexpr (operand == Operand::float32) ATTRIBUTION_WGMMA_256("k8.f32.tf32.tf32", "+f", ", 1, 1");
    else if constexpr (operand == Operand::float16) ATTRIBUTION_WGMMA_256("k16.f32.f16.f16", "+f", ", 1, 1, 0, 0");
    else if constexpr (operand == Operand::bfloat16) ATTRIBUTION_WGMMA_256("k16.f32.bf16.bf16", "+f", ", 1, 1, 0, 0");
    else ATTRIBUTION_WGMMA_256("k32.s32.s8.s8", "+r", "");
  } else {
    if constexpr (operand == Operand::float32) ATTRIBUTION_WGMMA_128("k8.f32.tf32.tf32", "+f", ", 1, 1");
    else if constexpr (operand == Operand::float16) ATTRIBUTION_WGMMA_128("k16.f32.f16.f16", "+f", ", 1, 1, 0, 0");
    else if constexpr (operand == Operand::bfloat16) ATTRIBUTION_WGMMA_128("k16.f32.bf16.bf16", "+f", ", 1, 1, 0, 0");
    else ATTRIBUTION_WGMMA_128("k32.s32.s8.s8", "+r", "");
  }
}

#endif

}  // namespace attribution::cuda
#endif
