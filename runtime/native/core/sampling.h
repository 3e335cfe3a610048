/*!
 * \file sampling.h
 * \brief The arguments of the library's function `sample`, from what each row asks for.
 */
#ifndef MXFORGE_CORE_SAMPLING_H_
#define MXFORGE_CORE_SAMPLING_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "mxforge.h"

namespace mxforge {
namespace core {

/*! \brief Which tokens occurred in a sequence, and how often in what it answered. */
using Occurrences = std::map<int32_t, int32_t>;

/*! \brief One row of logits to draw from. */
struct SampleRow {
  const mxf_sampling* sampling;
  const Occurrences* occurrences;  // where `IsPenalized`
  int32_t step;                    // tokens answered before
};

bool IsPenalized(const mxf_sampling& sampling);

/*! \brief Error (MXF_INVALID) where a number is out of range, or a token outside the vocabulary. */
void CheckSampling(const mxf_sampling& sampling, int64_t vocab_size);

/*! \brief An argument: 32-bit elements, in its shape. */
struct HostArgument {
  std::vector<int64_t> shape;
  std::vector<uint32_t> words;
};

/*! \brief By name, all but the logits; at least one row. */
std::map<std::string, HostArgument> SampleArguments(const std::vector<SampleRow>& rows,
                                                    int64_t vocab_size);

}  // namespace core
}  // namespace mxforge

#endif  // MXFORGE_CORE_SAMPLING_H_
