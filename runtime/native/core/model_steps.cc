// Steps of a model: what Submit and Wait do.
#include <algorithm>
#include <cstring>
#include <set>

#include "error.h"
#include "model.h"

namespace mxforge {
namespace core {
namespace {

constexpr size_t kAlignment = 256;  // of what is uploaded
constexpr int32_t kTop = 20;        // tokens that `logprobs` lists
constexpr int32_t kUnknown = -1;    // in place of a token that only the device knows
constexpr char kTooMany[] = "A step has more tokens than the model was loaded for.";

/*! \brief Columns of a page table for so many pages: a power of two, so that shapes repeat. */
size_t Columns(size_t pages, int64_t most) {
  size_t columns = 1;
  while (columns < pages) columns *= 2;
  return std::max(pages, std::min(columns, static_cast<size_t>(most)));
}

HostArgument Words(const std::vector<int32_t>& numbers, std::vector<int64_t> shape) {
  HostArgument made{std::move(shape), std::vector<uint32_t>(numbers.size())};
  std::memcpy(made.words.data(), numbers.data(), numbers.size() * sizeof(uint32_t));
  return made;
}

HostArgument Words(const std::vector<int32_t>& numbers) {
  return Words(numbers, {static_cast<int64_t>(numbers.size())});
}

}  // namespace

void Model::SettleBefore(const mxf_part* parts, int32_t count) {
  bool settle = false;
  for (int32_t i = 0; i < count; ++i) {
    const mxf_part& given = parts[i];
    const Sequence& sequence = Known(given.sequence);
    if (sequence.drawing == 0) continue;
    // Penalties are made here, of all tokens that occurred.
    settle = settle || sequence.occurrences.has_value() ||
             (given.sampling != nullptr && IsPenalized(*given.sampling)) ||
             (given.tokens == nullptr && !device_->runs_behind());
  }
  if (!settle) return;
  for (const auto& step : pending_) Settle(step.get());
}

std::vector<Model::Part> Model::Checked(const mxf_part* parts, int32_t count) {
  Require(count > 0 && parts != nullptr, "A step needs at least one part.");
  Require(count <= settings_.max_batch, "A step has more parts than the batch allows.");
  SettleBefore(parts, count);
  std::vector<Part> checked;
  std::set<mxf_sequence> seen;
  int64_t all = 0;
  for (int32_t i = 0; i < count; ++i) {
    const mxf_part& given = parts[i];
    Part part{&Known(given.sequence), given.sequence, {}, {}, given.logits, std::nullopt};
    if (given.sampling != nullptr) part.sampling = *given.sampling;
    Require(seen.insert(given.sequence).second, "A sequence has two parts in a step.");
    if (given.tokens == nullptr) {
      const std::optional<int32_t>& drawn = part.sequence->drawn;
      if (!drawn.has_value()) part.row = part.sequence->row;
      Require(given.count == 1 && (drawn.has_value() || part.row.has_value()),
              "No token was drawn of a sequence that should go on with it.");
      part.tokens = {drawn.value_or(kUnknown)};
    } else {
      Require(given.count > 0, "A part needs at least one token.");
      Require(given.count <= settings_.prefill_chunk + settings_.max_batch, kTooMany);
      RequireTokens(given.tokens, given.count);
      part.tokens.assign(given.tokens, given.tokens + given.count);
    }
    all += static_cast<int64_t>(part.tokens.size());
    Require(part.sequence->pages.length + static_cast<int64_t>(part.tokens.size()) <=
                settings_.context,
            "A sequence would be longer than the context.");
    Require(given.logits >= 0 && given.logits <= static_cast<int32_t>(part.tokens.size()),
            "Logits are wanted of more tokens than a part has.");
    Require(given.sampling == nullptr || given.logits == 0,
            "A part draws a token or takes logits, not both.");
    if (given.sampling != nullptr) CheckSampling(*given.sampling, manifest_.vocab_size);
    checked.push_back(std::move(part));
  }
  Require(all <= settings_.prefill_chunk + settings_.max_batch, kTooMany);
  return checked;
}

void Model::Submit(const mxf_part* parts, int32_t count) {
  Require(pending_.size() < 2, "Await a step before a third one is submitted.");
  if (spares_.empty()) spares_.push_back(std::make_unique<Pending>());
  std::unique_ptr<Pending> step = std::move(spares_.back());
  spares_.pop_back();
  step->settled = step->reports = false;
  step->parts = Checked(parts, count);
  step->number = ++last_step_;
  PreparePages(&step->parts);
  const DeviceTensor logits = Forward(step->parts);
  step->drawn = step->wanted = 0;
  for (Part& part : step->parts) {
    Sequence& sequence = *part.sequence;
    pages_->Commit(&sequence.pages, static_cast<int64_t>(part.tokens.size()));
    sequence.tokens.insert(sequence.tokens.end(), part.tokens.begin(), part.tokens.end());
    if (sequence.occurrences.has_value()) {
      for (int32_t token : part.tokens) sequence.occurrences->try_emplace(token, 0);
    }
    sequence.drawn.reset();
    sequence.row.reset();
    sequence.last_step = step->number;
    step->drawn += part.sampling.has_value();
    step->wanted += static_cast<size_t>(part.logits);
    if (part.sampling.has_value()) step->reports |= part.sampling->logprobs >= 0;
  }
  if (step->drawn != 0) Sample(logits, step.get());
  const size_t row = static_cast<size_t>(manifest_.vocab_size) * sizeof(float);
  if (step->wanted != 0) {
    const auto* rows = static_cast<const char*>(logits.address);
    Fetch(rows + step->drawn * row, step->wanted * row, &step->logits);
  }
  step->mark = device_->Now();
  int32_t drawn = 0;
  for (const Part& part : step->parts) {
    if (!part.sampling.has_value()) continue;
    part.sequence->row = drawn++;
    ++part.sequence->drawing;
  }
  pending_.push_back(std::move(step));
}

void Model::PreparePages(std::vector<Part>* parts) {
  std::vector<std::vector<PageCopy>> copies(manifest_.groups.size());
  std::optional<Error> failure;
  for (Part& part : *parts) {
    try {
      const auto own =
          pages_->Prepare(&part.sequence->pages, static_cast<int64_t>(part.tokens.size()));
      for (size_t group = 0; group < own.size(); ++group) {
        copies[group].insert(copies[group].end(), own[group].begin(), own[group].end());
      }
    } catch (const Error& error) {
      failure = error;  // what others were given already has to be copied all the same
      break;
    }
  }
  CopyPages(copies);
  if (failure.has_value()) throw *failure;
}

void Model::CopyPages(const std::vector<std::vector<PageCopy>>& copies) {
  for (size_t group = 0; group < copies.size(); ++group) {
    if (copies[group].empty() || manifest_.groups[group].layers.empty()) continue;
    std::vector<int32_t> sources, destinations;
    for (const auto& [source, destination] : copies[group]) {
      sources.push_back(source);
      destinations.push_back(destination);
    }
    Called& copy = Function("kv_copy_pages_" + manifest_.groups[group].name);
    Upload(&copy, {{"source", Words(sources)}, {"destination", Words(destinations)}});
    copy.runner->Run();
  }
}

DeviceTensor Model::Forward(const std::vector<Part>& parts) {
  std::vector<int32_t> tokens, rows, positions, token_seq, drawn_from, wanted;
  bool ahead = false;
  int32_t index = 0;
  for (const Part& part : parts) {
    auto position = static_cast<int32_t>(part.sequence->pages.length);
    for (int32_t token : part.tokens) {
      tokens.push_back(token);
      rows.push_back(part.row.value_or(-1));
      positions.push_back(position++);
      token_seq.push_back(index);
    }
    const auto end = static_cast<int32_t>(tokens.size());
    if (part.sampling.has_value()) drawn_from.push_back(end - 1);
    for (int32_t row = end - part.logits; row < end; ++row) wanted.push_back(row);
    ahead = ahead || part.row.has_value();
    ++index;
  }
  std::map<std::string, HostArgument> inputs = {{"positions", Words(positions)},
                                                {"token_seq", Words(token_seq)}};
  const auto batch = static_cast<int64_t>(parts.size());
  for (size_t group = 0; group < manifest_.groups.size(); ++group) {
    size_t columns = 1;
    for (const Part& part : parts) {
      columns = std::max(columns, part.sequence->pages.groups[group].pages.size());
    }
    columns = Columns(columns, PagesOf(settings_.context));
    std::vector<int32_t> table(parts.size() * columns, 0), first;
    for (size_t row = 0; row < parts.size(); ++row) {
      const GroupPages& own = parts[row].sequence->pages.groups[group];
      std::copy(own.pages.begin(), own.pages.end(),
                table.begin() + static_cast<ptrdiff_t>(row * columns));
      first.push_back(static_cast<int32_t>(own.first));
    }
    const std::string& name = manifest_.groups[group].name;
    inputs[name + "_table"] = Words(table, {batch, static_cast<int64_t>(columns)});
    inputs[name + "_first"] = Words(first);
  }
  // Then each token's logits are wanted, in the order of the parts.
  const bool one_each = tokens.size() == parts.size() && (drawn_from.size() == parts.size() ||
                                                          wanted.size() == parts.size());
  if (!one_each) {
    drawn_from.insert(drawn_from.end(), wanted.begin(), wanted.end());
    if (drawn_from.empty()) drawn_from.push_back(0);  // nothing can be launched over nothing
    inputs["logit_indices"] = Words(drawn_from);
  }
  Called& forward = Function(one_each ? "decode" : "forward");
  if (ahead) {
    const DeviceTensor next = NextTokens(rows, tokens);
    forward.runner->Set(forward.arguments.at("tokens"), next.address, next.shape);
  } else {
    inputs["tokens"] = Words(tokens);
  }
  Upload(&forward, inputs);
  forward.runner->Run();
  const size_t computed = one_each ? parts.size() : drawn_from.size();
  return forward.Output(0, {static_cast<int64_t>(computed), manifest_.vocab_size});
}

DeviceTensor Model::NextTokens(const std::vector<int32_t>& rows,
                               const std::vector<int32_t>& given) {
  // What is not settled was drawn by the last step: its ids are there until `sample` runs again.
  const DeviceTensor ids = Function("sample").runner->Output(0);
  Called& next = Function("next_tokens");
  Upload(&next, {{"rows", Words(rows)}, {"given", Words(given)}});
  next.runner->Set(next.arguments.at("ids"), ids.address, ids.shape);
  next.runner->Run();
  return next.runner->Output(0);
}

void Model::Sample(const DeviceTensor& logits, Pending* step) {
  std::vector<SampleRow> rows;
  for (const Part& part : step->parts) {
    if (!part.sampling.has_value()) continue;
    Sequence& sequence = *part.sequence;
    if (IsPenalized(*part.sampling) && !sequence.occurrences.has_value()) {
      Occurrences& occurrences = sequence.occurrences.emplace();
      for (int32_t token : sequence.tokens) occurrences.try_emplace(token, 0);
      for (int32_t token : sequence.answered) ++occurrences[token];
    }
    rows.push_back({&*part.sampling, sequence.occurrences ? &*sequence.occurrences : nullptr,
                    static_cast<int32_t>(sequence.answered.size()) + sequence.drawing});
  }
  const std::vector<int64_t> shape = {static_cast<int64_t>(rows.size()), manifest_.vocab_size};
  Called& sample = Function("sample");
  Upload(&sample, SampleArguments(rows, manifest_.vocab_size));
  sample.Set("logits", logits.address, shape);
  sample.runner->Run();
  const int64_t count = shape[0];
  const DeviceTensor ids = sample.Output(0, {count});
  Fetch(ids.address, rows.size() * sizeof(int32_t), &step->ids);
  if (!step->reports) return;
  Called& logprobs = Function("logprobs");
  logprobs.Set("logits", logits.address, shape);
  logprobs.Set("ids", ids.address, ids.shape);
  logprobs.runner->Run();
  const size_t bytes = rows.size() * sizeof(float);
  Fetch(logprobs.Output(0, {count}).address, bytes, &step->chosen);
  Fetch(logprobs.Output(1, {count, kTop}).address, bytes * kTop, &step->top_ids);
  Fetch(logprobs.Output(2, {count, kTop}).address, bytes * kTop, &step->top_values);
}

void Model::Fetch(const void* from, size_t bytes, std::unique_ptr<Buffer>* to) {
  if (*to == nullptr || (*to)->size() < bytes) *to = device_->AllocateHost(bytes);
  device_->Download((*to)->address(), from, bytes);
}

void Model::Upload(Called* function, const std::map<std::string, HostArgument>& arguments) {
  size_t bytes = 0;
  for (const auto& [name, argument] : arguments) {
    bytes += (argument.words.size() * sizeof(uint32_t) + kAlignment - 1) / kAlignment * kAlignment;
  }
  // One transfer for all.
  std::vector<char> packed(bytes);
  if (inputs_ == nullptr || inputs_->size() < bytes) inputs_ = device_->Allocate(2 * bytes);
  char* const to = inputs_->address();
  size_t at = 0;
  for (const auto& [name, argument] : arguments) {
    const size_t size = argument.words.size() * sizeof(uint32_t);
    std::memcpy(packed.data() + at, argument.words.data(), size);
    function->Set(name, to + at, argument.shape);
    at += (size + kAlignment - 1) / kAlignment * kAlignment;
  }
  device_->Upload(to, packed.data(), bytes);
}

void Model::Settle(Pending* step) {
  if (step->settled) return;
  device_->Wait(step->mark);
  step->settled = true;
  const auto* ids = step->drawn != 0 ? reinterpret_cast<int32_t*>(step->ids->address()) : nullptr;
  for (const Part& part : step->parts) {
    if (!part.sampling.has_value()) continue;
    const int32_t token = *ids++;
    Sequence& sequence = *part.sequence;
    --sequence.drawing;
    if (sequence.last_step == step->number) {  // nobody has gone on with it
      sequence.row.reset();
      if (token >= 0) sequence.drawn = token;
    } else if (sequence.tokens.back() == kUnknown) {
      sequence.tokens.back() = std::max(token, 0);  // as `next_tokens` took it
    }
    if (token < 0) continue;
    sequence.answered.push_back(token);
    if (sequence.occurrences.has_value()) ++(*sequence.occurrences)[token];
  }
}

void Model::Wait(mxf_result* results) {
  Require(!pending_.empty(), "No step was submitted.");
  Require(results != nullptr, "There is no place for the results.");
  if (shown_ != nullptr) spares_.push_back(std::move(shown_));
  shown_ = std::move(pending_.front());
  pending_.pop_front();
  Settle(shown_.get());
  const auto of = [](const std::unique_ptr<Buffer>& buffer, auto type, size_t index) {
    return reinterpret_cast<const decltype(type)*>(buffer->address()) + index;
  };
  const auto vocabulary = static_cast<size_t>(manifest_.vocab_size);
  size_t drawn = 0, wanted = 0;
  for (size_t i = 0; i < shown_->parts.size(); ++i) {
    const Part& part = shown_->parts[i];
    mxf_result& result = results[i];
    result = {-1, 0, nullptr, nullptr, nullptr};
    if (part.logits > 0) result.logits = of(shown_->logits, float{}, wanted * vocabulary);
    wanted += static_cast<size_t>(part.logits);
    if (!part.sampling.has_value()) continue;
    result.token = *of(shown_->ids, int32_t{}, drawn);
    if (part.sampling->logprobs >= 0) {
      result.logprob = *of(shown_->chosen, float{}, drawn);
      result.top_tokens = of(shown_->top_ids, int32_t{}, drawn * kTop);
      result.top_logprobs = of(shown_->top_values, float{}, drawn * kTop);
    }
    ++drawn;
  }
}

}  // namespace core
}  // namespace mxforge
