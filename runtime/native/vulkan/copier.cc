#include "copier.h"

#include <algorithm>
#include <cstring>

namespace mxforge {
namespace vulkan {

Copier::Copier(Core* core, Memory* memory, std::mutex* device_mutex)
    : core_(core), memory_(memory), device_mutex_(device_mutex) {}

void Copier::Provide(Ring* ring, MemoryKind kind) {
  const Lock lock(*device_mutex_);
  core_->EnsureAlive();
  const uint64_t bytes = core_->settings.staging_chunk_bytes;
  const bool fits =
      ring->chunks.size() == core_->settings.staging_chunks && ring->chunks[0]->size == bytes;
  if (fits) return;
  for (std::unique_ptr<Buffer>& chunk : ring->chunks) {  // of other settings
    std::vector<Use> uses = chunk->uses;
    memory_->Bury(std::move(chunk), std::move(uses));
  }
  ring->chunks.clear();
  while (ring->chunks.size() < core_->settings.staging_chunks) {
    ring->chunks.push_back(memory_->Create(bytes, kind));
  }
  ring->current = 0;
  ring->used = 0;
}

void Copier::GiveUp() {
  upload_.chunks.clear();
  download_.chunks.clear();
}

void Copier::WaitUntilUnused(const Buffer& buffer, Lock* lock) {
  const std::vector<Use> uses = buffer.uses;  // the lock is let go of meanwhile
  for (const Use& use : uses) {
    if (use.stream->Ended(use.any)) continue;
    use.stream->Submit();
    use.stream->Wait(use.any, lock);
  }
}

Buffer* Copier::Resolve(uint64_t address, uint64_t bytes, const char* action) {
  Buffer* buffer = memory_->Find(address);
  if (buffer == nullptr) {
    throw Failure(MXF_INVALID, "Cannot ", action, " address ", address, " of ", core_->Label(),
                  ": no tensor that is still alive has memory there.");
  }
  const uint64_t offset = address - buffer->address;
  if (bytes > buffer->size - offset) {
    throw Failure(MXF_INVALID, "Cannot ", action, " ", bytes, " bytes at offset ", offset,
                  " of an allocation of ", buffer->size, " bytes on ", core_->Label(), ".");
  }
  return buffer;
}

bool Copier::UploadDirectly(Stream* stream, const uint8_t* from, uint64_t to, uint64_t bytes) {
  uint8_t* target = nullptr;
  {
    const Lock lock(*device_mutex_);
    core_->EnsureAlive();
    Buffer* buffer = Resolve(to, bytes, "write to");
    if (buffer->mapped == nullptr || !core_->settings.direct_copies) return false;
    const uint64_t begin = to - buffer->address;
    const Access access{buffer->resource, true, begin, begin + bytes};
    // Only where nothing has to be waited for: recording a copy is cheaper than waiting.
    for (const Use& use : buffer->uses) {
      if (!use.stream->Ended(use.any) || !use.stream->hazards.HostReady(access)) return false;
      if (use.written != 0 && !use.stream->Ended(use.stream->host_barrier())) return false;
    }
    stream->hazards.Host(access, "write by the host");
    core_->statistics.direct_bytes += bytes;
    target = buffer->mapped + begin;
  }
  std::memcpy(target, from, bytes);
  return true;
}

void Copier::Upload(Stream* stream, const uint8_t* from, uint64_t to, uint64_t bytes) {
  if (bytes == 0 || UploadDirectly(stream, from, to, bytes)) return;
  const std::lock_guard<std::mutex> one_at_a_time(upload_.mutex);
  Provide(&upload_, MemoryKind::kUpload);
  for (uint64_t done = 0; done < bytes;) {
    Buffer* chunk = upload_.chunks[upload_.current].get();
    if (upload_.used >= chunk->size) {
      upload_.current = (upload_.current + 1) % upload_.chunks.size();
      upload_.used = 0;
      chunk = upload_.chunks[upload_.current].get();
      Lock lock(*device_mutex_);
      WaitUntilUnused(*chunk, &lock);
    }
    const uint64_t part = std::min(bytes - done, chunk->size - upload_.used);
    std::memcpy(chunk->mapped + upload_.used, from + done, part);  // the device copies meanwhile
    const Lock lock(*device_mutex_);
    Buffer* buffer = Resolve(to, bytes, "write to");
    stream->hazards.Host({chunk->resource, true, upload_.used, upload_.used + part},
                         "fill staging");
    stream->Copy(chunk, upload_.used, buffer, to - buffer->address + done, part, "upload");
    core_->statistics.staged_bytes += part;
    done += part;
    upload_.used += (part + 15) / 16 * 16;
    if (upload_.used >= chunk->size) stream->Submit();
  }
}

bool Copier::DownloadDirectly(Stream* stream, uint64_t from, uint8_t* to, uint64_t bytes) {
  const uint8_t* source = nullptr;
  {
    Lock lock(*device_mutex_);
    core_->EnsureAlive();
    Buffer* buffer = Resolve(from, bytes, "read");
    if (!buffer->cached || !core_->settings.direct_copies) return false;
    const auto touched = [&]() -> Access {
      const uint64_t begin = from - buffer->address;
      return {buffer->resource, false, begin, begin + bytes};
    };
    const std::vector<Use> uses = buffer->uses;
    for (const Use& use : uses) {
      const Access access = touched();
      // Also for the barrier, where another thread has recorded it and may be waiting for it.
      const uint64_t barrier = use.stream->PrepareHost(buffer, access);
      const uint64_t value = use.written == 0 ? 0 : std::max(use.written, barrier);
      if (use.stream->Ended(value)) continue;
      use.stream->Submit();
      use.stream->Wait(value, &lock);
      // The mutex was let go of meanwhile: the tensor may be gone, with another in its place.
      buffer = Resolve(from, bytes, "read");
      if (!buffer->cached) return false;
    }
    stream->hazards.Host(touched(), "read by the host");
    core_->statistics.direct_bytes += bytes;
    source = buffer->mapped + (from - buffer->address);
  }
  std::memcpy(to, source, bytes);
  return true;
}

void Copier::Download(Stream* stream, uint64_t from, uint8_t* to, uint64_t bytes) {
  if (bytes == 0 || DownloadDirectly(stream, from, to, bytes)) return;
  const std::lock_guard<std::mutex> one_at_a_time(download_.mutex);
  Provide(&download_, MemoryKind::kReadback);
  const uint64_t size = download_.chunks[0]->size;
  const size_t parts = (bytes + size - 1) / size;
  std::vector<uint64_t> values(parts);
  size_t issued = 0;
  for (size_t drained = 0; drained < parts; ++drained) {
    // The device copies ahead into the other chunks while the host empties this one.
    for (; issued < parts && issued - drained < download_.chunks.size(); ++issued) {
      Buffer* chunk = download_.chunks[issued % download_.chunks.size()].get();
      const uint64_t part = std::min(size, bytes - issued * size);
      const Lock lock(*device_mutex_);
      Buffer* buffer = Resolve(from, bytes, "read");
      stream->Copy(buffer, from - buffer->address + issued * size, chunk, 0, part, "download");
      stream->PrepareHost(chunk, {chunk->resource, false, 0, part});
      core_->statistics.staged_bytes += part;
      values[issued] = stream->Submit();
    }
    const Buffer& chunk = *download_.chunks[drained % download_.chunks.size()];
    const uint64_t part = std::min(size, bytes - drained * size);
    {
      Lock lock(*device_mutex_);
      stream->Wait(values[drained], &lock);
      stream->hazards.Host({chunk.resource, false, 0, part}, "empty staging");
    }
    std::memcpy(to + drained * size, chunk.mapped, part);
  }
}

void Copier::Fetch(Stream* stream, uint64_t from, uint8_t* to, uint64_t bytes) {
  if (bytes == 0) return;
  const Lock lock(*device_mutex_);
  core_->EnsureAlive();
  Buffer* buffer = Resolve(from, bytes, "read");
  Buffer* host = memory_->FindHost(to);
  const uint64_t at = host == nullptr ? 0 : static_cast<uint64_t>(to - host->mapped);
  if (host == nullptr || bytes > host->size - at) {
    throw Failure(MXF_INVALID, "Copies from ", core_->Label(),
                  " go to memory of the host that was allocated for them.");
  }
  stream->Copy(buffer, from - buffer->address, host, at, bytes, "fetch");
  stream->PrepareHost(host, {host->resource, false, at, at + bytes});
}

void Copier::Within(Stream* stream, uint64_t from, uint64_t to, uint64_t bytes) {
  if (bytes == 0 || from == to) return;
  const Lock lock(*device_mutex_);
  core_->EnsureAlive();
  Buffer* source = Resolve(from, bytes, "read");
  Buffer* target = Resolve(to, bytes, "write to");
  const uint64_t source_offset = from - source->address;
  const uint64_t target_offset = to - target->address;
  const bool overlap = source == target && from < to + bytes && to < from + bytes;
  if (!overlap) {
    stream->Copy(source, source_offset, target, target_offset, bytes, "copy");
    return;
  }
  // vkCmdCopyBuffer has no memmove: go through another buffer.
  std::shared_ptr<Buffer> between = memory_->Create(bytes, MemoryKind::kDevice);
  source = Resolve(from, bytes, "read");
  stream->Copy(source, source_offset, between.get(), 0, bytes, "copy");
  stream->Copy(between.get(), 0, source, target_offset, bytes, "copy");
  std::vector<Use> uses = between->uses;
  memory_->Bury(std::move(between), std::move(uses));
}

}  // namespace vulkan
}  // namespace mxforge
