/*!
 * \file arguments.h
 * \brief From the packed call of TVM's host code to the argument block of a kernel.
 */
#ifndef MXFORGE_VULKAN_ARGUMENTS_H_
#define MXFORGE_VULKAN_ARGUMENTS_H_

#include <tvm/ffi/any.h>

#include <cstdint>

#include "../module_format.h"

namespace mxforge {
namespace vulkan {

/*! \brief The address of a pointer argument: a pointer, None, or (in tests) a tensor. */
uint64_t PointerValue(const TVMFFIAny& value, const KernelInfo& kernel,
                      const ArgumentInfo& argument);

/*! \brief Write a scalar at its place in the block. */
void WriteScalar(const TVMFFIAny& value, const KernelInfo& kernel, const ArgumentInfo& argument,
                 uint8_t* block);

/*! \brief An extent of the launch. */
int64_t ExtentValue(const TVMFFIAny& value, const KernelInfo& kernel);

/*! \brief The nearest 16-bit float, ties to even. */
uint16_t HalfFromDouble(double value);

}  // namespace vulkan
}  // namespace mxforge

#endif  // MXFORGE_VULKAN_ARGUMENTS_H_
