/*!
 * \file stream.h
 * \brief A stream of commands: recorded into batches, submitted a batch at a time.
 *
 * Batch n of a stream signals n on the stream's timeline semaphore. All streams of a device share
 * its one queue. The device's mutex is held whenever a stream is called. Streams live as long as
 * the device: freed ones are handed out again.
 */
#ifndef MXFORGE_VULKAN_STREAM_H_
#define MXFORGE_VULKAN_STREAM_H_

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core.h"
#include "hazards.h"
#include "memory.h"

namespace mxforge {
namespace vulkan {

/*! \brief A kernel launch, ready to be recorded. */
struct Dispatch {
  VkPipeline pipeline = VK_NULL_HANDLE;
  VkPipelineLayout layout = VK_NULL_HANDLE;
  const std::string* name = nullptr;  // lives as long as the process
  uint32_t groups[3] = {1, 1, 1};
  const uint8_t* block = nullptr;  // the arguments
  uint32_t block_bytes = 0;
  bool argument_buffer = false;  // the block goes through memory instead of push constants
};

/*! \brief Push constants of a launch: bytes, or the address of some. */
struct PushedBlock {
  const uint8_t* bytes;  // null: the address
  uint32_t size;
  uint64_t address;
};

/*! \brief A command buffer with what its commands need until they have ended; reused. */
class Batch {
 public:
  Batch(Core* core, Memory* memory);
  ~Batch();
  Batch(const Batch&) = delete;
  Batch& operator=(const Batch&) = delete;

  VkCommandBuffer commands = VK_NULL_HANDLE;
  uint64_t value = 0;     // signalled at its end
  uint64_t position = 0;  // of its last command, for the hazard tracker
  uint32_t count = 0;     // commands so far
  VkPipeline bound = VK_NULL_HANDLE;
  VkCommandBuffer replayed = VK_NULL_HANDLE;  // part of a recording that follows its own commands

  void Begin(uint64_t new_value);
  /*! \brief For commands that will be submitted more than once, by other batches. */
  void BeginKept();
  void Record(const Barrier& barrier);
  /*! \brief What a launch pushes: its arguments, or where a copy of them lies. Comes before
   *  anything of it is recorded, for there may be no memory. */
  PushedBlock Pushed(const Dispatch& dispatch);
  void Launch(const Dispatch& dispatch, const PushedBlock& pushed);
  /*! \brief Nothing more will be recorded. */
  void End();
  /*! \brief The batch has ended: account for its timestamps.
   *
   * Returns the milliseconds that it took on its own: `previous` is when the one before it ended
   * by the device's clock, and becomes when this one did. Negative where there is no clock.
   */
  double Finish(uint64_t* previous);

 private:
  static constexpr uint64_t kArgumentChunk = 64 << 10;
  static constexpr uint32_t kQueries = 2048;

  Core* core_;
  Memory* memory_;
  VkCommandPool pool_ = VK_NULL_HANDLE;
  VkQueryPool span_ = VK_NULL_HANDLE;  // the batch's own begin and end
  VkQueryPool queries_ = VK_NULL_HANDLE;
  std::vector<const std::string*> stamped_;  // kernels between pairs of timestamps
  bool stamping_ = false;                    // this batch has timestamps at all
  bool stamped_before_ = false;
  std::vector<std::unique_ptr<Buffer>> arguments_;
  size_t argument_chunk_ = 0;
  uint64_t argument_offset_ = 0;

  /*! \brief Memory for an argument block, 16-aligned, kept until the batch has ended. */
  uint64_t WriteArguments(const uint8_t* block, uint32_t bytes);
  void StampBefore(const std::string* name);
  void StampAfter();
  void Restart(VkCommandBufferUsageFlags flags);
  VkQueryPool CreateQueries(uint32_t count);
  double Milliseconds(uint64_t from, uint64_t to) const;
  void CountKernels();
};

class Recording;

class Stream {
 public:
  /*! \brief `siblings` are all streams of the device, in time this one among them. */
  Stream(Core* core, Memory* memory, const std::vector<std::unique_ptr<Stream>>* siblings);
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  HazardTracker hazards;

