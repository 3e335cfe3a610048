"""The module format: SPIR-V of several kernels behind a JSON header (module_format.h describes it).

    8 bytes   magic "MXFSPIRV"
    u32       version
    u32       length of the JSON text
    JSON      UTF-8, padded with blanks so that what follows is 4-aligned
    SPIR-V    modules one after another, each 4-aligned

All numbers are little-endian. Equal kernels give equal bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAGIC = b"MXFSPIRV"
VERSION = 3
_HEADER = struct.Struct("<8sII")


@dataclass(frozen=True)
class KernelCode:
    """One kernel: its SPIR-V and what the runtime has to know to launch it.

    reflection: the kernel's JSON object without `code`.
    """

    name: str
    spirv: bytes
    reflection: dict[str, Any]


def pack(kernels: Sequence[KernelCode]) -> bytes:
    """The bytes of a module."""
    entries, offset = [], 0
    for kernel in kernels:
        code = [offset, len(kernel.spirv)]
        entries.append({"name": kernel.name, "code": code, **kernel.reflection})
        offset += len(kernel.spirv)
    text = json.dumps({"kernels": entries}, separators=(",", ":")).encode()
    text += b" " * (-(_HEADER.size + len(text)) % 4)
    header = _HEADER.pack(MAGIC, VERSION, len(text))
    return header + text + b"".join(kernel.spirv for kernel in kernels)


def unpack(data: bytes) -> list[KernelCode]:
    """The kernels of a module; ValueError where the bytes are not of this format and version."""
    if len(data) < _HEADER.size:
        raise ValueError(f"a module has at least {_HEADER.size} bytes, found {len(data)}")
    magic, version, length = _HEADER.unpack_from(data)
    if magic != MAGIC or version != VERSION:
        raise ValueError(f"expected {MAGIC!r} version {VERSION}, found {magic!r} version {version}")
    start = _HEADER.size + length
    kernels = []
    for entry in json.loads(data[_HEADER.size : start])["kernels"]:
        offset, size = entry.pop("code")
        name = entry.pop("name")
        kernels.append(KernelCode(name, data[start + offset : start + offset + size], entry))
    return kernels
