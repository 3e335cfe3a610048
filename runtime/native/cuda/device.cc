#include "device.h"

#include <algorithm>
#include <cstring>

#include "../core/json.h"
#include "../core/os.h"
#include "function.h"

namespace mxforge {
namespace cuda {
namespace {

constexpr size_t kChunkBytes = size_t{8} << 20;
constexpr size_t kAlignment = 256;       // of what lies in a chunk
constexpr int64_t kAnyShared = 48 << 10;  // dynamic, that each kernel may have
constexpr int kOldest = 80;  // what the target `cuda` has code for: sm_80 and all later ones
constexpr int kNameBytes = 256;
constexpr uint32_t kFatbin = 0xBA55ED50;  // what nvcc's output begins with

Address AddressOf(const void* memory) { return reinterpret_cast<Address>(memory); }

/*! \brief 90 of sm_90 and of sm_90a. */
int Number(const std::string& arch) { return std::atoi(arch.c_str() + std::strlen("sm_")); }

/*! \brief Error (MXF_CORRUPT) unless a file is as long as its beginning says, which the driver
 * trusts. */
void CheckLength(const core::MappedFile& file) {
  struct {
    uint32_t magic;
    uint16_t version, header;
    uint64_t code;  // bytes after the header
  } begin{};
  if (file.size() >= sizeof(begin)) std::memcpy(&begin, file.data(), sizeof(begin));
  if (begin.magic != kFatbin || begin.header > file.size() ||
      begin.code > file.size() - begin.header) {
    throw core::Error(MXF_CORRUPT, "The library's code for the GPU is cut off; copy it again.");
  }
}

class DeviceBuffer : public core::Buffer {
 public:
  DeviceBuffer(CudaDevice* device, void* memory, size_t bytes)
      : Buffer(memory, bytes), device_(device) {}
  ~DeviceBuffer() override { device_->Free(address()); }

 private:
  CudaDevice* const device_;
};

class HostBuffer : public core::Buffer {
 public:
  HostBuffer(CudaDevice* device, void* memory, size_t bytes)
      : Buffer(memory, bytes), device_(device) {}
  ~HostBuffer() override { device_->FreeHost(address()); }

