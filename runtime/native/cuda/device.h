/*!
 * \file device.h
 * \brief An NVIDIA GPU: its primary context, and one stream that all is asked in.
 */
#ifndef MXFORGE_CUDA_DEVICE_H_
#define MXFORGE_CUDA_DEVICE_H_

#include <array>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../core/device.h"
#include "driver.h"

namespace mxforge {
namespace cuda {

/*! \brief A kernel of the library, and how much dynamic shared memory it may be given. */
struct LoadedKernel {
  Kernel handle = nullptr;
  int64_t shared = 0;
};

class CudaDevice : public core::Device {
 public:
  explicit CudaDevice(const core::DeviceOptions& options);
  ~CudaDevice() override;
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  bool reads_host_memory() const override { return false; }
  std::unique_ptr<core::Buffer> Allocate(size_t bytes) override;
  std::unique_ptr<core::Buffer> AllocateHost(size_t bytes) override;
  void Upload(void* to, const void* from, size_t bytes) override;
  void Copy(void* to, const void* from, size_t bytes) override;
  void Download(void* to, const void* from, size_t bytes) override;
  core::Mark Now() override;
  void Wait(core::Mark mark) override;
  std::unique_ptr<core::Runner> Open(const core::Function& function, void* workspace) override;

  const Driver& driver() const { return driver_; }
  Stream stream() const { return stream_; }

  /*!
   * \brief Makes the context the thread's, as all that follows needs, and puts back what was.
   *
   * The process may use CUDA besides. Does nothing after a loss: no call is made then.
   */
  class Turn {
   public:
    /*! \brief Error (MXF_LOST) where the device is. */
    explicit Turn(CudaDevice* device);
    ~Turn();
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

   private:
    CudaDevice* device_;
  };

  /*! \brief Error unless the result is kSuccess; remembers a loss. */
  void Check(Result result, const char* call);

  /*! \brief Error (MXF_CORRUPT) where the library lacks it. It stays where it is. */
  LoadedKernel* Find(const std::string& name);
  /*! \brief Let a kernel have so much dynamic shared memory. Error (MXF_TARGET). */
  void Permit(const std::string& name, LoadedKernel* kernel, int64_t bytes);

  /*! \brief Give memory back once what was asked so far is done; never fails. */
  void Free(void* memory);
  void FreeHost(void* memory);

 private:
  /*! \brief Memory of the host that uploads go through, part after part. */
  struct Chunk {
    char* memory = nullptr;
    Event copied = nullptr;  // the device has read all of it
  };

  const Driver& driver_;
  Ordinal ordinal_ = 0;
  std::string name_;
  int most_shared_ = 0;
  bool frees_in_order_ = false;
  Context context_ = nullptr;
  Stream stream_ = nullptr;
  Module module_ = nullptr;
  std::map<std::string, LoadedKernel> kernels_;

  std::array<Chunk, 4> chunks_;
  size_t chunk_ = 0, used_ = 0;  // where the next upload's bytes go

  core::Mark last_ = 0;
  std::deque<std::pair<core::Mark, Event>> marks_;  // not awaited yet
  std::vector<Event> events_;                       // to be used again

  std::optional<core::Error> lost_;

  void Start(const core::DeviceOptions& options);
  void CheckArchitecture(const std::string& target);
  void Close();
  Event NewEvent();
  Chunk* ChunkWithRoom();
};

extern const core::DeviceKind kCudaKind;

}  // namespace cuda
}  // namespace mxforge

#endif  // MXFORGE_CUDA_DEVICE_H_
