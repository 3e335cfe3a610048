// What the parts of the runtime share. One launch runs at a time, one block of it, one thread.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "simt.h"

namespace simt {

constexpr int MAX_THREADS = 1024;

// ---- block.cc: threads, barriers, launches

enum class State { READY, BARRIER, WARP, MBARRIER, DONE };

struct Fiber {
  void* stack_pointer;
  State state;
  Dim3 index;
  int site, memories;  // of the barrier that it waits at
};

extern std::vector<Fiber> fibers;
extern int current;  // the running fiber; -1 while the host runs
extern bool failed;
extern std::string error;
extern uint32_t launched_dynamic;  // bytes of dynamic shared memory
extern int without;  // the number of a statement that is left out, -1 for none

void set_order(int order, uint64_t seed);  // of threads and blocks: 0 forward, 1 reverse, 2 random
void to_scheduler();                       // stops the running fiber
inline int warp_of(int thread) { return thread / LANES; }

// ---- clocks, by which accesses are ordered. 0 is before everything; there is one a memory.

struct Clock {
  uint32_t of[3];  // by memory: [SHARED], [GLOBAL]
};
extern Clock now;                      // goes on at every barrier that orders the memory
extern Clock block_began, launch_began;
extern std::vector<Clock> warp_clocks;  // of each warp: go on at its own barriers

// ---- warp.cc

void begin_operations();
uint64_t operations_of(const char* what);  // how often warps did it, where they are counted
void begin_warps(int threads);
std::string who_waits(int thread);  // for the report of a deadlock

// ---- copies.cc

void begin_copies(int threads);

// ---- bulk.cc

void begin_bulk(int threads);
std::string bulk_left();  // what is wrong where a block has ended; ""
// Whether the thread that runs knows that a copy has arrived, of a phase of a barrier.
bool has_seen(int barrier, uint16_t phase);
// Whether a thread has fenced what it wrote by this time.
bool is_fenced(int thread, uint32_t clock);

// ---- wgmma.cc

void begin_products(int threads);
std::string products_left();

// ---- memory.cc

// An argument's memory, which begins where TVM might let a tensor begin; nullptr: no room.
void* add_argument(const char* name, uint64_t size, int element, bool writable);
void begin_shared();   // a block's: all shared arrays are poisoned
void forget_shared();  // of the launch that ended
void forget_arrays();
// Memory until it is released, of which accesses are checked for bounds alone; nullptr: no room.
void* allocate(uint64_t size);
void release(void* begin);
extern const void* place;  // in the kernel's code, of the access that is being checked
bool on_stack(const void*);  // of the running fiber

// One access of the running thread, made at `pc`.
void access(const void* at, uint64_t size, bool write, bool aligned, const void* pc);
void take_off(const void* to, uint64_t size, const void* pc);  // a cp.async begins
void land(const void* to, uint64_t size);
void land_bulk(const void* to, uint64_t size, int barrier, uint16_t phase);
// The running thread's warp reads shared memory by a bulk copy's or wgmma's way (async proxy).
void read_by_proxy(const void* at, uint64_t size);

// ---- cost.cc

extern bool counting;
void begin_costs(bool on);
uint64_t cost_of(bool shared, bool write, int what);
void count(const void* pc, uint64_t address, int size, bool write, bool shared);
void end_counts_of_block();

}  // namespace simt
