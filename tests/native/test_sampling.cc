// What the library's `sample` is given. The expected arrays are those of the Python that came
// before.
#include "sampling.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "check.h"

using namespace mxforge::core;

namespace {

mxf_sampling Greedy() {
  mxf_sampling made{};
  made.top_p = made.repetition_penalty = 1;
  made.logprobs = -1;
  return made;
}

std::string Integers(const HostArgument& argument) {
  std::string made;
  for (int64_t extent : argument.shape) made += "[" + std::to_string(extent) + "]";
  for (uint32_t word : argument.words) made += " " + std::to_string(static_cast<int32_t>(word));
  return made;
}

std::string Reals(const HostArgument& argument) {
  std::ostringstream made;
  for (int64_t extent : argument.shape) made << "[" << extent << "]";
  for (uint32_t word : argument.words) {
    float number;
    std::memcpy(&number, &word, sizeof(number));
    made << " " << number;
  }
  return made.str();
}

}  // namespace

TEST(sampling_of_three_rows) {
  mxf_sampling plain = Greedy(), penalized = Greedy(), masked = Greedy();
  plain.temperature = 0.5;
  plain.top_k = 1 << 30;
  plain.top_p = 0.75;
  plain.min_p = 0.25;
  plain.seed = 0xFFFFFFFF00000002;
  const int32_t tokens[] = {3, 5, 39};
  const float biases[] = {1.5, -2, 8};
  penalized.bias_tokens = masked.bias_tokens = tokens;
  penalized.biases = masked.biases = biases;
  penalized.bias_count = 3;
  masked.bias_count = 1;
  penalized.presence_penalty = 0.5;
  penalized.repetition_penalty = 2;
  const uint32_t mask[] = {0x80000001, 0xFF};
  masked.mask = mask;
  const Occurrences occurrences = {{4, 0}, {5, 2}, {38, 1}};
  const auto made = SampleArguments(
      {{&plain, nullptr, 0}, {&penalized, &occurrences, 3}, {&masked, &occurrences, 9}}, 40);
  CHECK_EQ(made.size(), size_t{14});
  CHECK_EQ(Reals(made.at("temperature")), "[3] 0.5 0 0");
  CHECK_EQ(Integers(made.at("top_k")), "[3] 40 0 0");
  CHECK_EQ(Reals(made.at("top_p")), "[3] 0.75 1 1");
  CHECK_EQ(Reals(made.at("min_p")), "[3] 0.25 0 0");
  CHECK_EQ(Integers(made.at("seed")), "[3][2] 2 -1 0 0 0 0");
  CHECK_EQ(Integers(made.at("step")), "[3] 0 3 9");
  CHECK_EQ(Reals(made.at("penalties")), "[3][3] 1 0 0 2 0.5 0 1 0 0");
  CHECK_EQ(Integers(made.at("edit_row")), "[6] 1 1 1 1 1 2");
  CHECK_EQ(Integers(made.at("edit_token")), "[6] 3 4 5 38 39 3");
  CHECK_EQ(Integers(made.at("edit_seen")), "[6] 0 1 1 1 0 0");
  CHECK_EQ(Integers(made.at("edit_count")), "[6] 0 0 2 1 0 0");
  CHECK_EQ(Reals(made.at("edit_bias")), "[6] 1.5 0 -2 0 8 1.5");
  CHECK_EQ(Integers(made.at("mask_row")), "[3] -1 -1 0");
  CHECK_EQ(Integers(made.at("bitmask")), "[1][2] -2147483647 255");
}

TEST(sampling_of_a_plain_row) {
  const mxf_sampling plain = Greedy();
  const auto made = SampleArguments({{&plain, nullptr, 0}}, 33);
  CHECK_EQ(Integers(made.at("edit_row")), "[1] -1");
  CHECK_EQ(Integers(made.at("edit_token")), "[1] -1");
  CHECK_EQ(Reals(made.at("edit_bias")), "[1] 0");
  CHECK_EQ(Integers(made.at("mask_row")), "[1] -1");
  CHECK_EQ(Integers(made.at("bitmask")), "[1][2] 0 0");
}

TEST(sampling_is_checked) {
  constexpr int64_t kVocabulary = 40;
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  CheckSampling(Greedy(), kVocabulary);
  const auto refused = [&](auto member, auto value, const char* words) {
    mxf_sampling wrong = Greedy();
    wrong.*member = value;
    CHECK_REFUSED(CheckSampling(wrong, kVocabulary), MXF_INVALID, words);
  };
  for (float wrong : {-1.0f, 101.0f, kNan, 1e-7f}) {
    refused(&mxf_sampling::temperature, wrong, "temperature must be");
  }
  for (float wrong : {-0.1f, 1.1f, kNan}) {
    refused(&mxf_sampling::top_p, wrong, "top_p must be");
    refused(&mxf_sampling::min_p, wrong, "min_p must be");
  }
  for (float wrong : {0.0f, -1.0f, 101.0f, kNan}) {
    refused(&mxf_sampling::repetition_penalty, wrong, "repetition_penalty must be");
  }
  for (float wrong : {-101.0f, 101.0f, kNan}) {
    refused(&mxf_sampling::presence_penalty, wrong, "presence_penalty must be");
    refused(&mxf_sampling::frequency_penalty, wrong, "frequency_penalty must be");
  }
  refused(&mxf_sampling::top_k, -1, "top_k must not be negative");
  for (int32_t wrong : {-2, 21}) refused(&mxf_sampling::logprobs, wrong, "logprobs must be");
  for (int32_t wrong : {-1, 1}) refused(&mxf_sampling::bias_count, wrong, "biases need");
}

TEST(biases_and_masks_are_checked) {
  const auto check = [](std::vector<int32_t> tokens, std::vector<float> biases) {
    mxf_sampling made = Greedy();
    made.bias_tokens = tokens.data();
    made.biases = biases.data();
    made.bias_count = static_cast<int32_t>(tokens.size());
    CheckSampling(made, 40);
  };
  check({0, 39}, {1e4f, -1e4f});
  CHECK_REFUSED(check({3, 2}, {0, 0}), MXF_INVALID, "in the order of their tokens");
  CHECK_REFUSED(check({3, 3}, {0, 0}), MXF_INVALID, "one each");
  CHECK_REFUSED(check({-1}, {0}), MXF_INVALID, "outside the vocabulary");
  CHECK_REFUSED(check({40}, {0}), MXF_INVALID, "outside the vocabulary");
  CHECK_REFUSED(check({1}, {2e4f}), MXF_INVALID, "a bias must be");
  CHECK_REFUSED(check({1}, {NAN}), MXF_INVALID, "a bias must be");
  mxf_sampling masked = Greedy();
  uint32_t mask[] = {0, 0x100};
  masked.mask = mask;
  CHECK_REFUSED(CheckSampling(masked, 40), MXF_INVALID, "at least one token");  // 40 is beyond
  mask[1] = 0x80;
  CheckSampling(masked, 40);
}
