/*!
 * \file core.h
 * \brief The logical device: what every other room of the runtime stands on.
 */
#ifndef MXFORGE_VULKAN_CORE_H_
#define MXFORGE_VULKAN_CORE_H_

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <string>

#include "error.h"
#include "instance.h"
#include "loader.h"

namespace mxforge {
namespace vulkan {

/*! \brief What tests and experiments may turn; the defaults are for everybody else. */
struct Settings {
  bool direct_copies = true;           // the host reads and writes mapped memory itself
  uint32_t batch_commands = 256;       // commands after which a batch is submitted anyway
  uint32_t first_batch_commands = 32;  // the same while the device has nothing else to do
  uint32_t batch_milliseconds = 100;   // how long a batch should take at most; 0: any time
  uint32_t batches_in_flight = 8;      // submitted and not known to have ended
  uint64_t block_bytes = 64 << 20;     // of a block that small tensors share; 0: none do
  uint64_t staging_chunk_bytes = 4 << 20;
  uint32_t staging_chunks = 4;
  uint32_t pipeline_threads = 0;  // 0: as many as the machine has, up to 8
};

/*! \brief What has happened since the device was opened. */
struct Statistics {
  uint64_t dispatches = 0;
  uint64_t copies = 0;
  uint64_t staged_bytes = 0;
  uint64_t direct_bytes = 0;
  uint64_t barriers = 0;
  uint64_t submits = 0;
  uint64_t waits = 0;            // of the host
  uint64_t semaphore_waits = 0;  // of a stream for another
  uint64_t argument_buffers = 0;
  uint64_t allocations = 0;
  uint64_t allocated_bytes = 0;  // of tensors and buffers that exist
  uint64_t reserved_bytes = 0;   // of the device memory that they lie in
  uint64_t deferred_frees = 0;
  uint64_t reclaims = 0;
};

struct KernelTime {
  uint64_t count = 0;
  double nanoseconds = 0;
};

/*! \brief VkDevice, its queue and functions. Destroyed only after it was lost. */
class Core {
 public:
  explicit Core(const PhysicalDevice& physical);
  Core(const Core&) = delete;
  Core& operator=(const Core&) = delete;

  const PhysicalDevice& physical;
  DeviceFunctions call;
  VkDevice handle = VK_NULL_HANDLE;
  VkQueue queue = VK_NULL_HANDLE;
  std::set<std::string> enabled_extensions;
  Settings settings;
  Statistics statistics;
  bool profiling = false;
  std::map<std::string, KernelTime> times;
  /*! \brief Threads that call the driver without the device's mutex: for them a lost device
   *  stays. The mutex is over it. */
  uint32_t guests = 0;

  /*! \brief "vulkan:0 (NAME)" */
  std::string Label() const;

  /*! \brief Throw unless the call succeeded; a lost device is remembered. */
  void Check(VkResult result, const char* function);
  /*! \brief The same where a failure leaves recorded work undone: no work may follow it. */
  void CheckFatal(VkResult result, const char* function);

  /*! \brief Throw if the device was lost: nothing can be done with it any more. */
  void EnsureAlive() const {
    if (lost_.load(std::memory_order_relaxed)) ThrowLost();
  }
  bool lost() const { return lost_.load(std::memory_order_relaxed); }

  /*! \brief On a lost device: nothing of it runs any more afterwards. For whoever holds the
   *  mutex. A device that takes no more work may still be at work on what came before. */
  void Settle();
  /*! \brief Destroy the VkDevice; everything made of it was destroyed before. */
  void Destroy();

 private:
  std::atomic<bool> lost_{false};
  bool settled_ = false;
  mutable std::mutex cause_mutex_;
  std::string cause_;  // what was answered first, and by which function
  void Lose(VkResult result, const char* function);
  [[noreturn]] void ThrowLost() const;
};

}  // namespace vulkan
}  // namespace mxforge

#endif  // MXFORGE_VULKAN_CORE_H_
