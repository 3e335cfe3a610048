#include "memory.h"

#include <algorithm>
#include <new>

#include "stream.h"

namespace mxforge {
namespace vulkan {
namespace {

constexpr uint64_t kAlignment = 64;      // of tensors: what compilers count on
constexpr uint64_t kBlocksOfAHeap = 16;  // at least: a block that is hardly used wastes little
constexpr uint64_t kPartsOfABlock = 8;   // at least: larger tensors have memory of their own

/*! \brief Internal to this file: the driver had no memory; tried again before anybody hears. */
struct OutOfMemory {
  VkResult result;
};

size_t Slot(uint64_t address) { return (address >> 6 ^ address >> 12 ^ address >> 21) % 64; }

}  // namespace

Block::Block(Memory* memory, uint64_t bytes, MemoryKind kind) : size(bytes), memory_(memory) {
  Core& core = memory_->core();
  try {
    auto info = Struct<VkBufferCreateInfo>(VK_STRUCTURE_TYPE_BUFFER_CREATE_INFO);
    info.size = bytes;
    info.usage = VK_BUFFER_USAGE_STORAGE_BUFFER_BIT | VK_BUFFER_USAGE_TRANSFER_SRC_BIT |
                 VK_BUFFER_USAGE_TRANSFER_DST_BIT | VK_BUFFER_USAGE_SHADER_DEVICE_ADDRESS_BIT;
    info.sharingMode = VK_SHARING_MODE_EXCLUSIVE;
    VkResult result = core.call.CreateBuffer(core.handle, &info, nullptr, &handle);
    if (IsOutOfMemory(result)) throw OutOfMemory{result};
    core.Check(result, "vkCreateBuffer");

    VkMemoryRequirements needed;
    core.call.GetBufferMemoryRequirements(core.handle, handle, &needed);
    uint32_t type = 0;
    result = AllocateBacking(memory_->TypesFor(needed.memoryTypeBits, kind), needed.size, &type);
    if (IsOutOfMemory(result)) throw OutOfMemory{result};
    core.Check(result, "vkAllocateMemory");
    core.Check(core.call.BindBufferMemory(core.handle, handle, backing_, 0), "vkBindBufferMemory");

    // Nothing here flushes or invalidates, so that the host keeps off what is not coherent.
    constexpr VkMemoryPropertyFlags kShared =
        VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT | VK_MEMORY_PROPERTY_HOST_COHERENT_BIT;
    const VkMemoryPropertyFlags properties = memory_->Properties(type);
    if ((properties & kShared) == kShared &&
        (kind != MemoryKind::kDevice || core.physical.IsUnified())) {
      void* pointer = nullptr;
      result = core.call.MapMemory(core.handle, backing_, 0, VK_WHOLE_SIZE, 0, &pointer);
      core.Check(result, "vkMapMemory");
      mapped = static_cast<uint8_t*>(pointer);
      cached = (properties & VK_MEMORY_PROPERTY_HOST_CACHED_BIT) != 0;
    }
    auto where = Struct<VkBufferDeviceAddressInfo>(VK_STRUCTURE_TYPE_BUFFER_DEVICE_ADDRESS_INFO);
    where.buffer = handle;
    address = core.call.GetBufferDeviceAddress(core.handle, &where);
  } catch (...) {
    Release();
    throw;
  }
  core.statistics.reserved_bytes += size;
}

Block::~Block() {
  memory_->core().statistics.reserved_bytes -= size;
  Release();
}

VkResult Block::AllocateBacking(const std::vector<uint32_t>& types, uint64_t bytes,
                                uint32_t* type) {
  if (memory_->failures_to_simulate > 0) {
    --memory_->failures_to_simulate;
    return VK_ERROR_OUT_OF_DEVICE_MEMORY;
  }
  if (memory_->allocations >= memory_->allocation_limit) return VK_ERROR_TOO_MANY_OBJECTS;
  Core& core = memory_->core();
  auto flags = Struct<VkMemoryAllocateFlagsInfo>(VK_STRUCTURE_TYPE_MEMORY_ALLOCATE_FLAGS_INFO);
  flags.flags = VK_MEMORY_ALLOCATE_DEVICE_ADDRESS_BIT;
  auto info = Struct<VkMemoryAllocateInfo>(VK_STRUCTURE_TYPE_MEMORY_ALLOCATE_INFO);
  info.pNext = &flags;
  info.allocationSize = bytes;
  VkResult result = VK_ERROR_OUT_OF_DEVICE_MEMORY;
  for (uint32_t each : types) {
    *type = info.memoryTypeIndex = each;
    if (bytes > memory_->HeapBytes(each)) continue;  // which may not even be asked for
    result = core.call.AllocateMemory(core.handle, &info, nullptr, &backing_);
    if (!IsOutOfMemory(result)) break;
  }
  if (result == VK_SUCCESS) ++memory_->allocations;
  return result;
}

void Block::Release() {
  Core& core = memory_->core();
  if (handle != VK_NULL_HANDLE) core.call.DestroyBuffer(core.handle, handle, nullptr);
  if (backing_ == VK_NULL_HANDLE) return;
  core.call.FreeMemory(core.handle, backing_, nullptr);
  --memory_->allocations;
}

Buffer::Buffer(Memory* memory, std::shared_ptr<Block> block, uint64_t at, uint64_t bytes)
    : size(bytes),
      offset(at),
      address(block->address + at),
      mapped(block->mapped == nullptr ? nullptr : block->mapped + at),
      cached(block->cached),
      handle(block->handle),
      resource(memory->AcquireResource()),
      memory_(memory),
      block_(std::move(block)) {
  Statistics& statistics = memory_->core().statistics;
  ++statistics.allocations;
  statistics.allocated_bytes += size;
}

Buffer::~Buffer() {
  memory_->ReleaseResource(resource);
  memory_->core().statistics.allocated_bytes -= size;
  memory_->GiveBack(block_.get(), offset, size);
}

void Buffer::Mark(Stream* stream, uint64_t value, bool write) {
  for (Use& use : uses) {
    if (use.stream != stream) continue;
    use.any = value;
    if (write) use.written = value;
    return;
  }
  uses.push_back({stream, value, write ? value : 0});
}

Memory::Memory(Core* core)
    : allocation_limit(core->physical.limits.maxMemoryAllocationCount),
      core_(core),
      granularity_(std::max<uint64_t>({kAlignment,
                                       core->physical.limits.minStorageBufferOffsetAlignment,
                                       core->physical.limits.nonCoherentAtomSize})) {
  // The validation layers know where a VkBuffer ends, not where a tensor does.
  if (Instance::Get().HasMessenger()) core_->settings.block_bytes = 0;
}

uint32_t Memory::AcquireResource() {
  if (free_resources_.empty()) return resources_++;
  const uint32_t resource = free_resources_.back();
  free_resources_.pop_back();
  return resource;
}

void Memory::ReleaseResource(uint32_t resource) {
  if (forget_) forget_(resource);
  free_resources_.push_back(resource);
}

VkMemoryPropertyFlags Memory::Properties(uint32_t type) const {
  return core_->physical.memory.memoryTypes[type].propertyFlags;
}

uint64_t Memory::HeapBytes(uint32_t type) const {
  const VkPhysicalDeviceMemoryProperties& memory = core_->physical.memory;
  return memory.memoryHeaps[memory.memoryTypes[type].heapIndex].size;
}

std::vector<uint32_t> MemoryTypes(const VkPhysicalDeviceMemoryProperties& memory, bool unified,
                                  MemoryKind kind) {
  constexpr VkMemoryPropertyFlags kLocal = VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT;
  constexpr VkMemoryPropertyFlags kVisible = VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT;
  constexpr VkMemoryPropertyFlags kCoherent = VK_MEMORY_PROPERTY_HOST_COHERENT_BIT;
  constexpr VkMemoryPropertyFlags kCached = VK_MEMORY_PROPERTY_HOST_CACHED_BIT;
  constexpr VkMemoryPropertyFlags kKnown = kLocal | kVisible | kCoherent | kCached;
  constexpr VkMemoryPropertyFlags kShared = kVisible | kCoherent;
  struct Wish {
    VkMemoryPropertyFlags with;
    VkMemoryPropertyFlags without;
  };
  std::vector<Wish> wishes;
  switch (kind) {
    case MemoryKind::kDevice:
      if (unified) {
        wishes = {{kLocal | kShared | kCached, 0}, {kLocal | kShared, 0},
                  {kShared | kCached, 0},          {kLocal, 0},
                  {kShared, 0}};
      } else {
        // Local memory that the host sees too is scarce as a rule: last of what is local.
        wishes = {{kLocal, kVisible}, {kLocal, 0}};
      }
      break;
    case MemoryKind::kUpload:  // staging in local memory would take from what tensors could use
      wishes = {{kShared, kLocal}, {kShared, 0}};
      break;
    case MemoryKind::kReadback:
      wishes = {{kShared | kCached, kLocal}, {kShared | kCached, 0}, {kShared, kLocal},
                {kShared, 0}};
      break;
  }
  std::vector<uint32_t> types;
  const auto add = [&](const Wish& wish) {
    for (uint32_t type = 0; type < memory.memoryTypeCount; ++type) {
      const VkMemoryPropertyFlags flags = memory.memoryTypes[type].propertyFlags;
      // Protected, lazily allocated or AMD's uncached memory is for those who enabled it.
      if ((flags & ~kKnown) != 0) continue;
      if ((flags & wish.with) != wish.with || (flags & wish.without) != 0) continue;
      if (std::find(types.begin(), types.end(), type) == types.end()) types.push_back(type);
    }
  };
  for (const Wish& wish : wishes) add(wish);
  if (kind == MemoryKind::kDevice && types.empty()) add({0, 0});
  return types;
}

std::vector<uint32_t> Memory::TypesFor(uint32_t allowed_types, MemoryKind kind) const {
  std::vector<uint32_t> types =
      MemoryTypes(core_->physical.memory, core_->physical.IsUnified(), kind);
  types.erase(std::remove_if(types.begin(), types.end(),
                             [&](uint32_t type) { return (allowed_types >> type & 1) == 0; }),
              types.end());
  if (types.empty()) {
    throw Failure(MXF_TARGET, core_->Label(), " has no memory of a kind that buffers need.");
  }
  return types;
}

uint64_t Memory::Rounded(uint64_t bytes) const {
  return (bytes + granularity_ - 1) / granularity_ * granularity_;
}

uint64_t Memory::BlockBytes() const {
  const PhysicalDevice& physical = core_->physical;
  const uint64_t heap = HeapBytes(TypesFor(UINT32_MAX, MemoryKind::kDevice).front());
  const uint64_t bytes = std::min({core_->settings.block_bytes, heap / kBlocksOfAHeap,
                                   physical.max_allocation_bytes, physical.max_buffer_bytes});
  return bytes / granularity_ * granularity_;
}

std::unique_ptr<Buffer> Memory::Part(uint64_t bytes) {
  const uint64_t block_bytes = BlockBytes();
  if (Rounded(bytes) > block_bytes / kPartsOfABlock) return nullptr;
  const auto part = [&](const std::shared_ptr<Block>& block) -> std::unique_ptr<Buffer> {
    const std::optional<uint64_t> offset = block->free->Take(Rounded(bytes));
    return offset ? std::make_unique<Buffer>(this, block, *offset, bytes) : nullptr;
  };
  for (const std::shared_ptr<Block>& block : blocks_) {
    if (std::unique_ptr<Buffer> buffer = part(block)) return buffer;
  }
  try {
    blocks_.push_back(std::make_shared<Block>(this, block_bytes, MemoryKind::kDevice));
  } catch (const OutOfMemory&) {
    return nullptr;
  }
  blocks_.back()->free.emplace(block_bytes);
  return part(blocks_.back());
}

std::unique_ptr<Buffer> Memory::Alone(uint64_t bytes, MemoryKind kind) {
  return std::make_unique<Buffer>(this, std::make_shared<Block>(this, bytes, kind), 0, bytes);
}

void Memory::GiveBack(Block* block, uint64_t offset, uint64_t bytes) {
  if (!block->free) return;  // it goes with its only buffer
  block->free->GiveBack(offset, Rounded(bytes));
  // One is kept, or a tensor that comes and goes would cost an allocation each time.
  if (block->free->IsWhole()) FreeEmptyBlocks(1);
}

void Memory::FreeEmptyBlocks(size_t kept) {
  const auto surplus = [&kept](const std::shared_ptr<Block>& block) {
    if (!block->free->IsWhole()) return false;
    if (kept == 0) return true;
    --kept;
    return false;
  };
  for (auto block = blocks_.begin(); block != blocks_.end();) {
    block = surplus(*block) ? blocks_.erase(block) : std::next(block);
  }
}

std::unique_ptr<Buffer> Memory::Try(uint64_t bytes, MemoryKind kind, bool alone) {
  if (kind == MemoryKind::kDevice && !alone) {
    if (std::unique_ptr<Buffer> part = Part(bytes)) return part;
  }
  return Alone(bytes, kind);  // also where there is no memory for another block, but for this
}

std::unique_ptr<Buffer> Memory::TryTwice(uint64_t bytes, MemoryKind kind, bool alone) {
  try {
    return Try(bytes, kind, alone);
  } catch (const OutOfMemory&) {
    // What is freed but still in use may be what is missing.
  }
  ++core_->statistics.reclaims;
  reclaim_(kind != MemoryKind::kDevice);
  FreeEmptyBlocks(0);
  try {
    return Try(bytes, kind, alone);
  } catch (const OutOfMemory& failure) {
    if (allocations >= allocation_limit) {
      throw Failure(MXF_MEMORY, core_->Label(), " allows ", allocation_limit,
                    " allocations at once (maxMemoryAllocationCount), and this process has as "
                    "many; use fewer, larger tensors, or a smaller model, batch or context.");
    }
    const uint64_t available = Instance::Get().AvailableBytes(core_->physical);
    throw Failure(MXF_MEMORY, core_->Label(), " is out of memory (", ResultName(failure.result),
                  "): ", bytes, " bytes (", HumanBytes(bytes), ") were asked for, about ",
                  available, " bytes (", HumanBytes(available), ") are available and ",
                  HumanBytes(core_->statistics.reserved_bytes),
                  " are in use by this process; use a smaller model, batch or context.");
  }
}

std::unique_ptr<Buffer> Memory::Create(uint64_t bytes, MemoryKind kind) {
  return TryTwice(bytes, kind, false);
}

Buffer* Memory::Allocate(uint64_t bytes, uint64_t alignment) {
  const PhysicalDevice& physical = core_->physical;
  uint64_t heap = 0;
  for (uint32_t type : TypesFor(UINT32_MAX, MemoryKind::kDevice)) {
    heap = std::max(heap, HeapBytes(type));
  }
  const std::pair<uint64_t, const char*> limits[] = {
      {heap, "its largest heap"},
      {physical.max_allocation_bytes, "one allocation (maxMemoryAllocationSize)"},
      {physical.max_buffer_bytes, "one buffer (maxBufferSize)"},
  };
  for (const auto& [limit, what] : limits) {
    if (bytes <= limit) continue;
    const uint64_t available = Instance::Get().AvailableBytes(physical);
    throw Failure(MXF_MEMORY, core_->Label(), " cannot allocate ", bytes, " bytes (",
                  HumanBytes(bytes), ") at once: ", what, " holds ", limit, " bytes (",
                  HumanBytes(limit), "), of ", available, " bytes (", HumanBytes(available),
                  ") available; split the tensor or use another device.");
  }
  Collect();
  // Whole 16 bytes, at least once: an empty tensor has an address too.
  const uint64_t rounded = std::max<uint64_t>((bytes + 15) / 16 * 16, 16);
  std::unique_ptr<Buffer> buffer = TryTwice(rounded, MemoryKind::kDevice, alignment > granularity_);
  if (alignment != 0 && buffer->address % alignment != 0) {
    throw Failure(MXF_TARGET, core_->Label(), " aligns memory to less than the ", alignment,
                  " bytes asked for (address ", buffer->address,
                  "); no kernel can rely on its vector loads there.");
  }
  return Keep(std::move(buffer));
}

Buffer* Memory::AllocateHost(uint64_t bytes) {
  Collect();
  Buffer* made = Keep(Create(std::max<uint64_t>(bytes, 16), MemoryKind::kReadback));
  host_.emplace(made->mapped, made);
  return made;
}

Buffer* Memory::Keep(std::unique_ptr<Buffer> buffer) {
  Buffer* kept = buffer.get();
  live_.emplace(kept->address, std::move(buffer));
  return kept;
}

void Memory::Free(uint64_t address) {
  const auto found = live_.find(address);
  if (found == live_.end()) return;  // nobody could do anything about it in a destructor
  std::shared_ptr<Buffer> buffer = std::move(found->second);
  live_.erase(found);
  ++frees_;
  if (const auto host = host_.find(buffer->mapped);
      host != host_.end() && host->second == buffer.get()) {
    host_.erase(host);
  }
  recent_.fill(nullptr);
  std::vector<Use> uses = std::move(buffer->uses);
  Bury(std::move(buffer), std::move(uses));
}

Buffer* Memory::Find(uint64_t address) {
  Buffer*& recent = recent_[Slot(address)];
  if (recent != nullptr && address - recent->address < recent->size) return recent;
  auto after = live_.upper_bound(address);
  if (after == live_.begin()) return nullptr;
  Buffer* buffer = std::prev(after)->second.get();
  if (address - buffer->address >= buffer->size) return nullptr;
  recent = buffer;
  return buffer;
}

Buffer* Memory::FindHost(const uint8_t* mapped) {
  auto after = host_.upper_bound(mapped);
  if (after == host_.begin()) return nullptr;
  Buffer* buffer = std::prev(after)->second;
  return static_cast<uint64_t>(mapped - buffer->mapped) < buffer->size ? buffer : nullptr;
}

void Memory::Bury(std::shared_ptr<void> remains, std::vector<Use> uses) {
  const bool idle = std::all_of(uses.begin(), uses.end(),
                                [](const Use& use) { return use.stream->Ended(use.any); });
  if (idle || core_->lost()) return;  // `remains` goes with the scope
  ++core_->statistics.deferred_frees;
  graves_.push_back({std::move(uses), std::move(remains)});
}

void Memory::Collect() {
  graves_.erase(std::remove_if(graves_.begin(), graves_.end(),
                               [](const Grave& grave) {
                                 return std::all_of(
                                     grave.uses.begin(), grave.uses.end(),
                                     [](const Use& use) { return use.stream->Ended(use.any); });
                               }),
                graves_.end());
}

void Memory::GiveUp() {
  graves_.clear();
  FreeEmptyBlocks(0);
}

}  // namespace vulkan
}  // namespace mxforge
