/*!
 * \file error.h
 * \brief From VkResult to errors that say what to do.
 */
#ifndef MXFORGE_VULKAN_ERROR_H_
#define MXFORGE_VULKAN_ERROR_H_

#include <cstdint>
#include <sstream>
#include <string>

#include "../core/error.h"
#include "loader.h"

namespace mxforge {
namespace vulkan {

using core::Error;

/*! \brief An error whose message is these one after another. */
template <typename... Parts>
Error Failure(mxf_status status, const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  return Error(status, message.str());
}

/*! \brief "VK_ERROR_DEVICE_LOST", or the number of one that is not in the table. */
std::string ResultName(VkResult result);

/*! \brief Whether the host or the device had too little memory. */
bool IsOutOfMemory(VkResult result);

/*! \brief Throw unless the call succeeded; what a lost device needs on top is Core::Check's. */
void CheckResult(VkResult result, const char* call);

/*! \brief "1.50 GiB": sizes in messages are for people. */
std::string HumanBytes(uint64_t bytes);

}  // namespace vulkan
}  // namespace mxforge

#endif  // MXFORGE_VULKAN_ERROR_H_
