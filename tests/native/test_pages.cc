// Pages and prefixes against models of them that are slow and plain.
#include "pages.h"

#include <algorithm>
#include <map>
#include <random>

#include "check.h"

using namespace mxforge::core;

namespace {

using Tokens = std::vector<int32_t>;

int64_t FirstVisible(int64_t position, int64_t window) {
  return window == 0 ? 0 : std::max<int64_t>(0, position - window + 1) / kPageTokens;
}

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t Below(int64_t count) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(count)); }
  /*! \brief Of few kinds of tokens, so that many begin alike. */
  Tokens Prompt(int64_t most) {
    Tokens made(static_cast<size_t>(1 + Below(most)));
    for (int32_t& token : made) token = Below(8) == 0 ? 1 : 0;
    return made;
  }

 private:
  std::mt19937_64 engine_;
};

int64_t Common(const Tokens& a, const Tokens& b) {
  const auto most = static_cast<ptrdiff_t>(std::min(a.size(), b.size()));
  return std::mismatch(a.begin(), a.begin() + most, b.begin()).first - a.begin();
}

struct Kept {
  Tokens tokens;
  int64_t first;   // of the group with the window
  int32_t marker;  // in place of a page
};

}  // namespace

TEST(prefixes_are_found_as_by_looking_at_all) {
  constexpr int64_t kWindow = 20;
  Random random(1);
  PrefixTree tree({0, kWindow});
  std::vector<Kept> model;  // the oldest use first
  const auto forget = [&model](int32_t marker) {
    const auto found = std::find_if(model.begin(), model.end(),
                                    [marker](const Kept& kept) { return kept.marker == marker; });
    CHECK(found != model.end());
    Kept forgotten = *found;
    model.erase(found);
    return forgotten;
  };
  int found = 0, replaced = 0;
  for (int32_t round = 0; round < 20'000; ++round) {
    const int64_t choice = random.Below(10);
    const Tokens tokens = random.Prompt(random.Below(2) != 0 ? 12 : 90);
    const auto length = static_cast<int64_t>(tokens.size());
    if (choice < 4) {
      // A sequence drops what its window has left, or less, where it was forked.
      const int64_t first = random.Below(FirstVisible(length - 1, kWindow) + 1);
      SequencePages pages{length, {{{round}, 0}, {{round}, first}}};
      const auto same = tree.Insert(tokens.data(), std::move(pages));
      const auto known = std::find_if(model.begin(), model.end(),
                                      [&](const Kept& kept) { return kept.tokens == tokens; });
      CHECK_EQ(same.has_value(), known != model.end());
      if (same.has_value()) {
        CHECK_EQ(same->groups[0].pages[0], known->marker);
        model.erase(known);
        ++replaced;
      }
      model.push_back({tokens, first, round});
    } else if (choice < 5 && !model.empty()) {
      CHECK_EQ(tree.PopOldest().groups[0].pages[0], model.front().marker);
      model.erase(model.begin());
    } else {
      int64_t best = 0;
      const auto usable = [&](const Kept& kept) {
        const int64_t common = Common(kept.tokens, tokens);
        return FirstVisible(common, kWindow) >= kept.first ? common : 0;
      };
      for (const Kept& kept : model) best = std::max(best, usable(kept));
      const auto [common, pages] = tree.Longest(tokens.data(), length);
      CHECK_EQ(common, best);
      CHECK_EQ(pages != nullptr, best > 0);
      if (pages == nullptr) continue;
      ++found;
      const Kept used = forget(pages->groups[0].pages[0]);
      CHECK_EQ(usable(used), best);
      model.push_back(used);
    }
    CHECK_EQ(tree.size(), model.size());
  }
  CHECK(found > 1000 && replaced > 20);
}

namespace {

/*! \brief Pages with something in them: each position holds a number made of all tokens up to it. */
class Simulated {
 public:
  struct Sequence {
    SequencePages pages;
    Tokens tokens;
  };

  Simulated(std::vector<Pages::Group> groups, size_t prefixes)
      : groups_(groups), pages_(groups, prefixes) {
    for (const Pages::Group& group : groups) {
      memory_.emplace_back(static_cast<size_t>(group.pages * kPageTokens), 0);
    }
  }

  int64_t Start(const Tokens& tokens) {
    Sequence made{pages_.Start(tokens.data(), static_cast<int64_t>(tokens.size())), {}};
    CHECK(made.pages.length < static_cast<int64_t>(tokens.size()));
    made.tokens.assign(tokens.begin(), tokens.begin() + made.pages.length);
    sequences_[++last_] = made;
    Inspect(made);
    return last_;
  }

  /*! \brief False where there are no pages; then nothing may have changed. */
  bool Step(int64_t id, const Tokens& tokens) {
    Sequence& of = sequences_.at(id);
    const auto count = static_cast<int64_t>(tokens.size());
    std::vector<std::vector<PageCopy>> copies;
    try {
      copies = pages_.Prepare(&of.pages, count);
    } catch (const Error& error) {
      CHECK_EQ(error.status(), MXF_PAGES);
      Inspect(of);
      return false;
    }
    for (size_t group = 0; group < copies.size(); ++group) {
      for (const auto& [from, to] : copies[group]) {
        std::copy_n(Slot(group, from, 0), kPageTokens, Slot(group, to, 0));
      }
    }
    of.tokens.insert(of.tokens.end(), tokens.begin(), tokens.end());
    for (size_t group = 0; group < groups_.size(); ++group) {
      const GroupPages& own = of.pages.groups[group];
      for (int64_t at = of.pages.length; at < of.pages.length + count; ++at) {
        const auto page = static_cast<size_t>(at / kPageTokens - own.first);
        *Slot(group, own.pages.at(page), at % kPageTokens) = Number(of.tokens, at);
      }
    }
    pages_.Commit(&of.pages, count);
    for (const auto& [other, sequence] : sequences_) Inspect(sequence);
    return true;
  }

