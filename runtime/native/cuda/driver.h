/*!
 * \file driver.h
 * \brief NVIDIA's driver, found when it is first needed: the few functions of it that are used.
 *
 * Declared here as the driver exports them, so that no header of CUDA is needed to build.
 */
#ifndef MXFORGE_CUDA_DRIVER_H_
#define MXFORGE_CUDA_DRIVER_H_

#include <cstddef>
#include <cstdint>

#include "../core/error.h"

namespace mxforge {
namespace cuda {

using Result = int;  // CUresult
using Address = unsigned long long;  // CUdeviceptr: NOLINT, the driver's type
using Ordinal = int;  // CUdevice
using Context = struct CUctx_st*;
using Stream = struct CUstream_st*;
using Event = struct CUevent_st*;
using Module = struct CUmod_st*;
using Kernel = struct CUfunc_st*;
using Graph = struct CUgraph_st*;
using GraphRun = struct CUgraphExec_st*;

constexpr Result kSuccess = 0, kOutOfMemory = 2;

// CUdevice_attribute
constexpr int kCapabilityMajor = 75, kCapabilityMinor = 76;
constexpr int kMostShared = 97, kMemoryPools = 115;
// CUfunction_attribute
constexpr int kDynamicShared = 8;
// Flags
constexpr unsigned kNonBlocking = 1;    // of a stream
constexpr unsigned kWithoutTiming = 2;  // of an event
constexpr int kThreadLocal = 1;         // CUstreamCaptureMode

/*! \brief CUlaunchAttribute. */
struct LaunchAttribute {
  int id;
  char padding[4];
  union {
    char all[64];
    int number;
  } value;
};
constexpr int kProgrammaticSerialization = 6;  // its id

/*! \brief CUlaunchConfig. */
struct LaunchConfig {
  unsigned grid[3], block[3];
  unsigned shared;  // dynamic, in bytes
  Stream stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};

// Name as exported, and parameters.
#define MXFORGE_CUDA_FUNCTIONS(DO)                                                              \
  DO(cuInit, (unsigned flags))                                                                  \
  DO(cuGetErrorName, (Result error, const char** name))                                         \
  DO(cuGetErrorString, (Result error, const char** text))                                       \
  DO(cuDeviceGetCount, (int* count))                                                            \
  DO(cuDeviceGet, (Ordinal* device, int index))                                                 \
  DO(cuDeviceGetName, (char* name, int size, Ordinal device))                                   \
  DO(cuDeviceTotalMem_v2, (size_t* bytes, Ordinal device))                                      \
  DO(cuDeviceGetAttribute, (int* value, int attribute, Ordinal device))                         \
  DO(cuDevicePrimaryCtxRetain, (Context* context, Ordinal device))                              \
  DO(cuDevicePrimaryCtxRelease_v2, (Ordinal device))                                            \
  DO(cuCtxPushCurrent_v2, (Context context))                                                    \
  DO(cuCtxPopCurrent_v2, (Context* context))                                                    \
  DO(cuMemGetInfo_v2, (size_t* free, size_t* total))                                            \
  DO(cuMemAlloc_v2, (Address* address, size_t bytes))                                           \
  DO(cuMemFree_v2, (Address address))                                                           \
  DO(cuMemFreeAsync, (Address address, Stream stream))                                          \
  DO(cuMemHostAlloc, (void** memory, size_t bytes, unsigned flags))                             \
  DO(cuMemFreeHost, (void* memory))                                                             \
  DO(cuMemcpyHtoDAsync_v2, (Address to, const void* from, size_t bytes, Stream stream))         \
  DO(cuMemcpyDtoHAsync_v2, (void* to, Address from, size_t bytes, Stream stream))               \
  DO(cuMemcpyDtoDAsync_v2, (Address to, Address from, size_t bytes, Stream stream))             \
  DO(cuStreamCreate, (Stream* stream, unsigned flags))                                          \
  DO(cuStreamDestroy_v2, (Stream stream))                                                       \
  DO(cuStreamSynchronize, (Stream stream))                                                      \
  DO(cuStreamBeginCapture_v2, (Stream stream, int mode))                                        \
  DO(cuStreamEndCapture, (Stream stream, Graph* graph))                                         \
  DO(cuGraphInstantiateWithFlags, (GraphRun* run, Graph graph, unsigned long long flags))       \
  DO(cuGraphLaunch, (GraphRun run, Stream stream))                                              \
  DO(cuGraphDestroy, (Graph graph))                                                             \
  DO(cuGraphExecDestroy, (GraphRun run))                                                        \
  DO(cuEventCreate, (Event* event, unsigned flags))                                             \
  DO(cuEventRecord, (Event event, Stream stream))                                               \
  DO(cuEventSynchronize, (Event event))                                                         \
  DO(cuEventDestroy_v2, (Event event))                                                          \
  DO(cuModuleLoadData, (Module* module, const void* image))                                     \
  DO(cuModuleUnload, (Module module))                                                           \
  DO(cuModuleGetFunction, (Kernel* kernel, Module module, const char* name))                    \
  DO(cuFuncSetAttribute, (Kernel kernel, int attribute, int value))                             \
  DO(cuLaunchKernelEx,                                                                          \
     (const LaunchConfig* config, Kernel kernel, void** arguments, void** extra))

/*! \brief The driver's functions by their names. */
struct Driver {
#define MXFORGE_CUDA_MEMBER(name, parameters) Result(*name) parameters;
  MXFORGE_CUDA_FUNCTIONS(MXFORGE_CUDA_MEMBER)
#undef MXFORGE_CUDA_MEMBER

  /*! \brief Opened once for the process. Error (MXF_TARGET) where there is none, or an old one. */
  static const Driver& Get();

  /*! \brief What a result other than kSuccess means; MXF_LOST for those that stick. */
  core::Error Failure(Result result, const char* call) const;
};

}  // namespace cuda
}  // namespace mxforge

#endif  // MXFORGE_CUDA_DRIVER_H_
