/*!
 * \file function.h
 * \brief A plan's function on a GPU: its launches, replayed from a graph once they repeat.
 */
#ifndef MXFORGE_CUDA_FUNCTION_H_
#define MXFORGE_CUDA_FUNCTION_H_

#include <cstdint>
#include <vector>

#include "../core/binding.h"
#include "device.h"
#include "graphs.h"

namespace mxforge {
namespace cuda {

class CudaFunction : public core::Runner {
 public:
  /*! \brief As core::Device::Open; the context is the thread's. */
  CudaFunction(const core::Function& function, void* workspace, CudaDevice* device);

  const core::Function& function() const override { return binding_.function(); }
  void Set(size_t argument, void* address, const std::vector<int64_t>& shape) override {
    binding_.Set(argument, address, shape);
  }
  void Run() override;
  core::DeviceTensor Output(size_t output) const override { return binding_.Output(output); }

 private:
  /*! \brief A step that is launched, as it was last. */
  struct Launch {
    const core::Step* step;
    LoadedKernel* kernel;
    size_t first;  // of its arguments
    bool runs = false;
    LaunchConfig config{};
  };

  core::Binding binding_;
  CudaDevice* const device_;
  std::vector<Launch> launches_;
  std::vector<uint64_t> words_;    // of all arguments, the bytes of each from its beginning
  std::vector<void*> arguments_;   // pointers to them, as the driver takes them
  std::vector<uint64_t> key_;      // all that the launches are
  uint64_t version_ = 0;           // of the binding, that launches_ and key_ are from
  Graphs graphs_;

  void Prepare();
  void Enqueue();
};

}  // namespace cuda
}  // namespace mxforge

#endif  // MXFORGE_CUDA_FUNCTION_H_
