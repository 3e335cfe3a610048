#include "pool.h"

#include <system_error>

#include "error.h"
#include "os.h"

namespace mxforge {
namespace core {
namespace {

// How long a thread waits awake: longer than the gap between two kernels of a step, and shorter
// than what others who want the core would notice.
constexpr int kSpins = 2000;
constexpr int kTaskBits = 16;
constexpr uint64_t kTaskMask = (1 << kTaskBits) - 1;

void Pause() {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <typename Condition>
bool SpinUntil(const Condition& condition) {
  for (int spin = 0; spin < kSpins; ++spin) {
    if (condition()) return true;
    Pause();
  }
  return condition();
}

}  // namespace

Pool::Pool(int threads) : threads_(threads), next_(kTaskMask) {
  try {
    for (int i = 1; i < threads; ++i) {
      workers_.emplace_back([this] { Work(); });
      NameThread(&workers_.back(), "mxf-kernels");
    }
  } catch (const std::system_error&) {
    Stop();
    throw Error(MXF_MEMORY, "The system gives no more than " +
                                std::to_string(workers_.size() + 1) + " of " +
                                std::to_string(threads) + " threads; load the model with fewer.");
  }
}

Pool::~Pool() { Stop(); }

void Pool::Stop() {
  stopping_ = true;
  Publish(kTaskMask);
  for (std::thread& worker : workers_) worker.join();
}

int Pool::Run(Task task, void* data) {
  task_ = task;
  data_ = data;
  failed_.store(false, std::memory_order_relaxed);
  ended_.store(0, std::memory_order_relaxed);
  Publish(0);
  while (RunOne()) {
  }
  const auto all_ended = [this] { return ended_.load() == threads_; };
  if (!SpinUntil(all_ended)) {
    std::unique_lock<std::mutex> lock(mutex_);
    caller_sleeps_ = true;
    done_.wait(lock, all_ended);
    caller_sleeps_ = false;
  }
  return failed_ ? -1 : 0;
}

void Pool::Publish(uint64_t first) {
  next_ = ((next_.load() >> kTaskBits) + 1) << kTaskBits | first;
  if (sleeping_workers_ > 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    launched_.notify_all();
  }
}

bool Pool::RunOne() {
  uint64_t claimed = next_;
  do {
    if ((claimed & kTaskMask) >= static_cast<uint64_t>(threads_)) return false;
  } while (!next_.compare_exchange_weak(claimed, claimed + 1));
  Group group{nullptr, threads_};
  if (task_(static_cast<int>(claimed & kTaskMask), &group, data_) != 0) failed_ = true;
  if (ended_.fetch_add(1) + 1 == threads_ && caller_sleeps_) {
    std::lock_guard<std::mutex> lock(mutex_);
    done_.notify_one();
  }
  return true;
}

void Pool::Work() {
  uint64_t seen = 0;
  while (!stopping_) {
    while (RunOne()) {
    }
    seen = next_.load() >> kTaskBits;
    const auto launched = [this, seen] {
      const uint64_t next = next_;
      // Stopping is no launch: a worker may have seen its number, and slept for good.
      return stopping_ || next >> kTaskBits != seen ||
             (next & kTaskMask) < static_cast<uint64_t>(threads_);
    };
    if (SpinUntil(launched)) continue;
    std::unique_lock<std::mutex> lock(mutex_);
    ++sleeping_workers_;
    launched_.wait(lock, launched);
    --sleeping_workers_;
  }
}

}  // namespace core
}  // namespace mxforge