 private:
  CudaDevice* const device_;
};

}  // namespace

CudaDevice::Turn::Turn(CudaDevice* device) : device_(device) {
  if (device->lost_.has_value()) throw *device->lost_;
  device->Check(device->driver_.cuCtxPushCurrent_v2(device->context_), "cuCtxPushCurrent");
}

CudaDevice::Turn::~Turn() {
  Context own = nullptr;
  device_->driver_.cuCtxPopCurrent_v2(&own);
}

void CudaDevice::Check(Result result, const char* call) {
  if (result == kSuccess) return;
  const core::Error error = driver_.Failure(result, call);
  if (error.status() == MXF_LOST) lost_ = error;
  throw error;
}

CudaDevice::CudaDevice(const core::DeviceOptions& options) : driver_(Driver::Get()) {
  try {
    Start(options);
  } catch (...) {
    Close();
    throw;
  }
}

void CudaDevice::Start(const core::DeviceOptions& options) {
  int count = 0;
  if (driver_.cuDeviceGetCount(&count) != kSuccess || count == 0) {
    throw core::Error(MXF_TARGET, "NVIDIA's driver finds no device.");
  }
  if (options.index < 0 || options.index >= count) {
    throw core::Error(MXF_TARGET, "The artifact is to run on CUDA device " +
                                      std::to_string(options.index) + ", but there are " +
                                      std::to_string(count) +
                                      " here, counted from 0; choose one of these.");
  }
  Check(driver_.cuDeviceGet(&ordinal_, options.index), "cuDeviceGet");
  char name[kNameBytes] = {};
  Check(driver_.cuDeviceGetName(name, kNameBytes, ordinal_), "cuDeviceGetName");
  name_ = name;
  CheckArchitecture(options.target);
  int pools = 0;
  Check(driver_.cuDeviceGetAttribute(&most_shared_, kMostShared, ordinal_),
        "cuDeviceGetAttribute");
  Check(driver_.cuDeviceGetAttribute(&pools, kMemoryPools, ordinal_), "cuDeviceGetAttribute");
  frees_in_order_ = pools != 0;
  Check(driver_.cuDevicePrimaryCtxRetain(&context_, ordinal_), "cuDevicePrimaryCtxRetain");
  const Turn turn(this);
  Check(driver_.cuStreamCreate(&stream_, kNonBlocking), "cuStreamCreate");
  const core::MappedFile code(options.kernels);
  CheckLength(code);
  Check(driver_.cuModuleLoadData(&module_, code.data()), "cuModuleLoadData");
}

void CudaDevice::CheckArchitecture(const std::string& target) {
  if (target.empty()) return;  // nobody says: the driver refuses what it cannot run
  const size_t colon = target.find(':');
  const std::string needed =
      colon == std::string::npos ? "sm_" + std::to_string(kOldest) : target.substr(colon + 1);
  int major = 0, minor = 0;
  Check(driver_.cuDeviceGetAttribute(&major, kCapabilityMajor, ordinal_), "cuDeviceGetAttribute");
  Check(driver_.cuDeviceGetAttribute(&minor, kCapabilityMinor, ordinal_), "cuDeviceGetAttribute");
  const std::string arch = "sm_" + std::to_string(major) + std::to_string(minor);
  const bool alone = needed.back() == 'a';  // such code runs on that architecture only
  const int least = Number(needed), has = Number(arch);
  if (alone ? has == least : has >= least) return;
  throw core::Error(MXF_TARGET, "The artifact's code is for GPUs of " + needed + " and " +
                                    (alone ? "no others" : "later ones") + ", but " + name_ +
                                    " is of " + arch + "; compile the model for cuda:" + arch +
                                    ".");
}

CudaDevice::~CudaDevice() { Close(); }

void CudaDevice::Close() {
  if (context_ == nullptr) return;
  // What fails here has failed before, or there is nobody to be told.
  driver_.cuCtxPushCurrent_v2(context_);
  if (stream_ != nullptr) driver_.cuStreamSynchronize(stream_);
  for (const auto& [mark, event] : marks_) events_.push_back(event);
  for (const Chunk& chunk : chunks_) {
    if (chunk.copied != nullptr) events_.push_back(chunk.copied);
    if (chunk.memory != nullptr) driver_.cuMemFreeHost(chunk.memory);
  }
  for (Event event : events_) driver_.cuEventDestroy_v2(event);
  if (module_ != nullptr) driver_.cuModuleUnload(module_);
  if (stream_ != nullptr) driver_.cuStreamDestroy_v2(stream_);
  Context own = nullptr;
  driver_.cuCtxPopCurrent_v2(&own);
  driver_.cuDevicePrimaryCtxRelease_v2(ordinal_);
}

std::unique_ptr<core::Buffer> CudaDevice::Allocate(size_t bytes) {
  const Turn turn(this);
  Address address = 0;
  const size_t asked = std::max<size_t>(bytes, 1);  // the driver has no memory of 0 bytes
  Result result = driver_.cuMemAlloc_v2(&address, asked);
  if (result == kOutOfMemory) {  // what was freed in order may not be free yet
    Check(driver_.cuStreamSynchronize(stream_), "cuStreamSynchronize");
    result = driver_.cuMemAlloc_v2(&address, asked);
  }
  Check(result, "cuMemAlloc");
  return std::make_unique<DeviceBuffer>(this, reinterpret_cast<void*>(address), bytes);
}

std::unique_ptr<core::Buffer> CudaDevice::AllocateHost(size_t bytes) {
  const Turn turn(this);
  void* memory = nullptr;
  Check(driver_.cuMemHostAlloc(&memory, std::max<size_t>(bytes, 1), 0), "cuMemHostAlloc");
  return std::make_unique<HostBuffer>(this, memory, bytes);
}

void CudaDevice::Free(void* memory) {
  try {
    const Turn turn(this);
    if (frees_in_order_) {
      Check(driver_.cuMemFreeAsync(AddressOf(memory), stream_), "cuMemFreeAsync");
    } else {
      Check(driver_.cuStreamSynchronize(stream_), "cuStreamSynchronize");
      Check(driver_.cuMemFree_v2(AddressOf(memory)), "cuMemFree");
    }
  } catch (const core::Error&) {
    // Lost: its memory is gone with it. Else the next call fails too, and says so.
  }
}

void CudaDevice::FreeHost(void* memory) {
  try {
    const Turn turn(this);
    Check(driver_.cuStreamSynchronize(stream_), "cuStreamSynchronize");
    Check(driver_.cuMemFreeHost(memory), "cuMemFreeHost");
  } catch (const core::Error&) {
    // As in Free.
  }
}

Event CudaDevice::NewEvent() {
  Event event = nullptr;
  Check(driver_.cuEventCreate(&event, kWithoutTiming), "cuEventCreate");
  return event;
}

CudaDevice::Chunk* CudaDevice::ChunkWithRoom() {
  if (used_ >= kChunkBytes) {
    Check(driver_.cuEventRecord(chunks_[chunk_].copied, stream_), "cuEventRecord");
    chunk_ = (chunk_ + 1) % chunks_.size();
    used_ = 0;
    // The device works on the other chunks while the host waits for, and then fills, this one.
    if (chunks_[chunk_].memory != nullptr) {
      Check(driver_.cuEventSynchronize(chunks_[chunk_].copied), "cuEventSynchronize");
    }
  }
  Chunk* chunk = &chunks_[chunk_];
  if (chunk->copied == nullptr) chunk->copied = NewEvent();
  if (chunk->memory == nullptr) {
    void* memory = nullptr;
    Check(driver_.cuMemHostAlloc(&memory, kChunkBytes, 0), "cuMemHostAlloc");
    chunk->memory = static_cast<char*>(memory);
  }
  return chunk;
}

void CudaDevice::Upload(void* to, const void* from, size_t bytes) {
  const Turn turn(this);
  Address target = AddressOf(to);
  const auto* source = static_cast<const char*>(from);
  while (bytes != 0) {
    const Chunk* chunk = ChunkWithRoom();
    const size_t part = std::min(bytes, kChunkBytes - used_);
    std::memcpy(chunk->memory + used_, source, part);
    Check(driver_.cuMemcpyHtoDAsync_v2(target, chunk->memory + used_, part, stream_),
          "cuMemcpyHtoDAsync");
    used_ += (part + kAlignment - 1) / kAlignment * kAlignment;
    target += part;
    source += part;
    bytes -= part;
  }
}

void CudaDevice::Copy(void* to, const void* from, size_t bytes) {
  if (bytes == 0) return;
  const Turn turn(this);
  Check(driver_.cuMemcpyDtoDAsync_v2(AddressOf(to), AddressOf(from), bytes, stream_),
        "cuMemcpyDtoDAsync");
}

void CudaDevice::Download(void* to, const void* from, size_t bytes) {
  if (bytes == 0) return;
  const Turn turn(this);
  Check(driver_.cuMemcpyDtoHAsync_v2(to, AddressOf(from), bytes, stream_), "cuMemcpyDtoHAsync");
}

core::Mark CudaDevice::Now() {
  const Turn turn(this);
  if (events_.empty()) events_.push_back(NewEvent());
  Check(driver_.cuEventRecord(events_.back(), stream_), "cuEventRecord");
  marks_.emplace_back(++last_, events_.back());
  events_.pop_back();
  return last_;
}

void CudaDevice::Wait(core::Mark mark) {
  const Turn turn(this);
  const auto later = [mark](const auto& each) { return each.first > mark; };
  const auto end = std::find_if(marks_.begin(), marks_.end(), later);
  if (end == marks_.begin()) return;  // awaited before
  Check(driver_.cuEventSynchronize((end - 1)->second), "cuEventSynchronize");
  for (auto each = marks_.begin(); each != end; ++each) events_.push_back(each->second);
  marks_.erase(marks_.begin(), end);
}

LoadedKernel* CudaDevice::Find(const std::string& name) {
  const auto known = kernels_.find(name);
  if (known != kernels_.end()) return &known->second;
  LoadedKernel kernel{nullptr, kAnyShared};
  const Result result = driver_.cuModuleGetFunction(&kernel.handle, module_, name.c_str());
  if (result != kSuccess && driver_.Failure(result, "").status() == MXF_CORRUPT) {
    throw core::Error(MXF_CORRUPT, "The library lacks the kernel " + name + "; copy it again.");
  }
  Check(result, "cuModuleGetFunction");
  return &kernels_.emplace(name, kernel).first->second;
}

void CudaDevice::Permit(const std::string& name, LoadedKernel* kernel, int64_t bytes) {
  if (bytes <= kernel->shared) return;
  if (bytes > most_shared_) {
    throw core::Error(MXF_TARGET, "The kernel " + name + " needs " + std::to_string(bytes) +
                                      " bytes of shared memory, but " + name_ + " has " +
                                      std::to_string(most_shared_) +
                                      "; compile the model for this GPU.");
  }
  Check(driver_.cuFuncSetAttribute(kernel->handle, kDynamicShared, static_cast<int>(bytes)),
        "cuFuncSetAttribute");
  kernel->shared = bytes;
}

std::unique_ptr<core::Runner> CudaDevice::Open(const core::Function& function, void* workspace) {
  const Turn turn(this);
  return std::make_unique<CudaFunction>(function, workspace, this);
}

namespace {

std::optional<uint64_t> FreeMemory(int index) {
  try {
    const Driver& driver = Driver::Get();
    Ordinal ordinal = 0;
    Context context = nullptr, own = nullptr;
    if (driver.cuDeviceGet(&ordinal, index) != kSuccess ||
        driver.cuDevicePrimaryCtxRetain(&context, ordinal) != kSuccess) {
      return std::nullopt;
    }
    size_t left = 0, all = 0;
    bool known = driver.cuCtxPushCurrent_v2(context) == kSuccess;
    if (known) {
      known = driver.cuMemGetInfo_v2(&left, &all) == kSuccess;
      driver.cuCtxPopCurrent_v2(&own);
    }
    driver.cuDevicePrimaryCtxRelease_v2(ordinal);
    return known ? std::optional<uint64_t>(left) : std::nullopt;
  } catch (const core::Error&) {
    return std::nullopt;  // there is no driver
  }
}

std::string Describe() {
  const Driver& driver = Driver::Get();
  int count = 0;
  driver.cuDeviceGetCount(&count);
  std::string devices;
  for (int index = 0; index < count; ++index) {
    Ordinal ordinal = 0;
    char name[kNameBytes] = "";
    size_t bytes = 0;
    int major = 0, minor = 0;
    if (driver.cuDeviceGet(&ordinal, index) != kSuccess) continue;
    driver.cuDeviceGetName(name, kNameBytes, ordinal);
    driver.cuDeviceTotalMem_v2(&bytes, ordinal);
    driver.cuDeviceGetAttribute(&major, kCapabilityMajor, ordinal);
    driver.cuDeviceGetAttribute(&minor, kCapabilityMinor, ordinal);
    devices += (devices.empty() ? "" : ", ") + ("{\"name\": " + core::Quoted(name)) +
               ", \"memory_bytes\": " + std::to_string(bytes) + ", \"arch\": \"sm_" +
               std::to_string(major) + std::to_string(minor) + "\"}";
  }
  return "[" + devices + "]";
}

}  // namespace

const core::DeviceKind kCudaKind = {
    "cuda",
    [](const core::DeviceOptions& options) -> std::unique_ptr<core::Device> {
      return std::make_unique<CudaDevice>(options);
    },
    FreeMemory,
    Describe,
    [](int, const std::string&) { return false; },
};

}  // namespace cuda
}  // namespace mxforge
