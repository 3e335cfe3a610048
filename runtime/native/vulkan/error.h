/*!
 * \file error.h
 * \brief From VkResult to exceptions that say what to do.
 */
#ifndef MXFORGE_VULKAN_ERROR_H_
#define MXFORGE_VULKAN_ERROR_H_

#include <tvm/ffi/error.h>

#include <cstdint>
#include <string>

#include "loader.h"

namespace mxforge {
namespace vulkan {

/*! \brief "VK_ERROR_DEVICE_LOST", or the number of one that is not in the table. */
std::string ResultName(VkResult result);

/*! \brief Throw unless the call succeeded; what a lost device needs on top is Device::Check's. */
void CheckResult(VkResult result, const char* call);

/*! \brief "1.50 GiB": sizes in messages are for people. */
std::string HumanBytes(uint64_t bytes);

}  // namespace vulkan
}  // namespace mxforge

#endif  // MXFORGE_VULKAN_ERROR_H_
