/*!
 * \file machine.h
 * \brief This machine, in the words of manifests: its system, and what its CPU has.
 */
#ifndef MXFORGE_CORE_MACHINE_H_
#define MXFORGE_CORE_MACHINE_H_

#include <cstdint>
#include <string>

namespace mxforge {
namespace core {

/*! \brief Such as linux-x86_64. */
std::string HostSystem();

/*! \brief Whether CPU and system have instructions, in LLVM's spelling; not where nobody knows. */
bool HasCpuFeature(const std::string& name);

/*!
 * \brief Bytes of memory that this process may still take; all there could be where nobody tells.
 *
 * On Linux what is free or only caches files, within the limits of the process's control group.
 */
uint64_t AvailableMemory();

}  // namespace core
}  // namespace mxforge

#endif  // MXFORGE_CORE_MACHINE_H_
