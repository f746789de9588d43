// Enough of CUDA to run these kernels on a CPU, for tests on machines without a GPU: each thread is a fiber, and who
// waits gives way to the next. Asynchronous copies happen at once and matrix products at the last moment allowed, so
// that a stage of shared memory given free too early shows in the result; when nobody can go on, it says so.
//
// What this cannot show: races between fibers that do not wait, memory models, speed.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace emulated {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  Dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
};

struct Warp {
  uint64_t slot[32][8];
  Barrier barrier;
  int alive = 32;
};

struct Cta {
  Dim3 block;
  unsigned rank = 0;
  std::vector<unsigned char> memory;
  unsigned char* shared = nullptr;
  Barrier barrier;
  int alive = 0;
  std::vector<Warp> warps;
};

struct Product {
  int group;
  std::function<void()> run;
};

struct Fiber {
  void* stack_pointer = nullptr;
  std::unique_ptr<char[]> stack;
  Dim3 thread;
  Cta* cta = nullptr;
  bool done = false;
  std::vector<Product> products;
  int group = 0;
  unsigned lane() const { return thread.x % 32; }
  Warp& warp() const { return cta->warps[thread.x / 32]; }
};

struct Machine {
  void* scheduler = nullptr;
  Fiber* current = nullptr;
  std::vector<Cta> cluster;
  Dim3 grid, block;
  const std::function<void()>* body = nullptr;
  int64_t progress = 0;
};
inline Machine machine;

extern "C" void attribution_switch(void** from, void* to);
asm(R"(
.text
.weak attribution_switch
attribution_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

inline void give_way() { attribution_switch(&machine.current->stack_pointer, machine.scheduler); }

inline void complete(Barrier& barrier) {
  barrier.arrived = 0;
  ++barrier.generation;
  ++machine.progress;
}

inline void arrive_and_wait(Barrier& barrier, const int& alive) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived >= alive) complete(barrier);
  while (barrier.generation == generation) give_way();
}

inline void warp_barrier() { arrive_and_wait(machine.current->warp().barrier, machine.current->warp().alive); }

inline void fiber_main() {
  (*machine.body)();
  Fiber& me = *machine.current;
  me.done = true;
  ++machine.progress;
  Warp& warp = me.warp();
  if (--warp.alive > 0 && warp.barrier.arrived >= warp.alive) complete(warp.barrier);
  if (--me.cta->alive > 0 && me.cta->barrier.arrived >= me.cta->alive) complete(me.cta->barrier);
  give_way();
  std::abort();
}

inline void run(Dim3 grid, Dim3 block, size_t shared_bytes, unsigned cluster, const std::function<void()>& body) {
  constexpr size_t stack_bytes = 64 << 10;
  machine.grid = grid;
  machine.block = block;
  machine.body = &body;
  std::vector<Fiber> fibers(size_t(cluster) * block.x);
  for (Fiber& fiber : fibers) fiber.stack.reset(new char[stack_bytes]);
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; x += cluster) {
      machine.cluster.assign(cluster, Cta());
      for (unsigned rank = 0; rank < cluster; ++rank) {
        Cta& cta = machine.cluster[rank];
        cta.block = Dim3(x + rank, y);
        cta.rank = rank;
        cta.memory.assign(shared_bytes + 2048, 0xff);  // NaN: what nobody wrote shows
        cta.shared = cta.memory.data() + (1024 - reinterpret_cast<uintptr_t>(cta.memory.data()) % 1024);
        cta.alive = int(block.x);
        cta.warps = std::vector<Warp>(block.x / 32);
      }
      for (size_t i = 0; i < fibers.size(); ++i) {
        Fiber& fiber = fibers[i];
        fiber.thread = Dim3(unsigned(i) % block.x);
        fiber.cta = &machine.cluster[i / block.x];
        fiber.done = false;
        fiber.group = 0;
        fiber.products.clear();
        void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(fiber.stack.get()) + stack_bytes) & ~uintptr_t(63));
        top -= 1;  // as if called: the stack pointer is 8 off a multiple of 16
        *--top = reinterpret_cast<void*>(&fiber_main);
        for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
        fiber.stack_pointer = top;
      }
      for (bool left = true; left;) {
        left = false;
        const int64_t before = machine.progress;
        for (Fiber& fiber : fibers) {
          if (fiber.done) continue;
          left = true;
          machine.current = &fiber;
          attribution_switch(&machine.scheduler, fiber.stack_pointer);
        }
        if (left && machine.progress == before) {
          std::fprintf(stderr, "emulated kernel: every thread waits, none can go on\n");
          std::abort();
        }
      }
    }
}

template <class T>
T exchange(T value, unsigned from) {
  Fiber& me = *machine.current;
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  me.warp().slot[me.lane()][0] = bits;
  warp_barrier();
  bits = me.warp().slot[from % 32][0];
  std::memcpy(&value, &bits, sizeof value);
  warp_barrier();
  return value;
}

}  // namespace emulated

#define threadIdx (emulated::machine.current->thread)
#define blockIdx (emulated::machine.current->cta->block)
#define gridDim (emulated::machine.grid)
#define blockDim (emulated::machine.block)

inline void __syncthreads() {
  emulated::Cta& cta = *emulated::machine.current->cta;
  emulated::arrive_and_wait(cta.barrier, cta.alive);
}
inline void __syncwarp() { emulated::warp_barrier(); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulated::exchange(value, emulated::machine.current->lane() ^ unsigned(mask));
}
template <class T>
T __shfl_up_sync(unsigned, T value, int by) {
  const int lane = int(emulated::machine.current->lane());
  return emulated::exchange(value, unsigned(lane >= by ? lane - by : lane));
}
inline uint32_t __ballot_sync(unsigned, bool holds) {
  emulated::Fiber& me = *emulated::machine.current;
  me.warp().slot[me.lane()][0] = holds;
  emulated::warp_barrier();
  uint32_t bits = 0;
  for (unsigned lane = 0; lane < 32; ++lane) bits |= uint32_t(me.warp().slot[lane][0] & 1) << lane;
  emulated::warp_barrier();
  return bits;
}
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int __clzll(long long bits) { return bits ? __builtin_clzll(static_cast<unsigned long long>(bits)) : 64; }

template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return emulated::exchange(value, unsigned(from));
}

template <class T, class U>
T atomicAdd(T* to, U value) {
  const T old = *to;
  *to = T(old + T(value));
  return old;
}
template <class T, class U>
T atomicMax(T* to, U value) {
  const T old = *to;
  if (T(value) > old) *to = T(value);
  return old;
}
template <class T, class U>
T atomicMin(T* to, U value) {
  const T old = *to;
  if (T(value) < old) *to = T(value);
  return old;
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

typedef int cudaError_t;
typedef void* cudaStream_t;
struct uint4 {
  unsigned x, y, z, w;
};
