// PTX instructions, by their names with "_" for "." and "::". translate.py makes calls of these out
// of asm statements: operands in the order of the text, without brackets.
#pragma once
#include <tuple>
#include <utility>

#include "../runtime/simt.h"

namespace simt_ptx {

SIMT_INLINE void prmt_b32(uint32_t& d, uint32_t a, uint32_t b, uint32_t selector) {
  d = __byte_perm(a, b, selector);
}
SIMT_INLINE void lop3_b32(uint32_t& d, uint32_t a, uint32_t b, uint32_t c, int table) {
  uint32_t result = 0;
  for (int i = 0; i < 8; i++)
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  d = result;
}

// On the GPU exact to 22 bits.
SIMT_INLINE void ex2_approx_ftz_f32(float& d, float a) {
  float result = exp2f(a);
  d = result < 0x1p-126f ? 0 : result;
}
// The first operand is the upper half.
SIMT_INLINE void cvt_rn_f16x2_f32(uint32_t& d, float high, float low) {
  d = uint32_t(simt::bits<uint16_t>(simt::Half(high))) << 16 |
      simt::bits<uint16_t>(simt::Half(low));
}
SIMT_INLINE void cvt_rn_bf16x2_f32(uint32_t& d, float high, float low) {
  d = uint32_t(simt::to_bf16(high)) << 16 | simt::to_bf16(low);
}

// Of one launch after another, nothing overlaps here.
SIMT_INLINE void griddepcontrol_wait() {}
SIMT_INLINE void griddepcontrol_launch_dependents() {}

template <class Word>
SIMT_INLINE void load_16_bytes(Word& a, Word& b, Word& c, Word& d, const void* p) {
  simt::note_read(p, 16);
  Word words[4];
  simt::copy(words, p, 16);
  a = words[0], b = words[1], c = words[2], d = words[3];
}
SIMT_INLINE void ld_global_b32(uint32_t& a, const void* p) {
  simt::note_read(p, 4);
  simt::copy(&a, p, 4);
}
SIMT_INLINE void ld_global_v2_b32(uint32_t& a, uint32_t& b, const void* p) {
  simt::note_read(p, 8);
  uint32_t words[2];
  simt::copy(words, p, 8);
  a = words[0], b = words[1];
}
#define ld_global_v4_b32 load_16_bytes
#define ld_global_v4_f32 load_16_bytes
#define ld_global_L1_no_allocate_v4_b32 load_16_bytes
#define ld_global_nc_v4_b32 load_16_bytes
#define ld_global_nc_v4_u32 load_16_bytes
#define ld_global_nc_L1_no_allocate_v4_b32 load_16_bytes
#define ld_global_nc_L1_no_allocate_v4_u32 load_16_bytes

// ---- cp.async

SIMT_INLINE void cp_async_commit_group() { simt::async_commit(); }
SIMT_INLINE void cp_async_wait_group(int groups) { simt::async_wait(groups); }
SIMT_INLINE void cp_async_wait_all() {
  simt::async_commit();
  simt::async_wait(0);
}
SIMT_INLINE void cp_async_cg_shared_global(uint32_t to, const void* from, int size) {
  simt::async_copy(to, from, size, size);
}
SIMT_INLINE void cp_async_cg_shared_global(uint32_t to, const void* from, int size, int used) {
  simt::async_copy(to, from, size, used);
}
#define cp_async_ca_shared_global cp_async_cg_shared_global

// ---- mbarriers, bulk copies

SIMT_INLINE void setp_ne_b32(bool& p, uint32_t a, uint32_t b) { p = a != b; }
SIMT_INLINE void fence_proxy_async_shared_cta() { simt::proxy_fence(); }
SIMT_INLINE void mbarrier_init_shared_cta_b64(uint32_t barrier, uint32_t arrivals) {
  simt::mbarrier_init(barrier, arrivals);
}
SIMT_INLINE void mbarrier_arrive_expect_tx_shared_cta_b64(uint32_t barrier, uint32_t bytes) {
  simt::mbarrier_arrive(barrier, bytes);
}
// Here it waits as long as it takes. Elsewhere it may give up, to be tried again.
SIMT_INLINE void mbarrier_try_wait_parity_shared_cta_b64(bool& p, uint32_t barrier,
                                                         uint32_t parity) {
  simt::mbarrier_wait(barrier, parity);
  p = true;
}
SIMT_INLINE void selp_b32(uint32_t& d, uint32_t a, uint32_t b, bool p) { d = p ? a : b; }
SIMT_INLINE void cp_async_bulk_shared_cluster_global_mbarrier_complete_tx_bytes(
    uint32_t to, const void* from, uint32_t size, uint32_t barrier) {
  simt::bulk_copy(to, from, size, barrier);
}

// ---- matrices

// Lane 8m + r gives the address of row r of matrix m; lane l gets elements 2(l % 4) and the next of
// row l / 4; of the transposed matrix with .trans.
template <int N>
SIMT_INLINE void ldmatrix(uint32_t* (&registers)[N], uint32_t address, bool trans) {
  auto rows = simt::gather("ldmatrix", ~0u, address);
  int lane = simt::lane_index();
  for (int m = 0; m < N; m++) {
    uint32_t word = 0;
    for (int i = 0; i < 2; i++) {
      int row = lane / 4, column = lane % 4 * 2 + i;
      uint32_t at = rows.of[8 * m + (trans ? column : row)];
      if (at % 16) simt::fail("ldmatrix: the row at %x is not aligned to 16 bytes", at);
      auto element = (const uint16_t*)simt::shared_pointer(at) + (trans ? row : column);
      if (trans) simt::note_read(element, 2);
      if (!trans && i == 0) simt::note_read(element, 4);
      uint16_t value;
      simt::copy(&value, element, 2);
      word |= uint32_t(value) << 16 * i;
    }
    *registers[m] = word;
  }
}
#define LDMATRIX(name, trans)                                                                    \
  SIMT_INLINE void ldmatrix_sync_aligned_m8n8_x1_##name(uint32_t& a, uint32_t address) {         \
    uint32_t* r[] = {&a};                                                                        \
    ldmatrix<1>(r, address, trans);                                                              \
  }                                                                                              \
  SIMT_INLINE void ldmatrix_sync_aligned_m8n8_x2_##name(uint32_t& a, uint32_t& b,                \
                                                        uint32_t address) {                      \
    uint32_t* r[] = {&a, &b};                                                                    \
    ldmatrix<2>(r, address, trans);                                                              \
  }                                                                                              \
  SIMT_INLINE void ldmatrix_sync_aligned_m8n8_x4_##name(                                         \
      uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t address) {                    \
    uint32_t* r[] = {&a, &b, &c, &d};                                                            \
    ldmatrix<4>(r, address, trans);                                                              \
  }
