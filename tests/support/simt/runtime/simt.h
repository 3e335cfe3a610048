// What the headers that stand for CUDA's and Metal's are made of. Kernels are compiled against it;
// they reach memory through GCC's and Clang's -fsanitize=thread, whose callbacks are ours (tsan.cc).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#define SIMT_INLINE static inline __attribute__((always_inline))
// For what reads and writes locals alone: compiled once, and without a callback at each access.
#define SIMT_CALL static __attribute__((noinline, no_sanitize("thread")))

namespace simt {

struct Dim3 {
  uint32_t x, y, z;
};

// Of the thread that runs. They never change within a thread, so the compiler may ask once.
Dim3 thread_index() __attribute__((const));
Dim3 block_index() __attribute__((const));
Dim3 block_size() __attribute__((const));
Dim3 grid_size() __attribute__((const));
int lane_index() __attribute__((const));

constexpr int LANES = 32;

// Memories, as bits: what a barrier orders.
constexpr int SHARED = 1, GLOBAL = 2;

// Ends the run with this message; never comes back.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Waits for every thread of the block. Threads have to meet at the same `site`.
void barrier(int site, int memories);

// Whether a run is with the statement of this number (harness.py).
bool stays(int number);

// Waits for every lane in `mask`, the caller among them; then all[i] is what lane i gave, of
// `size` bytes. `memories` are ordered as by a barrier, among the lanes of a warp.
void exchange(const char* what, uint32_t mask, int memories, const void* mine, int size, void* all);

// Shared array number `id` of the kernel that runs, filled with 0xFF when a block begins.
void* shared_array(int id, const char* name, uint64_t size, int element, int alignment);
void* dynamic_shared();

// The addresses that CUDA's instructions take for shared memory, and back.
uint32_t shared_address(const void*);
void* shared_pointer(uint32_t);

// Checks an access that a header makes on behalf of the kernel.
void note_read(const void*, int size);
void note_write(const void*, int size);

// memcpy, without a check.
void copy(void* to, const void* from, int size);

// cp.async: `used` bytes from `from`, and zeros up to `size`. They arrive when waited for.
void async_copy(uint32_t to, const void* from, int size, int used);
void async_commit();
void async_wait(int groups);  // until all but the newest `groups` groups have arrived

// mbarriers, which count arrivals and bytes; and bulk copies, which arrive at one when waited for.
void mbarrier_init(uint32_t barrier, uint32_t arrivals);
void mbarrier_arrive(uint32_t barrier, uint32_t bytes);  // that are to come in this phase too
void mbarrier_wait(uint32_t barrier, uint32_t parity);   // for the end of the phase
void bulk_copy(uint32_t to, const void* from, uint32_t size, uint32_t barrier);

// What the thread wrote to shared memory can be read by bulk copies and wgmma from here on.
void proxy_fence();

// wgmma m64nNk16 of bfloat16, as the lanes of one warp see it: d [N/2] += a [4] · the matrix that a
// descriptor says. It takes place when waited for; until then d holds no numbers, and a must stay.
void wgmma_fence();
void wgmma(float* const* d, int columns, const uint32_t* const* a, uint64_t descriptor);
void wgmma_commit();
void wgmma_wait(int groups);

// A launch, as the host's code asks for it. body(args) is one thread.
struct Launch {
  Dim3 grid, block;
  uint32_t dynamic_shared;  // bytes
  void (*body)(void*);
  void* args;
};
void launch(const Launch&);

template <class To, class From>
To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

#ifdef __aarch64__
using Half = __fp16;  // GCC before 13 has no _Float16 there
#else
using Half = _Float16;
#endif

inline float from_bf16(uint16_t v) { return bits<float>(uint32_t(v) << 16); }
inline uint16_t to_bf16(float f) {  // to nearest, ties to even
  auto u = bits<uint32_t>(f);
  return f != f ? 0x7fff : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

// ---- operations of a warp

template <class T>
struct Lanes {
  T of[LANES];
};

template <class T>
SIMT_INLINE Lanes<T> gather(const char* what, uint32_t mask, const T& mine, int memories = 0) {
  Lanes<T> all;
  exchange(what, mask, memories, &mine, sizeof(T), all.of);
  return all;
}

template <class T>
SIMT_CALL T shuffle(const char* what, uint32_t mask, T mine, int from) {
  Lanes<T> all = gather(what, mask, mine);
  if (!(mask >> from & 1)) fail("%s: lane %d is asked, which is not in mask %x", what, from, mask);
  return all.of[from];
}

// ---- memory

template <class T, int N>
struct Fields;
template <class T>
struct Fields<T, 2> {
  T x, y;
};
template <class T>
struct Fields<T, 3> {
  T x, y, z;
};
template <class T>
struct Fields<T, 4> {
  T x, y, z, w;
};

// float4 and the like. Copied as one access, as on a GPU: compilers would part a plain struct, and
// so hide how wide the kernel reads.
template <class T, int N>
struct alignas(sizeof(T) * (N == 3 ? 4 : N)) Vector : Fields<T, N> {
  typedef uint8_t Whole __attribute__((vector_size(sizeof(T) * (N == 3 ? 4 : N)), may_alias));
  Vector() = default;
  Vector(T a) {
    for (int i = 0; i < N; i++) (*this)[i] = a;
  }
  template <class... Ts, class = decltype(Fields<T, N>{T(Ts())...})>
  Vector(T a, T b, Ts... rest) : Fields<T, N>{a, b, T(rest)...} {}
  __attribute__((always_inline)) Vector(const Vector& o) { *(Whole*)this = *(const Whole*)&o; }
  __attribute__((always_inline)) Vector& operator=(const Vector& o) {
    *(Whole*)this = *(const Whole*)&o;
    return *this;
  }
  T& operator[](int i) { return (&this->x)[i]; }
  const T& operator[](int i) const { return (&this->x)[i]; }
};

// A thread's own array. The compilers do not report accesses to it, so it checks by itself.
template <class T, int64_t N>
struct Local {
  // (array + i), to be cast to a wider element.
  struct Place {
    T* array;
    int64_t at;
    template <class U>
    __attribute__((always_inline)) operator U*() const {
      if (at < 0 || at * sizeof(T) + sizeof(U) > N * sizeof(T))
        fail("local array of %d elements: %d bytes at element %d", int(N), int(sizeof(U)), int(at));
      if (at * sizeof(T) % alignof(U)) fail("misaligned: element %d of a local array", int(at));
      return (U*)(array + at);
    }
  };
  alignas(64) T of[N];
  template <class I>
  __attribute__((always_inline)) T& operator[](I i) {
    if (uint64_t(int64_t(i)) >= uint64_t(N))
      fail("local array of %d elements: element %d", int(N), int(i));
    return of[i];
  }
  template <class I>
  __attribute__((always_inline)) Place operator+(I i) {
    return {of, int64_t(i)};
  }
};

}  // namespace simt
