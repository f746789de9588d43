// The CPU's exponential, to the last bit: the same lines, compiled for the device too. They are kept free of CUDA's
// words, so that a change here never makes the CPU's module stale. Wants -fmad=false.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define inline __host__ __device__ inline
#include "../exponential.h"
#undef inline
#else
#include "../exponential.h"
#endif
