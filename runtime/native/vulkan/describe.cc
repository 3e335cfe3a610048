#include "describe.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "../core/json.h"
#include "instance.h"

namespace mxforge {
namespace vulkan {
namespace {

using core::Quoted;

const char* Word(bool truth) { return truth ? "true" : "false"; }

std::string Joined(const std::vector<std::string>& values, char begin, char end) {
  std::string text(1, begin);
  for (const std::string& value : values) text += (text.size() > 1 ? ", " : "") + value;
  return text + end;
}

template <typename Texts>
std::string QuotedList(const Texts& texts) {
  std::vector<std::string> quoted;
  for (const std::string& text : texts) quoted.push_back(Quoted(text));
  return Joined(quoted, '[', ']');
}

std::string Described(const PhysicalDevice& device) {
  std::vector<std::string> heaps;
  for (uint32_t i = 0; i < device.memory.memoryHeapCount; ++i) {
    const VkMemoryHeap& heap = device.memory.memoryHeaps[i];
    heaps.push_back("{\"bytes\": " + std::to_string(heap.size) + ", \"device_local\": " +
                    Word((heap.flags & VK_MEMORY_HEAP_DEVICE_LOCAL_BIT) != 0) + "}");
  }
  std::vector<std::string> products;
  for (const MatrixProduct& each : device.products) products.push_back(each.Text());
  const std::pair<const char*, std::string> members[] = {
      {"index", std::to_string(device.index)},
      {"device_id", device.device_id < 0 ? "null" : std::to_string(device.device_id)},
      {"name", Quoted(device.name)},
      {"type", Quoted(DeviceTypeName(device.type))},
      {"api_version", Quoted(VersionText(device.api_version))},
      {"driver", Quoted(device.driver)},
      {"heaps", Joined(heaps, '[', ']')},
      {"max_allocation_bytes",
       std::to_string(std::min({device.max_allocation_bytes, device.max_buffer_bytes,
                                static_cast<uint64_t>(INT64_MAX)}))},
      {"shared_memory_bytes", std::to_string(device.limits.maxComputeSharedMemorySize)},
      {"max_threads_per_block", std::to_string(device.limits.maxComputeWorkGroupInvocations)},
      {"subgroup_size", "[" + std::to_string(device.min_subgroup_size) + ", " +
                            std::to_string(device.max_subgroup_size) + "]"},
      {"subgroup_operations", QuotedList(device.subgroup_operations)},
      {"features", QuotedList(device.features)},
      {"matrices", QuotedList(products)},
      {"usable", Word(device.unusable.empty())},
      {"reason", Quoted(device.unusable)},
  };
  std::vector<std::string> written;
  for (const auto& [name, value] : members) written.push_back(Quoted(name) + ": " + value);
  return Joined(written, '{', '}');
}

}  // namespace

std::string DescribeDevices() {
  std::vector<std::string> devices;
  for (const PhysicalDevice& device : Instance::Get().devices()) {
    devices.push_back(Described(device));
  }
  return Joined(devices, '[', ']');
}

}  // namespace vulkan
}  // namespace mxforge
