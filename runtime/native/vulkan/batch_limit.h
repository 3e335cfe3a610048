/*!
 * \file batch_limit.h
 * \brief How many commands a batch may have, from how long earlier ones took. No Vulkan in it.
 *
 * Watchdogs end a device's work that takes seconds without a pause, and a batch is such a piece.
 */
#ifndef MXFORGE_VULKAN_BATCH_LIMIT_H_
#define MXFORGE_VULKAN_BATCH_LIMIT_H_

#include <cstdint>

namespace mxforge {
namespace vulkan {

/*! \brief The next limit, from 1 to `most`, after a batch of `commands` under `limit`.
 *
 * It shrinks at once to what would have taken `target` milliseconds, and grows to it by doubling;
 * it grows only after batches that came near it, as others say little about so many commands.
 */
uint32_t NextBatchLimit(uint32_t limit, uint32_t commands, double milliseconds, double target,
                        uint32_t most);

}  // namespace vulkan
}  // namespace mxforge

#endif  // MXFORGE_VULKAN_BATCH_LIMIT_H_
