#include "machine.h"

#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#define MXFORGE_X86 1
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__aarch64__) && defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#endif

namespace mxforge {
namespace core {
namespace {

#if defined(MXFORGE_X86)

enum Register { kEax, kEbx, kEcx, kEdx };

// Registers that the system has to save, in XCR0: of vectors of 256 and 512 bits, and tiles.
constexpr uint64_t kAnything = 0, kYmm = 0x6, kZmm = 0xE6, kTiles = 0x60000;

struct Feature {
  const char* name;
  uint32_t leaf, subleaf;
  Register reg;
  int bit;
  uint64_t saved;
};
constexpr Feature kFeatures[] = {
    {"sse3", 1, 0, kEcx, 0, kAnything},
    {"ssse3", 1, 0, kEcx, 9, kAnything},
    {"fma", 1, 0, kEcx, 12, kYmm},
    {"cx16", 1, 0, kEcx, 13, kAnything},
    {"sse4.1", 1, 0, kEcx, 19, kAnything},
    {"sse4.2", 1, 0, kEcx, 20, kAnything},
    {"movbe", 1, 0, kEcx, 22, kAnything},
    {"popcnt", 1, 0, kEcx, 23, kAnything},
    {"avx", 1, 0, kEcx, 28, kYmm},
    {"f16c", 1, 0, kEcx, 29, kYmm},
    {"bmi", 7, 0, kEbx, 3, kAnything},
    {"avx2", 7, 0, kEbx, 5, kYmm},
    {"bmi2", 7, 0, kEbx, 8, kAnything},
    {"avx512f", 7, 0, kEbx, 16, kZmm},
    {"avx512dq", 7, 0, kEbx, 17, kZmm},
    {"avx512cd", 7, 0, kEbx, 28, kZmm},
    {"avx512bw", 7, 0, kEbx, 30, kZmm},
    {"avx512vl", 7, 0, kEbx, 31, kZmm},
    {"avx512vnni", 7, 0, kEcx, 11, kZmm},
    {"amx-bf16", 7, 0, kEdx, 22, kTiles},
    {"avx512fp16", 7, 0, kEdx, 23, kZmm},
    {"amx-tile", 7, 0, kEdx, 24, kTiles},
    {"amx-int8", 7, 0, kEdx, 25, kTiles},
    {"avxvnni", 7, 1, kEax, 4, kYmm},
    {"avx512bf16", 7, 1, kEax, 5, kZmm},
    {"sahf", 0x80000001, 0, kEcx, 0, kAnything},
    {"lzcnt", 0x80000001, 0, kEcx, 5, kAnything},
};

uint64_t Saved() {
  uint32_t a, b, c, d;
  constexpr uint32_t kOsxsave = 1u << 27;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kOsxsave)) return 0;
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  uint64_t saved = static_cast<uint64_t>(high) << 32 | low;
#if defined(__APPLE__)
  // macOS begins to save the 512-bit registers of a thread when it first uses them.
  if ((saved & kYmm) == kYmm) saved |= kZmm;
#endif
  return saved;
}

bool Has(const Feature& feature) {
  uint32_t registers[4];
  if (!__get_cpuid_count(feature.leaf, feature.subleaf, &registers[kEax], &registers[kEbx],
                         &registers[kEcx], &registers[kEdx])) {
    return false;
  }
  return (registers[feature.reg] >> feature.bit & 1) && (Saved() & feature.saved) == feature.saved;
}

#elif defined(__aarch64__) && defined(__linux__)

struct Feature {
  const char* name;
  unsigned long kind, bit;
};
constexpr Feature kFeatures[] = {
    {"neon", AT_HWCAP, 1},      {"fullfp16", AT_HWCAP, 10}, {"dotprod", AT_HWCAP, 20},
    {"sve", AT_HWCAP, 22},      {"i8mm", AT_HWCAP2, 13},    {"bf16", AT_HWCAP2, 14},
    {"sme", AT_HWCAP2, 23},
};

bool Has(const Feature& feature) { return getauxval(feature.kind) >> feature.bit & 1; }

#elif defined(__aarch64__) && defined(__APPLE__)

struct Feature {
  const char* name;
  const char* key;
};
constexpr Feature kFeatures[] = {
    {"neon", "hw.optional.AdvSIMD"},           {"fullfp16", "hw.optional.arm.FEAT_FP16"},
    {"dotprod", "hw.optional.arm.FEAT_DotProd"}, {"i8mm", "hw.optional.arm.FEAT_I8MM"},
    {"bf16", "hw.optional.arm.FEAT_BF16"},     {"sme", "hw.optional.arm.FEAT_SME"},
};

bool Has(const Feature& feature) {
  int value = 0;
  size_t size = sizeof(value);
  return sysctlbyname(feature.key, &value, &size, nullptr, 0) == 0 && value == 1;
}

#elif defined(__aarch64__) && defined(_WIN32)

struct Feature {
  const char* name;
  DWORD number;
};
constexpr Feature kFeatures[] = {{"neon", PF_ARM_NEON_INSTRUCTIONS_AVAILABLE}, {"dotprod", 43}};

bool Has(const Feature& feature) { return IsProcessorFeaturePresent(feature.number) != 0; }

#else

struct Feature {
  const char* name;
};
constexpr Feature kFeatures[] = {{""}};

bool Has(const Feature&) { return false; }

#endif

}  // namespace

std::string HostSystem() {
#if defined(_WIN32)
  const std::string system = "windows";
#elif defined(__APPLE__)
  const std::string system = "darwin";
#elif defined(__ANDROID__)
  const std::string system = "android";
#else
  const std::string system = "linux";
#endif
#if defined(__aarch64__) || defined(_M_ARM64)
  return system + "-aarch64";
#elif defined(__x86_64__) || defined(_M_X64)
  return system + "-x86_64";
#else
  return system + "-other";
#endif
}

bool HasCpuFeature(const std::string& name) {
  for (const Feature& feature : kFeatures) {
    if (name == feature.name) return Has(feature);
  }
  return false;
}

}  // namespace core
}  // namespace mxforge
