// Operations of a warp: each lane gives a value and waits; then all have the values of all.
#include <algorithm>
#include <list>
#include <map>

#include "state.h"

namespace simt {
namespace {

constexpr int BYTES = 64;  // that a lane can give

// The lanes of one operation. Two may be under way in a warp whose lanes went different ways.
struct Meeting {
  const char* what;
  uint32_t mask, arrived, to_read;  // lanes
  unsigned char given[LANES][BYTES];
};

std::vector<std::list<Meeting>> meetings;  // of each warp
std::map<std::string, uint64_t> operations;  // of the run, by their names

Meeting& join(const char* what, uint32_t mask) {
  auto& under_way = meetings[warp_of(current)];
  // Lanes that wait for others than those that come wait for ever, and are reported then.
  for (Meeting& m : under_way)
    if (m.arrived != m.mask && m.mask == mask && !strcmp(m.what, what)) return m;
  under_way.push_front({what, mask, 0, mask, {}});
  return under_way.front();
}

}  // namespace

void begin_operations() { operations.clear(); }
uint64_t operations_of(const char* what) { return operations[what]; }

void begin_warps(int threads) {
  warp_clocks.assign(warp_of(threads - 1) + 1, {});
  meetings.assign(warp_clocks.size(), {});
}

std::string who_waits(int thread) {
  for (const Meeting& m : meetings[warp_of(thread)])
    if (m.arrived & 1u << thread % LANES)
      return "thread " + std::to_string(thread) + " waits in " + m.what + " for lanes that do not come";
  return "";
}

void exchange(const char* what, uint32_t mask, int memories, const void* mine, int size, void* all) {
  int warp = warp_of(current), first = warp * LANES;
  int lanes = std::min<int>(LANES, fibers.size() - first);
  uint32_t every = lanes == LANES ? ~0u : (1u << lanes) - 1;
  mask &= every;
  if (!(mask >> lane_index() & 1)) fail("%s: lane %d is not in its own mask", what, lane_index());
  if (size > BYTES) fail("%s: %d bytes a lane", what, size);
  Meeting& m = join(what, mask);
  memcpy(m.given[lane_index()], mine, size);
  m.arrived |= 1u << lane_index();
  if (m.arrived == mask) {
    if (counting) operations[what]++;
    if (mask == every)  // a part of a warp is not ordered: that can only hide nothing
      for (int memory : {SHARED, GLOBAL})
        if (memories & memory) warp_clocks[warp].of[memory]++;
    for (int lane = 0; lane < lanes; lane++)
      if (mask >> lane & 1 && lane != lane_index()) fibers[first + lane].state = State::READY;
  } else {
    fibers[current].state = State::WARP;
    to_scheduler();
  }
  for (int lane = 0; lane < lanes; lane++)
    memcpy((unsigned char*)all + lane * size, m.given[lane], size);
  m.to_read &= ~(1u << lane_index());
  if (!m.to_read)
    meetings[warp].remove_if([](const Meeting& meeting) { return !meeting.to_read; });
}

}  // namespace simt
