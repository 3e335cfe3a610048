#include "function.h"

#include <algorithm>
#include <cstring>

#include "../core/error.h"

namespace mxforge {
namespace cuda {
namespace {

// A pause of the device is what a graph saves; a single launch has none within.
constexpr ptrdiff_t kLeastLaunches = 2;

LaunchAttribute Overlapping() {
  LaunchAttribute attribute{};
  attribute.id = kProgrammaticSerialization;
  attribute.value.number = 1;
  return attribute;
}

}  // namespace

CudaFunction::CudaFunction(const core::Function& function, void* workspace, CudaDevice* device)
    : binding_(function, workspace, device), device_(device), graphs_(device) {
  for (const core::Step& step : function.steps) {
    if (!step.launch.has_value()) {
      throw core::Error(MXF_CORRUPT, "The launch plan is for a CPU, but its library is not.");
    }
    launches_.push_back({&step, device->Find(step.kernel), words_.size()});
    words_.resize(words_.size() + step.arguments.size());
    const core::Value& shared = function.values[step.launch->shared];
    if (shared.op == core::Op::kConstant) {
      device->Permit(step.kernel, launches_.back().kernel, shared.number);
    }
  }
  for (uint64_t& word : words_) arguments_.push_back(&word);
}

void CudaFunction::Prepare() {
  key_.clear();
  for (size_t i = 0; i < launches_.size(); ++i) {
    Launch& launch = launches_[i];
    const core::Launch& of = *launch.step->launch;
    const auto value = [&](uint32_t index) {
      const int64_t number = binding_.value(index);
      if (number < 0 || number > INT32_MAX) {
        throw core::Error(MXF_CORRUPT, "A launch of " + launch.step->kernel + " has no size.");
      }
      return static_cast<unsigned>(number);
    };
    launch.runs = !launch.step->when.has_value() || binding_.value(*launch.step->when) != 0;
    if (!launch.runs) continue;  // its sizes may be anything
    for (size_t axis = 0; axis < 3; ++axis) {
      launch.config.grid[axis] = value(of.grid[axis]);
      launch.config.block[axis] = value(of.block[axis]);
      launch.runs = launch.runs && launch.config.grid[axis] != 0;
    }
    launch.config.shared = value(of.shared);
    if (!launch.runs) continue;
    device_->Permit(launch.step->kernel, launch.kernel, launch.config.shared);
    key_.push_back(i);
    key_.insert(key_.end(), launch.config.grid, launch.config.grid + 3);
    key_.insert(key_.end(), launch.config.block, launch.config.block + 3);
    key_.push_back(launch.config.shared);
    for (size_t a = 0; a < launch.step->arguments.size(); ++a) {
      const core::Argument& argument = launch.step->arguments[a];
      uint64_t* word = &words_[launch.first + a];
      *word = 0;
      if (argument.bits == 0) {
        *word = reinterpret_cast<uint64_t>(binding_.address(argument.index));
      } else if (argument.bits == 32) {
        const auto number = static_cast<int32_t>(binding_.value(argument.index));
        std::memcpy(word, &number, sizeof(number));
      } else {
        const int64_t number = binding_.value(argument.index);
        std::memcpy(word, &number, sizeof(number));
      }
      key_.push_back(*word);
    }
  }
}

void CudaFunction::Enqueue() {
  static LaunchAttribute overlapping = Overlapping();
  for (Launch& launch : launches_) {
    if (!launch.runs) continue;
    launch.config.stream = device_->stream();
    launch.config.attributes = launch.step->launch->overlaps ? &overlapping : nullptr;
    launch.config.attribute_count = launch.step->launch->overlaps ? 1 : 0;
    device_->Check(device_->driver().cuLaunchKernelEx(&launch.config, launch.kernel->handle,
                                                      arguments_.data() + launch.first, nullptr),
                   "cuLaunchKernelEx");
  }
}

void CudaFunction::Run() {
  const CudaDevice::Turn turn(device_);
  binding_.Update();
  const bool changed = version_ != binding_.version();
  if (changed) {
    version_ = 0;  // where this fails, the next call tries again
    Prepare();
    version_ = binding_.version();
  }
  const auto enqueue = [this] { Enqueue(); };
  const auto runs = [](const Launch& launch) { return launch.runs; };
  if (std::count_if(launches_.begin(), launches_.end(), runs) < kLeastLaunches) {
    enqueue();
  } else {
    graphs_.Run(key_, enqueue);
  }
}

}  // namespace cuda
}  // namespace mxforge
