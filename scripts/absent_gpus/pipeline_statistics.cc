// What a Vulkan driver says of the code that it makes of kernels. Nothing is run, so that drivers
// on Mesa's drm shims, without a GPU, do.
//
//   pipeline_statistics WORD < LIST
//
// LIST has a line for each kernel: a name, bytes of push constants, the subgroup size that it
// needs (0: any), 1 where subgroups have to be full, 1 where instructions with WORD in their name
// are counted, and the path of its SPIR-V.
//
// Prints, separated by tabs, `device NAME DRIVER`, then `begin NAME` before each kernel and
// `statistic NAME EXECUTABLE WHAT VALUE` or `failed NAME WHY` after it. A driver that dies in the
// middle leaves a `begin` without what follows.

#include <dlfcn.h>
#include <vulkan/vulkan.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include "matrices.h"  // of the runtime

namespace {

constexpr const char* kMatrices = "VK_KHR_cooperative_matrix";

PFN_vkGetInstanceProcAddr get_instance_proc;
VkInstance instance = VK_NULL_HANDLE;

template <typename Function>
Function function(const char* name) {
  return reinterpret_cast<Function>(get_instance_proc(instance, name));
}
#define VK(name) function<PFN_##name>(#name)

template <typename Struct>
Struct of_type(VkStructureType type, void* next = nullptr) {
  Struct made{};
  made.sType = type;
  made.pNext = next;
  return made;
}

int fail(const std::string& what) {
  std::cerr << what << "\n";
  return 1;
}

struct Kernel {
  std::string name, path;
  uint32_t push_bytes = 0, subgroup_size = 0, full = 0, counted = 0;
};

class Device {
 public:
  explicit Device(const char* word) : word_(word) {}

  bool open() {
    uint32_t count = 1;  // the environment names one driver
    VkResult result = VK(vkEnumeratePhysicalDevices)(instance, &count, &physical_);
    if (count == 0 || result < 0) return false;
    sizes_ = of_type<VkPhysicalDeviceSubgroupSizeControlProperties>(
        VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_SIZE_CONTROL_PROPERTIES);
    auto driver = of_type<VkPhysicalDeviceVulkan12Properties>(
        VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_2_PROPERTIES, &sizes_);
    auto properties = of_type<VkPhysicalDeviceProperties2>(
        VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PROPERTIES_2, &driver);
    VK(vkGetPhysicalDeviceProperties2)(physical_, &properties);
    std::cout << "device\t" << properties.properties.deviceName << "\t" << driver.driverInfo
              << "\n";

    auto v11 = of_type<VkPhysicalDeviceVulkan11Features>(
        VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_1_FEATURES);
    auto v12 = of_type<VkPhysicalDeviceVulkan12Features>(
        VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_2_FEATURES, &v11);
    auto v13 = of_type<VkPhysicalDeviceVulkan13Features>(
        VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_3_FEATURES, &v12);
    auto statistics = of_type<VkPhysicalDevicePipelineExecutablePropertiesFeaturesKHR>(
        VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PIPELINE_EXECUTABLE_PROPERTIES_FEATURES_KHR, &v13);
    auto features = of_type<VkPhysicalDeviceFeatures2>(
        VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2, &statistics);
    auto matrices = of_type<mxforge::vulkan::CooperativeMatrixFeatures>(
        mxforge::vulkan::kCooperativeMatrixFeatures);
    std::vector<const char*> extensions{VK_KHR_PIPELINE_EXECUTABLE_PROPERTIES_EXTENSION_NAME};
    if (offers(kMatrices)) {
      extensions.push_back(kMatrices);
      v11.pNext = &matrices;
    }
    VK(vkGetPhysicalDeviceFeatures2)(physical_, &features);
    if (!statistics.pipelineExecutableInfo) return false;
    features.features.robustBufferAccess = VK_FALSE;  // as the runtime has it

    float priority = 1;
    auto queue =
        of_type<VkDeviceQueueCreateInfo>(VK_STRUCTURE_TYPE_DEVICE_QUEUE_CREATE_INFO);
    queue.queueCount = 1;
    queue.pQueuePriorities = &priority;
    auto info = of_type<VkDeviceCreateInfo>(VK_STRUCTURE_TYPE_DEVICE_CREATE_INFO, &features);
    info.queueCreateInfoCount = 1;
    info.pQueueCreateInfos = &queue;
    info.enabledExtensionCount = static_cast<uint32_t>(extensions.size());
    info.ppEnabledExtensionNames = extensions.data();
    return VK(vkCreateDevice)(physical_, &info, nullptr, &device_) == VK_SUCCESS;
  }

