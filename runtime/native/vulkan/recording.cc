#include "recording.h"

#include <algorithm>

namespace mxforge {
namespace vulkan {

Recording::Recording(Core* core, Memory* memory, uint32_t most)
    : core_(core), memory_(memory), most_(most), frees_(memory->frees()) {}

void Recording::Add(const Dispatch& dispatch, const Access* accesses, Buffer* const* buffers,
                    size_t count) {
  const bool first = parts_.empty();
  if (first || parts_.back()->count >= most_) {
    if (!first) parts_.back()->End();
    parts_.push_back(std::make_unique<Batch>(core_, memory_));
    parts_.back()->BeginKept();
  }
  Batch& part = *parts_.back();
  if (first) part.Record(hazards_.Everything(Stage::kCompute));
  part.Record(hazards_.Command(Stage::kCompute, accesses, count, *dispatch.name));
  part.Launch(dispatch, part.Pushed(dispatch));
  ++part.count;
  for (size_t i = 0; i < count; ++i) {
    const auto [known, added] = known_.emplace(buffers[i], uses_.size());
    if (added) uses_.push_back({buffers[i], accesses[i]});
    Access& all = uses_[known->second].access;
    all.write |= accesses[i].write;
    all.begin = std::min(all.begin, accesses[i].begin);
    all.end = std::max(all.end, accesses[i].end);
  }
}

void Recording::End() {
  if (!parts_.empty()) parts_.back()->End();
  for (const Use& use : uses_) accesses_.push_back(use.access);
}

}  // namespace vulkan
}  // namespace mxforge
