/*!
 * \file matrices.h
 * \brief Products of cooperative matrices: which there are on a device, and which a kernel needs.
 */
#ifndef MXFORGE_VULKAN_MATRICES_H_
#define MXFORGE_VULKAN_MATRICES_H_

#include <cstdint>
#include <string>
#include <vector>

#include "loader.h"

namespace mxforge {
namespace vulkan {

// VK_KHR_cooperative_matrix came after the headers of some systems that this is built on: what is
// used of it is stated here, for all of them.
constexpr auto kCooperativeMatrixFeatures = static_cast<VkStructureType>(1000506000);

/*! \brief VkPhysicalDeviceCooperativeMatrixFeaturesKHR */
struct CooperativeMatrixFeatures {
  VkStructureType sType;
  void* pNext;
  VkBool32 cooperativeMatrix;
  VkBool32 cooperativeMatrixRobustBufferAccess;
};

/*! \brief a [m, k] times b [k, n] plus c [m, n], by one subgroup; a to result are dtypes. */
struct MatrixProduct {
  uint32_t m = 0;
  uint32_t n = 0;
  uint32_t k = 0;
  std::string a;
  std::string b;
  std::string c;
  std::string result;

  bool operator==(const MatrixProduct& other) const {
    return m == other.m && n == other.n && k == other.k && a == other.a && b == other.b &&
           c == other.c && result == other.result;
  }

  /*! \brief "16x16x16 float16 float16 float32 float32" */
  std::string Text() const;
};

/*! \brief What the driver says that subgroups can multiply; throws where it does not answer. */
std::vector<MatrixProduct> ProductsOf(PFN_vkGetInstanceProcAddr get, VkInstance instance,
                                      VkPhysicalDevice device);

/*! \brief The texts of some products, with commas between them. */
std::string ProductTexts(const std::vector<MatrixProduct>& products);

}  // namespace vulkan
}  // namespace mxforge

#endif  // MXFORGE_VULKAN_MATRICES_H_
