#include "pipeline_cache.h"

#include <cstdlib>
#include <cstring>
#include <fstream>

namespace mxforge {
namespace vulkan {
namespace {

namespace fs = std::filesystem;

constexpr char kFileMagic[8] = {'M', 'X', 'F', 'V', 'K', 'P', 'C', '1'};
constexpr std::chrono::seconds kBetweenSaves{10};
constexpr uint64_t kLargestFile = 256ULL << 20;

struct FileHeader {
  char magic[8];
  uint64_t bytes;
  uint64_t checksum;
};

/*! \brief FNV-1a: it is to notice damage, not malice. */
uint64_t Checksum(const uint8_t* data, size_t bytes) {
  uint64_t sum = 0xcbf29ce484222325ULL;
  for (size_t i = 0; i < bytes; ++i) sum = (sum ^ data[i]) * 0x100000001b3ULL;
  return sum;
}

fs::path CacheFolder() {
  const auto variable = [](const char* name) -> fs::path {
    const char* value = std::getenv(name);
    return value == nullptr ? "" : value;
  };
  if (fs::path chosen = variable("MXFORGE_CACHE_DIR"); !chosen.empty()) return chosen / "vulkan";
#if defined(_WIN32)
  const fs::path base = variable("LOCALAPPDATA");
#elif defined(__APPLE__)
  const fs::path home = variable("HOME");
  const fs::path base = home.empty() ? home : home / "Library" / "Caches";
#else
  fs::path base = variable("XDG_CACHE_HOME");
  const fs::path home = variable("HOME");
  if (base.empty() && !home.empty()) base = home / ".cache";
#endif
  return base.empty() ? base : base / "mxforge" / "vulkan";
}

std::string Hex(const uint8_t* data, size_t bytes) {
  const char* const digits = "0123456789abcdef";
  std::string text;
  for (size_t i = 0; i < bytes; ++i) {
    text += digits[data[i] >> 4];
    text += digits[data[i] & 15];
  }
  return text;
}

}  // namespace

PipelineCache::PipelineCache(Core* core) : core_(core) {
  const VkPhysicalDeviceProperties& properties = core_->physical.properties;
  std::vector<uint8_t> stored;
  try {
    const fs::path folder = CacheFolder();
    if (!folder.empty()) {
      // The UUID changes with the driver's version and build.
      path_ = folder / (Hex(properties.pipelineCacheUUID, VK_UUID_SIZE) + "-" +
                        std::to_string(properties.vendorID) + "-" +
                        std::to_string(properties.deviceID) + ".bin");
    }
    stored = Read();
  } catch (const std::exception&) {
    status_ = "unreadable";
  }
  auto info = Struct<VkPipelineCacheCreateInfo>(VK_STRUCTURE_TYPE_PIPELINE_CACHE_CREATE_INFO);
  info.initialDataSize = stored.size();
  info.pInitialData = stored.data();
  VkResult result = core_->call.CreatePipelineCache(core_->handle, &info, nullptr, &handle_);
  if (result != VK_SUCCESS && !stored.empty()) {
    status_ = "refused by the driver";
    info.initialDataSize = 0;
    result = core_->call.CreatePipelineCache(core_->handle, &info, nullptr, &handle_);
  }
  if (result != VK_SUCCESS) {  // pipelines can be made without
    handle_ = VK_NULL_HANDLE;
    status_ = "refused by the driver";
  }
  if (status_ == "loaded") loaded_bytes_ = known_bytes_ = stored.size();
}

std::vector<uint8_t> PipelineCache::Read() {
  if (path_.empty()) return {};
  std::error_code error;
  const uint64_t size = fs::file_size(path_, error);
  if (error) return {};
  status_ = "corrupt";
  if (size < sizeof(FileHeader) || size > kLargestFile) return {};
  std::ifstream file(path_, std::ios::binary);
  FileHeader header{};
  file.read(reinterpret_cast<char*>(&header), sizeof(header));
  std::vector<uint8_t> data(size - sizeof(FileHeader));
  file.read(reinterpret_cast<char*>(data.data()), static_cast<std::streamsize>(data.size()));
  if (!file || std::memcmp(header.magic, kFileMagic, sizeof(kFileMagic)) != 0 ||
      header.bytes != data.size() || header.checksum != Checksum(data.data(), data.size())) {
    return {};
  }
  if (!Fits(data)) {
    status_ = "foreign";
    return {};
  }
  status_ = "loaded";
  return data;
}

bool PipelineCache::Fits(const std::vector<uint8_t>& data) const {
  VkPipelineCacheHeaderVersionOne header{};
  if (data.size() < sizeof(header)) return false;
  std::memcpy(&header, data.data(), sizeof(header));
  const VkPhysicalDeviceProperties& properties = core_->physical.properties;
  return header.headerVersion == VK_PIPELINE_CACHE_HEADER_VERSION_ONE &&
         header.vendorID == properties.vendorID && header.deviceID == properties.deviceID &&
         std::memcmp(header.pipelineCacheUUID, properties.pipelineCacheUUID, VK_UUID_SIZE) == 0;
}

void PipelineCache::Save() noexcept {
  try {
    const std::lock_guard<std::mutex> lock(mutex_);
    Write();
  } catch (const std::exception&) {  // without a file the next process compiles again
  }
}

void PipelineCache::SaveInTime() noexcept {
  pending_.store(true);
  try {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock() || std::chrono::steady_clock::now() - saved_ < kBetweenSaves) return;
    Write();
  } catch (const std::exception&) {
  }
}

void PipelineCache::SaveAtExit() noexcept {
  if (pending_.load()) Save();
}

void PipelineCache::GiveUp() {
  const std::lock_guard<std::mutex> lock(mutex_);
  core_->call.DestroyPipelineCache(core_->handle, handle_, nullptr);
  handle_ = VK_NULL_HANDLE;
}

void PipelineCache::Write() {
  if (path_.empty() || handle_ == VK_NULL_HANDLE || core_->lost()) return;
  saved_ = std::chrono::steady_clock::now();
  pending_.store(false);
  ++saves_;
  size_t size = 0;
  if (core_->call.GetPipelineCacheData(core_->handle, handle_, &size, nullptr) != VK_SUCCESS ||
      size == known_bytes_ || size > kLargestFile) {
    return;
  }
  std::vector<uint8_t> data(size);
  if (core_->call.GetPipelineCacheData(core_->handle, handle_, &size, data.data()) != VK_SUCCESS) {
    return;
  }
  data.resize(size);
  known_bytes_ = size;
  FileHeader header{};
  std::memcpy(header.magic, kFileMagic, sizeof(kFileMagic));
  header.bytes = data.size();
  header.checksum = Checksum(data.data(), data.size());
  // Under a name of its own, then moved: readers see the old file or the new one, and of several
  // writers one wins.
  std::error_code error;
  fs::create_directories(path_.parent_path(), error);
  fs::path temporary = path_;
  temporary += "." + std::to_string(std::chrono::system_clock::now().time_since_epoch().count()) +
               "-" + std::to_string(reinterpret_cast<uintptr_t>(this) >> 4);
  {
    std::ofstream file(temporary, std::ios::binary | std::ios::trunc);
    file.write(reinterpret_cast<const char*>(&header), sizeof(header));
    file.write(reinterpret_cast<const char*>(data.data()),
               static_cast<std::streamsize>(data.size()));
    file.close();
    if (!file) {
      fs::remove(temporary, error);
      return;  // no folder, no right or no space: the next process compiles again
    }
  }
  fs::rename(temporary, path_, error);
  if (error) fs::remove(temporary, error);
}

}  // namespace vulkan
}  // namespace mxforge
