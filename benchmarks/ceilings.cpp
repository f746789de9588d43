// What one thread of this machine can do at best. Compiled by ceilings.py with -march=native.
#include <time.h>

#include <cstdint>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

double thread_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

}  // namespace

// Assembly, because compilers rewrite loops that only burn time.
#define TWELVE(instruction, register)                                                                                \
  instruction " %%" register "30, %%" register "31, %%" register "0\n" instruction " %%" register "30, %%" register   \
  "31, %%" register "1\n" instruction " %%" register "30, %%" register "31, %%" register "2\n" instruction            \
  " %%" register "30, %%" register "31, %%" register "3\n" instruction " %%" register "30, %%" register               \
  "31, %%" register "4\n" instruction " %%" register "30, %%" register "31, %%" register "5\n" instruction            \
  " %%" register "30, %%" register "31, %%" register "6\n" instruction " %%" register "30, %%" register               \
  "31, %%" register "7\n" instruction " %%" register "30, %%" register "31, %%" register "8\n" instruction            \
  " %%" register "30, %%" register "31, %%" register "9\n" instruction " %%" register "30, %%" register               \
  "31, %%" register "10\n" instruction " %%" register "30, %%" register "31, %%" register "11\n"
#define CLOBBERED                                                                                                     \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11"

// Multiply-adds per second of processor time, in 1e9; 0 where the machine has no such instruction.
extern "C" double float32_peak(int64_t rounds) {
#if defined(__AVX512F__)
  const double begin = thread_seconds();
  for (int64_t i = 0; i < rounds; ++i) asm volatile(TWELVE("vfmadd231ps", "zmm")::: CLOBBERED);
  return double(rounds) * 12 * 16 / (thread_seconds() - begin) * 1e-9;
#elif defined(__AVX2__) && defined(__FMA__)
  const double begin = thread_seconds();
  for (int64_t i = 0; i < rounds; ++i)
    asm volatile(
        "vfmadd231ps %%ymm14, %%ymm15, %%ymm0\nvfmadd231ps %%ymm14, %%ymm15, %%ymm1\nvfmadd231ps %%ymm14, %%ymm15, %%ymm2\n"
        "vfmadd231ps %%ymm14, %%ymm15, %%ymm3\nvfmadd231ps %%ymm14, %%ymm15, %%ymm4\nvfmadd231ps %%ymm14, %%ymm15, %%ymm5\n"
        "vfmadd231ps %%ymm14, %%ymm15, %%ymm6\nvfmadd231ps %%ymm14, %%ymm15, %%ymm7\nvfmadd231ps %%ymm14, %%ymm15, %%ymm8\n"
        "vfmadd231ps %%ymm14, %%ymm15, %%ymm9\n" ::
            : CLOBBERED);
  return double(rounds) * 10 * 8 / (thread_seconds() - begin) * 1e-9;
#else
  (void)rounds;
  return 0;
#endif
}

extern "C" double bfloat16_peak(int64_t rounds) {
#if defined(__AVX512BF16__)
  const double begin = thread_seconds();
  for (int64_t i = 0; i < rounds; ++i) asm volatile(TWELVE("vdpbf16ps", "zmm")::: CLOBBERED);
  return double(rounds) * 12 * 32 / (thread_seconds() - begin) * 1e-9;
#else
  (void)rounds;
  return 0;
#endif
}

extern "C" double int8_peak(int64_t rounds) {
#if defined(__AVX512VNNI__)
  const double begin = thread_seconds();
  for (int64_t i = 0; i < rounds; ++i) asm volatile(TWELVE("vpdpbusd", "zmm")::: CLOBBERED);
  return double(rounds) * 12 * 64 / (thread_seconds() - begin) * 1e-9;
#else
  (void)rounds;
  return 0;
#endif
}

// Reads [begin, begin + bytes) once, asking for lines `ahead` bytes before they are needed (0: leaving that to the
// hardware); returns processor seconds.
extern "C" double read_seconds(const unsigned char* begin, int64_t bytes, int64_t ahead) {
  typedef uint64_t Line __attribute__((vector_size(64), aligned(8)));
  Line sums[4] = {};
  const double start = thread_seconds();
  for (int64_t at = 0; at + 256 <= bytes; at += 256)
    for (int i = 0; i < 4; ++i) {
      if (ahead) __builtin_prefetch(begin + at + 64 * i + ahead);
      sums[i] ^= *reinterpret_cast<const Line*>(begin + at + 64 * i);
    }
  const double seconds = thread_seconds() - start;
  volatile uint64_t sink = (sums[0] ^ sums[1] ^ sums[2] ^ sums[3])[0];
  (void)sink;
  return seconds;
}
