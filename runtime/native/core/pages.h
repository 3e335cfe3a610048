/*!
 * \file pages.h
 * \brief Which KV pages belong to whom: book-keeping, without the pages themselves.
 *
 * A page holds kPageTokens positions. Layers that see the same of the past are a group: all of it,
 * or a window. A group has a pool of pages; page 7 of it is page 7 in the tensor of each of its
 * layers. A sequence keeps every page of a group without a window; of one with a window it drops a
 * page once neither its last position nor a later one sees into it.
 *
 * Pages are counted by reference. Sequences share what is full and finished; the page in which a
 * sequence writes next is copied first, if someone else holds it too. A step goes
 *
 *     copies = pages.Prepare(&sequence, n)   pages for the next n positions; run the copies at once
 *     ...                                    the step, with the sequence's pages in its tables
 *     pages.Commit(&sequence, n)             n positions more; drops what windows have left
 */
#ifndef MXFORGE_CORE_PAGES_H_
#define MXFORGE_CORE_PAGES_H_

#include <cstddef>
#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

namespace mxforge {
namespace core {

constexpr int64_t kPageTokens = 16;

/*! \brief How many pages so many tokens take. */
inline int64_t PagesOf(int64_t tokens) { return (tokens + kPageTokens - 1) / kPageTokens; }

/*! \brief Pages of one group, the lowest free ones handed out first: so a prompt's pages mostly
 * follow each other, and are read as a stream. */
class PagePool {
 public:
  explicit PagePool(int32_t size);

  size_t free() const { return free_.size(); }
  int32_t references(int32_t page) const { return references_[static_cast<size_t>(page)]; }

  /*! \brief A page with one reference; there has to be one. What it held is still in it. */
  int32_t Allocate();
  void Retain(int32_t page) { ++references_[static_cast<size_t>(page)]; }
  void Release(int32_t page);

 private:
  std::vector<int32_t> references_;
  std::vector<int32_t> free_;  // a heap
};

/*! \brief The pages of a sequence in one group: pages[k] holds the positions of logical page
 * first + k. */
struct GroupPages {
  std::vector<int32_t> pages;
  int64_t first = 0;
};

struct SequencePages {
  int64_t length = 0;  // positions computed so far
  std::vector<GroupPages> groups;
};

using PageCopy = std::pair<int32_t, int32_t>;  // source, destination

/*!
 * \brief Prefixes of prompts by their tokens, the least recently used forgotten first.
 *
 * A radix tree. An entry holds references to pages, those of windows only as far as the last
 * window reaches; so a prompt can begin with any prefix of an entry whose windows it still covers.
 */
class PrefixTree {
 public:
  /*! \brief `windows`: of each group, in tokens; 0 for one without. */
  explicit PrefixTree(std::vector<int64_t> windows);
  ~PrefixTree();

  size_t size() const { return entries_.size(); }

  /*! \brief Take over the references of `pages`; gives back those that an equal entry had. */
  std::optional<SequencePages> Insert(const int32_t* tokens, SequencePages pages);
  /*! \brief Forget the least recently used entry, and give its references back. */
  SequencePages PopOldest();
  /*! \brief The longest prefix of the tokens that an entry covers, and its pages; 0 and nullptr
   * without one. It counts as used. */
  std::pair<int64_t, const SequencePages*> Longest(const int32_t* tokens, int64_t count);

 private:
  struct Node;
  struct Entry {
    Node* node;
    SequencePages pages;
  };
  using Entries = std::list<Entry>;  // oldest use first

  std::vector<int64_t> windows_;
  std::unique_ptr<Node> root_;
  Entries entries_;

  bool Covers(const SequencePages& pages, int64_t prefix) const;
  std::optional<Entries::iterator> Find(const Node& node, int64_t prefix,
                                        const Node* except) const;
  void Remove(Node* node);
};

/*! \brief All pools, and the prefixes; for one thread at a time. */
class Pages {
 public:
  struct Group {
    int32_t pages;   // of its pool
    int64_t window;  // how many keys a query sees, its own among them; 0: all
  };

  /*! \brief `prefixes`: how many are kept at most, in pages that no sequence needs. */
  Pages(std::vector<Group> groups, size_t prefixes);

  /*! \brief A new sequence for a prompt, which begins with what is known of it. The last token is
   * always computed, for its logits are wanted. */
  SequencePages Start(const int32_t* tokens, int64_t count);
  /*! \brief A second sequence with the same past; what either writes is its own. */
  SequencePages Fork(const SequencePages& sequence);
  /*! \brief Keep the sequence's positions, whose tokens are given, as a prefix. */
  void Keep(const SequencePages& sequence, const int32_t* tokens);
  /*!
   * \brief Pages for the next positions, each of this sequence alone.
   *
   * Returns the copies, by group, to make before the step. Error (MXF_PAGES), with nothing
   * changed, where there are not enough pages even without any prefix.
   */
  std::vector<std::vector<PageCopy>> Prepare(SequencePages* sequence, int64_t count);
  /*! \brief So many prepared positions are computed. */
  void Commit(SequencePages* sequence, int64_t count);
  /*! \brief Give up all pages; the sequence is empty then. */
  void Release(SequencePages* sequence);
  /*! \brief Forget all prefixes. */
  void Clear();

 private:
  std::vector<Group> groups_;
  std::vector<PagePool> pools_;
  PrefixTree prefixes_;
  size_t most_prefixes_;

  SequencePages Share(const SequencePages& source, int64_t length);
  bool IsSharedPartial(const SequencePages& sequence, size_t group) const;
};

}  // namespace core
}  // namespace mxforge

#endif  // MXFORGE_CORE_PAGES_H_
