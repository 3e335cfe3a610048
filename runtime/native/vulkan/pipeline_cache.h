/*!
 * \file pipeline_cache.h
 * \brief The driver's VkPipelineCache, kept on disk between processes.
 */
#ifndef MXFORGE_VULKAN_PIPELINE_CACHE_H_
#define MXFORGE_VULKAN_PIPELINE_CACHE_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <mutex>
#include <string>
#include <vector>

#include "core.h"

namespace mxforge {
namespace vulkan {

/*! \brief A cache that can be missing, foreign, corrupt or unwritable without being an error.
 *
 * The file is $MXFORGE_CACHE_DIR/vulkan/<device>.bin, or lies in the platform's cache folder
 * under mxforge/. A checksum of ours stands before the driver's bytes: drivers are known to trust
 * what they are given.
 */
class PipelineCache {
 public:
  explicit PipelineCache(Core* core);

  /*! \brief May be used by several threads at once. */
  VkPipelineCache handle() const { return handle_; }

  /*! \brief Write it to disk if it has grown since it was read or written last. */
  void Save() noexcept;
  /*! \brief The same after a single pipeline: now if the last time is a while ago, else when the
   *  next one comes, or at the process's exit. */
  void SaveInTime() noexcept;
  void SaveAtExit() noexcept;
  /*! \brief Destroy what the driver holds of it, of a lost device. */
  void GiveUp();

  const std::filesystem::path& path() const { return path_; }
  /*! \brief "loaded", "absent" or what was wrong with the file. */
  const std::string& status() const { return status_; }
  uint64_t loaded_bytes() const { return loaded_bytes_; }
  /*! \brief Times that the driver was asked for all its data. */
  uint64_t saves() const { return saves_.load(); }

 private:
  Core* core_;
  VkPipelineCache handle_ = VK_NULL_HANDLE;
  std::filesystem::path path_;
  std::string status_ = "absent";
  uint64_t loaded_bytes_ = 0;
  uint64_t known_bytes_ = 0;  // size of the driver's data when it was last read or written
  std::mutex mutex_;
  std::chrono::steady_clock::time_point saved_;
  std::atomic<bool> pending_{false};  // pipelines were made since
  std::atomic<uint64_t> saves_{0};

  void Write();
  std::vector<uint8_t> Read();
  bool Fits(const std::vector<uint8_t>& data) const;
};

}  // namespace vulkan
}  // namespace mxforge

#endif  // MXFORGE_VULKAN_PIPELINE_CACHE_H_
