// Vulkan's loader with faults: built as a library that MXFORGE_VULKAN_LOADER names. Calls go on to
// the real one, are counted, and fail when a test says so.
#define VK_NO_PROTOTYPES
#include <dlfcn.h>
#include <string.h>
#include <vulkan/vulkan_core.h>

#define EXPORT __attribute__((visibility("default")))

// In the order of `Fault` in vulkan_loader.py.
enum { SUBMIT, WAIT, ALLOCATE, DISPATCH, FUNCTIONS };

static struct {
  int calls, failures;
  VkResult result;
} state[FUNCTIONS];

EXPORT void fail(int function, int result, int count) {
  state[function].result = (VkResult)result;
  state[function].failures = count;
}

EXPORT int calls(int function) { return state[function].calls; }

static int fails(int function) {
  ++state[function].calls;
  return state[function].failures > 0 && state[function].failures--;
}

static PFN_vkGetInstanceProcAddr get_instance;
static PFN_vkGetDeviceProcAddr get_device;
static PFN_vkQueueSubmit submit;
static PFN_vkWaitSemaphores wait_semaphores;
static PFN_vkAllocateMemory allocate;
static PFN_vkCmdDispatch dispatch;

static VkResult faulty_submit(VkQueue queue, uint32_t count, const VkSubmitInfo* infos,
                              VkFence fence) {
  return fails(SUBMIT) ? state[SUBMIT].result : submit(queue, count, infos, fence);
}

static VkResult faulty_wait(VkDevice device, const VkSemaphoreWaitInfo* info, uint64_t timeout) {
  return fails(WAIT) ? state[WAIT].result : wait_semaphores(device, info, timeout);
}

static VkResult faulty_allocate(VkDevice device, const VkMemoryAllocateInfo* info,
                                const VkAllocationCallbacks* callbacks, VkDeviceMemory* memory) {
  return fails(ALLOCATE) ? state[ALLOCATE].result : allocate(device, info, callbacks, memory);
}

static void counted_dispatch(VkCommandBuffer commands, uint32_t x, uint32_t y, uint32_t z) {
  ++state[DISPATCH].calls;
  dispatch(commands, x, y, z);
}

#define REPLACE(name, variable, function)                 \
  if (strcmp(asked, name) == 0) {                         \
    *(PFN_vkVoidFunction*)&variable = found;              \
    return (PFN_vkVoidFunction)function;                  \
  }

static PFN_vkVoidFunction device_function(VkDevice device, const char* asked) {
  const PFN_vkVoidFunction found = get_device(device, asked);
  REPLACE("vkQueueSubmit", submit, faulty_submit)
  REPLACE("vkWaitSemaphores", wait_semaphores, faulty_wait)
  REPLACE("vkAllocateMemory", allocate, faulty_allocate)
  REPLACE("vkCmdDispatch", dispatch, counted_dispatch)
  return found;
}

EXPORT PFN_vkVoidFunction vkGetInstanceProcAddr(VkInstance instance, const char* asked) {
  if (get_instance == NULL) {
    void* loader = dlopen("libvulkan.so.1", RTLD_NOW | RTLD_LOCAL);
    if (loader == NULL) return NULL;
    *(void**)&get_instance = dlsym(loader, "vkGetInstanceProcAddr");
  }
  const PFN_vkVoidFunction found = get_instance(instance, asked);
  REPLACE("vkGetDeviceProcAddr", get_device, device_function)
  return found;
}
