// CUDA C++ as TVM writes it, for a compiler of the host: qualifiers, built-in variables, functions.
#pragma once
#include <type_traits>

#include "../runtime/simt.h"

#define __global__ __attribute__((noinline))
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __restrict__ __restrict
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0

#define threadIdx simt::thread_index()
#define blockIdx simt::block_index()
#define blockDim simt::block_size()
#define gridDim simt::grid_size()
#define warpSize simt::LANES
#define __syncthreads() simt::barrier(__LINE__, simt::SHARED | simt::GLOBAL)

// ---- numbers

#define SIMT_VECTORS(T, name)                                                          \
  using name##2 = simt::Vector<T, 2>;                                                  \
  using name##3 = simt::Vector<T, 3>;                                                  \
  using name##4 = simt::Vector<T, 4>;                                                  \
  SIMT_INLINE name##2 make_##name##2(T x, T y) { return {x, y}; }                      \
  SIMT_INLINE name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }              \
  SIMT_INLINE name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SIMT_VECTORS(float, float)
SIMT_VECTORS(int, int)
SIMT_VECTORS(unsigned int, uint)
SIMT_VECTORS(short, short)
SIMT_VECTORS(unsigned short, ushort)
SIMT_VECTORS(signed char, char)
SIMT_VECTORS(unsigned char, uchar)
#undef SIMT_VECTORS

SIMT_INLINE float max(float a, float b) { return fmaxf(a, b); }
SIMT_INLINE float min(float a, float b) { return fminf(a, b); }
SIMT_INLINE double max(double a, double b) { return fmax(a, b); }
SIMT_INLINE double min(double a, double b) { return fmin(a, b); }
template <class A, class B>
using SimtInteger = std::enable_if_t<std::is_integral_v<A> && std::is_integral_v<B>,
                                     std::common_type_t<A, B>>;
template <class A, class B>
SIMT_INLINE SimtInteger<A, B> max(A a, B b) {
  SimtInteger<A, B> x = a, y = b;
  return x > y ? x : y;
}
template <class A, class B>
SIMT_INLINE SimtInteger<A, B> min(A a, B b) {
  SimtInteger<A, B> x = a, y = b;
  return x < y ? x : y;
}
SIMT_INLINE float simt_expf(float x) { return expf(x); }
#define __expf simt_expf  // glibc declares another
SIMT_INLINE float __fdividef(float a, float b) { return a / b; }
SIMT_INLINE float simt_rsqrtf(float x) { return 1 / sqrtf(x); }
#define rsqrtf simt_rsqrtf  // some C libraries have one
SIMT_INLINE float __uint_as_float(unsigned u) { return simt::bits<float>(u); }
SIMT_INLINE float __int_as_float(int i) { return simt::bits<float>(i); }
SIMT_INLINE unsigned __float_as_uint(float f) { return simt::bits<unsigned>(f); }
SIMT_INLINE int __float_as_int(float f) { return simt::bits<int>(f); }
SIMT_CALL unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  uint64_t bytes = uint64_t(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) {
    unsigned pick = selector >> 4 * i, byte = bytes >> 8 * (pick & 7) & 255;
    if (pick & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}
SIMT_INLINE int __popc(unsigned bits) { return __builtin_popcount(bits); }
SIMT_INLINE int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; i++) c += int8_t(a >> 8 * i) * int8_t(b >> 8 * i);
  return c;
}
template <class T>
SIMT_INLINE T __ldg(const T* p) { return *p; }
template <class T>
SIMT_INLINE T __ldcs(const T* p) { return *p; }

// ---- warps. Of these, only __syncwarp orders memory.

SIMT_INLINE void __syncwarp(unsigned mask = ~0u) {
  simt::gather("__syncwarp", mask, 0, simt::SHARED | simt::GLOBAL);
}

// Lane `from` of the part of `width` lanes that the caller is in; itself where that is another part.
SIMT_INLINE int simt_lane_in_part(int from, int width) {
  int own = simt::lane_index();
  return (from ^ own) & ~(width - 1) ? own : from;
}
template <class T>
SIMT_INLINE T __shfl_sync(unsigned mask, T v, int from, int width = 32) {
  int first = simt::lane_index() & ~(width - 1);
  return simt::shuffle("__shfl_sync", mask, v, first | (from & (width - 1)));
}
template <class T>
SIMT_INLINE T __shfl_xor_sync(unsigned mask, T v, int x, int width = 32) {
  int from = simt_lane_in_part(simt::lane_index() ^ x, width);
  return simt::shuffle("__shfl_xor_sync", mask, v, from);
}
template <class T>
SIMT_INLINE T __shfl_down_sync(unsigned mask, T v, int by, int width = 32) {
  int from = simt_lane_in_part(simt::lane_index() + by, width);
  return simt::shuffle("__shfl_down_sync", mask, v, from);
}
template <class T>
SIMT_INLINE T __shfl_up_sync(unsigned mask, T v, int by, int width = 32) {
  int from = simt_lane_in_part(simt::lane_index() - by, width);
  return simt::shuffle("__shfl_up_sync", mask, v, from);
}

template <class T, class F>
SIMT_CALL T simt_reduce(const char* what, unsigned mask, T mine, T start, F add) {
  auto all = simt::gather(what, mask, mine);
  for (int lane = 0; lane < simt::LANES; lane++)
    if (mask >> lane & 1) start = add(start, all.of[lane]);
  return start;
}
SIMT_INLINE unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned mine = predicate ? 1u << simt::lane_index() : 0;
  return simt_reduce("__ballot_sync", mask, mine, 0u, [](unsigned a, unsigned b) { return a | b; });
}
SIMT_INLINE int __any_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) != 0;
}
SIMT_INLINE int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, !predicate) == 0;
}
template <class T>
SIMT_INLINE T __reduce_add_sync(unsigned mask, T v) {
  return simt_reduce("__reduce_add_sync", mask, v, T(0), [](T a, T b) { return T(a + b); });
}
template <class T>
SIMT_INLINE T __reduce_min_sync(unsigned mask, T v) {
  return simt_reduce("__reduce_min_sync", mask, v, v, [](T a, T b) { return a < b ? a : b; });
}
template <class T>
SIMT_INLINE T __reduce_max_sync(unsigned mask, T v) {
  return simt_reduce("__reduce_max_sync", mask, v, v, [](T a, T b) { return a > b ? a : b; });
}

SIMT_INLINE uint32_t __cvta_generic_to_shared(const void* p) { return simt::shared_address(p); }

#include "ptx.h"
