#include "batch_limit.h"

#include <algorithm>

namespace mxforge {
namespace vulkan {

uint32_t NextBatchLimit(uint32_t limit, uint32_t commands, double milliseconds, double target,
                        uint32_t most) {
  const double known = limit;
  const double fitting = milliseconds > 0 ? commands * target / milliseconds : 2 * known;
  double next = known;
  if (fitting < known) {
    next = fitting;
  } else if (2.0 * commands >= known) {
    next = std::min(fitting, 2 * known);
  }
  return static_cast<uint32_t>(std::clamp<double>(next, 1, most));
}

}  // namespace vulkan
}  // namespace mxforge
