/*!
 * \file launch.h
 * \brief What may be launched: extents and addresses, checked for whoever launches kernels.
 */
#ifndef MXFORGE_VULKAN_LAUNCH_H_
#define MXFORGE_VULKAN_LAUNCH_H_

#include <array>
#include <cstdint>

#include "core.h"
#include "module_format.h"
#include "pipelines.h"
#include "stream.h"

namespace mxforge {
namespace vulkan {

using Extents = std::array<int64_t, 3>;

/*!
 * \brief Check what a kernel is launched over, of which nothing is 0; returns its blocks' size.
 *
 * Error (MXF_FAILED) where the device allows no such grid, or the kernel no such blocks.
 */
Pipelines::LocalSize CheckExtents(const Core& core, const KernelInfo& kernel,
                                  const Extents& groups, const Extents& block, Dispatch* dispatch);

/*!
 * \brief Write the address of a pointer to its place in the argument block.
 *
 * Error (MXF_FAILED) where the kernel's accesses need more alignment: what happens then is the
 * device's choice.
 */
void WriteAddress(const KernelInfo& kernel, const ArgumentInfo& argument, uint64_t address,
                  uint8_t* block);

/*! \brief Write a number of an integer type to its place in the argument block. */
void WriteInteger(const ArgumentInfo& argument, int64_t number, uint8_t* block);

}  // namespace vulkan
}  // namespace mxforge

#endif  // MXFORGE_VULKAN_LAUNCH_H_
