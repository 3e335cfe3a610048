#include "cpu.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <new>
#include <utility>

#include "binding.h"
#include "error.h"
#include "machine.h"

namespace mxforge {
namespace core {
namespace {

constexpr int32_t kTensor = 7;  // tvm_ffi's type of a pointer to a tensor
constexpr int32_t kCpu = 1;     // DLPack's
constexpr size_t kAlignment = 64;  // of what a kernel asks for: its vectors

// Kernels call what follows on the threads of the pool that runs them.
thread_local Pool* current_pool = nullptr;
thread_local bool inside_task = false;
thread_local std::string raised;

struct Parallel {
  Pool::Task task;
  void* data;
};

int ParallelLaunch(Pool::Task task, void* data, int /* all of the pool */) {
  if (inside_task || current_pool == nullptr || current_pool->threads() == 1) {
    Pool::Group alone{nullptr, 1};
    return task(0, &alone, data);
  }
  Parallel parallel{task, data};
  return current_pool->Run(
      [](int index, Pool::Group* group, void* given) {
        const auto* of = static_cast<const Parallel*>(given);
        const bool outer = std::exchange(inside_task, true);
        const int result = of->task(index, group, of->data);
        inside_task = outer;
        return result;
      },
      &parallel);
}

/*! \brief A thread's memory for kernels: blocks are kept for the next who asks. */
class Scratch {
 public:
  void* Take(uint64_t bytes) {
    const auto fits = [bytes](const Block& block) { return !block.taken && block.size >= bytes; };
    auto found = std::find_if(blocks_.begin(), blocks_.end(), fits);
    if (found == blocks_.end()) {
      const size_t size = static_cast<size_t>(bytes);
      auto memory = std::unique_ptr<char[]>(new (std::nothrow) char[size + kAlignment]);
      if (memory == nullptr) return nullptr;
      blocks_.push_back({std::move(memory), size, false});
      found = blocks_.end() - 1;
    }
    found->taken = true;
    return found->Begin();
  }

  void GiveBack(const void* begin) {
    for (Block& block : blocks_) {
      if (block.Begin() == begin) block.taken = false;
    }
  }

 private:
  struct Block {
    std::unique_ptr<char[]> memory;
    size_t size;
    bool taken;

    void* Begin() const {
      const auto address = reinterpret_cast<uintptr_t>(memory.get());
      return memory.get() + (kAlignment - address % kAlignment) % kAlignment;
    }
  };
  std::vector<Block> blocks_;
};
thread_local Scratch scratch;

void* AllocWorkspace(int, int, uint64_t bytes, int, int) { return scratch.Take(bytes); }

int FreeWorkspace(int, int, void* begin) {
  scratch.GiveBack(begin);
  return 0;
}

void Raised(const char* kind, const char** parts, int32_t count) {
  raised = std::string(kind) + ": ";
  for (int32_t i = 0; i < count; ++i) {
    if (parts[i] != nullptr) raised += parts[i];
  }
}

}  // namespace

CpuKernels::CpuKernels(const std::string& path) : library_(path) {
  // Variables of the library that hold what its kernels call; those that none calls are missing.
  const std::pair<const char*, void*> slots[] = {
      {"__TVMBackendParallelLaunch", reinterpret_cast<void*>(&ParallelLaunch)},
      {"__TVMBackendAllocWorkspace", reinterpret_cast<void*>(&AllocWorkspace)},
      {"__TVMBackendFreeWorkspace", reinterpret_cast<void*>(&FreeWorkspace)},
      {"__mxforge_raised", reinterpret_cast<void*>(&Raised)},
  };
  // Of a library that others have open, too, kernels may be running: there all is in place.
  static std::mutex filling;
  const std::lock_guard<std::mutex> lock(filling);
  for (const auto& [name, function] : slots) {
    auto* slot = static_cast<void**>(library_.Find(name));
    if (slot != nullptr && *slot != function) *slot = function;
  }
}

Kernel CpuKernels::Find(const std::string& name) const {
  void* found = library_.Find("__tvm_ffi_" + name);
  if (found == nullptr) {
    throw Error(MXF_CORRUPT, "The library lacks the kernel " + name + "; copy it again.");
  }
  return reinterpret_cast<Kernel>(found);
}

namespace {

/*! \brief A function whose kernels' arguments are laid out once. */
class CpuFunction : public Runner {
 public:
  CpuFunction(const Function& function, const CpuKernels& kernels, Pool* pool, void* workspace,
              Device* device);

