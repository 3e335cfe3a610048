"""Compile the native libraries with whatever C++ is there:

libmxforge          runs compiled models; it needs nothing but the system
libmxforge_vulkan   makes Vulkan a device of TVM's, for who runs kernels from there

`python -m mxforge.native.build` compiles the first into the package, and with --tvm the other one.
Needed is g++, clang++ or `pip install ziglang`, which compiles libmxforge for all of SYSTEMS.
Neither is linked against anything of Vulkan, NVIDIA or TVM: drivers are opened at run time, and
TVM's functions are found in the process.
"""

from __future__ import annotations

import argparse
import atexit
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent

_FLAGS = ["-std=c++17", "-O2", "-fvisibility=hidden", "-Wall", "-Wextra"]
_OF_SUFFIX = {".mm": ["-fobjc-arc"]}
_JOBS = 2  # each compiler takes half a gigabyte

# Zig's C++ library is inside the libraries linked with it, and nobody else should see it.
_EXPORTS = "{ global: mxf_*; local: *; };\n"


@dataclass(frozen=True)
class Kind:
    """A family of systems: how its libraries' names end, and what compiling and linking them takes;
    `alone` where zig links them, for others to run."""

    suffix: str
    compiling: tuple[str, ...]
    linking: tuple[str, ...]
    alone: tuple[str, ...]


_LINUX = Kind(".so", ("-fPIC",), ("-ldl", "-pthread"), ("-s", "-Wl,--version-script=exports.map"))
_MACOS = Kind(".dylib", ("-fPIC",), (), ("-Wl,-S", "-Wl,-install_name,@rpath/libmxforge.dylib"))
_WINDOWS = Kind(".dll", (), (), ("-s",))
_HERE = {"darwin": _MACOS, "win32": _WINDOWS}.get(sys.platform, _LINUX)
SUFFIX = _HERE.suffix


@dataclass(frozen=True)
class System:
    """A system that libmxforge is compiled for anywhere: zig's target, and a wheel's tag."""

    kind: Kind
    zig: str
    platform: str


# By the names that `mxforge.machine.host_system` gives them.
SYSTEMS = {
    "linux-x86_64": System(_LINUX, "x86_64-linux-gnu.2.28", "manylinux_2_28_x86_64"),
    "linux-aarch64": System(_LINUX, "aarch64-linux-gnu.2.28", "manylinux_2_28_aarch64"),
    "darwin-aarch64": System(_MACOS, "aarch64-macos.11.0", "macosx_11_0_arm64"),
    "darwin-x86_64": System(_MACOS, "x86_64-macos.11.0", "macosx_11_0_x86_64"),
    "windows-x86_64": System(_WINDOWS, "x86_64-windows-gnu", "win_amd64"),
}


@dataclass(frozen=True)
class Part:
    """Some of a library's C++: `folders` of it, and single `files`.

    only        on systems of this kind; None: on all
    linking     what linking it takes besides
    headers     folders of others' headers, for a compiler's command; BuildError without them
    macro       defined for all of the library where these are found; without them the part is left
                out. None: the library cannot do without
    together    parsing those takes longer than all else: sources are compiled as few; names that
                they keep to themselves are unique among all of them
    """

    folders: tuple[str, ...]
    files: tuple[str, ...] = ()
    headers: Callable[[Sequence[str]], list[Path]] = lambda _command: []
    macro: str | None = None
    together: bool = False
    only: Kind | None = None
    linking: tuple[str, ...] = ()

    def matching(self, *patterns: str) -> list[Path]:
        """Its files, by patterns of their names."""
        found = {
            p for folder in self.folders for each in patterns for p in (HERE / folder).glob(each)
        }
        own = (HERE / name for name in self.files)
        return sorted(found | {path for path in own if any(map(path.match, patterns))})

    def units(self) -> list[list[Path]]:
        """The C++ files, those together that are compiled as one."""
        sources = self.matching("*.cc", "*.mm")
        if self.together:
            return [sources[job::_JOBS] for job in range(_JOBS)]
        return [[source] for source in sources]


