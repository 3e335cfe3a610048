#include "prefault.h"

#include <algorithm>
#include <chrono>
#include <system_error>

#include "os.h"

namespace mxforge {
namespace core {
namespace {

constexpr int kDelay = 1000;                 // milliseconds: begun at once, it would delay the first token
constexpr size_t kPiece = size_t{16} << 20;  // bytes between two looks whether it should end

}  // namespace

Prefault::Prefault(std::vector<Range> ranges) : ranges_(std::move(ranges)) {
  if (ranges_.empty()) return;
  try {
    thread_ = std::thread([this] { Run(); });
    NameThread(&thread_, "mxf-prefault");
  } catch (const std::system_error&) {
    // No thread is left for it: pages come as they are read.
  }
}

Prefault::~Prefault() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ends_ = true;
  }
  ended_.notify_one();
  if (thread_.joinable()) thread_.join();
}

bool Prefault::EndsWithin(int milliseconds) {
  std::unique_lock<std::mutex> lock(mutex_);
  return ended_.wait_for(lock, std::chrono::milliseconds(milliseconds), [this] { return ends_; });
}

void Prefault::Run() {
  if (EndsWithin(kDelay)) return;
  for (const auto& [data, size] : ranges_) {
    for (size_t at = 0; at < size; at += kPiece) {
      const void* piece = static_cast<const char*>(data) + at;
      // Where it cannot, pages come as they are read.
      if (!Populate(piece, std::min(kPiece, size - at)) || EndsWithin(0)) return;
    }
  }
}

}  // namespace core
}  // namespace mxforge
