/*!
 * \file pipelines.h
 * \brief The pipelines of one module on one device.
 */
#ifndef MXFORGE_VULKAN_PIPELINES_H_
#define MXFORGE_VULKAN_PIPELINES_H_

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core.h"
#include "module_format.h"
#include "pipeline_cache.h"

namespace mxforge {
namespace vulkan {

/*! \brief What the device lacks for a kernel, naming both; empty where it can run it. */
std::string WhyNot(const Core& core, const KernelInfo& kernel);

/*! \brief Throw an error that names the kernel and what the device lacks for it, if anything.
 *
 * A variant that the device cannot run is none that the host launches there.
 */
void CheckKernels(const Core& core, const std::vector<KernelInfo>& kernels);

/*! \brief Checks what the kernels require, then creates their pipelines, several at a time.
 *
 * Of variants that the device cannot run the driver gets to see nothing: some end the process where
 * they meet a matrix that they do not know. Kernels whose block size is known only at launch get a pipeline for each size when it comes.
 */
class Pipelines {
 public:
  using LocalSize = std::array<uint32_t, 3>;

  Pipelines(Core* core, PipelineCache* cache, const std::vector<KernelInfo>* kernels);
  ~Pipelines();
  Pipelines(const Pipelines&) = delete;
  Pipelines& operator=(const Pipelines&) = delete;

  VkPipeline Get(size_t kernel, const LocalSize& size);
  /*! \brief Destroy everything, of a lost device: there is nothing to get any more. */
  void GiveUp();
  VkPipelineLayout layout(size_t kernel) const { return prepared_[kernel].layout; }
  const std::string* name(size_t kernel) const { return prepared_[kernel].name; }

 private:
  struct Prepared {
    const std::string* name = nullptr;  // lives as long as the process
    VkPipelineLayout layout = VK_NULL_HANDLE;
    VkShaderModule shader = VK_NULL_HANDLE;  // kept where pipelines may still be made of it
    VkPipeline fixed = VK_NULL_HANDLE;
    std::vector<std::pair<LocalSize, VkPipeline>> by_size;
  };

  Core* core_;
  PipelineCache* cache_;
  const std::vector<KernelInfo>* kernels_;
  std::vector<Prepared> prepared_;
  std::map<uint32_t, VkPipelineLayout> layouts_;  // by bytes of push constants
  std::mutex mutex_;                              // over by_size

  void Destroy();
  VkPipelineLayout LayoutFor(uint32_t push_bytes);
  void CreateAll();
  VkPipeline Create(size_t kernel, const LocalSize& size);
};

}  // namespace vulkan
}  // namespace mxforge

#endif  // MXFORGE_VULKAN_PIPELINES_H_
