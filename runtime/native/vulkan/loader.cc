#include "loader.h"

#include <cstdlib>
#include <vector>

#ifdef _WIN32
#include <windows.h>
#undef CreateSemaphore  // Vulkan has one too
#else
#include <dlfcn.h>
#endif

#include "error.h"

namespace mxforge {
namespace vulkan {
namespace {

#if defined(_WIN32)
const char* const kLibraries[] = {"vulkan-1.dll"};
#elif defined(__APPLE__)
const char* const kLibraries[] = {"libvulkan.1.dylib", "libvulkan.dylib", "libMoltenVK.dylib"};
#else
const char* const kLibraries[] = {"libvulkan.so.1", "libvulkan.so"};
#endif

PFN_vkGetInstanceProcAddr FindEntry(const char* library) {
#ifdef _WIN32
  HMODULE handle = LoadLibraryA(library);
  if (handle == nullptr) return nullptr;
  return reinterpret_cast<PFN_vkGetInstanceProcAddr>(
      reinterpret_cast<void*>(GetProcAddress(handle, "vkGetInstanceProcAddr")));
#else
  // Never closed: drivers leave threads and exit handlers behind.
  void* handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) return nullptr;
  return reinterpret_cast<PFN_vkGetInstanceProcAddr>(dlsym(handle, "vkGetInstanceProcAddr"));
#endif
}

template <typename Pointer>
void Fill(Pointer* member, PFN_vkVoidFunction found, const char* name) {
  if (found == nullptr) {
    throw Failure(MXF_TARGET, "Vulkan's ", name,
                  " should be there from version 1.2 on, but the driver has no such function; "
                  "update the Vulkan loader and the driver.");
  }
  *member = reinterpret_cast<Pointer>(found);
}

}  // namespace

GlobalFunctions LoadGlobalFunctions() {
  std::vector<std::string> candidates(std::begin(kLibraries), std::end(kLibraries));
  if (const char* chosen = std::getenv("MXFORGE_VULKAN_LOADER")) candidates = {chosen};
  GlobalFunctions functions;
  for (const std::string& library : candidates) {
    functions.GetInstanceProcAddr = FindEntry(library.c_str());
    if (functions.GetInstanceProcAddr != nullptr) break;
  }
  if (functions.GetInstanceProcAddr == nullptr) {
    throw Failure(MXF_TARGET, "Vulkan needs its loader, but ", candidates[0],
                  " cannot be opened; install it (Debian and Ubuntu: apt-get install libvulkan1, "
                  "and a driver such as mesa-vulkan-drivers).");
  }
#define MXFORGE_VULKAN_LOAD(name) \
  Fill(&functions.name, functions.GetInstanceProcAddr(nullptr, "vk" #name), "vk" #name);
  MXFORGE_VULKAN_GLOBAL_FUNCTIONS(MXFORGE_VULKAN_LOAD)
#undef MXFORGE_VULKAN_LOAD
  return functions;
}

InstanceFunctions LoadInstanceFunctions(const GlobalFunctions& global, VkInstance instance) {
  InstanceFunctions functions;
#define MXFORGE_VULKAN_LOAD(name) \
  Fill(&functions.name, global.GetInstanceProcAddr(instance, "vk" #name), "vk" #name);
  MXFORGE_VULKAN_INSTANCE_FUNCTIONS(MXFORGE_VULKAN_LOAD)
#undef MXFORGE_VULKAN_LOAD
  functions.CreateDebugUtilsMessengerEXT = reinterpret_cast<PFN_vkCreateDebugUtilsMessengerEXT>(
      global.GetInstanceProcAddr(instance, "vkCreateDebugUtilsMessengerEXT"));
  return functions;
}

DeviceFunctions LoadDeviceFunctions(const InstanceFunctions& instance, VkDevice device) {
  DeviceFunctions functions;
#define MXFORGE_VULKAN_LOAD(name) \
  Fill(&functions.name, instance.GetDeviceProcAddr(device, "vk" #name), "vk" #name);
  MXFORGE_VULKAN_DEVICE_FUNCTIONS(MXFORGE_VULKAN_LOAD)
#undef MXFORGE_VULKAN_LOAD
  return functions;
}

}  // namespace vulkan
}  // namespace mxforge
