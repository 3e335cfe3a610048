/*!
 * \file device.h
 * \brief What runs plans: memory, copies, and functions that are ready to be called.
 *
 * What is asked of a device happens in order, and later than the call where the device has a queue.
 * Only `Wait` waits for it.
 */
#ifndef MXFORGE_CORE_DEVICE_H_
#define MXFORGE_CORE_DEVICE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "plan.h"

namespace mxforge {
namespace core {

/*! \brief Memory, until it is destroyed, which may be while the device has work that uses it. */
class Buffer {
 public:
  Buffer(void* address, size_t size) : address_(address), size_(size) {}
  virtual ~Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  /*! \brief The device's address: the host reads only a CPU's, and those of `AllocateHost`. */
  char* address() const { return static_cast<char*>(address_); }
  size_t size() const { return size_; }

 private:
  void* address_;
  size_t size_;
};

struct DeviceTensor {
  void* address = nullptr;
  std::vector<int64_t> shape;
};

/*! \brief A function of a plan, ready to be called again and again. */
class Runner {
 public:
  virtual ~Runner() = default;

  virtual const Function& function() const = 0;

  /*!
   * \brief Set an argument, which stays until it is set again.
   *
   * Error (MXF_INVALID) where the shape is not the function's.
   */
  virtual void Set(size_t argument, void* address, const std::vector<int64_t>& shape) = 0;

  /*! \brief Error (MXF_INVALID) where shapes disagree, (MXF_FAILED) where a kernel fails. */
  virtual void Run() = 0;

  /*! \brief As the last `Run` left it, until the next. */
  virtual DeviceTensor Output(size_t output) const = 0;
};

/*! \brief A place in a device's queue: all that was asked before. */
using Mark = uint64_t;

class Device {
 public:
  virtual ~Device() = default;

  /*! \brief Whether weights can stay where the host has them mapped: a CPU's. Else they are
   * uploaded. */
  virtual bool reads_host_memory() const = 0;

  /*! \brief Whether work goes on after the calls that ask for it, so that a step may be asked for
   * while the one before it runs. */
  virtual bool runs_behind() const { return !reads_host_memory(); }

  /*! \brief Memory of the device; zeros, or whatever lies there. Error (MXF_MEMORY). */
  virtual std::unique_ptr<Buffer> Allocate(size_t bytes) = 0;
  /*! \brief Memory of the host that the device copies into. Error (MXF_MEMORY). */
  virtual std::unique_ptr<Buffer> AllocateHost(size_t bytes) = 0;

  /*! \brief From the host's memory, which may be reused at once. */
  virtual void Upload(void* to, const void* from, size_t bytes) = 0;
  virtual void Copy(void* to, const void* from, size_t bytes) = 0;
  /*! \brief Into memory of `AllocateHost`, to be read after `Wait` for a later mark. */
  virtual void Download(void* to, const void* from, size_t bytes) = 0;

  virtual Mark Now() = 0;
  /*! \brief Error (MXF_FAILED, MXF_LOST) where anything before the mark went wrong. */
  virtual void Wait(Mark mark) = 0;

  /*! \brief Error (MXF_TARGET) where the device lacks what the function's kernels need. The
   * function and the plan's workspace outlive the runner, as the device does. */
  virtual std::unique_ptr<Runner> Open(const Function& function, void* workspace) = 0;
};

struct DeviceOptions {
  std::string kernels;  // path of the library's code
  int index = 0;        // which of the devices of a kind, the best first
  int threads = 1;      // of a CPU
  std::string target;   // what the code is for, such as cuda:sm_90a; empty: nobody says
};

/*! \brief How devices of a kind are found; `device_kinds.cc` lists all. */
struct DeviceKind {
  const char* name;  // of the artifact's target
  /*! \brief Error (MXF_TARGET) where there is none, or it cannot run the code. */
  std::unique_ptr<Device> (*open)(const DeviceOptions& options);
  /*! \brief Bytes that may still be allocated, as far as the device knows. */
  std::optional<uint64_t> (*memory)(int index);
  /*! \brief As mxf_devices has it. Error (MXF_TARGET) where there is no driver. */
  std::string (*describe)();
  /*! \brief Whether the device has what a plan's feature names. */
  bool (*has)(int index, const std::string& feature);
};

/*! \brief Error (MXF_TARGET) where this build has none of the name. */
const DeviceKind& FindDeviceKind(const std::string& name);

}  // namespace core
}  // namespace mxforge

#endif  // MXFORGE_CORE_DEVICE_H_
