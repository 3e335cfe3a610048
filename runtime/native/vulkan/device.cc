#include "device.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <exception>
#include <thread>

namespace mxforge {
namespace vulkan {
namespace {

constexpr int kMostDevices = 16;
constexpr uint64_t kExitNanoseconds = 10'000'000'000;

/*! \brief Opened devices. Leaked: threads and Python's destructors run until the very end. */
struct Registry {
  std::array<std::atomic<Device*>, kMostDevices> devices{};
  std::mutex opening;
};

Registry& TheRegistry() {
  static auto* const registry = new Registry();
  return *registry;
}

// Set when the process's exit handlers have begun: the driver's come next, and after them nothing
// may be given back to it. The system takes it all.
std::atomic<bool> exiting{false};

void AtExit() {
  for (Device* device : Device::Opened()) {
    device->WaitAtExit();
    device->cache().SaveAtExit();
  }
  exiting.store(true);
}

}  // namespace

Device* Device::Get(int id) {
  Registry& registry = TheRegistry();
  if (id >= 0 && id < kMostDevices) {
    Device* device = registry.devices[id].load(std::memory_order_acquire);
    if (device != nullptr && !device->core_.lost()) return device;
  }
  const std::lock_guard<std::mutex> lock(registry.opening);
  Instance::Get().Chosen(id);  // throws where there is no such device
  if (id >= kMostDevices) {
    throw Failure(MXF_TARGET, "vulkan:", id, " is beyond the ", kMostDevices,
                  " devices that one process may use.");
  }
  Device* device = registry.devices[id].load(std::memory_order_acquire);
  if (device != nullptr && !device->GiveUp()) return device;
  // What is left of a lost one, all freed, is leaked: a thread may be about to ask it.
  device = new Device(id, device);
  registry.devices[id].store(device, std::memory_order_release);
  // Registered after the driver was loaded, and therefore called before its own exit handlers,
  // which take down what pending work still runs on.
  static const bool registered = std::atexit(&AtExit) == 0;
  (void)registered;
  return device;
}

std::vector<Device*> Device::Opened() {
  std::vector<Device*> opened;
  for (auto& each : TheRegistry().devices) {
    if (Device* device = each.load(std::memory_order_acquire)) opened.push_back(device);
  }
  return opened;
}

Device::Device(int id, const Device* before)
    : core_(Instance::Get().Chosen(id)),
      cache_(&core_),
      memory_(&core_),
      copier_(&core_, &memory_, &mutex_) {
  memory_.SetReclaim([this](bool recording) { Reclaim(recording); });
  memory_.SetForget([this](uint32_t resource) {
    for (const auto& stream : streams_) stream->hazards.Forget(resource);
  });
  if (before != nullptr) core_.settings = before->core_.settings;
  streams_.push_back(std::make_unique<Stream>(&core_, &memory_, &streams_));
}

bool Device::GiveUp() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!core_.lost() || memory_.live() != 0 || core_.guests != 0) return false;
  if (core_.handle == VK_NULL_HANDLE) return true;  // given up before, but the next did not open
  core_.Settle();
  for (const auto& each : pipelines_) {
    if (const std::shared_ptr<Pipelines> pipelines = each.lock()) pipelines->GiveUp();
  }
  copier_.GiveUp();
  for (const auto& stream : streams_) stream->GiveUp();
  memory_.GiveUp();
  cache_.GiveUp();
  core_.Destroy();
  return true;
}

void* Device::Allocate(uint64_t bytes, uint64_t alignment) {
  const std::lock_guard<std::mutex> lock(mutex_);
  core_.EnsureAlive();
  return reinterpret_cast<void*>(memory_.Allocate(bytes, alignment)->address);
}

Buffer* Device::AllocateHost(uint64_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  core_.EnsureAlive();
  return memory_.AllocateHost(bytes);
}