  const Function& function() const override { return binding_.function(); }
  void Set(size_t argument, void* address, const std::vector<int64_t>& shape) override {
    binding_.Set(argument, address, shape);
  }
  void Run() override;
  DeviceTensor Output(size_t output) const override { return binding_.Output(output); }

 private:
  struct Call {
    Kernel kernel;
    size_t first;  // of its arguments
    int32_t count;
  };

  Binding binding_;
  Pool* const pool_;
  std::vector<KernelTensor> tensors_;
  std::vector<KernelArgument> arguments_;
  std::vector<Call> calls_;
  uint64_t version_ = 0;  // of the binding, that tensors_ are from
};

CpuFunction::CpuFunction(const Function& function, const CpuKernels& kernels, Pool* pool,
                         void* workspace, Device* device)
    : binding_(function, workspace, device), pool_(pool), tensors_(function.tensors.size()) {
  for (uint32_t i = 0; i < tensors_.size(); ++i) {
    const std::vector<int64_t>& shape = binding_.shape(i);
    const Dtype& dtype = *function.tensors[i].dtype;
    tensors_[i] = {nullptr, kCpu, 0, static_cast<int32_t>(shape.size()), dtype.code, dtype.bits,
                   1, shape.data(), nullptr, 0};
  }
  for (const Step& step : function.steps) {
    if (step.launch.has_value() || step.when.has_value()) {
      throw Error(MXF_CORRUPT, "The launch plan is not for a CPU, but its library is.");
    }
    calls_.push_back(
        {kernels.Find(step.kernel), arguments_.size(), static_cast<int32_t>(step.arguments.size())});
    for (const Argument& argument : step.arguments) {
      if (argument.bits != 0) throw Error(MXF_CORRUPT, "A CPU's kernel takes tensors only.");
      arguments_.push_back({kTensor, 0, &tensors_[argument.index]});
    }
  }
}

void CpuFunction::Run() {
  binding_.Update();
  if (version_ != binding_.version()) {
    for (uint32_t i = 0; i < tensors_.size(); ++i) tensors_[i].data = binding_.address(i);
    version_ = binding_.version();
  }
  current_pool = pool_;
  for (const Call& call : calls_) {
    KernelArgument result{};
    if (call.kernel(nullptr, &arguments_[call.first], call.count, &result) != 0) {
      throw Error(MXF_FAILED, "A kernel of " + function().name + " failed: " + raised);
    }
  }
}

/*! \brief Memory of the host, which is its own. */
class HostBuffer : public Buffer {
 public:
  explicit HostBuffer(ZeroedMemory memory)
      : Buffer(memory.data(), memory.size()), memory_(std::move(memory)) {}

 private:
  ZeroedMemory memory_;
};

}  // namespace

CpuDevice::CpuDevice(const std::string& kernels, int threads) : kernels_(kernels), pool_(threads) {}

std::unique_ptr<Buffer> CpuDevice::Allocate(size_t bytes) {
  return std::make_unique<HostBuffer>(ZeroedMemory(bytes));
}

void CpuDevice::Copy(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }

std::unique_ptr<Runner> CpuDevice::Open(const Function& function, void* workspace) {
  return std::make_unique<CpuFunction>(function, kernels_, &pool_, workspace, this);
}

const DeviceKind kCpuKind = {
    "cpu",
    [](const DeviceOptions& options) -> std::unique_ptr<Device> {
      return std::make_unique<CpuDevice>(options.kernels, options.threads);
    },
    [](int) -> std::optional<uint64_t> { return AvailableMemory(); },
    []() -> std::string { return "[{\"cores\": " + std::to_string(UsableCores()) + "}]"; },
    [](int, const std::string& feature) { return HasCpuFeature(feature); },
};

}  // namespace core
}  // namespace mxforge
