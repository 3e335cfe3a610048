/*!
 * \file loader.h
 * \brief Vulkan's functions, found at run time: this library never links against libvulkan.
 */
#ifndef MXFORGE_VULKAN_LOADER_H_
#define MXFORGE_VULKAN_LOADER_H_

#define VK_NO_PROTOTYPES
#include <vulkan/vulkan_core.h>

#include <string>

namespace mxforge {
namespace vulkan {

// Each list is expanded twice: into the members of a struct and into the code that fills it.
#define MXFORGE_VULKAN_GLOBAL_FUNCTIONS(X) \
  X(EnumerateInstanceVersion)              \
  X(EnumerateInstanceExtensionProperties)  \
  X(CreateInstance)

#define MXFORGE_VULKAN_INSTANCE_FUNCTIONS(X) \
  X(EnumeratePhysicalDevices)                \
  X(GetPhysicalDeviceProperties)             \
  X(GetPhysicalDeviceProperties2)            \
  X(GetPhysicalDeviceFeatures2)              \
  X(GetPhysicalDeviceMemoryProperties2)      \
  X(GetPhysicalDeviceQueueFamilyProperties)  \
  X(EnumerateDeviceExtensionProperties)      \
  X(CreateDevice)                            \
  X(GetDeviceProcAddr)

#define MXFORGE_VULKAN_DEVICE_FUNCTIONS(X) \
  X(AllocateCommandBuffers)                \
  X(AllocateMemory)                        \
  X(BeginCommandBuffer)                    \
  X(BindBufferMemory)                      \
  X(CmdBindPipeline)                       \
  X(CmdCopyBuffer)                         \
  X(CmdDispatch)                           \
  X(CmdPipelineBarrier)                    \
  X(CmdPushConstants)                      \
  X(CmdResetQueryPool)                     \
  X(CmdWriteTimestamp)                     \
  X(CreateBuffer)                          \
  X(CreateCommandPool)                     \
  X(CreateComputePipelines)                \
  X(CreatePipelineCache)                   \
  X(CreatePipelineLayout)                  \
  X(CreateQueryPool)                       \
  X(CreateSemaphore)                       \
  X(CreateShaderModule)                    \
  X(DestroyBuffer)                         \
  X(DestroyCommandPool)                    \
  X(DestroyDevice)                         \
  X(DestroyPipeline)                       \
  X(DestroyPipelineCache)                  \
  X(DestroyPipelineLayout)                 \
  X(DestroyQueryPool)                      \
  X(DestroySemaphore)                      \
  X(DestroyShaderModule)                   \
  X(DeviceWaitIdle)                        \
  X(EndCommandBuffer)                      \
  X(FreeMemory)                            \
  X(GetBufferDeviceAddress)                \
  X(GetBufferMemoryRequirements)           \
  X(GetDeviceQueue)                        \
  X(GetPipelineCacheData)                  \
  X(GetQueryPoolResults)                   \
  X(GetSemaphoreCounterValue)              \
  X(MapMemory)                             \
  X(QueueSubmit)                           \
  X(ResetCommandPool)                      \
  X(WaitSemaphores)

#define MXFORGE_VULKAN_MEMBER(name) PFN_vk##name name = nullptr;

/*! \brief What can be called before there is an instance. */
struct GlobalFunctions {
  PFN_vkGetInstanceProcAddr GetInstanceProcAddr = nullptr;
  MXFORGE_VULKAN_GLOBAL_FUNCTIONS(MXFORGE_VULKAN_MEMBER)
};

struct InstanceFunctions {
  MXFORGE_VULKAN_INSTANCE_FUNCTIONS(MXFORGE_VULKAN_MEMBER)
  /*! \brief Null where VK_EXT_debug_utils is not enabled. */
  PFN_vkCreateDebugUtilsMessengerEXT CreateDebugUtilsMessengerEXT = nullptr;
};

/*! \brief Called directly, not through the loader's dispatch: it saves a jump per command. */
struct DeviceFunctions {
  MXFORGE_VULKAN_DEVICE_FUNCTIONS(MXFORGE_VULKAN_MEMBER)
};

#undef MXFORGE_VULKAN_MEMBER

/*! \brief A Vulkan struct that says what it is, all else zero. */
template <typename T>
T Struct(VkStructureType type) {
  T made{};
  made.sType = type;
  return made;
}

/*! \brief Open libvulkan (or what MXFORGE_VULKAN_LOADER names); throws where there is none. */
GlobalFunctions LoadGlobalFunctions();

InstanceFunctions LoadInstanceFunctions(const GlobalFunctions& global, VkInstance instance);

DeviceFunctions LoadDeviceFunctions(const InstanceFunctions& functions, VkDevice device);

}  // namespace vulkan
}  // namespace mxforge

#endif  // MXFORGE_VULKAN_LOADER_H_
