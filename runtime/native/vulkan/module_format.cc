#include "module_format.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <set>

#include "../core/json.h"
#include "error.h"

namespace mxforge {
namespace vulkan {
namespace {

using core::Json;

constexpr char kModuleMagic[] = {'M', 'X', 'F', 'S', 'P', 'I', 'R', 'V'};
constexpr uint32_t kModuleVersion = 3;
constexpr size_t kHeaderBytes = 16;
constexpr uint32_t kMaxPushConstants = 128;       // what every device has
constexpr uint32_t kMaxArgumentBytes = 64 << 10;  // far beyond any kernel
constexpr uint32_t kMaxAlignment = 4096;          // far beyond any access
constexpr uint32_t kMaxMatrix = 1 << 16;          // far beyond any device's
constexpr uint32_t kSpirvMagic = 0x07230203;
constexpr size_t kSpirvHeaderWords = 5;

[[noreturn]] void Corrupt(const std::string& what) {
  throw Failure(MXF_CORRUPT, "This is no module of Vulkan kernels that can be used: ", what,
                "; compile it again.");
}

uint32_t ReadU32(std::string_view bytes, size_t at) {
  const auto* data = reinterpret_cast<const unsigned char*>(bytes.data()) + at;
  return static_cast<uint32_t>(data[0]) | static_cast<uint32_t>(data[1]) << 8 |
         static_cast<uint32_t>(data[2]) << 16 | static_cast<uint32_t>(data[3]) << 24;
}

/*! \brief A JSON object with typed access; errors name the path. */
class Fields {
 public:
  Fields(const Json& value, std::string path) : object_(value), path_(std::move(path)) {
    if (value.kind() != Json::Kind::kObject) Corrupt(path_ + " should be an object");
  }

  const Json& Get(const char* name) const {
    const Json* found = object_.Find(name);
    if (found == nullptr) Corrupt(path_ + " lacks \"" + name + "\"");
    return *found;
  }

  std::string Text(const char* name) const { return AsText(Get(name), Path(name)); }

  bool Bool(const char* name) const {
    const Json& value = Get(name);
    if (value.kind() != Json::Kind::kBool) Corrupt(Path(name) + " should be true or false");
    return value.Bool();
  }

  uint32_t Number(const char* name, uint64_t largest) const {
    return AsNumber(Get(name), Path(name), largest);
  }

  const std::vector<Json>& List(const char* name) const {
    const Json& value = Get(name);
    if (value.kind() != Json::Kind::kList) Corrupt(Path(name) + " should be a list");
    return value.List();
  }

  std::vector<std::string> Texts(const char* name) const {
    std::vector<std::string> texts;
    for (const Json& each : List(name)) texts.push_back(AsText(each, Path(name)));
    return texts;
  }

  std::string Path(const char* name) const { return path_ + "." + name; }

  static const std::string& AsText(const Json& value, const std::string& path) {
    if (value.kind() != Json::Kind::kText) Corrupt(path + " should be a text");
    return value.Text();
  }

  static uint32_t AsNumber(const Json& value, const std::string& path, uint64_t largest) {
    if (value.kind() != Json::Kind::kInteger) Corrupt(path + " should be an integer");
    const int64_t number = value.Integer();
    if (number < 0 || static_cast<uint64_t>(number) > largest) {
      Corrupt(path + " is " + std::to_string(number) + ", outside 0 to " + std::to_string(largest));
    }
    return static_cast<uint32_t>(number);
  }

