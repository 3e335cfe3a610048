#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "error.h"

namespace mxforge {
namespace core {
namespace {

constexpr float kMostTemperature = 100, kLeastTemperature = 1e-6f;
constexpr float kMostPenalty = 100, kMostBias = 1e4f;
constexpr int32_t kMostLogprobs = 20;

uint32_t Bits(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof(bits));
  return bits;
}

uint32_t Bits(int64_t number) { return static_cast<uint32_t>(number); }

void Require(bool condition, const std::string& message) {
  if (!condition) throw Error(MXF_INVALID, message);
}

void RequireWithin(const char* name, float number, float low, float high) {
  Require(number >= low && number <= high,  // not for NaN
          std::string(name) + " must be from " + std::to_string(low) + " to " +
              std::to_string(high) + ", but is " + std::to_string(number) + ".");
}

}  // namespace

bool IsPenalized(const mxf_sampling& sampling) {
  return sampling.repetition_penalty != 1 || sampling.presence_penalty != 0 ||
         sampling.frequency_penalty != 0;
}

void CheckSampling(const mxf_sampling& s, int64_t vocab_size) {
  RequireWithin("temperature", s.temperature, 0, kMostTemperature);
  Require(s.temperature == 0 || s.temperature >= kLeastTemperature,
          "temperature must be 0 (greedy) or at least 1e-6.");
  RequireWithin("top_p", s.top_p, 0, 1);
  RequireWithin("min_p", s.min_p, 0, 1);
  RequireWithin("repetition_penalty", s.repetition_penalty, 0, kMostPenalty);
  Require(s.repetition_penalty != 0, "repetition_penalty must be above 0; 1 means none.");
  RequireWithin("presence_penalty", s.presence_penalty, -kMostPenalty, kMostPenalty);
  RequireWithin("frequency_penalty", s.frequency_penalty, -kMostPenalty, kMostPenalty);
  Require(s.top_k >= 0, "top_k must not be negative; 0 means all.");
  Require(s.logprobs >= -1 && s.logprobs <= kMostLogprobs, "logprobs must be from -1 to 20.");
  Require(s.bias_count >= 0 && (s.bias_count == 0 || (s.bias_tokens != nullptr &&
                                                     s.biases != nullptr)),
          "biases need their tokens.");
  for (int32_t i = 0; i < s.bias_count; ++i) {
    Require(s.bias_tokens[i] >= 0 && s.bias_tokens[i] < vocab_size,
            "A bias is for a token outside the vocabulary.");
    Require(i == 0 || s.bias_tokens[i - 1] < s.bias_tokens[i],
            "Biases must be in the order of their tokens, one each.");
    RequireWithin("a bias", s.biases[i], -kMostBias, kMostBias);
  }
  if (s.mask == nullptr) return;
  bool allows = false;
  for (int64_t word = 0; word < vocab_size / 32; ++word) allows |= s.mask[word] != 0;
  if (const int64_t rest = vocab_size % 32; rest != 0) {
    allows |= (s.mask[vocab_size / 32] & ((uint32_t{1} << rest) - 1)) != 0;
  }
  Require(allows, "A mask must allow at least one token.");
}

std::map<std::string, HostArgument> SampleArguments(const std::vector<SampleRow>& rows,
                                                    int64_t vocab_size) {
  const auto count = static_cast<int64_t>(rows.size());
  const int64_t words = (vocab_size + 31) / 32;
  std::map<std::string, HostArgument> made;
  for (const char* name : {"temperature", "top_k", "top_p", "min_p", "step", "mask_row"}) {
    made[name].shape = {count};
  }
  made["seed"].shape = {count, 2};
  made["penalties"].shape = {count, 3};
  const auto push = [&made](const char* name, auto number) {
    made[name].words.push_back(Bits(number));
  };
  const auto edit = [&push](int64_t row, int64_t token, int64_t seen, int64_t times, float bias) {
    push("edit_row", row);
    push("edit_token", token);
    push("edit_seen", seen);
    push("edit_count", times);
    push("edit_bias", bias);
  };
  int64_t masks = 0;
  for (int64_t row = 0; row < count; ++row) {
    const SampleRow& drawn = rows[static_cast<size_t>(row)];
    const mxf_sampling* const sampling = drawn.sampling;
    push("temperature", sampling->temperature);
    push("top_k", std::min<int64_t>(sampling->top_k, vocab_size));
    push("top_p", sampling->top_p);
    push("min_p", sampling->min_p);
    push("seed", static_cast<int64_t>(sampling->seed & 0xFFFFFFFF));
    push("seed", static_cast<int64_t>(sampling->seed >> 32));
    push("step", static_cast<int64_t>(drawn.step));
    push("penalties", sampling->repetition_penalty);
    push("penalties", sampling->presence_penalty);
    push("penalties", sampling->frequency_penalty);
    push("mask_row", sampling->mask != nullptr ? masks++ : int64_t{-1});
    if (sampling->mask != nullptr) {
      std::vector<uint32_t>& bitmask = made["bitmask"].words;
      bitmask.insert(bitmask.end(), sampling->mask, sampling->mask + words);
    }
    // Both by ascending tokens: one edit where a token is in both.
    int32_t bias = 0;
    const auto biases_before = [&](int64_t token) {
      for (; bias < sampling->bias_count && sampling->bias_tokens[bias] < token; ++bias) {
        edit(row, sampling->bias_tokens[bias], 0, 0, sampling->biases[bias]);
      }
    };
    if (IsPenalized(*sampling)) {
      for (const auto& [token, times] : *drawn.occurrences) {
        biases_before(token);
        const bool biased = bias < sampling->bias_count && sampling->bias_tokens[bias] == token;
        edit(row, token, 1, times, biased ? sampling->biases[bias++] : 0.0f);
      }
    }
    biases_before(vocab_size);
  }
  if (made["edit_row"].words.empty()) edit(-1, -1, 0, 0, 0.0f);  // no array is empty
  if (masks == 0) made["bitmask"].words.assign(static_cast<size_t>(words), 0);
  for (const char* name : {"edit_row", "edit_token", "edit_seen", "edit_count", "edit_bias"}) {
    made[name].shape = {static_cast<int64_t>(made[name].words.size())};
  }
  made["bitmask"].shape = {std::max<int64_t>(1, masks), words};
  return made;
}

}  // namespace core
}  // namespace mxforge
