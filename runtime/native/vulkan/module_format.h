/*!
 * \file module_format.h
 * \brief The serialized form of a module: SPIR-V and what is to be known about it.
 *
 *   8 bytes  "MXFSPIRV"
 *   u32      version, 3
 *   u32      bytes of the JSON text, padded with blanks to a multiple of 4
 *   JSON     {"kernels": [...]}, one object a kernel; see KernelInfo
 *   SPIR-V   modules one after another, each 4-aligned
 *
 * All numbers are little-endian. The bytes may come from anywhere: whatever is wrong with them is
 * an error that names it.
 */
#ifndef MXFORGE_VULKAN_MODULE_FORMAT_H_
#define MXFORGE_VULKAN_MODULE_FORMAT_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "matrices.h"

namespace mxforge {
namespace vulkan {

enum class ScalarType : uint8_t {
  kBool,
  kInt8,
  kInt16,
  kInt32,
  kInt64,
  kUInt8,
  kUInt16,
  kUInt32,
  kUInt64,
  kFloat16,
  kFloat32,
  kFloat64
};

uint32_t BytesOf(ScalarType type);

struct ArgumentInfo {
  std::string name;
  bool pointer = false;
  uint32_t offset = 0;  // in the argument block
  bool read = false;    // of pointers
  bool write = false;
  uint32_t alignment = 1;                // of pointers: what has to divide the address
  ScalarType type = ScalarType::kInt64;  // of scalars
};

/*! \brief An extent of the launch, in the order of the packed call: grid or block, x, y or z. */
struct LaunchExtent {
  bool block = false;
  uint8_t axis = 0;
};

struct KernelInfo {
  std::string name;
  std::vector<uint32_t> code;
  std::vector<ArgumentInfo> arguments;
  uint32_t argument_bytes = 0;
  bool argument_buffer = false;
  std::vector<LaunchExtent> launch;
  uint32_t local_size[3] = {1, 1, 1};  // 0: known at launch, a specialization constant
  uint32_t shared_bytes = 0;
  std::vector<std::string> features;
  std::vector<std::string> extensions;
  std::vector<std::string> subgroup_operations;
  uint32_t subgroup_size = 0;  // 0: any
  std::vector<MatrixProduct> products;  // of cooperative matrices
  bool full_subgroups = false;  // a thread in every lane: the feature computeFullSubgroups

  /*! \brief Whether it is one of several variants, of which the host takes what the device has:
   * devices differ in their matrices. All others run everywhere, or the module does not. */
  bool IsVariant() const { return !products.empty(); }

  bool HasDynamicSize() const {
    return local_size[0] == 0 || local_size[1] == 0 || local_size[2] == 0;
  }
};

/*! \brief Parse and check: Error (MXF_CORRUPT). */
std::vector<KernelInfo> ParseModule(std::string_view bytes);

}  // namespace vulkan
}  // namespace mxforge

#endif  // MXFORGE_VULKAN_MODULE_FORMAT_H_
