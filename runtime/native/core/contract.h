/*!
 * \file contract.h
 * \brief Whether a library's functions take and give what a model hands them: a plan that fits
 * together may still belong to another artifact.
 */
#ifndef MXFORGE_CORE_CONTRACT_H_
#define MXFORGE_CORE_CONTRACT_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "device.h"

namespace mxforge {
namespace core {

/*! \brief A function with its weights and caches, and its arguments by name. */
struct Called {
  std::unique_ptr<Runner> runner;
  std::map<std::string, size_t> arguments;

  /*! \brief Set an argument with elements of 32 bits; Error (MXF_CORRUPT) without it. */
  void Set(const std::string& name, void* address, const std::vector<int64_t>& shape);

  /*! \brief An output of this shape, with elements of 32 bits; Error (MXF_CORRUPT). */
  DeviceTensor Output(size_t output, const std::vector<int64_t>& shape) const;
};

}  // namespace core
}  // namespace mxforge

#endif  // MXFORGE_CORE_CONTRACT_H_
