// Enough of CUDA to run these kernels on a CPU, for tests on machines without a GPU: each thread is a fiber, and who
// waits gives way to another. What is asynchronous on a device happens, as the dice fall, at once or as late as it may,
// copies in any order, and threads, warps and blocks fall behind: a stage of shared memory that is read too early or
// given free too soon shows in the result. What a device would refuse, or answer with a hang, is an error.
//
// What this cannot show: races within a stretch of code that waits for nothing, memory models, speed.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
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
  size_t shared_bytes = 0;
  Barrier barrier;
  int alive = 0;
  std::vector<Warp> warps;
};

// Something asynchronous, in a group that its thread may wait for.
struct Work {
  int group;
  std::function<void()> run;
};
struct Queue {
  std::vector<Work> work;
  int group = 0;  // the one that is still open
};

struct Fiber {
  void* stack_pointer = nullptr;
  std::unique_ptr<char[]> stack;
  Dim3 thread;
  Cta* cta = nullptr;
  bool done = false;
  Queue copies, products;
  bool together = true;  // has done nothing on its own since its warp came together
  unsigned lane() const { return thread.x % 32; }
  Warp& warp() const { return cta->warps[thread.x / 32]; }
};

struct Machine {
  void* scheduler = nullptr;
  Fiber* current = nullptr;
  std::vector<Cta> cluster;
  Barrier cluster_barrier;
  int cluster_alive = 0;
  Dim3 grid, block;
  const std::function<void()>* body = nullptr;
  int64_t progress = 0;
  std::vector<std::function<void()>> under_way;  // copies that somebody's barrier waits for
  std::string failure;
  bool in_fiber = false;
  uint64_t dice = 1;
};
inline Machine machine;

inline uint32_t thrown(size_t sides) {
  machine.dice = machine.dice * 6364136223846793005u + 1442695040888963407u;
  return uint32_t((machine.dice >> 33) % sides);
}

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

// What a device would not do. Never returns.
[[noreturn]] inline void fail(const std::string& why) {
  if (!machine.in_fiber) throw std::runtime_error(why);
  machine.failure = why;
  for (;;) give_way();
}

// Work of one thread goes in order.
inline void finish(Queue& queue, int before) {
  size_t done = 0;
  for (; done < queue.work.size() && queue.work[done].group < before; ++done) queue.work[done].run();
  queue.work.erase(queue.work.begin(), queue.work.begin() + int64_t(done));
}
inline void begin(Queue& queue, std::function<void()> run) {
  queue.work.push_back({queue.group, std::move(run)});
  if (thrown(2)) finish(queue, queue.group + 1);
}

inline void begin_copy(std::function<void()> run) {
  if (thrown(2)) return run();
  machine.under_way.push_back(std::move(run));
}
inline bool land_one() {
  if (machine.under_way.empty()) return false;
  const auto landing = machine.under_way.begin() + thrown(machine.under_way.size());
  const std::function<void()> run = std::move(*landing);
  machine.under_way.erase(landing);
  run();
  return true;
}

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

inline void warp_barrier() {
  Fiber& me = *machine.current;
  arrive_and_wait(me.warp().barrier, me.warp().alive);
  me.together = true;
}

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

inline void run(const std::string& name, int64_t grid, int block, size_t shared_bytes, int cluster, const std::function<void()>& body) {
  constexpr size_t stack_bytes = 64 << 10;
  // What a block may have: of sm_90, or of the poorest that shares a kernel, sm_86.
  const size_t most_shared = name.find("sm_90a") != std::string::npos ? 227 << 10 : 99 << 10;
  if (grid < 1 || grid >= int64_t(1) << 31 || grid % cluster != 0 || block < 1 || block > 1024 || block % 32 != 0 || shared_bytes > most_shared)
    throw std::runtime_error(name + ": no device launches a grid of " + std::to_string(grid) + " blocks of " + std::to_string(block) +
                             " threads with " + std::to_string(shared_bytes) + " bytes, in clusters of " + std::to_string(cluster));
  machine.grid = Dim3(unsigned(grid));
  machine.block = Dim3(unsigned(block));
  machine.body = &body;
  machine.failure.clear();
  machine.under_way.clear();
  std::vector<Fiber> fibers(size_t(cluster) * size_t(block));
  for (Fiber& fiber : fibers) fiber.stack.reset(new char[stack_bytes]);
  for (int64_t x = 0; x < grid; x += cluster) {
    machine.cluster.assign(size_t(cluster), Cta());
    machine.cluster_barrier = Barrier();
    machine.cluster_alive = cluster * block;
    for (unsigned rank = 0; rank < unsigned(cluster); ++rank) {
      Cta& cta = machine.cluster[rank];
      cta.block = Dim3(unsigned(x) + rank);
      cta.rank = rank;
      cta.memory.assign(shared_bytes + 2048, 0xff);  // NaN: what nobody wrote shows
      cta.shared = cta.memory.data() + (1024 - reinterpret_cast<uintptr_t>(cta.memory.data()) % 1024);
      cta.shared_bytes = shared_bytes;
      cta.alive = block;
      cta.warps = std::vector<Warp>(size_t(block) / 32);
    }
    for (size_t i = 0; i < fibers.size(); ++i) {
      Fiber& fiber = fibers[i];
      fiber.thread = Dim3(unsigned(i) % unsigned(block));
      fiber.cta = &machine.cluster[i / size_t(block)];
      fiber.done = false;
      fiber.together = true;
      fiber.copies = fiber.products = Queue();
      void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(fiber.stack.get()) + stack_bytes) & ~uintptr_t(63));
      top -= 1;  // as if called: the stack pointer is 8 off a multiple of 16
      *--top = reinterpret_cast<void*>(&fiber_main);
      for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
      fiber.stack_pointer = top;
    }
    // Some stay behind for some rounds: single threads, warps, or a block. But not while nobody else can go on.
    const size_t together[] = {1, 32, size_t(block), fibers.size()};
    size_t unit = size_t(block);  // one block begins later
    uint32_t behind = cluster > 1 ? 1u << thrown(size_t(cluster)) : 0, rounds = thrown(16);
    bool left = true, all = false;
    while (left) {
      left = false;
      if (rounds-- == 0) {
        unit = together[thrown(4)];
        behind = unit == fibers.size() ? 0 : thrown(size_t(1) << 31);
        rounds = thrown(8);
      }
      const int64_t before = machine.progress;
      const size_t first = thrown(fibers.size());
      for (size_t i = 0; i < fibers.size(); ++i) {
        const size_t index = (first + i) % fibers.size();
        Fiber& fiber = fibers[index];
        if (fiber.done) continue;
        left = true;
        if (!all && behind >> (index / unit % 31) & 1) continue;
        machine.current = &fiber;
        machine.in_fiber = true;
        attribution_switch(&machine.scheduler, fiber.stack_pointer);
        machine.in_fiber = false;
        if (!machine.failure.empty()) throw std::runtime_error(name + ": " + machine.failure);
      }
      const bool stuck = machine.progress == before;
      if (left && stuck && all && !land_one()) throw std::runtime_error(name + ": every thread waits, none can go on");
      all = stuck;
    }
    if (!machine.under_way.empty()) throw std::runtime_error(name + ": a block ends while copies into it are under way");
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
inline bool __any_sync(unsigned mask, bool holds) { return __ballot_sync(mask, holds) != 0; }
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
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
