#include "../cuda/device.h"
#include "cpu.h"
#include "device.h"
#include "error.h"
#if defined(MXFORGE_METAL)  // where the build found the headers
#include "../metal/device.h"
#endif
#if defined(MXFORGE_VULKAN)  // where the build found the headers
#include "../vulkan/plans/device.h"
#endif

namespace mxforge {
namespace core {
namespace {

const DeviceKind* const kKinds[] = {
    &kCpuKind,
    &cuda::kCudaKind,
#if defined(MXFORGE_METAL)
    &metal::kMetalKind,
#endif
#if defined(MXFORGE_VULKAN)
    &vulkan::kVulkanKind,
#endif
};

}  // namespace

const DeviceKind& FindDeviceKind(const std::string& name) {
  std::string known;
  for (const DeviceKind* kind : kKinds) {
    if (name == kind->name) return *kind;
    known += (known.empty() ? "" : ", ") + std::string(kind->name);
  }
  throw Error(MXF_TARGET, "This build of libmxforge runs on " + known +
                              ", but the artifact is for " + name + ".");
}

}  // namespace core
}  // namespace mxforge
