#include "pages.h"

#include <algorithm>
#include <functional>
#include <string>

#include "error.h"

namespace mxforge {
namespace core {
namespace {

/*! \brief The first logical page that a query at this position sees through a window. */
int64_t FirstVisible(int64_t position, int64_t window) {
  return window == 0 ? 0 : std::max<int64_t>(0, position - window + 1) / kPageTokens;
}

}  // namespace

PagePool::PagePool(int32_t size) : references_(static_cast<size_t>(size), 0) {
  for (int32_t page = 0; page < size; ++page) free_.push_back(page);  // sorted: a heap
}

int32_t PagePool::Allocate() {
  std::pop_heap(free_.begin(), free_.end(), std::greater<>());
  const int32_t page = free_.back();
  free_.pop_back();
  references_[static_cast<size_t>(page)] = 1;
  return page;
}

void PagePool::Release(int32_t page) {
  if (--references_[static_cast<size_t>(page)] > 0) return;
  free_.push_back(page);
  std::push_heap(free_.begin(), free_.end(), std::greater<>());
}

// -- prefixes -------------------------------------------------------------------------------------

struct PrefixTree::Node {
  Node* parent = nullptr;
  std::vector<int32_t> tokens;  // from the parent to here
  std::map<int32_t, std::unique_ptr<Node>> children;  // by the first of their tokens
  std::optional<Entries::iterator> entry;

