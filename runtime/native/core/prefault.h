/*!
 * \file prefault.h
 * \brief A thread that brings mapped weights to where they can be read, before they are asked for.
 */
#ifndef MXFORGE_CORE_PREFAULT_H_
#define MXFORGE_CORE_PREFAULT_H_

#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace mxforge {
namespace core {

class Prefault {
 public:
  using Range = std::pair<const void*, size_t>;  // bytes of a mapping

  /*! \brief Begin in a moment, with the first; the ranges outlive this. */
  explicit Prefault(std::vector<Range> ranges);
  ~Prefault();

 private:
  const std::vector<Range> ranges_;
  std::mutex mutex_;
  std::condition_variable ended_;
  bool ends_ = false;
  std::thread thread_;

  void Run();
  bool EndsWithin(int milliseconds);
};

}  // namespace core
}  // namespace mxforge

#endif  // MXFORGE_CORE_PREFAULT_H_
