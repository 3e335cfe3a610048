/*!
 * \file free_list.h
 * \brief Which bytes of a block of memory are free. Pure bookkeeping, without Vulkan.
 */
#ifndef MXFORGE_VULKAN_FREE_LIST_H_
#define MXFORGE_VULKAN_FREE_LIST_H_

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <utility>

namespace mxforge {
namespace vulkan {

class FreeList {
 public:
  /*! \brief All of them are free. */
  explicit FreeList(uint64_t bytes);

  /*! \brief The offset of so many bytes, out of the smallest range that holds them. */
  std::optional<uint64_t> Take(uint64_t bytes);
  /*! \brief Free what was taken; it becomes one with what is free on either side of it. */
  void GiveBack(uint64_t offset, uint64_t bytes);
  /*! \brief Whether nothing is taken. */
  bool IsWhole() const;

 private:
  uint64_t bytes_;
  std::map<uint64_t, uint64_t> by_offset_;           // offset -> bytes; no two ranges touch
  std::set<std::pair<uint64_t, uint64_t>> by_size_;  // the same as (bytes, offset)

  void Add(uint64_t offset, uint64_t bytes);
  void Remove(std::map<uint64_t, uint64_t>::iterator range);
};

}  // namespace vulkan
}  // namespace mxforge

#endif  // MXFORGE_VULKAN_FREE_LIST_H_