@dataclass(frozen=True)
class Library:
    """A native library, which belongs into the package, at `output`."""

    output: Path
    parts: tuple[Part, ...]
    tvm: bool = False  # whether it finds functions of TVM in the process

    def output_on(self, system: str | None) -> Path:
        """The same on another system, of SYSTEMS."""
        kind = SYSTEMS[system].kind if system else _HERE
        return self.output.with_suffix(kind.suffix)

    def files(self) -> list[Path]:
        """All that it is made of."""
        return sorted(path for part in self.parts for path in part.matching("*.cc", "*.mm", "*.h"))

    def build_id(self) -> str:
        """A hash of all C++ that the library is made of, which it keeps; "" where that is not
        there."""
        digest = hashlib.sha256()
        files = self.files()
        for file in files:
            digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
        return digest.hexdigest()[:16] if files else ""

    def up_to_date(self, output: Path | None = None) -> bool:
        """Whether it is in the package, or at `output`, and newer than all that it is made of."""
        built = output or self.output
        newest = max(path.stat().st_mtime for path in [*self.files(), Path(__file__)])
        return built.is_file() and built.stat().st_mtime >= newest


CORE = Library(
    HERE / f"libmxforge{SUFFIX}",
    (
        Part(("core", "cuda")),
        Part(
            ("vulkan", "vulkan/plans"),
            headers=lambda command: vulkan_headers(command),  # which is told below
            macro="MXFORGE_VULKAN",
            together=True,
        ),
        Part(
            ("metal",),
            headers=lambda command: metal_headers(command),
            macro="MXFORGE_METAL",
            only=_MACOS,
            linking=("-framework", "Foundation", "-framework", "Metal"),
        ),
    ),
)
VULKAN = Library(
    HERE / f"libmxforge_vulkan{SUFFIX}",
    (
        Part(
            ("vulkan", "vulkan/tvm"),
            (
                "core/error.h",
                "core/json.cc",
                "core/json.h",
                "core/mxforge.h",
                "core/utf8.cc",
                "core/utf8.h",
            ),
            headers=lambda command: [*_package_headers(), *vulkan_headers(command)],
            together=True,
        ),
    ),
    tvm=True,
)

_HEADERS_HINT = (
    "Debian and Ubuntu: apt-get install libvulkan-dev; Fedora: dnf install vulkan-headers; "
    "macOS: brew install vulkan-headers; elsewhere set VULKAN_SDK to an unpacked Vulkan SDK."
)


class BuildError(Exception):
    """The library cannot be built here; says what to install or what the compiler said."""


def build(
    library: Library,
    output: Path | None = None,
    *,
    compiler: Sequence[str] | None = None,
    system: str | None = None,
) -> Path:
    """Compile a library, into the package or to `output`; the compiler may be given as a
    command. For a `system` of SYSTEMS zig compiles it: equal bytes for equal sources."""
    if system is not None and system not in SYSTEMS:
        raise BuildError(f"{system} is none of the systems {', '.join(SYSTEMS)}.")
    kind = SYSTEMS[system].kind if system else _HERE
    command = list(compiler or (find_zig() if system else find_compiler()))
    command += ["-target", SYSTEMS[system].zig] if system else []
    flags, units = [f'-DMXFORGE_BUILD_ID="{library.build_id()}"', *kind.compiling], []
    parts = [part for part in library.parts if part.only in (None, kind)]
    linking = [*kind.linking]
    for part in parts:
        try:
            flags += [f"-isystem{folder}" for folder in part.headers(command)]
        except BuildError as error:
            if part.macro is None:
                raise
            print(f"{library.output.name} is built without {part.macro}: {error}", file=sys.stderr)
            continue
        units += part.units()
        flags += [f"-D{part.macro}"] if part.macro is not None else []
        linking += part.linking
    output = Path(output or library.output_on(system)).absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mxforge-native-") as scratch:

        def compiled(number: int, unit: list[Path]) -> str:
            source = Path(scratch) / f"unit{number}{unit[0].suffix}"
            own = _OF_SUFFIX.get(source.suffix, [])
            source.write_text("".join(f'#include "{each.as_posix()}"\n' for each in unit))
            target = source.with_suffix(".o")
            _run([*command, *_FLAGS, *own, *flags, "-c", str(source), "-o", str(target)])
            return str(target)

        with ThreadPoolExecutor(min(_JOBS, os.cpu_count() or 1)) as pool:
            objects = list(pool.map(compiled, *zip(*enumerate(units), strict=True)))
        undefined = ["-undefined", "dynamic_lookup"] if library.tvm and kind is _MACOS else []
        Path(scratch, "exports.map").write_text(_EXPORTS)
        linked = Path(scratch) / output.name  # which Windows' libraries keep, and Linux' programs
        alone = kind.alone if system else ()
        _run([*command, "-shared", *kind.compiling, *alone, *undefined, *objects, "-o",
              linked.name, *linking], scratch)  # fmt: skip
        # Moved into place, so that a process which has the old one mapped keeps it whole.
        beside = output.with_name(f".{output.name}.{os.getpid()}")
        shutil.copyfile(linked, beside)
        beside.chmod(0o755)
        beside.replace(output)
    return output


