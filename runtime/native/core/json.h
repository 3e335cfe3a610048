/*!
 * \file json.h
 * \brief JSON as artifacts have it: read whole, checked strictly, asked with the path in errors.
 */
#ifndef MXFORGE_CORE_JSON_H_
#define MXFORGE_CORE_JSON_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace mxforge {
namespace core {

class Json {
 public:
  enum class Kind { kNull, kBool, kInteger, kReal, kText, kList, kObject };
  using Member = std::pair<std::string, Json>;

  /*!
   * \brief Parse a text; `what` names it in errors.
   *
   * Error (MXF_CORRUPT) for what is no JSON, has a key twice, is nested deeper than 64, or has more
   * values than any model.
   */
  static Json Parse(std::string_view text, const std::string& what);

  Kind kind() const { return kind_; }
  bool IsNull() const { return kind_ == Kind::kNull; }

  // Errors (MXF_CORRUPT) name the path where a value is of another kind.
  bool Bool() const;
  int64_t Integer() const;
  /*! \brief A whole number from 0 on. */
  uint64_t Size() const;
  /*! \brief A whole number, too. */
  double Real() const;
  const std::string& Text() const;
  const std::vector<Json>& List() const;
  const std::vector<Member>& Object() const;
  const Json& operator[](const char* key) const;
  /*! \brief nullptr where an object has no such key. */
  const Json* Find(std::string_view key) const;

  [[noreturn]] void Refuse(const std::string& expected) const;

 private:
  friend class JsonParser;

  Kind kind_ = Kind::kNull;
  bool bool_ = false;
  int64_t integer_ = 0;
  double real_ = 0;
  std::string text_;
  std::vector<Json> list_;
  std::vector<Member> object_;
  std::string path_;  // for errors
};

/*! \brief A text as JSON writes it, with its quotes. */
std::string Quoted(std::string_view text);

}  // namespace core
}  // namespace mxforge

#endif  // MXFORGE_CORE_JSON_H_
