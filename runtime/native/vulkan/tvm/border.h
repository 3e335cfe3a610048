/*!
 * \file border.h
 * \brief Errors on their way to TVM: its own kinds, and a C++ runtime that may be another.
 *
 * What the layer throws becomes one of TVM's errors: a ValueError for bytes that are no module, a
 * RuntimeError for all else.
 *
 * TVM's wheels for Linux are built with libstdc++. Where `zig c++` compiled this library, it brings
 * a libc++ of its own, whose exceptions TVM cannot catch: the process would end. So no exception
 * crosses: functions are called through tvm_ffi's C interface, which returns errors, and those of
 * DeviceAPI's methods are thrown once more by tvm_ffi's own code. With one C++ runtime on both
 * sides, all of this is nothing.
 */
#ifndef MXFORGE_VULKAN_BORDER_H_
#define MXFORGE_VULKAN_BORDER_H_

#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>

#include <optional>
#include <type_traits>
#include <utility>

#include "../error.h"

#if defined(_LIBCPP_VERSION) && defined(__linux__)
#define MXFORGE_VULKAN_BORDER 1
#else
#define MXFORGE_VULKAN_BORDER 0
#endif

namespace mxforge {
namespace vulkan {

/*! \brief Call a body, whose errors become TVM's. */
template <typename Body>
auto Translated(const Body& body) -> decltype(body()) {
  try {
    return body();
  } catch (const Error& error) {
    const char* kind = error.status() == MXF_CORRUPT ? "ValueError" : "RuntimeError";
    throw tvm::ffi::Error(kind, error.what(), "");
  }
}

template <typename Function, typename Result, typename... Arguments>
auto TranslatedAs(Function function, Result (Function::*)(Arguments...) const) {
  return [function](Arguments... arguments) -> Result {
    return Translated([&]() -> Result { return function(std::forward<Arguments>(arguments)...); });
  };
}

/*! \brief A function to register, whose errors become TVM's. */
template <typename Result, typename... Arguments>
auto Hook(Result (*function)(Arguments...)) {
  return [function](Arguments... arguments) -> Result {
    return Translated([&]() -> Result { return function(std::forward<Arguments>(arguments)...); });
  };
}

template <typename Function>
auto Hook(Function function) {
  return TranslatedAs(function, &Function::operator());
}

/*! \brief Let callers reach this function of ours by the C interface only. */
inline tvm::ffi::Function AcrossBorder(tvm::ffi::Function function) {
#if MXFORGE_VULKAN_BORDER
  using tvm::ffi::Function;
  const auto call = [](void* self, const TVMFFIAny* arguments, int32_t count, TVMFFIAny* result) {
    auto* inner = const_cast<tvm::ffi::FunctionObj*>(static_cast<Function*>(self)->operator->());
    return inner->safe_call(inner, arguments, count, result);
  };
  const auto release = [](void* self) { delete static_cast<Function*>(self); };
  return Function::FromExternC(new Function(std::move(function)), call, release);
#else
  return function;
#endif
}

#if MXFORGE_VULKAN_BORDER

/*! \brief The error that this thread is about to throw. */
std::optional<tvm::ffi::Error>& PendingError();

/*! \brief Let tvm_ffi's own code throw it. */
void ThrowPending();

template <typename Body>
__attribute__((noinline)) bool Caught(const Body& body) noexcept {
  try {
    Translated(body);
    return false;
  } catch (const tvm::ffi::Error& error) {
    PendingError() = error;
  } catch (const std::exception& error) {
    PendingError() = tvm::ffi::Error("RuntimeError", error.what(), "");
  }
  return true;
}

/*! \brief Run the body of a method that TVM calls. The method itself may have nothing to clean up:
 *  it would ask for a personality routine of the wrong library. */
template <typename Body>
void Guarded(const Body& body) {
  if (Caught(body)) ThrowPending();
}

#else

template <typename Body>
void Guarded(const Body& body) {
  Translated(body);
}

#endif

}  // namespace vulkan
}  // namespace mxforge

#endif  // MXFORGE_VULKAN_BORDER_H_
