/*!
 * \file device.h
 * \brief An opened device: memory, streams, copies and pipelines behind one mutex.
 */
#ifndef MXFORGE_VULKAN_DEVICE_H_
#define MXFORGE_VULKAN_DEVICE_H_

#include <cstdint>
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
#include "stream.h"

namespace mxforge {
namespace vulkan {

/*! \brief A kernel's pointer argument, as far as hazards are concerned. */
struct PointerUse {
  uint64_t address;
  bool read;
  bool write;
  const std::string* name;
};

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
  /*! \brief The device that this thread launches kernels on. */
  static int CurrentId();
  static void SetCurrentId(int id);

  void* Allocate(uint64_t bytes, uint64_t alignment);
  void Free(void* address) noexcept;
  void Launch(const Dispatch& dispatch, const PointerUse* pointers, size_t count);

  Stream* CreateStream();
  void FreeStream(void* handle);
  void Synchronize(void* handle);
  void SynchronizeFromTo(void* from, void* to);
  /*! \brief The stream of a handle; null is the one that this thread has set, or the default. */
  Stream* StreamOf(void* handle);
  Copier& copier() { return copier_; }

  Core& core() { return core_; }
  PipelineCache& cache() { return cache_; }

  /*! \brief A module's pipelines; throws where the device is lost or cannot run the kernels. */
  std::shared_ptr<Pipelines> Prepare(const std::vector<KernelInfo>* kernels);
  /*! \brief The module is gone: keep its pipelines until recorded commands have ended. */
  void Retire(std::shared_ptr<Pipelines> pipelines);

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
  /*! \brief Whether this is a lost device that nobody uses; then all that it has is freed. */
  bool GiveUp();
  /*! \brief Make memory free. Where a command is being recorded, its batch must stay open. */
  void Reclaim(bool recording);
};

}  // namespace vulkan
}  // namespace mxforge

#endif  // MXFORGE_VULKAN_DEVICE_H_
