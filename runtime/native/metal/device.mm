// Compiled with automatic reference counting: objects of Metal live as long as variables hold them.
#include "device.h"

#import <Foundation/Foundation.h>
#import <Metal/Metal.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <iterator>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "../core/binding.h"
#include "../core/error.h"
#include "../core/json.h"
#include "../core/os.h"
#include "sources.h"

namespace mxforge {
namespace metal {
namespace {

// That of macOS 11 and iOS 14, the first with products of matrices of a SIMD group.
constexpr MTLLanguageVersion kLanguage = MTLLanguageVersion2_3;
constexpr NSUInteger kThreadgroupUnit = 16;  // lengths of dynamic threadgroup memory are multiples
constexpr size_t kScalarBytes = 8;           // of each, whatever it holds

std::string Text(NSString* text) { return text == nil ? "" : [text UTF8String]; }

std::string Reason(NSError* error) {
  return error == nil ? "nothing is said of why" : Text([error localizedDescription]);
}

/*! \brief Where a tensor lies: Metal knows no addresses. */
struct Place {
  id<MTLBuffer> buffer = nil;
  NSUInteger offset = 0;
};

/*! \brief The default GPU: one queue, on which one command buffer is filled at a time. */
class MetalDevice : public core::Device {
 public:
  explicit MetalDevice(const core::DeviceOptions& options);
  ~MetalDevice() override;
  MetalDevice(const MetalDevice&) = delete;
  MetalDevice& operator=(const MetalDevice&) = delete;

  bool reads_host_memory() const override { return false; }
  std::unique_ptr<core::Buffer> Allocate(size_t bytes) override;
  // The host shares all memory with the GPU.
  std::unique_ptr<core::Buffer> AllocateHost(size_t bytes) override { return Allocate(bytes); }
  void Upload(void* to, const void* from, size_t bytes) override;
  void Copy(void* to, const void* from, size_t bytes) override;
  void Download(void* to, const void* from, size_t bytes) override { Copy(to, from, bytes); }
  core::Mark Now() override;
  void Wait(core::Mark mark) override;
  std::unique_ptr<core::Runner> Open(const core::Function& function, void* workspace) override;

  /*! \brief The pipeline of a kernel, compiled at its first use. */
  id<MTLComputePipelineState> Pipeline(const std::string& kernel);

  /*! \brief Error (MXF_INVALID) where the address is in no memory of this device. */
  Place Find(const void* address) const;

  /*! \brief An encoder of launches, after all that was asked before; for the next launches too. */
  id<MTLComputeCommandEncoder> Launches();

  /*! \brief Let the GPU begin with what was asked. */
  void Commit();

  /*! \brief No longer at this address; work that uses it holds it. */
  void Forget(const void* address) { buffers_.erase(Address(address)); }

 private:
  id<MTLDevice> device_ = nil;
  id<MTLCommandQueue> queue_ = nil;
  const core::MappedFile code_;
  const std::map<std::string, std::string_view> sources_;
  std::map<std::string, id<MTLComputePipelineState>> pipelines_;
  std::map<uintptr_t, id<MTLBuffer>> buffers_;  // by where they begin

  id<MTLCommandBuffer> commands_ = nil;  // that is filled, and its encoder, one of these two
  id<MTLComputeCommandEncoder> launches_ = nil;
  id<MTLBlitCommandEncoder> copies_ = nil;
  core::Mark last_ = 0;  // command buffer that was committed
  std::deque<std::pair<core::Mark, id<MTLCommandBuffer>>> committed_;  // and not awaited
  std::optional<core::Error> lost_;

  static uintptr_t Address(const void* address) { return reinterpret_cast<uintptr_t>(address); }

  id<MTLBuffer> NewBuffer(size_t bytes);
  void Begin();
  void EndEncoder();
  id<MTLBlitCommandEncoder> Copies();
  void Await(id<MTLCommandBuffer> commands);
};

/*! \brief Memory that GPU and host share. */
class MetalBuffer : public core::Buffer {
 public:
  MetalBuffer(MetalDevice* device, void* address, size_t bytes)
      : Buffer(address, bytes), device_(device) {}
  ~MetalBuffer() override { device_->Forget(address()); }

 private:
  MetalDevice* const device_;
};

/*! \brief A plan's function on the GPU. */
class MetalFunction : public core::Runner {
 public:
  MetalFunction(const core::Function& function, void* workspace, MetalDevice* device);

