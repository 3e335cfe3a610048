/*!
 * \file instance.h
 * \brief The Vulkan instance, what devices it has, and which of them are used.
 */
#ifndef MXFORGE_VULKAN_INSTANCE_H_
#define MXFORGE_VULKAN_INSTANCE_H_

#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "features.h"
#include "loader.h"

namespace mxforge {
namespace vulkan {

/*! \brief All that is asked of a physical device, once. */
struct PhysicalDevice {
  VkPhysicalDevice handle = VK_NULL_HANDLE;
  int index = 0;         // in the order of preference, over all devices of the machine
  int device_id = -1;    // the n of vulkan:n, or -1: unusable, or not chosen
  std::string unusable;  // why it cannot be used; empty if it can
  std::string name;
  std::string driver;
  VkPhysicalDeviceType type = VK_PHYSICAL_DEVICE_TYPE_OTHER;
  uint32_t api_version = 0;
  VkPhysicalDeviceLimits limits{};
  VkPhysicalDeviceProperties properties{};
  VkPhysicalDeviceMemoryProperties memory{};
  std::set<std::string> extensions;
  std::set<std::string> features;
  std::set<std::string> subgroup_operations;
  std::vector<MatrixProduct> products;  // of matrices, by one subgroup
  uint32_t subgroup_size = 0;
  uint32_t min_subgroup_size = 0;
  uint32_t max_subgroup_size = 0;
  uint32_t max_workgroup_subgroups = 0;
  bool compute_can_require_subgroup_size = false;
  uint64_t max_allocation_bytes = 0;
  uint64_t max_buffer_bytes = 0;
  uint32_t queue_family = 0;
  uint32_t timestamp_bits = 0;

  /*! \brief Whether tensors may lie in this heap. */
  bool Holds(const VkMemoryHeap& heap) const {
    return IsUnified() || (heap.flags & VK_MEMORY_HEAP_DEVICE_LOCAL_BIT) != 0;
  }

  /*! \brief Whether compute kernels may count on subgroups of this size. */
  bool GrantsSubgroupSize(uint32_t size) const;

  /*! \brief Whether kernels for subgroups of this size find matrices with this text here. */
  bool Multiplies(const std::string& product, uint32_t size) const;

  /*! \brief Memory is the host's own: what the host writes needs no copy. */
  bool IsUnified() const {
    return type == VK_PHYSICAL_DEVICE_TYPE_INTEGRATED_GPU || type == VK_PHYSICAL_DEVICE_TYPE_CPU;
  }
};

/*! \brief "discrete", "integrated", "virtual", "cpu" or "other". */
const char* DeviceTypeName(VkPhysicalDeviceType type);

/*! \brief "1.3.230" */
std::string VersionText(uint32_t version);

class Instance {
 public:
  /*! \brief The process's instance; throws where there is no loader or no driver for one.
   *
   * Never destroyed: threads may still use it while the process exits.
   */
  static Instance& Get();

  /*! \brief Every device of the machine, best first. */
  const std::vector<PhysicalDevice>& devices() const { return devices_; }

  /*! \brief The device vulkan:id; throws an error that lists what there is. */
  const PhysicalDevice& Chosen(int id) const;

  /*! \brief How many devices vulkan:0, vulkan:1, ... there are; why there is none is in Chosen. */
  int ChosenCount() const { return chosen_count_; }

  const InstanceFunctions& functions() const { return functions_; }

  /*! \brief Bytes of memory for tensors that the driver thinks are left (all, if it cannot say).
   */
  uint64_t AvailableBytes(const PhysicalDevice& device) const;

  /*! \brief What the validation layers said so far; the messenger exists where they are on. */
  std::vector<std::string> ValidationMessages() const;
  bool HasMessenger() const { return has_messenger_; }

 private:
  GlobalFunctions global_;
  InstanceFunctions functions_;
  VkInstance handle_ = VK_NULL_HANDLE;
  uint32_t version_ = 0;  // that was asked for
  std::vector<PhysicalDevice> devices_;
  int chosen_count_ = 0;
  std::string refusal_;  // why no device was chosen
  bool has_messenger_ = false;
  mutable std::mutex messages_mutex_;
  std::vector<std::string> messages_;

  Instance();
  void Create();
  void CreateMessenger();
  void Choose();
  PhysicalDevice Describe(VkPhysicalDevice handle) const;
  std::string List() const;
  static VKAPI_ATTR VkBool32 VKAPI_CALL OnMessage(VkDebugUtilsMessageSeverityFlagBitsEXT severity,
                                                  VkDebugUtilsMessageTypeFlagsEXT type,
                                                  const VkDebugUtilsMessengerCallbackDataEXT* data,
                                                  void* self);
};

}  // namespace vulkan
}  // namespace mxforge

#endif  // MXFORGE_VULKAN_INSTANCE_H_
