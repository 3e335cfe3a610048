#include "plan.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "error.h"
#include "utf8.h"

namespace mxforge {
namespace core {
namespace {

constexpr char kMagic[] = {'m', 'x', 'p', 'l', 'a', 'n', '\x1a', '\n'};
constexpr uint32_t kVersion = 1;
constexpr uint32_t kNone = 0xFFFFFFFF;
constexpr uint32_t kMost = 1 << 20;  // of anything that is counted
constexpr uint32_t kDimensions = 8;
constexpr uint32_t kMostName = 256;  // bytes: many steps may copy one
constexpr Dtype kDtypes[] = {
    {"float32", 2, 32}, {"float16", 2, 16}, {"bfloat16", 4, 16}, {"int64", 0, 64},
    {"int32", 0, 32},   {"int8", 0, 8},     {"uint8", 1, 8},     {"uint16", 1, 16},
    {"uint32", 1, 32},
};

class Reader {
 public:
  Reader(const void* data, size_t size)
      : at_(static_cast<const unsigned char*>(data)), left_(size) {}

  Plan ReadAll() {
    if (std::memcmp(Take(sizeof(kMagic)), kMagic, sizeof(kMagic)) != 0) {
      Corrupt("it does not begin as one");
    }
    if (const uint32_t version = Word(); version != kVersion) {
      Corrupt("its version is " + std::to_string(version) + ", and this runtime reads " +
              std::to_string(kVersion));
    }
    const uint32_t texts = Count();
    Plan plan;
    const int64_t workspace = Number();
    if (workspace < 0) Corrupt("its workspace is smaller than nothing");
    plan.workspace = static_cast<uint64_t>(workspace);
    for (uint32_t i = 0; i < texts; ++i) texts_.push_back(String());
    for (uint32_t left = Count(); left > 0; --left) {
      Function function = ReadFunction(plan.workspace);
      std::string name = function.name;
      if (!plan.functions.emplace(std::move(name), std::move(function)).second) {
        Corrupt("two functions have one name");
      }
    }
    if (left_ != 0) Corrupt("something follows it");
    return plan;
  }

 private:
  const unsigned char* at_;
  size_t left_;
  std::vector<std::string> texts_;

  [[noreturn]] static void Corrupt(const std::string& what) {
    throw Error(MXF_CORRUPT, "This should be a launch plan, but " + what +
                                 "; compile the model again, or copy the artifact again.");
  }

  Function ReadFunction(uint64_t workspace) {
    Function made;
    made.name = Text();
    const uint32_t values = Count(), storages = Count(), tensors = Count(), steps = Count(),
                   outputs = Count();
    for (uint32_t i = 0; i < values; ++i) made.values.push_back(ReadValue(i));
    for (uint32_t i = 0; i < storages; ++i) {
      made.storages.push_back(ReadStorage(made.values, workspace));
    }
    for (uint32_t i = 0; i < tensors; ++i) {
      made.tensors.push_back(ReadTensor(values, storages));
      const bool local = made.tensors.back().role == Role::kLocal;
      if (!local && made.arguments < i) {
        Corrupt("an argument of " + made.name + " comes after a local tensor");
      }
      if (!local) ++made.arguments;
    }
    for (uint32_t i = 0; i < steps; ++i) made.steps.push_back(ReadStep(values, tensors));
    for (uint32_t i = 0; i < outputs; ++i) made.outputs.push_back(Index(tensors));
    CheckArguments(made);
    return made;
  }

  /*! \brief They have names of their own, and every symbol is an extent of one. */
  void CheckArguments(const Function& function) {
    std::set<std::string> names;
    std::set<uint32_t> extents;
    for (size_t i = 0; i < function.arguments; ++i) {
      const Tensor& argument = function.tensors[i];
      if (!names.insert(argument.name).second) {
        Corrupt("two arguments of " + function.name + " have one name");
      }
      for (uint32_t extent : argument.shape) {
        const Op op = function.values[extent].op;
        if (op != Op::kConstant && op != Op::kSymbol) {
          Corrupt("an argument of " + function.name + " has a computed extent");
        }
        extents.insert(extent);
      }
    }
    std::set<std::string> symbols;
    for (uint32_t i = 0; i < function.values.size(); ++i) {
      const Value& value = function.values[i];
      if (value.op != Op::kSymbol) continue;
      if (!symbols.insert(value.name).second) {
        Corrupt("two symbols of " + function.name + " have one name");
      }
      if (!extents.count(i)) {
        Corrupt("no argument of " + function.name + " has the extent " + value.name);
      }
    }
  }

  Value ReadValue(uint32_t before) {
    Value value;
    value.op = static_cast<Op>(Word());
    switch (value.op) {
      case Op::kConstant:
        value.number = Number();
        break;
      case Op::kSymbol:
        value.name = Text();
        value.number = Word();
        break;
      case Op::kFeature:
        value.name = Text();
        break;
      default:
        if (value.op > Op::kOr) Corrupt("there is no such operation");
        value.a = Index(before);
        value.b = Index(before);
    }
    return value;
  }

