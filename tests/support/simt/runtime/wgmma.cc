// wgmma: products take place when they are waited for. Until then accumulators hold no numbers;
// touching them is an error, as it is to change registers of A. What is read of shared memory is
// checked when it begins and when it ends.
#include <algorithm>
#include <list>

#include "state.h"

namespace simt {
namespace {

constexpr int WARPGROUP = 4;  // warps
constexpr int K = 16, REGISTERS = 4;
constexpr uint32_t NO_NUMBER = 0xFFFABCDE;

// Accumulators while products are under way: what they will hold.
struct Sums {
  std::vector<float*> d;
  std::vector<float> of;
  int under_way;  // products
};

struct Product {
  Sums* sums;
  const uint32_t* a[REGISTERS];
  uint32_t all[LANES][REGISTERS];
  uint64_t descriptor;
  int group;
};

struct Thread {
  std::vector<Product> under_way;
  std::list<Sums> sums;
  int groups;
  bool fenced;
};

std::vector<Thread> threads_;
std::vector<uint64_t> done;  // of each warp: what it multiplied, as a hash

// Where K-major columns of 128 bytes lie, eight of which are 1024 bytes: of a column, 16 bytes from
// input 8·piece on (PTX ISA, "Strides" and "Matrix Descriptor Format").
const unsigned char* piece_at(uint64_t descriptor, int column, int piece) {
  uint32_t start = (descriptor & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
  uint32_t at = start + column / 8 * stride + column % 8 * 128 + piece * 16;
  at ^= (at >> 7 & 7) << 4;
  return (const unsigned char*)shared_pointer(at);
}

void check(uint64_t descriptor) {
  uint32_t start = (descriptor & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
  if (descriptor >> 62 != 1 || descriptor >> 49 & 7)
    fail("wgmma is emulated with the swizzle of 128 bytes, and no base offset");
  if (start % 1024 + 2 * K > 128 || stride % 1024)
    fail("wgmma: eight columns begin at %x, and the next %u bytes on: not at 1024 bytes", start,
         stride);
}

float element(const unsigned char* piece, int i) {
  uint16_t bits;
  memcpy(&bits, piece + 2 * i, 2);
  return from_bf16(bits);
}

// The columns that this lane watches: all lanes together have all.
void read_columns(const Product& p) {
  for (int column = lane_index(); column < int(p.sums->d.size()) * 2; column += LANES)
    for (int piece = 0; piece < 2; piece++)
      read_by_proxy(piece_at(p.descriptor, column, piece), 16);
}

void add(const Product& p) {
  int g = lane_index() / 4, t = lane_index() % 4;
  float a[2][K];
  for (int half = 0; half < 2; half++)
    for (int k = 0; k < K; k++)
      a[half][k] = from_bf16(p.all[g * 4 + k % 8 / 2][k / 8 * 2 + half] >> 16 * (k % 2));
  for (size_t i = 0; i < p.sums->d.size(); i++) {
    int column = i / 4 * 8 + 2 * t + i % 2, half = i / 2 % 2;
    double sum = p.sums->of[i];
    for (int piece = 0; piece < 2; piece++) {
      const unsigned char* b = piece_at(p.descriptor, column, piece);
      for (int k = 0; k < 8; k++) sum += double(a[half][8 * piece + k]) * element(b, k);
    }
    p.sums->of[i] = float(sum);
  }
}

void check_untouched(const Sums& sums) {
  for (float* d : sums.d)
    if (bits<uint32_t>(*d) != NO_NUMBER) fail("an accumulator of wgmma was written before its end");
}

void finish(const Product& p) {
  check_untouched(*p.sums);
  for (int i = 0; i < REGISTERS; i++)
    if (*p.a[i] != p.all[lane_index()][i])
      fail("a register of A was written before wgmma was waited for");
  read_columns(p);
  add(p);
  p.sums->under_way--;
}

// Those of a product that begins. Several one after the other may have the same.
Sums& sums_of(Thread& own, std::vector<float*> d) {
  for (Sums& sums : own.sums) {
    if (sums.d == d) {
      check_untouched(sums);
      return sums;
    }
    if (sums.d[0] == d[0]) fail("products by wgmma of different widths have the same accumulators");
  }
  own.sums.push_back({d, {}, 0});
  for (float* sum : d) {
    own.sums.back().of.push_back(*sum);
    *sum = bits<float>(NO_NUMBER);
  }
  return own.sums.back();
}

}  // namespace

void begin_products(int threads) {
  threads_.assign(threads, {});
  done.assign(warp_of(threads - 1) + 1, 0);
}

std::string products_left() {
  for (const Thread& thread : threads_)
    if (!thread.under_way.empty()) return "the block ended before a wgmma was waited for";
  for (size_t warp = 0; warp < done.size(); warp++)
    if (done[warp] != done[warp / WARPGROUP * WARPGROUP])
      return "the warps of a warpgroup multiplied different matrices by wgmma";
  return "";
}

void wgmma_fence() { threads_[current].fenced = true; }

void wgmma(float* const* d, int columns, const uint32_t* const* a, uint64_t descriptor) {
  Thread& own = threads_[current];
  if (fibers.size() % (WARPGROUP * LANES)) fail("wgmma: the block has no whole warpgroups");
  if (!own.fenced) fail("wgmma: a wgmma.fence has to come before the first of a group");
  check(descriptor);
  Product p = {nullptr, {}, {}, descriptor, own.groups};
  uint32_t mine[REGISTERS];
  for (int i = 0; i < REGISTERS; i++) p.a[i] = a[i], mine[i] = *a[i];
  exchange("wgmma", ~0u, 0, mine, sizeof mine, p.all);
  if (lane_index() == 0) {
    uint64_t& hash = done[warp_of(current)];
    hash = (hash ^ descriptor ^ columns) * 0x100000001B3u + 1;
  }
  p.sums = &sums_of(own, {d, d + columns / 2});
  p.sums->under_way++;
  read_columns(p);
  own.under_way.push_back(p);
}

void wgmma_commit() {
  threads_[current].groups++;
  threads_[current].fenced = false;
}

void wgmma_wait(int groups) {
  Thread& own = threads_[current];
  auto ends = [&](const Product& p) { return p.group < own.groups - groups; };
  auto kept = std::find_if_not(own.under_way.begin(), own.under_way.end(), ends);
  for (auto p = own.under_way.begin(); p != kept; ++p) finish(*p);
  own.under_way.erase(own.under_way.begin(), kept);
  for (Sums& sums : own.sums)
    for (size_t i = 0; i < sums.d.size() && !sums.under_way; i++) *sums.d[i] = sums.of[i];
  own.sums.remove_if([](const Sums& sums) { return !sums.under_way; });
}

}  // namespace simt