  int64_t Fork(int64_t id) {
    Sequence fork = sequences_.at(id);
    fork.pages = pages_.Fork(sequences_.at(id).pages);
    sequences_[++last_] = fork;
    return last_;
  }

  void Keep(int64_t id) { pages_.Keep(sequences_.at(id).pages, sequences_.at(id).tokens.data()); }

  void Free(int64_t id) {
    pages_.Release(&sequences_.at(id).pages);
    sequences_.erase(id);
  }

  int64_t Any(Random* random) {
    auto found = sequences_.begin();
    std::advance(found, random->Below(static_cast<int64_t>(sequences_.size())));
    return found->first;
  }

  size_t size() const { return sequences_.size(); }
  const Sequence& operator[](int64_t id) const { return sequences_.at(id); }
  Pages* pages() { return &pages_; }

 private:
  std::vector<Pages::Group> groups_;
  Pages pages_;
  std::vector<std::vector<uint64_t>> memory_;  // by group
  std::map<int64_t, Sequence> sequences_;
  int64_t last_ = 0;

  uint64_t* Slot(size_t group, int32_t page, int64_t at) {
    return &memory_[group].at(static_cast<size_t>(page * kPageTokens + at));
  }

  static uint64_t Number(const Tokens& tokens, int64_t at) {
    uint64_t number = 0;
    for (int64_t i = 0; i <= at; ++i) {
      number = (number + static_cast<uint64_t>(tokens[static_cast<size_t>(i)]) + 1) * 0x9E3779B97F4A7C15;
    }
    return number;
  }

  /*! \brief What the next position sees is there. */
  void Inspect(const Sequence& of) {
    for (size_t group = 0; group < groups_.size(); ++group) {
      const GroupPages& own = of.pages.groups[group];
      const int64_t window = groups_[group].window, length = of.pages.length;
      const int64_t begin = window == 0 ? 0 : std::max<int64_t>(0, length - window + 1);
      for (int64_t at = begin; at < length; ++at) {
        const int64_t page = at / kPageTokens - own.first;
        if (page < 0 || page >= static_cast<int64_t>(own.pages.size())) {
          CHECK(!"a page that is seen is missing");
          continue;
        }
        CHECK_EQ(*Slot(group, own.pages[static_cast<size_t>(page)], at % kPageTokens),
                 Number(of.tokens, at));
      }
    }
  }
};

/*! \brief Sequences come and go at random; in the end every page is free. */
void ComeAndGo(uint64_t seed, std::vector<Pages::Group> groups, int rounds, int* reused, int* full) {
  Random random(seed);
  Simulated simulated(groups, 6);
  for (int round = 0; round < rounds; ++round) {
    const int64_t choice = random.Below(12);
    if (simulated.size() == 0 || (choice < 2 && simulated.size() < 6)) {
      const int64_t id = simulated.Start(random.Prompt(70));
      *reused += simulated[id].pages.length > 0;
    } else if (choice < 3 && simulated.size() < 6) {
      simulated.Fork(simulated.Any(&random));
    } else if (choice < 5) {
      simulated.Keep(simulated.Any(&random));
    } else if (choice < 6) {
      simulated.Free(simulated.Any(&random));
    } else if (!simulated.Step(simulated.Any(&random), random.Prompt(choice < 9 ? 2 : 40))) {
      ++*full;
      simulated.Free(simulated.Any(&random));
    }
  }
  while (simulated.size() > 0) simulated.Free(simulated.Any(&random));
  simulated.pages()->Clear();
  // Only where no page was lost can one sequence have them all.
  SequencePages all = simulated.pages()->Start(nullptr, 0);
  const int64_t least = std::min_element(groups.begin(), groups.end(), [](auto& a, auto& b) {
                          return a.pages < b.pages;
                        })->pages;
  simulated.pages()->Prepare(&all, least * kPageTokens);
  CHECK_REFUSED(simulated.pages()->Prepare(&all, (least + 1) * kPageTokens), MXF_PAGES,
                "KV pages of 16 tokens were needed, but only 0");
}

}  // namespace

TEST(sequences_see_what_they_wrote) {
  int reused = 0, full = 0;
  ComeAndGo(2, {{40, 0}, {24, 20}}, 1500, &reused, &full);
  ComeAndGo(3, {{12, 1}, {30, 0}, {30, 33}}, 1500, &reused, &full);
  ComeAndGo(4, {{16, 0}}, 1500, &reused, &full);
  CHECK(reused > 20 && full > 20);
}

TEST(pages_come_lowest_first) {
  PagePool pool(4);
  for (int32_t page = 0; page < 4; ++page) CHECK_EQ(pool.Allocate(), page);
  CHECK_EQ(pool.free(), size_t{0});
  for (int32_t page : {2, 0, 3}) pool.Release(page);
  pool.Retain(1);
  pool.Release(1);
  CHECK_EQ(pool.references(1), 1);
  for (int32_t page : {0, 2, 3}) CHECK_EQ(pool.Allocate(), page);
}
