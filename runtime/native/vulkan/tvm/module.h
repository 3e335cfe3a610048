/*!
 * \file module.h
 * \brief The module object that TVM loads and calls.
 */
#ifndef MXFORGE_VULKAN_MODULE_H_
#define MXFORGE_VULKAN_MODULE_H_

#include <tvm/ffi/extra/module.h>

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "../device.h"
#include "../module_format.h"
#include "../pipelines.h"

namespace mxforge {
namespace vulkan {

/*! \brief Kernels in the format of module_format.h, of kind "vulkan". */
class ModuleNode final : public tvm::ffi::ModuleObj {
 public:
  explicit ModuleNode(const tvm::ffi::Bytes& bytes);
  ~ModuleNode();

  const char* kind() const final { return "vulkan"; }
  int GetPropertyMask() const final {
    return tvm::ffi::Module::kBinarySerializable | tvm::ffi::Module::kRunnable;
  }
  tvm::ffi::Optional<tvm::ffi::Function> GetFunction(const tvm::ffi::String& name) final;
  bool ImplementsFunction(const tvm::ffi::String& name) final;
  tvm::ffi::Bytes SaveToBytes() const final;
  /*! \brief The reflection's JSON: "json", or an empty format. */
  tvm::ffi::String InspectSource(const tvm::ffi::String& format) const final;

  /*! \brief Run a kernel on this thread's device, with its arguments and then its extents. */
  void Launch(size_t kernel, const TVMFFIAny* arguments, int count);
  /*! \brief Throw where the device lacks what a kernel requires, as the first launch would. */
  void Check(int device_id);
  const std::vector<KernelInfo>& kernels() const { return kernels_; }

 private:
  static constexpr int kMostDevices = 16;

  const std::string bytes_;
  const std::vector<KernelInfo> kernels_;
  std::unordered_map<std::string, size_t> by_name_;
  std::mutex preparing_;
  struct Prepared {
    Device* device;
    std::shared_ptr<Pipelines> pipelines;
  };
  std::vector<std::unique_ptr<Prepared>> prepared_;  // also for devices that were lost since
  // By device: read without a lock at every launch.
  std::array<std::atomic<Prepared*>, kMostDevices> current_{};

  Pipelines* PipelinesFor(Device* device);
};

/*! \brief `ffi.Module.load_from_bytes.vulkan`. */
tvm::ffi::Module LoadModule(const tvm::ffi::Bytes& bytes);

}  // namespace vulkan
}  // namespace mxforge

#endif  // MXFORGE_VULKAN_MODULE_H_
