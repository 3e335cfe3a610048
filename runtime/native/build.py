"""Compile libmxforge_vulkan, the device API that TVM's wheels lack, with whatever C++ is there.

    python -m mxforge.native.build [OUTPUT]

Needed: g++, clang++ or `pip install ziglang`, and the Vulkan headers. The library is not linked
against anything of Vulkan or TVM: it opens libvulkan at run time and finds TVM's functions in the
process.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = HERE / "vulkan"
SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
OUTPUT = HERE / f"libmxforge_vulkan{SUFFIX}"

_FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
_JOBS = 2  # each compiler takes half a gigabyte
_HEADERS_HINT = (
    "Debian and Ubuntu: apt-get install libvulkan-dev; Fedora: dnf install vulkan-headers; "
    "macOS: brew install vulkan-headers; elsewhere set VULKAN_SDK to an unpacked Vulkan SDK."
)


class BuildError(Exception):
    """The library cannot be built here; says what to install or what the compiler said."""


def build(output: Path = OUTPUT, *, compiler: Sequence[str] | None = None) -> Path:
    """Compile the library to `output`; the compiler may be given as a command."""
    command = list(compiler) if compiler else find_compiler()
    includes = [f"-isystem{folder}" for folder in [*_package_headers(), *vulkan_headers(command)]]
    defines = [f'-DMXFORGE_VULKAN_BUILD_ID="{build_id()}"']
    output = Path(output).absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mxforge-vulkan-") as scratch:

        def compiled(job: int) -> str:
            # Several sources as one: parsing TVM's headers takes longer than compiling them all.
            source = Path(scratch) / f"part{job}.cc"
            parts = sources()[job::_JOBS]
            source.write_text("".join(f'#include "{part.as_posix()}"\n' for part in parts))
            target = source.with_suffix(".o")
            _run([*command, *_FLAGS, *defines, *includes, "-c", str(source), "-o", str(target)])
            return str(target)

        with ThreadPoolExecutor(min(_JOBS, os.cpu_count() or 1)) as pool:
            objects = list(pool.map(compiled, range(_JOBS)))
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        linked = Path(scratch) / output.name
        _run([*command, "-shared", "-fPIC", *undefined, *objects, "-o", str(linked), "-ldl",
              "-pthread"])  # fmt: skip
        # Moved into place, so that a process which has the old one mapped keeps it whole.
        beside = output.with_name(f".{output.name}.{os.getpid()}")
        shutil.copyfile(linked, beside)
        beside.chmod(0o755)
        beside.replace(output)
    return output


def sources() -> list[Path]:
    """The C++ files; those names that they keep to themselves are unique among all of them."""
    return sorted(SOURCES.glob("*.cc"))


def build_id() -> str:
    """A hash of all C++ that the library is made of, which it keeps; "" where that is not there."""
    digest = hashlib.sha256()
    files = sorted([*SOURCES.glob("*.cc"), *SOURCES.glob("*.h")])
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16] if files else ""


def up_to_date(output: Path = OUTPUT) -> bool:
    """Whether the library is there and newer than all that it is made of."""
    made_of = [*SOURCES.glob("*.cc"), *SOURCES.glob("*.h"), Path(__file__)]
    return output.is_file() and output.stat().st_mtime >= max(p.stat().st_mtime for p in made_of)


def find_compiler() -> list[str]:
    """The command of a C++ compiler: $CXX, g++, clang++, c++, or the package ziglang's, wherever
    the packages of this Python are installed."""
    if chosen := os.environ.get("CXX", "").split():
        return chosen
    for name in ("g++", "clang++", "c++"):
        if found := shutil.which(name):
            return [found]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "c++"]
    # pip hides from its builds what is installed beside it, but does not take it away.
    for folder in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        zig = Path(folder, "ziglang", "zig.exe" if sys.platform == "win32" else "zig")
        if zig.is_file():
            return [str(zig), "c++"]
    raise BuildError(
        "The Vulkan library needs a C++17 compiler, but there is neither g++ nor clang++; install "
        "one (Debian and Ubuntu: apt-get install g++; anywhere: pip install ziglang)."
    )


def _package_headers() -> list[Path]:
    """Where the wheels of TVM keep their headers."""
    folders = []
    for package, wheel in (("tvm", "apache-tvm"), ("tvm_ffi", "apache-tvm-ffi")):
        found = importlib.util.find_spec(package)
        folder = Path(found.origin).parent / "include" if found and found.origin else None
        if folder is None or not folder.is_dir():
            raise BuildError(f"The Vulkan library needs the headers of {wheel}, which is missing.")
        folders.append(folder)
    return folders


def vulkan_headers(command: Sequence[str]) -> list[Path]:
    """Folders to add so that vulkan/vulkan_core.h is found; none where the compiler finds it."""

    def offered(*folders: Path) -> list[Path]:
        # Never the system's own: before the others, they hide the C++ library's from itself.
        own = (Path("/usr/include"), Path("/usr/local/include"))
        usable = [each for each in folders if each.resolve() not in own]
        return [each for each in usable if (each / "vulkan" / "vulkan_core.h").is_file()][:1]

    sdk = os.environ.get("VULKAN_SDK")
    if sdk and (chosen := offered(Path(sdk) / "include", Path(sdk) / "Include")):
        return chosen
    probe = subprocess.run(
        [*command, "-E", "-x", "c++", "-"],
        input="#include <vulkan/vulkan_core.h>\n",
        capture_output=True,
        text=True,
    )
    if probe.returncode == 0:
        return []
    if found := offered(Path("/opt/homebrew/include")):
        return found
    raise BuildError(f"The Vulkan library needs the Vulkan headers, which are missing. "
                     f"{_HEADERS_HINT}")  # fmt: skip


def _run(command: Sequence[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"The compiler {command[0]} cannot be run: {error}.") from error
    if result.returncode != 0:
        said = (result.stderr or result.stdout).strip()[-4000:]
        raise BuildError(f"The compiler failed ({' '.join(command[:1])}):\n{said}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mxforge.native.build", description=__doc__)
    parser.add_argument("output", nargs="?", type=Path, default=OUTPUT)
    try:
        print(build(parser.parse_args().output))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
