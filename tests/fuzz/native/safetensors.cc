// Headers of .safetensors files.
#include "safetensors.h"

#include "error.h"
#include "target.h"

namespace core = mxforge::core;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::verdict.clear();
  fuzz::ResetAllocated();
  try {
    unsigned sum = 0;
    for (const auto& [name, tensor] : core::ReadSafetensors(data, size, "x.safetensors")) {
      if (tensor.begin > tensor.end) fuzz::Fail("a tensor of less than nothing");
      for (uint64_t at = tensor.begin; at < tensor.end; ++at) sum += data[at];  // ASan looks
    }
    fuzz::verdict = "read " + std::to_string(sum);
  } catch (const core::Error& error) {
    if (error.status() != MXF_CORRUPT) fuzz::Fail(error.what());
  }
  fuzz::CheckAllocated(size);
  return 0;
}