  /*! \brief How many of its tokens come next. */
  int64_t Common(const int32_t* next, int64_t count) const {
    const auto most = std::min(count, static_cast<int64_t>(tokens.size()));
    return std::mismatch(tokens.begin(), tokens.begin() + most, next).first - tokens.begin();
  }
};

PrefixTree::PrefixTree(std::vector<int64_t> windows)
    : windows_(std::move(windows)), root_(std::make_unique<Node>()) {}

PrefixTree::~PrefixTree() = default;

std::optional<SequencePages> PrefixTree::Insert(const int32_t* tokens, SequencePages pages) {
  Node* node = root_.get();
  for (int64_t at = 0, count = pages.length; at < count;) {
    std::unique_ptr<Node>& child = node->children[tokens[at]];
    if (child == nullptr) {
      child = std::make_unique<Node>();
      child->parent = node;
      child->tokens.assign(tokens + at, tokens + count);
    }
    const int64_t common = child->Common(tokens + at, count - at);
    if (common < static_cast<int64_t>(child->tokens.size())) {
      auto upper = std::make_unique<Node>();
      upper->parent = node;
      upper->tokens.assign(child->tokens.begin(), child->tokens.begin() + common);
      child->tokens.erase(child->tokens.begin(), child->tokens.begin() + common);
      child->parent = upper.get();
      upper->children[child->tokens.front()] = std::move(child);
      child = std::move(upper);
    }
    node = child.get();
    at += common;
  }
  std::optional<SequencePages> replaced;
  if (node->entry.has_value()) {
    replaced = std::move((*node->entry)->pages);
    entries_.erase(*node->entry);
  }
  node->entry = entries_.insert(entries_.end(), {node, std::move(pages)});
  return replaced;
}

SequencePages PrefixTree::PopOldest() {
  Entry oldest = std::move(entries_.front());
  entries_.pop_front();
  oldest.node->entry.reset();
  Remove(oldest.node);
  return std::move(oldest.pages);
}

void PrefixTree::Remove(Node* node) {
  while (node != root_.get() && !node->entry.has_value() && node->children.size() <= 1) {
    Node* parent = node->parent;
    std::unique_ptr<Node>& own = parent->children.at(node->tokens.front());
    if (node->children.empty()) {
      parent->children.erase(node->tokens.front());
      node = parent;
      continue;
    }
    // One child: both become one.
    std::unique_ptr<Node> child = std::move(node->children.begin()->second);
    child->tokens.insert(child->tokens.begin(), node->tokens.begin(), node->tokens.end());
    child->parent = parent;
    own = std::move(child);
    return;
  }
}

std::pair<int64_t, const SequencePages*> PrefixTree::Longest(const int32_t* tokens,
                                                             int64_t count) {
  std::vector<std::pair<const Node*, int64_t>> path = {{root_.get(), 0}};  // and what is common
  while (path.back().second < count) {
    const auto& [node, at] = path.back();
    const auto next = node->children.find(tokens[at]);
    if (next == node->children.end()) break;
    const Node* child = next->second.get();
    const int64_t common = child->Common(tokens + at, count - at);
    path.emplace_back(child, at + common);
    if (common < static_cast<int64_t>(child->tokens.size())) break;
  }
  const Node* below = nullptr;
  for (auto step = path.rbegin(); step != path.rend() && step->second > 0; ++step) {
    if (const auto found = Find(*step->first, step->second, below)) {
      entries_.splice(entries_.end(), entries_, *found);
      return {step->second, &(*found)->pages};
    }
    below = step->first;
  }
  return {0, nullptr};
}

bool PrefixTree::Covers(const SequencePages& pages, int64_t prefix) const {
  for (size_t group = 0; group < windows_.size(); ++group) {
    if (pages.groups[group].first > FirstVisible(prefix, windows_[group])) return false;
  }
  return true;
}

/*! \brief An entry at or below the node, but not below `except`, that covers the prefix. */
std::optional<PrefixTree::Entries::iterator> PrefixTree::Find(const Node& node, int64_t prefix,
                                                              const Node* except) const {
  std::vector<const Node*> open = {&node};
  while (!open.empty()) {
    const Node* next = open.back();
    open.pop_back();
    if (next->entry.has_value() && Covers((*next->entry)->pages, prefix)) return next->entry;
    for (const auto& child : next->children) {
      if (child.second.get() != except) open.push_back(child.second.get());
    }
  }
  return std::nullopt;
}

// -- pools ----------------------------------------------------------------------------------------

namespace {

std::vector<int64_t> Windows(const std::vector<Pages::Group>& groups) {
  std::vector<int64_t> windows;
  for (const Pages::Group& group : groups) windows.push_back(group.window);
  return windows;
}

}  // namespace

Pages::Pages(std::vector<Group> groups, size_t prefixes)
    : groups_(std::move(groups)), prefixes_(Windows(groups_)), most_prefixes_(prefixes) {
  for (const Group& group : groups_) pools_.emplace_back(group.pages);
}

SequencePages Pages::Start(const int32_t* tokens, int64_t count) {
  const auto [length, source] = prefixes_.Longest(tokens, std::max<int64_t>(0, count - 1));
  if (source != nullptr) return Share(*source, length);
  SequencePages fresh;
  fresh.groups.resize(groups_.size());
  return fresh;
}

SequencePages Pages::Fork(const SequencePages& sequence) {
  return Share(sequence, sequence.length);
}

SequencePages Pages::Share(const SequencePages& source, int64_t length) {
  SequencePages shared;
  shared.length = length;
  for (size_t group = 0; group < groups_.size(); ++group) {
    const GroupPages& of = source.groups[group];
    // As after Commit; a prefix inside `source` has at least what its next position sees.
    GroupPages own;
    own.first = std::max(of.first, FirstVisible(length - 1, groups_[group].window));
    own.pages.assign(of.pages.begin() + (own.first - of.first),
                     of.pages.begin() + (PagesOf(length) - of.first));
    for (int32_t page : own.pages) pools_[group].Retain(page);
    shared.groups.push_back(std::move(own));
  }
  return shared;
}

void Pages::Keep(const SequencePages& sequence, const int32_t* tokens) {
  if (sequence.length == 0 || most_prefixes_ == 0) return;
  if (std::optional<SequencePages> same = prefixes_.Insert(tokens, Fork(sequence))) Release(&*same);
  if (prefixes_.size() > most_prefixes_) {
    SequencePages oldest = prefixes_.PopOldest();
    Release(&oldest);
  }
}

bool Pages::IsSharedPartial(const SequencePages& sequence, size_t group) const {
  // Only the page where the next position falls can be shared and written: what is shared is
  // computed.
  if (sequence.length % kPageTokens == 0) return false;
  const GroupPages& own = sequence.groups[group];
  const auto index = static_cast<size_t>(sequence.length / kPageTokens - own.first);
  return pools_[group].references(own.pages[index]) > 1;
}

std::vector<std::vector<PageCopy>> Pages::Prepare(SequencePages* sequence, int64_t count) {
  const int64_t end = PagesOf(sequence->length + count);
  std::vector<size_t> needs(groups_.size());
  for (;;) {
    std::optional<size_t> lacking;
    for (size_t group = 0; group < groups_.size(); ++group) {
      const GroupPages& own = sequence->groups[group];
      const int64_t more = end - own.first - static_cast<int64_t>(own.pages.size());
      needs[group] = static_cast<size_t>(std::max<int64_t>(0, more)) +
                     (IsSharedPartial(*sequence, group) ? 1 : 0);
      if (needs[group] > pools_[group].free()) lacking = group;
    }
    if (!lacking.has_value()) break;
    if (prefixes_.size() == 0) {
      throw Error(MXF_PAGES,
                  std::to_string(needs[*lacking]) + " KV pages of 16 tokens were needed, but only " +
                      std::to_string(pools_[*lacking].free()) + " of " +
                      std::to_string(groups_[*lacking].pages) +
                      " are free; load with a longer context or run fewer sequences at once.");
    }
    SequencePages oldest = prefixes_.PopOldest();
    Release(&oldest);
  }
  std::vector<std::vector<PageCopy>> copies(groups_.size());
  for (size_t group = 0; group < groups_.size(); ++group) {
    GroupPages& own = sequence->groups[group];
    size_t need = needs[group];
    if (IsSharedPartial(*sequence, group)) {
      int32_t& page = own.pages[static_cast<size_t>(sequence->length / kPageTokens - own.first)];
      const int32_t fresh = pools_[group].Allocate();
      copies[group].emplace_back(page, fresh);
      pools_[group].Release(page);
      page = fresh;
      --need;
    }
    for (; need > 0; --need) own.pages.push_back(pools_[group].Allocate());
  }
  return copies;
}

void Pages::Commit(SequencePages* sequence, int64_t count) {
  sequence->length += count;
  for (size_t group = 0; group < groups_.size(); ++group) {
    // Seen from the last position, not the next, so that it can be computed once more: the same
    // prompt asked again needs just that position's logits.
    GroupPages& own = sequence->groups[group];
    const int64_t first = FirstVisible(sequence->length - 1, groups_[group].window);
    if (first <= own.first) continue;
    const auto gone = own.pages.begin() + (first - own.first);
    for (auto page = own.pages.begin(); page != gone; ++page) pools_[group].Release(*page);
    own.pages.erase(own.pages.begin(), gone);
    own.first = first;
  }
}

void Pages::Release(SequencePages* sequence) {
  for (size_t group = 0; group < sequence->groups.size(); ++group) {
    for (int32_t page : sequence->groups[group].pages) pools_[group].Release(page);
    sequence->groups[group] = GroupPages();
  }
  sequence->length = 0;
}

void Pages::Clear() {
  while (prefixes_.size() > 0) {
    SequencePages oldest = prefixes_.PopOldest();
    Release(&oldest);
  }
}

}  // namespace core
}  // namespace mxforge