 private:
  const Json& object_;
  std::string path_;
};

ScalarType ParseType(const std::string& dtype, const std::string& path) {
  const std::pair<const char*, ScalarType> types[] = {
      {"bool", ScalarType::kBool},       {"int8", ScalarType::kInt8},
      {"int16", ScalarType::kInt16},     {"int32", ScalarType::kInt32},
      {"int64", ScalarType::kInt64},     {"uint8", ScalarType::kUInt8},
      {"uint16", ScalarType::kUInt16},   {"uint32", ScalarType::kUInt32},
      {"uint64", ScalarType::kUInt64},   {"float16", ScalarType::kFloat16},
      {"float32", ScalarType::kFloat32}, {"float64", ScalarType::kFloat64},
  };
  for (const auto& [name, type] : types) {
    if (dtype == name) return type;
  }
  Corrupt(path + " has the unknown dtype " + dtype);
}

ArgumentInfo ParseArgument(const Json& value, const std::string& path,
                           uint32_t argument_bytes) {
  const Fields fields(value, path);
  ArgumentInfo argument;
  argument.name = fields.Text("name");
  argument.offset = fields.Number("offset", kMaxArgumentBytes);
  const std::string kind = fields.Text("kind");
  uint32_t bytes = 8;
  if (kind == "pointer") {
    argument.pointer = true;
    argument.read = fields.Bool("read");
    argument.write = fields.Bool("write");
    argument.alignment = fields.Number("alignment", kMaxAlignment);
    if (argument.alignment == 0 || (argument.alignment & (argument.alignment - 1)) != 0) {
      Corrupt(path + ".alignment is " + std::to_string(argument.alignment) + ", no power of two");
    }
  } else if (kind == "scalar") {
    argument.type = ParseType(fields.Text("dtype"), path);
    bytes = BytesOf(argument.type);
  } else {
    Corrupt(path + ".kind should be pointer or scalar, not " + kind);
  }
  if (argument.offset % bytes != 0 || argument.offset + bytes > argument_bytes) {
    Corrupt(path + " (" + argument.name + ") lies at " + std::to_string(argument.offset) +
            ", misaligned or outside a block of " + std::to_string(argument_bytes) + " bytes");
  }
  return argument;
}

LaunchExtent ParseExtent(const std::string& name, const std::string& path) {
  const bool block = name.compare(0, 10, "threadIdx.") == 0;
  const bool grid = name.compare(0, 9, "blockIdx.") == 0;
  const size_t dot = name.find('.');
  const bool axis = dot != std::string::npos && name.size() == dot + 2 && name[dot + 1] >= 'x' &&
                    name[dot + 1] <= 'z';
  if ((!block && !grid) || !axis) Corrupt(path + " names the unknown extent " + name);
  return {block, static_cast<uint8_t>(name[dot + 1] - 'x')};
}

/*! \brief Walk the instructions: a driver may trust their lengths. */
void CheckCode(const std::vector<uint32_t>& code, const std::string& path) {
  if (code.size() < kSpirvHeaderWords || code[0] != kSpirvMagic) {
    Corrupt(path + ".code is not SPIR-V");
  }
  if (code[1] < 0x00010000 || code[1] > 0x00010600) {
    Corrupt(path + ".code is of an unknown version of SPIR-V");
  }
  bool entry = false;
  for (size_t at = kSpirvHeaderWords; at < code.size();) {
    const uint32_t words = code[at] >> 16;
    if (words == 0 || words > code.size() - at) Corrupt(path + ".code is cut off or damaged");
    constexpr uint32_t kOpEntryPoint = 15;
    constexpr uint32_t kGLCompute = 5;
    if ((code[at] & 0xffff) == kOpEntryPoint && words >= 5 && code[at + 1] == kGLCompute) {
      entry = entry || (code[at + 3] == 0x6e69616d && (code[at + 4] & 0xff) == 0);  // "main"
    }
    at += words;
  }
  if (!entry) Corrupt(path + ".code has no compute entry point \"main\"");
}

MatrixProduct ParseProduct(const Json& value, const std::string& path) {
  const Fields fields(value, path);
  const auto size = [&](const char* name) { return fields.Number(name, kMaxMatrix); };
  return {size("m"),        size("n"),        size("k"),       fields.Text("a"),
          fields.Text("b"), fields.Text("c"), fields.Text("result")};
}

KernelInfo ParseKernel(const Json& value, const std::string& path, std::string_view spirv) {
  const Fields fields(value, path);
  KernelInfo kernel;
  kernel.name = fields.Text("name");
  if (kernel.name.empty()) Corrupt(path + " has an empty name");
  const std::string named = path + " (" + kernel.name + ")";

  const std::vector<Json>& code = fields.List("code");
  if (code.size() != 2) Corrupt(named + ".code should be [offset, bytes]");
  const uint64_t offset = Fields::AsNumber(code[0], named + ".code", UINT32_MAX);
  const uint64_t bytes = Fields::AsNumber(code[1], named + ".code", UINT32_MAX);
  if (offset % 4 != 0 || bytes % 4 != 0 || offset + bytes > spirv.size()) {
    Corrupt(named + ".code is [" + std::to_string(offset) + ", " + std::to_string(bytes) +
            "], misaligned or outside the " + std::to_string(spirv.size()) + " bytes of SPIR-V");
  }
  kernel.code.resize(bytes / 4);
  for (size_t i = 0; i < kernel.code.size(); ++i) kernel.code[i] = ReadU32(spirv, offset + 4 * i);
  CheckCode(kernel.code, named);

  kernel.argument_bytes = fields.Number("argument_bytes", kMaxArgumentBytes);
  kernel.argument_buffer = fields.Bool("argument_buffer");
  if (kernel.argument_bytes % 8 != 0) Corrupt(named + ".argument_bytes is no multiple of 8");
  if (!kernel.argument_buffer && kernel.argument_bytes > kMaxPushConstants) {
    Corrupt(named + " has " + std::to_string(kernel.argument_bytes) +
            " bytes of arguments, more than the 128 that push constants hold");
  }
  size_t index = 0;
  for (const Json& argument : fields.List("arguments")) {
    kernel.arguments.push_back(ParseArgument(
        argument, named + ".arguments[" + std::to_string(index++) + "]", kernel.argument_bytes));
  }
  std::set<std::pair<bool, uint8_t>> seen;
  for (const std::string& name : fields.Texts("launch_params")) {
    const LaunchExtent extent = ParseExtent(name, named + ".launch_params");
    if (!seen.insert({extent.block, extent.axis}).second) {
      Corrupt(named + ".launch_params names " + name + " twice");
    }
    kernel.launch.push_back(extent);
  }
  const std::vector<Json>& sizes = fields.List("local_size");
  if (sizes.size() != 3) Corrupt(named + ".local_size should have 3 numbers");
  for (int axis = 0; axis < 3; ++axis) {
    kernel.local_size[axis] = Fields::AsNumber(sizes[axis], named + ".local_size", 1U << 20);
    if (kernel.local_size[axis] == 0 && seen.count({true, static_cast<uint8_t>(axis)}) == 0) {
      Corrupt(named + ".local_size is left to the launch, which does not give it");
    }
  }
  kernel.shared_bytes = fields.Number("shared_bytes", UINT32_MAX);

  const Fields needs(fields.Get("requirements"), named + ".requirements");
  kernel.features = needs.Texts("features");
  kernel.full_subgroups = std::find(kernel.features.begin(), kernel.features.end(),
                                    "computeFullSubgroups") != kernel.features.end();
  kernel.extensions = needs.Texts("extensions");
  kernel.subgroup_operations = needs.Texts("subgroup_operations");
  if (!needs.Get("subgroup_size").IsNull()) {
    kernel.subgroup_size = needs.Number("subgroup_size", 1024);
  }
  for (const Json& product : needs.List("matrices")) {
    kernel.products.push_back(ParseProduct(product, needs.Path("matrices")));
  }
  return kernel;
}

}  // namespace

uint32_t BytesOf(ScalarType type) {
  switch (type) {
    case ScalarType::kInt8:
    case ScalarType::kUInt8:
      return 1;
    case ScalarType::kInt16:
    case ScalarType::kUInt16:
    case ScalarType::kFloat16:
      return 2;
    case ScalarType::kBool:
    case ScalarType::kInt32:
    case ScalarType::kUInt32:
    case ScalarType::kFloat32:
      return 4;
    default:
      return 8;
  }
}

std::vector<KernelInfo> ParseModule(std::string_view bytes) {
  if (bytes.size() < kHeaderBytes) {
    Corrupt("it has " + std::to_string(bytes.size()) + " bytes, less than its header");
  }
  if (std::memcmp(bytes.data(), kModuleMagic, sizeof(kModuleMagic)) != 0) {
    Corrupt("it does not begin with MXFSPIRV");
  }
  const uint32_t version = ReadU32(bytes, 8);
  if (version != kModuleVersion) {
    Corrupt("it is of version " + std::to_string(version) + ", and this runtime reads version " +
            std::to_string(kModuleVersion));
  }
  const uint64_t json_bytes = ReadU32(bytes, 12);
  if (json_bytes % 4 != 0 || json_bytes > bytes.size() - kHeaderBytes) {
    Corrupt("its JSON should have " + std::to_string(json_bytes) + " bytes, but " +
            std::to_string(bytes.size() - kHeaderBytes) + " are there");
  }
  const std::string_view json = bytes.substr(kHeaderBytes, json_bytes);
  const std::string_view spirv = bytes.substr(kHeaderBytes + json_bytes);
  const Json root = Json::Parse(json, "The description of Vulkan kernels");

  std::vector<KernelInfo> kernels;
  std::set<std::string> names;
  for (const Json& value : Fields(root, "the JSON").List("kernels")) {
    const std::string path = "kernels[" + std::to_string(kernels.size()) + "]";
    kernels.push_back(ParseKernel(value, path, spirv));
    if (!names.insert(kernels.back().name).second) {
      Corrupt("it has two kernels " + kernels.back().name);
    }
  }
  return kernels;
}

}  // namespace vulkan
}  // namespace mxforge
