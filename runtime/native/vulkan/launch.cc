#include "launch.h"

#include <cstring>

namespace mxforge {
namespace vulkan {

Pipelines::LocalSize CheckExtents(const Core& core, const KernelInfo& kernel,
                                  const Extents& groups, const Extents& block,
                                  Dispatch* dispatch) {
  const VkPhysicalDeviceLimits& limits = core.physical.limits;
  Pipelines::LocalSize size;
  for (size_t axis = 0; axis < size.size(); ++axis) {
    const char name = "xyz"[axis];
    if (groups[axis] < 0 || groups[axis] > limits.maxComputeWorkGroupCount[axis]) {
      throw Failure(MXF_FAILED, "Kernel ", kernel.name, " was launched with ", groups[axis],
                    " blocks in ", name, ", but ", core.Label(), " allows ",
                    limits.maxComputeWorkGroupCount[axis],
                    "; spread them over another axis, or use larger blocks.");
    }
    dispatch->groups[axis] = static_cast<uint32_t>(groups[axis]);
    const uint32_t fixed = kernel.local_size[axis];
    if (fixed != 0 && block[axis] != fixed) {
      throw Failure(MXF_FAILED, "Kernel ", kernel.name, " is compiled for blocks of ", fixed,
                    " threads in ", name, " but was launched with ", block[axis], ".");
    }
    if (block[axis] < 0 || block[axis] > UINT32_MAX) {
      throw Failure(MXF_FAILED, "Kernel ", kernel.name, " was launched with blocks of ",
                    block[axis], " threads in ", name, ".");
    }
    size[axis] = static_cast<uint32_t>(block[axis]);
  }
  return size;
}

void WriteAddress(const KernelInfo& kernel, const ArgumentInfo& argument, uint64_t address,
                  uint8_t* block) {
  if (address % argument.alignment != 0) {
    throw Failure(MXF_FAILED, "Kernel ", kernel.name, " needs a multiple of ", argument.alignment,
                  " as the address of ", argument.name, ", its argument ",
                  &argument - kernel.arguments.data(), ", but got ", address, ", a multiple of ",
                  address & (0 - address), " only; copy the view into a tensor of its own.");
  }
  std::memcpy(block + argument.offset, &address, sizeof(address));
}

void WriteInteger(const ArgumentInfo& argument, int64_t number, uint8_t* block) {
  if (argument.type == ScalarType::kBool) number = number != 0;
  // The lowest bytes come first: devices that Vulkan runs on are little-endian, as hosts are.
  std::memcpy(block + argument.offset, &number, BytesOf(argument.type));
}

}  // namespace vulkan
}  // namespace mxforge
