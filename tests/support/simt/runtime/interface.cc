// What Python calls (harness.py): begin, one argument after the other, the launches by TVM's host
// code, end. Arguments stay where they are until the next begin.
#include "state.h"

namespace {
void* (*find_function)(const char*) = nullptr;
}

extern "C" {

// Who gives the function of a key, NULL where it does not compile.
void simt_find_functions(void* (*find)(const char*)) { find_function = find; }

// What stubs (translate.py) ask at their first call.
void* simt_function(const char* key) { return find_function(key); }

void simt_begin(int order, uint64_t seed, int counting, int without) {
  simt::without = without;
  simt::forget_arrays();
  simt::failed = false;
  simt::place = nullptr;
  simt::error.clear();
  simt::set_order(order, seed);
  simt::begin_costs(counting);
  simt::begin_operations();
}

// Memory for an argument; NULL where there is no room.
void* simt_argument(const char* name, uint64_t size, int element, int writable) {
  return simt::add_argument(name, size, element, writable);
}

// Memory of the fake driver: it stays from run to run.
void* simt_allocate(uint64_t size) { return simt::allocate(size); }
void simt_release(void* begin) { simt::release(begin); }

// What went wrong, or "".
const char* simt_end() { return simt::failed ? simt::error.c_str() : ""; }

// Where in the kernel's code, if an access went wrong; else NULL.
const void* simt_place() { return simt::failed ? simt::place : nullptr; }

// Of all accesses of one kind: what = 0 requests of warps, 1 passes (global: sectors), 2 the fewest
// passes that could do, 3 bytes.
uint64_t simt_cost(int shared, int write, int what) { return simt::cost_of(shared, write, what); }

// How often warps did what has this name.
uint64_t simt_operations(const char* what) { return simt::operations_of(what); }
}