  /*! \brief Record a kernel; `buffers[i]` is what `accesses[i]` is about. */
  void Launch(const Dispatch& dispatch, const Access* accesses, Buffer* const* buffers,
              size_t count);
  /*! \brief Record a copy between buffers (or, not overlapping, within one). */
  void Copy(Buffer* from, uint64_t from_offset, Buffer* to, uint64_t to_offset, uint64_t bytes,
            const char* name);
  /*! \brief Submit all that was recorded here, and a recording behind it. */
  void Replay(const Recording& recording);
  /*! \brief See to it that what was written to this range is visible to the host once the
   *  returned value has ended; that of the last barrier towards the host if it serves. */
  uint64_t PrepareHost(Buffer* buffer, const Access& access);

  /*! \brief Let the device begin with what is recorded; returns the value that it will signal.
   *
   * Without anything recorded but behind another stream's work, the batch is empty and signals
   * after that work, so that waits for this stream and streams behind it include it.
   */
  uint64_t Submit();
  /*! \brief Whether this value has been signalled. */
  bool Ended(uint64_t value);
  /*! \brief Wait for a submitted value; lets go of the mutex meanwhile where one is given. */
  void Wait(uint64_t value, std::unique_lock<std::mutex>* lock = nullptr);
  /*! \brief What is submitted here from now on runs after what is submitted there until now. */
  void RunAfter(Stream* other);

  /*! \brief Wait for what is submitted, at most so long, without a word; for the process's exit. */
  void WaitAtExit(uint64_t nanoseconds) noexcept;

  /*! \brief Destroy batches and semaphore, of a lost device that has settled. */
  void GiveUp();

  uint64_t submitted() const { return submitted_; }
  /*! \brief The value behind everything recorded so far, submitted or not. */
  uint64_t Latest() const { return open_ ? open_->value : submitted_; }
  /*! \brief The value behind the last barrier towards the host. */
  uint64_t host_barrier() const { return host_barrier_; }
  size_t InFlight() const { return in_flight_.size(); }

  /*! \brief Commands that a batch may have at present, as long as earlier ones took. */
  uint32_t batch_limit() const { return batch_limit_; }

  /*! \brief False between FreeStream and the next CreateStream. */
  bool in_use = true;

  /*! \brief For tests: what the next submits, or waits, answer. */
  VkResult submit_to_simulate = VK_SUCCESS;
  VkResult wait_to_simulate = VK_SUCCESS;

 private:
  Core* core_;
  Memory* memory_;
  VkSemaphore timeline_ = VK_NULL_HANDLE;
  uint64_t submitted_ = 0;  // the last batch's value
  uint64_t ended_ = 0;      // known to have been signalled
  uint64_t host_barrier_ = 0;
  uint32_t batch_limit_;
  uint64_t last_end_ = 0;  // of a batch, by the device's clock
  bool replaying_ = false;  // when that batch ended, and the next may have begun
  std::unique_ptr<Batch> open_;
  std::deque<std::unique_ptr<Batch>> in_flight_;
  std::vector<std::unique_ptr<Batch>> spare_;
  const std::vector<std::unique_ptr<Stream>>* siblings_;
  std::map<const Stream*, uint64_t> dependencies_;  // of the next submit
  std::map<const Stream*, uint64_t> waited_for_;    // by submits so far, and all that follow them

  Batch* Open();
  void Count();
  void Poll();
  void Reached(uint64_t value);
  /*! \brief Values of other streams that the next submit waits for. */
  std::map<const Stream*, uint64_t> Awaited() const;
};

}  // namespace vulkan
}  // namespace mxforge

#endif  // MXFORGE_VULKAN_STREAM_H_
