// manifest.json, and with it JSON.
#include "manifest.h"

#include "error.h"
#include "target.h"

namespace core = mxforge::core;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::verdict.clear();
  fuzz::ResetAllocated();
  try {
    const std::string_view text(reinterpret_cast<const char*>(data), size);
    const core::Manifest read = core::ReadManifest(text, "manifest.json");
    fuzz::verdict = "read";
    for (const core::WeightInfo& weight : read.weights) {
      if (weight.file.has_value() == weight.fill.has_value()) fuzz::Fail("a weight from nowhere");
    }
    for (const core::KvGroup& group : read.groups) {
      if (group.page_bytes > uint64_t{1} << 40) fuzz::Fail("a page that is too large");
      for (int64_t layer : group.layers) {
        if (layer < 0 || layer > 1 << 16) fuzz::Fail("a layer out of bounds");
      }
    }
  } catch (const core::Error& error) {
    if (error.status() != MXF_CORRUPT) fuzz::Fail(error.what());
  }
  fuzz::CheckAllocated(size);
  return 0;
}
