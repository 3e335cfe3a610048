#include "binding.h"

#include <algorithm>

#include "error.h"

namespace mxforge {
namespace core {
namespace {

constexpr int64_t kUnset = -1;

}  // namespace

Binding::Binding(const Function& function, void* workspace, Device* device,
                 const std::function<bool(const std::string&)>& has)
    : function_(function),
      workspace_(static_cast<char*>(workspace)),
      device_(device),
      shapes_(function.tensors.size()),
      addresses_(function.tensors.size(), nullptr),
      set_(function.arguments, false),
      own_(function.storages.size()),
      values_(function.values.size(), kUnset),
      extents_(function.values.size(), kUnset) {
  for (size_t i = 0; i < shapes_.size(); ++i) {
    shapes_[i].resize(function.tensors[i].shape.size(), kUnset);
  }
  for (size_t i = 0; i < function.values.size(); ++i) {
    const Value& value = function.values[i];
    if (value.op == Op::kFeature) extents_[i] = has(value.name);
  }
}

void Binding::Set(size_t argument, void* address, const std::vector<int64_t>& shape) {
  std::vector<int64_t>& own = shapes_.at(argument);
  const Tensor& tensor = function_.tensors[argument];
  bool fits = argument < function_.arguments && shape.size() == own.size();
  for (size_t i = 0; fits && i < own.size(); ++i) {
    const Value& extent = function_.values[tensor.shape[i]];
    fits = shape[i] >= 0 && (extent.op != Op::kConstant || extent.number == shape[i]);
  }
  if (!fits) {
    throw Error(MXF_INVALID, tensor.name + " of " + function_.name + " has another shape.");
  }
  std::copy(shape.begin(), shape.end(), own.begin());
  if (addresses_[argument] != address) ++version_;
  addresses_[argument] = address;
  set_[argument] = true;
}

void Binding::Update() {
  ReadExtents();
  if (placed_ && extents_ == values_) return;
  values_ = extents_;
  placed_ = false;  // where placing fails, the next call tries again
  Place();
  placed_ = true;
  ++version_;
}

void Binding::ReadExtents() {
  for (size_t i = 0; i < function_.values.size(); ++i) {
    if (function_.values[i].op == Op::kSymbol) extents_[i] = kUnset;
  }
  for (size_t i = 0; i < function_.arguments; ++i) {
    const Tensor& tensor = function_.tensors[i];
    if (!set_[i]) {
      throw Error(MXF_INVALID, tensor.name + " of " + function_.name + " was never set.");
    }
    for (size_t d = 0; d < tensor.shape.size(); ++d) {
      const uint32_t index = tensor.shape[d];
      const Value& value = function_.values[index];
      const int64_t extent = shapes_[i][d];
      if (value.op != Op::kSymbol) continue;
      if (extents_[index] != kUnset && extents_[index] != extent) {
        throw Error(MXF_INVALID, tensor.name + " of " + function_.name +
                                     " disagrees with others about " + value.name + ".");
      }
      if (value.number != 0 && extent > value.number) {
        throw Error(MXF_INVALID, value.name + " of " + function_.name + " can be " +
                                     std::to_string(value.number) + " at most, but is " +
                                     std::to_string(extent) + ".");
      }
      extents_[index] = extent;
    }
  }
  Evaluate(function_, &extents_);
}

void Binding::Place() {
  for (size_t i = 0; i < own_.size(); ++i) {
    const Storage& storage = function_.storages[i];
    const int64_t size = values_[storage.size];
    if (size < 0) throw Error(MXF_CORRUPT, "A storage of " + function_.name + " has no size.");
    if (storage.at.has_value()) continue;
    if (own_[i] != nullptr && static_cast<uint64_t>(size) <= own_[i]->size()) continue;
    own_[i].reset();  // first, for there may not be room for both
    own_[i] = device_->Allocate(static_cast<size_t>(size));
  }
  for (size_t i = function_.arguments; i < shapes_.size(); ++i) {
    const Tensor& tensor = function_.tensors[i];
    const Storage& storage = function_.storages[tensor.storage];
    int64_t bytes = tensor.dtype->bits / 8;
    for (size_t d = 0; d < tensor.shape.size(); ++d) {
      shapes_[i][d] = values_[tensor.shape[d]];
      if (shapes_[i][d] < 0 || __builtin_mul_overflow(bytes, shapes_[i][d], &bytes)) bytes = -1;
      if (bytes < 0) break;
    }
    const int64_t offset = values_[tensor.offset], size = values_[storage.size];
    if (bytes < 0 || offset < 0 || offset > size || bytes > size - offset) {
      throw Error(MXF_CORRUPT, "A tensor of " + function_.name + " lies outside its storage.");
    }
    char* begin = storage.at.has_value() ? workspace_ + *storage.at
                                         : own_[tensor.storage]->address();
    addresses_[i] = begin + offset;
  }
}

DeviceTensor Binding::Output(size_t output) const {
  if (output >= function_.outputs.size()) {
    throw Error(MXF_CORRUPT, function_.name + " of the library has too few outputs; compile the " +
                                 "model again, or copy the artifact again.");
  }
  const uint32_t tensor = function_.outputs[output];
  return {addresses_[tensor], shapes_[tensor]};
}

}  // namespace core
}  // namespace mxforge
