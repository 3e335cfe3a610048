// Everything that runs at once, for ThreadSanitizer: pools, models in several threads, models that
// come and go. The program's argument is the folder of an artifact.
#include <array>
#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <vector>

#include "check.h"
#include "mxforge.h"
#include "pool.h"

namespace {

using mxforge::core::Pool;

void InThreads(int count, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back(body, i);
  for (std::thread& thread : threads) thread.join();
}

struct Closed {
  void operator()(mxf_model* model) const { mxf_model_close(model); }
};
using Model = std::unique_ptr<mxf_model, Closed>;

/*! \brief Failures end up here, from whichever thread. */
std::atomic<int> failures{0};

void Ok(mxf_status status) { failures += status != MXF_OK; }

Model Opened(int threads) {
  const mxf_options options = {threads, 128, 4, 32, 0, nullptr};
  mxf_model* model = nullptr;
  Ok(mxf_model_open(check::argument.c_str(), &options, &model));
  return Model(model);
}

mxf_sampling Drawing(int logprobs) {
  mxf_sampling made{};
  made.temperature = 0.8f;
  made.top_p = 0.9f;
  made.repetition_penalty = 1.1f;
  made.logprobs = logprobs;
  made.seed = 3;
  return made;
}

using Answers = std::array<std::vector<int32_t>, 3>;

/*! \brief Three prompts in a batch, the next step submitted before one is awaited. */
Answers Answered(const Model& model) {
  const mxf_sampling sampling = Drawing(2);
  std::array<mxf_sequence, 3> sequences;
  std::array<std::vector<int32_t>, 3> prompts;
  std::vector<mxf_part> parts, next;
  for (size_t i = 0; i < 3; ++i) {
    for (size_t t = 0; t < 7 + i; ++t) prompts[i].push_back(static_cast<int32_t>(t * 13 + 1));
    int64_t reused = 0;
    Ok(mxf_sequence_create(model.get(), prompts[i].data(), static_cast<int64_t>(prompts[i].size()),
                           &sequences[i], &reused));
    parts.push_back({sequences[i], prompts[i].data() + reused,
                     static_cast<int32_t>(prompts[i].size()) - static_cast<int32_t>(reused), 0,
                     &sampling});
    next.push_back({sequences[i], nullptr, 1, 0, &sampling});
  }
  Answers answers;
  Ok(mxf_step_submit(model.get(), parts.data(), 3));
  for (int step = 0; step < 6; ++step) {
    Ok(mxf_step_submit(model.get(), next.data(), 3));
    mxf_result results[3];
    Ok(mxf_step_wait(model.get(), results));
    for (size_t i = 0; i < 3; ++i) answers[i].push_back(results[i].token);
  }
  mxf_result results[3];
  Ok(mxf_step_wait(model.get(), results));
  for (mxf_sequence sequence : sequences) {
    Ok(mxf_sequence_keep(model.get(), sequence));
    Ok(mxf_sequence_free(model.get(), sequence));
  }
  return answers;
}

}  // namespace

TEST(what_tasks_write_is_seen_when_a_launch_ends) {
  InThreads(2, [](int) {
    for (int threads : {1, 2, 4}) {
      Pool pool(threads);
      std::array<int, 4> numbers{};  // plain: the pool orders them
      for (int round = 0; round < 500; ++round) {
        pool.Run(
            [](int task, Pool::Group*, void* data) {
              ++(*static_cast<std::array<int, 4>*>(data))[static_cast<size_t>(task)];
              return 0;
            },
            &numbers);
        for (int& number : numbers) number += number != 0;
        if (round % 100 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
      for (int task = 0; task < 4; ++task) {
        failures += numbers[static_cast<size_t>(task)] != (task < threads ? 1000 : 0);
      }
    }
  });
  CHECK_EQ(failures.exchange(0), 0);
}

TEST(pools_come_and_go) {
  InThreads(3, [](int index) {
    for (int round = 0; round < 150; ++round) {
      Pool pool(1 + index);
      if (round % 2 != 0) pool.Run([](int, Pool::Group*, void*) { return 0; }, nullptr);
    }
  });
}

TEST(models_in_several_threads_answer_alike) {
  const Answers alone = Answered(Opened(1));
  CHECK(alone[0] != alone[1]);
  InThreads(3, [&](int index) {
    const Model model = Opened(1 << index);
    for (int round = 0; round < 3; ++round) failures += Answered(model) != alone;
  });
  CHECK_EQ(failures.exchange(0), 0);
}

TEST(models_come_and_go) {
  InThreads(3, [](int index) {
    for (int round = 0; round < 6; ++round) {
      const Model model = Opened(1 + index);
      if (round % 3 != 0) continue;
      const mxf_sampling sampling = Drawing(-1);
      const int32_t token = 5;
      mxf_sequence sequence = 0;
      int64_t reused;
      Ok(mxf_sequence_create(model.get(), nullptr, 0, &sequence, &reused));
      const mxf_part part = {sequence, &token, 1, 0, &sampling};
      Ok(mxf_step_submit(model.get(), &part, 1));  // and closed before anyone waits for it
    }
  });
  CHECK_EQ(failures.exchange(0), 0);
}

TEST(weights_are_read_ahead_while_a_model_answers) {
  const Model model = Opened(2);
  const Answers first = Answered(model);
  const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(1300);
  bool alike = true;
  while (alike && std::chrono::steady_clock::now() < end) alike = Answered(model) == first;
  CHECK(alike);
  CHECK_EQ(failures.exchange(0), 0);
}

TEST(one_model_serves_one_thread_at_a_time) {
  const Model model = Opened(2);
  std::atomic<int> served{0}, others{0};
  InThreads(4, [&](int) {
    for (int round = 0; round < 300; ++round) {
      mxf_sequence sequence;
      int64_t reused;
      const mxf_status status = mxf_sequence_create(model.get(), nullptr, 0, &sequence, &reused);
      served += status == MXF_OK;
      others += status != MXF_OK && status != MXF_BUSY;
      while (status == MXF_OK && mxf_sequence_free(model.get(), sequence) == MXF_BUSY) {
      }
    }
  });
  CHECK(served > 0);
  CHECK_EQ(others.load(), 0);
}
