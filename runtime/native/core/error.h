/*!
 * \file error.h
 * \brief What the core throws inside; at the C ABI it becomes a code and a message.
 */
#ifndef MXFORGE_CORE_ERROR_H_
#define MXFORGE_CORE_ERROR_H_

#include <stdexcept>
#include <string>

#include "mxforge.h"

namespace mxforge {
namespace core {

class Error : public std::runtime_error {
 public:
  Error(mxf_status status, const std::string& message)
      : std::runtime_error(message), status_(status) {}

  mxf_status status() const { return status_; }

 private:
  mxf_status status_;
};

/*! \brief Error (MXF_INVALID) unless what a caller has to see to holds. */
inline void Require(bool condition, const char* message) {
  if (!condition) throw Error(MXF_INVALID, message);
}

}  // namespace core
}  // namespace mxforge

#endif  // MXFORGE_CORE_ERROR_H_
