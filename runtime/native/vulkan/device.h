/*!
 * \file device.h
 * \brief An opened device: memory, streams, copies and pipelines behind one mutex.
 */
#ifndef MXFORGE_VULKAN_DEVICE_H_
#define MXFORGE_VULKAN_DEVICE_H_

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "copier.h"
#include "core.h"
#include "hazards.h"
#include "memory.h"
#include "pipeline_cache.h"
#include "pipelines.h"
#include "recording.h"
#include "stream.h"

namespace mxforge {
namespace vulkan {

/*! \brief A kernel's pointer argument, as far as hazards are concerned. */
struct PointerUse {
  uint64_t address;
  uint64_t bytes;  // that it may touch: kToTheEnd of the tensor where nobody knows
  bool read;
  bool write;
  const std::string* name;
};

constexpr uint64_t kToTheEnd = UINT64_MAX;

class Device {
 public:
  /*! \brief vulkan:id, opened when it is first asked for; throws where that cannot be.
   *
   * A lost one is opened anew once it has no tensors, whose addresses would be mistaken for those
   * of the new one. Until then it is the lost one.
   */
  static Device* Get(int id);
  /*! \brief Every device opened so far. */
  static std::vector<Device*> Opened();
  void* Allocate(uint64_t bytes, uint64_t alignment);
  /*! \brief As Memory::AllocateHost, freed by its address on the device. */
  Buffer* AllocateHost(uint64_t bytes);
  void Free(void* address) noexcept;
  /*! \brief Launch a kernel on the stream of a handle. */
  void Launch(void* handle, const Dispatch& dispatch, const PointerUse* pointers, size_t count);

  /*! \brief Something to record launches into, instead of launching them. */
  std::shared_ptr<Recording> CreateRecording(void* handle);
  void Record(Recording* recording, const Dispatch& dispatch, const PointerUse* pointers,
              size_t count);
  void EndRecording(Recording* recording);
  /*! \brief Run a recording on the stream of a handle; false where that cannot be, because
   *  tensors were freed since. */
  bool Replay(void* handle, const Recording& recording);

  Stream* CreateStream();
  void FreeStream(void* handle);
  /*! \brief Let the device begin with what is recorded; returns the value to wait for. */
  uint64_t Submit(void* handle);
  void Wait(void* handle, uint64_t value);
  /*! \brief Wait for all that was recorded on these streams. */
  void Synchronize(std::initializer_list<void*> handles);
  void SynchronizeFromTo(void* from, void* to);
  /*! \brief The stream of a handle; null is the default. */
  Stream* StreamOf(void* handle);
  Copier& copier() { return copier_; }

  Core& core() { return core_; }
  PipelineCache& cache() { return cache_; }

  /*! \brief A module's pipelines; throws where the device is lost or cannot run the kernels. */
  std::shared_ptr<Pipelines> Prepare(const std::vector<KernelInfo>* kernels);
  /*! \brief Keep what nobody will use any more, pipelines or a recording, until commands that
   *  need it have ended. */
  void Retire(std::shared_ptr<void> remains) noexcept;

  /*! \brief For hooks, which look into everything. */
  std::mutex& mutex() { return mutex_; }
  Memory& memory() { return memory_; }
  Stream* default_stream() { return streams_.front().get(); }
  size_t stream_count() const;
  /*! \brief Start (or, false, stop) to log the default stream's commands and barriers. */
  void LogHazards(bool on);
  std::string HazardLogJson();

  /*! \brief Wait a bounded time for pending work; at the process's exit. */
  void WaitAtExit() noexcept;

 private:
  /*! \brief With the settings of the lost one before it, if there was one. */
  Device(int id, const Device* before);

  std::mutex mutex_;
  Core core_;
  PipelineCache cache_;
  Memory memory_;
  Copier copier_;
  // The default one is the first. None is ever destroyed, because uses of buffers and other
  // threads' waits point to them: a freed one waits to be handed out again.
  std::vector<std::unique_ptr<Stream>> streams_;
  std::vector<std::weak_ptr<Pipelines>> pipelines_;
  HazardLog log_;
  std::vector<Access> accesses_;  // of the launch being recorded
  std::vector<Buffer*> buffers_;

  Stream* Known(void* handle);
  /*! \brief What a kernel touches, into `accesses_` and `buffers_`. */
  void Resolve(const Dispatch& dispatch, const PointerUse* pointers, size_t count);
  /*! \brief Whether this is a lost device that nobody uses; then all that it has is freed. */
  bool GiveUp();
  /*! \brief Make memory free. Where a command is being recorded, its batch must stay open. */
  void Reclaim(bool recording);
};

}  // namespace vulkan
}  // namespace mxforge

#endif  // MXFORGE_VULKAN_DEVICE_H_
