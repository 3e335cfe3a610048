// float16 as CUDA has it.
#pragma once
#include "cuda.h"

using half = simt::Half;
using __half = half;
struct half2 : simt::Vector<half, 2> {
  using simt::Vector<half, 2>::Vector;
};
using __half2 = half2;

SIMT_INLINE bool __hgt(half a, half b) { return a > b; }
SIMT_INLINE bool __hlt(half a, half b) { return a < b; }
SIMT_INLINE float __half2float(half a) { return a; }
SIMT_INLINE half __float2half(float a) { return half(a); }
SIMT_INLINE half __float2half_rn(float a) { return half(a); }
SIMT_INLINE half __ushort_as_half(unsigned short bits) { return simt::bits<half>(bits); }
SIMT_INLINE unsigned short __half_as_ushort(half a) { return simt::bits<unsigned short>(a); }
SIMT_INLINE half2 __hmul2(half2 a, half2 b) { return {half(a.x * b.x), half(a.y * b.y)}; }
