#include "utf8.h"

#include <cstddef>
#include <cstdint>

namespace mxforge {
namespace core {
namespace {

/*! \brief Leads that begin a character with so many more bytes, and its least code point: less
 * would be overlong. */
struct Length {
  unsigned char first, last;
  size_t more;
  uint32_t least;
};
constexpr Length kLengths[] = {
    {0x00, 0x7F, 0, 0}, {0xC2, 0xDF, 1, 0x80}, {0xE0, 0xEF, 2, 0x800}, {0xF0, 0xF4, 3, 0x10000}};

/*! \brief The bytes of the first character; 0 where it is none. */
size_t FirstCharacter(std::string_view text) {
  const auto lead = static_cast<unsigned char>(text.front());
  for (const Length& length : kLengths) {
    if (lead < length.first || lead > length.last) continue;
    if (length.more == 0) return 1;
    if (length.more >= text.size()) return 0;
    uint32_t code = lead & (0x3Fu >> length.more);
    for (size_t i = 1; i <= length.more; ++i) {
      const auto byte = static_cast<unsigned char>(text[i]);
      if ((byte & 0xC0) != 0x80) return 0;
      code = code << 6 | (byte & 0x3Fu);
    }
    const bool surrogate = code >= 0xD800 && code <= 0xDFFF;
    return code < length.least || code > 0x10FFFF || surrogate ? 0 : length.more + 1;
  }
  return 0;
}

}  // namespace

bool IsUtf8(std::string_view text) {
  while (!text.empty()) {
    const size_t taken = FirstCharacter(text);
    if (taken == 0) return false;
    text.remove_prefix(taken);
  }
  return true;
}

}  // namespace core
}  // namespace mxforge