void Device::Free(void* address) noexcept {
  if (exiting.load(std::memory_order_relaxed)) return;
  // Called from destructors: there is nobody to hear of a failure.
  try {
    const std::lock_guard<std::mutex> lock(mutex_);
    memory_.Free(reinterpret_cast<uint64_t>(address));
  } catch (const std::exception&) {
  }
}

void Device::Reclaim(bool recording) {
  for (const auto& stream : streams_) {
    if (!recording) stream->Submit();
    stream->Wait(stream->submitted());
  }
  memory_.Collect();
}

Stream* Device::Known(void* handle) {
  if (handle == nullptr) return streams_.front().get();
  for (const auto& stream : streams_) {
    if (stream.get() == handle && stream->in_use) return stream.get();
  }
  throw Failure(MXF_INVALID, core_.Label(), " has no stream ", handle,
                "; it was freed, or belongs to another device.");
}

Stream* Device::StreamOf(void* handle) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return Known(handle);
}

void Device::Resolve(const Dispatch& dispatch, const PointerUse* pointers, size_t count) {
  accesses_.clear();
  buffers_.clear();
  for (size_t i = 0; i < count; ++i) {
    const PointerUse& pointer = pointers[i];
    // An optional argument that is not there, or a tensor without elements.
    if (pointer.address == 0 || pointer.bytes == 0) continue;
    Buffer* buffer = memory_.Find(pointer.address);
    if (buffer == nullptr) {
      throw Failure(MXF_INVALID, "Kernel ", *dispatch.name, " got the address ", pointer.address,
                    " for ", *pointer.name, ", where ", core_.Label(),
                    " has no tensor: it was freed, or lies on another device or the host.");
    }
    const uint64_t begin = pointer.address - buffer->address;
    const uint64_t left = buffer->size - begin;
    if (pointer.bytes > left && pointer.bytes != kToTheEnd) {
      throw Failure(MXF_INVALID, "Kernel ", *dispatch.name, " needs ", pointer.bytes, " bytes of ",
                    *pointer.name, ", but ", core_.Label(), " has ", left,
                    " there: the tensor is smaller than its shape says.");
    }
    const uint64_t end = begin + std::min(pointer.bytes, left);
    for (const bool write : {false, true}) {
      if (!(write ? pointer.write : pointer.read)) continue;
      accesses_.push_back({buffer->resource, write, begin, end});
      buffers_.push_back(buffer);
    }
  }
}

void Device::Launch(void* handle, const Dispatch& dispatch, const PointerUse* pointers,
                    size_t count) {
  const std::lock_guard<std::mutex> lock(mutex_);
  core_.EnsureAlive();
  Stream* stream = Known(handle);
  Resolve(dispatch, pointers, count);
  stream->Launch(dispatch, accesses_.data(), buffers_.data(), accesses_.size());
}

std::shared_ptr<Recording> Device::CreateRecording(void* handle) {
  const std::lock_guard<std::mutex> lock(mutex_);
  core_.EnsureAlive();
  return std::make_shared<Recording>(&core_, &memory_, Known(handle)->batch_limit());
}

void Device::Record(Recording* recording, const Dispatch& dispatch, const PointerUse* pointers,
                    size_t count) {
  const std::lock_guard<std::mutex> lock(mutex_);
  core_.EnsureAlive();
  Resolve(dispatch, pointers, count);
  recording->Add(dispatch, accesses_.data(), buffers_.data(), accesses_.size());
}

void Device::EndRecording(Recording* recording) {
  const std::lock_guard<std::mutex> lock(mutex_);
  recording->End();
}

bool Device::Replay(void* handle, const Recording& recording) {
  const std::lock_guard<std::mutex> lock(mutex_);
  core_.EnsureAlive();
  if (!recording.IsCurrent()) return false;
  Known(handle)->Replay(recording);
  return true;
}

Stream* Device::CreateStream() {
  const std::lock_guard<std::mutex> lock(mutex_);
  core_.EnsureAlive();
  for (const auto& stream : streams_) {
    if (stream->in_use) continue;
    stream->in_use = true;
    return stream.get();
  }
  streams_.push_back(std::make_unique<Stream>(&core_, &memory_, &streams_));
  return streams_.back().get();
}

