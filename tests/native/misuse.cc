// The C API, called as nobody should: a status and a message, and the model works on. The program's
// argument is the folder of an artifact.
#include <atomic>
#include <chrono>
#include <climits>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "check.h"
#include "manifest.h"
#include "mxforge.h"
#include "os.h"

namespace {

constexpr mxf_options kSmall = {2, 256, 2, 32, 0, nullptr};

/*! \brief That a call gives this status, with a message that has these words. */
#define EXPECT(call, status, words)                                                  \
  do {                                                                               \
    CHECK_EQ(static_cast<int>(call), static_cast<int>(status));                      \
    const std::string said = mxf_error();                                            \
    if (said.find(words) == std::string::npos) {                                     \
      check::Failed(__FILE__, __LINE__, std::string(#call) + " says: " + said);      \
    }                                                                                \
  } while (false)
#define OK(call)                                                                     \
  do {                                                                               \
    if ((call) != MXF_OK) check::Failed(__FILE__, __LINE__, mxf_error());            \
  } while (false)

struct Closed {
  void operator()(mxf_model* model) const { mxf_model_close(model); }
};
using Model = std::unique_ptr<mxf_model, Closed>;

Model Opened(const mxf_options& options = kSmall) {
  mxf_model* model = nullptr;
  OK(mxf_model_open(check::argument.c_str(), &options, &model));
  return Model(model);
}

std::vector<int32_t> Prompt(size_t count, int32_t first = 5) {
  std::vector<int32_t> made(count);
  for (size_t i = 0; i < count; ++i) made[i] = first + static_cast<int32_t>(i * 7 % 1000);
  return made;
}

mxf_sequence Created(const Model& model, const std::vector<int32_t>& prompt = {}) {
  mxf_sequence made = 0;
  int64_t reused = 0;
  OK(mxf_sequence_create(model.get(), prompt.data(), static_cast<int64_t>(prompt.size()), &made,
                         &reused));
  return made;
}

mxf_sampling Greedy() {
  mxf_sampling made{};
  made.top_p = made.repetition_penalty = 1;
  made.logprobs = -1;
  return made;
}

/*! \brief The sequence takes these tokens, and draws one. */
int32_t Drawn(const Model& model, mxf_sequence sequence, const std::vector<int32_t>& tokens,
              const mxf_sampling& sampling = Greedy()) {
  const mxf_part part = {sequence, tokens.empty() ? nullptr : tokens.data(),
                         tokens.empty() ? 1 : static_cast<int32_t>(tokens.size()), 0, &sampling};
  mxf_result result{};
  OK(mxf_step_submit(model.get(), &part, 1));
  OK(mxf_step_wait(model.get(), &result));
  return result.token;
}

/*! \brief What the model says to a prompt, which no misuse may change. */
std::vector<int32_t> Answer(const Model& model) {
  const mxf_sequence sequence = Created(model);
  std::vector<int32_t> made = {Drawn(model, sequence, Prompt(20))};
  while (made.size() < 5) made.push_back(Drawn(model, sequence, {}));
  OK(mxf_sequence_free(model.get(), sequence));
  for (int32_t token : made) CHECK(token >= 0);
  return made;
}

}  // namespace

TEST(opening) {
  mxf_model* model = reinterpret_cast<mxf_model*>(8);
  EXPECT(mxf_model_open(check::argument.c_str(), nullptr, nullptr), MXF_INVALID, "no place");
  EXPECT(mxf_model_open(nullptr, nullptr, &model), MXF_INVALID, "path is missing");
  CHECK(model == nullptr);
  EXPECT(mxf_model_open("", nullptr, &model), MXF_CORRUPT, "should be a file");
  EXPECT(mxf_model_open("/nowhere/at all", nullptr, &model), MXF_CORRUPT, "should be a file");
  const auto refused = [&](auto member, auto value, mxf_status status, const char* words) {
    mxf_options options = kSmall;
    options.*member = value;
    EXPECT(mxf_model_open(check::argument.c_str(), &options, &model), status, words);
    CHECK(model == nullptr);
  };
  for (int32_t wrong : {-1, 4097, INT_MAX, INT_MIN}) {
    refused(&mxf_options::threads, wrong, MXF_INVALID, "threads must be");
  }
  for (int64_t wrong : {int64_t{-1}, INT64_MAX, INT64_MIN}) {
    refused(&mxf_options::context, wrong, MXF_INVALID, "context must be");
  }
  for (int32_t wrong : {-1, INT_MAX, INT_MIN}) {
    refused(&mxf_options::max_batch, wrong, MXF_INVALID, "max_batch must be");
    refused(&mxf_options::prefill_chunk, wrong, MXF_INVALID, "prefill_chunk must be");
  }
  for (int32_t wrong : {-1, INT_MIN}) {
    refused(&mxf_options::device, wrong, MXF_INVALID, "device must be");
  }
  refused(&mxf_options::library, "cpu:none", MXF_TARGET, "no library for the target");
  refused(&mxf_options::library, "", MXF_TARGET, "no library for the target");
  mxf_model_close(nullptr);
}

TEST(no_model) {
  mxf_model_info info;
  mxf_sequence sequence = 1;
  int64_t reused;
  mxf_part part{};
  mxf_result result;
  const char* const words = "The model is missing";
  EXPECT(mxf_model_get_info(nullptr, &info), MXF_INVALID, words);
  EXPECT(mxf_sequence_create(nullptr, nullptr, 0, &sequence, &reused), MXF_INVALID, words);
  EXPECT(mxf_sequence_fork(nullptr, 1, &sequence), MXF_INVALID, words);
  EXPECT(mxf_sequence_keep(nullptr, 1), MXF_INVALID, words);
  EXPECT(mxf_sequence_pretend(nullptr, 1, nullptr, 0), MXF_INVALID, words);
  EXPECT(mxf_sequence_free(nullptr, 1), MXF_INVALID, words);
  EXPECT(mxf_step_submit(nullptr, &part, 1), MXF_INVALID, words);
  EXPECT(mxf_step_wait(nullptr, &result), MXF_INVALID, words);
  EXPECT(mxf_model_wait(nullptr), MXF_INVALID, words);
}

TEST(no_place_for_results) {
  const Model model = Opened();
  const auto before = Answer(model);
  mxf_sequence sequence = Created(model, Prompt(3));
  int64_t reused;
  const int32_t token = 5;
  const mxf_part part = {sequence, &token, 1, 0, nullptr};
  EXPECT(mxf_model_get_info(model.get(), nullptr), MXF_INVALID, "no place");
  EXPECT(mxf_sequence_create(model.get(), &token, 1, nullptr, &reused), MXF_INVALID, "no place");
  EXPECT(mxf_sequence_create(model.get(), &token, 1, &sequence, nullptr), MXF_INVALID, "no place");
  EXPECT(mxf_sequence_fork(model.get(), sequence, nullptr), MXF_INVALID, "no place");
  EXPECT(mxf_step_submit(model.get(), nullptr, 1), MXF_INVALID, "at least one part");
  OK(mxf_step_submit(model.get(), &part, 1));
  EXPECT(mxf_step_wait(model.get(), nullptr), MXF_INVALID, "no place");
  mxf_result result;
  OK(mxf_step_wait(model.get(), &result));
  CHECK(result.token == -1 && result.logits == nullptr && result.top_tokens == nullptr);
  CHECK(Answer(model) == before);
}

TEST(sequences_that_are_not_there) {
  const Model model = Opened();
  const mxf_sequence freed = Created(model);
  OK(mxf_sequence_free(model.get(), freed));
  const int32_t token = 5;
  for (mxf_sequence none : {freed, mxf_sequence{0}, mxf_sequence{-1}, INT64_MAX, INT64_MIN}) {
    const char* const words = "no such sequence, or it was freed";
    mxf_sequence fork;
    const mxf_part part = {none, &token, 1, 0, nullptr};
    EXPECT(mxf_sequence_fork(model.get(), none, &fork), MXF_INVALID, words);
    EXPECT(mxf_sequence_keep(model.get(), none), MXF_INVALID, words);
    EXPECT(mxf_sequence_pretend(model.get(), none, &token, 1), MXF_INVALID, words);
    EXPECT(mxf_sequence_free(model.get(), none), MXF_INVALID, words);
    EXPECT(mxf_step_submit(model.get(), &part, 1), MXF_INVALID, words);
  }
  CHECK(Created(model) > freed);
}

TEST(prompts_that_cannot_be) {
  const Model model = Opened();
  const auto before = Answer(model);
  mxf_sequence sequence = 0;
  int64_t reused = 0;
  const int32_t token = 5;
  for (int64_t wrong : {int64_t{-1}, INT64_MIN}) {
    EXPECT(mxf_sequence_create(model.get(), &token, wrong, &sequence, &reused), MXF_INVALID,
           "tokens of the prompt");
  }
  EXPECT(mxf_sequence_create(model.get(), nullptr, 1, &sequence, &reused), MXF_INVALID,
         "tokens of the prompt");
  CHECK_EQ(sequence, 0);
  sequence = Created(model);
  EXPECT(mxf_sequence_pretend(model.get(), sequence, &token, 1), MXF_INVALID, "whole pages");
  Drawn(model, sequence, Prompt(16));
  for (int64_t wrong : {int64_t{241}, INT64_MAX}) {
    EXPECT(mxf_sequence_pretend(model.get(), sequence, &token, wrong), MXF_INVALID, "longer");
  }
  EXPECT(mxf_sequence_pretend(model.get(), sequence, &token, -1), MXF_INVALID, "missing");
  EXPECT(mxf_sequence_pretend(model.get(), sequence, nullptr, 1), MXF_INVALID, "missing");
  for (int32_t wrong : {-1, INT_MAX, INT_MIN}) {
    EXPECT(mxf_sequence_pretend(model.get(), sequence, &wrong, 1), MXF_INVALID, "vocabulary");
  }
  OK(mxf_sequence_pretend(model.get(), sequence, nullptr, 0));
  const auto rest = Prompt(240);
  OK(mxf_sequence_pretend(model.get(), sequence, rest.data(), 240));
  const mxf_part part = {sequence, &token, 1, 0, nullptr};
  EXPECT(mxf_step_submit(model.get(), &part, 1), MXF_INVALID, "longer than the context");
  OK(mxf_sequence_free(model.get(), sequence));
  CHECK(Answer(model) == before);
}

TEST(steps_that_cannot_be) {
  const Model model = Opened();
  const auto before = Answer(model);
  mxf_model_info info;
  OK(mxf_model_get_info(model.get(), &info));
  const mxf_sequence sequence = Created(model), other = Created(model), third = Created(model);
  const auto tokens = Prompt(40);
  const mxf_sampling greedy = Greedy();
  const auto refused = [&](std::vector<mxf_part> parts, const char* words) {
    EXPECT(mxf_step_submit(model.get(), parts.data(), static_cast<int32_t>(parts.size())),
           MXF_INVALID, words);
  };
  const mxf_part fine = {sequence, tokens.data(), 2, 0, nullptr};
  for (int32_t wrong : {0, -1, INT_MIN}) {
    EXPECT(mxf_step_submit(model.get(), &fine, wrong), MXF_INVALID, "at least one part");
  }
  for (int32_t wrong : {3, INT_MAX}) {
    EXPECT(mxf_step_submit(model.get(), &fine, wrong), MXF_INVALID, "more parts than the batch");
  }
  refused({fine, fine}, "two parts in a step");
  for (int32_t wrong : {0, -1, INT_MIN}) {
    refused({{sequence, tokens.data(), wrong, 0, nullptr}}, "at least one token");
  }
  for (int32_t wrong : {35, INT_MAX}) {
    refused({{sequence, tokens.data(), wrong, 0, nullptr}}, "more tokens than the model was loaded");
  }
  refused({{sequence, tokens.data(), 30, 0, nullptr}, {other, tokens.data(), 30, 0, nullptr}},
          "more tokens than the model was loaded");
  for (int32_t wrong : {-1, static_cast<int32_t>(info.vocab_size), INT_MAX, INT_MIN}) {
    const int32_t two[] = {5, wrong};
    refused({{sequence, two, 2, 0, nullptr}}, "outside the vocabulary");
  }
  for (int32_t wrong : {-1, 3, INT_MAX, INT_MIN}) {
    refused({{sequence, tokens.data(), 2, wrong, nullptr}}, "more tokens than a part has");
  }
  refused({{sequence, tokens.data(), 2, 1, &greedy}}, "not both");
  refused({{sequence, nullptr, 1, 0, &greedy}}, "No token was drawn");
  Drawn(model, sequence, {5});
  for (int32_t wrong : {0, 2, -1}) {
    refused({{sequence, nullptr, wrong, 0, &greedy}}, "No token was drawn");
  }
  OK(mxf_sequence_free(model.get(), sequence));
  OK(mxf_sequence_free(model.get(), other));
  OK(mxf_sequence_free(model.get(), third));
  CHECK(Answer(model) == before);
}

TEST(sampling_that_cannot_be) {
  const Model model = Opened();
  const mxf_sequence sequence = Created(model);
  const int32_t token = 5;
  const auto refused = [&](const mxf_sampling& sampling, const char* words) {
    const mxf_part part = {sequence, &token, 1, 0, &sampling};
    EXPECT(mxf_step_submit(model.get(), &part, 1), MXF_INVALID, words);
  };
  const auto without = [&](auto member, auto value, const char* words) {
    mxf_sampling wrong = Greedy();
    wrong.*member = value;
    refused(wrong, words);
  };
  for (float wrong : {-1.0f, 1e9f, NAN, INFINITY, -INFINITY}) {
    without(&mxf_sampling::temperature, wrong, "temperature must be");
    without(&mxf_sampling::top_p, wrong, "top_p must be");
    without(&mxf_sampling::min_p, wrong, "min_p must be");
    without(&mxf_sampling::repetition_penalty, wrong, "repetition_penalty must be");
  }
  for (float wrong : {1e9f, NAN, -INFINITY}) {
    without(&mxf_sampling::presence_penalty, wrong, "presence_penalty must be");
    without(&mxf_sampling::frequency_penalty, wrong, "frequency_penalty must be");
  }
  for (int32_t wrong : {-1, INT_MIN}) without(&mxf_sampling::top_k, wrong, "top_k");
  for (int32_t wrong : {-2, 21, INT_MAX}) without(&mxf_sampling::logprobs, wrong, "logprobs");
  for (int32_t wrong : {-1, 1, INT_MAX}) without(&mxf_sampling::bias_count, wrong, "biases need");
  const int32_t unsorted[] = {7, 6}, outside[] = {-1, 6};
  const float biases[] = {1, 1};
  for (const auto& [tokens, words] :
       {std::pair{unsorted, "order of their tokens"}, {outside, "outside the vocabulary"}}) {
    mxf_sampling wrong = Greedy();
    wrong.bias_tokens = tokens;
    wrong.biases = biases;
    wrong.bias_count = 2;
    refused(wrong, words);
  }
  mxf_model_info info;
  OK(mxf_model_get_info(model.get(), &info));
  const std::vector<uint32_t> none(static_cast<size_t>(info.vocab_size + 31) / 32);
  without(&mxf_sampling::mask, none.data(), "at least one token");
  without(&mxf_sampling::repetition_penalty, 0.0f, "repetition_penalty");  // as zeros have it
  mxf_sampling most = Greedy();
  most.top_k = INT_MAX;
  most.logprobs = 20;
  most.seed = UINT64_MAX;
  most.temperature = 100;
  CHECK(Drawn(model, sequence, {5}, most) >= 0);
}

TEST(calls_out_of_order) {
  const Model model = Opened();
  const auto before = Answer(model);
  mxf_result results[2];
  EXPECT(mxf_step_wait(model.get(), results), MXF_INVALID, "No step was submitted");
  OK(mxf_model_wait(model.get()));
  const mxf_sequence sequence = Created(model);
  const auto tokens = Prompt(20);
  const mxf_sampling greedy = Greedy();
  const mxf_part first = {sequence, tokens.data(), 20, 0, &greedy};
  const mxf_part next = {sequence, nullptr, 1, 0, &greedy};
  OK(mxf_step_submit(model.get(), &first, 1));
  mxf_sequence fork;
  const int32_t token = 5;
  EXPECT(mxf_sequence_free(model.get(), sequence), MXF_INVALID, "Await the step");
  EXPECT(mxf_sequence_fork(model.get(), sequence, &fork), MXF_INVALID, "Await the step");
  EXPECT(mxf_sequence_keep(model.get(), sequence), MXF_INVALID, "Await the step");
  EXPECT(mxf_sequence_pretend(model.get(), sequence, &token, 1), MXF_INVALID, "Await the step");
  OK(mxf_step_submit(model.get(), &next, 1));
  EXPECT(mxf_step_submit(model.get(), &next, 1), MXF_INVALID, "before a third one");
  std::vector<int32_t> drawn;
  for (int i = 0; i < 2; ++i) {
    OK(mxf_step_wait(model.get(), results));
    drawn.push_back(results[0].token);
  }
  EXPECT(mxf_step_wait(model.get(), results), MXF_INVALID, "No step was submitted");
  CHECK(drawn == std::vector<int32_t>(before.begin(), before.begin() + 2));
  OK(mxf_sequence_free(model.get(), sequence));
  CHECK(Answer(model) == before);
}

TEST(closing_with_steps_and_sequences) {
  for (int submitted : {0, 1, 2}) {
    const Model model = Opened();
    const mxf_sampling greedy = Greedy();
    const auto tokens = Prompt(20);
    for (int i = 0; i < submitted; ++i) {
      const mxf_part part = {Created(model), tokens.data(), 20, 0, &greedy};
      OK(mxf_step_submit(model.get(), &part, 1));
    }
  }
}

TEST(more_sequences_than_pages) {
  const Model model = Opened();  // pages for two of 256 tokens
  const auto before = Answer(model);
  std::vector<mxf_sequence> sequences;
  mxf_status status = MXF_OK;
  const auto tokens = Prompt(32);
  while (status == MXF_OK && sequences.size() < 100) {
    sequences.push_back(Created(model));
    const mxf_part part = {sequences.back(), tokens.data(), 32, 0, nullptr};
    status = mxf_step_submit(model.get(), &part, 1);
    mxf_result result;
    if (status == MXF_OK) OK(mxf_step_wait(model.get(), &result));
  }
  EXPECT(status, MXF_PAGES, "KV pages of 16 tokens were needed");
  CHECK(sequences.size() > 2);
  for (mxf_sequence sequence : sequences) OK(mxf_sequence_free(model.get(), sequence));
  CHECK(Answer(model) == before);
}

TEST(two_threads_in_one_model) {
  const Model model = Opened();
  const auto tokens = Prompt(32);
  std::atomic<int> busy{0}, other{0};
  std::atomic<bool> ends{false};
  std::thread second([&] {
    mxf_model_info info;
    while (!ends) {
      const mxf_status status = mxf_model_get_info(model.get(), &info);
      busy += status == MXF_BUSY;
      other += status != MXF_OK && status != MXF_BUSY;
      if (status == MXF_BUSY) other += std::strstr(mxf_error(), "from one at a time") == nullptr;
    }
  });
  // What the second thread is in a call for, this one is refused, too.
  const auto patiently = [](const auto& call) {
    mxf_status status;
    while ((status = call()) == MXF_BUSY) {
    }
    OK(status);
  };
  using Clock = std::chrono::steady_clock;
  for (const auto end = Clock::now() + std::chrono::seconds(60); busy < 3 && Clock::now() < end;) {
    mxf_sequence sequence;
    int64_t reused;
    patiently([&] { return mxf_sequence_create(model.get(), nullptr, 0, &sequence, &reused); });
    const mxf_part part = {sequence, tokens.data(), 32, 0, nullptr};
    patiently([&] { return mxf_step_submit(model.get(), &part, 1); });
    mxf_result result;
    patiently([&] { return mxf_step_wait(model.get(), &result); });
    patiently([&] { return mxf_sequence_free(model.get(), sequence); });
  }
  ends = true;
  second.join();
  CHECK(busy >= 3);
  CHECK_EQ(other.load(), 0);
}

TEST(errors_are_a_threads_own) {
  EXPECT(mxf_model_wait(nullptr), MXF_INVALID, "The model is missing");
  std::thread([] { CHECK_EQ(std::string(mxf_error()), ""); }).join();
  CHECK(std::string(mxf_error()) == "The model is missing.");
}

TEST(libraries) {
  mxf_library* library = reinterpret_cast<mxf_library*>(8);
  const std::string folder = check::argument + "/";
  const mxforge::core::MappedFile file(folder + "manifest.json");
  const auto manifest = mxforge::core::ReadManifest(
      {static_cast<const char*>(file.data()), file.size()}, "manifest.json");
  const auto& any = manifest.libraries.back();  // what every machine has
  const std::string plan = folder + any.plan, kernels = folder + any.kernels;
  const auto opened = [&](const char* kind, int32_t device, const char* plan_, const char* kernels_,
                          int32_t threads) {
    return mxf_library_open(kind, device, plan_, kernels_, threads, &library);
  };
  EXPECT(opened(nullptr, 0, plan.c_str(), kernels.c_str(), 1), MXF_INVALID, "missing");
  CHECK(library == nullptr);
  EXPECT(opened("cpu", 0, nullptr, kernels.c_str(), 1), MXF_INVALID, "missing");
  EXPECT(opened("cpu", 0, plan.c_str(), nullptr, 1), MXF_INVALID, "missing");
  EXPECT(mxf_library_open("cpu", 0, plan.c_str(), kernels.c_str(), 1, nullptr), MXF_INVALID, "place");
  EXPECT(opened("npu", 0, plan.c_str(), kernels.c_str(), 1), MXF_TARGET, "runs on cpu");
  EXPECT(opened("cpu", -1, plan.c_str(), kernels.c_str(), 1), MXF_INVALID, "device should be");
  for (int32_t wrong : {-1, 4097, INT_MAX}) {
    EXPECT(opened("cpu", 0, plan.c_str(), kernels.c_str(), wrong), MXF_INVALID, "threads should be");
  }
  EXPECT(opened("cpu", 0, "/nowhere", kernels.c_str(), 1), MXF_CORRUPT, "should be a file");
  EXPECT(opened("cpu", 0, kernels.c_str(), kernels.c_str(), 1), MXF_CORRUPT, "be a launch plan");
  EXPECT(opened("cpu", 0, plan.c_str(), plan.c_str(), 1), MXF_TARGET, "should load here");
  OK(opened("cpu", 0, plan.c_str(), kernels.c_str(), 1));
  mxf_array outputs[3];
  EXPECT(mxf_call(nullptr, "decode", nullptr, 0, outputs, 1), MXF_INVALID, "missing");
  EXPECT(mxf_call(library, nullptr, nullptr, 0, outputs, 1), MXF_INVALID, "missing");
  EXPECT(mxf_call(library, "", nullptr, 0, outputs, 1), MXF_INVALID, "no function");
  for (int32_t wrong : {0, -1, 1, INT_MAX}) {
    EXPECT(mxf_call(library, "logprobs", nullptr, wrong, outputs, 3), MXF_INVALID, "of arguments");
    EXPECT(mxf_call(library, "logprobs", nullptr, 2, outputs, wrong), MXF_INVALID, "of outputs");
  }
  EXPECT(mxf_call(library, "logprobs", nullptr, 2, outputs, 3), MXF_INVALID, "are missing");
  std::vector<float> logits(static_cast<size_t>(manifest.vocab_size), 0);
  std::vector<int32_t> ids = {3, 4};
  const int64_t rows[] = {1, manifest.vocab_size}, count[] = {1}, none[] = {-1}, two[] = {2},
                huge[] = {INT64_MAX};
  const mxf_array right = {logits.data(), rows, 2}, id = {ids.data(), count, 1};
  const auto refused = [&](mxf_array first, mxf_array second, const char* words) {
    const mxf_array arguments[] = {first, second};
    EXPECT(mxf_call(library, "logprobs", arguments, 2, outputs, 3), MXF_INVALID, words);
  };
  EXPECT(mxf_call(library, "logprobs", &right, 2, nullptr, 3), MXF_INVALID, "are missing");
  for (int32_t wrong : {0, -1, 1, 3, INT_MAX}) {
    refused({logits.data(), rows, wrong}, id, "number of dimensions");
  }
  refused({logits.data(), nullptr, 2}, id, "number of dimensions");
  refused({nullptr, rows, 2}, id, "no data");
  refused(right, {ids.data(), none, 1}, "impossible shape");
  refused(right, {ids.data(), huge, 1}, "impossible shape");
  refused(right, {nullptr, count, 1}, "no data");
  const int64_t narrow[] = {1, manifest.vocab_size - 1};
  refused({logits.data(), narrow, 2}, id, "logits of logprobs has another shape");
  refused(right, {ids.data(), two, 1}, "disagrees with others");
  const mxf_array arguments[] = {right, id};
  OK(mxf_call(library, "logprobs", arguments, 2, outputs, 3));
  CHECK(outputs[0].ndim == 1 && outputs[0].shape[0] == 1);
  const float even = -std::log(static_cast<float>(manifest.vocab_size));
  CHECK(std::abs(*static_cast<float*>(outputs[0].data) - even) < 1e-3f);
  mxf_library_close(library);
  mxf_library_close(nullptr);
}
