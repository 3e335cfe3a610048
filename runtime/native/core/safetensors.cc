#include "safetensors.h"

#include <algorithm>
#include <cstring>
#include <string_view>
#include <utility>

#include "error.h"
#include "json.h"

namespace mxforge {
namespace core {
namespace {

constexpr uint64_t kLengthBytes = 8;
constexpr uint64_t kMostHeader = 100'000'000;  // as in the safetensors library
constexpr size_t kMostDimensions = 32;         // NumPy's, as is the next
constexpr uint64_t kMostBytes = (uint64_t{1} << 63) - 1;

struct Format {
  const char* name;   // safetensors'
  const char* dtype;  // NumPy's
  uint64_t bytes;
};
// What the compiler packs weights in.
constexpr Format kFormats[] = {
    {"U8", "uint8", 1},    {"I8", "int8", 1},       {"U16", "uint16", 2}, {"U32", "uint32", 4},
    {"F16", "float16", 2}, {"BF16", "bfloat16", 2}, {"F32", "float32", 4},
};

[[noreturn]] void Broken(const std::string& path, const std::string& problem) {
  throw Error(MXF_CORRUPT, path + " is not a valid safetensors file: " + problem +
                               "; copy the artifact again.");
}

StoredTensor ReadTensor(const Json& entry, uint64_t data_start, const std::string& path) {
  if (entry.Object().size() != 3) Broken(path, "a tensor has other fields than its three");
  const std::string& name = entry["dtype"].Text();
  const auto format = std::find_if(std::begin(kFormats), std::end(kFormats),
                                   [&](const Format& each) { return name == each.name; });
  if (format == std::end(kFormats)) Broken(path, "a tensor has an unknown dtype");
  StoredTensor tensor{format->dtype, {}, 0, 0};
  uint64_t bytes = format->bytes, strides = bytes;  // these, where no extent is 0
  for (const Json& extent : entry["shape"].List()) {
    tensor.shape.push_back(extent.Size());
    if (__builtin_mul_overflow(strides, std::max<uint64_t>(extent.Size(), 1), &strides) ||
        strides > kMostBytes || tensor.shape.size() > kMostDimensions) {
      Broken(path, "a tensor has an impossible shape");
    }
    bytes *= extent.Size();
  }
  const std::vector<Json>& offsets = entry["data_offsets"].List();
  if (offsets.size() != 2 || offsets[0].Size() > offsets[1].Size() ||
      offsets[1].Size() - offsets[0].Size() != bytes) {
    Broken(path, "a tensor has other bytes than its shape asks for");
  }
  tensor.begin = data_start + offsets[0].Size();
  tensor.end = data_start + offsets[1].Size();
  return tensor;
}

}  // namespace

std::map<std::string, StoredTensor> ReadSafetensors(const void* data, size_t size,
                                                    const std::string& path) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  if (size < kLengthBytes) Broken(path, "it is truncated");
  uint64_t length = 0;
  for (uint64_t i = kLengthBytes; i-- > 0;) length = length << 8 | bytes[i];
  if (length > kMostHeader) Broken(path, "its header is too large");
  if (length > size - kLengthBytes) Broken(path, "it is truncated");
  const std::string_view header(reinterpret_cast<const char*>(bytes) + kLengthBytes,
                                static_cast<size_t>(length));
  const Json parsed = Json::Parse(header, path);
  std::map<std::string, StoredTensor> tensors;
  std::vector<std::pair<uint64_t, uint64_t>> places;
  for (const auto& [name, entry] : parsed.Object()) {
    if (name == "__metadata__") {
      for (const auto& note : entry.Object()) note.second.Text();
      continue;
    }
    StoredTensor tensor = ReadTensor(entry, kLengthBytes + length, path);
    places.emplace_back(tensor.begin, tensor.end);
    tensors.emplace(name, std::move(tensor));
  }
  std::sort(places.begin(), places.end());
  uint64_t at = kLengthBytes + length;
  for (const auto& [begin, end] : places) {
    if (begin != at) Broken(path, "a tensor overlaps another, or leaves a hole before it");
    at = end;
  }
  if (at != size) Broken(path, at > size ? "it is truncated" : "bytes follow the last tensor");
  return tensors;
}

}  // namespace core
}  // namespace mxforge
