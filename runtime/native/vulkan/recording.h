/*!
 * \file recording.h
 * \brief Launches that are recorded once and submitted again and again.
 */
#ifndef MXFORGE_VULKAN_RECORDING_H_
#define MXFORGE_VULKAN_RECORDING_H_

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "hazards.h"
#include "memory.h"
#include "stream.h"

namespace mxforge {
namespace vulkan {

/*!
 * \brief Command buffers of launches, with the barriers between these.
 *
 * The first barrier is behind all that the queue was given before, so that a recording can follow
 * anything. The device's mutex is held whenever one is called, and when it is destroyed, which
 * nothing of it may be pending for: Device::Retire.
 */
class Recording {
 public:
  /*! \brief What all launches together do to a tensor. */
  struct Use {
    Buffer* buffer;
    Access access;
  };

  /*! \brief A command buffer has at most `most` launches, so that none takes too long. */
  Recording(Core* core, Memory* memory, uint32_t most);

  /*! \brief Add a launch; `buffers[i]` is what `accesses[i]` is about. */
  void Add(const Dispatch& dispatch, const Access* accesses, Buffer* const* buffers,
           size_t count);
  /*! \brief Nothing more will be added. */
  void End();

  /*! \brief Whether all tensors are still there: addresses may have become others'. */
  bool IsCurrent() const { return frees_ == memory_->frees(); }

  const std::vector<std::unique_ptr<Batch>>& parts() const { return parts_; }
  const std::vector<Use>& uses() const { return uses_; }
  const std::vector<Access>& accesses() const { return accesses_; }

 private:
  Core* core_;
  Memory* memory_;
  const uint32_t most_;
  const uint64_t frees_;
  HazardTracker hazards_;
  std::vector<std::unique_ptr<Batch>> parts_;
  std::vector<Use> uses_;
  std::vector<Access> accesses_;  // of all uses, once it has ended
  std::map<const Buffer*, size_t> known_;
};

}  // namespace vulkan
}  // namespace mxforge

#endif  // MXFORGE_VULKAN_RECORDING_H_
