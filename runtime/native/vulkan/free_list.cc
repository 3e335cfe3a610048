#include "free_list.h"

namespace mxforge {
namespace vulkan {

FreeList::FreeList(uint64_t bytes) : bytes_(bytes) { Add(0, bytes); }

std::optional<uint64_t> FreeList::Take(uint64_t bytes) {
  const auto found = by_size_.lower_bound({bytes, 0});
  if (found == by_size_.end()) return std::nullopt;
  const auto [size, offset] = *found;
  Remove(by_offset_.find(offset));
  if (size > bytes) Add(offset + bytes, size - bytes);
  return offset;
}

void FreeList::GiveBack(uint64_t offset, uint64_t bytes) {
  const auto after = by_offset_.lower_bound(offset);
  if (after != by_offset_.begin()) {
    const auto before = std::prev(after);
    if (before->first + before->second == offset) {
      offset = before->first;
      bytes += before->second;
      Remove(before);
    }
  }
  if (after != by_offset_.end() && after->first == offset + bytes) {
    bytes += after->second;
    Remove(after);
  }
  Add(offset, bytes);
}

bool FreeList::IsWhole() const {
  return by_offset_.size() == 1 && by_offset_.begin()->second == bytes_;
}

void FreeList::Add(uint64_t offset, uint64_t bytes) {
  by_offset_.emplace(offset, bytes);
  by_size_.emplace(bytes, offset);
}

void FreeList::Remove(std::map<uint64_t, uint64_t>::iterator range) {
  by_size_.erase({range->second, range->first});
  by_offset_.erase(range);
}

}  // namespace vulkan
}  // namespace mxforge
