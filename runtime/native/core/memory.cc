#include <algorithm>
#include <cstdint>
#include <fstream>
#include <limits>
#include <optional>
#include <sstream>
#include <string>

#include "machine.h"

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <windows.h>
#elif defined(__APPLE__)
#include <mach/mach.h>
#endif

namespace mxforge {
namespace core {

#if defined(_WIN32)

uint64_t AvailableMemory() {
  MEMORYSTATUSEX status{};
  status.dwLength = sizeof(status);
  return GlobalMemoryStatusEx(&status) ? status.ullAvailPhys
                                       : std::numeric_limits<uint64_t>::max();
}

#elif defined(__APPLE__)

uint64_t AvailableMemory() {
  vm_statistics64_data_t statistics;
  mach_msg_type_number_t count = HOST_VM_INFO64_COUNT;
  vm_size_t page;
  if (host_page_size(mach_host_self(), &page) != KERN_SUCCESS ||
      host_statistics64(mach_host_self(), HOST_VM_INFO64,
                        reinterpret_cast<host_info64_t>(&statistics), &count) != KERN_SUCCESS) {
    return std::numeric_limits<uint64_t>::max();
  }
  const uint64_t pages = uint64_t{statistics.free_count} + statistics.inactive_count +
                         statistics.purgeable_count;
  return pages * page;
}

#else

namespace {

constexpr uint64_t kAll = std::numeric_limits<uint64_t>::max();

/*! \brief The number in a file, if it is nothing else. */
std::optional<uint64_t> Number(const std::string& path) {
  std::ifstream file(path);
  uint64_t number;
  if (file >> number) return number;
  return std::nullopt;
}

/*! \brief The number behind a word that begins a line. */
std::optional<uint64_t> NumberAfter(const std::string& path, const std::string& word) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string first;
    uint64_t number;
    if (words >> first >> number && first == word) return number;
  }
  return std::nullopt;
}

/*! \brief What the limit of one control group leaves. */
uint64_t Left(const std::string& folder, const char* limit_file, const char* usage_file,
              const char* cache) {
  const auto limit = Number(folder + "/" + limit_file), usage = Number(folder + "/" + usage_file);
  if (!limit.has_value() || !usage.has_value()) return kAll;
  const uint64_t cached = NumberAfter(folder + "/memory.stat", cache).value_or(0);
  const uint64_t used = *usage - std::min(*usage, cached);
  return *limit - std::min(*limit, used);
}

/*! \brief This process's folder in version 2 of control groups, below the root. */
std::string OwnGroup() {
  std::ifstream file("/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("0::/", 0) == 0) return line.substr(3);
  }
  return "/";
}

}  // namespace

uint64_t AvailableMemory() {
  const std::string root = "/sys/fs/cgroup";
  uint64_t left = kAll;
  if (const auto system = NumberAfter("/proc/meminfo", "MemAvailable:")) left = *system * 1024;
  for (std::string group = OwnGroup();; group.resize(group.rfind('/'))) {
    left = std::min(left, Left(root + group, "memory.max", "memory.current", "inactive_file"));
    if (group.find('/') == std::string::npos) break;
  }
  return std::min(left, Left(root + "/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
                             "total_inactive_file"));
}

#endif

}  // namespace core
}  // namespace mxforge
