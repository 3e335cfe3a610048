// Where kernels may read and write, and who did so last.
//
// Every array, an argument or shared memory, lies in 4 GiB of address space of its own: an index
// that is off meets no neighbour. What can be written is covered by cells, each of one element or
// of what the smallest access took, that remember the last write and the last reads. Memory of the
// fake driver (driver.cc) has no cells: several launches share it.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "state.h"

namespace simt {
namespace {

constexpr int SLOT_BITS = 32, SLOTS = 64, ALLOCATIONS = 1024;
constexpr uint64_t MIDDLE = uint64_t(1) << (SLOT_BITS - 1), PAGE = 64 << 10;
constexpr int OFFSET_BITS = 24;  // of a 32-bit shared address; the slot is above

struct Access {
  uint32_t clock;       // of its memory; 0: never
  uint16_t thread;      // of the block, and IN_FLIGHT
  uint16_t warp_clock;  // the last bits are enough
};
constexpr uint16_t IN_FLIGHT = 0x8000;  // a write by cp.async that was not waited for
constexpr uint16_t BULK = 0x4000;  // by a bulk copy: not a thread but an mbarrier, and its phase

struct Cell {
  Access write, reads[2];  // two unordered readers: any writer is unordered with one of them
};

struct Array {
  unsigned char* begin;
  uint64_t size;
  int element;
  bool writable, shared;
  std::string name;
  uint32_t layout;  // of shared arrays: where it would lie among them, for the banks
  Cell* cells;      // nullptr: of inputs
  int granule;      // bytes of a cell
};

unsigned char* arena;
Array arrays[SLOTS];
int used, first_shared;                    // slots
std::vector<int> shared_slots;             // by id; -1: not asked for yet
int dynamic_slot;
uint32_t shared_end;

unsigned char* allocated;  // as arena, of what outlives a run
Array allocations[ALLOCATIONS];

Array* array_at(const void* p) {
  uint64_t slot = uint64_t((const unsigned char*)p - arena) >> SLOT_BITS;
  if (slot < uint64_t(used)) return &arrays[slot];
  slot = uint64_t((const unsigned char*)p - allocated) >> SLOT_BITS;
  return allocated && slot < ALLOCATIONS ? &allocations[slot] : nullptr;
}

void poison(Array& a) { memset(a.begin, 0xFF, a.size); }

void forget_from(int first) {
  for (int slot = first; slot < used; slot++) {
    free(arrays[slot].cells);
    mmap(arena + (uint64_t(slot) << SLOT_BITS), uint64_t(1) << SLOT_BITS, PROT_NONE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    arrays[slot] = {};
  }
  used = first;
}

// ---- order

int memory_of(const Array& a) { return a.shared ? SHARED : GLOBAL; }

Access this_access(int memory) {
  return {now.of[memory], uint16_t(current), uint16_t(warp_clocks[warp_of(current)].of[memory])};
}

// Whether what was done then cannot happen together with what this thread does.
bool ordered(const Access& then, int memory) {
  if (then.clock <= launch_began.of[memory]) return true;
  if (then.clock < block_began.of[memory]) return memory == SHARED;  // by another block
  int thread = then.thread & ~IN_FLIGHT;
  if (thread == current || then.clock != now.of[memory]) return true;
  if (thread & BULK) return has_seen(thread & ~BULK, then.warp_clock);
  return warp_of(thread) == warp_of(current) &&
         then.warp_clock != uint16_t(warp_clocks[warp_of(current)].of[memory]);
}

bool in_flight(const Cell& cell, int memory) {
  return cell.write.thread & IN_FLIGHT && cell.write.clock >= block_began.of[memory];
}

[[noreturn]] void fail_race(const Array& a, uint64_t offset, bool write, const Access& then,
                            const char* did) {
  bool here = then.clock >= block_began.of[memory_of(a)];
  char who[40];
  snprintf(who, sizeof who,
           !here ? "a thread of another block" : then.thread & BULK ? "a bulk copy" : "thread %d",
           then.thread & ~IN_FLIGHT);
  fail("race: thread %d %s %s[%lld], which %s %s; nothing orders them", current,
       write ? "writes" : "reads", a.name.c_str(), (long long)(offset / a.element), who, did);
}

void remember_read(Cell& cell, int memory) {
  Access self = this_access(memory);
  for (Access& read : cell.reads)  // what is ordered before this read adds nothing to it
    if (read.clock <= launch_began.of[memory] || ordered(read, memory)) {
      read = self;
      return;
    }
  // Both are unordered with this. Readers of two warps say more than two of one.
  int warp = warp_of(current);
  if (warp_of(cell.reads[0].thread) == warp_of(cell.reads[1].thread) &&
      warp_of(cell.reads[0].thread) != warp)
    cell.reads[1] = self;
}

void split_cells(Array& a, int granule) {
  uint64_t count = (a.size + granule - 1) / granule;
  auto cells = (Cell*)calloc(count, sizeof(Cell));
  for (uint64_t i = 0; i < count; i++) cells[i] = a.cells[i * granule / a.granule];
  free(a.cells);
  a.cells = cells;
  a.granule = granule;
}

// The cells of an access, no more and no less.
struct Range {
  Cell *first, *last;
};
Range cells_of(Array& a, uint64_t offset, uint64_t size) {
  while (offset % a.granule || size % a.granule) split_cells(a, a.granule / 2);
  return {a.cells + offset / a.granule, a.cells + (offset + size - 1) / a.granule};
}

void remember(Array& a, uint64_t offset, uint64_t size, bool write) {
  int memory = memory_of(a);
  Range range = cells_of(a, offset, size);
  for (Cell* cell = range.first; cell <= range.last; cell++) {
    uint64_t here = (cell - a.cells) * a.granule;
    if (in_flight(*cell, memory))
      fail("thread %d %s %s[%lld] before the cp.async of thread %d to it was waited for", current,
           write ? "writes" : "reads", a.name.c_str(), (long long)(here / a.element),
           cell->write.thread & ~IN_FLIGHT);
    if (!ordered(cell->write, memory)) fail_race(a, here, write, cell->write, "wrote");
    if (!write) {
      remember_read(*cell, memory);
      continue;
    }
    for (const Access& read : cell->reads)
      if (!ordered(read, memory)) fail_race(a, here, write, read, "read");
    cell->write = this_access(memory);
  }
}

// The array that an access falls in, after all checks but that for races.
Array& checked(const void* at, uint64_t size, bool write, bool aligned) {
  const char* what = write ? "write" : "read";
  Array* a = array_at(at);
  if (!a || !a->begin) fail("%s of %d bytes outside of every array, at %p", what, int(size), at);
  int64_t offset = (const unsigned char*)at - a->begin;
  if (offset < 0 || offset + size > a->size)
    fail("%s of %d bytes at %s[%lld], which has %lld elements", what, int(size), a->name.c_str(),
         (long long)(offset / a->element), (long long)(a->size / a->element));
  if (aligned && uintptr_t(at) % size)
    fail("misaligned %s of %d bytes at %s[%lld]", what, int(size), a->name.c_str(),
         (long long)(offset / a->element));
  if (write && !a->writable) fail("write to the input %s", a->name.c_str());
  return *a;
}

void count_access(const Array& a, const void* at, uint64_t size, bool write, const void* pc) {
  if (!counting) return;
  uint64_t address = a.shared ? a.layout + ((const unsigned char*)at - a.begin) : uint64_t(at);
  count(pc, address, size, write, a.shared);
}

void* add_array(const char* name, uint64_t size, int element, int alignment, bool writable,
                bool shared) {
  if (!arena)
    arena = (unsigned char*)mmap(nullptr, uint64_t(SLOTS) << SLOT_BITS, PROT_NONE,
                                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (arena == MAP_FAILED || used == SLOTS || size > MIDDLE / 2) return nullptr;
  Array& a = arrays[used];
  unsigned char* page = arena + (uint64_t(used++) << SLOT_BITS) + MIDDLE;
  mprotect(page, (alignment + size + PAGE - 1) / PAGE * PAGE, PROT_READ | PROT_WRITE);
  int granule = element & (element - 1) ? 1 : element;
  Cell* cells = writable ? (Cell*)calloc(size / granule + 1, sizeof(Cell)) : nullptr;
  // Aligned as promised and not more.
  a = {page + alignment, size, element, writable, shared, name, shared_end, cells, granule};
  if (shared) {
    a.layout = (shared_end + alignment - 1) / alignment * alignment;
    shared_end = a.layout + size;
    poison(a);
  }
  return a.begin;
}

}  // namespace

const void* place;

void* shared_array(int id, const char* name, uint64_t size, int element, int alignment) {
  if (id >= int(shared_slots.size())) shared_slots.resize(id + 1, -1);
  int& slot = shared_slots[id];
  if (slot < 0) {
    slot = used;
    if (!add_array(name, size, element, alignment, true, true)) fail("too many arrays");
  }
  return arrays[slot].begin;
}

void* dynamic_shared() {
  if (!dynamic_slot) {
    dynamic_slot = used;
    if (!add_array("dynamic shared memory", launched_dynamic, 4, 1024, true, true))
      fail("too many arrays");
  }
  return arrays[dynamic_slot].begin;
}

void begin_shared() {
  for (int slot = first_shared; slot < used; slot++) poison(arrays[slot]);
}

void forget_shared() {
  forget_from(first_shared);
  shared_slots.clear();
  dynamic_slot = shared_end = 0;
}

void forget_arrays() {
  forget_from(0);
  first_shared = 0;
}

void* add_argument(const char* name, uint64_t size, int element, bool writable) {
  void* begin = add_array(name, size, element, 64, writable, false);  // as TVM aligns tensors
  first_shared = used;
  return begin;
}

void* allocate(uint64_t size) {
  if (!allocated)
    allocated = (unsigned char*)mmap(nullptr, uint64_t(ALLOCATIONS) << SLOT_BITS, PROT_NONE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (allocated == MAP_FAILED || size > MIDDLE / 2) return nullptr;
  for (int slot = 0; slot < ALLOCATIONS; slot++) {
    Array& a = allocations[slot];
    if (a.begin) continue;
    unsigned char* page = allocated + (uint64_t(slot) << SLOT_BITS) + MIDDLE;
    mprotect(page, (size + PAGE - 1) / PAGE * PAGE, PROT_READ | PROT_WRITE);
    a = {page, size, 1, true, false, "memory " + std::to_string(slot), 0, nullptr, 1};
    poison(a);
    return page;
  }
  return nullptr;
}

void release(void* begin) {
  Array& a = *array_at(begin);
  mmap(a.begin - MIDDLE, uint64_t(1) << SLOT_BITS, PROT_NONE,
       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  a = {};
}

void access(const void* at, uint64_t size, bool write, bool aligned, const void* pc) {
  if (current < 0 || failed || on_stack(at)) return;
  place = pc;
  Array& a = checked(at, size, write, aligned);
  count_access(a, at, size, write, pc);
  if (a.cells) remember(a, (const unsigned char*)at - a.begin, size, write);
  place = nullptr;
}

void take_off(const void* to, uint64_t size, const void* pc) {
  place = pc;
  Array& a = checked(to, size, true, true);
  count_access(a, to, size, true, pc);
  uint64_t offset = (const unsigned char*)to - a.begin;
  remember(a, offset, size, true);  // it may arrive from now on ...
  Range range = cells_of(a, offset, size);
  for (Cell* cell = range.first; cell <= range.last; cell++) cell->write.thread |= IN_FLIGHT;
  memset(a.begin + offset, 0xFF, size);  // ... and what was there is gone
  place = nullptr;
}

void land(const void* to, uint64_t size) {
  Array& a = *array_at(to);
  Range range = cells_of(a, (const unsigned char*)to - a.begin, size);
  for (Cell* cell = range.first; cell <= range.last; cell++) cell->write = this_access(SHARED);
}

void land_bulk(const void* to, uint64_t size, int barrier, uint16_t phase) {
  Array& a = *array_at(to);
  Range range = cells_of(a, (const unsigned char*)to - a.begin, size);
  for (Cell* cell = range.first; cell <= range.last; cell++)
    cell->write = {now.of[SHARED], uint16_t(BULK | barrier), phase};
}

void read_by_proxy(const void* at, uint64_t size) {
  Array& a = checked(at, size, false, true);
  uint64_t offset = (const unsigned char*)at - a.begin;
  remember(a, offset, size, false);
  Range range = cells_of(a, offset, size);
  for (Cell* cell = range.first; cell <= range.last; cell++) {
    const Access& write = cell->write;
    if (write.clock < block_began.of[SHARED] || write.thread & BULK) continue;
    if (!is_fenced(write.thread, write.clock))
      fail("no fence.proxy.async between thread %d, which writes %s[%lld], and what reads it",
           write.thread, a.name.c_str(), (long long)((cell - a.cells) * a.granule / a.element));
  }
}

// Dynamic memory is at 0, as on a GPU: descriptors have no more than 18 bits for an address.
uint32_t shared_address(const void* p) {
  Array* a = array_at(p);
  if (!a || !a->shared) fail("the shared address of what is not shared, %p", p);
  uint32_t slot = a - arrays == dynamic_slot ? 0 : a - arrays;
  return slot << OFFSET_BITS | uint32_t((const unsigned char*)p - a->begin);
}

void* shared_pointer(uint32_t address) {
  uint32_t slot = address >> OFFSET_BITS ? address >> OFFSET_BITS : dynamic_slot;
  if (slot >= uint32_t(used) || !arrays[slot].shared) fail("%x is no shared address", address);
  return arrays[slot].begin + (address & ((1u << OFFSET_BITS) - 1));
}

}  // namespace simt
