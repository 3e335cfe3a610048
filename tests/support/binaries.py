"""What a shared library asks of a system and offers to it, read from the file of any system."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path

from support.folders import run


@dataclass(frozen=True)
class Binary:
    """libraries: names of those it is linked with; imports, exports: symbols in C's spelling;
    versions: those of glibc's symbols, such as (2, 17), and of macOS the oldest that loads it;
    alignment: of what is mapped, in bytes, where the format tells; signed: on macOS"""

    libraries: frozenset[str]
    imports: frozenset[str]
    exports: frozenset[str]
    versions: frozenset[tuple[int, ...]] = frozenset()
    alignment: int = 0
    signed: bool = False


def read_binary(path: Path) -> Binary:
    """SetupError where readelf or objdump, of Debian's binutils, is missing."""
    magic = path.read_bytes()[:4]
    if magic == b"\x7fELF":
        return _elf(path)
    if magic[:2] == b"MZ":
        return _pe(path)
    assert magic == b"\xcf\xfa\xed\xfe", path
    return _macho(path.read_bytes())


def _elf(path: Path) -> Binary:
    text = run("readelf", "--wide", "--dynamic", "--dyn-syms", "--program-headers", path)
    imports, exports, versions = set(), set(), set()
    for section, name, version in re.findall(
        r" (?:GLOBAL|WEAK) +\w+ +(\w+) (\w+)(?:@+GLIBC_([\d.]+))?", text
    ):
        (imports if section == "UND" else exports).add(name)
        if version:
            versions.add(tuple(map(int, version.split("."))))
    libraries = re.findall(r"\(NEEDED\).*\[(.+)\]", text)
    aligned = re.findall(r"^ +LOAD .* 0x(\w+)$", text, re.MULTILINE)
    return Binary(
        frozenset(libraries), frozenset(imports), frozenset(exports), frozenset(versions),
        min(int(each, 16) for each in aligned),
    )  # fmt: skip


def _pe(path: Path) -> Binary:
    text = run("objdump", "--private-headers", path)
    imports = re.findall(r"^\t[0-9a-f]+\t +\d+ +(\w+)$", text, re.MULTILINE)
    exports = re.findall(r"^\t\[ *\d+\] (\w+)$", text, re.MULTILINE)
    libraries = re.findall(r"DLL Name: (\S+)", text)
    return Binary(frozenset(libraries), frozenset(imports), frozenset(exports))


# Of Mach-O: load commands, and bits of a symbol's type.
_SYMBOLS, _LOAD_LIBRARY, _SIGNATURE, _BUILD_VERSION = 0x2, 0xC, 0x1D, 0x32
_DEBUG, _DEFINED, _EXTERNAL = 0xE0, 0x0E, 0x01


def _macho(data: bytes) -> Binary:
    libraries, imports, exports, versions = set(), set(), set(), set()
    signed = False
    at = 32
    for _ in range(struct.unpack_from("<I", data, 16)[0]):
        command, size = struct.unpack_from("<2I", data, at)
        if command == _LOAD_LIBRARY:
            libraries.add(data[at + 24 : at + size].partition(b"\0")[0].decode())
        elif command == _BUILD_VERSION:
            (oldest,) = struct.unpack_from("<I", data, at + 12)
            versions.add((oldest >> 16, oldest >> 8 & 0xFF))
        elif command == _SYMBOLS:
            symbols, count, strings, _size = struct.unpack_from("<4I", data, at + 8)
            for number in range(count):
                name, kind = struct.unpack_from("<IB", data, symbols + 16 * number)
                if kind & _EXTERNAL and not kind & _DEBUG:
                    text = data[strings + name : data.index(b"\0", strings + name)].decode()
                    (exports if kind & _DEFINED else imports).add(text.removeprefix("_"))
        signed = signed or command == _SIGNATURE
        at += size
    return Binary(
        frozenset(libraries), frozenset(imports), frozenset(exports), frozenset(versions), 0, signed
    )
