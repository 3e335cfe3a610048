#include "module.h"

#include <tvm/ffi/cast.h>

#include <cstring>

#include "../launch.h"
#include "arguments.h"
#include "border.h"
#include "device_api.h"

namespace mxforge {
namespace vulkan {
namespace {

namespace ffi = tvm::ffi;

constexpr size_t kInlineBlock = 256;
constexpr size_t kInlinePointers = 32;

}  // namespace

ModuleNode::ModuleNode(const ffi::Bytes& bytes)
    : bytes_(bytes.data(), bytes.size()), kernels_(ParseModule(bytes_)) {
  for (size_t i = 0; i < kernels_.size(); ++i) by_name_[kernels_[i].name] = i;
}

ModuleNode::~ModuleNode() {
  for (const auto& each : prepared_) each->device->Retire(std::move(each->pipelines));
}

ffi::Optional<ffi::Function> ModuleNode::GetFunction(const ffi::String& name) {
  const auto found = by_name_.find(std::string(name));
  if (found == by_name_.end()) return std::nullopt;
  const size_t kernel = found->second;
  // The function keeps the module alive.
  ffi::ObjectPtr<ModuleNode> self = ffi::GetObjectPtr<ModuleNode>(this);
  return AcrossBorder(ffi::Function::FromPacked(
      [self, kernel](const ffi::AnyView* arguments, int32_t count, ffi::Any*) {
        static_assert(sizeof(ffi::AnyView) == sizeof(TVMFFIAny));
        Translated([&] {
          self->Launch(kernel, reinterpret_cast<const TVMFFIAny*>(arguments), count);
        });
      }));
}

bool ModuleNode::ImplementsFunction(const ffi::String& name) {
  return by_name_.count(std::string(name)) != 0;
}

ffi::Bytes ModuleNode::SaveToBytes() const { return ffi::Bytes(bytes_); }

ffi::String ModuleNode::InspectSource(const ffi::String& format) const {
  if (!format.empty() && format != "json") return "";
  uint32_t bytes = 0;
  for (int i = 3; i >= 0; --i) bytes = bytes << 8 | static_cast<uint8_t>(bytes_[12 + i]);
  return ffi::String(bytes_.substr(16, bytes));
}

Pipelines* ModuleNode::PipelinesFor(Device* device) {
  auto& slot = current_[device->core().physical.device_id];
  const auto ready = [&slot, device]() -> Pipelines* {
    const Prepared* known = slot.load(std::memory_order_acquire);
    return known != nullptr && known->device == device ? known->pipelines.get() : nullptr;
  };
  if (Pipelines* pipelines = ready()) return pipelines;
  const std::lock_guard<std::mutex> lock(preparing_);
  if (Pipelines* pipelines = ready()) return pipelines;
  // The kernels' description must outlive pipelines that are retired after the module is gone,
  // but those only destroy what they made.
  prepared_.push_back(std::make_unique<Prepared>(Prepared{device, device->Prepare(&kernels_)}));
  slot.store(prepared_.back().get(), std::memory_order_release);
  return prepared_.back()->pipelines.get();
}

void ModuleNode::Check(int device_id) { CheckKernels(Device::Get(device_id)->core(), kernels_); }

void ModuleNode::Launch(size_t index, const TVMFFIAny* arguments, int count) {
  const KernelInfo& kernel = kernels_[index];
  const size_t expected = kernel.arguments.size() + kernel.launch.size();
  if (static_cast<size_t>(count) != expected) {
    TVM_FFI_THROW(TypeError) << "Kernel " << kernel.name << " takes " << kernel.arguments.size()
                             << " arguments and " << kernel.launch.size()
                             << " extents of its launch but got " << count << " values.";
  }
  Device* device = Device::Get(CurrentId());
  Extents groups = {1, 1, 1};
  Extents block;
  for (size_t axis = 0; axis < block.size(); ++axis) block[axis] = kernel.local_size[axis];
  for (size_t i = 0; i < kernel.launch.size(); ++i) {
    const LaunchExtent& extent = kernel.launch[i];
    const int64_t value = ExtentValue(arguments[kernel.arguments.size() + i], kernel);
    if (value == 0) return;  // nothing to do
    (extent.block ? block : groups)[extent.axis] = value;
  }
  Dispatch dispatch;
  const Pipelines::LocalSize size =
      CheckExtents(device->core(), kernel, groups, block, &dispatch);

  Pipelines* pipelines = PipelinesFor(device);
  dispatch.pipeline = pipelines->Get(index, size);
  dispatch.layout = pipelines->layout(index);
  dispatch.name = pipelines->name(index);

  // Zeroed: padding of the block is as reproducible as the rest.
  alignas(16) uint8_t inline_block[kInlineBlock];
  std::vector<uint8_t> large_block;
  uint8_t* bytes = inline_block;
  if (kernel.argument_bytes > kInlineBlock) {
    large_block.resize(kernel.argument_bytes);
    bytes = large_block.data();
  } else {
    std::memset(inline_block, 0, kernel.argument_bytes);
  }
  PointerUse inline_pointers[kInlinePointers];
  std::vector<PointerUse> many_pointers;
  PointerUse* pointers = inline_pointers;
  if (kernel.arguments.size() > kInlinePointers) {
    many_pointers.resize(kernel.arguments.size());
    pointers = many_pointers.data();
  }
  size_t pointer_count = 0;
  for (size_t i = 0; i < kernel.arguments.size(); ++i) {
    const ArgumentInfo& argument = kernel.arguments[i];
    if (!argument.pointer) {
      WriteScalar(arguments[i], kernel, argument, bytes);
      continue;
    }
    const uint64_t address = PointerValue(arguments[i], kernel, argument);
    WriteAddress(kernel, argument, address, bytes);
    pointers[pointer_count++] = {address, kToTheEnd, argument.read, argument.write,
                                 &argument.name};
  }
  dispatch.block = bytes;
  dispatch.block_bytes = kernel.argument_bytes;
  dispatch.argument_buffer = kernel.argument_buffer;
  device->Launch(CurrentStream(device), dispatch, pointers, pointer_count);
}

ffi::Module LoadModule(const ffi::Bytes& bytes) {
  return ffi::Module(ffi::make_object<ModuleNode>(bytes));
}

}  // namespace vulkan
}  // namespace mxforge
