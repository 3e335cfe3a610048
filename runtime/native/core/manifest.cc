#include "manifest.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "json.h"

namespace mxforge {
namespace core {
namespace {

constexpr int64_t kFormat = 3, kAbi = 3;
constexpr uint64_t kMostBatch = 1024, kMostChunk = 8192, kMostContext = 1 << 24;
constexpr uint64_t kMostVocabulary = 1 << 24, kMostLayers = 1 << 16;
constexpr uint64_t kMostExtent = 1 << 24, kMostPage = uint64_t{1} << 40;

int64_t Within(const Json& value, uint64_t least, uint64_t most) {
  if (value.Size() < least || value.Size() > most) {
    value.Refuse("a number from " + std::to_string(least) + " to " + std::to_string(most));
  }
  return value.Integer();
}

/*! \brief A path inside the artifact. */
std::string File(const Json& value) {
  const std::string& path = value.Text();
  bool inside = !path.empty() && path.front() != '/';
  for (size_t begin = 0; inside && begin <= path.size();) {
    const size_t end = std::min(path.find('/', begin), path.size());
    const std::string part = path.substr(begin, end - begin);
    inside = !part.empty() && part != "." && part != ".." &&
             part.find_first_of("\\:") == std::string::npos &&
             std::all_of(part.begin(), part.end(), [](char c) { return c >= ' ' || c < 0; });
    begin = end + 1;
  }
  if (!inside) value.Refuse("a path inside the artifact");
  return path;
}

LibraryInfo ReadLibrary(const Json& value) {
  LibraryInfo library{value["target"].Text(), File(value["plan"]), File(value["file"]), {}};
  for (const Json& feature : value["features"].List()) library.features.push_back(feature.Text());
  return library;
}

/*! \brief What weights made of numbers consist of, and how far it reaches. */
struct Range {
  const char* dtype;
  double least, most;
};
constexpr double kLargest = 3.4e38;
constexpr Range kRanges[] = {
    {"bfloat16", -kLargest, kLargest}, {"float16", -65504, 65504}, {"float32", -kLargest, kLargest},
    {"int8", -128, 127},               {"uint8", 0, 255},          {"uint32", 0, 4294967295},
};

bool Holds(const Range& range, Fill::Kind kind, double number) {
  // Few of a normal distribution are further out.
  const double reach = kind == Fill::Kind::kNormal ? 16 * std::abs(number) : 0;
  return number >= range.least && number <= range.most && reach <= range.most &&
         -reach >= range.least;
}

Fill ReadFill(const Json& value, const std::string& dtype) {
  static const std::pair<const char*, Fill::Kind> kinds[] = {
      {"values", Fill::Kind::kValues},
      {"constant", Fill::Kind::kConstant},
      {"normal", Fill::Kind::kNormal},
      {"bytes", Fill::Kind::kBytes},
  };
  Fill fill{Fill::Kind::kValues, {}, dtype};
  if (const Json* of = value.Find("of")) fill.dtype = of->Text();
  for (const auto& [name, kind] : kinds) {
    const Json* numbers = value.Find(name);
    if (numbers == nullptr) continue;
    fill.kind = kind;
    if (kind == Fill::Kind::kConstant || kind == Fill::Kind::kNormal) {
      fill.numbers = {numbers->Real()};
    } else {
      for (const Json& number : numbers->List()) fill.numbers.push_back(number.Real());
    }
    const bool bytes = kind == Fill::Kind::kBytes;
    const std::string of = bytes ? "uint8" : fill.dtype;
    const auto range = std::find_if(std::begin(kRanges), std::end(kRanges),
                                    [&of](const Range& each) { return of == each.dtype; });
    const auto held = [&, kind = kind](double n) { return Holds(*range, kind, n); };
    if (range == std::end(kRanges) || fill.numbers.empty() ||
        !std::all_of(fill.numbers.begin(), fill.numbers.end(), held) ||
        (bytes && (fill.numbers.size() != 2 || fill.numbers[0] > fill.numbers[1]))) {
      numbers->Refuse("numbers that a weight can be made of");
    }
    return fill;
  }
  value.Refuse("one of values, constant, normal and bytes");
}

WeightInfo ReadWeight(const Json& value) {
  WeightInfo weight{value["name"].Text(), {}, value["dtype"].Text(), std::nullopt, false, {}};
  for (const Json& extent : value["shape"].List()) weight.shape.push_back(extent.Size());
  if (const Json& file = value["file"]; !file.IsNull()) weight.file = File(file);
  weight.sparse = value["access"].Text() == "sparse";
  if (!weight.file.has_value()) weight.fill = ReadFill(value["fill"], weight.dtype);
  return weight;
}

/*! \brief Of an element of a cache. */
uint64_t BytesOf(const Json& dtype) {
  static const std::pair<const char*, uint64_t> sizes[] = {
      {"float32", 4}, {"float16", 2}, {"bfloat16", 2}, {"int8", 1}};
  for (const auto& [name, bytes] : sizes) {
    if (dtype.Text() == name) return bytes;
  }
  dtype.Refuse("float32, float16, bfloat16 or int8");
}

KvGroup ReadGroup(const Json& value) {
  KvGroup group{value["name"].Text(), std::nullopt, {}, BytesOf(value["dtype"])};
  for (const Json& extent : value["page_shape"].List()) {
    group.page_bytes *= static_cast<uint64_t>(Within(extent, 1, kMostExtent));
    if (group.page_bytes > kMostPage) extent.Refuse("smaller: a page has at most 2^40 bytes");
  }
  if (const Json& window = value["window"]; !window.IsNull()) {
    group.window = Within(window, 1, kMostContext);
  }
  for (const Json& layer : value["layers"].List()) {
    group.layers.push_back(Within(layer, 0, kMostLayers));
  }
  return group;
}

}  // namespace

Manifest ReadManifest(std::string_view text, const std::string& path) {
  const Json json = Json::Parse(text, path);
  if (json["format_version"].Integer() != kFormat || json["abi_version"].Integer() != kAbi) {
    json["format_version"].Refuse("3, and abi_version 3, which this runtime reads");
  }
  Manifest made;
  made.kind = json["target"]["kind"].Text();
  if (const Json& host = json["target"]["host"]; !host.IsNull()) made.host = host.Text();
  for (const Json& library : json["libraries"].List()) {
    made.libraries.push_back(ReadLibrary(library));
  }
  for (const Json& weight : json["weights"].List()) made.weights.push_back(ReadWeight(weight));
  for (const Json& group : json["kv_groups"].List()) made.groups.push_back(ReadGroup(group));
  for (const Json& token : json["stop_token_ids"].List()) {
    made.stop_token_ids.push_back(static_cast<int32_t>(Within(token, 0, kMostVocabulary)));
  }
  const Json& limits = json["limits"];
  made.max_batch = Within(limits["max_batch"], 1, kMostBatch);
  made.prefill_chunk = Within(limits["prefill_chunk"], 1, kMostChunk);
  made.context = Within(limits["context"], 1, kMostContext);
  made.vocab_size = Within(json["config"]["vocab_size"], 1, kMostVocabulary);
  if (const Json& seed = json["random_seed"]; !seed.IsNull()) made.random_seed = seed.Size();
  return made;
}

}  // namespace core
}  // namespace mxforge
