/*!
 * \file hazards.h
 * \brief Which barrier a command needs, from what it and its predecessors read and write.
 *
 * Pure bookkeeping, without Vulkan. A position counts commands and barriers in the order of their
 * recording. The rules, which tests/support/vulkan_hazards.py states a second time as a checker:
 *
 *  - a write must be available and visible to whatever reads or overwrites it later (a memory
 *    barrier); a read must only have ended before the data is overwritten (an execution barrier);
 *  - barriers chain: compute -> transfer, then transfer -> compute, orders compute -> compute;
 *  - a host that has waited for position p knows all commands up to p to have ended; it sees what
 *    they wrote only after a barrier towards the host, also waited for;
 *  - what the host did before a submit is ordered before and visible to what is submitted.
 */
#ifndef MXFORGE_VULKAN_HAZARDS_H_
#define MXFORGE_VULKAN_HAZARDS_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace mxforge {
namespace vulkan {

enum class Stage : uint8_t { kCompute = 0, kTransfer = 1, kHost = 2 };
constexpr size_t kStages = 3;

constexpr uint8_t StageBit(Stage stage) {
  return static_cast<uint8_t>(1U << static_cast<unsigned>(stage));
}

/*! \brief Bytes [begin, end) of a resource that a command touches. */
struct Access {
  uint32_t resource = 0;
  bool write = false;
  uint64_t begin = 0;
  uint64_t end = 0;
};

/*! \brief Stages whose earlier commands must end, and whose writes must be visible, before `to`. */
struct Barrier {
  uint8_t execution = 0;
  uint8_t memory = 0;  // a subset of `execution`
  Stage to = Stage::kCompute;

  explicit operator bool() const { return execution != 0; }
};

/*! \brief What happened, in order, as JSON: input of the checker. */
class HazardLog {
 public:
  void Command(Stage stage, const std::string& name, const Access* accesses, size_t count,
               uint64_t position);
  void Record(const Barrier& barrier, uint64_t position);
  void Wait(uint64_t position);
  void Forget(uint32_t resource);
  std::string Json() const { return "[" + text_ + "]"; }

 private:
  std::string text_;
  void Begin(const char* kind);
};

class HazardTracker {
 public:
  /*! \brief Account for a command of the device; returns the barrier to record before it. */
  Barrier Command(Stage stage, const Access* accesses, size_t count, const std::string& name);

  /*! \brief The barrier behind all that the device does before, whatever comes next. */
  Barrier Everything(Stage to);

  /*! \brief The barrier towards the host to record (then submit, then wait) before the host may
   *  touch this; none if one was recorded since the last conflicting write. */
  Barrier BeforeHost(const Access& access);

  /*! \brief Whether BeforeHost would ask for nothing. */
  bool HostReady(const Access& access) const;

  /*! \brief The host has touched this, after whatever BeforeHost asked for. */
  void Host(const Access& access, const std::string& name);

  /*! \brief The host knows that everything up to `position` has ended. */
  void Waited(uint64_t position);

  /*! \brief The resource is gone; its number may come again for another one. */
  void Forget(uint32_t resource);

  /*! \brief The position of what was recorded last. */
  uint64_t Position() const { return position_; }

  /*! \brief Start or stop logging (null); the log must outlive its use. */
  void LogTo(HazardLog* log) { log_ = log; }

 private:
  struct Past {
    uint64_t begin;
    uint64_t end;
    uint64_t position;
    Stage stage;
    bool write;
  };
  using Matrix = std::array<std::array<uint64_t, kStages>, kStages>;

  std::vector<std::vector<Past>> past_;  // by resource: what later accesses may conflict with
  // ordered_[s][d]: commands of stage s up to this position have ended before what stage d does
  // next. visible_: and what they wrote is visible to it.
  Matrix ordered_{};
  Matrix visible_{};
  uint64_t position_ = 0;
  HazardLog* log_ = nullptr;

  std::vector<Past>& PastOf(uint32_t resource);
  void Conflicts(const Access& access, Barrier* barrier) const;
  void Apply(const Barrier& barrier);
  void Remember(Stage stage, const Access& access);
};

}  // namespace vulkan
}  // namespace mxforge

#endif  // MXFORGE_VULKAN_HAZARDS_H_
