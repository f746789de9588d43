// What Hopper's instructions do, for emulate.h: after the PTX ISA ("matrix descriptor", "mbarrier", "cp.async.bulk.tensor",
// "wgmma") and the driver's cuTensorMapEncodeTiled, not after the kernel that uses them.
#pragma once
#include "ptx.h"

namespace attribution::cuda {

struct alignas(64) TensorMap {
  Boxes boxes;
};

// Refuses what the driver refuses.
inline TensorMap encode(const Boxes& boxes) {
  const uint64_t box_bytes = boxes.box[0] * uint64_t(bytes_of(boxes.operand));
  const bool sizes = boxes.sizes[0] - 1 < uint64_t(1) << 32 && boxes.sizes[1] - 1 < uint64_t(1) << 32;
  const bool strides = boxes.stride % 16 == 0 && boxes.stride < uint64_t(1) << 40 && boxes.stride >= boxes.row_bytes();
  const bool box = boxes.box[0] - 1 < 256 && boxes.box[1] - 1 < 256 && box_bytes % 16 == 0 && box_bytes <= 128;  // of the swizzle
  if (!sizes || !strides || !box || reinterpret_cast<uintptr_t>(boxes.base) % 16 != 0) throw std::runtime_error("cuTensorMapEncodeTiled: invalid value");
  return TensorMap{boxes};
}

// Of each 1024 bytes, line by line of 128: the 16-byte piece p of line l lies at p ^ l.
inline uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

// A barrier in shared memory.
struct Phases {
  uint16_t count, left;
  int32_t bytes : 30;
  uint32_t phase : 1;
  uint32_t seen : 1;  // somebody's wait has returned since the last phase ended
};
static_assert(sizeof(Phases) == 8, "");

inline uint32_t map_to_block(uint32_t address, uint32_t rank) { return ((rank + 1) << 24) | address; }
inline uint32_t block_rank() { return emulated::machine.current->cta->rank; }
inline Phases& phases_at(emulated::Cta& cta, uint32_t address) {
  if (address % 8 != 0) emulated::fail("mbarrier: an address is not a multiple of 8");
  return *reinterpret_cast<Phases*>(at_shared(cta, address, sizeof(Phases)));
}
inline Phases& phases_at(uint32_t address) {  // rank + 1 above bit 24, or 0: this block's own
  emulated::machine.current->together = false;
  const uint32_t rank = address >> 24;
  return phases_at(rank == 0 ? *emulated::machine.current->cta : emulated::machine.cluster[rank - 1], address & 0xffffffu);
}

inline void count_down(Phases& phases, int arrivals, int bytes) {
  if (arrivals > phases.left) emulated::fail("mbarrier: more arrivals than it counts");
  if (arrivals > 0 && !phases.seen) emulated::fail("mbarrier: an arrival before anybody saw the last phase end");
  phases.left = uint16_t(phases.left - arrivals);
  phases.bytes = phases.bytes + bytes;
  if (std::abs(phases.bytes) >= 1 << 20) emulated::fail("mbarrier: more bytes than it counts");
  if (phases.left != 0 || phases.bytes != 0) return;
  phases.left = phases.count;
  phases.phase ^= 1;
  phases.seen = 0;
  ++emulated::machine.progress;
}
inline void make_barrier(uint32_t address, uint32_t count) { phases_at(address) = Phases{uint16_t(count), uint16_t(count), 0, 0, 1}; }
inline void publish_barriers() {}
inline void arrive_expecting(uint32_t address, uint32_t bytes) { count_down(phases_at(address), 1, int(bytes)); }
inline void arrive(uint32_t address) { count_down(phases_at(address), 1, 0); }
inline void arrive_in_cluster(uint32_t address) { arrive(address); }
inline void wait(uint32_t address, uint32_t parity) {
  while (phases_at(address).phase == parity) emulated::give_way();
  phases_at(address).seen = 1;
}
inline void cluster_barrier() {
  // It is .aligned: all threads of a warp must come to it at once.
  if (!emulated::machine.current->together) emulated::fail("barrier.cluster: a warp may come to it one by one");
  emulated::arrive_and_wait(emulated::machine.cluster_barrier, emulated::machine.cluster_alive);
}

// Into one block of the cluster. Beyond the matrix there are zeros, and they count.
inline void land(const Boxes& boxes, emulated::Cta& cta, uint32_t to, uint32_t barrier, int column, int64_t row) {
  const int bytes = int(bytes_of(boxes.operand)), line = int(boxes.box[0]) * bytes;
  for (int r = 0; r < int(boxes.box[1]); ++r)
    for (int c = 0; c < int(boxes.box[0]); ++c) {
      unsigned char* place = at_shared(cta, swizzled(to + uint32_t(r * line + c * bytes)), size_t(bytes));
      const bool inside = uint64_t(row + r) < boxes.sizes[1] && uint64_t(column + c) < boxes.sizes[0];
      if (inside) std::memcpy(place, boxes.base + uint64_t(row + r) * boxes.stride + uint64_t((column + c) * bytes), size_t(bytes));
      else std::memset(place, 0, size_t(bytes));
    }
  count_down(phases_at(cta, barrier), 0, -int(boxes.box[1]) * line);
}
inline void copy_box(const TensorMap& map, uint32_t to, uint32_t barrier, int column, int64_t row, uint16_t mask) {
  if (to % 128 != 0) emulated::fail("cp.async.bulk.tensor: an address is not a multiple of 128");
  if (row != int(row)) emulated::fail("cp.async.bulk.tensor: a coordinate is beyond 32 bits");
  if (mask == 0 || mask >> emulated::machine.cluster.size() != 0) emulated::fail("cp.async.bulk.tensor: no such block in the cluster");
  for (size_t rank = 0; rank < emulated::machine.cluster.size(); ++rank)
    if (mask >> rank & 1)
      emulated::begin_copy([=, boxes = map.boxes] { land(boxes, emulated::machine.cluster[rank], to, barrier, column, row); });
}
inline void copy_box(const TensorMap& map, uint32_t to, uint32_t barrier, int column, int64_t row) {
  copy_box(map, to, barrier, column, row, uint16_t(1u << block_rank()));
}

// All of these are .sync.aligned: a warp goes through them together, or not at all.
inline void begin_products() { emulated::warp_barrier(); }
inline void commit_products() {
  emulated::warp_barrier();
  ++emulated::machine.current->products.group;
}
template <int left>
void wait_for_products() {
  emulated::warp_barrier();
  emulated::finish(emulated::machine.current->products, emulated::machine.current->products.group - left);
  emulated::warp_barrier();  // one thread's wait is the warp's: it may say that all have read a stage
}
template <class Sum, int count>
void hold(Sum (&)[count]) {}
template <int registers>
void take_registers() {
  emulated::warp_barrier();
}
template <int registers>
void give_registers() {
  emulated::warp_barrier();
}

// Where byte `byte` of line `line` of a matrix lies, as its descriptor says.
inline uint32_t place_of(uint64_t matrix, int line, int byte) {
  const uint32_t start = uint32_t(matrix & 0x3fff) << 4, stride = uint32_t(matrix >> 32 & 0x3fff) << 4;
  const uint32_t base_offset = uint32_t(matrix >> 49 & 7), swizzle = uint32_t(matrix >> 62);
  if (swizzle != 1 || base_offset != 0 || (start & 0x380) != 0 || stride % 1024 != 0)
    emulated::fail("wgmma: the descriptor does not say lines of 128 bytes whose pattern begins at a multiple of 1024");
  return swizzled(start + uint32_t(line / 8) * stride + uint32_t(line % 8 * 128 + byte));
}

template <Operand operand, class Sum, int count>
void multiply_add(Sum (&d)[count], uint64_t a, uint64_t b, bool add) {
  Sum* sums = d;
  emulated::Fiber& me = *emulated::machine.current;
  emulated::Cta* cta = me.cta;
  const int lane = int(me.lane()), warp = int(me.thread.x / 32 % 4);
  struct Line {
    Word words[8];
    Line(const emulated::Cta& cta, uint64_t matrix, int line) {
      for (int w = 0; w < 8; ++w) {
        uint32_t word;
        std::memcpy(&word, at_shared(cta, place_of(matrix, line, w * 4), 4), 4);
        words[w] = values_of<operand>(word);
      }
    }
  };
  emulated::begin(me.products, [=] {
    const Line rows[2] = {{*cta, a, warp * 16 + lane / 4}, {*cta, a, warp * 16 + lane / 4 + 8}};
    for (int i = 0; i < count; i += 4)
      for (int odd = 0; odd < 2; ++odd) {
        const Line column(*cta, b, i / 4 * 8 + lane % 4 * 2 + odd);
        for (int lower = 0; lower < 2; ++lower) {
          Sum& to = sums[i + 2 * lower + odd];
          double sum = add ? double(to) : 0.0;
          for (int w = 0; w < 8; ++w) sum += product(rows[lower].words[w], column.words[w]);
          cut_off(sum, &to);
        }
      }
  });
}

}  // namespace attribution::cuda
