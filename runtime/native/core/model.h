/*!
 * \file model.h
 * \brief A model on a device: sequences, and steps of them.
 */
#ifndef MXFORGE_CORE_MODEL_H_
#define MXFORGE_CORE_MODEL_H_

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "contract.h"
#include "device.h"
#include "manifest.h"
#include "mxforge.h"
#include "pages.h"
#include "plan.h"
#include "sampling.h"
#include "weights.h"

namespace mxforge {
namespace core {

/*! \brief What does not change while a model is loaded. */
struct Settings {
  int64_t context;
  int32_t max_batch;
  int32_t prefill_chunk;
};

class Model {
 public:
  /*! \brief `options` as mxf_model_open takes them; throws Error. */
  Model(const std::string& folder, const mxf_options& options);

  const Manifest& manifest() const { return manifest_; }
  const Settings& settings() const { return settings_; }
  bool runs_behind() const { return device_->runs_behind(); }

  mxf_sequence Create(const int32_t* tokens, int64_t count, int64_t* reused);
  mxf_sequence Fork(mxf_sequence sequence);
  void Keep(mxf_sequence sequence);
  void Pretend(mxf_sequence sequence, const int32_t* tokens, int64_t count);
  void Free(mxf_sequence sequence);

  void Submit(const mxf_part* parts, int32_t count);
  void Wait(mxf_result* results);
  void WaitForDevice() { device_->Wait(device_->Now()); }

 private:
  struct Sequence {
    SequencePages pages;
    std::vector<int32_t> tokens;   // that are computed
    std::vector<int32_t> answered; // that were drawn
    std::optional<int32_t> drawn;  // the last of these, until it is computed
    std::optional<int32_t> row;    // of the last step's ids: where that is, while only the device
                                   // knows it
    int32_t drawing = 0;           // tokens that steps draw which are not settled
    uint64_t last_step = 0;        // which has a part of it
    std::optional<Occurrences> occurrences;  // once penalties ask for them
  };

  /*! \brief A part of a step, checked, with the tokens it brings. */
  struct Part {
    Sequence* sequence;
    mxf_sequence id;
    std::vector<int32_t> tokens;  // one that only the device knows is -1
    std::optional<int32_t> row;   // of the ids of the step before: where that lies
    int32_t logits;
    std::optional<mxf_sampling> sampling;  // what it points to is the caller's, in Submit only
  };

  /*! \brief A step that was submitted: its parts, and on the host what came of them. */
  struct Pending {
    uint64_t number = 0;
    std::vector<Part> parts;
    size_t drawn = 0, wanted = 0;  // rows
    bool reports = false;          // log-probabilities
    std::unique_ptr<Buffer> ids, chosen, top_ids, top_values, logits;
    Mark mark = 0;
    bool settled = false;  // its draws are known to the sequences
  };

  Manifest manifest_;
  Settings settings_;
  Plan plan_;
  std::unique_ptr<Device> device_;
  std::unique_ptr<Buffer> workspace_;
  std::unique_ptr<Weights> weights_;
  std::vector<std::unique_ptr<Buffer>> kv_;  // by layer
  std::vector<int32_t> pool_sizes_;          // by group
  std::unique_ptr<Pages> pages_;
  std::map<std::string, Called> called_;

  std::map<mxf_sequence, Sequence> sequences_;
  mxf_sequence last_sequence_ = 0;
  uint64_t last_step_ = 0;

  std::deque<std::unique_ptr<Pending>> pending_;  // the oldest first
  std::unique_ptr<Pending> shown_;                // that results point to
  std::vector<std::unique_ptr<Pending>> spares_;  // for next steps: what they hold is kept
  std::unique_ptr<Buffer> inputs_;                // of the function that is called

  /*! \brief What a layer knows of the past. */
  struct Cache {
    const Buffer* buffer;
    int64_t pages;
  };

  Called& Function(const std::string& name);
  void Place(const Tensor& argument, size_t index, Runner* runner);
  Cache CacheOf(const std::string& name) const;
  Sequence& Known(mxf_sequence sequence);
  void SettleBefore(const mxf_part* parts, int32_t count);
  std::vector<Part> Checked(const mxf_part* parts, int32_t count);
  void PreparePages(std::vector<Part>* parts);
  void CopyPages(const std::vector<std::vector<PageCopy>>& copies);
  DeviceTensor Forward(const std::vector<Part>& parts);
  DeviceTensor NextTokens(const std::vector<int32_t>& rows, const std::vector<int32_t>& given);
  void Sample(const DeviceTensor& logits, Pending* step);
  void Fetch(const void* from, size_t bytes, std::unique_ptr<Buffer>* to);
  void Settle(Pending* step);
  void RequireTokens(const int32_t* tokens, int64_t count) const;
  void RequireAwaited(const Sequence& sequence, const char* before) const;
  void Upload(Called* function, const std::map<std::string, HostArgument>& arguments);
};

}  // namespace core
}  // namespace mxforge

#endif  // MXFORGE_CORE_MODEL_H_
