// This machine, as others tell of it.
#include "machine.h"

#include <sys/utsname.h>

#include <algorithm>
#include <atomic>
#include <fstream>
#include <set>
#include <sstream>

#include "check.h"
#include "os.h"
#include "pool.h"

using namespace mxforge::core;

TEST(system_is_told_as_uname_does) {
  utsname system;
  CHECK_EQ(uname(&system), 0);
  const std::string name = system.sysname;
  CHECK_EQ(HostSystem(), (name == "Linux" ? "linux-" : "darwin-") + std::string(system.machine));
}

TEST(cpu_features_are_those_of_linux) {
  // LLVM's spelling, and Linux's.
  const std::pair<const char*, const char*> names[] = {
      {"sse3", "pni"},           {"ssse3", "ssse3"},           {"fma", "fma"},
      {"cx16", "cx16"},          {"sse4.1", "sse4_1"},         {"sse4.2", "sse4_2"},
      {"movbe", "movbe"},        {"popcnt", "popcnt"},         {"avx", "avx"},
      {"f16c", "f16c"},          {"bmi", "bmi1"},              {"avx2", "avx2"},
      {"bmi2", "bmi2"},          {"avx512f", "avx512f"},       {"avx512dq", "avx512dq"},
      {"avx512cd", "avx512cd"},  {"avx512bw", "avx512bw"},     {"avx512vl", "avx512vl"},
      {"avx512vnni", "avx512_vnni"}, {"amx-bf16", "amx_bf16"}, {"avx512fp16", "avx512_fp16"},
      {"amx-tile", "amx_tile"},  {"amx-int8", "amx_int8"},     {"avxvnni", "avx_vnni"},
      {"avx512bf16", "avx512_bf16"}, {"sahf", "lahf_lm"},      {"lzcnt", "abm"},
  };
  std::ifstream file("/proc/cpuinfo");
  std::set<std::string> flags;
  for (std::string line; std::getline(file, line) && flags.empty();) {
    if (line.rfind("flags", 0) != 0) continue;
    std::istringstream words(line);
    for (std::string word; words >> word;) flags.insert(word);
  }
  if (!flags.empty()) {  // an x86 under Linux
    for (const auto& [name, flag] : names) CHECK_EQ(std::string(name) + (HasCpuFeature(name) ? "" : " is missing"),
                                                    std::string(name) + (flags.count(flag) ? "" : " is missing"));
  }
  for (const char* name : {"", "avx3", "AVX2", "avx "}) CHECK(!HasCpuFeature(name));
}

TEST(memory_is_within_what_there_is) {
  std::ifstream file("/proc/meminfo");
  std::string word;
  uint64_t kilobytes = 0;
  if (file >> word >> kilobytes) CHECK(AvailableMemory() <= kilobytes * 1024);
  CHECK(AvailableMemory() > 0);
  CHECK(UsableCores() >= 1);
  CHECK_REFUSED(ZeroedMemory(size_t{1} << 60), MXF_MEMORY, "no memory for");
  ZeroedMemory memory(100), moved(std::move(memory));
  CHECK(memory.data() == nullptr && static_cast<char*>(moved.data())[99] == 0);
}

namespace {

struct Tally {
  std::atomic<int> runs[8] = {};
  int fails = -1;
};

int Count(int task, Pool::Group* group, void* data) {
  auto* tally = static_cast<Tally*>(data);
  ++tally->runs[task];
  return group->tasks > task && task != tally->fails ? 0 : 1;
}

}  // namespace

TEST(a_pool_runs_every_task_once) {
  for (int threads : {1, 2, 8}) {
    Pool pool(threads);
    for (int round = 1; round <= 300; ++round) {
      Tally tally;
      tally.fails = round % 3 == 0 ? round % threads : -1;
      CHECK_EQ(pool.Run(Count, &tally), tally.fails < 0 ? 0 : -1);
      for (int task = 0; task < 8; ++task) CHECK_EQ(tally.runs[task].load(), task < threads);
    }
  }
}
