// What -fsanitize=thread makes kernels call at each access to memory that is not a plain local;
// and what the headers call for the accesses that they make themselves.
#include "state.h"

using simt::access;

void simt::note_read(const void* p, int size) {
  access(p, size, false, true, __builtin_return_address(0));
}
void simt::note_write(const void* p, int size) {
  access(p, size, true, true, __builtin_return_address(0));
}
void simt::copy(void* to, const void* from, int size) { memcpy(to, from, size); }

#define PC __builtin_return_address(0)
#define SIZE(n)                                                                     \
  void __tsan_read##n(void* p) { access(p, n, false, true, PC); }                   \
  void __tsan_write##n(void* p) { access(p, n, true, true, PC); }                   \
  void __tsan_read_write##n(void* p) {                                              \
    access(p, n, false, true, PC);                                                  \
    access(p, n, true, true, PC);                                                   \
  }                                                                                 \
  void __tsan_unaligned_read##n(void* p) { access(p, n, false, false, PC); }        \
  void __tsan_unaligned_write##n(void* p) { access(p, n, true, false, PC); }        \
  void __tsan_unaligned_read_write##n(void* p) {                                    \
    access(p, n, false, false, PC);                                                 \
    access(p, n, true, false, PC);                                                  \
  }

extern "C" {
SIZE(1)
SIZE(2)
SIZE(4)
SIZE(8)
SIZE(16)
void __tsan_read_range(void* p, uint64_t n) { access(p, n, false, false, PC); }
void __tsan_write_range(void* p, uint64_t n) { access(p, n, true, false, PC); }
void* __tsan_memset(void* p, int value, uint64_t n) {
  access(p, n, true, false, PC);
  return memset(p, value, n);
}
void* __tsan_memcpy(void* to, const void* from, uint64_t n) {
  access(from, n, false, false, PC);
  access(to, n, true, false, PC);
  return memcpy(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, uint64_t n) {
  access(from, n, false, false, PC);
  access(to, n, true, false, PC);
  return memmove(to, from, n);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
