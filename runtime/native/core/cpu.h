/*!
 * \file cpu.h
 * \brief Kernels that TVM compiled for this machine's CPU, and what they need of whoever runs them.
 */
#ifndef MXFORGE_CORE_CPU_H_
#define MXFORGE_CORE_CPU_H_

#include <cstdint>
#include <memory>
#include <string>

#include "device.h"
#include "os.h"
#include "pool.h"

namespace mxforge {
namespace core {

/*! \brief A tensor as kernels take it, laid out as DLPack's. */
struct KernelTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  const int64_t* shape;
  const int64_t* strides;
  uint64_t byte_offset;
};

/*! \brief An argument of a kernel, laid out as tvm_ffi's. */
struct KernelArgument {
  int32_t type;
  uint32_t padding;
  const KernelTensor* tensor;
};

using Kernel = int (*)(void* self, const KernelArgument* arguments, int32_t count,
                       KernelArgument* result);

/*! \brief The library of kernels. */
class CpuKernels {
 public:
  /*! \brief Error (MXF_TARGET) where it does not load here, or is none of ours. */
  explicit CpuKernels(const std::string& path);

  /*! \brief Error (MXF_CORRUPT) where there is none. */
  Kernel Find(const std::string& name) const;

 private:
  SharedLibrary library_;
};

/*! \brief This machine's CPU, which has done what it is asked when a call returns. */
class CpuDevice : public Device {
 public:
  CpuDevice(const std::string& kernels, int threads);

  bool reads_host_memory() const override { return true; }
  std::unique_ptr<Buffer> Allocate(size_t bytes) override;
  std::unique_ptr<Buffer> AllocateHost(size_t bytes) override { return Allocate(bytes); }
  void Upload(void* to, const void* from, size_t bytes) override { Copy(to, from, bytes); }
  void Copy(void* to, const void* from, size_t bytes) override;
  void Download(void* to, const void* from, size_t bytes) override { Copy(to, from, bytes); }
  Mark Now() override { return 0; }
  void Wait(Mark) override {}
  std::unique_ptr<Runner> Open(const Function& function, void* workspace) override;

 private:
  CpuKernels kernels_;
  Pool pool_;
};

extern const DeviceKind kCpuKind;

}  // namespace core
}  // namespace mxforge

#endif  // MXFORGE_CORE_CPU_H_
