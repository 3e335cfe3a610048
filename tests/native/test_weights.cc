// Random weights, and files that do not hold what the manifest says.
#include "weights.h"

#include <cmath>
#include <cstdio>
#include <fstream>

#include "check.h"
#include "host.h"

using namespace mxforge::core;

namespace {

WeightInfo Random(const char* name, uint64_t count, const char* dtype, Fill fill) {
  return {name, {count}, dtype, std::nullopt, false, std::move(fill)};
}

/*! \brief The bytes of one weight, made on a device that weights are copied to, or one that reads
 * the host's. */
template <typename T>
std::vector<T> Made(const WeightInfo& weight, uint64_t seed, bool host = true) {
  Manifest manifest{};
  manifest.weights = {weight};
  manifest.random_seed = seed;
  testing::Host device(64 << 20, host);
  const Weights weights("/nowhere", manifest, &device);
  std::vector<T> made(weight.shape[0]);
  std::memcpy(made.data(), weights.Find(weight.name).address(), made.size() * sizeof(T));
  return made;
}

Fill Normal(double deviation, const char* dtype) { return {Fill::Kind::kNormal, {deviation}, dtype}; }

}  // namespace

TEST(weights_are_a_seeds_and_a_names) {
  const Fill fill{Fill::Kind::kBytes, {0, 255}, "uint8"};
  const auto first = Made<uint8_t>(Random("a", 100, "uint8", fill), 7);
  CHECK(first == Made<uint8_t>(Random("a", 100, "uint8", fill), 7));
  CHECK(first == Made<uint8_t>(Random("a", 100, "uint8", fill), 7, false));
  CHECK(first != Made<uint8_t>(Random("b", 100, "uint8", fill), 7));
  CHECK(first != Made<uint8_t>(Random("a", 100, "uint8", fill), 8));
  // Artifacts say what they say by these: they never change.
  const std::vector<uint8_t> known = {70, 31, 179, 47, 13, 115, 220, 59};
  CHECK(std::equal(known.begin(), known.end(), first.begin()));
}

TEST(weights_of_numbers) {
  const Fill values{Fill::Kind::kValues, {65504, 1.0 / 3, 0.1, -2, 1 + 0x1p-11, 1 + 3 * 0x1p-11, 0},
                    "float16"};
  const std::vector<uint16_t> halves = {0x7BFF, 0x3555, 0x2E66, 0xC000, 0x3C00, 0x3C02, 0};
  auto made = Made<uint16_t>(Random("a", 10, "float16", values), 1);
  for (size_t i = 0; i < made.size(); ++i) CHECK_EQ(made[i], halves[i % halves.size()]);  // again
  const Fill one{Fill::Kind::kConstant, {1}, "float32"};
  CHECK(Made<float>(Random("a", 3, "float32", one), 1) == std::vector<float>({1, 1, 1}));
  const Fill packed{Fill::Kind::kConstant, {-1.5}, "bfloat16"};
  CHECK(Made<uint32_t>(Random("a", 2, "uint32", packed), 1) ==
        std::vector<uint32_t>({0xBFC0BFC0, 0xBFC0BFC0}));
  const Fill small{Fill::Kind::kConstant, {-3}, "int8"};
  CHECK(Made<int8_t>(Random("a", 2, "int8", small), 1) == std::vector<int8_t>({-3, -3}));
}

TEST(weights_of_a_distribution) {
  const auto made = Made<float>(Random("a", 200'000, "float32", Normal(0.5, "float32")), 3);
  double sum = 0, squares = 0, beyond = 0;
  for (float number : made) {
    sum += number;
    squares += number * number;
    beyond += std::abs(number) > 1.0f;  // two deviations
  }
  const auto count = static_cast<double>(made.size());
  CHECK(std::abs(sum / count) < 0.005);
  CHECK(std::abs(std::sqrt(squares / count) - 0.5) < 0.005);
  CHECK(std::abs(beyond / count - 0.0455) < 0.003);
  const Fill scale{Fill::Kind::kBytes, {118, 122}, "uint8"};
  int seen[256] = {};
  for (uint8_t byte : Made<uint8_t>(Random("a", 5000, "uint8", scale), 3)) ++seen[byte];
  for (int byte = 0; byte < 256; ++byte) {
    CHECK(byte >= 118 && byte <= 122 ? std::abs(seen[byte] - 1000) < 150 : seen[byte] == 0);
  }
}

TEST(large_weights_repeat) {
  constexpr size_t kStretch = (1 << 22) - 1;
  const Fill fill{Fill::Kind::kBytes, {0, 255}, "uint8"};
  const auto made = Made<uint8_t>(Random("a", kStretch + 1000, "uint8", fill), 7);
  CHECK(std::equal(made.begin(), made.begin() + 1000, made.begin() + kStretch));
  CHECK(!std::equal(made.begin(), made.begin() + 1000, made.begin() + kStretch - 1000));
}

TEST(weights_that_cannot_be) {
  const Fill one{Fill::Kind::kConstant, {1}, "float32"};
  WeightInfo weight = Random("a", 4, "float32", one);
  CHECK_REFUSED(Made<float>(Random("a", 1, "int64", one), 1), MXF_CORRUPT, "unknown dtype");
  weight.shape = {1ull << 62, 4};
  CHECK_REFUSED(Made<float>(weight, 1), MXF_CORRUPT, "impossible shape");
  weight.shape = {1ull << 40};
  CHECK_REFUSED(Made<float>(weight, 1), MXF_MEMORY, "too small");
  Manifest manifest{};
  testing::Host device(0);
  CHECK_REFUSED(Weights("/nowhere", manifest, &device).Find("a"), MXF_CORRUPT, "lacks the weight a");
}

TEST(weights_of_files) {
  const std::string folder = check::argument, name = "w.safetensors";
  const std::string header = R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})";
  {
    std::ofstream file(folder + "/" + name, std::ios::binary);
    file << static_cast<char>(header.size()) << std::string(7, '\0') << header << "abcd";
  }
  for (const bool host : {true, false}) {
    const auto read = [&](const char* file, const char* weight, const char* dtype, uint64_t count,
                          bool sparse) {
      Manifest manifest{};
      manifest.weights = {{weight, {count}, dtype, file, sparse, std::nullopt}};
      testing::Host device(100, host);
      const Weights weights(folder, manifest, &device);
      return std::string(weights.Find("a").address(), 4);
    };
    CHECK_EQ(read(name.c_str(), "a", "uint8", 4, false), "abcd");
    CHECK_EQ(read(name.c_str(), "a", "uint8", 4, true), "abcd");
    const char* const words = "does not hold the weights";
    CHECK_REFUSED(read(name.c_str(), "b", "uint8", 4, false), MXF_CORRUPT, words);
    CHECK_REFUSED(read(name.c_str(), "a", "int8", 4, false), MXF_CORRUPT, words);
    CHECK_REFUSED(read(name.c_str(), "a", "uint8", 5, false), MXF_CORRUPT, words);
    CHECK_REFUSED(read("none", "a", "uint8", 4, false), MXF_CORRUPT, "should be a file");
    CHECK_REFUSED(read(".", "a", "uint8", 4, false), MXF_CORRUPT, "should be a file");
  }
}
