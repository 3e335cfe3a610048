/*!
 * \file plan.h
 * \brief Launch plans: what a library's functions do, as data. mxforge/plan.py tells the same.
 *
 * A function is a straight line of steps on tensors, whose sizes are values: constants, extents of
 * the function's arguments, and operations on values that come before them. `ReadPlan` checks
 * every index, so that nobody who runs a plan has to.
 */
#ifndef MXFORGE_CORE_PLAN_H_
#define MXFORGE_CORE_PLAN_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace mxforge {
namespace core {

enum class Op : uint32_t {
  kAdd, kSub, kMul, kDiv, kMod, kMin, kMax, kLess, kLessEqual, kEqual, kAnd, kOr,
  kConstant = 32, kSymbol = 33, kFeature = 34,
};  // NOLINT: the file's codes

struct Value {
  Op op = Op::kConstant;
  uint32_t a = 0, b = 0;  // of an operation: values before it
  int64_t number = 0;     // of a constant; of a symbol its bound, 0 where there is none
  std::string name;       // of a symbol or a feature
};

enum class Role : uint32_t { kInput, kKv, kWeight, kLocal };

/*! \brief An element's format, as DLPack counts them. */
struct Dtype {
  const char* name;
  uint8_t code, bits;
};

struct Tensor {
  Role role = Role::kInput;
  const Dtype* dtype = nullptr;
  std::vector<uint32_t> shape;  // values
  std::string name;             // of an argument
  uint32_t storage = 0;         // of a local one, and the value of its offset in bytes
  uint32_t offset = 0;
};

struct Storage {
  uint32_t size;                // a value, in bytes
  std::optional<uint64_t> at;   // in the workspace; else it has memory of its own
};

struct Argument {
  uint32_t index;  // a tensor, or a value
  uint32_t bits;   // 0: a tensor
};

struct Launch {
  std::array<uint32_t, 3> grid, block;  // values
  uint32_t shared;
  bool overlaps;
};

struct Step {
  std::string kernel;
  std::vector<Argument> arguments;
  std::optional<Launch> launch;
  std::optional<uint32_t> when;  // a value: only where it is not 0
};

struct Function {
  std::string name;
  std::vector<Value> values;
  std::vector<Storage> storages;
  std::vector<Tensor> tensors;  // arguments first
  std::vector<Step> steps;
  std::vector<uint32_t> outputs;  // tensors
  size_t arguments = 0;           // how many tensors are
};

struct Plan {
  std::map<std::string, Function> functions;
  uint64_t workspace = 0;  // bytes, for whichever function runs
};

/*! \brief Error (MXF_CORRUPT) for anything but what this version of the compiler writes. */
Plan ReadPlan(const void* data, size_t size);

/*!
 * \brief Compute all values but symbols and features, which are in `known` already.
 *
 * Error (MXF_INVALID) for a division by what is not positive, and where 64 bits do not hold one.
 */
void Evaluate(const Function& function, std::vector<int64_t>* known);

}  // namespace core
}  // namespace mxforge

#endif  // MXFORGE_CORE_PLAN_H_