  const core::Function& function() const override { return binding_.function(); }
  void Set(size_t argument, void* address, const std::vector<int64_t>& shape) override {
    binding_.Set(argument, address, shape);
  }
  void Run() override;
  core::DeviceTensor Output(size_t output) const override { return binding_.Output(output); }

 private:
  /*! \brief A step that is launched, as it was last. */
  struct Launch {
    const core::Step* step;
    id<MTLComputePipelineState> pipeline;
    bool runs = false;
    MTLSize grid{}, block{};  // threadgroups, and threads of one
    NSUInteger shared = 0;
    std::vector<Place> tensors = {};
    std::vector<uint8_t> scalars = {};
  };

  core::Binding binding_;
  MetalDevice* const device_;
  std::vector<Launch> launches_;
  uint64_t version_ = 0;  // of the binding, that launches_ are from

  void Prepare(Launch* launch);
  NSUInteger Extent(const Launch& launch, uint32_t value) const;
};

// -- the device -----------------------------------------------------------------------------------

MetalDevice::MetalDevice(const core::DeviceOptions& options)
    : code_(options.kernels),
      sources_(ReadSources({static_cast<const char*>(code_.data()), code_.size()})) {
  @autoreleasepool {
    device_ = MTLCreateSystemDefaultDevice();
    if (device_ == nil) throw core::Error(MXF_TARGET, "Metal finds no GPU here.");
    if (options.index != 0) {
      throw core::Error(MXF_TARGET, "The artifact is to run on Metal device " +
                                        std::to_string(options.index) +
                                        ", but there is one here, number 0.");
    }
    if (![device_ supportsFamily:MTLGPUFamilyApple7]) {
      throw core::Error(MXF_TARGET, "The artifact's code is for GPUs of A14, M1 and later, but " +
                                        Text([device_ name]) +
                                        " is older; compile the model for a CPU.");
    }
    queue_ = [device_ newCommandQueue];
    if (queue_ == nil) throw core::Error(MXF_LOST, Text([device_ name]) + " gives no queue.");
  }
}

MetalDevice::~MetalDevice() {
  @autoreleasepool {
    EndEncoder();
    // What was not committed is nobody's any more. What fails in the rest has nobody to be told.
    if (!committed_.empty()) [committed_.back().second waitUntilCompleted];
  }
}

id<MTLBuffer> MetalDevice::NewBuffer(size_t bytes) {
  const NSUInteger length = bytes == 0 ? 1 : bytes;  // Metal has no buffers of 0 bytes
  id<MTLBuffer> buffer = length <= [device_ maxBufferLength]
                             ? [device_ newBufferWithLength:length
                                                    options:MTLResourceStorageModeShared]
                             : nil;
  if (buffer == nil) {
    throw core::Error(MXF_MEMORY, Text([device_ name]) + " has no memory for " +
                                      std::to_string(bytes) +
                                      " bytes; load the model with a shorter context or a smaller "
                                      "batch.");
  }
  return buffer;
}

std::unique_ptr<core::Buffer> MetalDevice::Allocate(size_t bytes) {
  @autoreleasepool {
    id<MTLBuffer> buffer = NewBuffer(bytes);
    void* const address = [buffer contents];
    buffers_[Address(address)] = buffer;
    return std::make_unique<MetalBuffer>(this, address, bytes);
  }
}

Place MetalDevice::Find(const void* address) const {
  const auto after = buffers_.upper_bound(Address(address));
  if (after != buffers_.begin()) {
    const auto& [begin, buffer] = *std::prev(after);
    const NSUInteger offset = Address(address) - begin;
    if (offset < [buffer length]) return {buffer, offset};
  }
  throw core::Error(MXF_INVALID, "A tensor does not lie in memory of the GPU.");
}

void MetalDevice::Begin() {
  if (lost_.has_value()) throw *lost_;
  if (commands_ != nil) return;
  commands_ = [queue_ commandBuffer];
  if (commands_ != nil) return;
  lost_ = core::Error(MXF_LOST, Text([device_ name]) + " takes no work any more.");
  throw *lost_;
}

void MetalDevice::EndEncoder() {
  [launches_ endEncoding];
  [copies_ endEncoding];
  launches_ = nil;
  copies_ = nil;
}

id<MTLComputeCommandEncoder> MetalDevice::Launches() {
  Begin();
  if (launches_ == nil) {
    EndEncoder();
    launches_ = [commands_ computeCommandEncoder];
  }
  return launches_;
}

id<MTLBlitCommandEncoder> MetalDevice::Copies() {
  Begin();
  if (copies_ == nil) {
    EndEncoder();
    copies_ = [commands_ blitCommandEncoder];
  }
  return copies_;
}

void MetalDevice::Commit() {
  if (commands_ == nil) return;
  EndEncoder();
  [commands_ commit];
  committed_.emplace_back(++last_, commands_);
  commands_ = nil;
}

void MetalDevice::Upload(void* to, const void* from, size_t bytes) {
  @autoreleasepool {
    if (bytes == 0) return;
    while (!committed_.empty() &&
           [committed_.front().second status] == MTLCommandBufferStatusCompleted) {
      committed_.pop_front();
    }
    if (lost_.has_value()) throw *lost_;
    if (commands_ == nil && committed_.empty()) {  // the GPU uses nothing
      std::memcpy(to, from, bytes);
      return;
    }
    id<MTLBuffer> kept = NewBuffer(bytes);
    std::memcpy([kept contents], from, bytes);
    const Place place = Find(to);
    [Copies() copyFromBuffer:kept
                sourceOffset:0
                    toBuffer:place.buffer
           destinationOffset:place.offset
                        size:bytes];
  }
}

void MetalDevice::Copy(void* to, const void* from, size_t bytes) {
  @autoreleasepool {
    if (bytes == 0) return;
    const Place source = Find(from), target = Find(to);
    [Copies() copyFromBuffer:source.buffer
                sourceOffset:source.offset
                    toBuffer:target.buffer
           destinationOffset:target.offset
                        size:bytes];
  }
}

core::Mark MetalDevice::Now() {
  @autoreleasepool {
    if (lost_.has_value()) throw *lost_;
    Commit();
    return last_;
  }
}

void MetalDevice::Wait(core::Mark mark) {
  @autoreleasepool {
    if (lost_.has_value()) throw *lost_;
    while (!committed_.empty() && committed_.front().first <= mark) {
      id<MTLCommandBuffer> commands = committed_.front().second;
      committed_.pop_front();
      Await(commands);
    }
  }
}

void MetalDevice::Await(id<MTLCommandBuffer> commands) {
  [commands waitUntilCompleted];
  if ([commands status] == MTLCommandBufferStatusCompleted) return;
  lost_ = core::Error(MXF_LOST, Text([device_ name]) + " failed: " + Reason([commands error]) +
                                    "; close the model, and open it again.");
  throw *lost_;
}

id<MTLComputePipelineState> MetalDevice::Pipeline(const std::string& kernel) {
  const auto known = pipelines_.find(kernel);
  if (known != pipelines_.end()) return known->second;
  const auto source = sources_.find(kernel);
  if (source == sources_.end()) {
    throw core::Error(MXF_CORRUPT, "The library lacks the kernel " + kernel + "; copy it again.");
  }
  MTLCompileOptions* options = [[MTLCompileOptions alloc] init];
  [options setLanguageVersion:kLanguage];
  [options setFastMathEnabled:NO];  // what kernels compute is what their text says
  NSString* text = [[NSString alloc] initWithBytes:source->second.data()
                                            length:source->second.size()
                                          encoding:NSUTF8StringEncoding];
  NSError* error = nil;
  id<MTLLibrary> library = [device_ newLibraryWithSource:text options:options error:&error];
  NSString* name = [NSString stringWithUTF8String:kernel.c_str()];
  id<MTLFunction> function = [library newFunctionWithName:name];
  id<MTLComputePipelineState> pipeline =
      function == nil ? nil : [device_ newComputePipelineStateWithFunction:function error:&error];
  if (pipeline == nil) {
    throw core::Error(MXF_TARGET,
                      "Metal cannot compile the kernel " + kernel + ": " + Reason(error) + ".");
  }
  pipelines_[kernel] = pipeline;
  return pipeline;
}

std::unique_ptr<core::Runner> MetalDevice::Open(const core::Function& function, void* workspace) {
  @autoreleasepool {
    return std::make_unique<MetalFunction>(function, workspace, this);
  }
}

// -- a function -----------------------------------------------------------------------------------

MetalFunction::MetalFunction(const core::Function& function, void* workspace, MetalDevice* device)
    : binding_(function, workspace, device), device_(device) {
  for (const core::Step& step : function.steps) {
    if (!step.launch.has_value()) {
      throw core::Error(MXF_CORRUPT, "The launch plan is for a CPU, but its library is not.");
    }
    launches_.push_back({&step, device->Pipeline(step.kernel)});
  }
}

NSUInteger MetalFunction::Extent(const Launch& launch, uint32_t value) const {
  const int64_t number = binding_.value(value);
  if (number < 0 || number > INT32_MAX) {
    throw core::Error(MXF_CORRUPT, "A launch of " + launch.step->kernel + " has no size.");
  }
  return static_cast<NSUInteger>(number);
}

void MetalFunction::Prepare(Launch* launch) {
  const core::Step& step = *launch->step;
  launch->runs = !step.when.has_value() || binding_.value(*step.when) != 0;
  if (!launch->runs) return;  // its sizes may be anything
  const core::Launch& of = *step.launch;
  launch->grid = MTLSizeMake(Extent(*launch, of.grid[0]), Extent(*launch, of.grid[1]),
                             Extent(*launch, of.grid[2]));
  launch->block = MTLSizeMake(Extent(*launch, of.block[0]), Extent(*launch, of.block[1]),
                              Extent(*launch, of.block[2]));
  launch->runs = launch->grid.width * launch->grid.height * launch->grid.depth != 0;
  if (!launch->runs) return;
  const NSUInteger threads = launch->block.width * launch->block.height * launch->block.depth;
  const NSUInteger most = [launch->pipeline maxTotalThreadsPerThreadgroup];
  if (threads == 0 || threads > most) {
    throw core::Error(MXF_TARGET, "The kernel " + step.kernel + " needs " +
                                      std::to_string(threads) +
                                      " threads together, but this GPU has " +
                                      std::to_string(most) + " for it.");
  }
  const NSUInteger shared = Extent(*launch, of.shared);
  launch->shared = (shared + kThreadgroupUnit - 1) / kThreadgroupUnit * kThreadgroupUnit;
  launch->tensors.clear();
  launch->scalars.clear();
  for (const core::Argument& argument : step.arguments) {
    if (argument.bits == 0) {
      const std::vector<int64_t>& shape = binding_.shape(argument.index);
      const bool empty = std::find(shape.begin(), shape.end(), 0) != shape.end();
      launch->tensors.push_back(empty ? Place{} : device_->Find(binding_.address(argument.index)));
      continue;
    }
    // The low bytes come first: a 32-bit number is the first half of its place.
    const int64_t number = binding_.value(argument.index);
    const auto* bytes = reinterpret_cast<const uint8_t*>(&number);
    launch->scalars.insert(launch->scalars.end(), bytes, bytes + kScalarBytes);
  }
}

void MetalFunction::Run() {
  @autoreleasepool {
    binding_.Update();
    if (version_ != binding_.version()) {
      version_ = 0;  // where this fails, the next call tries again
      for (Launch& launch : launches_) Prepare(&launch);
      version_ = binding_.version();
    }
    id<MTLComputeCommandEncoder> encoder = device_->Launches();
    for (const Launch& launch : launches_) {
      if (!launch.runs) continue;
      [encoder setComputePipelineState:launch.pipeline];
      NSUInteger index = 0;
      for (const Place& place : launch.tensors) {
        [encoder setBuffer:place.buffer offset:place.offset atIndex:index++];
      }
      if (!launch.scalars.empty()) {
        [encoder setBytes:launch.scalars.data() length:launch.scalars.size() atIndex:index];
      }
      if (launch.shared != 0) [encoder setThreadgroupMemoryLength:launch.shared atIndex:0];
      [encoder dispatchThreadgroups:launch.grid threadsPerThreadgroup:launch.block];
    }
    device_->Commit();
  }
}

// -- all of them ----------------------------------------------------------------------------------

std::optional<uint64_t> MemoryLeft(int) {
  @autoreleasepool {
    id<MTLDevice> device = MTLCreateSystemDefaultDevice();
    if (device == nil) return std::nullopt;
    const uint64_t most = [device recommendedMaxWorkingSetSize];
    const uint64_t taken = [device currentAllocatedSize];
    return most - std::min(most, taken);
  }
}

std::string Describe() {
  @autoreleasepool {
    id<MTLDevice> device = MTLCreateSystemDefaultDevice();
    if (device == nil) return "[]";
    return "[{\"name\": " + core::Quoted(Text([device name])) + ", \"memory_bytes\": " +
           std::to_string([device recommendedMaxWorkingSetSize]) + "}]";
  }
}

}  // namespace

const core::DeviceKind kMetalKind = {
    "metal",
    [](const core::DeviceOptions& options) -> std::unique_ptr<core::Device> {
      return std::make_unique<MetalDevice>(options);
    },
    MemoryLeft,
    Describe,
    [](int, const std::string&) { return false; },
};

}  // namespace metal
}  // namespace mxforge
