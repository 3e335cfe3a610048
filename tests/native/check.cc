#include "check.h"

#include <cstdio>
#include <utility>
#include <vector>

namespace check {

std::string argument;

namespace {

using Test = std::pair<const char*, void (*)()>;

std::vector<Test>& Tests() {
  static std::vector<Test> tests;
  return tests;
}

int failures = 0;

}  // namespace

bool Add(const char* name, void (*test)()) {
  Tests().emplace_back(name, test);
  return true;
}

void Failed(const char* file, int line, const std::string& what) {
  ++failures;
  std::printf("%s:%d: %s\n", file, line, what.c_str());
}

}  // namespace check

int main(int count, char** arguments) {
  if (count > 1) check::argument = arguments[1];
  for (const auto& [name, test] : check::Tests()) {
    const int before = check::failures;
    try {
      test();
    } catch (const std::exception& error) {
      check::Failed(name, 0, std::string("threw: ") + error.what());
    }
    std::printf("%s %s\n", check::failures == before ? "ok" : "FAILED", name);
    std::fflush(stdout);
  }
  return check::failures != 0 || check::Tests().empty();
}