LDMATRIX(shared_b16, false)
LDMATRIX(trans_shared_b16, true)
#undef LDMATRIX

// mma.sync m16n8k…: D = A · B + C. A register holds P elements that follow each other in k; with
// g = lane / 4 and t = lane % 4, A's register 2j + h has row g + 8h from k = 4P·j + P·t, B's
// register j column g from the same k, and C's and D's i has row g + i / 2 · 8, column 2t + i % 2.
// Products are summed in double and rounded once; tensor cores round more, and differently.
template <int K, int P>
struct Fragments {
  uint32_t a[K / (2 * P)], b[K / (4 * P)];
};
template <class Number>
struct Results {
  Number of[4];
};
template <class Sum, class Element, int K, int P, class Number>
SIMT_CALL Results<Number> mma(Fragments<K, P> mine, Results<Number> c) {
  auto all = simt::gather("mma.sync", ~0u, mine);
  int g = simt::lane_index() / 4, t = simt::lane_index() % 4;
  for (int i = 0; i < 4; i++) {
    int row = g + i / 2 * 8, column = 2 * t + i % 2;
    Sum sum = c.of[i];
    for (int k = 0; k < K; k++) {
      int j = k / (4 * P), lane = k % (4 * P) / P;
      Sum x = Element::of(all.of[row % 8 * 4 + lane].a[2 * j + row / 8], k % P);
      Sum y = Element::of(all.of[column * 4 + lane].b[j], k % P);
      sum += x * y;
    }
    c.of[i] = Number(sum);
  }
  return c;
}
struct Bf16 {
  SIMT_INLINE float of(uint32_t word, int i) { return simt::from_bf16(word >> 16 * i); }
};
struct F16 {
  SIMT_INLINE float of(uint32_t word, int i) {
    return simt::bits<simt::Half>(uint16_t(word >> 16 * i));
  }
};
struct S8 {
  SIMT_INLINE int of(uint32_t word, int i) { return int8_t(word >> 8 * i); }
};

