// What accesses cost: the 32-byte sectors of global memory that a warp's access reaches, and the
// passes over the 32 banks of shared memory that it needs; beside the fewest that could do.
#include <algorithm>
#include <map>
#include <set>
#include <tuple>
#include <unordered_map>

#include "state.h"

namespace simt {

bool counting;

namespace {

struct Touch {
  uint64_t address;
  int lane, size;
};

// Lanes of a warp that pass one place in the code for the n-th time access memory together. So it
// is while they take the same way; where they part, what they do may be put together wrongly.
using Key = std::tuple<const void*, int, uint32_t>;  // place, warp, n
struct Request {
  bool write, shared;
  std::vector<Touch> touches;
};

struct Cost {
  uint64_t requests, passes, ideal, bytes;
};

std::map<Key, Request> requests;  // of the block that runs
std::unordered_map<uint64_t, uint32_t> passed;  // how often, by place and thread
std::map<std::pair<bool, bool>, Cost> costs;    // by (shared, write)

void add_sectors(const Request& r, Cost& cost) {
  std::set<uint64_t> sectors, bytes;
  for (const Touch& t : r.touches)
    for (int i = 0; i < t.size; i++) {
      bytes.insert(t.address + i);
      sectors.insert((t.address + i) / 32);
    }
  cost.passes += sectors.size();
  cost.ideal += (bytes.size() + 31) / 32;
  cost.bytes += bytes.size();
}

void add_passes(const Request& r, Cost& cost) {
  // 128 bytes at a time: accesses of 8 bytes take two turns of 16 lanes, of 16 bytes four of 8.
  int size = r.touches[0].size, together = size == 16 ? 8 : size == 8 ? 16 : LANES;
  for (int first = 0; first < LANES; first += together) {
    std::map<int, std::set<uint64_t>> words;  // by bank; lanes that share a word share a pass
    for (const Touch& t : r.touches)
      if (t.lane / together * together == first)
        for (uint64_t word = t.address / 4; word <= (t.address + t.size - 1) / 4; word++)
          words[word % 32].insert(word);
    size_t most = 0;
    for (const auto& bank : words) most = std::max(most, bank.second.size());
    cost.passes += most;
    cost.ideal += most > 0;
  }
  for (const Touch& t : r.touches) cost.bytes += t.size;
}

}  // namespace

void count(const void* pc, uint64_t address, int size, bool write, bool shared) {
  uint32_t n = passed[uint64_t(pc) * MAX_THREADS + current]++;
  Request& r = requests[{pc, warp_of(current), n}];
  r.write = write, r.shared = shared;
  r.touches.push_back({address, current % LANES, size});
}

void end_counts_of_block() {
  for (const auto& [key, r] : requests) {
    Cost& cost = costs[{r.shared, r.write}];
    cost.requests++;
    (r.shared ? add_passes : add_sectors)(r, cost);
  }
  requests.clear();
  passed.clear();
}

// ---- the interface to Python (harness.py)

void begin_costs(bool on) {
  counting = on;
  costs.clear();
}

uint64_t cost_of(bool shared, bool write, int what) {
  const Cost& cost = costs[{shared, write}];
  return what == 0 ? cost.requests : what == 1 ? cost.passes : what == 2 ? cost.ideal : cost.bytes;
}

}  // namespace simt
