// What one thread of this machine can do at best. Compiled by ceilings.py with -march=native.
#include <time.h>

#include <cstdint>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__linux__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
#include <sys/syscall.h>
#include <unistd.h>
#define MATRICES
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
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", \
      "xmm14", "xmm15"
// What a register happens to hold may be subnormal numbers, which take some processors a hundred times as long.
#define CLEAR_16 asm volatile("vzeroall" ::: CLOBBERED)
#define CLEAR_30_31 \
  asm volatile("vpxorq %%zmm30, %%zmm30, %%zmm30\nvpxorq %%zmm31, %%zmm31, %%zmm31" ::: "xmm30", "xmm31")

#ifdef MATRICES
// Products of matrices of 16 x 64 bytes, into four sums: one for each time that a product takes.
#define FOUR_PRODUCTS(instruction)                                                                                    \
  instruction " %tmm6, %tmm4, %tmm0\n" instruction " %tmm6, %tmm5, %tmm1\n" instruction                         \
              " %tmm7, %tmm4, %tmm2\n" instruction " %tmm7, %tmm5, %tmm3\n"
#define MATRIX_PEAK(instruction, values)                                                                              \
  if (with_matrices()) {                                                                                              \
    const double begin = thread_seconds();                                                                            \
    for (int64_t i = 0; i < rounds / 16; ++i) asm volatile(FOUR_PRODUCTS(instruction));                               \
    const double seconds = thread_seconds() - begin;                                                                  \
    asm volatile("tilerelease");                                                                                      \
    return double(rounds / 16) * 4 * 16 * 16 * values / seconds * 1e-9;                                               \
  }

// Prepares this thread's matrix registers, if Linux allows it.
bool with_matrices() {
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) return false;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  struct {
    unsigned char palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } shapes;
  asm volatile("ldtilecfg %0" ::"m"(shapes));
  asm volatile(
      "tilezero %tmm0\ntilezero %tmm1\ntilezero %tmm2\ntilezero %tmm3\n"
      "tilezero %tmm4\ntilezero %tmm5\ntilezero %tmm6\ntilezero %tmm7");
  return true;
}
#else
#define MATRIX_PEAK(instruction, values)
#endif

// Multiply-adds per second of processor time, in 1e9; 0 where the machine has no such instruction.
extern "C" double float32_peak(int64_t rounds) {
#if defined(__AVX512F__)
  const double begin = thread_seconds();
  CLEAR_16;
  CLEAR_30_31;
  for (int64_t i = 0; i < rounds; ++i) asm volatile(TWELVE("vfmadd231ps", "zmm")::: CLOBBERED);
  return double(rounds) * 12 * 16 / (thread_seconds() - begin) * 1e-9;
#elif defined(__AVX2__) && defined(__FMA__)
  const double begin = thread_seconds();
  CLEAR_16;
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

// Of the dot products in vector registers, whether there are matrix registers or not.
extern "C" double bfloat16_dot_peak(int64_t rounds) {
#if defined(__AVX512BF16__)
  const double begin = thread_seconds();
  CLEAR_16;
  CLEAR_30_31;
  for (int64_t i = 0; i < rounds; ++i) asm volatile(TWELVE("vdpbf16ps", "zmm")::: CLOBBERED);
  return double(rounds) * 12 * 32 / (thread_seconds() - begin) * 1e-9;
#else
  (void)rounds;
  return 0;
#endif
}

extern "C" double bfloat16_peak(int64_t rounds) {
  MATRIX_PEAK("tdpbf16ps", 32)
  return bfloat16_dot_peak(rounds);
}

extern "C" double int8_peak(int64_t rounds) {
  MATRIX_PEAK("tdpbusd", 64)
#if defined(__AVX512VNNI__)
  const double begin = thread_seconds();
  CLEAR_16;
  CLEAR_30_31;
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
