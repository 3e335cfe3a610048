/*!
 * \file memory.h
 * \brief Buffers with device addresses, found again by address, freed behind pending commands.
 *
 * Drivers bound the number of allocations (often to 4096), and each takes long: small tensors share
 * blocks. Above this file nobody notices: a tensor is a Buffer of its own, whatever it lies in.
 */
#ifndef MXFORGE_VULKAN_MEMORY_H_
#define MXFORGE_VULKAN_MEMORY_H_

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "core.h"
#include "free_list.h"

namespace mxforge {
namespace vulkan {

class Memory;
class Stream;

enum class MemoryKind {
  kDevice,    // tensors
  kUpload,    // written by the host, read by the device: staging, argument blocks
  kReadback,  // written by the device, read by the host
};

/*! \brief Types of memory for buffers of a kind, best first; the next is for when one is full.
 *
 * `unified` is for devices whose memory is the host's own: there any of it serves tensors. On
 * others only what is local to the device does, if there is such a thing.
 */
std::vector<uint32_t> MemoryTypes(const VkPhysicalDeviceMemoryProperties& memory, bool unified,
                                  MemoryKind kind);

/*! \brief Up to which value of a stream's timeline something is in use. */
struct Use {
  Stream* stream;    // never destroyed
  uint64_t any;      // read or written
  uint64_t written;  // 0: only read
};

/*! \brief A VkBuffer over memory of its own: for one buffer, or for many tensors. */
class Block {
 public:
  Block(Memory* memory, uint64_t bytes, MemoryKind kind);
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  const uint64_t size;
  uint64_t address = 0;
  uint8_t* mapped = nullptr;  // null where the host cannot reach it, or not without flushing
  bool cached = false;        // mapped, and the host reads it at its usual speed
  VkBuffer handle = VK_NULL_HANDLE;
  std::optional<FreeList> free;  // of a block for many

 private:
  Memory* memory_;
  VkDeviceMemory backing_ = VK_NULL_HANDLE;

  /*! \brief Memory of the first type that has room. */
  VkResult AllocateBacking(const std::vector<uint32_t>& types, uint64_t bytes, uint32_t* type);
  void Release();
};

/*! \brief A tensor, or memory of the runtime's own: a whole block or a part of one. */
class Buffer {
 public:
  Buffer(Memory* memory, std::shared_ptr<Block> block, uint64_t offset, uint64_t bytes);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  const uint64_t size;
  const uint64_t offset;  // in `handle`
  const uint64_t address;
  uint8_t* const mapped;  // as in Block
  const bool cached;
  const VkBuffer handle;
  const uint32_t resource;  // its number in the hazard trackers
  std::vector<Use> uses;    // by stream; as a rule there is one

  void Mark(Stream* stream, uint64_t value, bool write);

 private:
  Memory* memory_;
  std::shared_ptr<Block> block_;
};

/*! \brief All buffers of a device. The device's mutex is held whenever this is called. */
class Memory {
 public:
  explicit Memory(Core* core);

  /*! \brief Called when memory is short: bring all commands to an end and Collect. True where a
   *  command is being recorded, whose batch must stay as it is. */
  void SetReclaim(std::function<void(bool)> reclaim) { reclaim_ = std::move(reclaim); }
  /*! \brief Called with the number of a buffer that is no more. */
  void SetForget(std::function<void(uint32_t)> forget) { forget_ = std::move(forget); }

  /*! \brief A tensor's memory; throws an error that names what was asked and what is left. */
  Buffer* Allocate(uint64_t bytes, uint64_t alignment);
  /*! \brief Memory that the host reads, and copies go to: `mapped` is there, and `address` finds
   *  it as it does tensors. */
  Buffer* AllocateHost(uint64_t bytes);
  /*! \brief Free either once pending commands are done with it. */
  void Free(uint64_t address);
  /*! \brief The buffer that holds this address, or null. */
  Buffer* Find(uint64_t address);
  /*! \brief The buffer of AllocateHost that holds this byte, or null. */
  Buffer* FindHost(const uint8_t* mapped);

  /*! \brief A buffer that is not a tensor. */
  std::unique_ptr<Buffer> Create(uint64_t bytes, MemoryKind kind);

  /*! \brief Keep something alive until these uses have ended. */
  void Bury(std::shared_ptr<void> remains, std::vector<Use> uses);
  /*! \brief Let go of what is in use no longer. */
  void Collect();
  /*! \brief Free all that is left of a lost device without tensors. */
  void GiveUp();

  /*! \brief How many tensors were freed: an address may be another's afterwards. */
  uint64_t frees() const { return frees_; }

  size_t live() const { return live_.size(); }
  size_t blocks() const { return blocks_.size(); }
  size_t buried() const { return graves_.size(); }

  /*! \brief For tests: the next so many allocations find no memory. */
  uint32_t failures_to_simulate = 0;
  /*! \brief Allocations that may exist at once (maxMemoryAllocationCount). */
  uint64_t allocation_limit = 0;
  uint64_t allocations = 0;  // that exist

  Core& core() { return *core_; }
  std::vector<uint32_t> TypesFor(uint32_t allowed_types, MemoryKind kind) const;
  VkMemoryPropertyFlags Properties(uint32_t type) const;
  uint64_t HeapBytes(uint32_t type) const;
  uint32_t AcquireResource();
  void ReleaseResource(uint32_t resource);
  /*! \brief What a buffer had of its block is free again. */
  void GiveBack(Block* block, uint64_t offset, uint64_t bytes);

 private:
  struct Grave {
    std::vector<Use> uses;
    std::shared_ptr<void> remains;
  };

  Core* core_;
  const uint64_t granularity_;  // of parts of blocks: what any tensor's address is aligned to
  std::vector<std::shared_ptr<Block>> blocks_;        // for many
  std::map<uint64_t, std::unique_ptr<Buffer>> live_;  // by address
  std::map<const uint8_t*, Buffer*> host_;            // of AllocateHost, by its first byte
  std::array<Buffer*, 64> recent_{};  // where an address was found last, by its hash
  std::vector<Grave> graves_;
  std::vector<uint32_t> free_resources_;
  uint32_t resources_ = 0;
  uint64_t frees_ = 0;
  std::function<void(bool)> reclaim_;
  std::function<void(uint32_t)> forget_;

  Buffer* Keep(std::unique_ptr<Buffer> buffer);
  uint64_t Rounded(uint64_t bytes) const;
  /*! \brief The size of the next block. */
  uint64_t BlockBytes() const;
  /*! \brief A buffer in a block of many; null where it is too large, or no block can be had. */
  std::unique_ptr<Buffer> Part(uint64_t bytes);
  std::unique_ptr<Buffer> Alone(uint64_t bytes, MemoryKind kind);
  std::unique_ptr<Buffer> Try(uint64_t bytes, MemoryKind kind, bool alone);
  std::unique_ptr<Buffer> TryTwice(uint64_t bytes, MemoryKind kind, bool alone);
  void FreeEmptyBlocks(size_t kept);
};

}  // namespace vulkan
}  // namespace mxforge

#endif  // MXFORGE_VULKAN_MEMORY_H_
