// The C ABI: what happens inside becomes a status and a message here.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <utility>

#include "device.h"
#include "error.h"
#include "machine.h"
#include "model.h"
#include "mxforge.h"
#include "os.h"

namespace core = mxforge::core;

struct mxf_library {
  mxf_library(const core::DeviceKind& kind, const core::DeviceOptions& options, core::Plan read)
      : plan(std::move(read)),
        device(kind.open(options)),
        workspace(device->Allocate(static_cast<size_t>(plan.workspace))) {}

  core::Plan plan;
  std::unique_ptr<core::Device> device;
  std::unique_ptr<core::Buffer> workspace;
  std::map<std::string, std::unique_ptr<core::Runner>> functions;  // those that were called
  // Of the last call.
  core::Runner* called = nullptr;  // once it has run
  std::vector<core::DeviceTensor> outputs;
  std::vector<std::unique_ptr<core::Buffer>> arguments, results;
  std::unique_ptr<core::Buffer> copied, copy;  // by the last mxf_time_copies
  std::atomic<bool> busy{false};
};

struct mxf_model {
  mxf_model(const char* artifact, const mxf_options& options) : model(artifact, options) {}

  core::Model model;
  std::atomic<bool> busy{false};
};

namespace {

using core::Require;

constexpr int kMostThreads = 4096;
constexpr uintptr_t kAlignment = 64;  // that kernels expect of the host's memory

thread_local std::string last_error;
thread_local std::string described;  // devices

template <typename Body>
mxf_status Guarded(const Body& body) {
  try {
    body();
    return MXF_OK;
  } catch (const core::Error& error) {
    last_error = error.what();
    return error.status();
  } catch (const std::bad_alloc&) {
    last_error = "There is not enough memory.";
    return MXF_MEMORY;
  } catch (const std::exception& error) {
    last_error = error.what();
    return MXF_FAILED;
  }
}

/*! \brief Holds a library while one call runs. */
class Turn {
 public:
  explicit Turn(std::atomic<bool>* busy) : busy_(busy) {
    if (busy_->exchange(true)) {
      throw core::Error(MXF_BUSY, "Another thread is in a call; call from one at a time.");
    }
  }
  ~Turn() { *busy_ = false; }

 private:
  std::atomic<bool>* busy_;
};

core::Runner& Opened(mxf_library* library, const char* name) {
  std::unique_ptr<core::Runner>& opened = library->functions[name];
  if (opened != nullptr) return *opened;
  const auto known = library->plan.functions.find(name);
  if (known == library->plan.functions.end()) {
    throw core::Error(MXF_INVALID, std::string("The library has no function ") + name + ".");
  }
  opened = library->device->Open(known->second, library->workspace->address());
  return *opened;
}

/*! \brief Bytes of a tensor of this shape; Error (MXF_INVALID) where no memory has so many. */
size_t BytesOf(const core::Tensor& tensor, const std::vector<int64_t>& shape) {
  int64_t bytes = tensor.dtype->bits / 8;
  for (int64_t extent : shape) {
    Require(extent >= 0 && !__builtin_mul_overflow(bytes, extent, &bytes),
            "An argument has an impossible shape.");
  }
  return static_cast<size_t>(bytes);
}

/*! \brief Set the arguments of a call, on the device. */
void SetArguments(mxf_library* library, core::Runner* called, const mxf_array* given) {
  const core::Function& function = called->function();
  library->arguments.clear();
  for (size_t i = 0; i < function.arguments; ++i) {
    const size_t rank = function.tensors[i].shape.size();
    Require(given[i].ndim >= 0 && static_cast<size_t>(given[i].ndim) == rank &&
                (rank == 0 || given[i].shape != nullptr),
            "An argument has another number of dimensions.");
    const std::vector<int64_t> shape(given[i].shape, given[i].shape + given[i].ndim);
    void* address = given[i].data;
    const size_t bytes = BytesOf(function.tensors[i], shape);
    Require(address != nullptr || bytes == 0, "An argument has no data.");
    library->arguments.emplace_back();
    const bool aligned = reinterpret_cast<uintptr_t>(address) % kAlignment == 0;
    if (!library->device->reads_host_memory() || !aligned) {
      library->arguments.back() = library->device->Allocate(bytes);
      address = library->arguments.back()->address();
      library->device->Upload(address, given[i].data, bytes);
    }
    called->Set(i, address, shape);
  }
}

/*! \brief What the device has at an address, where the host reads it after a wait. */
void* Fetched(mxf_library* library, const void* from, size_t bytes) {
  library->results.push_back(library->device->AllocateHost(bytes));
  library->device->Download(library->results.back()->address(), from, bytes);
  return library->results.back()->address();
}

/*! \brief Take outputs, and caches, back to the host. */
void TakeResults(mxf_library* library, const core::Runner& called, const mxf_array* arguments,
                 mxf_array* outputs) {
  const core::Function& function = called.function();
  const bool here = library->device->reads_host_memory();
  library->results.clear();
  library->outputs.clear();
  std::vector<std::pair<size_t, const void*>> caches;  // arguments, and what became of them
  for (size_t i = 0; i < function.arguments; ++i) {
    const auto& copy = library->arguments[i];
    if (function.tensors[i].role != core::Role::kKv || copy == nullptr) continue;
    caches.emplace_back(i, Fetched(library, copy->address(), copy->size()));
  }
  for (size_t i = 0; i < function.outputs.size(); ++i) {
    library->outputs.push_back(called.Output(i));
    core::DeviceTensor& output = library->outputs.back();
    const core::Tensor& tensor = function.tensors[function.outputs[i]];
    if (!here) output.address = Fetched(library, output.address, BytesOf(tensor, output.shape));
  }
  library->device->Wait(library->device->Now());
  for (const auto& [i, data] : caches) {
    std::memcpy(arguments[i].data, data, library->arguments[i]->size());
  }
  for (size_t i = 0; i < library->outputs.size(); ++i) {
    const core::DeviceTensor& output = library->outputs[i];
    outputs[i] = {output.address, output.shape.data(), static_cast<int32_t>(output.shape.size())};
  }
}

/*! \brief Nanoseconds of the wall clock, from when it is made on. */
class Clock {
 public:
  int64_t Nanoseconds() const {
    using std::chrono::nanoseconds;
    return std::chrono::duration_cast<nanoseconds>(Steady::now() - began_).count();
  }

