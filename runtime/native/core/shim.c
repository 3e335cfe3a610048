/* Linked into every library of kernels, which is linked with no other library: the function that
 * kernels import, through a slot, and what compilers take for granted. */
#include <stddef.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

EXPORT void (*__mxforge_raised)(const char*, const char**, int) = 0;

void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int count) {
  if (__mxforge_raised) __mxforge_raised(kind, parts, count);
}

void* memset(void* to, int byte, size_t count) {
  unsigned char* at = to;
  while (count--) *at++ = (unsigned char)byte;
  return to;
}

void* memcpy(void* restrict to, const void* restrict from, size_t count) {
  unsigned char* at = to;
  const unsigned char* of = from;
  while (count--) *at++ = *of++;
  return to;
}

void* memmove(void* to, const void* from, size_t count) {
  unsigned char* at = to;
  const unsigned char* of = from;
  if (at < of) {
    while (count--) *at++ = *of++;
  } else {
    while (count--) at[count] = of[count];
  }
  return to;
}

#if defined(_WIN32)
/* Where a library begins and ends. */
int DllMainCRTStartup(void* library, unsigned reason, void* reserved) {
  (void)library;
  (void)reason;
  (void)reserved;
  return 1;
}
#endif
