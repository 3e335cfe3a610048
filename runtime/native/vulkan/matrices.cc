#include "matrices.h"

#include <utility>

#include "error.h"

namespace mxforge {
namespace vulkan {
namespace {

constexpr auto kProperties = static_cast<VkStructureType>(1000506001);
constexpr int32_t kScopeSubgroup = 3;

/*! \brief VkCooperativeMatrixPropertiesKHR, its enumerations as the numbers that they are. */
struct Properties {
  VkStructureType sType;
  void* pNext;
  uint32_t MSize;
  uint32_t NSize;
  uint32_t KSize;
  int32_t AType;
  int32_t BType;
  int32_t CType;
  int32_t ResultType;
  VkBool32 saturatingAccumulation;
  int32_t scope;
};

using GetProperties = VkResult(VKAPI_PTR*)(VkPhysicalDevice, uint32_t*, Properties*);

/*! \brief The dtype of a VkComponentTypeKHR. */
std::string ComponentName(int32_t type) {
  const std::pair<int32_t, const char*> names[] = {
      {0, "float16"}, {1, "float32"}, {2, "float64"},           {3, "int8"},
      {4, "int16"},   {5, "int32"},   {6, "int64"},             {7, "uint8"},
      {8, "uint16"},  {9, "uint32"},  {10, "uint64"},           {1000141000, "bfloat16"},
      {1000491002, "float8_e4m3fn"}, {1000491003, "float8_e5m2"},
  };
  for (const auto& [number, name] : names) {
    if (number == type) return name;
  }
  return "type" + std::to_string(type);
}

}  // namespace

std::string MatrixProduct::Text() const {
  return std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k) + " " + a + " " + b +
         " " + c + " " + result;
}

std::vector<MatrixProduct> ProductsOf(PFN_vkGetInstanceProcAddr get, VkInstance instance,
                                      VkPhysicalDevice device) {
  const auto function = reinterpret_cast<GetProperties>(
      get(instance, "vkGetPhysicalDeviceCooperativeMatrixPropertiesKHR"));
  if (function == nullptr) return {};  // a loader that is older than the driver
  uint32_t count = 0;
  CheckResult(function(device, &count, nullptr),
              "vkGetPhysicalDeviceCooperativeMatrixPropertiesKHR");
  std::vector<Properties> offered(count, Struct<Properties>(kProperties));
  CheckResult(function(device, &count, offered.data()),
              "vkGetPhysicalDeviceCooperativeMatrixPropertiesKHR");
  offered.resize(count);
  std::vector<MatrixProduct> products;
  for (const Properties& each : offered) {
    if (each.scope != kScopeSubgroup || each.saturatingAccumulation != VK_FALSE) continue;
    products.push_back({each.MSize, each.NSize, each.KSize, ComponentName(each.AType),
                        ComponentName(each.BType), ComponentName(each.CType),
                        ComponentName(each.ResultType)});
  }
  return products;
}

std::string ProductTexts(const std::vector<MatrixProduct>& products) {
  std::string text;
  for (const MatrixProduct& each : products) text += (text.empty() ? "" : ", ") + each.Text();
  return text.empty() ? "none" : text;
}

}  // namespace vulkan
}  // namespace mxforge
