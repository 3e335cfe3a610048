#include "weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "error.h"
#include "machine.h"
#include "safetensors.h"

namespace mxforge {
namespace core {
namespace {

// Random weights repeat: memory traffic is what counts, and numbers for all would take minutes. An
// odd number, so that rows do not line up.
constexpr size_t kStretch = (size_t{1} << 22) - 1;

struct Format {
  const char* dtype;
  size_t bytes;
};
constexpr Format kFormats[] = {
    {"bfloat16", 2}, {"float16", 2}, {"float32", 4}, {"int8", 1}, {"uint8", 1}, {"uint32", 4},
};

size_t BytesOf(const std::string& dtype) {
  for (const Format& format : kFormats) {
    if (dtype == format.dtype) return format.bytes;
  }
  throw Error(MXF_CORRUPT, "A weight has an unknown dtype; compile the model again.");
}

size_t BytesOf(const WeightInfo& weight) {
  size_t bytes = BytesOf(weight.dtype);
  for (uint64_t extent : weight.shape) {
    if (__builtin_mul_overflow(bytes, extent, &bytes)) {
      throw Error(MXF_CORRUPT, "A weight has an impossible shape; compile the model again.");
    }
  }
  return bytes;
}

/*! \brief Numbers by a seed and a counter (SplitMix64): any of them without those before. */
class Random {
 public:
  Random(uint64_t seed, const std::string& name) : state_(Mixed(seed)) {
    for (const char c : name) state_ = Mixed(state_ ^ static_cast<unsigned char>(c));
  }

  uint64_t Next() { return Mixed(state_ + ++counter_ * kStep); }

  /*! \brief Of a normal distribution (Box and Muller). */
  double Normal() {
    const double u = (static_cast<double>(Next() >> 11) + 0.5) * 0x1p-53;
    const double v = static_cast<double>(Next() >> 11) * 0x1p-53;
    return std::sqrt(-2 * std::log(u)) * std::cos(2 * 3.14159265358979323846 * v);
  }

 private:
  static constexpr uint64_t kStep = 0x9E3779B97F4A7C15;
  uint64_t state_, counter_ = 0;

  static uint64_t Mixed(uint64_t x) {
    x += kStep;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
    x = (x ^ x >> 27) * 0x94D049BB133111EB;
    return x ^ x >> 31;
  }
};

/*! \brief Round to nearest even; only normal numbers of float16 are made. */
uint16_t Half(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof(bits));
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  if (magnitude < 0x38800000) return static_cast<uint16_t>(sign);
  if (magnitude >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7BFF);
  const uint32_t rounded = magnitude + 0xFFF + (magnitude >> 13 & 1) - 0x38000000;
  return static_cast<uint16_t>(sign | rounded >> 13);
}

void Append(double number, const std::string& dtype, std::vector<unsigned char>* to) {
  const auto append = [to](const auto& value) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(&value);
    to->insert(to->end(), bytes, bytes + sizeof(value));
  };
  const auto real = static_cast<float>(number);
  if (dtype == "float32") {
    append(real);
  } else if (dtype == "float16") {
    append(Half(real));
  } else if (dtype == "bfloat16") {
    uint32_t bits;
    std::memcpy(&bits, &real, sizeof(bits));
    append(static_cast<uint16_t>(bits >> 16));  // rounding enough for noise
  } else if (dtype == "uint32") {
    append(static_cast<uint32_t>(number));
  } else {
    append(static_cast<unsigned char>(static_cast<int>(number)));
  }
}

std::vector<unsigned char> Stretch(const WeightInfo& weight, size_t bytes, uint64_t seed) {
  const Fill& fill = *weight.fill;
  const size_t count = std::min(bytes, kStretch);
  Random random(seed, weight.name);
  std::vector<unsigned char> made;
  switch (fill.kind) {
    case Fill::Kind::kValues:
      for (double number : fill.numbers) Append(number, fill.dtype, &made);
      break;
    case Fill::Kind::kConstant:
      for (size_t i = 0; i < count; ++i) Append(fill.numbers[0], fill.dtype, &made);
      break;
    case Fill::Kind::kNormal:
      for (size_t i = 0; i < count; ++i) {
        Append(random.Normal() * fill.numbers[0], fill.dtype, &made);
      }
      break;
    case Fill::Kind::kBytes: {
      const auto low = static_cast<uint64_t>(fill.numbers[0]);
      const auto range = static_cast<uint64_t>(fill.numbers[1]) - low + 1;
      for (size_t i = 0; i < count; ++i) {
        made.push_back(static_cast<unsigned char>(low + random.Next() % range));
      }
    }
  }
  return made;
}

std::unique_ptr<Buffer> Made(const WeightInfo& weight, uint64_t seed, Device* device) {
  const size_t bytes = BytesOf(weight);
  const std::vector<unsigned char> stretch = Stretch(weight, bytes, seed);
  std::unique_ptr<Buffer> buffer = device->Allocate(bytes);
  for (size_t at = 0; at < bytes; at += stretch.size()) {
    device->Upload(buffer->address() + at, stretch.data(),
                   std::min(stretch.size(), bytes - at));
  }
  return buffer;
}

}  // namespace