#define MMA_LONG(name, P, K, Sum, Element)                                                       \
  template <class Number>                                                                        \
  SIMT_INLINE void mma_sync_aligned_##name(                                                      \
      Number& d0, Number& d1, Number& d2, Number& d3, uint32_t a0, uint32_t a1, uint32_t a2,     \
      uint32_t a3, uint32_t b0, uint32_t b1, Number c0, Number c1, Number c2, Number c3) {       \
    Fragments<K, P> fragments = {{a0, a1, a2, a3}, {b0, b1}};                                    \
    auto d = mma<Sum, Element>(fragments, Results<Number>{{c0, c1, c2, c3}});                    \
    d0 = d.of[0], d1 = d.of[1], d2 = d.of[2], d3 = d.of[3];                                      \
  }
#define MMA_SHORT(name, P, K, Sum, Element)                                                      \
  template <class Number>                                                                        \
  SIMT_INLINE void mma_sync_aligned_##name(                                                      \
      Number& d0, Number& d1, Number& d2, Number& d3, uint32_t a0, uint32_t a1, uint32_t b0,     \
      Number c0, Number c1, Number c2, Number c3) {                                              \
    Fragments<K, P> fragments = {{a0, a1}, {b0}};                                                \
    auto d = mma<Sum, Element>(fragments, Results<Number>{{c0, c1, c2, c3}});                    \
    d0 = d.of[0], d1 = d.of[1], d2 = d.of[2], d3 = d.of[3];                                      \
  }
MMA_LONG(m16n8k16_row_col_f32_bf16_bf16_f32, 2, 16, double, Bf16)
MMA_LONG(m16n8k16_row_col_f32_f16_f16_f32, 2, 16, double, F16)
MMA_LONG(m16n8k32_row_col_s32_s8_s8_s32, 4, 32, int64_t, S8)
MMA_SHORT(m16n8k8_row_col_f32_bf16_bf16_f32, 2, 8, double, Bf16)
MMA_SHORT(m16n8k8_row_col_f32_f16_f16_f32, 2, 8, double, F16)
MMA_SHORT(m16n8k16_row_col_s32_s8_s8_s32, 4, 16, int64_t, S8)
#undef MMA_LONG
#undef MMA_SHORT