def find_compiler() -> list[str]:
    """The command of a C++ compiler: $CXX, g++, clang++, c++, or the package ziglang's, wherever
    the packages of this Python are installed."""
    if chosen := os.environ.get("CXX", "").split():
        return chosen
    for name in ("g++", "clang++", "c++"):
        if found := shutil.which(name):
            return [found]
    return find_zig()


def find_zig() -> list[str]:
    """The command of the C++ compiler in the package ziglang."""
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "c++"]
    # pip hides from its builds what is installed beside it, but does not take it away.
    for folder in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        zig = Path(folder, "ziglang", "zig.exe" if sys.platform == "win32" else "zig")
        if zig.is_file():
            return [str(zig), "c++"]
    raise BuildError(
        "mxforge's native libraries need a C++17 compiler, but there is neither g++, clang++ nor "
        "zig; install one (Debian and Ubuntu: apt-get install g++; anywhere, and for other "
        "systems: pip install ziglang)."
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
    if "-target" in command and (found := _own_vulkan_headers()):
        return found
    raise BuildError(f"The Vulkan library needs the Vulkan headers, which are missing. "
                     f"{_HEADERS_HINT}")  # fmt: skip


def metal_headers(command: Sequence[str]) -> list[Path]:
    """None to add: a Mac's compiler finds its own."""
    probe = subprocess.run(
        [*command, "-E", "-x", "objective-c++", "-"],
        input="#import <Metal/Metal.h>\n",
        capture_output=True,
        text=True,
    )
    if probe.returncode == 0:
        return []
    raise BuildError(
        "Metal needs Apple's headers, which are missing; on a Mac: xcode-select --install."
    )


@cache
def _own_vulkan_headers() -> list[Path]:
    """A folder with the system's, for compilers that should see nothing else of it."""
    folders = ("vulkan", "vk_video")
    if not all(Path("/usr/include", name).is_dir() for name in folders):
        return []
    scratch = Path(tempfile.mkdtemp(prefix="mxforge-headers-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    for name in folders:
        shutil.copytree(Path("/usr/include", name), scratch / name)
    return [scratch]


def _run(command: Sequence[str], folder: str | None = None) -> None:
    """In `folder`, or where this process is; BuildError where it fails."""
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"The compiler {command[0]} cannot be run: {error}.") from error
    if result.returncode != 0:
        said = (result.stderr or result.stdout).strip()[-4000:]
        raise BuildError(f"The compiler failed ({' '.join(command[:1])}):\n{said}")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mxforge.native.build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--tvm", action="store_true", help="libmxforge_vulkan too; it needs the headers of TVM"
    )
    options = parser.parse_args()
    try:
        for library in (CORE, VULKAN) if options.tvm else (CORE,):
            print(build(library))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
