/*!
 * \file safetensors.h
 * \brief Headers of .safetensors files: where each tensor's bytes are.
 */
#ifndef MXFORGE_CORE_SAFETENSORS_H_
#define MXFORGE_CORE_SAFETENSORS_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace mxforge {
namespace core {

struct StoredTensor {
  std::string dtype;  // NumPy's name
  std::vector<uint64_t> shape;
  uint64_t begin, end;  // in the file
};

/*!
 * \brief The tensors of a file in memory, by name.
 *
 * Error (MXF_CORRUPT), which names `path`, unless they cover all that follows the header, one after
 * the other, each with the bytes that its shape asks for.
 */
std::map<std::string, StoredTensor> ReadSafetensors(const void* data, size_t size,
                                                    const std::string& path);

}  // namespace core
}  // namespace mxforge

#endif  // MXFORGE_CORE_SAFETENSORS_H_
