"""What Metal allows a kernel, counted in the text that TVM writes.

Apple's compiler sees this text only where it runs, when the artifact is loaded: what is too much
is said here, while somebody can do something about it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mxforge.errors import TargetError

# Of the GPUs of A14, M1 and later, in phones as in Macs: Apple's Metal feature set tables.
MOST_BUFFERS = 31
MOST_THREADGROUP_BYTES = 32 << 10

_KERNEL = re.compile(r"^kernel void (\w+)\(", re.MULTILINE)
_BUFFER = re.compile(r"\[\[ buffer\((\d+)\) \]\]")
_ARRAY = re.compile(r"^\s*threadgroup (\w+?)(\d?) \w+\[(\d+)\];", re.MULTILINE)
_BYTES = {"char": 1, "uchar": 1, "bool": 1, "short": 2, "ushort": 2, "half": 2}  # others: 4


@dataclass(frozen=True)
class Use:
    """What a kernel takes: places for arguments, of which scalars together have one, and a block's
    memory."""

    buffers: int
    threadgroup_bytes: int


def uses(source: str) -> dict[str, Use]:
    """Of each kernel of the text."""
    _, *parts = _KERNEL.split(source)
    return {
        name: Use(
            max(map(int, _BUFFER.findall(text)), default=-1) + 1,
            sum(
                _BYTES.get(dtype, 4) * int(lanes or 1) * int(count)
                for dtype, lanes, count in _ARRAY.findall(text)
            ),
        )
        for name, text in zip(parts[::2], parts[1::2], strict=True)
    }


def check(source: str) -> None:
    """TargetError where a kernel of the text needs more than Metal has."""
    for name, use in uses(source).items():
        for what, has, most in (
            ("buffers", use.buffers, MOST_BUFFERS),
            ("bytes of threadgroup memory", use.threadgroup_bytes, MOST_THREADGROUP_BYTES),
        ):
            if has > most:
                raise TargetError(
                    f"The kernel {name} needs {has:,} {what}, and Metal has {most:,}; compile the "
                    "model for another target, such as a CPU."
                )
