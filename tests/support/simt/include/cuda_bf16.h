// bfloat16 as CUDA has it: computed in float, rounded once an operation.
#pragma once
#include "cuda.h"

struct nv_bfloat16 {
  uint16_t bits;
  nv_bfloat16() = default;
  nv_bfloat16(float f) : bits(simt::to_bf16(f)) {}
  operator float() const { return simt::from_bf16(bits); }
};
using __nv_bfloat16 = nv_bfloat16;

struct nv_bfloat162 : simt::Vector<nv_bfloat16, 2> {
  using simt::Vector<nv_bfloat16, 2>::Vector;
};
using __nv_bfloat162 = nv_bfloat162;

SIMT_INLINE bool __hgt(nv_bfloat16 a, nv_bfloat16 b) { return float(a) > float(b); }
SIMT_INLINE bool __hlt(nv_bfloat16 a, nv_bfloat16 b) { return float(a) < float(b); }
SIMT_INLINE float __bfloat162float(nv_bfloat16 a) { return a; }
SIMT_INLINE nv_bfloat16 __float2bfloat16(float a) { return a; }
SIMT_INLINE nv_bfloat16 __float2bfloat16_rn(float a) { return a; }
SIMT_INLINE nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {a, b}; }
SIMT_INLINE nv_bfloat162 __hsub2(nv_bfloat162 a, nv_bfloat162 b) {
  return {float(a.x) - float(b.x), float(a.y) - float(b.y)};
}
SIMT_INLINE nv_bfloat162 __hmul2(nv_bfloat162 a, nv_bfloat162 b) {
  return {float(a.x) * float(b.x), float(a.y) * float(b.y)};
}