  // Prints the statistics; an explanation where there are none.
  std::string compile(const Kernel& kernel) {
    std::ifstream file(kernel.path, std::ios::binary);
    std::string bytes{std::istreambuf_iterator<char>(file), {}};
    if (bytes.empty()) return "there is no SPIR-V at " + kernel.path;
    std::vector<uint32_t> words(bytes.size() / 4);
    std::memcpy(words.data(), bytes.data(), words.size() * 4);

    auto module_info =
        of_type<VkShaderModuleCreateInfo>(VK_STRUCTURE_TYPE_SHADER_MODULE_CREATE_INFO);
    module_info.codeSize = words.size() * 4;
    module_info.pCode = words.data();
    VkShaderModule module;
    if (VkResult result = VK(vkCreateShaderModule)(device_, &module_info, nullptr, &module))
      return "vkCreateShaderModule returned " + std::to_string(result);

    VkPushConstantRange range{VK_SHADER_STAGE_COMPUTE_BIT, 0, kernel.push_bytes};
    auto layout_info =
        of_type<VkPipelineLayoutCreateInfo>(VK_STRUCTURE_TYPE_PIPELINE_LAYOUT_CREATE_INFO);
    layout_info.pushConstantRangeCount = kernel.push_bytes ? 1 : 0;
    layout_info.pPushConstantRanges = &range;
    VkPipelineLayout layout;
    if (VkResult result = VK(vkCreatePipelineLayout)(device_, &layout_info, nullptr, &layout))
      return "vkCreatePipelineLayout returned " + std::to_string(result);

    auto subgroup = of_type<VkPipelineShaderStageRequiredSubgroupSizeCreateInfo>(
        VK_STRUCTURE_TYPE_PIPELINE_SHADER_STAGE_REQUIRED_SUBGROUP_SIZE_CREATE_INFO);
    subgroup.requiredSubgroupSize = kernel.subgroup_size;
    auto info =
        of_type<VkComputePipelineCreateInfo>(VK_STRUCTURE_TYPE_COMPUTE_PIPELINE_CREATE_INFO);
    info.flags = VK_PIPELINE_CREATE_CAPTURE_STATISTICS_BIT_KHR;
    if (kernel.counted) info.flags |= VK_PIPELINE_CREATE_CAPTURE_INTERNAL_REPRESENTATIONS_BIT_KHR;
    info.layout = layout;
    info.stage = of_type<VkPipelineShaderStageCreateInfo>(
        VK_STRUCTURE_TYPE_PIPELINE_SHADER_STAGE_CREATE_INFO);
    info.stage.stage = VK_SHADER_STAGE_COMPUTE_BIT;
    info.stage.module = module;
    info.stage.pName = "main";
    if (kernel.subgroup_size && sizes_.minSubgroupSize != sizes_.maxSubgroupSize)
      info.stage.pNext = &subgroup;
    if (kernel.full)
      info.stage.flags = VK_PIPELINE_SHADER_STAGE_CREATE_REQUIRE_FULL_SUBGROUPS_BIT;
    VkPipeline pipeline;
    if (VkResult result = VK(vkCreateComputePipelines)(device_, VK_NULL_HANDLE, 1, &info, nullptr,
                                                       &pipeline))
      return "vkCreateComputePipelines returned " + std::to_string(result);
    print(kernel, pipeline);
    return "";
  }

 private:
  bool offers(const char* extension) {
    uint32_t count = 0;
    auto list = VK(vkEnumerateDeviceExtensionProperties);
    list(physical_, nullptr, &count, nullptr);
    std::vector<VkExtensionProperties> offered(count);
    list(physical_, nullptr, &count, offered.data());
    for (const auto& each : offered)
      if (std::strcmp(each.extensionName, extension) == 0) return true;
    return false;
  }