  Storage ReadStorage(const std::vector<Value>& values, uint64_t workspace) {
    Storage storage{Index(static_cast<uint32_t>(values.size())), std::nullopt};
    const int64_t at = Number();
    if (at < 0) return storage;
    const Value& size = values[storage.size];
    storage.at = static_cast<uint64_t>(at);
    if (size.op != Op::kConstant || size.number < 0 || *storage.at > workspace ||
        static_cast<uint64_t>(size.number) > workspace - *storage.at) {
      Corrupt("a storage lies outside the workspace");
    }
    return storage;
  }

  Tensor ReadTensor(uint32_t values, uint32_t storages) {
    Tensor tensor;
    tensor.role = static_cast<Role>(Word());
    if (tensor.role > Role::kLocal) Corrupt("there is no such role");
    const uint32_t dtype = Word();
    if (dtype >= std::size(kDtypes)) Corrupt("there is no such number format");
    tensor.dtype = &kDtypes[dtype];
    const uint32_t dimensions = Word();
    if (dimensions > kDimensions) Corrupt("a tensor has too many dimensions");
    for (uint32_t i = 0; i < dimensions; ++i) tensor.shape.push_back(Index(values));
    if (tensor.role == Role::kLocal) {
      tensor.storage = Index(storages);
      tensor.offset = Index(values);
    } else {
      tensor.name = Text();
    }
    return tensor;
  }

  Step ReadStep(uint32_t values, uint32_t tensors) {
    Step step;
    step.kernel = Text();
    if (const uint32_t when = Word(); when != kNone) {
      if (when >= values) Corrupt(step.kernel + " depends on a value that is not there");
      step.when = when;
    }
    for (uint32_t left = Count(); left > 0; --left) {
      const uint32_t bits = Word();
      if (bits != 0 && bits != 32 && bits != 64) Corrupt("a kernel takes an odd integer");
      step.arguments.push_back({Index(bits ? values : tensors), bits});
    }
    if (Word()) {
      Launch launch{};
      for (uint32_t& extent : launch.grid) extent = Index(values);
      for (uint32_t& extent : launch.block) extent = Index(values);
      launch.shared = Index(values);
      launch.overlaps = Index(2) != 0;
      step.launch = launch;
    }
    return step;
  }

  const unsigned char* Take(size_t size) {
    if (size > left_) Corrupt("it ends too early");
    const unsigned char* taken = at_;
    at_ += size;
    left_ -= size;
    return taken;
  }

  uint64_t Little(size_t bytes) {
    const unsigned char* taken = Take(bytes);
    uint64_t number = 0;
    for (size_t i = bytes; i-- > 0;) number = number << 8 | taken[i];
    return number;
  }

  uint32_t Word() { return static_cast<uint32_t>(Little(4)); }

  int64_t Number() { return static_cast<int64_t>(Little(8)); }

  /*! \brief How many follow, each of at least four bytes. */
  uint32_t Count() {
    const uint32_t count = Word();
    if (count > kMost || count > left_ / 4) Corrupt("its counts do not fit into it");
    return count;
  }

  uint32_t Index(uint32_t count) {
    const uint32_t index = Word();
    if (index >= count) Corrupt("something it names is not there");
    return index;
  }

  std::string String() {
    const uint32_t size = Word();
    if (size > kMostName) Corrupt("a name is too long");
    const auto* text = reinterpret_cast<const char*>(Take((size + size_t{3}) & ~size_t{3}));
    std::string made(text, size);
    if (!IsUtf8(made)) Corrupt("a name is no UTF-8");
    return made;
  }

  const std::string& Text() { return texts_[Index(static_cast<uint32_t>(texts_.size()))]; }
};

[[noreturn]] void Uncomputable(const Function& function) {
  throw Error(MXF_INVALID, "A size in " + function.name + " cannot be computed.");
}

}  // namespace

Plan ReadPlan(const void* data, size_t size) { return Reader(data, size).ReadAll(); }

void Evaluate(const Function& function, std::vector<int64_t>* known) {
  std::vector<int64_t>& v = *known;
  for (size_t i = 0; i < function.values.size(); ++i) {
    const Value& value = function.values[i];
    if (value.op == Op::kSymbol || value.op == Op::kFeature) continue;
    if (value.op == Op::kConstant) {
      v[i] = value.number;
      continue;
    }
    const int64_t a = v[value.a], b = v[value.b];
    bool overflows = false;
    switch (value.op) {
      case Op::kAdd:
        overflows = __builtin_add_overflow(a, b, &v[i]);
        break;
      case Op::kSub:
        overflows = __builtin_sub_overflow(a, b, &v[i]);
        break;
      case Op::kMul:
        overflows = __builtin_mul_overflow(a, b, &v[i]);
        break;
      case Op::kDiv:
        if (b <= 0) Uncomputable(function);
        v[i] = a / b - (a % b < 0);
        break;
      case Op::kMod:
        if (b <= 0) Uncomputable(function);
        v[i] = a % b + (a % b < 0 ? b : 0);
        break;
      case Op::kMin:
        v[i] = std::min(a, b);
        break;
      case Op::kMax:
        v[i] = std::max(a, b);
        break;
      case Op::kLess:
        v[i] = a < b;
        break;
      case Op::kLessEqual:
        v[i] = a <= b;
        break;
      case Op::kEqual:
        v[i] = a == b;
        break;
      case Op::kAnd:
        v[i] = a && b;
        break;
      default:
        v[i] = a || b;
    }
    if (overflows) Uncomputable(function);
  }
}

}  // namespace core
}  // namespace mxforge