// mma of e2m1 by e4m3, m16n8k32, each block of 32 with its e8m0 scale. The selectors say which byte
// of whose registers has it: of rows those of the first or second two lanes of four, of columns
// those of one of four.
struct ScaledFragments {
  Fragments<32, 4> of;
  uint32_t scale_a, scale_b;
  uint16_t byte_a, lanes_a, byte_b, lane_b;
};
SIMT_INLINE double e2m1(uint8_t byte) {
  if (byte & 0xC3) simt::fail("an e2m1 of mma.sync is in bits 2 to 5, the others of its byte are 0");
  int magnitude = byte >> 2 & 7, exponent = magnitude >> 1, digit = magnitude & 1;
  double value = exponent ? std::ldexp(2 + digit, exponent - 2) : digit * 0.5;
  return byte & 0x20 ? -value : value;
}
SIMT_INLINE double e4m3(uint8_t byte) {
  int exponent = byte >> 3 & 15, digits = byte & 7;
  if (exponent == 15 && digits == 7) return NAN;
  double value = exponent ? std::ldexp(8 + digits, exponent - 10) : std::ldexp(digits, -9);
  return byte & 0x80 ? -value : value;
}
SIMT_INLINE double e8m0(uint32_t word, int byte) {
  int scale = word >> 8 * byte & 255;
  return scale == 255 ? NAN : std::ldexp(1.0, scale - 127);
}
SIMT_CALL Results<float> mma_scaled(ScaledFragments mine, Results<float> c) {
  auto all = simt::gather("mma.sync", ~0u, mine);
  for (auto& each : all.of)
    if (each.byte_a != mine.byte_a || each.lanes_a != mine.lanes_a ||
        each.byte_b != mine.byte_b || each.lane_b != mine.lane_b)
      simt::fail("the selectors of scales are the same in all lanes of an mma.sync");
  if (mine.byte_a > 3 || mine.lanes_a > 1 || mine.byte_b > 3 || mine.lane_b > 3)
    simt::fail("selectors of scales: a byte of four, two of four lanes by 0 or 1, a lane of four");
  int g = simt::lane_index() / 4, t = simt::lane_index() % 4;
  for (int i = 0; i < 4; i++) {
    int row = g + i / 2 * 8, column = 2 * t + i % 2;
    double sum = 0;
    for (int k = 0; k < 32; k++) {
      int j = k / 16, lane = k % 16 / 4, shift = k % 4 * 8;
      sum += e2m1(all.of[row % 8 * 4 + lane].of.a[2 * j + row / 8] >> shift) *
             e4m3(all.of[column * 4 + lane].of.b[j] >> shift);
    }
    double x = e8m0(all.of[row % 8 * 4 + 2 * mine.lanes_a + row / 8].scale_a, mine.byte_a);
    double y = e8m0(all.of[column * 4 + mine.lane_b].scale_b, mine.byte_b);
    c.of[i] = float(c.of[i] + sum * x * y);
  }
  return c;
}
SIMT_INLINE void
mma_sync_aligned_m16n8k32_row_col_kind_mxf8f6f4_block_scale_scale_vec_1X_f32_e2m1_e4m3_f32_ue8m0(
    float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
    uint32_t b0, uint32_t b1, float c0, float c1, float c2, float c3, uint32_t scale_a,
    uint16_t byte_a, uint16_t lanes_a, uint32_t scale_b, uint16_t byte_b, uint16_t lane_b) {
  auto d = mma_scaled({{{a0, a1, a2, a3}, {b0, b1}}, scale_a, scale_b, byte_a, lanes_a, byte_b,
                       lane_b},
                      {{c0, c1, c2, c3}});
  d0 = d.of[0], d1 = d.of[1], d2 = d.of[2], d3 = d.of[3];
}

// wgmma m64nNk16, D = A · B + D: a warp has 16 rows; its registers of A are those of mma m16n8k16,
// and D's of every eight columns too. B is what a descriptor says.
SIMT_INLINE void wgmma_fence_sync_aligned() { simt::wgmma_fence(); }
SIMT_INLINE void wgmma_commit_group_sync_aligned() { simt::wgmma_commit(); }
SIMT_INLINE void wgmma_wait_group_sync_aligned(int groups) { simt::wgmma_wait(groups); }
template <int N, class Operands, size_t... D, size_t... A>
SIMT_INLINE void wgmma(Operands operands, std::index_sequence<D...>, std::index_sequence<A...>) {
  constexpr int AFTER = N / 2;
  float* d[] = {&std::get<D>(operands)...};
  const uint32_t* a[] = {&std::get<AFTER + A>(operands)...};
  bool adds = std::get<AFTER + 5>(operands);
  int of_a = std::get<AFTER + 6>(operands), of_b = std::get<AFTER + 7>(operands);
  int transposed = std::get<AFTER + 8>(operands);
  if (!adds || of_a != 1 || of_b != 1 || transposed)
    simt::fail("wgmma is emulated where it adds to D, of B along k, with no sign changed");
  simt::wgmma(d, N, a, std::get<AFTER + 4>(operands));
}
#define WGMMA(N)                                                                                 \
  template <class... Operands>                                                                   \
  SIMT_INLINE void wgmma_mma_async_sync_aligned_m64n##N##k16_f32_bf16_bf16(Operands&&... all) {  \
    static_assert(sizeof...(all) == N / 2 + 9, "D, A, descriptor, four more");                   \
    wgmma<N>(std::forward_as_tuple(all...), std::make_index_sequence<N / 2>(),                   \
             std::make_index_sequence<4>());                                                     \
  }
WGMMA(8)
WGMMA(16)
WGMMA(32)
WGMMA(64)
WGMMA(128)
WGMMA(256)
#undef WGMMA

}  // namespace simt_ptx
