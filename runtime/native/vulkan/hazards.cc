#include "hazards.h"

#include <algorithm>

namespace mxforge {
namespace vulkan {
namespace {

// A resource touched in more different ways than this is remembered as a whole, at the price of
// barriers that may not be needed.
constexpr size_t kMaxPast = 64;

constexpr size_t Index(Stage stage) { return static_cast<size_t>(stage); }

const char* const kStageNames[kStages] = {"compute", "transfer", "host"};

std::string StageList(uint8_t mask) {
  std::string text = "[";
  for (size_t s = 0; s < kStages; ++s) {
    if ((mask >> s & 1) == 0) continue;
    if (text.size() > 1) text += ",";
    text += std::string("\"") + kStageNames[s] + "\"";
  }
  return text + "]";
}

std::string Escaped(const std::string& name) {
  std::string text;
  for (char c : name) {
    const bool plain = static_cast<unsigned char>(c) >= 0x20 && c != '"' && c != '\\';
    text += plain ? c : '?';
  }
  return text;
}

}  // namespace

void HazardLog::Begin(const char* kind) {
  if (!text_.empty()) text_ += ",\n";
  text_ += std::string("{\"event\":\"") + kind + "\"";
}

void HazardLog::Command(Stage stage, const std::string& name, const Access* accesses, size_t count,
                        uint64_t position) {
  Begin("command");
  text_ += std::string(",\"stage\":\"") + kStageNames[Index(stage)] + "\",\"name\":\"" +
           Escaped(name) + "\",\"position\":" + std::to_string(position) + ",\"accesses\":[";
  for (size_t i = 0; i < count; ++i) {
    const Access& access = accesses[i];
    if (i != 0) text_ += ",";
    text_ += "[" + std::to_string(access.resource) + (access.write ? ",\"w\"," : ",\"r\",") +
             std::to_string(access.begin) + "," + std::to_string(access.end) + "]";
  }
  text_ += "]}";
}

void HazardLog::Record(const Barrier& barrier, uint64_t position) {
  Begin("barrier");
  text_ += ",\"position\":" + std::to_string(position) +
           ",\"execution\":" + StageList(barrier.execution) +
           ",\"memory\":" + StageList(barrier.memory) + ",\"to\":\"" +
           kStageNames[Index(barrier.to)] + "\"}";
}

void HazardLog::Wait(uint64_t position) {
  Begin("wait");
  text_ += ",\"position\":" + std::to_string(position) + "}";
}

void HazardLog::Forget(uint32_t resource) {
  Begin("forget");
  text_ += ",\"resource\":" + std::to_string(resource) + "}";
}

std::vector<HazardTracker::Past>& HazardTracker::PastOf(uint32_t resource) {
  if (resource >= past_.size()) past_.resize(resource + 1);
  return past_[resource];
}

void HazardTracker::Conflicts(const Access& access, Barrier* barrier) const {
  if (access.resource >= past_.size()) return;
  const size_t to = Index(barrier->to);
  for (const Past& past : past_[access.resource]) {
    if (!past.write && !access.write) continue;
    if (past.end <= access.begin || access.end <= past.begin) continue;
    const size_t from = Index(past.stage);
    const uint64_t guarded = past.write ? visible_[from][to] : ordered_[from][to];
    if (guarded >= past.position) continue;
    barrier->execution |= StageBit(past.stage);
    if (past.write) barrier->memory |= StageBit(past.stage);
  }
}

void HazardTracker::Apply(const Barrier& barrier) {
  const size_t to = Index(barrier.to);
  const uint64_t before = position_;
  ++position_;
  if (log_ != nullptr) log_->Record(barrier, position_);
  const Matrix ordered = ordered_;
  const Matrix visible = visible_;
  for (size_t from = 0; from < kStages; ++from) {
    for (size_t through = 0; through < kStages; ++through) {
      const bool direct = through == from;
      if ((barrier.execution >> through & 1) != 0) {
        const uint64_t reach = direct ? before : ordered[from][through];
        ordered_[from][to] = std::max(ordered_[from][to], reach);
      }
      if ((barrier.memory >> through & 1) != 0) {
        const uint64_t reach = direct ? before : visible[from][through];
        visible_[from][to] = std::max(visible_[from][to], reach);
      }
    }
  }
}

void HazardTracker::Remember(Stage stage, const Access& access) {
  std::vector<Past>& past = PastOf(access.resource);
  const uint64_t position = position_;
  // A write is ordered behind all that it conflicts with, so what conflicts with those conflicts
  // with it, and is guarded towards them where it is guarded towards it. The same holds for a
  // read that covers an earlier one of its own stage.
  past.erase(std::remove_if(past.begin(), past.end(),
                            [&](const Past& old) {
                              const bool covered =
                                  access.begin <= old.begin && old.end <= access.end;
                              return covered && old.position < position &&
                                     (access.write || (!old.write && old.stage == stage));
                            }),
             past.end());
  // Neighbouring chunks of one copy become one entry; exact as long as no barrier came between.
  for (Past& old : past) {
    if (old.write != access.write || old.stage != stage || old.end != access.begin) continue;
    const size_t from = Index(stage);
    bool untouched = true;
    for (size_t to = 0; to < kStages; ++to) {
      untouched = untouched && ordered_[from][to] < old.position;
    }
    if (!untouched) continue;
    old.end = access.end;
    old.position = position;
    return;
  }
  if (past.size() >= kMaxPast) {
    // Every entry stays as strict as the newest of its kind over the whole range.
    uint64_t begin = access.begin;
    uint64_t end = access.end;
    for (const Past& old : past) {
      begin = std::min(begin, old.begin);
      end = std::max(end, old.end);
    }
    std::vector<Past> merged;
    for (const Past& old : past) {
      const auto same = std::find_if(merged.begin(), merged.end(), [&](const Past& other) {
        return other.stage == old.stage && other.write == old.write;
      });
      if (same == merged.end()) {
        merged.push_back({begin, end, old.position, old.stage, old.write});
      } else {
        same->position = std::max(same->position, old.position);
      }
    }
    past = std::move(merged);
  }
  past.push_back({access.begin, access.end, position, stage, access.write});
}

Barrier HazardTracker::Command(Stage stage, const Access* accesses, size_t count,
                               const std::string& name) {
  Barrier barrier;
  barrier.to = stage;
  for (size_t i = 0; i < count; ++i) Conflicts(accesses[i], &barrier);
  if (barrier) Apply(barrier);
  ++position_;
  if (log_ != nullptr) log_->Command(stage, name, accesses, count, position_);
  for (size_t i = 0; i < count; ++i) Remember(stage, accesses[i]);
  return barrier;
}

Barrier HazardTracker::Everything(Stage to) {
  Barrier barrier;
  barrier.execution = barrier.memory = StageBit(Stage::kCompute) | StageBit(Stage::kTransfer);
  barrier.to = to;
  Apply(barrier);
  return barrier;
}

Barrier HazardTracker::BeforeHost(const Access& access) {
  Barrier barrier;
  barrier.to = Stage::kHost;
  Conflicts(access, &barrier);
  // The wait that follows orders execution; only writes need a barrier on top.
  barrier.execution = barrier.memory;
  if (barrier) Apply(barrier);
  return barrier;
}

bool HazardTracker::HostReady(const Access& access) const {
  Barrier barrier;
  barrier.to = Stage::kHost;
  Conflicts(access, &barrier);
  return barrier.memory == 0;
}

void HazardTracker::Host(const Access& access, const std::string& name) {
  if (log_ != nullptr) log_->Command(Stage::kHost, name, &access, 1, position_);
}

void HazardTracker::Waited(uint64_t position) {
  if (position == 0 || ordered_[0][0] >= position) {
    // Known already, to every pair of stages or at least to this one: look closer only if not.
    bool known = true;
    for (const auto& row : ordered_) {
      for (uint64_t reach : row) known = known && reach >= position;
    }
    if (known) return;
  }
  if (log_ != nullptr) log_->Wait(position);
  for (auto& row : ordered_) {
    for (uint64_t& reach : row) reach = std::max(reach, position);
  }
}

void HazardTracker::Forget(uint32_t resource) {
  if (log_ != nullptr) log_->Forget(resource);
  if (resource < past_.size()) past_[resource].clear();
}

}  // namespace vulkan
}  // namespace mxforge
