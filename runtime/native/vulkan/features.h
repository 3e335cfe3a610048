/*!
 * \file features.h
 * \brief Features and extensions that generated kernels may ask for, by Vulkan's own names.
 */
#ifndef MXFORGE_VULKAN_FEATURES_H_
#define MXFORGE_VULKAN_FEATURES_H_

#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "loader.h"
#include "matrices.h"

namespace mxforge {
namespace vulkan {

/*! \brief The feature structs of Vulkan that hold a feature of the table, one after another.
 *
 * Only the structs that a device knows may be linked into a chain for it; the others stay zero,
 * which reads as "feature not there".
 */
struct FeatureChain {
  VkPhysicalDeviceFeatures2 core{};
  VkPhysicalDeviceVulkan11Features v11{};
  VkPhysicalDeviceVulkan12Features v12{};
  VkPhysicalDeviceShaderIntegerDotProductFeatures dot_product{};
  VkPhysicalDeviceSubgroupSizeControlFeatures subgroup_size{};
  VkPhysicalDeviceZeroInitializeWorkgroupMemoryFeatures zero_initialize{};
  VkPhysicalDeviceMaintenance4Features maintenance4{};
  VkPhysicalDeviceShaderAtomicFloatFeaturesEXT atomic_float{};
  VkPhysicalDeviceShaderAtomicFloat2FeaturesEXT atomic_float2{};
  VkPhysicalDeviceWorkgroupMemoryExplicitLayoutFeaturesKHR workgroup_layout{};
  VkPhysicalDeviceShaderSubgroupUniformControlFlowFeaturesKHR uniform_control_flow{};
  CooperativeMatrixFeatures cooperative_matrix{};

  FeatureChain() = default;
  FeatureChain(const FeatureChain&) = delete;  // the links point into the object
  FeatureChain& operator=(const FeatureChain&) = delete;

  /*! \brief Link what a device of this version with these extensions knows. */
  void Link(uint32_t api_version, const std::set<std::string>& extensions);
};

struct Feature {
  const char* name;
  VkBool32& (*in)(FeatureChain& chain);
};

/*! \brief Every feature that this runtime can enable. */
const std::vector<Feature>& FeatureTable();

/*! \brief Those extensions of `offered` that this runtime enables. */
std::vector<std::string> ExtensionsToEnable(uint32_t api_version,
                                            const std::set<std::string>& offered);

/*! \brief Whether an extension became part of Vulkan at or before this version. */
bool IsCore(const std::string& extension, uint32_t api_version);

/*! \brief Names ("basic", "shuffle", ...) of the bits of VkSubgroupFeatureFlags. */
std::vector<std::string> SubgroupOperationNames(VkSubgroupFeatureFlags flags);

}  // namespace vulkan
}  // namespace mxforge

#endif  // MXFORGE_VULKAN_FEATURES_H_
