"""From object files to a library of kernels, for this machine's system or another.

Kernels need nothing of the system that loads them: what they call comes through slots or from
`native/core/shim.c`, which is linked into each library. Equal objects give equal bytes.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mxforge.native
from mxforge.errors import TargetError
from mxforge.machine import host_system

SHIM = Path(mxforge.native.__file__).parent / "core" / "shim.c"

_COMPILERS = ("cc", "gcc", "clang")
# Without -fno-builtin, the loop in the shim's memset would become a call of memset. Kernels let it
# clear and copy small arrays of theirs.
_SHIM_FLAGS = ("-O3", "-fno-builtin", "-fvisibility=hidden")

# Of Apple's object files: how they begin, the load command of the symbols, and a symbol's flag.
_MACHO, _MACHO_SYMBOLS, _MACHO_WEAK = b"\xcf\xfa\xed\xfe", 0x2, 0x80


@dataclass(frozen=True)
class Host:
    """A system and CPU architecture that libraries are linked for."""

    triple: str  # LLVM's name, of the objects
    zig: str  # the linker's
    suffix: str  # of a library's name
    flags: tuple[str, ...]


# A symbol that is missing is an error now, as it is on the other systems.
_ELF = ("-shared", "-fPIC", "-nostdlib", "-s", "-Wl,--build-id=none,-z,defs")
# Every library of macOS is linked with its libSystem; zig does so even with -nostdlib, which keeps
# it from making its own support library at the first use, for 10 s.
_MACOS = ("-dynamiclib", "-Wl,-S", "-Wl,-install_name,@rpath/kernels.dylib")
_WINDOWS = ("-shared", "-nostdlib", "-s")

# By the system's name, as `host_system` tells it.
HOSTS = {
    "linux-x86_64": Host("x86_64-unknown-linux-gnu", "x86_64-linux-gnu.2.28", ".so", _ELF),
    "linux-aarch64": Host("aarch64-unknown-linux-gnu", "aarch64-linux-gnu.2.28", ".so", _ELF),
    # Android 15 has pages of 16 KB on some devices.
    "android-aarch64": Host(
        "aarch64-linux-android21", "aarch64-linux-android", ".so",
        (*_ELF, "-Wl,-z,max-page-size=16384"),
    ),
    "darwin-aarch64": Host("arm64-apple-macos11.0", "aarch64-macos.11.0", ".dylib", _MACOS),
    "darwin-x86_64": Host("x86_64-apple-macos11.0", "x86_64-macos.11.0", ".dylib", _MACOS),
    "windows-x86_64": Host(
        "x86_64-w64-windows-gnu", "x86_64-windows-gnu", ".dll", _WINDOWS
    ),
}  # fmt: skip


def known_host(name: str) -> Host:
    """The host of this name; TargetError where nothing can be linked for it."""
    if name not in HOSTS:
        raise TargetError(f"Unknown system {name!r}; the known ones are {', '.join(HOSTS)}.")
    return HOSTS[name]


def link(objects: Sequence[Path], host: str, output: Path) -> None:
    """Link `objects`, compiled for `host`, and the shim into the library `output`.

    What the linker needs meanwhile lies beside it, where a killed compilation is cleaned up.
    TargetError where nothing here can link.
    """
    known = known_host(host)
    with tempfile.TemporaryDirectory(prefix="link-", dir=output.parent) as scratch:
        # Folders have random names; names without folders keep them out of the library.
        inputs = {f"{number}.o": path for number, path in enumerate(objects)} | {SHIM.name: SHIM}
        for name, path in inputs.items():
            data = path.read_bytes()
            Path(scratch, name).write_bytes(_strong(data) if data[:4] == _MACHO else data)
        made = Path(scratch, f"kernels{known.suffix}")
        run([*compiler(host, "-nostdlib"), *_SHIM_FLAGS, *known.flags, "-o", made.name, *inputs],
            scratch)  # fmt: skip
        made.replace(output)


def _strong(data: bytes) -> bytes:
    """A Mach-O object without weak definitions.

    TVM defines the conversions of half precision weakly, and zig would take those of macOS
    instead, whose arguments may lie elsewhere.
    """
    strong = bytearray(data)
    at = 32
    for _ in range(struct.unpack_from("<I", data, 16)[0]):
        command, size = struct.unpack_from("<2I", data, at)
        if command == _MACHO_SYMBOLS:
            first, count = struct.unpack_from("<2I", data, at + 8)
            for symbol in range(first, first + 16 * count, 16):
                (flags,) = struct.unpack_from("<H", data, symbol + 6)
                struct.pack_into("<H", strong, symbol + 6, flags & ~_MACHO_WEAK)
        at += size
    return bytes(strong)


def compiler(host: str, *of_zig: str) -> list[str]:
    """The command of a C compiler that links for `host`; TargetError where there is none.

    This machine's own for its system; for others, or where there is none, the one inside the
    `ziglang` wheel, with the options `of_zig`.
    """
    here = host == host_system()
    for name in _COMPILERS if here else ():
        if found := shutil.which(name):
            return [found]
    if importlib.util.find_spec("ziglang"):
        zig = [sys.executable, "-m", "ziglang", "cc", *of_zig]
        return zig if here else [*zig, "-target", known_host(host).zig]
    needed = "a C compiler (cc, gcc or clang) or the" if here else "the"
    raise TargetError(
        f"Linking for {host} needs {needed} package ziglang, and it is not here; install it, for "
        "example with: pip install ziglang"
    )


def run(command: Sequence[str], folder: str | Path) -> None:
    """Run a compiler in `folder`, its temporary files included; TargetError where it fails."""
    environment = {**os.environ, "TMPDIR": str(Path(folder).resolve())}
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        raise TargetError(
            f"Linking the library with {command[0]} failed: {result.stderr.strip()[-400:]}"
        )
