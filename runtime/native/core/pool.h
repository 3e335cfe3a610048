/*!
 * \file pool.h
 * \brief Threads that share out the tasks of a kernel.
 *
 * Whoever is free claims the next task, the caller too: a thread that the system runs late costs
 * nothing. Which thread runs a task is left open; what a task computes is not.
 */
#ifndef MXFORGE_CORE_POOL_H_
#define MXFORGE_CORE_POOL_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace mxforge {
namespace core {

class Pool {
 public:
  /*! \brief A kernel's loop: its part `task` of `tasks`; not 0 where it failed. */
  struct Group {
    void* sync;
    int32_t tasks;
  };
  using Task = int (*)(int task, Group* group, void* data);

  /*! \brief So many threads, the caller of `Run` among them. Error (MXF_MEMORY) where the system
   * has not so many. */
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return threads_; }

  /*! \brief Run all tasks, and return when all have ended: 0, or -1 where one failed. */
  int Run(Task task, void* data);

 private:
  const int threads_;
  std::vector<std::thread> workers_;

  // The number of the launch, and in the last 16 bits its next task: both change at once, so that
  // nobody claims a task of a launch that has ended.
  std::atomic<uint64_t> next_;
  std::atomic<int> ended_{0};
  std::atomic<bool> failed_{false};
  Task task_ = nullptr;
  void* data_ = nullptr;

  // Of those who wait long enough to sleep.
  std::mutex mutex_;
  std::condition_variable launched_, done_;
  std::atomic<int> sleeping_workers_{0};
  std::atomic<bool> caller_sleeps_{false};
  std::atomic<bool> stopping_{false};

  void Stop();
  void Work();
  void Publish(uint64_t first);
  bool RunOne();
};

}  // namespace core
}  // namespace mxforge

#endif  // MXFORGE_CORE_POOL_H_
