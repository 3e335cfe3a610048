/*!
 * \file device_api.h
 * \brief What is registered as `device_api.vulkan`.
 */
#ifndef MXFORGE_VULKAN_DEVICE_API_H_
#define MXFORGE_VULKAN_DEVICE_API_H_

namespace mxforge {
namespace vulkan {

class Device;

/*! \brief The n of vulkan:n that this thread launches kernels on. */
int CurrentId();

/*! \brief The stream that this thread has set on a device, which tvm_ffi keeps; null: the default
 *  one. */
void* CurrentStream(Device* device);

/*! \brief A pointer to tvm::runtime::DeviceAPI, as TVM wants to find it. */
void* TheDeviceAPI();

}  // namespace vulkan
}  // namespace mxforge

#endif  // MXFORGE_VULKAN_DEVICE_API_H_
