/*!
 * \file host.h
 * \brief A device that is the host's memory, without kernels.
 */
#ifndef MXFORGE_TESTS_HOST_H_
#define MXFORGE_TESTS_HOST_H_

#include <cstdlib>
#include <cstring>
#include <memory>

#include "device.h"
#include "error.h"

namespace testing {

class Host : public mxforge::core::Device {
 public:
  /*! \brief Buffers of more bytes than `most` are refused. */
  explicit Host(size_t most, bool reads_host_memory = true)
      : most_(most), reads_host_memory_(reads_host_memory) {}

  bool reads_host_memory() const override { return reads_host_memory_; }
  std::unique_ptr<mxforge::core::Buffer> Allocate(size_t bytes) override {
    if (bytes > most_) throw mxforge::core::Error(MXF_MEMORY, "The test's device is too small.");
    return std::make_unique<Memory>(bytes);
  }
  std::unique_ptr<mxforge::core::Buffer> AllocateHost(size_t bytes) override {
    return Allocate(bytes);
  }
  void Upload(void* to, const void* from, size_t bytes) override { Copy(to, from, bytes); }
  void Copy(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }
  void Download(void* to, const void* from, size_t bytes) override { Copy(to, from, bytes); }
  mxforge::core::Mark Now() override { return 0; }
  void Wait(mxforge::core::Mark) override {}
  std::unique_ptr<mxforge::core::Runner> Open(const mxforge::core::Function&, void*) override {
    return nullptr;
  }

 private:
  // Of just their size, so that a sanitizer sees what goes beyond.
  struct Memory : mxforge::core::Buffer {
    explicit Memory(size_t bytes) : Buffer(std::malloc(bytes), bytes) {}
    ~Memory() override { std::free(address()); }
  };

  const size_t most_;
  const bool reads_host_memory_;
};

}  // namespace testing

#endif  // MXFORGE_TESTS_HOST_H_
