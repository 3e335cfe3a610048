#include "driver.h"

#include <string>

#include "../core/os.h"

namespace mxforge {
namespace cuda {
namespace {

#if defined(_WIN32)
constexpr const char* kLibrary = "nvcuda.dll";
#else
constexpr const char* kLibrary = "libcuda.so.1";
#endif

struct Meaning {
  const char* name;  // of the driver's error, after CUDA_ERROR_
  mxf_status status;
  const char* advice;  // none after a loss: the host says what it does about that
};

// Of all other errors nobody is to blame but this code.
constexpr Meaning kMeanings[] = {
    {"OUT_OF_MEMORY", MXF_MEMORY, "Load the model with a smaller context or batch."},
    {"NO_DEVICE", MXF_TARGET, "There is no NVIDIA GPU here."},
    {"NO_BINARY_FOR_GPU", MXF_TARGET, "Compile the model for this GPU."},
    {"UNSUPPORTED_PTX_VERSION", MXF_TARGET, "Install a newer driver."},
    {"COMPAT_NOT_SUPPORTED_ON_DEVICE", MXF_TARGET, "Install a newer driver."},
    {"SYSTEM_DRIVER_MISMATCH", MXF_TARGET, "Restart the machine after an update of its driver."},
    {"INVALID_IMAGE", MXF_CORRUPT, "Copy the artifact again."},
    {"NOT_FOUND", MXF_CORRUPT, "Copy the artifact again."},
    // After these a process gets nothing but the same error again.
    {"ASSERT", MXF_LOST, ""},
    {"CONTAINED", MXF_LOST, ""},
    {"CONTEXT_IS_DESTROYED", MXF_LOST, ""},
    {"DEVICE_UNAVAILABLE", MXF_LOST, ""},
    {"ECC_UNCORRECTABLE", MXF_LOST, ""},
    {"EXTERNAL_DEVICE", MXF_LOST, ""},
    {"HARDWARE_STACK_ERROR", MXF_LOST, ""},
    {"ILLEGAL_ADDRESS", MXF_LOST, ""},
    {"ILLEGAL_INSTRUCTION", MXF_LOST, ""},
    {"INVALID_ADDRESS_SPACE", MXF_LOST, ""},
    {"INVALID_PC", MXF_LOST, ""},
    {"LAUNCH_FAILED", MXF_LOST, ""},
    {"LAUNCH_TIMEOUT", MXF_LOST, ""},
    {"MISALIGNED_ADDRESS", MXF_LOST, ""},
    {"MPS_CLIENT_TERMINATED", MXF_LOST, ""},
    {"NVLINK_UNCORRECTABLE", MXF_LOST, ""},
    {"TENSOR_MEMORY_LEAK", MXF_LOST, ""},
    {"UNKNOWN", MXF_LOST, ""},
};

Driver Opened() {
  const core::SharedLibrary* library;  // never closed: what it gives is used until the end
  try {
    library = new core::SharedLibrary(kLibrary);
  } catch (const core::Error&) {
    throw core::Error(MXF_TARGET,
                      std::string("NVIDIA's driver (") + kLibrary + ") is not installed.");
  }
  Driver driver{};
  const auto find = [library](const char* name) {
    void* found = library->Find(name);
    if (found == nullptr) {
      throw core::Error(MXF_TARGET, std::string("NVIDIA's driver is too old: it has no ") + name +
                                        ". Install a newer one.");
    }
    return found;
  };
#define MXFORGE_CUDA_FIND(name, parameters) \
  driver.name = reinterpret_cast<Result(*) parameters>(find(#name));
  MXFORGE_CUDA_FUNCTIONS(MXFORGE_CUDA_FIND)
#undef MXFORGE_CUDA_FIND
  if (const Result result = driver.cuInit(0); result != kSuccess) {
    throw core::Error(MXF_TARGET, driver.Failure(result, "cuInit").what());
  }
  return driver;
}

}  // namespace

const Driver& Driver::Get() {
  static const Driver driver = Opened();
  return driver;
}

core::Error Driver::Failure(Result result, const char* call) const {
  const char *name = nullptr, *text = nullptr;
  if (cuGetErrorName(result, &name) != kSuccess || name == nullptr) name = "an unknown error";
  if (cuGetErrorString(result, &text) != kSuccess || text == nullptr) text = "";
  const std::string known = name;
  std::string said = std::string(call) + " failed: " + known;
  if (*text != '\0') said += std::string(" (") + text + ")";
  for (const Meaning& meaning : kMeanings) {
    if (known != std::string("CUDA_ERROR_") + meaning.name) continue;
    const std::string advice = *meaning.advice == '\0' ? "" : std::string(" ") + meaning.advice;
    return core::Error(meaning.status, said + "." + advice);
  }
  return core::Error(MXF_FAILED, said + ".");
}

}  // namespace cuda
}  // namespace mxforge
