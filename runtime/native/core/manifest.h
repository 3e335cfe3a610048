/*!
 * \file manifest.h
 * \brief manifest.json, as far as running a model needs it; fields that are not known pass.
 */
#ifndef MXFORGE_CORE_MANIFEST_H_
#define MXFORGE_CORE_MANIFEST_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace mxforge {
namespace core {

struct LibraryInfo {
  std::string target;                 // such as cpu:avx2
  std::string plan, kernels;          // files
  std::vector<std::string> features;  // of the CPU, in LLVM's spelling
};

/*! \brief How a weight without a file is made from the random seed. */
struct Fill {
  enum class Kind { kValues, kConstant, kNormal, kBytes };
  Kind kind;
  std::vector<double> numbers;
  std::string dtype;  // of the numbers
};

struct WeightInfo {
  std::string name;
  std::vector<uint64_t> shape;
  std::string dtype;
  std::optional<std::string> file;
  bool sparse = false;  // few of its rows are read
  std::optional<Fill> fill;
};

/*! \brief Layers that see the same of the past. */
struct KvGroup {
  std::string name;
  std::optional<int64_t> window;  // in tokens
  std::vector<int64_t> layers;
  uint64_t page_bytes;  // of a page, in one of its layers
};

struct Manifest {
  std::string kind;                 // of the target, such as cpu
  std::optional<std::string> host;  // what a CPU's code is for, such as linux-x86_64
  std::vector<LibraryInfo> libraries;
  std::vector<WeightInfo> weights;
  std::vector<KvGroup> groups;
  std::vector<int32_t> stop_token_ids;
  int64_t max_batch, prefill_chunk, context;
  int64_t vocab_size;
  std::optional<uint64_t> random_seed;
};

/*! \brief Error (MXF_CORRUPT) naming the field that is not as the compiler writes it. */
Manifest ReadManifest(std::string_view text, const std::string& path);

}  // namespace core
}  // namespace mxforge

#endif  // MXFORGE_CORE_MANIFEST_H_
