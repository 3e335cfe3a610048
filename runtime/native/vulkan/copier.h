/*!
 * \file copier.h
 * \brief Copies between the host and a device, and within a device.
 */
#ifndef MXFORGE_VULKAN_COPIER_H_
#define MXFORGE_VULKAN_COPIER_H_

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "core.h"
#include "memory.h"
#include "stream.h"

namespace mxforge {
namespace vulkan {

/*! \brief Takes the device's mutex itself, and not while the host copies. */
class Copier {
 public:
  Copier(Core* core, Memory* memory, std::mutex* device_mutex);

  /*! \brief `from` may be reused on return; the device sees the bytes in the stream's order. */
  void Upload(Stream* stream, const uint8_t* from, uint64_t to, uint64_t bytes);
  /*! \brief Waits for what the stream still does to these bytes. */
  void Download(Stream* stream, uint64_t from, uint8_t* to, uint64_t bytes);
  /*! \brief Record a copy into memory of Memory::AllocateHost, without waiting for it. */
  void Fetch(Stream* stream, uint64_t from, uint8_t* to, uint64_t bytes);
  /*! \brief From one address of the device to another, which may overlap. */
  void Within(Stream* stream, uint64_t from, uint64_t to, uint64_t bytes);
  /*! \brief Free the staging memory, of a lost device without tensors; its mutex is held. */
  void GiveUp();

 private:
  /*! \brief Staging memory that is filled, waited for and filled again. */
  struct Ring {
    std::mutex mutex;  // one copy at a time; taken before the device's
    std::vector<std::unique_ptr<Buffer>> chunks;
    size_t current = 0;
    uint64_t used = 0;  // bytes of the current chunk
  };

  Core* core_;
  Memory* memory_;
  std::mutex* device_mutex_;
  Ring upload_;
  Ring download_;

  using Lock = std::unique_lock<std::mutex>;
  void Provide(Ring* ring, MemoryKind kind);
  static void WaitUntilUnused(const Buffer& buffer, Lock* lock);
  Buffer* Resolve(uint64_t address, uint64_t bytes, const char* action);
  bool UploadDirectly(Stream* stream, const uint8_t* from, uint64_t to, uint64_t bytes);
  bool DownloadDirectly(Stream* stream, uint64_t from, uint8_t* to, uint64_t bytes);
};

}  // namespace vulkan
}  // namespace mxforge

#endif  // MXFORGE_VULKAN_COPIER_H_
