/*!
 * \file sources.h
 * \brief The text of a library's kernels, which Metal compiles where it runs.
 */
#ifndef MXFORGE_METAL_SOURCES_H_
#define MXFORGE_METAL_SOURCES_H_

#include <map>
#include <string>
#include <string_view>

namespace mxforge {
namespace metal {

/*!
 * \brief The text of each kernel, by its name.
 *
 * A line `// Function: NAME` begins one, and its text is a program of its own: several of them
 * define the same names. Error (MXF_CORRUPT) where the text is no such sequence.
 */
std::map<std::string, std::string_view> ReadSources(std::string_view text);

}  // namespace metal
}  // namespace mxforge

#endif  // MXFORGE_METAL_SOURCES_H_
