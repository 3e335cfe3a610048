#include "features.h"

#include <algorithm>
#include <map>

namespace mxforge {
namespace vulkan {
namespace {

// Member names are the feature names, so the name is written once.
#define MXFORGE_VULKAN_FEATURE(place, member)                                    \
  Feature {                                                                      \
    #member, [](FeatureChain& chain) -> VkBool32& { return chain.place.member; } \
  }

const std::vector<Feature> kFeatures = {
    MXFORGE_VULKAN_FEATURE(core.features, shaderFloat64),
    MXFORGE_VULKAN_FEATURE(core.features, shaderInt64),
    MXFORGE_VULKAN_FEATURE(core.features, shaderInt16),
    MXFORGE_VULKAN_FEATURE(v11, storageBuffer16BitAccess),
    MXFORGE_VULKAN_FEATURE(v11, uniformAndStorageBuffer16BitAccess),
    MXFORGE_VULKAN_FEATURE(v11, storagePushConstant16),
    MXFORGE_VULKAN_FEATURE(v11, variablePointersStorageBuffer),
    MXFORGE_VULKAN_FEATURE(v11, variablePointers),
    MXFORGE_VULKAN_FEATURE(v12, storageBuffer8BitAccess),
    MXFORGE_VULKAN_FEATURE(v12, uniformAndStorageBuffer8BitAccess),
    MXFORGE_VULKAN_FEATURE(v12, storagePushConstant8),
    MXFORGE_VULKAN_FEATURE(v12, shaderBufferInt64Atomics),
    MXFORGE_VULKAN_FEATURE(v12, shaderSharedInt64Atomics),
    MXFORGE_VULKAN_FEATURE(v12, shaderFloat16),
    MXFORGE_VULKAN_FEATURE(v12, shaderInt8),
    MXFORGE_VULKAN_FEATURE(v12, scalarBlockLayout),
    MXFORGE_VULKAN_FEATURE(v12, uniformBufferStandardLayout),
    MXFORGE_VULKAN_FEATURE(v12, shaderSubgroupExtendedTypes),
    MXFORGE_VULKAN_FEATURE(v12, hostQueryReset),
    MXFORGE_VULKAN_FEATURE(v12, timelineSemaphore),
    MXFORGE_VULKAN_FEATURE(v12, bufferDeviceAddress),
    MXFORGE_VULKAN_FEATURE(v12, vulkanMemoryModel),
    MXFORGE_VULKAN_FEATURE(v12, vulkanMemoryModelDeviceScope),
    MXFORGE_VULKAN_FEATURE(v12, vulkanMemoryModelAvailabilityVisibilityChains),
    MXFORGE_VULKAN_FEATURE(v12, subgroupBroadcastDynamicId),
    MXFORGE_VULKAN_FEATURE(zero_initialize, shaderZeroInitializeWorkgroupMemory),
    MXFORGE_VULKAN_FEATURE(maintenance4, maintenance4),
    MXFORGE_VULKAN_FEATURE(dot_product, shaderIntegerDotProduct),
    MXFORGE_VULKAN_FEATURE(subgroup_size, subgroupSizeControl),
    MXFORGE_VULKAN_FEATURE(subgroup_size, computeFullSubgroups),
    MXFORGE_VULKAN_FEATURE(atomic_float, shaderBufferFloat32Atomics),
    MXFORGE_VULKAN_FEATURE(atomic_float, shaderBufferFloat32AtomicAdd),
    MXFORGE_VULKAN_FEATURE(atomic_float, shaderBufferFloat64Atomics),
    MXFORGE_VULKAN_FEATURE(atomic_float, shaderBufferFloat64AtomicAdd),
    MXFORGE_VULKAN_FEATURE(atomic_float, shaderSharedFloat32Atomics),
    MXFORGE_VULKAN_FEATURE(atomic_float, shaderSharedFloat32AtomicAdd),
    MXFORGE_VULKAN_FEATURE(atomic_float, shaderSharedFloat64Atomics),
    MXFORGE_VULKAN_FEATURE(atomic_float, shaderSharedFloat64AtomicAdd),
    MXFORGE_VULKAN_FEATURE(atomic_float2, shaderBufferFloat16Atomics),
    MXFORGE_VULKAN_FEATURE(atomic_float2, shaderBufferFloat16AtomicAdd),
    MXFORGE_VULKAN_FEATURE(atomic_float2, shaderBufferFloat16AtomicMinMax),
    MXFORGE_VULKAN_FEATURE(atomic_float2, shaderSharedFloat16Atomics),
    MXFORGE_VULKAN_FEATURE(atomic_float2, shaderSharedFloat16AtomicAdd),
    MXFORGE_VULKAN_FEATURE(atomic_float2, shaderSharedFloat16AtomicMinMax),
    MXFORGE_VULKAN_FEATURE(atomic_float2, shaderBufferFloat32AtomicMinMax),
    MXFORGE_VULKAN_FEATURE(atomic_float2, shaderBufferFloat64AtomicMinMax),
    MXFORGE_VULKAN_FEATURE(atomic_float2, shaderSharedFloat32AtomicMinMax),
    MXFORGE_VULKAN_FEATURE(atomic_float2, shaderSharedFloat64AtomicMinMax),
    MXFORGE_VULKAN_FEATURE(workgroup_layout, workgroupMemoryExplicitLayout),
    MXFORGE_VULKAN_FEATURE(workgroup_layout, workgroupMemoryExplicitLayoutScalarBlockLayout),
    MXFORGE_VULKAN_FEATURE(workgroup_layout, workgroupMemoryExplicitLayout8BitAccess),
    MXFORGE_VULKAN_FEATURE(workgroup_layout, workgroupMemoryExplicitLayout16BitAccess),
    MXFORGE_VULKAN_FEATURE(uniform_control_flow, shaderSubgroupUniformControlFlow),
    MXFORGE_VULKAN_FEATURE(cooperative_matrix, cooperativeMatrix),
};

#undef MXFORGE_VULKAN_FEATURE

// Extension -> version of Vulkan that made it part of the core, 0 where none did.
const std::map<std::string, uint32_t> kExtensions = {
    {"VK_KHR_16bit_storage", VK_API_VERSION_1_1},
    {"VK_KHR_storage_buffer_storage_class", VK_API_VERSION_1_1},
    {"VK_KHR_variable_pointers", VK_API_VERSION_1_1},
    {"VK_KHR_8bit_storage", VK_API_VERSION_1_2},
    {"VK_KHR_buffer_device_address", VK_API_VERSION_1_2},
    {"VK_KHR_shader_atomic_int64", VK_API_VERSION_1_2},
    {"VK_KHR_shader_float16_int8", VK_API_VERSION_1_2},
    {"VK_KHR_shader_float_controls", VK_API_VERSION_1_2},
    {"VK_KHR_shader_subgroup_extended_types", VK_API_VERSION_1_2},
    {"VK_KHR_spirv_1_4", VK_API_VERSION_1_2},
    {"VK_KHR_timeline_semaphore", VK_API_VERSION_1_2},
    {"VK_KHR_vulkan_memory_model", VK_API_VERSION_1_2},
    {"VK_EXT_scalar_block_layout", VK_API_VERSION_1_2},
    {"VK_EXT_subgroup_size_control", VK_API_VERSION_1_3},
    {"VK_KHR_maintenance4", VK_API_VERSION_1_3},
    {"VK_KHR_shader_integer_dot_product", VK_API_VERSION_1_3},
    {"VK_KHR_shader_non_semantic_info", VK_API_VERSION_1_3},
    {"VK_KHR_zero_initialize_workgroup_memory", VK_API_VERSION_1_3},
    {"VK_EXT_memory_budget", 0},
    {"VK_EXT_shader_atomic_float", 0},
    {"VK_EXT_shader_atomic_float2", 0},
    {"VK_KHR_cooperative_matrix", 0},
    {"VK_KHR_portability_subset", 0},  // has to be enabled where it is offered
    {"VK_KHR_shader_subgroup_uniform_control_flow", 0},
    {"VK_KHR_workgroup_memory_explicit_layout", 0},
};

}  // namespace

void FeatureChain::Link(uint32_t api_version, const std::set<std::string>& extensions) {
  core.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2;
  void** tail = &core.pNext;
  const auto add = [&tail](auto& part, VkStructureType type, bool known) {
    if (!known) return;
    part.sType = type;
    *tail = &part;
    tail = &part.pNext;
  };
  const auto has = [&](const char* name) { return extensions.count(name) != 0; };
  const bool is13 = api_version >= VK_API_VERSION_1_3;
  add(v11, VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_1_FEATURES, true);
  add(v12, VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_2_FEATURES, true);
  // Vulkan 1.3 knows the structs of the extensions that it took in. Its own collective struct may
  // not stand beside them, so it is left out.
  add(dot_product, VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SHADER_INTEGER_DOT_PRODUCT_FEATURES,
      is13 || has("VK_KHR_shader_integer_dot_product"));
  add(subgroup_size, VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_SIZE_CONTROL_FEATURES,
      is13 || has("VK_EXT_subgroup_size_control"));
  add(zero_initialize, VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_ZERO_INITIALIZE_WORKGROUP_MEMORY_FEATURES,
      is13 || has("VK_KHR_zero_initialize_workgroup_memory"));
  add(maintenance4, VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MAINTENANCE_4_FEATURES,
      is13 || has("VK_KHR_maintenance4"));
  add(atomic_float, VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SHADER_ATOMIC_FLOAT_FEATURES_EXT,
      has("VK_EXT_shader_atomic_float"));
  add(atomic_float2, VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SHADER_ATOMIC_FLOAT_2_FEATURES_EXT,
      has("VK_EXT_shader_atomic_float2"));
  add(workgroup_layout,
      VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_WORKGROUP_MEMORY_EXPLICIT_LAYOUT_FEATURES_KHR,
      has("VK_KHR_workgroup_memory_explicit_layout"));
  add(uniform_control_flow,
      VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SHADER_SUBGROUP_UNIFORM_CONTROL_FLOW_FEATURES_KHR,
      has("VK_KHR_shader_subgroup_uniform_control_flow"));
  add(cooperative_matrix, kCooperativeMatrixFeatures, has("VK_KHR_cooperative_matrix"));
}

const std::vector<Feature>& FeatureTable() { return kFeatures; }

std::vector<std::string> ExtensionsToEnable(uint32_t api_version,
                                            const std::set<std::string>& offered) {
  std::vector<std::string> chosen;
  for (const auto& [name, core_since] : kExtensions) {
    const bool needed = core_since == 0 || core_since > api_version;
    if (needed && offered.count(name) != 0) chosen.push_back(name);
  }
  return chosen;
}

bool IsCore(const std::string& extension, uint32_t api_version) {
  const auto found = kExtensions.find(extension);
  return found != kExtensions.end() && found->second != 0 && found->second <= api_version;
}

std::vector<std::string> SubgroupOperationNames(VkSubgroupFeatureFlags flags) {
  const std::pair<VkSubgroupFeatureFlags, const char*> names[] = {
      {VK_SUBGROUP_FEATURE_BASIC_BIT, "basic"},
      {VK_SUBGROUP_FEATURE_VOTE_BIT, "vote"},
      {VK_SUBGROUP_FEATURE_ARITHMETIC_BIT, "arithmetic"},
      {VK_SUBGROUP_FEATURE_BALLOT_BIT, "ballot"},
      {VK_SUBGROUP_FEATURE_SHUFFLE_BIT, "shuffle"},
      {VK_SUBGROUP_FEATURE_SHUFFLE_RELATIVE_BIT, "shuffle_relative"},
      {VK_SUBGROUP_FEATURE_CLUSTERED_BIT, "clustered"},
      {VK_SUBGROUP_FEATURE_QUAD_BIT, "quad"},
  };
  std::vector<std::string> present;
  for (const auto& [bit, name] : names) {
    if ((flags & bit) != 0) present.push_back(name);
  }
  return present;
}

}  // namespace vulkan
}  // namespace mxforge
