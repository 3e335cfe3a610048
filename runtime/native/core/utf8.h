/*!
 * \file utf8.h
 * \brief Whether bytes are text.
 */
#ifndef MXFORGE_CORE_UTF8_H_
#define MXFORGE_CORE_UTF8_H_

#include <string_view>

namespace mxforge {
namespace core {

/*! \brief Whether it is UTF-8 as Unicode has it: nothing overlong, and no surrogates. */
bool IsUtf8(std::string_view text);

}  // namespace core
}  // namespace mxforge

#endif  // MXFORGE_CORE_UTF8_H_
