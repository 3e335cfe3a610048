"""Every error that mxforge raises on purpose, each a class of its own under one base.

A message says what was expected, what was found and what to do, in one or two sentences.

    MxforgeError                    base; the commands print it and exit with `exit_code` (1)
    ├── UsageError                  a command was called wrongly (exits with 2)
    │   └── ChatError                   a conversation or a tool is not of OpenAI's form
    ├── ConfigError                 config.json lacks a number, or holds one that cannot be built
    ├── CheckpointError             a checkpoint is missing, unreadable, truncated or contradictory
    │   ├── UnknownArchitectureError    no model family claims config.json
    │   ├── TensorMissingError          a tensor that the architecture needs is not there
    │   ├── TensorShapeError            a tensor has another shape than the config implies
    │   ├── TensorDtypeError            a tensor has another dtype than the format prescribes
    │   └── NaNScaleError               an MXFP4 scale byte is 255
    ├── SafetensorsError            one .safetensors file is malformed
    ├── TokenizerError              a tokenizer is unreadable, or text came without one
    ├── CompilerMissingError        the compiler's packages, mxforge[compile], are not installed
    ├── TargetError                 the target is unknown, or a tool it needs is absent
    ├── FormatError                 a number format is unknown, or its name is taken
    ├── VulkanCodegenError          a kernel cannot be written in SPIR-V for Vulkan
    ├── ScheduleTableError          a kernel's table of schedules contradicts itself
    ├── SignatureError              a kernel is used with other arguments than it has
    ├── UnscheduledError            no schedule of a kernel fits the target
    ├── OutputError                 the output exists already, the disk is full or unwritable
    ├── ArtifactError               an artifact cannot be used
    │   ├── ArtifactVersionError        it was written in another format or for another ABI
    │   ├── ArtifactCorruptError        a file is missing, changed or unreadable
    │   └── ArtifactTargetError         it was compiled for another CPU, GPU or system
    ├── VulkanError                 Vulkan, its library here or a device of it cannot be used
    ├── DeviceLostError             a device takes no more work: a kernel or the driver failed
    ├── DeviceMemoryError           a device had less memory left than was counted on
    ├── KVMemoryError               the cache does not fit beside the rest, or is used up
    ├── ContextLengthError          a prompt is longer than the context
    ├── TokenRangeError             a token id lies outside the vocabulary
    ├── SamplingError               a sampling parameter is absurd
    │   └── MaskError                   a function that gives bitmasks failed, or gave none
    ├── QueueFullError              as many requests wait as the engine lets
    ├── CancelledError              the request was cancelled between two steps
    └── NumericsError               `mxforge diff` found a tensor outside its bound
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class MxforgeError(Exception):
    """Base of all errors below; `exit_code` is what a command exits with after printing it."""

    exit_code: int = 1


class UsageError(MxforgeError):
    """A command or function was called with wrong or contradicting arguments."""

    exit_code = 2


class ChatError(UsageError):
    """A message, a tool or a choice of a conversation is not of the form that OpenAI's API has."""


class ConfigError(MxforgeError):
    """The model's config lacks a number or holds one that this architecture cannot have."""


class CheckpointError(MxforgeError):
    """A checkpoint is missing, unreadable, truncated or contradicts itself."""


class UnknownArchitectureError(CheckpointError):
    """The config.json is of no model family that can be compiled."""


class TensorMissingError(CheckpointError):
    """The checkpoint lacks a tensor that its config calls for."""


class TensorShapeError(CheckpointError):
    """A tensor's shape is not the one that the config implies."""


class TensorDtypeError(CheckpointError):
    """A tensor's dtype is not the one that the format prescribes."""


class NaNScaleError(CheckpointError):
    """An MXFP4 scale byte is 255, which means NaN."""


class SafetensorsError(MxforgeError):
    """A .safetensors file is malformed; the reader above wraps it in what the file was part of."""


class TokenizerError(MxforgeError):
    """A tokenizer is unreadable, or text was given where only token ids can be taken."""


class CompilerMissingError(MxforgeError):
    """Something needs the compiler, whose packages come with mxforge[compile]."""


class TargetError(MxforgeError):
    """The target is unknown, or something that compiling for it needs (nvcc) is absent."""


class FormatError(MxforgeError):
    """No number format has this name, or two have."""


class VulkanCodegenError(MxforgeError):
    """A kernel for Vulkan holds a construct that the SPIR-V generator refuses, which it names."""


class ScheduleTableError(MxforgeError):
    """A kernel's table of schedules contradicts itself: a name twice, a layout without a packer."""


class SignatureError(MxforgeError):
    """A kernel is called, or its code written, with other arguments than its signature has."""


class UnscheduledError(MxforgeError):
    """No schedule of a kernel fits, or a function without one would reach code generation."""


class OutputError(MxforgeError):
    """The output cannot be written: it exists already, or the disk is full or read-only."""


class ArtifactError(MxforgeError):
    """An artifact cannot be used."""


class ArtifactVersionError(ArtifactError):
    """The artifact's format or ABI is another version than this runtime understands."""


class ArtifactCorruptError(ArtifactError):
    """A file of the artifact is missing, unreadable, or not the one that was written."""


class ArtifactTargetError(ArtifactError):
    """The artifact was compiled for a CPU, GPU or operating system that this machine is not."""


class VulkanError(MxforgeError):
    """Vulkan is not installed, not built here, or has no device that can be used."""


class DeviceLostError(MxforgeError):
    """A device failed while it was used, and what is on it is lost; the process goes on."""


class DeviceMemoryError(MxforgeError):
    """A device had no memory left for a tensor, though the plan fitted; it can still be used."""


class KVMemoryError(MxforgeError):
    """The KV pool does not fit into memory beside the rest, or all of its pages are in use."""


class ContextLengthError(MxforgeError):
    """A prompt is longer than the context that the engine was loaded with."""


class TokenRangeError(MxforgeError):
    """A token id lies outside the vocabulary."""


class SamplingError(MxforgeError):
    """A sampling parameter is outside its range."""


class MaskError(SamplingError):
    """A request's function of bitmasks failed, or returned what is not one."""


class QueueFullError(MxforgeError):
    """So many requests wait for an engine already that it takes no more; ask again later."""


class CancelledError(MxforgeError):
    """The request was cancelled between two steps."""


class NumericsError(MxforgeError):
    """A tensor differs from the reference by more than its bound."""


@contextlib.contextmanager
def needs_compiler(what: str) -> Iterator[None]:
    """Around imports of the compiler's modules: CompilerMissingError where one is not there."""
    try:
        yield
    except ImportError as error:
        raise CompilerMissingError(
            f"{what} needs the compiler's packages, which are not all installed ({error}); "
            'install them with: pip install "mxforge[compile]"'
        ) from error
