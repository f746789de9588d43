// Hopper's own instructions: the bulk tensor copy, barriers it completes, and products by four warps together; and what
// they do, for emulate.h. sm_90a only.
#pragma once
#include "ptx.h"

#ifndef ATTRIBUTION_EMULATED
#include <cuda.h>
#endif

namespace attribution::cuda {

#ifdef ATTRIBUTION_EMULATED

// What cuTensorMapEncodeTiled would be told.
struct alignas(64) TensorMap {
  const unsigned char* base;
  int64_t columns, rows, stride;  // stride in bytes
  int bytes, box_columns, box_rows;
};

// A barrier in shared memory.
struct Phases {
  uint16_t count, left;
  int32_t bytes : 31;
  uint32_t phase : 1;
};
static_assert(sizeof(Phases) == 8, "");

inline unsigned char* at_cluster(uint32_t address) {  // rank + 1 above bit 24, or 0: this block's own
  const uint32_t rank = address >> 24;
  emulated::Cta& cta = rank == 0 ? *emulated::machine.current->cta : emulated::machine.cluster[rank - 1];
  return cta.shared + (address & 0xffffffu);
}
inline uint32_t map_to_block(uint32_t address, uint32_t rank) { return ((rank + 1) << 24) | address; }
inline uint32_t block_rank() { return emulated::machine.current->cta->rank; }

inline void settle_phase(Phases& phases) {
  if (phases.left != 0 || phases.bytes != 0) return;
  phases.left = phases.count;
  phases.phase ^= 1;
  ++emulated::machine.progress;
}
inline Phases& phases_at(uint32_t address) { return *reinterpret_cast<Phases*>(at_cluster(address)); }
inline void make_barrier(uint32_t address, uint32_t count) { phases_at(address) = Phases{uint16_t(count), uint16_t(count), 0, 0}; }
inline void publish_barriers() {}
inline void arrive_expecting(uint32_t address, uint32_t bytes) {
  Phases& phases = phases_at(address);
  phases.bytes = phases.bytes + int32_t(bytes);
  --phases.left;
  settle_phase(phases);
}
inline void arrive(uint32_t address) {
  Phases& phases = phases_at(address);
  --phases.left;
  settle_phase(phases);
}
inline void arrive_in_cluster(uint32_t address) { arrive(address); }
inline void wait(uint32_t address, uint32_t parity) {
  while (phases_at(address).phase == parity) emulated::give_way();
}
inline void cluster_barrier() {
  static emulated::Barrier all;
  static int alive;
  alive = int(emulated::machine.cluster.size() * emulated::machine.block.x);
  emulated::arrive_and_wait(all, alive);
}

inline void copy_box(const TensorMap& map, uint32_t to, uint32_t barrier, int column, int64_t row, uint16_t mask) {
  for (size_t rank = 0; rank < emulated::machine.cluster.size(); ++rank) {
    if (!(mask >> rank & 1)) continue;
    unsigned char* shared = emulated::machine.cluster[rank].shared;
    const int line = map.box_columns * map.bytes;
    for (int r = 0; r < map.box_rows; ++r)
      for (int c = 0; c < map.box_columns; ++c) {
        const uint32_t flat = to + uint32_t(r * line + c * map.bytes), at = flat ^ ((flat >> 7 & 7) << 4);
        if (row + r < map.rows && column + c < map.columns)
          std::memcpy(shared + at, map.base + (row + r) * map.stride + int64_t(column + c) * map.bytes, size_t(map.bytes));
        else
          std::memset(shared + at, 0, size_t(map.bytes));
      }
    Phases& phases = *reinterpret_cast<Phases*>(shared + barrier);
    phases.bytes = phases.bytes - map.box_rows * line;
    settle_phase(phases);
  }
}
inline void copy_box(const TensorMap& map, uint32_t to, uint32_t barrier, int column, int64_t row) {
  copy_box(map, to, barrier, column, row, uint16_t(1u << block_rank()));
}

inline void begin_products() {}
inline void commit_products() { ++emulated::machine.current->group; }
template <int left>
void wait_for_products() {
  emulated::Fiber& me = *emulated::machine.current;
  size_t done = 0;
  for (; done < me.products.size() && me.products[done].group < me.group - left; ++done) me.products[done].run();
  me.products.erase(me.products.begin(), me.products.begin() + int64_t(done));
}
template <int count>
void hold(float (&)[count]) {}
template <int registers>
void take_registers() {}
template <int registers>
void give_registers() {}

inline uint64_t matrix_at(uint32_t address) { return address; }
inline uint64_t advanced(uint64_t matrix, int bytes) { return matrix + uint64_t(bytes); }

template <Storage storage, int count>
void multiply_add(float (&d)[count], uint64_t a, uint64_t b, bool add) {
  float* sums = d;
  emulated::Fiber& me = *emulated::machine.current;
  const unsigned char* shared = me.cta->shared;
  const int lane = int(me.lane()), warp = int(me.thread.x / 32 % 4);
  const auto word = [shared](uint64_t matrix, int line, int w) {
    const uint32_t flat = uint32_t(matrix) + uint32_t(line / 8 * 1024 + line % 8 * 128 + w * 4), at = flat ^ ((flat >> 7 & 7) << 4);
    uint32_t bits;
    std::memcpy(&bits, shared + at, 4);
    return bits;
  };
  me.products.push_back({me.group, [=] {
    for (int i = 0; i < count; ++i) {
      const int row = warp * 16 + lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      double sum = add ? double(sums[i]) : 0.0;
      for (int w = 0; w < 8; ++w) sum += word_product<storage>(word(a, row, w), word(b, column, w));
      sums[i] = cut_off(sum);
    }
  }});
}

#elif defined(__CUDACC__)

typedef CUtensorMap TensorMap;

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
template <int registers>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

// Lines of 128 bytes, swizzled; eight of them every 1024 bytes. The address is a multiple of 1024, but for `advanced`.
__device__ __forceinline__ uint64_t matrix_at(uint32_t address) {
  return uint64_t((address & 0x3ffffu) >> 4) | (uint64_t(1) << 16) | (uint64_t(1024 >> 4) << 32) | (uint64_t(1) << 62);
}
__device__ __forceinline__ uint64_t advanced(uint64_t matrix, int bytes) { return matrix + uint64_t(bytes >> 4); }

#define ATTRIBUTION_WGMMA_128(shape_and_types, transposed)                                                       \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                                      \
               "wgmma.mma_async.sync.aligned.m64n128" shape_and_types " {"                                       \
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
               "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
               "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, " \
               "%59, %60, %61, %62, %63"                                                                         \
               "}, %64, %65, p, 1, 1" transposed ";\n}\n"                                                        \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),                         \
                 "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),                       \
                 "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]),                   \
                 "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),                   \
                 "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]),                   \
                 "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),                   \
                 "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),                   \
                 "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),                   \
                 "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]),                   \
                 "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]),                   \
                 "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])                                              \
               : "l"(a), "l"(b), "r"(int(add)))
