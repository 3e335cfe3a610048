/*!
 * \file graphs.h
 * \brief Launches that repeat, recorded once and replayed by one call.
 */
#ifndef MXFORGE_CUDA_GRAPHS_H_
#define MXFORGE_CUDA_GRAPHS_H_

#include <cstdint>
#include <functional>
#include <list>
#include <vector>

#include "device.h"

namespace mxforge {
namespace cuda {

/*!
 * \brief The graphs of one function, by all that its launches are.
 *
 * Batches and columns of page tables alternate, so there are several; those used longest ago go.
 */
class Graphs {
 public:
  /*! \brief The device outlives them. */
  explicit Graphs(CudaDevice* device) : device_(device) {}
  ~Graphs();
  Graphs(const Graphs&) = delete;
  Graphs& operator=(const Graphs&) = delete;

  /*!
   * \brief Do what `enqueue` puts into the stream: kernels only, the same ones for the same key.
   *
   * A key that comes for the first time is not recorded: prompts seldom have the same length
   * twice. The context is the thread's.
   */
  void Run(const std::vector<uint64_t>& key, const std::function<void()>& enqueue);

 private:
  struct Known {
    uint64_t hash;
    std::vector<uint64_t> key;
    GraphRun run = nullptr;  // from the second time on
    bool refused = false;    // there is no memory for it
  };

  CudaDevice* const device_;
  std::list<Known> known_;  // the one used last first

  bool Recall(const std::vector<uint64_t>& key);
  void Record(Known* known, const std::function<void()>& enqueue);
};

}  // namespace cuda
}  // namespace mxforge

#endif  // MXFORGE_CUDA_GRAPHS_H_