size_t Device::stream_count() const {
  return static_cast<size_t>(std::count_if(streams_.begin(), streams_.end(),
                                           [](const auto& stream) { return stream->in_use; }));
}

void Device::FreeStream(void* handle) {
  std::unique_lock<std::mutex> lock(mutex_);
  Stream* stream = Known(handle);
  if (stream == streams_.front().get()) {
    throw Failure(MXF_INVALID, "The default stream of ", core_.Label(),
                  " lives as long as the device and cannot be freed.");
  }
  stream->in_use = false;
  // Its timeline only grows: what still names it finds its old values ended, and who gets it next
  // comes behind whatever another thread may still have recorded.
  if (!core_.lost()) stream->Wait(stream->Submit(), &lock);
  memory_.Collect();
}

uint64_t Device::Submit(void* handle) {
  const std::lock_guard<std::mutex> lock(mutex_);
  core_.EnsureAlive();
  return Known(handle)->Submit();
}

void Device::Wait(void* handle, uint64_t value) {
  std::unique_lock<std::mutex> lock(mutex_);
  Known(handle)->Wait(value, &lock);
  memory_.Collect();
}

void Device::Synchronize(std::initializer_list<void*> handles) {
  std::unique_lock<std::mutex> lock(mutex_);
  core_.EnsureAlive();
  // Found before the first wait, during which another thread may free them.
  std::vector<Stream*> streams;
  for (void* handle : handles) streams.push_back(Known(handle));
  for (Stream* stream : streams) stream->Wait(stream->Submit(), &lock);
  memory_.Collect();
}

void Device::SynchronizeFromTo(void* from, void* to) {
  const std::lock_guard<std::mutex> lock(mutex_);
  core_.EnsureAlive();
  Known(to)->RunAfter(Known(from));
}

std::shared_ptr<Pipelines> Device::Prepare(const std::vector<KernelInfo>* kernels) {
  std::unique_lock<std::mutex> lock(mutex_);
  core_.EnsureAlive();
  ++core_.guests;
  lock.unlock();  // compiling takes long
  std::shared_ptr<Pipelines> made;
  std::exception_ptr failure;
  try {
    made = std::make_shared<Pipelines>(&core_, &cache_, kernels);
  } catch (...) {
    failure = std::current_exception();
  }
  lock.lock();
  --core_.guests;
  if (failure) std::rethrow_exception(failure);
  const auto gone = [](const std::weak_ptr<Pipelines>& each) { return each.expired(); };
  pipelines_.erase(std::remove_if(pipelines_.begin(), pipelines_.end(), gone), pipelines_.end());
  pipelines_.push_back(made);
  return made;
}

void Device::Retire(std::shared_ptr<void> remains) noexcept {
  if (exiting.load(std::memory_order_relaxed)) {
    new std::shared_ptr<void>(std::move(remains));  // never let go of
    return;
  }
  try {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<Use> uses;
    for (const auto& stream : streams_) uses.push_back({stream.get(), stream->Latest(), 0});
    memory_.Bury(std::move(remains), std::move(uses));
  } catch (const std::exception&) {  // called from destructors: nobody could hear of it
  }
}

void Device::LogHazards(bool on) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (on) log_ = HazardLog();
  default_stream()->hazards.LogTo(on ? &log_ : nullptr);
}

std::string Device::HazardLogJson() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return log_.Json();
}

void Device::WaitAtExit() noexcept {
  // Another thread may hold the mutex and never let go: the process is ending under it.
  std::unique_lock<std::mutex> lock(mutex_, std::defer_lock);
  for (int attempt = 0; attempt < 100 && !lock.try_lock(); ++attempt) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  if (!lock.owns_lock()) return;
  for (const auto& stream : streams_) stream->WaitAtExit(kExitNanoseconds);
}

}  // namespace vulkan
}  // namespace mxforge
