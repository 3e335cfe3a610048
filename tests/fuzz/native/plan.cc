// Launch plans: read, then bound as a device does, with every local tensor written from end to end.
#include "plan.h"

#include <cstring>

#include "binding.h"
#include "error.h"
#include "host.h"
#include "target.h"

namespace core = mxforge::core;

namespace {

constexpr size_t kRoom = 1 << 16;  // bytes that storages get

void WriteAll(const core::Function& function, const core::Binding& binding) {
  for (size_t i = function.arguments; i < function.tensors.size(); ++i) {
    const auto tensor = static_cast<uint32_t>(i);
    size_t bytes = function.tensors[i].dtype->bits / 8;
    for (int64_t extent : binding.shape(tensor)) bytes *= static_cast<size_t>(extent);
    std::memset(binding.address(tensor), 1, bytes);
  }
  for (size_t i = 0; i < function.outputs.size(); ++i) binding.Output(i);
}

/*! \brief Call it with all symbols of this value. */
void Bind(const core::Function& function, void* workspace, int64_t symbols, testing::Host* host) {
  core::Binding binding(function, workspace, host);
  try {
    for (size_t i = 0; i < function.arguments; ++i) {
      std::vector<int64_t> shape;
      for (uint32_t extent : function.tensors[i].shape) {
        const core::Value& value = function.values[extent];
        shape.push_back(value.op == core::Op::kSymbol ? symbols : value.number);
      }
      binding.Set(i, nullptr, shape);
    }
    binding.Update();
    WriteAll(function, binding);
  } catch (const core::Error& error) {
    if (error.status() == MXF_FAILED) fuzz::Fail(error.what());
  }
}

/*! \brief All values where every symbol is 3, or that they cannot be computed. */
std::string Values(const core::Function& function) {
  std::vector<int64_t> known(function.values.size(), 0);
  for (size_t i = 0; i < known.size(); ++i) {
    if (function.values[i].op == core::Op::kSymbol) known[i] = 3;
  }
  try {
    core::Evaluate(function, &known);
  } catch (const core::Error&) {
    return " none";
  }
  std::string made;
  for (int64_t value : known) made += " " + std::to_string(value);
  return made;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::verdict.clear();
  fuzz::ResetAllocated();
  core::Plan plan;
  try {
    plan = core::ReadPlan(data, size);
  } catch (const core::Error& error) {
    if (error.status() != MXF_CORRUPT) fuzz::Fail(error.what());
    fuzz::CheckAllocated(size);
    return 0;
  }
  fuzz::CheckAllocated(size);
  testing::Host host(kRoom);
  fuzz::verdict = "read";
  for (const auto& [name, function] : plan.functions) {
    fuzz::verdict += "\n" + std::to_string(function.arguments) + Values(function);
    if (plan.workspace > kRoom) continue;
    const auto workspace = host.Allocate(static_cast<size_t>(plan.workspace));
    for (int64_t symbols : {0, 1, 3, 1 << 16}) {
      Bind(function, workspace->address(), symbols, &host);
    }
  }
  return 0;
}