 private:
  using Steady = std::chrono::steady_clock;
  const Steady::time_point began_ = Steady::now();
};

/*! \brief A call of a model: checked for being there, and for being alone. */
template <typename Body>
mxf_status Call(mxf_model* model, const Body& body) {
  return Guarded([&] {
    Require(model != nullptr, "The model is missing.");
    const Turn turn(&model->busy);
    body(&model->model);
  });
}

}  // namespace

#ifndef MXFORGE_BUILD_ID
#define MXFORGE_BUILD_ID ""
#endif
const char* mxf_build_id(void) { return MXFORGE_BUILD_ID; }

const char* mxf_error(void) { return last_error.c_str(); }

mxf_status mxf_devices(const char* kind, const char** json) {
  return Guarded([&] {
    Require(kind != nullptr && json != nullptr, "The kind of the devices is missing.");
    described = core::FindDeviceKind(kind).describe();
    *json = described.c_str();
  });
}

mxf_status mxf_device_memory(const char* kind, int32_t device, int64_t* bytes) {
  return Guarded([&] {
    Require(kind != nullptr && bytes != nullptr && device >= 0, "The device is missing.");
    const std::optional<uint64_t> left = core::FindDeviceKind(kind).memory(device);
    constexpr auto most = static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
    *bytes = left.has_value() ? static_cast<int64_t>(std::min(*left, most)) : -1;
  });
}

mxf_status mxf_device_has(const char* kind, int32_t device, const char* feature, int32_t* has) {
  return Guarded([&] {
    Require(kind != nullptr && feature != nullptr && has != nullptr && device >= 0,
            "The device or the feature is missing.");
    *has = core::FindDeviceKind(kind).has(device, feature);
  });
}

mxf_status mxf_model_open(const char* artifact, const mxf_options* options, mxf_model** model) {
  return Guarded([&] {
    Require(model != nullptr, "There is no place for the model.");
    *model = nullptr;
    Require(artifact != nullptr, "A path is missing.");
    *model = new mxf_model(artifact, options != nullptr ? *options : mxf_options{});
  });
}

void mxf_model_close(mxf_model* model) { delete model; }

mxf_status mxf_model_get_info(mxf_model* model, mxf_model_info* info) {
  return Call(model, [&](core::Model* of) {
    Require(info != nullptr, "There is no place for what is asked.");
    const core::Manifest& manifest = of->manifest();
    const core::Settings& settings = of->settings();
    *info = {manifest.vocab_size,        settings.context,
             settings.max_batch,         settings.prefill_chunk,
             manifest.stop_token_ids.data(), static_cast<int32_t>(manifest.stop_token_ids.size()),
             of->runs_behind()};
  });
}

mxf_status mxf_sequence_create(mxf_model* model, const int32_t* tokens, int64_t count,
                               mxf_sequence* sequence, int64_t* reused) {
  return Call(model, [&](core::Model* of) {
    Require(sequence != nullptr && reused != nullptr, "There is no place for the sequence.");
    *sequence = of->Create(tokens, count, reused);
  });
}