  void print(const Kernel& kernel, VkPipeline pipeline) {
    auto which = of_type<VkPipelineInfoKHR>(VK_STRUCTURE_TYPE_PIPELINE_INFO_KHR);
    which.pipeline = pipeline;
    uint32_t count = 0;
    auto list = VK(vkGetPipelineExecutablePropertiesKHR);
    list(device_, &which, &count, nullptr);
    std::vector<VkPipelineExecutablePropertiesKHR> executables(
        count, of_type<VkPipelineExecutablePropertiesKHR>(
                   VK_STRUCTURE_TYPE_PIPELINE_EXECUTABLE_PROPERTIES_KHR));
    list(device_, &which, &count, executables.data());
    for (uint32_t index = 0; index < count; ++index) {
      auto one =
          of_type<VkPipelineExecutableInfoKHR>(VK_STRUCTURE_TYPE_PIPELINE_EXECUTABLE_INFO_KHR);
      one.pipeline = pipeline;
      one.executableIndex = index;
      uint32_t found = 0;
      auto read = VK(vkGetPipelineExecutableStatisticsKHR);
      read(device_, &one, &found, nullptr);
      std::vector<VkPipelineExecutableStatisticKHR> statistics(
          found, of_type<VkPipelineExecutableStatisticKHR>(
                     VK_STRUCTURE_TYPE_PIPELINE_EXECUTABLE_STATISTIC_KHR));
      read(device_, &one, &found, statistics.data());
      for (const auto& statistic : statistics)
        std::cout << "statistic\t" << kernel.name << "\t" << executables[index].name << "\t"
                  << statistic.name << "\t" << value(statistic) << "\n";
      if (kernel.counted)
        std::cout << "statistic\t" << kernel.name << "\t" << executables[index].name << "\t"
                  << word_ << "\t" << lines_with_word(one) << "\n";
    }
  }

  // Of the last representation that is a text: what the GPU gets.
  size_t lines_with_word(const VkPipelineExecutableInfoKHR& one) {
    uint32_t count = 0;
    auto read = VK(vkGetPipelineExecutableInternalRepresentationsKHR);
    read(device_, &one, &count, nullptr);
    std::vector<VkPipelineExecutableInternalRepresentationKHR> found(
        count, of_type<VkPipelineExecutableInternalRepresentationKHR>(
                   VK_STRUCTURE_TYPE_PIPELINE_EXECUTABLE_INTERNAL_REPRESENTATION_KHR));
    read(device_, &one, &count, found.data());
    std::vector<std::vector<char>> texts;
    for (auto& each : found) {
      texts.emplace_back(each.dataSize);
      each.pData = texts.back().data();
    }
    read(device_, &one, &count, found.data());
    for (uint32_t i = count; i-- > 0;) {
      if (!found[i].isText) continue;
      std::istringstream text(std::string(texts[i].data(), strnlen(texts[i].data(), texts[i].size())));
      size_t lines = 0;
      for (std::string line; std::getline(text, line);) lines += line.find(word_) != line.npos;
      return lines;
    }
    return 0;
  }

  static std::string value(const VkPipelineExecutableStatisticKHR& statistic) {
    switch (statistic.format) {
      case VK_PIPELINE_EXECUTABLE_STATISTIC_FORMAT_INT64_KHR:
        return std::to_string(statistic.value.i64);
      case VK_PIPELINE_EXECUTABLE_STATISTIC_FORMAT_FLOAT64_KHR:
        return std::to_string(statistic.value.f64);
      case VK_PIPELINE_EXECUTABLE_STATISTIC_FORMAT_BOOL32_KHR:
        return std::to_string(statistic.value.b32);
      default:
        return std::to_string(statistic.value.u64);
    }
  }

  const std::string word_;
  VkPhysicalDevice physical_ = VK_NULL_HANDLE;
  VkDevice device_ = VK_NULL_HANDLE;
  VkPhysicalDeviceSubgroupSizeControlProperties sizes_{};
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return fail("expected the word of instructions that are counted");
  std::cout << std::unitbuf;
  void* library = dlopen("libvulkan.so.1", RTLD_NOW);
  if (library == nullptr) return fail(dlerror());
  get_instance_proc = reinterpret_cast<PFN_vkGetInstanceProcAddr>(
      dlsym(library, "vkGetInstanceProcAddr"));
  auto application = of_type<VkApplicationInfo>(VK_STRUCTURE_TYPE_APPLICATION_INFO);
  application.apiVersion = VK_API_VERSION_1_3;
  auto info = of_type<VkInstanceCreateInfo>(VK_STRUCTURE_TYPE_INSTANCE_CREATE_INFO);
  info.pApplicationInfo = &application;
  if (VkResult result = VK(vkCreateInstance)(&info, nullptr, &instance))
    return fail("vkCreateInstance returned " + std::to_string(result));
  Device device(argv[1]);
  if (!device.open()) return fail("there is no device with statistics of pipelines");

  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream fields(line);
    Kernel kernel;
    fields >> kernel.name >> kernel.push_bytes >> kernel.subgroup_size >> kernel.full >> kernel.counted;
    std::getline(fields >> std::ws, kernel.path);
    std::cout << "begin\t" << kernel.name << "\n";
    std::string problem = device.compile(kernel);
    if (!problem.empty()) std::cout << "failed\t" << kernel.name << "\t" << problem << "\n";
  }
  // Without giving anything back: the process ends here, and drivers without a GPU crash at it.
  std::cout.flush();
  std::_Exit(0);
}
