/*!
 * \file binding.h
 * \brief A function's tensors from call to call: what arguments are set, and where all else lies.
 */
#ifndef MXFORGE_CORE_BINDING_H_
#define MXFORGE_CORE_BINDING_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "device.h"

namespace mxforge {
namespace core {

class Binding {
 public:
  /*!
   * \brief Nothing is set yet.
   *
   * `has` tells which of the plan's features the device has. The function, the workspace and the
   * device outlive the binding.
   */
  Binding(const Function& function, void* workspace, Device* device,
          const std::function<bool(const std::string&)>& has = [](const std::string&) {
            return false;
          });

  const Function& function() const { return function_; }

  /*! \brief As Runner::Set. */
  void Set(size_t argument, void* address, const std::vector<int64_t>& shape);

  /*!
   * \brief Make everything fit the arguments, before each call.
   *
   * Error (MXF_INVALID) where arguments are missing, or disagree; (MXF_CORRUPT) where a tensor
   * would lie outside its storage; (MXF_MEMORY).
   */
  void Update();

  /*! \brief Changes with every address and every value. */
  uint64_t version() const { return version_; }

  int64_t value(uint32_t index) const { return values_[index]; }
  void* address(uint32_t tensor) const { return addresses_[tensor]; }
  /*! \brief Where this lies in memory stays the same. */
  const std::vector<int64_t>& shape(uint32_t tensor) const { return shapes_[tensor]; }

  /*! \brief As Runner::Output. */
  DeviceTensor Output(size_t output) const;

 private:
  const Function& function_;
  char* const workspace_;
  Device* const device_;
  std::vector<std::vector<int64_t>> shapes_;   // by tensor
  std::vector<void*> addresses_;               // by tensor
  std::vector<bool> set_;                      // by argument
  std::vector<std::unique_ptr<Buffer>> own_;   // by storage, of those not in the workspace
  std::vector<int64_t> values_, extents_;      // as they were last; as they are to be
  uint64_t version_ = 1;
  bool placed_ = false;

  void ReadExtents();
  void Place();
};

}  // namespace core
}  // namespace mxforge

#endif  // MXFORGE_CORE_BINDING_H_
