"""What a device's failures are called: from the texts of TVM's device APIs to error classes."""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass

from .errors import DeviceLostError, DeviceMemoryError, MxforgeError

# CUDA's errors after which a process gets nothing but the same error again.
_STICKY = (
    "Assert", "Contained", "ContextIsDestroyed", "DevicesUnavailable", "ECCUncorrectable",
    "ExternalDevice", "HardwareStackError", "IllegalAddress", "IllegalInstruction",
    "InvalidAddressSpace", "InvalidPc", "LaunchFailure", "LaunchTimeout", "MisalignedAddress",
    "MpsClientTerminated", "NvlinkUncorrectable", "TensorMemoryLeak", "Unknown",
)  # fmt: skip
# What they are called by the driver's interface, where that is not the same in capitals.
_BY_DRIVER = {
    "DevicesUnavailable": "DEVICE_UNAVAILABLE",
    "ECCUncorrectable": "ECC_UNCORRECTABLE",
    "LaunchFailure": "LAUNCH_FAILED",
}


def _driver_name(name: str) -> str:
    return _BY_DRIVER.get(name) or re.sub(r"(?<!^)(?=[A-Z])", "_", name).upper()


@dataclass(frozen=True)
class _Texts:
    """Patterns of a device API's messages, and what is to be done about a loss."""

    lost: re.Pattern[str]
    memory: re.Pattern[str]
    after_loss: str


_TEXTS = {
    "vulkan": _Texts(
        re.compile(r"was lost (in|earlier)|takes no more work"),
        re.compile(r"is out of memory|cannot allocate|maxMemoryAllocationCount"),
        "Ask again: the next request loads the model anew.",
    ),
    "cuda": _Texts(
        re.compile(
            rf"\b(cudaError({'|'.join(_STICKY)})"
            rf"|CUDA_ERROR_({'|'.join(map(_driver_name, _STICKY))}))\b"
        ),
        re.compile(r"\b(cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY)\b"),
        "CUDA lets this process use the device no more; start it again.",
    ),
}


def named(error: BaseException, target: str) -> BaseException:
    """The error to tell a user who runs a library for `target`, such as cuda:sm_90a.

    DeviceLostError and DeviceMemoryError for what a device API reports, with what it said as their
    cause; other errors as they are.

    Calls that the error has left let go of their variables: tensors are among them, and who keeps
    the error, as a caller may, would keep a device's memory.
    """
    _release(error)
    texts = _TEXTS.get(target.partition(":")[0])
    if texts is None or isinstance(error, MxforgeError):
        return error
    text = str(error)
    made: MxforgeError
    if texts.lost.search(text):
        made = DeviceLostError(f"{_reason(text)} {texts.after_loss}")
    elif texts.memory.search(text):
        made = DeviceMemoryError(_reason(text))
    else:
        return error
    made.__cause__ = error
    return made


def _release(error: BaseException | None) -> None:
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _reason(text: str) -> str:
    """The line of an error's text that says what happened, as a sentence."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = next((line for line in lines if re.search(r"[Ee]rror|lost|memory", line)), lines[-1])
    return said if said.endswith((".", "!")) else said + "."
