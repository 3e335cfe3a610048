#include "device.h"

#include <algorithm>
#include <charconv>
#include <exception>
#include <unordered_map>
#include <utility>

#include "../../core/binding.h"
#include "../../core/os.h"
#include "../describe.h"
#include "../device.h"
#include "../launch.h"

namespace mxforge {
namespace vulkan {
namespace {

constexpr size_t kMostKept = 8;  // arguments of a function; sizes and inputs alternate

void* Pointer(uint64_t address) { return reinterpret_cast<void*>(address); }

uint64_t Address(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

/*! \brief "mxforge.vulkan.multiplies PRODUCT SIZE": a product of matrices, for subgroups of a size. */
bool HasFeature(const PhysicalDevice& device, const std::string& feature) {
  const std::string prefix = "mxforge.vulkan.multiplies ";
  const size_t space = feature.rfind(' ');
  if (feature.compare(0, prefix.size(), prefix) != 0 || space < prefix.size()) return false;
  const char* const end = feature.data() + feature.size();
  uint32_t size = 0;
  const auto [rest, failure] = std::from_chars(feature.data() + space + 1, end, size);
  return failure == std::errc() && rest == end &&
         device.Multiplies(feature.substr(prefix.size(), space - prefix.size()), size);
}

std::vector<KernelInfo> ReadKernels(const std::string& path) {
  const core::MappedFile file(path);
  return ParseModule({static_cast<const char*>(file.data()), file.size()});
}

/*! \brief Memory of a device, or, with another address, of the host. */
class PlanBuffer final : public core::Buffer {
 public:
  PlanBuffer(Device* device, uint64_t on_device, void* address, size_t size)
      : Buffer(address, size), device_(device), on_device_(on_device) {}
  ~PlanBuffer() override { device_->Free(Pointer(on_device_)); }
 private:
  Device* device_;
  uint64_t on_device_;
};

/*! \brief The kernels of a library, on a device. */
class Kernels {
 public:
  Kernels(Device* device, const std::string& path)
      : device_(device), kernels_(ReadKernels(path)), pipelines_(device->Prepare(&kernels_)) {
    for (size_t i = 0; i < kernels_.size(); ++i) by_name_[kernels_[i].name] = i;
  }
  ~Kernels() { device_->Retire(std::move(pipelines_)); }
  Kernels(const Kernels&) = delete;
  Kernels& operator=(const Kernels&) = delete;

  /*! \brief Which one a step launches. Error (MXF_CORRUPT) where there is none that fits. */
  size_t Find(const core::Step& step) const;
  const KernelInfo& operator[](size_t kernel) const { return kernels_[kernel]; }
  Pipelines& pipelines() const { return *pipelines_; }

 private:
  Device* const device_;
  const std::vector<KernelInfo> kernels_;
  std::shared_ptr<Pipelines> pipelines_;
  std::unordered_map<std::string, size_t> by_name_;
};

size_t Kernels::Find(const core::Step& step) const {
  const auto found = by_name_.find(step.kernel);
  bool fits = found != by_name_.end() && step.launch.has_value();
  if (fits) {
    const std::vector<ArgumentInfo>& takes = kernels_[found->second].arguments;
    fits = takes.size() == step.arguments.size();
    for (size_t i = 0; fits && i < takes.size(); ++i) {
      const uint32_t bits = step.arguments[i].bits;
      const bool integer = takes[i].type != ScalarType::kFloat16 &&
                           takes[i].type != ScalarType::kFloat32 &&
                           takes[i].type != ScalarType::kFloat64;
      fits = takes[i].pointer ? bits == 0 : integer && bits == 8 * BytesOf(takes[i].type);
    }
  }
  if (fits) return found->second;
  throw Failure(MXF_CORRUPT, "The library lacks the kernel ", step.kernel,
                " that its launch plan names; copy it again.");
}

/*!
 * \brief A function of a plan.
 *
 * Its kernels are launched one by one the first time that it has certain arguments. The second time
 * they are recorded, and from then on the recording is submitted: a token's launches are the same
 * until its sequence needs another page.
 */
class PlanRunner final : public core::Runner {
 public:
  PlanRunner(const core::Function& function, void* workspace, core::Device* allocator,
             Device* device, Stream* stream, const Kernels& kernels);
  ~PlanRunner() override {
    for (Kept& each : kept_) Drop(&each);
  }

  const core::Function& function() const override { return binding_.function(); }
  void Set(size_t argument, void* address, const std::vector<int64_t>& shape) override {
    binding_.Set(argument, address, shape);
  }
  void Run() override;
  core::DeviceTensor Output(size_t output) const override { return binding_.Output(output); }

 private:
  /*! \brief What the function was called with, and, once that has come again, its launches. */
  struct Kept {
    std::vector<int64_t> values;
    std::vector<void*> addresses;
    std::shared_ptr<Recording> recording;
    uint64_t last = 0;  // which run
    bool seen = false;
  };

  core::Binding binding_;
  Device* const device_;
  Stream* const stream_;
  const Kernels& kernels_;
  std::vector<size_t> steps_;  // their kernels
  std::vector<Kept> kept_;
  size_t current_ = 0;    // of these, for this version of the binding
  uint64_t version_ = 0;  // that was run last
  uint64_t runs_ = 0;
  std::vector<uint8_t> block_;        // the arguments of a launch
  std::vector<PointerUse> pointers_;  // those of them that are tensors

  bool Extended(const core::Step& step, Extents* groups, Extents* block) const;
  /*! \brief Launch all kernels, or add them to a recording. */
  void LaunchAll(Recording* recording);
  void Launch(const core::Step& step, size_t index, Recording* recording);
  size_t Find();
  void Drop(Kept* kept);
  uint64_t BytesOf(uint32_t tensor) const;
};

PlanRunner::PlanRunner(const core::Function& function, void* workspace, core::Device* allocator,
                       Device* device, Stream* stream, const Kernels& kernels)
    : binding_(function, workspace, allocator,
               [device](const std::string& feature) {
                 return HasFeature(device->core().physical, feature);
               }),
      device_(device),
      stream_(stream),
      kernels_(kernels) {
  for (const core::Step& step : function.steps) steps_.push_back(kernels.Find(step));
}

void PlanRunner::Run() {
  binding_.Update();
  if (version_ != binding_.version()) current_ = Find();
  version_ = binding_.version();
  Kept& kept = kept_[current_];
  kept.last = ++runs_;
  if (kept.recording != nullptr && device_->Replay(stream_, *kept.recording)) return;
  Drop(&kept);
  if (!kept.seen || device_->core().profiling) {
    LaunchAll(nullptr);
    kept.seen = true;
    return;
  }
  kept.recording = device_->CreateRecording(stream_);
  try {
    LaunchAll(kept.recording.get());
    device_->EndRecording(kept.recording.get());
  } catch (...) {
    Drop(&kept);
    throw;
  }
  // Another thread may have freed a tensor of its own meanwhile.
  if (!device_->Replay(stream_, *kept.recording)) LaunchAll(nullptr);
}

/*! \brief The place of what is kept for the present arguments, the oldest one's if there was none. */
size_t PlanRunner::Find() {
  std::vector<int64_t> values(function().values.size());
  for (uint32_t i = 0; i < values.size(); ++i) values[i] = binding_.value(i);
  std::vector<void*> addresses(function().tensors.size());
  for (uint32_t i = 0; i < addresses.size(); ++i) addresses[i] = binding_.address(i);
  for (size_t i = 0; i < kept_.size(); ++i) {
    if (kept_[i].values == values && kept_[i].addresses == addresses) return i;
  }
  if (kept_.size() < kMostKept) kept_.emplace_back();
  const auto oldest = std::min_element(
      kept_.begin(), kept_.end(), [](const Kept& a, const Kept& b) { return a.last < b.last; });
  Drop(&*oldest);
  *oldest = {std::move(values), std::move(addresses), nullptr, 0, false};
  return static_cast<size_t>(oldest - kept_.begin());
}

void PlanRunner::Drop(Kept* kept) {
  if (kept->recording != nullptr) device_->Retire(std::move(kept->recording));
  kept->recording = nullptr;
}

void PlanRunner::LaunchAll(Recording* recording) {
  for (size_t i = 0; i < steps_.size(); ++i) Launch(function().steps[i], steps_[i], recording);
}

/*! \brief What a step is launched over; false where that is nothing. */
bool PlanRunner::Extended(const core::Step& step, Extents* groups, Extents* block) const {
  if (step.when.has_value() && binding_.value(*step.when) == 0) return false;
  for (size_t axis = 0; axis < groups->size(); ++axis) {
    (*groups)[axis] = binding_.value(step.launch->grid[axis]);
    (*block)[axis] = binding_.value(step.launch->block[axis]);
    if ((*groups)[axis] == 0 || (*block)[axis] == 0) return false;
  }
  return true;
}

void PlanRunner::Launch(const core::Step& step, size_t index, Recording* recording) {
  Extents groups, block;
  if (!Extended(step, &groups, &block)) return;
  const KernelInfo& kernel = kernels_[index];
  Dispatch dispatch;
  const Pipelines::LocalSize size =
      CheckExtents(device_->core(), kernel, groups, block, &dispatch);
  dispatch.pipeline = kernels_.pipelines().Get(index, size);
  dispatch.layout = kernels_.pipelines().layout(index);
  dispatch.name = kernels_.pipelines().name(index);
  block_.assign(kernel.argument_bytes, 0);
  pointers_.clear();
  for (size_t i = 0; i < kernel.arguments.size(); ++i) {
    const ArgumentInfo& argument = kernel.arguments[i];
    const uint32_t given = step.arguments[i].index;
    if (argument.pointer) {
      const uint64_t address = Address(binding_.address(given));
      WriteAddress(kernel, argument, address, block_.data());
      pointers_.push_back(
          {address, BytesOf(given), argument.read, argument.write, &argument.name});
    } else {
      WriteInteger(argument, binding_.value(given), block_.data());
    }
  }
  dispatch.block = block_.data();
  dispatch.block_bytes = kernel.argument_bytes;
  dispatch.argument_buffer = kernel.argument_buffer;
  if (recording == nullptr) {
    device_->Launch(stream_, dispatch, pointers_.data(), pointers_.size());
  } else {
    device_->Record(recording, dispatch, pointers_.data(), pointers_.size());
  }
}

uint64_t PlanRunner::BytesOf(uint32_t tensor) const {
  const core::Tensor& described = function().tensors[tensor];
  uint64_t bytes = described.dtype->bits / 8;
  for (const int64_t extent : binding_.shape(tensor)) {
    if (__builtin_mul_overflow(bytes, static_cast<uint64_t>(extent), &bytes)) {
      throw Failure(MXF_INVALID, described.name, " of ", function().name, " is too large.");
    }
  }
  return bytes;
}

/*! \brief A stream of a device that others in the process may use, too. */
class PlanDevice final : public core::Device {
 public:
  PlanDevice(const std::string& kernels, int index)
      : device_(vulkan::Device::Get(index)),
        kernels_(std::make_unique<Kernels>(device_, kernels)),
        stream_(device_->CreateStream()) {}
  ~PlanDevice() override {
    kernels_.reset();  // first, for the stream's end is waited for
    try {
      device_->FreeStream(stream_);
    } catch (const std::exception&) {  // lost: whoever uses it next hears of it
    }
  }

  bool reads_host_memory() const override { return false; }

  std::unique_ptr<core::Buffer> Allocate(size_t bytes) override {
    void* address = device_->Allocate(bytes, 0);
    return std::make_unique<PlanBuffer>(device_, Address(address), address, bytes);
  }

  std::unique_ptr<core::Buffer> AllocateHost(size_t bytes) override {
    const vulkan::Buffer* memory = device_->AllocateHost(bytes);
    return std::make_unique<PlanBuffer>(device_, memory->address, memory->mapped, bytes);
  }

  void Upload(void* to, const void* from, size_t bytes) override {
    device_->copier().Upload(stream_, static_cast<const uint8_t*>(from), Address(to), bytes);
  }

  void Copy(void* to, const void* from, size_t bytes) override {
    device_->copier().Within(stream_, Address(from), Address(to), bytes);
  }

  void Download(void* to, const void* from, size_t bytes) override {
    device_->copier().Fetch(stream_, Address(from), static_cast<uint8_t*>(to), bytes);
  }

  core::Mark Now() override { return device_->Submit(stream_); }

  void Wait(core::Mark mark) override { device_->Wait(stream_, mark); }

  std::unique_ptr<core::Runner> Open(const core::Function& function, void* workspace) override {
    return std::make_unique<PlanRunner>(function, workspace, this, device_, stream_, *kernels_);
  }

 private:
  vulkan::Device* const device_;
  std::unique_ptr<Kernels> kernels_;
  Stream* const stream_;
};

std::unique_ptr<core::Device> Open(const core::DeviceOptions& options) {
  return std::make_unique<PlanDevice>(options.kernels, options.index);
}

std::optional<uint64_t> MemoryLeft(int index) {
  const Instance& instance = Instance::Get();
  return instance.AvailableBytes(instance.Chosen(index));
}

}  // namespace

const core::DeviceKind kVulkanKind = {
    "vulkan",
    &Open,
    &MemoryLeft,
    &DescribeDevices,
    [](int index, const std::string& feature) {
      return HasFeature(Instance::Get().Chosen(index), feature);
    },
};

}  // namespace vulkan
}  // namespace mxforge
