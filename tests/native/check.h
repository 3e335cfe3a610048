/*!
 * \file check.h
 * \brief Tests in C++: functions that check things. `main` of check.cc runs them all.
 */
#ifndef MXFORGE_TESTS_CHECK_H_
#define MXFORGE_TESTS_CHECK_H_

#include <functional>
#include <sstream>
#include <string>

#include "error.h"

namespace check {

/*! \brief Tests run with it as their argument: what the command line gives. */
extern std::string argument;

bool Add(const char* name, void (*test)());
/*! \brief Tell of a check that fails; the test goes on. */
void Failed(const char* file, int line, const std::string& what);

template <typename A, typename B>
void Equal(const A& a, const B& b, const char* text, const char* file, int line) {
  if (a == b) return;
  std::ostringstream what;
  what << text << ": " << a << " is not " << b;
  Failed(file, line, what.str());
}

/*! \brief That it throws an Error of this status, whose message has these words. */
inline void Refused(const std::function<void()>& call, mxf_status status, const std::string& words,
                    const char* file, int line) {
  try {
    call();
  } catch (const mxforge::core::Error& error) {
    const std::string message = error.what();
    if (error.status() != status || message.find(words) == std::string::npos) {
      Failed(file, line, "refused with " + std::to_string(error.status()) + ", " + message +
                             "; expected " + std::to_string(status) + ", " + words);
    }
    return;
  }
  Failed(file, line, "not refused; expected: " + words);
}

}  // namespace check

#define TEST(name)                                          \
  static void name();                                       \
  static const bool name##_added = check::Add(#name, name); \
  static void name()
#define CHECK(condition)                                       \
  do {                                                         \
    if (!(condition)) check::Failed(__FILE__, __LINE__, #condition); \
  } while (false)
#define CHECK_EQ(a, b) check::Equal(a, b, #a, __FILE__, __LINE__)
#define CHECK_REFUSED(statement, status, words) \
  check::Refused([&] { statement; }, status, words, __FILE__, __LINE__)

#endif  // MXFORGE_TESTS_CHECK_H_
