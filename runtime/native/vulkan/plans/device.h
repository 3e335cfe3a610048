/*!
 * \file device.h
 * \brief Vulkan as a kind of device that runs launch plans.
 */
#ifndef MXFORGE_VULKAN_PLANS_DEVICE_H_
#define MXFORGE_VULKAN_PLANS_DEVICE_H_

#include "../../core/device.h"

namespace mxforge {
namespace vulkan {

/*! \brief Its library of kernels is a file in the format of ../module_format.h. */
extern const core::DeviceKind kVulkanKind;

}  // namespace vulkan
}  // namespace mxforge

#endif  // MXFORGE_VULKAN_PLANS_DEVICE_H_
