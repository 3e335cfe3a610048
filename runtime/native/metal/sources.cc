#include "sources.h"

#include "../core/error.h"

namespace mxforge {
namespace metal {
namespace {

constexpr std::string_view kBegin = "// Function: ";

}  // namespace

std::map<std::string, std::string_view> ReadSources(std::string_view text) {
  std::map<std::string, std::string_view> sources;
  bool whole = text.substr(0, kBegin.size()) == kBegin;
  while (whole && !text.empty()) {
    const size_t line = text.find('\n');
    whole = line != std::string_view::npos;
    if (!whole) break;
    const std::string name(text.substr(kBegin.size(), line - kBegin.size()));
    const size_t next = text.find("\n" + std::string(kBegin), line);
    const size_t end = next == std::string_view::npos ? text.size() : next + 1;
    whole = sources.emplace(name, text.substr(line + 1, end - line - 1)).second;
    text.remove_prefix(end);
  }
  if (!whole || sources.empty()) {
    throw core::Error(MXF_CORRUPT, "The library holds no kernels for Metal; copy it again.");
  }
  return sources;
}

}  // namespace metal
}  // namespace mxforge
