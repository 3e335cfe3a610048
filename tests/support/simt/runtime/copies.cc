// cp.async: the bytes are taken when the copy is waited for, as late as the rules allow. Until then
// the target holds 0xFF, and touching it is an error.
#include "state.h"

namespace simt {
namespace {

struct Copy {
  unsigned char* to;
  const void* from;
  int size, used;
  int group;
};

struct Copies {
  std::vector<Copy> under_way;
  int groups;  // committed
};

std::vector<Copies> copies;  // of each thread

}  // namespace

void begin_copies(int threads) { copies.assign(threads, {}); }

void async_copy(uint32_t to, const void* from, int size, int used) {
  const void* pc = __builtin_return_address(0);
  if (used < 0 || used > size) fail("cp.async of %d bytes out of %d", used, size);
  auto target = (unsigned char*)shared_pointer(to);
  take_off(target, size, (const char*)pc + 1);  // apart from the read at the same place
  if (uintptr_t(from) % size) fail("misaligned source of a cp.async of %d bytes", size);
  if (used) access(from, used, false, false, pc);
  Copies& own = copies[current];
  own.under_way.push_back({target, from, size, used, own.groups});
}

void async_commit() { copies[current].groups++; }

void async_wait(int groups) {
  Copies& own = copies[current];
  size_t kept = 0;
  for (const Copy& copy : own.under_way) {
    if (copy.group >= own.groups - groups) {
      own.under_way[kept++] = copy;
      continue;
    }
    memcpy(copy.to, copy.from, copy.used);
    memset(copy.to + copy.used, 0, copy.size - copy.used);
    land(copy.to, copy.size);
  }
  own.under_way.resize(kept);
}

}  // namespace simt
