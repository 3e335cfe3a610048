/*!
 * \file weights.h
 * \brief The weights of an artifact on a device: its files, mapped, or numbers made from a seed.
 */
#ifndef MXFORGE_CORE_WEIGHTS_H_
#define MXFORGE_CORE_WEIGHTS_H_

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "device.h"
#include "manifest.h"
#include "os.h"
#include "prefault.h"

namespace mxforge {
namespace core {

class Weights {
 public:
  /*! \brief Error (MXF_CORRUPT) where a file does not hold what the manifest says. */
  Weights(const std::string& folder, const Manifest& manifest, Device* device);

  /*! \brief Error (MXF_CORRUPT) where there is none of this name. */
  const Buffer& Find(const std::string& name) const;

 private:
  // Taken down from the last on: what points into others comes after them.
  std::vector<std::unique_ptr<MappedFile>> files_;
  std::vector<std::unique_ptr<SparseFile>> sparse_;
  std::map<std::string, std::unique_ptr<Buffer>> buffers_;
  std::unique_ptr<Prefault> prefault_;
};

}  // namespace core
}  // namespace mxforge

#endif  // MXFORGE_CORE_WEIGHTS_H_
