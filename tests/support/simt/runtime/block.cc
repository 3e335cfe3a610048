// Blocks run one after the other. The threads of one are fibers: each runs until it waits, at a
// barrier or for its warp; then the next. The order of threads is the caller's choice.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "state.h"

namespace simt {

std::vector<Fiber> fibers;
int current = -1;
bool failed;
std::string error;
uint32_t launched_dynamic;
Clock now, block_began, launch_began;
std::vector<Clock> warp_clocks;

namespace {

constexpr size_t STACK = 256 << 10;
enum Order { FORWARD, REVERSE, RANDOM };

unsigned char* stacks;
void* scheduler;  // its stack pointer, while a fiber runs
const Launch* launched;
Dim3 block, thread;
int lane, alive;
int order;
uint64_t random_state;

}  // namespace

Dim3 thread_index() { return thread; }
Dim3 block_index() { return block; }
Dim3 block_size() { return launched->block; }
Dim3 grid_size() { return launched->grid; }
int lane_index() { return lane; }

// ---- switching between stacks: save what a callee must keep, and the stack pointer; load another's

extern "C" void simt_switch(void** from, void* to) asm("simt_switch");

#if defined(__x86_64__)
asm(".text\n"
    ".globl simt_switch\n"
    "simt_switch:\n"
    "  push %rbp\n  push %rbx\n  push %r12\n  push %r13\n  push %r14\n  push %r15\n"
    "  mov %rsp, (%rdi)\n"
    "  mov %rsi, %rsp\n"
    "  pop %r15\n  pop %r14\n  pop %r13\n  pop %r12\n  pop %rbx\n  pop %rbp\n"
    "  ret\n");

static void* new_stack(unsigned char* top, void (*entry)()) {
  auto sp = (void**)top;  // aligned to 16
  *--sp = nullptr;        // where the entry would return to; so it is aligned as after a call
  *--sp = (void*)entry;
  return sp - 6;
}
#elif defined(__aarch64__)
asm(".text\n"
    ".globl simt_switch\n"
    "simt_switch:\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n"
    "  stp x25, x26, [sp, #48]\n  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n"
    "  stp d12, d13, [sp, #128]\n  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n"
    "  str x9, [x0]\n"
    "  mov sp, x1\n"
    "  ldp x19, x20, [sp]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n"
    "  ldp x25, x26, [sp, #48]\n  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n"
    "  ldp d12, d13, [sp, #128]\n  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n"
    "  ret\n");

static void* new_stack(unsigned char* top, void (*entry)()) {
  auto sp = (void**)(top - 160);
  sp[10] = nullptr;  // x29
  sp[11] = (void*)entry;
  return sp;
}
#else
#error "fibers are written for x86_64 and aarch64"
#endif

void to_scheduler() { simt_switch(&fibers[current].stack_pointer, scheduler); }

bool on_stack(const void* p) {
  auto own = stacks + current * STACK;
  return p >= own && p < own + STACK;
}

void set_order(int chosen, uint64_t seed) {
  order = chosen;
  random_state = seed;
}

namespace {

void entry() {
  launched->body(launched->args);
  fibers[current].state = State::DONE;
  alive--;
  to_scheduler();
  abort();  // a fiber that is done is not run
}

void fail_block(const std::string& text) {
  char where[80];
  snprintf(where, sizeof where, " (block %u,%u,%u)", block.x, block.y, block.z);
  error = text + where;
  failed = true;
}

uint64_t random_below(uint64_t n) {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;  // Knuth's MMIX
  return (random_state >> 33) % n;
}

// All threads that are not done wait. Release them, or say why none can go on.
void meet() {
  int site = -1;
  for (size_t t = 0; t < fibers.size(); t++) {
    const Fiber& fiber = fibers[t];
    if (fiber.state == State::WARP) return fail_block(who_waits(t));
    if (fiber.state == State::MBARRIER)
      return fail_block("thread " + std::to_string(t) + " waits for a phase that does not end");
    if (fiber.state == State::DONE)
      return fail_block("thread " + std::to_string(t) + " ended while others wait at a barrier");
    if (site >= 0 && fiber.site != site) return fail_block("threads wait at different barriers");
    site = fiber.site;
  }
  for (int memory : {SHARED, GLOBAL})
    if (fibers[0].memories & memory) now.of[memory]++;  // one site, one kind of barrier
  for (auto& fiber : fibers) fiber.state = State::READY;
}

void run_block() {
  int n = fibers.size();
  for (int memory : {SHARED, GLOBAL}) block_began.of[memory] = ++now.of[memory];
  alive = n;
  begin_shared();
  begin_warps(n);
  begin_copies(n);
  begin_bulk(n);
  begin_products(n);
  std::vector<int> turns(n);
  for (int t = 0; t < n; t++) {
    Dim3 size = launched->block;
    uint32_t x = t % size.x, y = t / size.x % size.y, z = t / size.x / size.y;
    fibers[t] = {new_stack(stacks + (t + 1) * STACK - 64, entry), State::READY, {x, y, z}, 0, 0};
    turns[t] = order == REVERSE ? n - 1 - t : t;
  }
  while (alive) {
    if (order == RANDOM)
      for (int i = n; i > 1; i--) std::swap(turns[i - 1], turns[random_below(i)]);
    bool ran = false;
    for (int t : turns) {
      if (fibers[t].state != State::READY) continue;
      ran = true;
      current = t, thread = fibers[t].index, lane = t % LANES;
      simt_switch(&scheduler, fibers[t].stack_pointer);
      if (failed) break;
    }
    current = -1;
    if (!failed && !ran) meet();
    if (failed) return;
  }
  for (const std::string& left : {bulk_left(), products_left()})
    if (!left.empty()) return fail_block(left);
}

}  // namespace

void fail(const char* format, ...) {
  char text[400], where[80];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  snprintf(where, sizeof where, ", thread %u,%u,%u", thread.x, thread.y, thread.z);
  fail_block(std::string(text) + where);
  to_scheduler();
  abort();  // nothing runs after a failure
}

int without;
bool stays(int number) { return number != without; }

void barrier(int site, int memories) {
  Fiber& fiber = fibers[current];
  fiber.state = State::BARRIER, fiber.site = site, fiber.memories = memories;
  to_scheduler();
}

void launch(const Launch& l) {
  if (failed) return;  // an earlier kernel of the same call
  launched = &l;
  launched_dynamic = l.dynamic_shared;
  uint64_t threads = uint64_t(l.block.x) * l.block.y * l.block.z;
  if (threads < 1 || threads > MAX_THREADS) {
    block = {};
    return fail_block(std::to_string(threads) + " threads in a block; 1 to 1024 are possible");
  }
  if (!stacks)
    stacks = (unsigned char*)mmap(nullptr, MAX_THREADS * STACK, PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  fibers.resize(threads);
  launch_began = now;
  uint64_t blocks = uint64_t(l.grid.x) * l.grid.y * l.grid.z;
  for (uint64_t i = 0; i < blocks && !failed; i++) {
    uint64_t b = order == REVERSE ? blocks - 1 - i : i;
    block = {uint32_t(b % l.grid.x), uint32_t(b / l.grid.x % l.grid.y),
             uint32_t(b / l.grid.x / l.grid.y)};
    run_block();
    end_counts_of_block();
  }
  forget_shared();
}

}  // namespace simt