#define ATTRIBUTION_WGMMA_256(shape_and_types, transposed)                                                       \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"                                                     \
               "wgmma.mma_async.sync.aligned.m64n256" shape_and_types " {"                                       \
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
               "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
               "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, " \
               "%59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, " \
               "%78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, " \
               "%97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, "   \
               "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"        \
               "}, %128, %129, p, 1, 1" transposed ";\n}\n"                                                      \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),                         \
                 "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),                       \
                 "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]),                   \
                 "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),                   \
                 "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]),                   \
                 "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),                   \
                 "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),                   \
                 "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),                   \
                 "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]),                   \
                 "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]),                   \
                 "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), "+f"(d[64]), "+f"(d[65]),                   \
                 "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]),                   \
                 "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]),                   \
                 "+f"(d[78]), "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]),                   \
                 "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]), "+f"(d[89]),                   \
                 "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]),                   \
                 "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]),                 \
                 "+f"(d[102]), "+f"(d[103]), "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]),             \
                 "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), "+f"(d[112]), "+f"(d[113]),             \
                 "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]),             \
                 "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]),             \
                 "+f"(d[126]), "+f"(d[127])                                                                      \
               : "l"(a), "l"(b), "r"(int(add)))

// d = d + a . b, or a . b, over 32 bytes of each line; 64 lines of a, 2 count of b. Asynchronous.
template <Storage storage, int count>
__device__ __forceinline__ void multiply_add(float (&d)[count], uint64_t a, uint64_t b, bool add) {
  static_assert(count == 64 || count == 128, "");
  if constexpr (count == 128) {
    if constexpr (storage == Storage::float32) ATTRIBUTION_WGMMA_256("k8.f32.tf32.tf32", "");
    else if constexpr (storage == Storage::float16) ATTRIBUTION_WGMMA_256("k16.f32.f16.f16", ", 0, 0");
    else ATTRIBUTION_WGMMA_256("k16.f32.bf16.bf16", ", 0, 0");
  } else {
    if constexpr (storage == Storage::float32) ATTRIBUTION_WGMMA_128("k8.f32.tf32.tf32", "");
    else if constexpr (storage == Storage::float16) ATTRIBUTION_WGMMA_128("k16.f32.f16.f16", ", 0, 0");
    else ATTRIBUTION_WGMMA_128("k16.f32.bf16.bf16", ", 0, 0");
  }
}

#endif

}  // namespace attribution::cuda
