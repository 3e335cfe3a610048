/*!
 * \file device.h
 * \brief Apple's GPUs as a kind of device that runs launch plans.
 */
#ifndef MXFORGE_METAL_DEVICE_H_
#define MXFORGE_METAL_DEVICE_H_

#include "../core/device.h"

namespace mxforge {
namespace metal {

/*! \brief Its library of kernels is their text, as `ReadSources` takes it. */
extern const core::DeviceKind kMetalKind;

}  // namespace metal
}  // namespace mxforge

#endif  // MXFORGE_METAL_DEVICE_H_
