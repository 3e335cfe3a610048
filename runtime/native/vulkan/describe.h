/*!
 * \file describe.h
 * \brief The machine's devices, told in JSON.
 */
#ifndef MXFORGE_VULKAN_DESCRIBE_H_
#define MXFORGE_VULKAN_DESCRIBE_H_

#include <string>

namespace mxforge {
namespace vulkan {

/*! \brief All of them, best first, with the reason where one cannot be used. Throws as
 * Instance::Get. */
std::string DescribeDevices();

}  // namespace vulkan
}  // namespace mxforge

#endif  // MXFORGE_VULKAN_DESCRIBE_H_
