#include "pipelines.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <set>
#include <thread>

namespace mxforge {
namespace vulkan {
namespace {

constexpr uint32_t kMostThreads = 8;

/*! \brief Names outlive their module: timestamps are read after it may be gone. */
const std::string* Intern(const std::string& name) {
  static auto* const mutex = new std::mutex();
  static auto* const names = new std::set<std::string>();
  const std::lock_guard<std::mutex> lock(*mutex);
  return &*names->insert(name).first;
}

/*! \brief Throw what is wrong, if anything. */
void Require(const std::string& why_not) {
  if (!why_not.empty()) throw Error(MXF_TARGET, why_not);
}

/*! \brief Why blocks of this size do not run; empty where they do. */
std::string WrongSize(const Core& core, const KernelInfo& kernel,
                      const Pipelines::LocalSize& size) {
  const PhysicalDevice& device = core.physical;
  const VkPhysicalDeviceLimits& limits = device.limits;
  const std::string subject = "Kernel " + kernel.name + " has blocks of ";
  uint64_t threads = 1;
  for (int axis = 0; axis < 3; ++axis) {
    threads *= size[axis];
    if (size[axis] <= limits.maxComputeWorkGroupSize[axis]) continue;
    return subject + std::to_string(size[axis]) + " threads in " + "xyz"[axis] +
           ", more than the " + std::to_string(limits.maxComputeWorkGroupSize[axis]) + " that " +
           core.Label() + " allows; use smaller blocks.";
  }
  if (threads > limits.maxComputeWorkGroupInvocations) {
    return subject + std::to_string(threads) + " threads, more than the " +
           std::to_string(limits.maxComputeWorkGroupInvocations) + " that " + core.Label() +
           " allows; use smaller blocks.";
  }
  const uint32_t lanes = kernel.subgroup_size != 0 ? kernel.subgroup_size : device.subgroup_size;
  if (kernel.full_subgroups && size[0] % lanes != 0) {
    return subject + std::to_string(size[0]) +
           " threads in x, but needs full subgroups, a multiple of " + std::to_string(lanes) +
           " threads on " + core.Label() + ".";
  }
  const uint64_t subgroups = device.max_workgroup_subgroups;
  if (kernel.subgroup_size != 0 && subgroups != 0 && threads > subgroups * kernel.subgroup_size) {
    return subject + std::to_string(threads) + " threads, more than " +
           std::to_string(subgroups) + " subgroups of " + std::to_string(kernel.subgroup_size) +
           ", the most that " + core.Label() + " allows; use smaller blocks.";
  }
  return "";
}

/*! \brief What the device lacks, with commas between. */
std::string Missing(const Core& core, const KernelInfo& kernel) {
  const PhysicalDevice& device = core.physical;
  std::string missing;
  const auto miss = [&missing](const std::string& what) {
    missing += (missing.empty() ? "" : ", ") + what;
  };
  for (const std::string& name : kernel.features) {
    if (device.features.count(name) != 0) continue;
    const auto& table = FeatureTable();
    const bool known = std::any_of(table.begin(), table.end(),
                                   [&](const Feature& each) { return name == each.name; });
    miss("feature " + name + (known ? "" : " (unknown to this runtime)"));
  }
  for (const std::string& name : kernel.extensions) {
    if (core.enabled_extensions.count(name) != 0 || IsCore(name, device.api_version)) continue;
    miss("extension " + name);
  }
  for (const std::string& name : kernel.subgroup_operations) {
    if (device.subgroup_operations.count(name) != 0) continue;
    std::string has;
    for (const std::string& each : device.subgroup_operations) {
      has += (has.empty() ? "" : ", ") + each;
    }
    miss("subgroup operation " + name + " (it has " + (has.empty() ? "none" : has) + ")");
  }
  if (kernel.subgroup_size != 0 && !device.GrantsSubgroupSize(kernel.subgroup_size)) {
    miss("subgroup size " + std::to_string(kernel.subgroup_size) + " (it has " +
         std::to_string(device.min_subgroup_size) + " to " +
         std::to_string(device.max_subgroup_size) + ")");
  }
  for (const MatrixProduct& product : kernel.products) {
    const auto& has = device.products;
    if (std::find(has.begin(), has.end(), product) != has.end()) continue;
    miss("matrices " + product.Text() + " (it has " + ProductTexts(has) + ")");
  }
  const uint32_t shared = device.limits.maxComputeSharedMemorySize;
  if (kernel.shared_bytes > shared) {
    miss(std::to_string(kernel.shared_bytes) + " bytes of shared memory (it has " +
         std::to_string(shared) + ")");
  }
  const uint32_t push = kernel.argument_buffer ? 8 : kernel.argument_bytes;
  if (push > device.limits.maxPushConstantsSize) {
    miss(std::to_string(push) + " bytes of push constants (it has " +
         std::to_string(device.limits.maxPushConstantsSize) + ")");
  }
  return missing;
}

}  // namespace

std::string WhyNot(const Core& core, const KernelInfo& kernel) {
  const std::string missing = Missing(core, kernel);
  if (!missing.empty()) {
    return "Kernel " + kernel.name + " cannot run on " + core.Label() + ", which lacks: " + missing +
           "; compile for a profile that the device meets: vulkan:minimum asks for least.";
  }
  if (kernel.HasDynamicSize()) return "";
  return WrongSize(core, kernel,
                   {kernel.local_size[0], kernel.local_size[1], kernel.local_size[2]});
}

void CheckKernels(const Core& core, const std::vector<KernelInfo>& kernels) {
  for (const KernelInfo& kernel : kernels) {
    if (!kernel.IsVariant()) Require(WhyNot(core, kernel));
  }
}

Pipelines::Pipelines(Core* core, PipelineCache* cache, const std::vector<KernelInfo>* kernels)
    : core_(core), cache_(cache), kernels_(kernels), prepared_(kernels->size()) {
  CheckKernels(*core_, *kernels_);
  try {
    CreateAll();
  } catch (...) {
    Destroy();
    throw;
  }
  cache_->Save();
}

Pipelines::~Pipelines() { Destroy(); }

void Pipelines::Destroy() {
  const auto& call = core_->call;
  for (Prepared& each : prepared_) {
    if (each.shader != VK_NULL_HANDLE) {
      call.DestroyShaderModule(core_->handle, each.shader, nullptr);
    }
    if (each.fixed != VK_NULL_HANDLE) call.DestroyPipeline(core_->handle, each.fixed, nullptr);
    for (const auto& [size, pipeline] : each.by_size) {
      call.DestroyPipeline(core_->handle, pipeline, nullptr);
    }
  }
  for (const auto& [bytes, layout] : layouts_) {
    call.DestroyPipelineLayout(core_->handle, layout, nullptr);
  }
}

void Pipelines::GiveUp() {
  const std::lock_guard<std::mutex> lock(mutex_);
  Destroy();
  for (Prepared& each : prepared_) each = Prepared();
  layouts_.clear();
}

VkPipelineLayout Pipelines::LayoutFor(uint32_t push_bytes) {
  VkPipelineLayout& layout = layouts_[push_bytes];
  if (layout != VK_NULL_HANDLE) return layout;
  const VkPushConstantRange range{VK_SHADER_STAGE_COMPUTE_BIT, 0, push_bytes};
  auto info = Struct<VkPipelineLayoutCreateInfo>(VK_STRUCTURE_TYPE_PIPELINE_LAYOUT_CREATE_INFO);
  info.pushConstantRangeCount = push_bytes == 0 ? 0 : 1;
  info.pPushConstantRanges = &range;
  core_->Check(core_->call.CreatePipelineLayout(core_->handle, &info, nullptr, &layout),
               "vkCreatePipelineLayout");
  return layout;
}

void Pipelines::CreateAll() {
  for (size_t i = 0; i < prepared_.size(); ++i) {
    const KernelInfo& kernel = (*kernels_)[i];
    prepared_[i].name = Intern(kernel.name);
    prepared_[i].layout = LayoutFor(kernel.argument_buffer ? 8 : kernel.argument_bytes);
  }
  std::atomic<size_t> next{0};
  std::mutex failure_mutex;
  std::exception_ptr failure;
  const auto work = [&]() {
    for (size_t i = next++; i < prepared_.size(); i = next++) {
      try {
        const KernelInfo& kernel = (*kernels_)[i];
        if (kernel.IsVariant() && !WhyNot(*core_, kernel).empty()) continue;
        auto info = Struct<VkShaderModuleCreateInfo>(VK_STRUCTURE_TYPE_SHADER_MODULE_CREATE_INFO);
        info.codeSize = kernel.code.size() * sizeof(uint32_t);
        info.pCode = kernel.code.data();
        Prepared& each = prepared_[i];
        core_->Check(core_->call.CreateShaderModule(core_->handle, &info, nullptr, &each.shader),
                     "vkCreateShaderModule");
        if (kernel.HasDynamicSize()) continue;
        each.fixed = Create(i, {kernel.local_size[0], kernel.local_size[1], kernel.local_size[2]});
        core_->call.DestroyShaderModule(core_->handle, each.shader, nullptr);
        each.shader = VK_NULL_HANDLE;
      } catch (...) {
        const std::lock_guard<std::mutex> lock(failure_mutex);
        if (!failure) failure = std::current_exception();
        next = prepared_.size();
      }
    }
  };
  uint32_t count = core_->settings.pipeline_threads;
  if (count == 0) count = std::min(std::max(std::thread::hardware_concurrency(), 1U), kMostThreads);
  count = std::min<uint32_t>(count, static_cast<uint32_t>(prepared_.size()));
  std::vector<std::thread> helpers;
  try {
    for (uint32_t i = 1; i < count; ++i) helpers.emplace_back(work);
  } catch (const std::system_error&) {
    // No more threads to be had: those that there are do it.
  }
  work();
  for (std::thread& helper : helpers) helper.join();
  if (failure) std::rethrow_exception(failure);
}

VkPipeline Pipelines::Create(size_t index, const LocalSize& size) {
  const KernelInfo& kernel = (*kernels_)[index];
  // Specialization constants 0, 1 and 2 stand for those sizes that the module leaves open.
  std::vector<VkSpecializationMapEntry> entries;
  for (uint32_t axis = 0; axis < 3; ++axis) {
    if (kernel.local_size[axis] != 0) continue;
    entries.push_back({axis, axis * static_cast<uint32_t>(sizeof(uint32_t)), sizeof(uint32_t)});
  }
  VkSpecializationInfo constants{};
  constants.mapEntryCount = static_cast<uint32_t>(entries.size());
  constants.pMapEntries = entries.data();
  constants.dataSize = sizeof(size);
  constants.pData = size.data();
  auto subgroup = Struct<VkPipelineShaderStageRequiredSubgroupSizeCreateInfo>(
      VK_STRUCTURE_TYPE_PIPELINE_SHADER_STAGE_REQUIRED_SUBGROUP_SIZE_CREATE_INFO);
  subgroup.requiredSubgroupSize = kernel.subgroup_size;
  auto info = Struct<VkComputePipelineCreateInfo>(VK_STRUCTURE_TYPE_COMPUTE_PIPELINE_CREATE_INFO);
  info.stage.sType = VK_STRUCTURE_TYPE_PIPELINE_SHADER_STAGE_CREATE_INFO;
  const PhysicalDevice& device = core_->physical;
  if (kernel.subgroup_size != 0 && device.min_subgroup_size != device.max_subgroup_size) {
    info.stage.pNext = &subgroup;
  }
  if (kernel.full_subgroups) {
    info.stage.flags |= VK_PIPELINE_SHADER_STAGE_CREATE_REQUIRE_FULL_SUBGROUPS_BIT;
  }
  info.stage.stage = VK_SHADER_STAGE_COMPUTE_BIT;
  info.stage.module = prepared_[index].shader;
  info.stage.pName = "main";
  info.stage.pSpecializationInfo = entries.empty() ? nullptr : &constants;
  info.layout = prepared_[index].layout;
  VkPipeline pipeline = VK_NULL_HANDLE;
  const VkResult result = core_->call.CreateComputePipelines(core_->handle, cache_->handle(), 1,
                                                             &info, nullptr, &pipeline);
  if (result != VK_SUCCESS) {
    const std::string what =
        "vkCreateComputePipelines for kernel " + kernel.name + " on " + core_->Label();
    core_->Check(result, what.c_str());
    throw Failure(MXF_TARGET, "The driver of ", core_->Label(), " does not compile kernel ",
                  kernel.name, " (", ResultName(result), ").");
  }
  return pipeline;
}

VkPipeline Pipelines::Get(size_t kernel, const LocalSize& size) {
  Prepared& each = prepared_[kernel];
  if (each.fixed != VK_NULL_HANDLE) return each.fixed;
  if (each.shader == VK_NULL_HANDLE) Require(WhyNot(*core_, (*kernels_)[kernel]));
  VkPipeline made = VK_NULL_HANDLE;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [known, pipeline] : each.by_size) {
      if (known == size) return pipeline;
    }
    core_->EnsureAlive();
    Require(WrongSize(*core_, (*kernels_)[kernel], size));
    made = Create(kernel, size);
    each.by_size.emplace_back(size, made);
  }
  cache_->SaveInTime();
  return made;
}

}  // namespace vulkan
}  // namespace mxforge
