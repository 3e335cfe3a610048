// mbarriers and bulk copies. The bytes are taken when their phase is waited for, as late as the
// rules allow. Until then the target holds 0xFF, and touching it is an error.
#include <map>

#include "state.h"

namespace simt {
namespace {

constexpr int TOGETHER = 16;  // bytes: sizes and addresses of bulk copies are multiples

struct Copy {
  unsigned char* to;
  const void* from;
  uint32_t size;
};

struct Mbarrier {
  int number;
  uint32_t arrivals, missing;  // of a phase
  int64_t bytes;               // that are yet to come
  uint16_t phase;              // how many have ended
  std::vector<Copy> under_way;
};

std::map<uint32_t, Mbarrier> barriers;           // of the block, by address
std::vector<std::map<int, uint16_t>> seen;       // of each thread: phases, by barrier
std::vector<uint32_t> fenced;                    // of each thread: when it last did

// One that was initialized, which the running thread knows of.
Mbarrier& barrier_at(uint32_t address, const char* what) {
  if (address % 8) fail("%s: the mbarrier at %x is not aligned to 8 bytes", what, address);
  access(shared_pointer(address), 8, false, true, nullptr);
  auto found = barriers.find(address);
  if (found == barriers.end()) fail("%s: there is no mbarrier at %x", what, address);
  return found->second;
}

void wake() {
  for (Fiber& fiber : fibers)
    if (fiber.state == State::MBARRIER) fiber.state = State::READY;
}

// Ends the phase where nothing is missing; copies arrive now.
bool try_end(Mbarrier& b) {
  if (b.missing) return false;
  for (const Copy& copy : b.under_way) {
    memcpy(copy.to, copy.from, copy.size);
    land_bulk(copy.to, copy.size, b.number, b.phase + 1);
    b.bytes -= copy.size;
  }
  b.under_way.clear();
  if (b.bytes) return false;
  b.phase++;
  b.missing = b.arrivals;
  return true;
}

}  // namespace

void begin_bulk(int threads) {
  barriers.clear();
  seen.assign(threads, {});
  fenced.assign(threads, 0);
}

std::string bulk_left() {
  for (const auto& [address, b] : barriers)
    if (!b.under_way.empty()) return "the block ended before a bulk copy arrived";
  return "";
}

bool has_seen(int barrier, uint16_t phase) {
  auto& own = seen[current];
  auto found = own.find(barrier);
  return found != own.end() && int16_t(found->second - phase) >= 0;
}

void proxy_fence() { fenced[current] = now.of[SHARED]; }

bool is_fenced(int thread, uint32_t clock) { return fenced[thread] >= clock; }

void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  if (barrier % 8) fail("the mbarrier at %x is not aligned to 8 bytes", barrier);
  access(shared_pointer(barrier), 8, true, true, nullptr);
  barriers[barrier] = {int(barriers.size()), arrivals, arrivals, 0, 0, {}};
}

void mbarrier_arrive(uint32_t barrier, uint32_t bytes) {
  Mbarrier& b = barrier_at(barrier, "mbarrier.arrive");
  if (!b.missing) fail("mbarrier.arrive: all %u of this phase have arrived", b.arrivals);
  b.bytes += bytes;
  b.missing--;
  if (!b.missing) wake();
}

void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  if (parity > 1) fail("mbarrier.try_wait: the parity %u", parity);
  while (true) {
    Mbarrier& b = barrier_at(barrier, "mbarrier.try_wait");
    if (b.phase % 2 != parity || try_end(b)) {
      seen[current][b.number] = b.phase;
      return;
    }
    fibers[current].state = State::MBARRIER;
    to_scheduler();
  }
}

void bulk_copy(uint32_t to, const void* from, uint32_t size, uint32_t barrier) {
  const void* pc = __builtin_return_address(0);
  Mbarrier& b = barrier_at(barrier, "cp.async.bulk");
  read_by_proxy(shared_pointer(barrier), 8);
  if (!size || size % TOGETHER || to % TOGETHER || uintptr_t(from) % TOGETHER)
    fail("cp.async.bulk of %u bytes, which go to %x: size and addresses are multiples of 16", size,
         to);
  auto target = (unsigned char*)shared_pointer(to);
  for (uint32_t i = 0; i < size; i += TOGETHER) {
    take_off(target + i, TOGETHER, pc);
    access((const unsigned char*)from + i, TOGETHER, false, true, (const char*)pc + 1);
  }
  b.under_way.push_back({target, from, size});
}

}  // namespace simt
