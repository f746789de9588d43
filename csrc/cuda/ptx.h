// Instructions that have no name in CUDA C++, for sm_80 and newer; and what they do, for emulate.h.
#pragma once
#include "device.h"

namespace attribution::cuda {

#ifdef ATTRIBUTION_EMULATED

// The device keeps the first bytes of shared memory to itself.
constexpr uint32_t shared_base = 1024;
inline uint32_t shared_address(const void* at) {
  return shared_base + uint32_t(static_cast<const unsigned char*>(at) - emulated::machine.current->cta->shared);
}
inline unsigned char* at_shared(const emulated::Cta& cta, uint32_t address, size_t bytes) {
  if (cta.alive == 0) emulated::fail("a block reaches into one that has ended");
  if (address < shared_base || address - shared_base + bytes > cta.shared_bytes)
    emulated::fail("shared memory ends before " + std::to_string(address) + " + " + std::to_string(bytes));
  return cta.shared + (address - shared_base);
}
inline unsigned char* at_shared(uint32_t address, size_t bytes) { return at_shared(*emulated::machine.current->cta, address, bytes); }

inline void copy_16(uint32_t to, const void* from, int bytes) {
  if (to % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) emulated::fail("cp.async: an address is not a multiple of 16");
  unsigned char* place = at_shared(to, 16);
  emulated::begin(emulated::machine.current->copies, [=] {
    std::memset(place, 0, 16);
    if (bytes > 0) std::memcpy(place, from, size_t(bytes));
  });
}
inline void commit_copies() { ++emulated::machine.current->copies.group; }
template <int left>
void wait_for_copies() {
  emulated::finish(emulated::machine.current->copies, emulated::machine.current->copies.group - left);
}

inline void load_matrices(uint32_t (&words)[4], uint32_t address) {
  emulated::Fiber& me = *emulated::machine.current;
  emulated::Warp& warp = me.warp();
  warp.slot[me.lane()][0] = address;
  emulated::warp_barrier();
  for (int i = 0; i < 4; ++i)
    std::memcpy(&words[i], at_shared(uint32_t(warp.slot[8 * i + int(me.lane()) / 4][0]), 16) + 4 * (me.lane() % 4), 4);
  emulated::warp_barrier();
}

// What tensor cores read of a word: two halves, one float of which they cut off 13 bits, or four codes. They cut sums of
// floats off, too.
struct Word {
  double value[4];
};
template <Operand operand>
Word values_of(uint32_t word) {
  if (operand == Operand::float32) return {{double(__uint_as_float(word & ~0x1fffu))}};
  if (operand == Operand::float16) return {{double(half_bits_to_float(uint16_t(word))), double(half_bits_to_float(uint16_t(word >> 16)))}};
  if (operand == Operand::bfloat16) return {{double(__uint_as_float(word << 16)), double(__uint_as_float(word & 0xffff0000u))}};
  return {{double(int8_t(word)), double(int8_t(word >> 8)), double(int8_t(word >> 16)), double(int8_t(word >> 24))}};
}
inline double product(const Word& a, const Word& b) {
  return a.value[0] * b.value[0] + a.value[1] * b.value[1] + a.value[2] * b.value[2] + a.value[3] * b.value[3];
}
inline void cut_off(double value, float* to) {
  const float rounded = float(value);
  *to = std::fabs(double(rounded)) > std::fabs(value) ? std::nextafter(rounded, 0.0f) : rounded;
}
inline void cut_off(double value, int32_t* to) {
  if (value != double(int32_t(value))) emulated::fail("a sum of codes overflows");
  *to = int32_t(value);
}

template <Operand operand, class Sum>
void multiply(Sum (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::Fiber& me = *emulated::machine.current;
  emulated::Warp& warp = me.warp();
  for (int i = 0; i < 4; ++i) warp.slot[me.lane()][i] = a[i];
  for (int i = 0; i < 2; ++i) warp.slot[me.lane()][4 + i] = b[i];
  emulated::warp_barrier();
  for (int i = 0; i < 4; ++i) {
    const int row = int(me.lane()) / 4, column = int(me.lane()) % 4 * 2 + i % 2, lower = i / 2;
    double sum = double(c[i]);
    for (int t = 0; t < 4; ++t)
      for (int half = 0; half < 2; ++half)
        sum += product(values_of<operand>(uint32_t(warp.slot[row * 4 + t][2 * half + lower])),
                       values_of<operand>(uint32_t(warp.slot[column * 4 + t][4 + half])));
    cut_off(sum, &c[i]);
  }
  emulated::warp_barrier();
}

#elif defined(__CUDACC__)

__device__ __forceinline__ uint32_t shared_address(const void* at) { return uint32_t(__cvta_generic_to_shared(at)); }

// Copies `bytes` (0 to 16) and fills up with zeros. Both addresses are multiples of 16.
__device__ __forceinline__ void copy_16(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int left>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

// c += a . b over 32 bytes of each line: 32 codes, 16 halves, or 8 floats cut to ten bits of mantissa.
template <Operand operand, class Sum>
__device__ __forceinline__ void multiply(Sum (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#define ATTRIBUTION_MMA(shape_and_types, sum)                                                                          \
  asm volatile("mma.sync.aligned." shape_and_types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : sum(c[0]), sum(c[1]), sum(c[2]), sum(c[3])                                                            \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (operand == Operand::float32) ATTRIBUTION_MMA("m16n8k8.row.col.f32.tf32.tf32.f32", "+f");
  else if constexpr (operand == Operand::float16) ATTRIBUTION_MMA("m16n8k16.row.col.f32.f16.f16.f32", "+f");
  else if constexpr (operand == Operand::bfloat16) ATTRIBUTION_MMA("m16n8k16.row.col.f32.bf16.bf16.f32", "+f");
  else ATTRIBUTION_MMA("m16n8k32.row.col.s32.s8.s8.s32", "+r");
#undef ATTRIBUTION_MMA
}

#endif

}  // namespace attribution::cuda
