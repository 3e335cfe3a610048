/*!
 * \file device_api.cc
 * \brief TVM's DeviceAPI over the devices of this runtime.
 */
#include "device_api.h"

#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>
#include <tvm/runtime/device_api.h>

#include <vector>

#include "border.h"
#include "../device.h"

namespace mxforge {
namespace vulkan {
namespace {

namespace ffi = tvm::ffi;
using tvm::runtime::DeviceAPI;

thread_local int current_id = 0;

/*! \brief How many devices there are; none where there is not even a loader. */
int CountDevices() noexcept {
  try {
    return Instance::Get().ChosenCount();
  } catch (const std::exception&) {
    return 0;
  }
}

class VulkanDeviceAPI final : public DeviceAPI {
 public:
  void SetDevice(DLDevice device) final { current_id = device.device_id; }

  void GetAttr(DLDevice device, tvm::runtime::DeviceAttrKind kind, ffi::Any* result) final {
    Guarded([&] { Attribute(device, kind, result); });
  }

  void* AllocDataSpace(DLDevice device, size_t bytes, size_t alignment, DLDataType) final {
    void* address = nullptr;
    Guarded([&] { address = Device::Get(device.device_id)->Allocate(bytes, alignment); });
    return address;
  }

  void FreeDataSpace(DLDevice device, void* address) final {
    Guarded([&] { Device::Get(device.device_id)->Free(address); });
  }

  TVMStreamHandle CreateStream(DLDevice device) final {
    TVMStreamHandle stream = nullptr;
    Guarded([&] { stream = Device::Get(device.device_id)->CreateStream(); });
    return stream;
  }

  void FreeStream(DLDevice device, TVMStreamHandle stream) final {
    if (GetCurrentStream(device) == stream) SetStream(device, nullptr);
    Guarded([&] { Device::Get(device.device_id)->FreeStream(stream); });
  }

  void StreamSync(DLDevice device, TVMStreamHandle stream) final {
    // Null means the default stream to some callers and the thread's own to others: both, then.
    Guarded([&] {
      Device* on = Device::Get(device.device_id);
      on->Synchronize({stream, stream == nullptr ? CurrentStream(on) : stream});
    });
  }

  // The thread's stream is kept by tvm_ffi, where other users of it look as well.
  void SetStream(DLDevice device, TVMStreamHandle stream) final {
    Guarded([&] {
      TVM_FFI_CHECK_SAFE_CALL(TVMFFIEnvSetStream(kDLVulkan, device.device_id, stream, nullptr));
    });
  }

  TVMStreamHandle GetCurrentStream(DLDevice device) final {
    return TVMFFIEnvGetStream(kDLVulkan, device.device_id);
  }

  void SyncStreamFromTo(DLDevice device, TVMStreamHandle from, TVMStreamHandle to) final {
    Guarded([&] { Device::Get(device.device_id)->SynchronizeFromTo(from, to); });
  }

  bool SupportsDevicePointerArithmeticsOnHost() final { return true; }

 protected:
  void CopyDataFromTo(const void* from, size_t from_offset, void* to, size_t to_offset,
                      size_t bytes, DLDevice from_device, DLDevice to_device, DLDataType,
                      TVMStreamHandle stream) final {
    Guarded([&] { Copy(from, from_offset, to, to_offset, bytes, from_device, to_device, stream); });
  }

 private:
  static void Attribute(DLDevice device, tvm::runtime::DeviceAttrKind kind, ffi::Any* result) {
    using namespace tvm::runtime;  // for the names of the kinds
    if (kind == kExist) {
      *result = device.device_id >= 0 && device.device_id < CountDevices();
      return;
    }
    const PhysicalDevice& physical = Instance::Get().Chosen(device.device_id);
    const VkPhysicalDeviceLimits& limits = physical.limits;
    switch (kind) {
      case kMaxThreadsPerBlock:
        *result = static_cast<int64_t>(limits.maxComputeWorkGroupInvocations);
        break;
      case kWarpSize:
        *result = static_cast<int64_t>(physical.subgroup_size);
        break;
      case kMaxSharedMemoryPerBlock:
        *result = static_cast<int64_t>(limits.maxComputeSharedMemorySize);
        break;
      case kComputeVersion:
      case kApiVersion:
        *result = ffi::String(VersionText(physical.api_version));
        break;
      case kDeviceName:
        *result = ffi::String(physical.name);
        break;
      case kMaxThreadDimensions: {
        const uint32_t* size = limits.maxComputeWorkGroupSize;
        *result = ffi::String("[" + std::to_string(size[0]) + ", " + std::to_string(size[1]) +
                              ", " + std::to_string(size[2]) + "]");
        break;
      }
      case kDriverVersion:
        *result = ffi::String(physical.driver);
        break;
      case kTotalGlobalMemory: {
        int64_t total = 0;
        for (uint32_t i = 0; i < physical.memory.memoryHeapCount; ++i) {
          const VkMemoryHeap& heap = physical.memory.memoryHeaps[i];
          if (physical.Holds(heap)) total += static_cast<int64_t>(heap.size);
        }
        *result = total;
        break;
      }
      case kAvailableGlobalMemory:
        *result = static_cast<int64_t>(Instance::Get().AvailableBytes(physical));
        break;
      default:
        break;  // Vulkan does not tell
    }
  }

  static void Copy(const void* from, size_t from_offset, void* to, size_t to_offset, size_t bytes,
                   DLDevice from_device, DLDevice to_device, TVMStreamHandle stream) {
    const bool from_here = from_device.device_type == kDLVulkan;
    const bool to_here = to_device.device_type == kDLVulkan;
    const auto source = reinterpret_cast<uint64_t>(from) + from_offset;
    const auto target = reinterpret_cast<uint64_t>(to) + to_offset;
    Device* device = Device::Get(from_here ? from_device.device_id : to_device.device_id);
    Stream* on = device->StreamOf(stream == nullptr ? CurrentStream(device) : stream);
    if (from_here && to_here && from_device.device_id == to_device.device_id) {
      device->copier().Within(on, source, target, bytes);
    } else if (from_here && to_here) {
      Device* other = Device::Get(to_device.device_id);
      std::vector<uint8_t> between(bytes);
      device->copier().Download(on, source, between.data(), bytes);
      other->copier().Upload(other->StreamOf(CurrentStream(other)), between.data(), target, bytes);
    } else if (from_here && IsHost(to_device)) {
      device->copier().Download(on, source, reinterpret_cast<uint8_t*>(target), bytes);
    } else if (to_here && IsHost(from_device)) {
      device->copier().Upload(on, reinterpret_cast<const uint8_t*>(source), target, bytes);
    } else {
      TVM_FFI_THROW(RuntimeError)
          << "Vulkan copies between its own devices and the host, not between device types "
          << from_device.device_type << " and " << to_device.device_type
          << "; copy through the host.";
    }
  }

  static bool IsHost(DLDevice device) {
    return device.device_type == kDLCPU || device.device_type == kDLCUDAHost ||
           device.device_type == kDLROCMHost;
  }
};

}  // namespace

int CurrentId() { return current_id; }

void* CurrentStream(Device* device) {
  return TVMFFIEnvGetStream(kDLVulkan, device->core().physical.device_id);
}

void* TheDeviceAPI() {
  static auto* const api = new VulkanDeviceAPI();  // TVM keeps the pointer for good
  return static_cast<DeviceAPI*>(api);
}

}  // namespace vulkan
}  // namespace mxforge
