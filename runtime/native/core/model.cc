#include "model.h"

#include <algorithm>
#include <string_view>

#include "error.h"
#include "machine.h"

namespace mxforge {
namespace core {
namespace {

constexpr int kMostThreads = 4096;
constexpr size_t kMostPrefixes = 32;  // at least, for there is one for each sequence of a batch

int64_t Limit(const char* name, int64_t asked, int64_t most) {
  if (asked < 0 || asked > most) {
    throw Error(MXF_INVALID, std::string(name) + " must be from 1 to " + std::to_string(most) +
                                 ", but is " + std::to_string(asked) + ".");
  }
  return asked == 0 ? most : asked;
}

/*! \brief The best library that runs here, or the one for `target`. */
const LibraryInfo& Chosen(const Manifest& manifest, const char* target) {
  if (manifest.host.has_value() && *manifest.host != HostSystem()) {
    throw Error(MXF_TARGET, "The artifact was compiled for " + *manifest.host +
                                ", but this machine is " + HostSystem() +
                                "; compile the model for it.");
  }
  std::string lacking;
  for (const LibraryInfo& library : manifest.libraries) {
    if (target != nullptr && library.target != target) continue;
    std::string missing;
    for (const std::string& feature : library.features) {
      if (!HasCpuFeature(feature)) missing += (missing.empty() ? "" : ", ") + feature;
    }
    if (missing.empty()) return library;
    lacking += (lacking.empty() ? "" : "; ") + library.target + " needs " + missing;
  }
  if (lacking.empty()) {
    throw Error(MXF_TARGET, "The artifact has no library for the target that was asked for.");
  }
  throw Error(MXF_TARGET, "The artifact was compiled for a CPU with more than this one has: " +
                              lacking + ". Compile the model for this machine.");
}

/*! \brief Pages that never run out, for `batch` sequences of `context` tokens. */
int32_t PoolSize(const KvGroup& group, const Settings& settings) {
  const int64_t whole = settings.max_batch * PagesOf(settings.context);
  int64_t pages = whole;
  if (group.window.has_value()) {
    // So many pages can the windows of the last and the next position touch. A chunk adds its own
    // length, and a page more for each sequence, because it need not begin where a page does.
    const int64_t each = (*group.window + kPageTokens - 1) / kPageTokens + 1;
    pages = std::min(whole, settings.max_batch * (each + 1) +
                                PagesOf(settings.prefill_chunk + settings.max_batch));
  }
  Require(pages <= INT32_MAX, "The context and the batch are too large together.");
  return static_cast<int32_t>(pages);
}

}  // namespace

Model::Model(const std::string& folder, const mxf_options& options) {
  const std::string path = folder + "/manifest.json";
  {
    const MappedFile file(path);
    const std::string_view text(static_cast<const char*>(file.data()), file.size());
    manifest_ = ReadManifest(text, path);
  }
  settings_ = {Limit("context", options.context, manifest_.context),
               static_cast<int32_t>(Limit("max_batch", options.max_batch, manifest_.max_batch)),
               static_cast<int32_t>(
                   Limit("prefill_chunk", options.prefill_chunk, manifest_.prefill_chunk))};
  Require(options.device >= 0, "device must be 0 or more.");
  Require(options.threads >= 0 && options.threads <= kMostThreads,
          "threads must be from 0 to 4096.");
  const LibraryInfo& library = Chosen(manifest_, options.library);
  {
    const MappedFile file(folder + "/" + library.plan);
    plan_ = ReadPlan(file.data(), file.size());
  }
  device_ = FindDeviceKind(manifest_.kind)
                .open({folder + "/" + library.kernels, options.device,
                       options.threads != 0 ? options.threads : UsableCores(), library.target});
  workspace_ = device_->Allocate(static_cast<size_t>(plan_.workspace));
  weights_ = std::make_unique<Weights>(folder, manifest_, device_.get());
  std::vector<Pages::Group> groups;
  for (const KvGroup& group : manifest_.groups) {
    const int32_t pages = PoolSize(group, settings_);
    groups.push_back({pages, group.window.value_or(0)});
    pool_sizes_.push_back(pages);
    for (int64_t layer : group.layers) {
      const auto index = static_cast<size_t>(layer);
      if (kv_.size() <= index) kv_.resize(index + 1);
      kv_[index] = device_->Allocate(static_cast<size_t>(group.page_bytes) *
                                     static_cast<size_t>(pages));
    }
  }
  const auto prefixes = std::max(kMostPrefixes, static_cast<size_t>(settings_.max_batch));
  pages_ = std::make_unique<Pages>(std::move(groups), prefixes);
}

Called& Model::Function(const std::string& name) {
  if (const auto called = called_.find(name); called != called_.end()) return called->second;
  const auto known = plan_.functions.find(name);
  if (known == plan_.functions.end()) {
    throw Error(MXF_CORRUPT, "The library has no function " + name + "; compile it again.");
  }
  Called called;
  called.runner = device_->Open(known->second, workspace_->address());
  for (size_t i = 0; i < known->second.arguments; ++i) {
    const Tensor& argument = known->second.tensors[i];
    called.arguments[argument.name] = i;
    if (argument.role != Role::kInput) Place(argument, i, called.runner.get());
  }
  return called_[name] = std::move(called);
}

void Model::Place(const Tensor& argument, size_t index, Runner* runner) {
  const std::vector<Value>& values = runner->function().values;
  std::optional<Cache> cache;
  if (argument.role == Role::kKv) cache = CacheOf(argument.name);
  std::vector<int64_t> shape;
  int64_t bytes = argument.dtype->bits / 8;
  for (uint32_t extent : argument.shape) {
    const bool pages = values[extent].op == Op::kSymbol && cache.has_value();
    shape.push_back(pages ? cache->pages : values[extent].number);
    if (__builtin_mul_overflow(bytes, shape.back(), &bytes)) bytes = -1;
    if (bytes < 0) break;
  }
  const Buffer& buffer = cache.has_value() ? *cache->buffer : weights_->Find(argument.name);
  if (bytes < 0 || static_cast<uint64_t>(bytes) != buffer.size()) {
    throw Error(MXF_CORRUPT, "The manifest and the launch plan disagree about the size of " +
                                 argument.name + "; compile the model again.");
  }
  runner->Set(index, buffer.address(), shape);
}

Model::Cache Model::CacheOf(const std::string& name) const {
  for (size_t group = 0; group < manifest_.groups.size(); ++group) {
    for (int64_t layer : manifest_.groups[group].layers) {
      if (name == "kv_" + std::to_string(layer)) {
        return {kv_[static_cast<size_t>(layer)].get(), pool_sizes_[group]};
      }
    }
  }
  throw Error(MXF_CORRUPT, "No layer has the cache " + name + "; compile the model again.");
}

Model::Sequence& Model::Known(mxf_sequence sequence) {
  const auto found = sequences_.find(sequence);
  Require(found != sequences_.end(), "There is no such sequence, or it was freed.");
  return found->second;
}

void Model::RequireTokens(const int32_t* tokens, int64_t count) const {
  for (int64_t i = 0; i < count; ++i) {
    Require(tokens[i] >= 0 && tokens[i] < manifest_.vocab_size,
            "A token is outside the vocabulary.");
  }
}

void Model::RequireAwaited(const Sequence& sequence, const char* before) const {
  for (const auto& step : pending_) {
    for (const Part& part : step->parts) {
      if (part.sequence != &sequence) continue;
      throw Error(MXF_INVALID,
                  std::string("Await the step before its sequence is ") + before + ".");
    }
  }
}

mxf_sequence Model::Create(const int32_t* tokens, int64_t count, int64_t* reused) {
  Require(count == 0 || (count > 0 && tokens != nullptr), "The tokens of the prompt are missing.");
  Sequence sequence;
  sequence.pages = pages_->Start(tokens, count);
  sequence.tokens.assign(tokens, tokens + sequence.pages.length);
  *reused = sequence.pages.length;
  sequences_.emplace(++last_sequence_, std::move(sequence));
  return last_sequence_;
}

mxf_sequence Model::Fork(mxf_sequence sequence) {
  const Sequence& source = Known(sequence);
  RequireAwaited(source, "forked");
  Sequence fork = source;
  fork.pages = pages_->Fork(source.pages);
  sequences_.emplace(++last_sequence_, std::move(fork));
  return last_sequence_;
}

void Model::Keep(mxf_sequence sequence) {
  const Sequence& kept = Known(sequence);
  RequireAwaited(kept, "kept");
  pages_->Keep(kept.pages, kept.tokens.data());
}

void Model::Free(mxf_sequence sequence) {
  Sequence& freed = Known(sequence);
  RequireAwaited(freed, "freed");
  pages_->Release(&freed.pages);
  sequences_.erase(sequence);
}

void Model::Pretend(mxf_sequence sequence, const int32_t* tokens, int64_t count) {
  Sequence& of = Known(sequence);
  RequireAwaited(of, "lengthened");
  Require(count >= 0 && (count == 0 || tokens != nullptr), "The tokens are missing.");
  Require(count <= settings_.context - of.pages.length,
          "A sequence would be longer than the context.");
  RequireTokens(tokens, count);
  Require(count == 0 || (of.pages.length > 0 && of.pages.length % kPageTokens == 0),
          "What a sequence knows must fill whole pages.");
  while (count > 0) {
    const std::vector<GroupPages> known = of.pages.groups;
    const int64_t taken = std::min<int64_t>(count, settings_.prefill_chunk);
    auto copies = pages_->Prepare(&of.pages, taken);
    for (size_t group = 0; group < known.size(); ++group) {
      const std::vector<int32_t>& sources = known[group].pages;
      const std::vector<int32_t>& all = of.pages.groups[group].pages;
      for (size_t page = sources.size(); page < all.size(); ++page) {
        copies[group].emplace_back(sources[(page - sources.size()) % sources.size()], all[page]);
      }
    }
    CopyPages(copies);
    pages_->Commit(&of.pages, taken);
    of.tokens.insert(of.tokens.end(), tokens, tokens + taken);
    tokens += taken;
    count -= taken;
  }
}

}  // namespace core
}  // namespace mxforge
