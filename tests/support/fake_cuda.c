/* NVIDIA's libraries where there is no GPU: memory is the host's, kernels do nothing, and once
 * fake_cuda_lose was called, every call fails as after an illegal access: the error sticks.
 *
 * Built twice: as libcudart.so.13, and with -DDRIVER as libcuda.so.1, which needs the first.
 */
#include <stdlib.h>
#include <string.h>

#define EVERY __attribute__((visibility("default")))
#define ILLEGAL_ADDRESS 700

extern int fake_cuda_lost;

#ifndef DRIVER

EVERY int fake_cuda_lost = 0;
EVERY long fake_cuda_allocated = 0; /* allocations that exist */

EVERY void fake_cuda_lose(void) { fake_cuda_lost = ILLEGAL_ADDRESS; }

EVERY int cudaMalloc(void** pointer, size_t bytes) {
  if (fake_cuda_lost) return fake_cuda_lost;
  *pointer = aligned_alloc(256, (bytes + 511) / 256 * 256);
  memset(*pointer, 0, bytes);
  ++fake_cuda_allocated;
  return 0;
}
EVERY int cudaFree(void* pointer) {
  if (fake_cuda_lost) return fake_cuda_lost;
  free(pointer);
  --fake_cuda_allocated;
  return 0;
}
EVERY int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int kind, void* stream) {
  (void)kind, (void)stream;
  if (!fake_cuda_lost) memcpy(to, from, bytes);
  return fake_cuda_lost;
}
EVERY int cudaMemGetInfo(size_t* left, size_t* total) {
  *left = *total = (size_t)8 << 30;
  return fake_cuda_lost;
}
EVERY int cudaGetDeviceCount(int* count) {
  *count = 1;
  return 0;
}
EVERY int cudaGetDevice(int* device) {
  *device = 0;
  return 0;
}
EVERY int cudaDeviceGetAttribute(int* value, int attribute, int device) {
  (void)attribute, (void)device;
  *value = 1024;
  return fake_cuda_lost;
}
EVERY const char* cudaGetErrorName(int error) {
  return error == ILLEGAL_ADDRESS ? "cudaErrorIllegalAddress" : "cudaErrorOther";
}
EVERY const char* cudaGetErrorString(int error) {
  return error == ILLEGAL_ADDRESS ? "an illegal memory access was encountered" : "other";
}

#define ANSWER(name) \
  EVERY int name() { return fake_cuda_lost; }
ANSWER(cudaEventCreate)
ANSWER(cudaEventDestroy)
ANSWER(cudaEventElapsedTime)
ANSWER(cudaEventRecord)
ANSWER(cudaEventSynchronize)
ANSWER(cudaFreeHost)
ANSWER(cudaGetDeviceProperties)
ANSWER(cudaGetLastError)
ANSWER(cudaGraphDestroy)
ANSWER(cudaGraphExecDestroy)
ANSWER(cudaGraphInstantiate)
ANSWER(cudaGraphLaunch)
ANSWER(cudaMallocHost)
ANSWER(cudaMemcpyPeerAsync)
ANSWER(cudaPeekAtLastError)
ANSWER(cudaSetDevice)
ANSWER(cudaStreamBeginCapture)
ANSWER(cudaStreamCreate)
ANSWER(cudaStreamCreateWithFlags)
ANSWER(cudaStreamDestroy)
ANSWER(cudaStreamEndCapture)
ANSWER(cudaStreamSynchronize)
ANSWER(cudaStreamWaitEvent)

#else

EVERY int cuInit(unsigned flags) {
  (void)flags;
  return 0;
}
EVERY int cuDeviceGetCount(int* count) {
  *count = 1;
  return 0;
}
EVERY int cuDeviceGetName(char* name, int bytes, int device) {
  (void)device;
  strncpy(name, "Fake", bytes);
  return 0;
}
EVERY int cuDeviceTotalMem_v2(size_t* bytes, int device) {
  (void)device;
  *bytes = (size_t)8 << 30;
  return 0;
}
EVERY int cuDeviceGetAttribute(int* value, int attribute, int device) {
  (void)device;
  *value = attribute == 75 ? 9 : 0;
  return 0;
}
EVERY int cuGetErrorName(int error, const char** name) {
  *name = error == ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR_OTHER";
  return 0;
}
EVERY int cuModuleGetFunction(void** function, void* module, const char* name) {
  (void)module, (void)name;
  *function = &fake_cuda_lost;
  return fake_cuda_lost;
}
EVERY int cuModuleLoadData(void** module, const void* image) {
  (void)image;
  *module = &fake_cuda_lost;
  return fake_cuda_lost;
}

#define ANSWER(name) \
  EVERY int name() { return fake_cuda_lost; }
ANSWER(cuFuncSetAttribute)
ANSWER(cuGetErrorString)
ANSWER(cuLaunchKernelEx)
ANSWER(cuModuleUnload)
ANSWER(cuTensorMapEncodeTiled)

#endif
