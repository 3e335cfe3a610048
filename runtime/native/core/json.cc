#include "json.h"

#include <cerrno>
#include <cstdlib>
#include <set>

#include "error.h"
#include "utf8.h"

namespace mxforge {
namespace core {
namespace {

constexpr int kMostDepth = 64;
constexpr size_t kMostValues = 1 << 18;  // far more than any model's
constexpr size_t kMostPath = 100;        // bytes: every value has one

/*! \brief The end of a path, which tells most. */
std::string Shortened(std::string path) {
  const std::string dots = "...";
  if (path.size() > kMostPath) path.replace(0, path.size() - kMostPath + dots.size(), dots);
  return path;
}

std::string Shown(const std::string& path) {
  std::string shown;
  for (const char c : path) shown += c >= ' ' && c < 127 ? c : '?';
  return shown;
}

}  // namespace

class JsonParser {
 public:
  JsonParser(std::string_view text, const std::string& what) : text_(text), what_(what) {}

  Json ParseAll() {
    if (!IsUtf8(text_)) Fail("it is no UTF-8");
    Json value = ParseValue(what_, 0);
    Skip();
    if (at_ != text_.size()) Fail("something follows it");
    return value;
  }

 private:
  std::string_view text_;
  const std::string& what_;
  size_t at_ = 0;
  size_t values_ = 0;

  [[noreturn]] void Fail(const char* reason) const {
    throw Error(MXF_CORRUPT, what_ + " is not readable JSON (" + reason + " at byte " +
                                 std::to_string(at_) + "); copy the artifact again.");
  }

  void Skip() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\r' ||
                                  text_[at_] == '\t')) {
      ++at_;
    }
  }

  char Peek() {
    Skip();
    if (at_ == text_.size()) Fail("it ends too early");
    return text_[at_];
  }

  bool Take(char c) {
    if (Peek() != c) return false;
    ++at_;
    return true;
  }

  void Expect(char c) {
    if (!Take(c)) Fail("another character was expected");
  }

  bool TakeWord(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  Json ParseValue(const std::string& path, int depth) {
    if (depth > kMostDepth) Fail("it is nested too deeply");
    if (++values_ > kMostValues) Fail("it has too many values");
    Json value;
    value.path_ = Shortened(path);
    switch (Peek()) {
      case '{':
        ParseObject(&value, depth);
        break;
      case '[':
        ParseList(&value, depth);
        break;
      case '"':
        value.kind_ = Json::Kind::kText;
        value.text_ = ParseText();
        break;
      default:
        if (TakeWord("true")) {
          value.kind_ = Json::Kind::kBool;
          value.bool_ = true;
        } else if (TakeWord("false")) {
          value.kind_ = Json::Kind::kBool;
        } else if (!TakeWord("null")) {
          ParseNumber(&value);
        }
    }
    return value;
  }

  void ParseObject(Json* value, int depth) {
    value->kind_ = Json::Kind::kObject;
    Expect('{');
    if (Take('}')) return;
    std::set<std::string> keys;
    do {
      if (Peek() != '"') Fail("a key was expected");
      std::string key = ParseText();
      if (!keys.insert(key).second) Fail("a key occurs twice");
      Expect(':');
      Json member = ParseValue(value->path_ + "." + key, depth + 1);
      value->object_.emplace_back(std::move(key), std::move(member));
    } while (Take(','));
    Expect('}');
  }

  void ParseList(Json* value, int depth) {
    value->kind_ = Json::Kind::kList;
    Expect('[');
    if (Take(']')) return;
    do {
      const std::string index = std::to_string(value->list_.size());
      value->list_.push_back(ParseValue(value->path_ + "[" + index + "]", depth + 1));
    } while (Take(','));
    Expect(']');
  }

  std::string ParseText() {
    ++at_;
    std::string made;
    for (;;) {
      if (at_ == text_.size()) Fail("a text does not end");
      const char c = text_[at_++];
      if (c == '"') return made;
      if (static_cast<unsigned char>(c) < ' ') Fail("a text has a control character");
      if (c != '\\') {
        made += c;
        continue;
      }
      if (at_ == text_.size()) Fail("a text does not end");
      switch (const char escaped = text_[at_++]) {
        case '"':
        case '\\':
        case '/':
          made += escaped;
          break;
        case 'b':
          made += '\b';
          break;
        case 'f':
          made += '\f';
          break;
        case 'n':
          made += '\n';
          break;
        case 'r':
          made += '\r';
          break;
        case 't':
          made += '\t';
          break;
        case 'u':
          AppendCodePoint(ParseEscape(), &made);
          break;
        default:
          Fail("a text has an unknown escape");
      }
    }
  }

  uint32_t ParseHex() {
    uint32_t code = 0;
    for (int i = 0; i < 4; ++i) {
      const char c = at_ < text_.size() ? text_[at_++] : '\0';
      const int digit = c >= '0' && c <= '9'   ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : -1;
      if (digit < 0) Fail("a text has a damaged escape");
      code = code << 4 | static_cast<uint32_t>(digit);
    }
    return code;
  }

  uint32_t ParseEscape() {
    const uint32_t high = ParseHex();
    if (high < 0xD800 || high > 0xDFFF) return high;
    if (high > 0xDBFF || !TakeWord("\\u")) Fail("half of a surrogate pair is missing");
    const uint32_t low = ParseHex();
    if (low < 0xDC00 || low > 0xDFFF) Fail("half of a surrogate pair is missing");
    return 0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00);
  }

  static void AppendCodePoint(uint32_t code, std::string* to) {
    const auto append = [to](uint32_t byte) { *to += static_cast<char>(byte); };
    if (code < 0x80) {
      append(code);
    } else if (code < 0x800) {
      append(0xC0 | code >> 6);
      append(0x80 | (code & 0x3F));
    } else if (code < 0x10000) {
      append(0xE0 | code >> 12);
      append(0x80 | (code >> 6 & 0x3F));
      append(0x80 | (code & 0x3F));
    } else {
      append(0xF0 | code >> 18);
      append(0x80 | (code >> 12 & 0x3F));
      append(0x80 | (code >> 6 & 0x3F));
      append(0x80 | (code & 0x3F));
    }
  }

  bool IsDigit() const { return at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; }

  void TakeDigits() {
    if (!IsDigit()) Fail("a value was expected");
    while (IsDigit()) ++at_;
  }

  void ParseNumber(Json* value) {
    const size_t begin = at_;
    bool whole = true;
    if (text_[at_] == '-') ++at_;
    if (IsDigit() && text_[at_] == '0') {
      ++at_;
    } else {
      TakeDigits();
    }
    if (at_ < text_.size() && text_[at_] == '.') {
      whole = false;
      ++at_;
      TakeDigits();
    }
    if (at_ < text_.size() && (text_[at_] == 'e' || text_[at_] == 'E')) {
      whole = false;
      ++at_;
      if (at_ < text_.size() && (text_[at_] == '+' || text_[at_] == '-')) ++at_;
      TakeDigits();
    }
    const std::string digits(text_.substr(begin, at_ - begin));
    errno = 0;
    value->real_ = std::strtod(digits.c_str(), nullptr);
    value->kind_ = Json::Kind::kReal;
    if (!whole) return;
    errno = 0;
    value->integer_ = std::strtoll(digits.c_str(), nullptr, 10);
    if (errno != 0) Fail("a number takes more than 64 bits");
    value->kind_ = Json::Kind::kInteger;
  }
};

