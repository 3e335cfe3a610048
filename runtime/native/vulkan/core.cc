#include "core.h"

#include <vector>

namespace mxforge {
namespace vulkan {
namespace {

constexpr const char* kOpenedAnew = "it is opened anew when all its tensors are freed.";

}  // namespace

Core::Core(const PhysicalDevice& described) : physical(described) {
  const InstanceFunctions& instance = Instance::Get().functions();
  // Everything of the table that the device has: which kernels will come is not known yet.
  FeatureChain offered;
  offered.Link(physical.api_version, physical.extensions);
  instance.GetPhysicalDeviceFeatures2(physical.handle, &offered.core);
  FeatureChain wanted;
  wanted.Link(physical.api_version, physical.extensions);
  for (const Feature& feature : FeatureTable()) feature.in(wanted) = feature.in(offered);

  std::vector<const char*> extensions;
  for (const std::string& name : ExtensionsToEnable(physical.api_version, physical.extensions)) {
    extensions.push_back(enabled_extensions.insert(name).first->c_str());
  }
  const float priority = 1.0F;
  auto queue_info = Struct<VkDeviceQueueCreateInfo>(VK_STRUCTURE_TYPE_DEVICE_QUEUE_CREATE_INFO);
  queue_info.queueFamilyIndex = physical.queue_family;
  queue_info.queueCount = 1;
  queue_info.pQueuePriorities = &priority;
  auto info = Struct<VkDeviceCreateInfo>(VK_STRUCTURE_TYPE_DEVICE_CREATE_INFO);
  info.pNext = &wanted.core;
  info.queueCreateInfoCount = 1;
  info.pQueueCreateInfos = &queue_info;
  info.enabledExtensionCount = static_cast<uint32_t>(extensions.size());
  info.ppEnabledExtensionNames = extensions.data();
  CheckResult(instance.CreateDevice(physical.handle, &info, nullptr, &handle), "vkCreateDevice");
  call = LoadDeviceFunctions(instance, handle);
  call.GetDeviceQueue(handle, physical.queue_family, 0, &queue);
}

std::string Core::Label() const {
  return "vulkan:" + std::to_string(physical.device_id) + " (" + physical.name + ")";
}

void Core::Check(VkResult result, const char* function) {
  if (result >= VK_SUCCESS) return;
  if (result == VK_ERROR_DEVICE_LOST) {
    Lose(result, function);
    throw Failure(MXF_LOST, Label(), " was lost in ", function,
                  " (VK_ERROR_DEVICE_LOST): a kernel ran too long or touched memory that is not "
                  "there, or the driver failed. Nothing on it can be used any more; ",
                  kOpenedAnew);
  }
  CheckResult(result, function);
}

void Core::CheckFatal(VkResult result, const char* function) {
  if (result < VK_SUCCESS && result != VK_ERROR_DEVICE_LOST) {
    Lose(result, function);
    throw Failure(MXF_LOST, Label(), " takes no more work: ", function, " answered ",
                  ResultName(result), ", and what was recorded cannot be done; ", kOpenedAnew,
                  IsOutOfMemory(result) ? " Use a smaller model, batch or context." : "");
  }
  Check(result, function);
}

void Core::Lose(VkResult result, const char* function) {
  const std::lock_guard<std::mutex> lock(cause_mutex_);
  if (cause_.empty()) cause_ = std::string(function) + " answered " + ResultName(result);
  lost_.store(true);
}

void Core::Settle() {
  if (!lost() || settled_ || handle == VK_NULL_HANDLE) return;
  settled_ = true;
  call.DeviceWaitIdle(handle);  // which answers at once where the device is really gone
}

void Core::Destroy() {
  call.DestroyDevice(handle, nullptr);
  handle = VK_NULL_HANDLE;
}

void Core::ThrowLost() const {
  const std::lock_guard<std::mutex> lock(cause_mutex_);
  throw Failure(MXF_LOST, Label(), " was lost earlier (", cause_, ") and takes no more work; ",
                kOpenedAnew);
}

}  // namespace vulkan
}  // namespace mxforge
