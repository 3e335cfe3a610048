#include "arguments.h"

#include <tvm/ffi/error.h>

#include <cmath>
#include <cstring>

#include "../launch.h"

namespace mxforge {
namespace vulkan {
namespace {

namespace ffi = tvm::ffi;

[[noreturn]] void Mismatch(const KernelInfo& kernel, const std::string& argument,
                           const char* expected, int32_t found) {
  TVM_FFI_THROW(TypeError) << "Kernel " << kernel.name << " takes " << expected << " for "
                           << argument << " but got " << ffi::TypeIndexToTypeKey(found) << ".";
  TVM_FFI_UNREACHABLE();
}

template <typename T>
void Store(T value, uint8_t* where) {
  std::memcpy(where, &value, sizeof(value));
}

}  // namespace

uint64_t PointerValue(const TVMFFIAny& value, const KernelInfo& kernel,
                      const ArgumentInfo& argument) {
  switch (value.type_index) {
    case ffi::TypeIndex::kTVMFFIOpaquePtr:
      return reinterpret_cast<uint64_t>(value.v_ptr);
    case ffi::TypeIndex::kTVMFFINone:
      return 0;
    case ffi::TypeIndex::kTVMFFIDLTensorPtr: {
      const auto* tensor = static_cast<const DLTensor*>(value.v_ptr);
      return reinterpret_cast<uint64_t>(tensor->data) + tensor->byte_offset;
    }
    case ffi::TypeIndex::kTVMFFITensor: {
      const auto* tensor = TVMFFITensorGetDLTensorPtr(value.v_obj);
      return reinterpret_cast<uint64_t>(tensor->data) + tensor->byte_offset;
    }
    default:
      Mismatch(kernel, argument.name, "a pointer", value.type_index);
  }
}

void WriteScalar(const TVMFFIAny& value, const KernelInfo& kernel, const ArgumentInfo& argument,
                 uint8_t* block) {
  uint8_t* where = block + argument.offset;
  const bool floating = argument.type == ScalarType::kFloat16 ||
                        argument.type == ScalarType::kFloat32 ||
                        argument.type == ScalarType::kFloat64;
  const bool integer = value.type_index == ffi::TypeIndex::kTVMFFIInt ||
                       value.type_index == ffi::TypeIndex::kTVMFFIBool;
  if (floating) {
    double number = 0;
    if (value.type_index == ffi::TypeIndex::kTVMFFIFloat) {
      number = value.v_float64;
    } else if (integer) {
      number = static_cast<double>(value.v_int64);
    } else {
      Mismatch(kernel, argument.name, "a number", value.type_index);
    }
    if (argument.type == ScalarType::kFloat16) return Store(HalfFromDouble(number), where);
    if (argument.type == ScalarType::kFloat32) return Store(static_cast<float>(number), where);
    return Store(number, where);
  }
  if (!integer) Mismatch(kernel, argument.name, "an integer", value.type_index);
  WriteInteger(argument, value.v_int64, block);
}

int64_t ExtentValue(const TVMFFIAny& value, const KernelInfo& kernel) {
  if (value.type_index != ffi::TypeIndex::kTVMFFIInt) {
    Mismatch(kernel, "a launch extent", "an integer", value.type_index);
  }
  return value.v_int64;
}

uint16_t HalfFromDouble(double value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double size = std::fabs(value);
  if (std::isnan(value)) return sign | 0x7e00;
  if (size >= 65520) return sign | 0x7c00;  // halfway to what would follow the largest half
  if (size == 0) return sign;
  // In units of the last place; nearbyint rounds ties to even, and a carry into the next power of
  // two carries into the exponent's bits as it should.
  const int exponent = std::max(std::ilogb(size), -14);
  const double units = std::nearbyint(std::ldexp(size, 10 - exponent));
  return static_cast<uint16_t>(sign + ((exponent + 14) << 10) + static_cast<int>(units));
}

}  // namespace vulkan
}  // namespace mxforge
