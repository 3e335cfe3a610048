#include "instance.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>

#include "error.h"

namespace mxforge {
namespace vulkan {
namespace {

constexpr size_t kKeptMessages = 100;
const char* const kChoiceVariable = "MXFORGE_VULKAN_DEVICE";

// What every kernel of the generator and this runtime itself stand on.
const char* const kNeeded[] = {"bufferDeviceAddress", "shaderInt64", "timelineSemaphore"};

// What kernels of matrices of float16 need beside their products.
const char* const kForMatrices[] = {"cooperativeMatrix", "vulkanMemoryModel",
                                    "computeFullSubgroups", "shaderFloat16",
                                    "storageBuffer16BitAccess"};

bool EnvironmentHas(const char* name, const char* part) {
  const char* value = std::getenv(name);
  return value != nullptr && std::strstr(value, part) != nullptr;
}

std::string Lower(std::string text) {
  for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return text;
}

int Preference(VkPhysicalDeviceType type) {
  switch (type) {
    case VK_PHYSICAL_DEVICE_TYPE_DISCRETE_GPU:
      return 0;
    case VK_PHYSICAL_DEVICE_TYPE_INTEGRATED_GPU:
      return 1;
    case VK_PHYSICAL_DEVICE_TYPE_VIRTUAL_GPU:
      return 2;
    case VK_PHYSICAL_DEVICE_TYPE_CPU:
      return 3;
    default:
      return 4;
  }
}

bool Matches(const PhysicalDevice& device, const std::string& choice) {
  if (std::all_of(choice.begin(), choice.end(), [](unsigned char c) { return std::isdigit(c); })) {
    return std::to_string(device.index) == choice;
  }
  for (const char* type : {"discrete", "integrated", "virtual", "cpu"}) {
    if (Lower(choice) == type) return std::string(DeviceTypeName(device.type)) == type;
  }
  return Lower(device.name).find(Lower(choice)) != std::string::npos;
}

}  // namespace

const char* DeviceTypeName(VkPhysicalDeviceType type) {
  const char* const names[] = {"discrete", "integrated", "virtual", "cpu", "other"};
  return names[Preference(type)];
}

std::string VersionText(uint32_t version) {
  return std::to_string(VK_API_VERSION_MAJOR(version)) + "." +
         std::to_string(VK_API_VERSION_MINOR(version)) + "." +
         std::to_string(VK_API_VERSION_PATCH(version));
}

bool PhysicalDevice::GrantsSubgroupSize(uint32_t size) const {
  if (min_subgroup_size == size && max_subgroup_size == size) return true;
  return features.count("subgroupSizeControl") != 0 && compute_can_require_subgroup_size &&
         min_subgroup_size <= size && size <= max_subgroup_size && (size & (size - 1)) == 0;
}

bool PhysicalDevice::Multiplies(const std::string& product, uint32_t size) const {
  const auto has = [this](const char* feature) { return features.count(feature) != 0; };
  return std::all_of(std::begin(kForMatrices), std::end(kForMatrices), has) &&
         GrantsSubgroupSize(size) &&
         std::any_of(products.begin(), products.end(),
                     [&product](const MatrixProduct& each) { return each.Text() == product; });
}

Instance& Instance::Get() {
  static Instance* const instance = new Instance();  // if it throws, the next call tries again
  return *instance;
}

Instance::Instance() {
  global_ = LoadGlobalFunctions();
  Create();
  functions_ = LoadInstanceFunctions(global_, handle_);
  CreateMessenger();
  uint32_t count = 0;
  CheckResult(functions_.EnumeratePhysicalDevices(handle_, &count, nullptr),
              "vkEnumeratePhysicalDevices");
  std::vector<VkPhysicalDevice> handles(count);
  CheckResult(functions_.EnumeratePhysicalDevices(handle_, &count, handles.data()),
              "vkEnumeratePhysicalDevices");
  handles.resize(count);
  for (VkPhysicalDevice handle : handles) devices_.push_back(Describe(handle));
  std::stable_sort(devices_.begin(), devices_.end(),
                   [](const PhysicalDevice& a, const PhysicalDevice& b) {
                     return Preference(a.type) < Preference(b.type);
                   });
  for (size_t i = 0; i < devices_.size(); ++i) devices_[i].index = static_cast<int>(i);
  Choose();
}

void Instance::Create() {
  uint32_t version = VK_API_VERSION_1_0;
  global_.EnumerateInstanceVersion(&version);
  if (version < VK_API_VERSION_1_2) {
    throw Failure(MXF_TARGET, "Vulkan 1.2 is needed, but the loader knows ", VersionText(version),
                  "; update libvulkan.");
  }
  uint32_t count = 0;
  global_.EnumerateInstanceExtensionProperties(nullptr, &count, nullptr);
  std::vector<VkExtensionProperties> offered(count);
  global_.EnumerateInstanceExtensionProperties(nullptr, &count, offered.data());
  std::vector<const char*> extensions;
  VkInstanceCreateFlags flags = 0;
  const bool validated = EnvironmentHas("VK_INSTANCE_LAYERS", "validation") ||
                         EnvironmentHas("VK_LOADER_LAYERS_ENABLE", "validation");
  for (const VkExtensionProperties& extension : offered) {
    const std::string name = extension.extensionName;
    if (validated && name == VK_EXT_DEBUG_UTILS_EXTENSION_NAME) {
      extensions.push_back(VK_EXT_DEBUG_UTILS_EXTENSION_NAME);
      has_messenger_ = true;
    }
    if (name == "VK_KHR_portability_enumeration") {  // MoltenVK hides from those who do not ask
      extensions.push_back("VK_KHR_portability_enumeration");
      flags |= 0x00000001;  // VK_INSTANCE_CREATE_ENUMERATE_PORTABILITY_BIT_KHR
    }
  }
  auto application = Struct<VkApplicationInfo>(VK_STRUCTURE_TYPE_APPLICATION_INFO);
  application.pApplicationName = "mxforge";
  application.pEngineName = "mxforge";
  application.apiVersion = version_ = std::min<uint32_t>(version, VK_API_VERSION_1_3);
  auto info = Struct<VkInstanceCreateInfo>(VK_STRUCTURE_TYPE_INSTANCE_CREATE_INFO);
  info.flags = flags;
  info.pApplicationInfo = &application;
  info.enabledExtensionCount = static_cast<uint32_t>(extensions.size());
  info.ppEnabledExtensionNames = extensions.data();
  const VkResult result = global_.CreateInstance(&info, nullptr, &handle_);
  if (result == VK_ERROR_INCOMPATIBLE_DRIVER) {
    throw Error(MXF_TARGET,
                "Vulkan's loader is installed but finds no driver; install the GPU's, or "
                "mesa-vulkan-drivers for one that runs on the CPU.");
  }
  CheckResult(result, "vkCreateInstance");
}

void Instance::CreateMessenger() {
  has_messenger_ = has_messenger_ && functions_.CreateDebugUtilsMessengerEXT != nullptr;
  if (!has_messenger_) return;
  auto info = Struct<VkDebugUtilsMessengerCreateInfoEXT>(
      VK_STRUCTURE_TYPE_DEBUG_UTILS_MESSENGER_CREATE_INFO_EXT);
  info.messageSeverity = VK_DEBUG_UTILS_MESSAGE_SEVERITY_WARNING_BIT_EXT |
                         VK_DEBUG_UTILS_MESSAGE_SEVERITY_ERROR_BIT_EXT;
  info.messageType = VK_DEBUG_UTILS_MESSAGE_TYPE_VALIDATION_BIT_EXT |
                     VK_DEBUG_UTILS_MESSAGE_TYPE_PERFORMANCE_BIT_EXT;
  info.pfnUserCallback = &Instance::OnMessage;
  info.pUserData = this;
  VkDebugUtilsMessengerEXT messenger = VK_NULL_HANDLE;
  CheckResult(functions_.CreateDebugUtilsMessengerEXT(handle_, &info, nullptr, &messenger),
              "vkCreateDebugUtilsMessengerEXT");
}

VkBool32 Instance::OnMessage(VkDebugUtilsMessageSeverityFlagBitsEXT,
                             VkDebugUtilsMessageTypeFlagsEXT,
                             const VkDebugUtilsMessengerCallbackDataEXT* data, void* self) {
  auto* instance = static_cast<Instance*>(self);
  const std::lock_guard<std::mutex> lock(instance->messages_mutex_);
  if (instance->messages_.size() < kKeptMessages) {
    instance->messages_.emplace_back(data->pMessage == nullptr ? "" : data->pMessage);
  }
  return VK_FALSE;
}

std::vector<std::string> Instance::ValidationMessages() const {
  const std::lock_guard<std::mutex> lock(messages_mutex_);
  return messages_;
}

PhysicalDevice Instance::Describe(VkPhysicalDevice handle) const {
  PhysicalDevice device;
  device.handle = handle;
  functions_.GetPhysicalDeviceProperties(handle, &device.properties);
  device.name = device.properties.deviceName;
  device.type = device.properties.deviceType;
  device.limits = device.properties.limits;
  // A driver may know more than the instance asked for, but may be used only up to that.
  device.api_version = std::min<uint32_t>(device.properties.apiVersion, version_ | 0xfff);
  if (device.api_version < VK_API_VERSION_1_2) {
    device.unusable = "it has Vulkan " + VersionText(device.api_version) + " instead of 1.2";
    return device;
  }

  uint32_t count = 0;
  functions_.EnumerateDeviceExtensionProperties(handle, nullptr, &count, nullptr);
  std::vector<VkExtensionProperties> offered(count);
  functions_.EnumerateDeviceExtensionProperties(handle, nullptr, &count, offered.data());
  for (const VkExtensionProperties& each : offered) device.extensions.insert(each.extensionName);
  const bool is13 = device.api_version >= VK_API_VERSION_1_3;
  const bool sized = is13 || device.extensions.count("VK_EXT_subgroup_size_control") != 0;
  const bool bounded = is13 || device.extensions.count("VK_KHR_maintenance4") != 0;

  auto v11 = Struct<VkPhysicalDeviceVulkan11Properties>(
      VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_1_PROPERTIES);
  auto v12 = Struct<VkPhysicalDeviceVulkan12Properties>(
      VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_2_PROPERTIES);
  auto subgroup = Struct<VkPhysicalDeviceSubgroupSizeControlProperties>(
      VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_SIZE_CONTROL_PROPERTIES);
  auto maintenance4 = Struct<VkPhysicalDeviceMaintenance4Properties>(
      VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MAINTENANCE_4_PROPERTIES);
  auto properties =
      Struct<VkPhysicalDeviceProperties2>(VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PROPERTIES_2);
  properties.pNext = &v11;
  v11.pNext = &v12;
  if (sized) {
    subgroup.pNext = v12.pNext;
    v12.pNext = &subgroup;
  }
  if (bounded) {
    maintenance4.pNext = v12.pNext;
    v12.pNext = &maintenance4;
  }
  functions_.GetPhysicalDeviceProperties2(handle, &properties);
  device.driver = std::string(v12.driverName) + " " + v12.driverInfo;
  device.max_allocation_bytes = v11.maxMemoryAllocationSize;
  device.max_buffer_bytes = bounded ? maintenance4.maxBufferSize : UINT64_MAX;
  device.subgroup_size = v11.subgroupSize;
  device.min_subgroup_size = sized ? subgroup.minSubgroupSize : v11.subgroupSize;
  device.max_subgroup_size = sized ? subgroup.maxSubgroupSize : v11.subgroupSize;
  device.max_workgroup_subgroups = sized ? subgroup.maxComputeWorkgroupSubgroups : 0;
  device.compute_can_require_subgroup_size =
      sized && (subgroup.requiredSubgroupSizeStages & VK_SHADER_STAGE_COMPUTE_BIT) != 0;
  if ((v11.subgroupSupportedStages & VK_SHADER_STAGE_COMPUTE_BIT) != 0) {
    for (std::string& name : SubgroupOperationNames(v11.subgroupSupportedOperations)) {
      device.subgroup_operations.insert(std::move(name));
    }
  }

  FeatureChain chain;
  chain.Link(device.api_version, device.extensions);
  functions_.GetPhysicalDeviceFeatures2(handle, &chain.core);
  for (const Feature& feature : FeatureTable()) {
    if (feature.in(chain) != VK_FALSE) device.features.insert(feature.name);
  }

  if (device.features.count("cooperativeMatrix") != 0) {
    device.products = ProductsOf(global_.GetInstanceProcAddr, handle_, handle);
  }

  auto memory = Struct<VkPhysicalDeviceMemoryProperties2>(
      VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_PROPERTIES_2);
  functions_.GetPhysicalDeviceMemoryProperties2(handle, &memory);
  device.memory = memory.memoryProperties;

  functions_.GetPhysicalDeviceQueueFamilyProperties(handle, &count, nullptr);
  std::vector<VkQueueFamilyProperties> families(count);
  functions_.GetPhysicalDeviceQueueFamilyProperties(handle, &count, families.data());
  const auto with = [&families](VkQueueFlags wanted, VkQueueFlags unwanted) {
    return std::find_if(families.begin(), families.end(), [=](const auto& family) {
      return (family.queueFlags & wanted) != 0 && (family.queueFlags & unwanted) == 0 &&
             family.queueCount > 0;
    });
  };
  // Where graphics wait behind it, a long kernel makes the desktop stutter and watchdogs end it.
  auto computes = with(VK_QUEUE_COMPUTE_BIT, VK_QUEUE_GRAPHICS_BIT);
  if (computes == families.end()) computes = with(VK_QUEUE_COMPUTE_BIT, 0);
  if (computes == families.end()) {
    device.unusable = "it has no compute queue";
    return device;
  }
  device.queue_family = static_cast<uint32_t>(computes - families.begin());
  device.timestamp_bits = computes->timestampValidBits;

  for (const char* name : kNeeded) {
    if (device.features.count(name) != 0) continue;
    device.unusable += (device.unusable.empty() ? "it lacks " : ", ") + std::string(name);
  }
  return device;
}

void Instance::Choose() {
  const char* variable = std::getenv(kChoiceVariable);
  const std::string choice = variable == nullptr ? "" : variable;
  std::string unusable;
  bool any = false;
  for (PhysicalDevice& device : devices_) {
    if (!choice.empty() && !Matches(device, choice)) continue;
    any = true;
    if (device.unusable.empty()) {
      device.device_id = chosen_count_++;
    } else {
      unusable += (unusable.empty() ? "" : "; ") + device.name + ": " + device.unusable;
    }
  }
  if (chosen_count_ != 0) return;
  if (devices_.empty()) {
    refusal_ =
        "Vulkan's loader finds no device; install the GPU's driver, or mesa-vulkan-drivers "
        "for one that runs on the CPU.";
  } else if (!any) {
    refusal_ = std::string(kChoiceVariable) + "=" + choice +
               " should be the index, a part of the name or the type (discrete, integrated, "
               "virtual, cpu) of a device, but matches none of: " +
               List() + ".";
  } else {
    refusal_ =
        "mxforge needs Vulkan 1.2 with bufferDeviceAddress, shaderInt64 and "
        "timelineSemaphore, but cannot use " +
        unusable + "; choose another device with " + kChoiceVariable + " or update the driver.";
  }
}

std::string Instance::List() const {
  std::string text;
  for (const PhysicalDevice& device : devices_) {
    text += (text.empty() ? "" : ", ") + std::to_string(device.index) + " " + device.name + " (" +
            DeviceTypeName(device.type) + ")";
  }
  return text;
}

const PhysicalDevice& Instance::Chosen(int id) const {
  if (chosen_count_ == 0) throw Error(MXF_TARGET, refusal_);
  for (const PhysicalDevice& device : devices_) {
    if (device.device_id == id && id >= 0) return device;
  }
  throw Failure(MXF_TARGET, "vulkan:", id, " does not exist: this process uses ", chosen_count_,
                " of the devices ", List(), ", counted from vulkan:0.");
}

uint64_t Instance::AvailableBytes(const PhysicalDevice& device) const {
  const bool budgeted = device.extensions.count("VK_EXT_memory_budget") != 0;
  auto budget = Struct<VkPhysicalDeviceMemoryBudgetPropertiesEXT>(
      VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_BUDGET_PROPERTIES_EXT);
  auto memory = Struct<VkPhysicalDeviceMemoryProperties2>(
      VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_PROPERTIES_2);
  if (budgeted) memory.pNext = &budget;
  functions_.GetPhysicalDeviceMemoryProperties2(device.handle, &memory);
  uint64_t available = 0;
  for (uint32_t heap = 0; heap < memory.memoryProperties.memoryHeapCount; ++heap) {
    const VkMemoryHeap& each = memory.memoryProperties.memoryHeaps[heap];
    if (!device.Holds(each)) continue;
    const uint64_t used = budgeted ? budget.heapUsage[heap] : 0;
    const uint64_t total = budgeted ? budget.heapBudget[heap] : each.size;
    available += total > used ? total - used : 0;
  }
  return available;
}

}  // namespace vulkan
}  // namespace mxforge
