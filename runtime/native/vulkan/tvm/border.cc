#include "border.h"

#if MXFORGE_VULKAN_BORDER

#include <tvm/ffi/extra/module.h>

namespace mxforge {
namespace vulkan {
namespace {

// Module::LoadFromFile calls the loader of a file's kind and throws what that one raises: a
// function of tvm_ffi's that throws on request.
constexpr const char* kLoader = "ffi.Module.load_from_file.mxforge_vulkan_pending";

// Returned the way that a Module is (through memory, for it cannot be copied bit by bit), but
// without the destructor that would give its caller something to clean up.
struct Unowned {
  Unowned(const Unowned& other) : object(other.object) {}
  void* object;
};
using Load = Unowned (*)(const tvm::ffi::String&);

// Made at load: statics within ThrowPending would have to be cleaned up, too.
const tvm::ffi::String* pending_file = nullptr;
Load load_pending = nullptr;

TVM_FFI_STATIC_INIT_BLOCK() {
  namespace ffi = tvm::ffi;
  pending_file = new ffi::String("error.mxforge_vulkan_pending");
  load_pending = reinterpret_cast<Load>(&ffi::Module::LoadFromFile);
  if (ffi::Function::GetGlobal(kLoader).has_value()) return;
  const auto raise = [](ffi::PackedArgs, ffi::Any*) {
    throw *std::exchange(PendingError(), std::nullopt);
  };
  ffi::Function::SetGlobal(kLoader, AcrossBorder(ffi::Function::FromPacked(raise)));
}

}  // namespace

std::optional<tvm::ffi::Error>& PendingError() {
  static thread_local auto* const error = new std::optional<tvm::ffi::Error>();
  return *error;
}

__attribute__((noinline)) void ThrowPending() { load_pending(*pending_file); }

}  // namespace vulkan
}  // namespace mxforge

#endif
