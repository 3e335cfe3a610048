#include "contract.h"

#include "error.h"

namespace mxforge {
namespace core {
namespace {

[[noreturn]] void Foreign(const Function& function, const std::string& what) {
  throw Error(MXF_CORRUPT, function.name + " of the library " + what + "; compile the model again, " +
                               "or copy the artifact again.");
}

bool HasWords(const Function& function, size_t tensor) {
  return function.tensors[tensor].dtype->bits == 32;
}

}  // namespace

void Called::Set(const std::string& name, void* address, const std::vector<int64_t>& shape) {
  const auto known = arguments.find(name);
  if (known == arguments.end() || !HasWords(runner->function(), known->second)) {
    Foreign(runner->function(), "does not take " + name + " of 32 bits");
  }
  runner->Set(known->second, address, shape);
}

DeviceTensor Called::Output(size_t output, const std::vector<int64_t>& shape) const {
  const Function& function = runner->function();
  DeviceTensor made = runner->Output(output);
  if (made.shape != shape || !HasWords(function, function.outputs[output])) {
    Foreign(function, "gives something else than this runtime expects");
  }
  return made;
}

}  // namespace core
}  // namespace mxforge
