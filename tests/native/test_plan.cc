// Values of plans, and functions bound to tensors.
#include "binding.h"
#include "check.h"
#include "host.h"

using namespace mxforge::core;

namespace {

constexpr Dtype kF32 = {"float32", 2, 32};

Value Constant(int64_t number) { return {Op::kConstant, 0, 0, number, ""}; }
Value Symbol(const char* name, int64_t most) { return {Op::kSymbol, 0, 0, most, name}; }
Value Computed(Op op, uint32_t a, uint32_t b) { return {op, a, b, 0, ""}; }
Tensor Argument(const char* name, std::vector<uint32_t> shape) {
  return {Role::kInput, &kF32, std::move(shape), name, 0, 0};
}
Tensor Local(std::vector<uint32_t> shape, uint32_t storage, uint32_t offset) {
  return {Role::kLocal, &kF32, std::move(shape), "", storage, offset};
}

/*! \brief y [n, 4] in memory of its own, and z [4] at 16 of the workspace, from x [n] and s []. */
Function Small() {
  Function made;
  made.name = "small";
  made.values = {Symbol("n", 8), Constant(4), Constant(16), Computed(Op::kMul, 0, 2), Constant(0)};
  made.storages = {{3, std::nullopt}, {2, 16}};
  made.tensors = {Argument("x", {0}), Argument("s", {}), Local({0, 1}, 0, 4), Local({1}, 1, 4)};
  made.arguments = 2;
  made.outputs = {2};
  return made;
}

int64_t Result(Op op, int64_t a, int64_t b) {
  Function function;
  function.name = "f";
  function.values = {Constant(a), Constant(b), Computed(op, 0, 1)};
  std::vector<int64_t> known(3);
  Evaluate(function, &known);
  return known[2];
}

}  // namespace

TEST(values) {
  const struct {
    Op op;
    int64_t a, b, result;
  } cases[] = {
      {Op::kAdd, 3, -5, -2},     {Op::kSub, 3, 5, -2},       {Op::kMul, -3, 5, -15},
      {Op::kDiv, 7, 2, 3},       {Op::kDiv, -7, 2, -4},      {Op::kMod, 7, 2, 1},
      {Op::kMod, -7, 2, 1},      {Op::kMin, 3, -1, -1},      {Op::kMax, 3, -1, 3},
      {Op::kLess, 3, 3, 0},      {Op::kLessEqual, 3, 3, 1},  {Op::kEqual, 2, 3, 0},
      {Op::kAnd, 2, 0, 0},       {Op::kAnd, 2, 3, 1},        {Op::kOr, 0, 0, 0},
      {Op::kOr, 0, 4, 1},        {Op::kDiv, INT64_MIN, 1, INT64_MIN},
      {Op::kMod, INT64_MIN, 3, 1}, {Op::kAdd, INT64_MIN, INT64_MAX, -1},
  };
  for (const auto& [op, a, b, result] : cases) CHECK_EQ(Result(op, a, b), result);
  CHECK_REFUSED(Result(Op::kDiv, 1, 0), MXF_INVALID, "cannot be computed");
  CHECK_REFUSED(Result(Op::kDiv, INT64_MIN, -1), MXF_INVALID, "cannot be computed");
  CHECK_REFUSED(Result(Op::kMod, 1, -1), MXF_INVALID, "cannot be computed");
  CHECK_REFUSED(Result(Op::kMul, INT64_MAX, 2), MXF_INVALID, "cannot be computed");
  CHECK_REFUSED(Result(Op::kAdd, INT64_MAX, 1), MXF_INVALID, "cannot be computed");
  CHECK_REFUSED(Result(Op::kSub, INT64_MIN, 1), MXF_INVALID, "cannot be computed");
}

TEST(a_binding_places_tensors) {
  const Function function = Small();
  testing::Host host(1 << 20);
  char workspace[64];
  Binding binding(function, workspace, &host);
  float x[8];
  binding.Set(0, x, {2});
  binding.Set(1, x, {});
  binding.Update();
  CHECK(binding.address(0) == x && binding.shape(0) == std::vector<int64_t>({2}));
  CHECK(binding.shape(2) == std::vector<int64_t>({2, 4}));
  CHECK(binding.address(3) == workspace + 16);
  CHECK(binding.Output(0).address == binding.address(2));
  const uint64_t version = binding.version();
  binding.Update();
  CHECK_EQ(binding.version(), version);
  void* const two = binding.address(2);
  binding.Set(0, x, {1});  // less: the memory stays
  binding.Update();
  CHECK(binding.address(2) == two && binding.version() > version);
  binding.Set(0, x, {8});
  binding.Update();
  std::memset(binding.address(2), 0, 8 * 4 * sizeof(float));  // it grew
}

TEST(a_binding_refuses_what_does_not_fit) {
  const Function function = Small();
  testing::Host host(1 << 20);
  char workspace[64];
  float x[9];
  const auto bound = [&](std::vector<int64_t> shape) {
    Binding binding(function, workspace, &host);
    binding.Set(0, x, shape);
    binding.Set(1, x, {});
    binding.Update();
  };
  CHECK_REFUSED(bound({9}), MXF_INVALID, "n of small can be 8 at most, but is 9");
  CHECK_REFUSED(bound({-1}), MXF_INVALID, "x of small has another shape");
  CHECK_REFUSED(bound({1, 1}), MXF_INVALID, "x of small has another shape");
  Binding binding(function, workspace, &host);
  CHECK_REFUSED(binding.Update(), MXF_INVALID, "x of small was never set");
  binding.Set(0, x, {1});
  CHECK_REFUSED(binding.Update(), MXF_INVALID, "s of small was never set");
  CHECK_REFUSED(binding.Output(1), MXF_CORRUPT, "too few outputs");
}

TEST(a_binding_refuses_tensors_that_disagree_or_lie_outside) {
  testing::Host host(100);
  char workspace[64];
  float x[8];
  const auto bound = [&](const Function& function, int64_t n, int64_t m) {
    Binding binding(function, workspace, &host);
    binding.Set(0, x, {n});
    binding.Set(1, x, {m});
    binding.Update();
  };
  Function function = Small();
  function.tensors[1].shape = {0};
  CHECK_REFUSED(bound(function, 1, 2), MXF_INVALID, "s of small disagrees with others about n");
  CHECK_REFUSED(bound(function, 8, 8), MXF_MEMORY, "too small");
  bound(function, 6, 6);
  for (const auto& [value, number] : {std::pair{4, 1}, {4, -1}, {1, 5}, {1, -1}, {2, -1}}) {
    Function wrong = function;
    wrong.values[static_cast<size_t>(value)].number = number;
    CHECK_REFUSED(bound(wrong, 1, 1), MXF_CORRUPT, value == 2 ? "no size" : "outside its storage");
  }
  // An error leaves nothing that the next call takes for its own.
  Binding binding(function, workspace, &host);
  binding.Set(0, x, {8});
  binding.Set(1, x, {8});
  for (int i = 0; i < 2; ++i) CHECK_REFUSED(binding.Update(), MXF_MEMORY, "too small");
  binding.Set(0, x, {1});
  binding.Set(1, x, {1});
  binding.Update();
  std::memset(binding.address(2), 0, 16);
}
