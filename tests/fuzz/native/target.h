/*!
 * \file target.h
 * \brief What the targets of fuzzing share. Each gives LLVMFuzzerTestOneInput; `driver.cc` or
 * libFuzzer calls it.
 */
#ifndef MXFORGE_TESTS_FUZZ_TARGET_H_
#define MXFORGE_TESTS_FUZZ_TARGET_H_

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace fuzz {

/*! \brief What the target made of its last input: "" where it refused it. Python's reader has to
 * come to the same. */
extern std::string verdict;

/*! \brief The most bytes that were allocated at once since the last reset. */
size_t MostAllocated();
void ResetAllocated();

[[noreturn]] inline void Fail(const char* what) {
  std::fprintf(stderr, "target: %s\n", what);
  std::abort();
}

/*! \brief What a reader of so many bytes may take: some for its own work, and a multiple of them. */
inline void CheckAllocated(size_t size) {
  constexpr size_t kOwn = 64 << 10, kEach = 320;
  if (MostAllocated() > kOwn + kEach * size) Fail("more memory than the file justifies");
}

}  // namespace fuzz

#endif  // MXFORGE_TESTS_FUZZ_TARGET_H_