mxf_status mxf_sequence_fork(mxf_model* model, mxf_sequence sequence, mxf_sequence* fork) {
  return Call(model, [&](core::Model* of) {
    Require(fork != nullptr, "There is no place for the sequence.");
    *fork = of->Fork(sequence);
  });
}

mxf_status mxf_sequence_keep(mxf_model* model, mxf_sequence sequence) {
  return Call(model, [&](core::Model* of) { of->Keep(sequence); });
}

mxf_status mxf_sequence_pretend(mxf_model* model, mxf_sequence sequence, const int32_t* tokens,
                                int64_t count) {
  return Call(model, [&](core::Model* of) { of->Pretend(sequence, tokens, count); });
}

mxf_status mxf_sequence_free(mxf_model* model, mxf_sequence sequence) {
  return Call(model, [&](core::Model* of) { of->Free(sequence); });
}

mxf_status mxf_step_submit(mxf_model* model, const mxf_part* parts, int32_t count) {
  return Call(model, [&](core::Model* of) { of->Submit(parts, count); });
}

mxf_status mxf_model_wait(mxf_model* model) {
  return Call(model, [](core::Model* of) { of->WaitForDevice(); });
}

mxf_status mxf_step_wait(mxf_model* model, mxf_result* results) {
  return Call(model, [&](core::Model* of) { of->Wait(results); });
}

mxf_status mxf_library_open(const char* kind, int32_t device, const char* plan,
                            const char* kernels, int32_t threads, mxf_library** library) {
  return Guarded([&] {
    Require(library != nullptr, "There is no place for the library.");
    *library = nullptr;
    Require(kind != nullptr && plan != nullptr && kernels != nullptr, "A path is missing.");
    Require(device >= 0, "device should be 0 or more.");
    Require(threads >= 0 && threads <= kMostThreads, "threads should be from 0 to 4096.");
    const core::MappedFile file(plan);
    *library = new mxf_library(core::FindDeviceKind(kind),
                               {kernels, device, threads != 0 ? threads : core::UsableCores(), ""},
                               core::ReadPlan(file.data(), file.size()));
  });
}

void mxf_library_close(mxf_library* library) { delete library; }

mxf_status mxf_call(mxf_library* library, const char* function, const mxf_array* arguments,
                    int32_t count, mxf_array* outputs, int32_t output_count) {
  return Guarded([&] {
    Require(library != nullptr && function != nullptr, "The library or the function is missing.");
    const Turn turn(&library->busy);
    core::Runner& called = Opened(library, function);
    const core::Function& known = called.function();
    Require(count >= 0 && static_cast<size_t>(count) == known.arguments,
            "The function has another number of arguments.");
    Require(output_count >= 0 && static_cast<size_t>(output_count) == known.outputs.size(),
            "The function has another number of outputs.");
    Require((count == 0 || arguments != nullptr) && (output_count == 0 || outputs != nullptr),
            "The arguments or the outputs are missing.");
    library->called = nullptr;
    SetArguments(library, &called, arguments);
    called.Run();
    TakeResults(library, called, arguments, outputs);
    library->called = &called;
  });
}

mxf_status mxf_repeat(mxf_library* library, int32_t runs, int64_t* issued, int64_t* done) {
  return Guarded([&] {
    Require(library != nullptr && issued != nullptr && done != nullptr, "The library is missing.");
    Require(runs >= 0, "runs should be 0 or more.");
    const Turn turn(&library->busy);
    Require(library->called != nullptr, "The last call should have succeeded; call a function.");
    const Clock clock;
    for (int32_t run = 0; run < runs; ++run) library->called->Run();
    *issued = clock.Nanoseconds();
    library->device->Wait(library->device->Now());
    *done = clock.Nanoseconds();
  });
}

mxf_status mxf_time_copies(mxf_library* library, int64_t bytes, int32_t runs,
                           int64_t* nanoseconds) {
  return Guarded([&] {
    Require(library != nullptr && nanoseconds != nullptr, "The library is missing.");
    Require(bytes > 0 && runs >= 0, "There should be bytes to copy, and runs should be 0 or more.");
    const Turn turn(&library->busy);
    core::Device& device = *library->device;
    const auto size = static_cast<size_t>(bytes);
    const auto copy = [&] {
      device.Copy(library->copy->address(), library->copied->address(), size);
    };
    if (library->copy == nullptr || library->copy->size() != size) {
      library->copied = device.Allocate(size);
      library->copy = device.Allocate(size);
      // A system gives memory when it is written to, and one page of zeros to all who read first.
      device.Copy(library->copied->address(), library->copy->address(), size);
      copy();
    }
    device.Wait(device.Now());
    const Clock clock;
    for (int32_t run = 0; run < runs; ++run) copy();
    device.Wait(device.Now());
    *nanoseconds = clock.Nanoseconds();
  });
}