Json Json::Parse(std::string_view text, const std::string& what) {
  return JsonParser(text, what).ParseAll();
}

void Json::Refuse(const std::string& expected) const {
  throw Error(MXF_CORRUPT, Shown(path_) + " should be " + expected +
                               "; compile the model again, or copy the artifact again.");
}

bool Json::Bool() const {
  if (kind_ != Kind::kBool) Refuse("true or false");
  return bool_;
}

int64_t Json::Integer() const {
  if (kind_ != Kind::kInteger) Refuse("a whole number");
  return integer_;
}

uint64_t Json::Size() const {
  if (kind_ != Kind::kInteger || integer_ < 0) Refuse("a whole number from 0 on");
  return static_cast<uint64_t>(integer_);
}

double Json::Real() const {
  if (kind_ != Kind::kInteger && kind_ != Kind::kReal) Refuse("a number");
  return real_;
}

const std::string& Json::Text() const {
  if (kind_ != Kind::kText) Refuse("a text");
  return text_;
}

const std::vector<Json>& Json::List() const {
  if (kind_ != Kind::kList) Refuse("a list");
  return list_;
}

const std::vector<Json::Member>& Json::Object() const {
  if (kind_ != Kind::kObject) Refuse("an object");
  return object_;
}

const Json* Json::Find(std::string_view key) const {
  for (const Member& member : Object()) {
    if (member.first == key) return &member.second;
  }
  return nullptr;
}

const Json& Json::operator[](const char* key) const {
  const Json* found = Find(key);
  if (found == nullptr) Refuse(std::string("an object with \"") + key + "\"");
  return *found;
}

std::string Quoted(std::string_view text) {
  static const char digits[] = "0123456789abcdef";
  std::string quoted = "\"";
  for (const char each : text) {
    const auto code = static_cast<unsigned char>(each);
    if (each == '"' || each == '\\') quoted += '\\';
    if (code >= 0x20) {
      quoted += each;
    } else {
      quoted += std::string("\\u00") + digits[code >> 4] + digits[code & 15];
    }
  }
  return quoted + '"';
}

}  // namespace core
}  // namespace mxforge