Weights::Weights(const std::string& folder, const Manifest& manifest, Device* device) {
  struct Opened {
    const MappedFile* file;
    std::map<std::string, StoredTensor> tensors;
  };
  std::map<std::string, Opened> opened;
  std::vector<Prefault::Range> ahead;
  for (const WeightInfo& weight : manifest.weights) {
    std::unique_ptr<Buffer>& buffer = buffers_[weight.name];
    if (!weight.file.has_value()) {
      buffer = Made(weight, manifest.random_seed.value_or(0), device);
      continue;
    }
    const std::string path = folder + "/" + *weight.file;
    auto found = opened.find(path);
    if (found == opened.end()) {
      files_.push_back(std::make_unique<MappedFile>(path));
      const MappedFile& file = *files_.back();
      Opened read{&file, ReadSafetensors(file.data(), file.size(), path)};
      found = opened.emplace(path, std::move(read)).first;
    }
    const auto tensor = found->second.tensors.find(weight.name);
    if (tensor == found->second.tensors.end() || tensor->second.dtype != weight.dtype ||
        tensor->second.shape != weight.shape) {
      throw Error(MXF_CORRUPT, path + " does not hold the weights that the manifest names; copy " +
                                   "the artifact again.");
    }
    const auto size = static_cast<size_t>(tensor->second.end - tensor->second.begin);
    const void* begin = static_cast<const char*>(found->second.file->data()) +
                        tensor->second.begin;
    if (!device->reads_host_memory()) {
      buffer = device->Allocate(size);
      device->Upload(buffer->address(), begin, size);
      continue;
    }
    if (weight.sparse && size != 0) {
      sparse_.push_back(
          std::make_unique<SparseFile>(path, tensor->second.begin, tensor->second.end));
      begin = sparse_.back()->data();
    } else {
      ahead.emplace_back(begin, size);
    }
    buffer = std::make_unique<Buffer>(const_cast<void*>(begin), size);
  }
  if (!device->reads_host_memory()) {
    files_.clear();
    return;
  }
  size_t bytes = 0;
  for (const Prefault::Range& range : ahead) bytes += range.second;
  if (bytes <= AvailableMemory()) prefault_ = std::make_unique<Prefault>(std::move(ahead));
}

const Buffer& Weights::Find(const std::string& name) const {
  const auto found = buffers_.find(name);
  if (found == buffers_.end()) {
    throw Error(MXF_CORRUPT, "The artifact lacks the weight " + name + "; compile it again.");
  }
  return *found->second;
}

}  // namespace core
}  // namespace mxforge
