#include "stream.h"

#include <algorithm>
#include <cstring>

#include "batch_limit.h"
#include "recording.h"

namespace mxforge {
namespace vulkan {
namespace {

VkPipelineStageFlags StageMask(uint8_t stages) {
  VkPipelineStageFlags mask = 0;
  if ((stages & StageBit(Stage::kCompute)) != 0) mask |= VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT;
  if ((stages & StageBit(Stage::kTransfer)) != 0) mask |= VK_PIPELINE_STAGE_TRANSFER_BIT;
  if ((stages & StageBit(Stage::kHost)) != 0) mask |= VK_PIPELINE_STAGE_HOST_BIT;
  return mask;
}

VkAccessFlags WriteMask(uint8_t stages) {
  VkAccessFlags mask = 0;
  if ((stages & StageBit(Stage::kCompute)) != 0) mask |= VK_ACCESS_SHADER_WRITE_BIT;
  if ((stages & StageBit(Stage::kTransfer)) != 0) mask |= VK_ACCESS_TRANSFER_WRITE_BIT;
  if ((stages & StageBit(Stage::kHost)) != 0) mask |= VK_ACCESS_HOST_WRITE_BIT;
  return mask;
}

VkAccessFlags ReadMask(uint8_t stages) {
  VkAccessFlags mask = 0;
  if ((stages & StageBit(Stage::kCompute)) != 0) mask |= VK_ACCESS_SHADER_READ_BIT;
  if ((stages & StageBit(Stage::kTransfer)) != 0) mask |= VK_ACCESS_TRANSFER_READ_BIT;
  if ((stages & StageBit(Stage::kHost)) != 0) mask |= VK_ACCESS_HOST_READ_BIT;
  return mask;
}

}  // namespace

Batch::Batch(Core* core, Memory* memory) : core_(core), memory_(memory) {
  auto pool = Struct<VkCommandPoolCreateInfo>(VK_STRUCTURE_TYPE_COMMAND_POOL_CREATE_INFO);
  pool.flags = VK_COMMAND_POOL_CREATE_TRANSIENT_BIT;
  pool.queueFamilyIndex = core_->physical.queue_family;
  core_->Check(core_->call.CreateCommandPool(core_->handle, &pool, nullptr, &pool_),
               "vkCreateCommandPool");
  auto info = Struct<VkCommandBufferAllocateInfo>(VK_STRUCTURE_TYPE_COMMAND_BUFFER_ALLOCATE_INFO);
  info.commandPool = pool_;
  info.level = VK_COMMAND_BUFFER_LEVEL_PRIMARY;
  info.commandBufferCount = 1;
  const VkResult result = core_->call.AllocateCommandBuffers(core_->handle, &info, &commands);
  if (result != VK_SUCCESS) core_->call.DestroyCommandPool(core_->handle, pool_, nullptr);
  core_->Check(result, "vkAllocateCommandBuffers");
}

Batch::~Batch() {
  if (span_ != VK_NULL_HANDLE) core_->call.DestroyQueryPool(core_->handle, span_, nullptr);
  if (queries_ != VK_NULL_HANDLE) core_->call.DestroyQueryPool(core_->handle, queries_, nullptr);
  core_->call.DestroyCommandPool(core_->handle, pool_, nullptr);
}

void Batch::Restart(VkCommandBufferUsageFlags flags) {
  count = 0;
  bound = VK_NULL_HANDLE;
  replayed = VK_NULL_HANDLE;
  argument_chunk_ = 0;
  argument_offset_ = 0;
  stamped_.clear();
  stamping_ = false;
  core_->Check(core_->call.ResetCommandPool(core_->handle, pool_, 0), "vkResetCommandPool");
  auto info = Struct<VkCommandBufferBeginInfo>(VK_STRUCTURE_TYPE_COMMAND_BUFFER_BEGIN_INFO);
  info.flags = flags;
  core_->Check(core_->call.BeginCommandBuffer(commands, &info), "vkBeginCommandBuffer");
}

void Batch::BeginKept() { Restart(VK_COMMAND_BUFFER_USAGE_SIMULTANEOUS_USE_BIT); }

void Batch::Begin(uint64_t new_value) {
  value = new_value;
  position = 0;
  Restart(VK_COMMAND_BUFFER_USAGE_ONE_TIME_SUBMIT_BIT);
  if (core_->physical.timestamp_bits == 0) return;
  if (span_ == VK_NULL_HANDLE) span_ = CreateQueries(2);
  core_->call.CmdResetQueryPool(commands, span_, 0, 2);
  core_->call.CmdWriteTimestamp(commands, VK_PIPELINE_STAGE_TOP_OF_PIPE_BIT, span_, 0);
  if (!core_->profiling) return;
  stamping_ = true;
  if (queries_ == VK_NULL_HANDLE) queries_ = CreateQueries(kQueries);
  core_->call.CmdResetQueryPool(commands, queries_, 0, kQueries);
}

void Batch::Record(const Barrier& barrier) {
  if (!barrier) return;
  ++core_->statistics.barriers;
  const uint8_t to = StageBit(barrier.to);
  auto memory = Struct<VkMemoryBarrier>(VK_STRUCTURE_TYPE_MEMORY_BARRIER);
  memory.srcAccessMask = WriteMask(barrier.memory);
  memory.dstAccessMask = ReadMask(to) | WriteMask(to);
  core_->call.CmdPipelineBarrier(commands, StageMask(barrier.execution), StageMask(to), 0,
                                 barrier.memory != 0 ? 1 : 0, &memory, 0, nullptr, 0, nullptr);
}

PushedBlock Batch::Pushed(const Dispatch& dispatch) {
  if (!dispatch.argument_buffer) return {dispatch.block, dispatch.block_bytes, 0};
  return {nullptr, sizeof(uint64_t), WriteArguments(dispatch.block, dispatch.block_bytes)};
}

void Batch::Launch(const Dispatch& dispatch, const PushedBlock& pushed) {
  const auto& call = core_->call;
  if (bound != dispatch.pipeline) {
    call.CmdBindPipeline(commands, VK_PIPELINE_BIND_POINT_COMPUTE, dispatch.pipeline);
    bound = dispatch.pipeline;
  }
  if (pushed.size != 0) {
    const void* bytes = pushed.bytes != nullptr ? static_cast<const void*>(pushed.bytes)
                                                : &pushed.address;
    call.CmdPushConstants(commands, dispatch.layout, VK_SHADER_STAGE_COMPUTE_BIT, 0, pushed.size,
                          bytes);
  }
  StampBefore(dispatch.name);
  call.CmdDispatch(commands, dispatch.groups[0], dispatch.groups[1], dispatch.groups[2]);
  StampAfter();
  ++core_->statistics.dispatches;
}

VkQueryPool Batch::CreateQueries(uint32_t count) {
  auto info = Struct<VkQueryPoolCreateInfo>(VK_STRUCTURE_TYPE_QUERY_POOL_CREATE_INFO);
  info.queryType = VK_QUERY_TYPE_TIMESTAMP;
  info.queryCount = count;
  VkQueryPool pool = VK_NULL_HANDLE;
  core_->Check(core_->call.CreateQueryPool(core_->handle, &info, nullptr, &pool),
               "vkCreateQueryPool");
  return pool;
}

void Batch::End() {
  if (span_ != VK_NULL_HANDLE) {  // never of what is kept
    core_->call.CmdWriteTimestamp(commands, VK_PIPELINE_STAGE_BOTTOM_OF_PIPE_BIT, span_, 1);
  }
  core_->CheckFatal(core_->call.EndCommandBuffer(commands), "vkEndCommandBuffer");
}

uint64_t Batch::WriteArguments(const uint8_t* block, uint32_t bytes) {
  const uint64_t rounded = (static_cast<uint64_t>(bytes) + 15) / 16 * 16;
  while (true) {
    if (argument_chunk_ == arguments_.size()) {
      const uint64_t size = std::max(kArgumentChunk, rounded);
      arguments_.push_back(memory_->Create(size, MemoryKind::kUpload));
    }
    if (argument_offset_ + rounded <= arguments_[argument_chunk_]->size) break;
    ++argument_chunk_;
    argument_offset_ = 0;
  }
  const Buffer& chunk = *arguments_[argument_chunk_];
  std::memcpy(chunk.mapped + argument_offset_, block, bytes);
  const uint64_t address = chunk.address + argument_offset_;
  argument_offset_ += rounded;
  ++core_->statistics.argument_buffers;
  return address;
}

void Batch::StampBefore(const std::string* name) {
  stamped_before_ = stamping_ && 2 * stamped_.size() + 2 <= kQueries;
  if (!stamped_before_) return;
  // Both stamps wait for all that came before, so that their difference is this kernel's alone.
  core_->call.CmdWriteTimestamp(commands, VK_PIPELINE_STAGE_BOTTOM_OF_PIPE_BIT, queries_,
                                static_cast<uint32_t>(2 * stamped_.size()));
  stamped_.push_back(name);
}

void Batch::StampAfter() {
  if (!stamped_before_) return;
  core_->call.CmdWriteTimestamp(commands, VK_PIPELINE_STAGE_BOTTOM_OF_PIPE_BIT, queries_,
                                static_cast<uint32_t>(2 * stamped_.size() - 1));
}

double Batch::Milliseconds(uint64_t from, uint64_t to) const {
  const uint32_t bits = core_->physical.timestamp_bits;
  const uint64_t mask = bits >= 64 ? UINT64_MAX : (1ULL << bits) - 1;
  return static_cast<double>((to - from) & mask) * core_->physical.limits.timestampPeriod * 1e-6;
}

double Batch::Finish(uint64_t* previous) {
  CountKernels();
  uint64_t span[2];
  if (span_ == VK_NULL_HANDLE ||
      core_->call.GetQueryPoolResults(core_->handle, span_, 0, 2, sizeof(span), span,
                                      sizeof(uint64_t), VK_QUERY_RESULT_64_BIT) != VK_SUCCESS) {
    return -1;
  }
  // It may have begun, as far as the clock goes, while the one before it was still running.
  const double whole = Milliseconds(span[0], span[1]);
  const double alone = *previous == 0 ? whole : Milliseconds(*previous, span[1]);
  *previous = span[1];
  return std::min(whole, alone);
}

void Batch::CountKernels() {
  if (stamped_.empty()) return;
  std::vector<uint64_t> stamps(2 * stamped_.size());
  const VkResult result = core_->call.GetQueryPoolResults(
      core_->handle, queries_, 0, static_cast<uint32_t>(stamps.size()),
      stamps.size() * sizeof(uint64_t), stamps.data(), sizeof(uint64_t), VK_QUERY_RESULT_64_BIT);
  if (result != VK_SUCCESS) return;  // times are an aid; without them the work is still done
  for (size_t i = 0; i < stamped_.size(); ++i) {
    KernelTime& time = core_->times[*stamped_[i]];
    ++time.count;
    time.nanoseconds += 1e6 * Milliseconds(stamps[2 * i], stamps[2 * i + 1]);
  }
  stamped_.clear();
}

Stream::Stream(Core* core, Memory* memory, const std::vector<std::unique_ptr<Stream>>* siblings)
    : core_(core),
      memory_(memory),
      batch_limit_(core->settings.first_batch_commands),
      siblings_(siblings) {
  auto type = Struct<VkSemaphoreTypeCreateInfo>(VK_STRUCTURE_TYPE_SEMAPHORE_TYPE_CREATE_INFO);
  type.semaphoreType = VK_SEMAPHORE_TYPE_TIMELINE;
  auto info = Struct<VkSemaphoreCreateInfo>(VK_STRUCTURE_TYPE_SEMAPHORE_CREATE_INFO);
  info.pNext = &type;
  core_->Check(core_->call.CreateSemaphore(core_->handle, &info, nullptr, &timeline_),
               "vkCreateSemaphore");
}

Batch* Stream::Open() {
  if (open_) return open_.get();
  core_->EnsureAlive();
  // A bound on what is in flight keeps memory and delays bounded.
  while (in_flight_.size() >= core_->settings.batches_in_flight) Wait(in_flight_.front()->value);
  std::unique_ptr<Batch> batch;
  if (spare_.empty()) {
    batch = std::make_unique<Batch>(core_, memory_);
  } else {
    batch = std::move(spare_.back());
    spare_.pop_back();
  }
  batch->Begin(submitted_ + 1);
  open_ = std::move(batch);
  return open_.get();
}

void Stream::Count() {
  Batch* batch = open_.get();
  batch->position = hazards.Position();
  ++batch->count;
  const uint32_t most = core_->settings.batch_commands;
  const bool timed = core_->settings.batch_milliseconds != 0;
  if (batch->count >= (timed ? std::min(batch_limit_, most) : most)) {
    Submit();
  } else if (batch->count == core_->settings.first_batch_commands) {
    Poll();
    if (in_flight_.empty()) Submit();  // or the device would sit idle while we go on recording
  }
}

void Stream::Launch(const Dispatch& dispatch, const Access* accesses, Buffer* const* buffers,
                    size_t count) {
  Batch* batch = Open();
  const PushedBlock pushed = batch->Pushed(dispatch);
  batch->Record(hazards.Command(Stage::kCompute, accesses, count, *dispatch.name));
  for (size_t i = 0; i < count; ++i) buffers[i]->Mark(this, batch->value, accesses[i].write);
  batch->Launch(dispatch, pushed);
  Count();
}

void Stream::Replay(const Recording& recording) {
  if (recording.parts().empty()) return;
  // As one command, behind the barrier that the recording begins with.
  hazards.Everything(Stage::kCompute);
  hazards.Command(Stage::kCompute, recording.accesses().data(), recording.accesses().size(),
                  "recording");
  const uint64_t last = Open()->value + recording.parts().size() - 1;
  for (const Recording::Use& use : recording.uses()) {
    use.buffer->Mark(this, last, use.access.write);
  }
  for (const auto& part : recording.parts()) {
    Batch* batch = Open();
    batch->replayed = part->commands;
    batch->count += part->count;
    batch->position = hazards.Position();
    core_->statistics.dispatches += part->count;
    Submit();
  }
}

void Stream::Copy(Buffer* from, uint64_t from_offset, Buffer* to, uint64_t to_offset,
                  uint64_t bytes, const char* name) {
  Batch* batch = Open();
  const Access accesses[] = {{from->resource, false, from_offset, from_offset + bytes},
                             {to->resource, true, to_offset, to_offset + bytes}};
  batch->Record(hazards.Command(Stage::kTransfer, accesses, 2, name));
  from->Mark(this, batch->value, false);
  to->Mark(this, batch->value, true);
  VkBufferCopy region{from->offset + from_offset, to->offset + to_offset, bytes};
  core_->call.CmdCopyBuffer(batch->commands, from->handle, to->handle, 1, &region);
  ++core_->statistics.copies;
  Count();
}

uint64_t Stream::PrepareHost(Buffer* buffer, const Access& access) {
  if (hazards.HostReady(access)) return host_barrier_;
  Batch* batch = Open();
  batch->Record(hazards.BeforeHost(access));
  buffer->Mark(this, batch->value, true);
  batch->position = hazards.Position();
  ++batch->count;
  host_barrier_ = batch->value;
  return host_barrier_;
}

std::map<const Stream*, uint64_t> Stream::Awaited() const {
  std::map<const Stream*, uint64_t> awaited = dependencies_;
  for (const auto& sibling : *siblings_) {
    // What the host knows to have ended there it may use here without a word, but only waiting for
    // the semaphore makes it visible. It is signalled already, so this costs next to nothing.
    if (sibling.get() == this || sibling->ended_ == 0) continue;
    uint64_t& value = awaited[sibling.get()];
    value = std::max(value, sibling->ended_);
  }
  for (auto each = awaited.begin(); each != awaited.end();) {
    const auto before = waited_for_.find(each->first);
    const bool known = before != waited_for_.end() && before->second >= each->second;
    each = known ? awaited.erase(each) : std::next(each);
  }
  return awaited;
}

uint64_t Stream::Submit() {
  if ((!open_ || open_->count == 0) && dependencies_.empty()) return submitted_;
  Open();
  core_->EnsureAlive();
  open_->End();

  std::vector<VkSemaphore> wait_semaphores;
  std::vector<uint64_t> wait_values;
  const std::map<const Stream*, uint64_t> awaited = Awaited();
  for (const auto& [stream, value] : awaited) {
    wait_semaphores.push_back(stream->timeline_);
    wait_values.push_back(value);
  }
  const std::vector<VkPipelineStageFlags> stages(wait_semaphores.size(),
                                                 VK_PIPELINE_STAGE_ALL_COMMANDS_BIT);
  auto values =
      Struct<VkTimelineSemaphoreSubmitInfo>(VK_STRUCTURE_TYPE_TIMELINE_SEMAPHORE_SUBMIT_INFO);
  values.waitSemaphoreValueCount = static_cast<uint32_t>(wait_values.size());
  values.pWaitSemaphoreValues = wait_values.data();
  values.signalSemaphoreValueCount = 1;
  values.pSignalSemaphoreValues = &open_->value;
  auto info = Struct<VkSubmitInfo>(VK_STRUCTURE_TYPE_SUBMIT_INFO);
  info.pNext = &values;
  info.waitSemaphoreCount = static_cast<uint32_t>(wait_semaphores.size());
  info.pWaitSemaphores = wait_semaphores.data();
  info.pWaitDstStageMask = stages.data();
  const VkCommandBuffer commands[] = {open_->commands, open_->replayed};
  info.commandBufferCount = open_->replayed == VK_NULL_HANDLE ? 1 : 2;
  info.pCommandBuffers = commands;
  info.signalSemaphoreCount = 1;
  info.pSignalSemaphores = &timeline_;
  const VkResult result = submit_to_simulate != VK_SUCCESS
                              ? submit_to_simulate
                              : core_->call.QueueSubmit(core_->queue, 1, &info, VK_NULL_HANDLE);
  core_->CheckFatal(result, "vkQueueSubmit");
  ++core_->statistics.submits;
  core_->statistics.semaphore_waits += awaited.size();
  for (const auto& [stream, value] : awaited) waited_for_[stream] = value;
  dependencies_.clear();
  submitted_ = open_->value;
  in_flight_.push_back(std::move(open_));
  return submitted_;
}

void Stream::Reached(uint64_t value) {
  ended_ = std::max(ended_, value);
  while (!in_flight_.empty() && in_flight_.front()->value <= ended_) {
    const Settings& settings = core_->settings;
    Batch& batch = *in_flight_.front();
    const double took = batch.Finish(&last_end_);
    // A recording has no timestamps of its own, and the batch behind it may have begun within it.
    const bool timed = batch.replayed == VK_NULL_HANDLE && !replaying_;
    replaying_ = batch.replayed != VK_NULL_HANDLE;
    if (took < 0) {
      batch_limit_ = settings.batch_commands;  // nobody knows: the number alone has to do
    } else if (timed && batch.count != 0 && settings.batch_milliseconds != 0) {
      batch_limit_ = NextBatchLimit(batch_limit_, batch.count, took, settings.batch_milliseconds,
                                    settings.batch_commands);
    }
    hazards.Waited(batch.position);
    spare_.push_back(std::move(in_flight_.front()));
    in_flight_.pop_front();
  }
}

void Stream::Poll() {
  uint64_t value = 0;
  if (core_->lost()) return;
  core_->Check(core_->call.GetSemaphoreCounterValue(core_->handle, timeline_, &value),
               "vkGetSemaphoreCounterValue");
  Reached(value);
}

bool Stream::Ended(uint64_t value) {
  if (value <= ended_) return true;
  if (core_->lost()) {
    core_->Settle();
    return true;
  }
  if (value > submitted_) return false;
  Poll();
  return value <= ended_;
}

void Stream::Wait(uint64_t value, std::unique_lock<std::mutex>* lock) {
  core_->EnsureAlive();
  if (value <= ended_) return;
  ++core_->statistics.waits;
  auto info = Struct<VkSemaphoreWaitInfo>(VK_STRUCTURE_TYPE_SEMAPHORE_WAIT_INFO);
  info.semaphoreCount = 1;
  info.pSemaphores = &timeline_;
  info.pValues = &value;
  VkResult result = wait_to_simulate;
  if (result == VK_SUCCESS) {
    ++core_->guests;
    if (lock != nullptr) lock->unlock();
    result = core_->call.WaitSemaphores(core_->handle, &info, UINT64_MAX);
    if (lock != nullptr) lock->lock();
    --core_->guests;
  }
  core_->Check(result, "vkWaitSemaphores");
  Reached(value);
}

void Stream::RunAfter(Stream* other) {
  if (other == this) return;
  if (open_ && open_->count != 0) Submit();  // what is recorded here already need not wait
  const uint64_t value = other->Submit();
  // Even where the other has ended: waiting for the semaphore also makes its writes visible.
  if (value != 0) dependencies_[other] = value;
}

void Stream::GiveUp() {
  open_.reset();
  in_flight_.clear();
  spare_.clear();
  core_->call.DestroySemaphore(core_->handle, timeline_, nullptr);
  timeline_ = VK_NULL_HANDLE;
}

void Stream::WaitAtExit(uint64_t nanoseconds) noexcept {
  if (core_->lost() || submitted_ <= ended_) return;
  auto info = Struct<VkSemaphoreWaitInfo>(VK_STRUCTURE_TYPE_SEMAPHORE_WAIT_INFO);
  info.semaphoreCount = 1;
  info.pSemaphores = &timeline_;
  info.pValues = &submitted_;
  core_->call.WaitSemaphores(core_->handle, &info, nanoseconds);
}

}  // namespace vulkan
}  // namespace mxforge
