// Counts what the sanitizer's allocator gives.
#include "target.h"

// GCC has these without their header.
extern "C" int __sanitizer_install_malloc_and_free_hooks(
    void (*taken)(const volatile void*, size_t), void (*given_back)(const volatile void*));
extern "C" size_t __sanitizer_get_allocated_size(const volatile void* of);

namespace fuzz {
namespace {

size_t live = 0, base = 0, most = 0;

const int installed = __sanitizer_install_malloc_and_free_hooks(
    [](const volatile void*, size_t size) {
      live += size;
      if (live > most) most = live;
    },
    [](const volatile void* freed) {
      if (freed != nullptr) live -= __sanitizer_get_allocated_size(freed);
    });

}  // namespace

size_t MostAllocated() {
  if (installed == 0) Fail("nothing counts allocations");
  return most - base;
}

void ResetAllocated() { base = most = live; }

}  // namespace fuzz
