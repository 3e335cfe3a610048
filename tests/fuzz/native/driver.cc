// Runs a target without libFuzzer: on files, and on what damage makes of them.
//
//     target [--runs N] [--seconds S] [--seed N] [--say] FILE...
//
// Every FILE is run as it is; of those that can be read then N damaged ones, and more while S
// seconds last. `--say` writes each input with its verdict to stdout, for whoever compares: two
// lengths of four bytes, then both. An input that ends the process is shown in hexadecimal.
#include <sanitizer/common_interface_defs.h>

#include <chrono>
#include <csignal>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <vector>

#include "target.h"

namespace fuzz {

std::string verdict;

namespace {

using Bytes = std::vector<uint8_t>;

class Damage {
 public:
  Damage(std::vector<Bytes> sources, uint64_t seed) : sources_(std::move(sources)), random_(seed) {}

  Bytes Next() {
    Bytes made = Any(sources_);
    for (size_t left = 1 + Below(4); left > 0; --left) {
      (this->*kDamages[Below(std::size(kDamages))])(&made);
    }
    return made;
  }

 private:
  std::vector<Bytes> sources_;
  std::mt19937_64 random_;

  size_t Below(size_t count) { return count == 0 ? 0 : random_() % count; }

  template <typename T>
  const T& Any(const std::vector<T>& of) {
    return of[Below(of.size())];
  }

  /*! \brief Short mostly. */
  size_t Length(size_t most) {
    const size_t lengths[] = {1, 1, 2, 4, 8, 24, 64, Below(most + 1)};
    return std::min(most, lengths[Below(std::size(lengths))]);
  }

  void FlipBit(Bytes* data) {
    if (!data->empty()) (*data)[Below(data->size())] ^= static_cast<uint8_t>(1 << Below(8));
  }

  void SetByte(Bytes* data) {
    if (!data->empty()) (*data)[Below(data->size())] = static_cast<uint8_t>(random_());
  }

  /*! \brief A word, which plans are made of, becomes a near or a special one. */
  void SetWord(Bytes* data) {
    if (data->size() < 4) return;
    const size_t at = Below(data->size() / 4) * 4;
    uint32_t word;
    std::memcpy(&word, data->data() + at, 4);
    const uint32_t others[] = {word + 1, word - 1, static_cast<uint32_t>(Below(16)), 0, 0xFFFFFFFF,
                               0x7FFFFFFF, 0x80000000, 1 << 20};
    word = others[Below(std::size(others))];
    std::memcpy(data->data() + at, &word, 4);
  }

  void Cut(Bytes* data) {
    const size_t at = Below(data->size() + 1), length = Length(data->size() - at);
    const auto begin = data->begin() + static_cast<ptrdiff_t>(at);
    data->erase(begin, begin + static_cast<ptrdiff_t>(length));
  }

  /*! \brief Put a piece of a source somewhere. */
  void Splice(Bytes* data) {
    const Bytes& from = Any(sources_);
    const size_t begin = Below(from.size() + 1), length = Length(from.size() - begin);
    const auto piece = from.begin() + static_cast<ptrdiff_t>(begin);
    data->insert(data->begin() + static_cast<ptrdiff_t>(Below(data->size() + 1)), piece,
                 piece + static_cast<ptrdiff_t>(length));
  }

  void SetDigit(Bytes* data) {
    for (size_t tries = 0; tries < 32 && !data->empty(); ++tries) {
      uint8_t& byte = (*data)[Below(data->size())];
      if (byte < '0' || byte > '9') continue;
      byte = static_cast<uint8_t>('0' + Below(10));
      return;
    }
  }

  void InsertText(Bytes* data) {
    static const char* const texts[] = {"{",   "}",    "[",    "]",     "\"",     ",",    ":", "-1",
                                        "1e9", "null", "true", "\\ud8", "\\u0000", "\xC3", "[[", "99"};
    const std::string text = texts[Below(std::size(texts))];
    data->insert(data->begin() + static_cast<ptrdiff_t>(Below(data->size() + 1)), text.begin(),
                 text.end());
  }

  static constexpr void (Damage::*kDamages[])(Bytes*) = {
      &Damage::FlipBit, &Damage::SetByte, &Damage::SetWord,  &Damage::SetWord,
      &Damage::Cut,     &Damage::Splice,  &Damage::SetDigit, &Damage::InsertText};
};

struct Options {
  uint64_t runs = 0, seed = 1;
  double seconds = 0;
  bool say = false;
};

const Bytes* running = nullptr;

void ShowRunning() {
  std::fprintf(stderr, "\ninput: ");
  if (running != nullptr) {
    for (uint8_t byte : *running) std::fprintf(stderr, "%02x", byte);
  }
  std::fprintf(stderr, "\n");
}

void RunOne(const Bytes& data, const Options& options) {
  running = &data;
  // A copy of just its size, so that ASan sees a read beyond it.
  const auto exact = std::make_unique<uint8_t[]>(data.size());
  std::copy(data.begin(), data.end(), exact.get());
  LLVMFuzzerTestOneInput(exact.get(), data.size());
  if (!options.say) return;
  const uint32_t sizes[] = {static_cast<uint32_t>(data.size()),
                            static_cast<uint32_t>(verdict.size())};
  std::fwrite(sizes, sizeof(sizes), 1, stdout);
  std::fwrite(data.data(), 1, data.size(), stdout);
  std::fwrite(verdict.data(), 1, verdict.size(), stdout);
}

[[maybe_unused]] int Main(int count, char** arguments) {
  Options options;
  std::vector<Bytes> sources;
  for (int i = 1; i < count; ++i) {
    const std::string name = arguments[i];
    const char* next = i + 1 < count ? arguments[i + 1] : "";
    if (name == "--say") {
      options.say = true;
      continue;
    }
    if (name.rfind("--", 0) != 0) {
      std::ifstream file(name, std::ios::binary);
      if (!file) Fail("a file that is not there");
      sources.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
      continue;
    }
    if (name == "--runs") options.runs = std::strtoull(next, nullptr, 10);
    if (name == "--seed") options.seed = std::strtoull(next, nullptr, 10);
    if (name == "--seconds") options.seconds = std::strtod(next, nullptr);
    ++i;
  }
  if (sources.empty()) Fail("no input to begin with");
  std::signal(SIGABRT, [](int) { ShowRunning(); });
  __sanitizer_set_death_callback(ShowRunning);
  uint64_t runs = sources.size(), read = 0;
  std::vector<Bytes> whole;  // more comes of these
  for (const Bytes& source : sources) {
    RunOne(source, options);
    if (!verdict.empty()) whole.push_back(source);
  }
  Damage damage(whole.empty() ? sources : whole, options.seed);
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::duration<double>(options.seconds);
  for (uint64_t i = 0; i < options.runs || Clock::now() < end; ++i, ++runs) {
    RunOne(damage.Next(), options);
    read += !verdict.empty();
  }
  std::fprintf(stderr, "%llu inputs, %llu of the damaged ones were read\n",
               static_cast<unsigned long long>(runs), static_cast<unsigned long long>(read));
  return 0;
}

}  // namespace
}  // namespace fuzz

#ifndef FUZZ_WITH_LIBFUZZER
int main(int count, char** arguments) { return fuzz::Main(count, arguments); }
#endif
