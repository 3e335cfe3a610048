#!/usr/bin/env python3
"""The Mesa of a newer Debian, in a folder: compilers for GPUs that are not here, and its lavapipe.

    python tests/support/mesa.py run ARGUMENTS...   Python with these, where vulkan:0 is that
                                                    lavapipe, and spirv-val the newer one
    python tests/support/mesa.py pin                take what the suite has now, as
                                                    scripts/gpu_statistics --pin does

Nothing is installed, and root is not needed. PACKAGES lists the files to fetch with their hashes,
from the mirror that this machine's apt uses, and they are unpacked into build/mesa. Their glibc is
newer than this machine's, so what loads them runs under the dynamic loader that came along: it
finds the folder's libraries first, and this machine's for all else.

A mirror keeps a package until the next version comes. Then `open_mesa` raises Gone, which never
fails a test: tests on this machine's own Mesa go on, the others are left out with a message, and
newer packages are pinned when somebody has the time to look at what they change.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.folders import SetupError, made, run

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "mesa"
PYTHON = ROOT / "build" / "mesa-python"
PACKAGES = Path(__file__).with_name("mesa-packages.txt")

# For `pin`: the suites that apt chooses from, the last one first, and what is asked for.
SUITES = ("trixie", "trixie-backports")
WANTED = ("libvulkan1", "mesa-drm-shim", "mesa-vulkan-drivers", "spirv-tools")
ARCHITECTURE = "x86_64"  # of the machine; PACKAGES lists Debian's amd64
LIBRARIES = Path("usr", "lib", "x86_64-linux-gnu")
# What is run or opened; packages that none of these loads are left out.
OPENED = (
    "usr/bin/spirv-dis",
    "usr/bin/spirv-val",
    *(f"{LIBRARIES}/lib{name}.so" for name in (
        "vulkan_asahi", "vulkan_freedreno", "vulkan_lvp", "vulkan_nouveau", "vulkan_radeon",
        "amdgpu_noop_drm_shim", "asahi_noop_drm_shim", "freedreno_noop_drm_shim",
        "nouveau_noop_drm_shim",
    )),
    f"{LIBRARIES}/libvulkan.so.1",
)  # fmt: skip
TOOLS = ("spirv-dis", "spirv-val")
APT_HELPER = Path("/usr/lib/apt/apt-helper")


class Gone(SetupError):
    """The mirror no longer has what PACKAGES lists."""


@dataclass(frozen=True)
class Package:
    """A file of Debian's archive."""

    sha256: str
    path: str  # below the mirror's address

    @property
    def name(self) -> str:
        return Path(self.path).name.partition("_")[0]

    @property
    def version(self) -> str:
        return Path(self.path).name.split("_")[1]


def packages(text: str | None = None) -> tuple[Package, ...]:
    """PACKAGES, or a text like it: lines of a hash and a path. ValueError, naming the line."""
    found = []
    for line in (PACKAGES.read_text() if text is None else text).splitlines():
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"([0-9a-f]{64})  (pool/\S+_(?:amd64|all)\.deb)", line)
        if match is None:
            raise ValueError(f"expected a SHA-256, two spaces and pool/….deb, found {line!r}")
        found.append(Package(*match.groups()))
    return tuple(found)


def version() -> str:
    """The pinned Mesa's, such as 26.1.6-1~bpo13+1."""
    (drivers,) = (package for package in packages() if package.name == "mesa-vulkan-drivers")
    return drivers.version


@dataclass(frozen=True)
class Mesa:
    """The unpacked packages."""

    folder: Path

    def command(
        self, program: str | Path, *arguments: str | Path, preload: str | None = None
    ) -> list[str]:
        """What to start for `program` to run on this folder's libraries; `preload` is the name of
        one of them."""
        libraries = self.folder / LIBRARIES
        words = [*_loader(self.folder)]
        if preload is not None:
            words += ["--preload", libraries / preload]
        return list(map(str, [*words, program, *arguments]))

    def environment(self, driver: str) -> dict[str, str]:
        """This process's, with `driver` ("lvp", "radeon" …) as the only one of Vulkan."""
        manifest = self.folder / "usr" / "share" / "vulkan" / "icd.d" / f"{driver}_icd.json"
        environment = {**os.environ, "VK_DRIVER_FILES": str(manifest)}
        for name in ("VK_ICD_FILENAMES", "VK_ADD_DRIVER_FILES", "LD_LIBRARY_PATH", "LD_PRELOAD"):
            environment.pop(name, None)
        return environment


def open_mesa() -> Mesa:
    """The folder, made where it is missing. SetupError where it cannot be, Gone where packages
    are no longer to be had."""
    if platform.system() != "Linux" or platform.machine() != ARCHITECTURE:
        here = f"{platform.system()} {platform.machine()}"
        raise SetupError(f"its packages are for Linux {ARCHITECTURE}, and this is {here}")
    return Mesa(made(FOLDER, PACKAGES.read_text(), lambda new: _unpack(packages(), new)))


def python(mesa: Mesa) -> Path:
    """A Python with this one's packages that runs on `mesa`'s libraries, and its children too."""
    here, home = Path(sys.executable), Path(sys.base_prefix) / "bin"

    def make(new: Path) -> None:
        (new / "bin").mkdir()
        (new / "pyvenv.cfg").write_text(f"home = {home}\ninclude-system-site-packages = false\n")
        (new / "lib").symlink_to(Path(sys.prefix) / "lib")
        # That name, from which Python finds its packages, is the folder's when it is complete.
        name = PYTHON / "bin" / "python"
        _script(new / "bin" / "python", [*_loader(mesa.folder, "--argv0", name), here])
        for tool in TOOLS:
            _script(new / "bin" / tool, mesa.command(mesa.folder / "usr" / "bin" / tool))

    stamp = "\n".join([PACKAGES.read_text(), str(mesa.folder), str(here), sys.version])
    return made(PYTHON, stamp, make) / "bin" / "python"


def _loader(root: Path, *options: str | Path) -> list[str | Path]:
    libraries = root / LIBRARIES
    path = f"{libraries}:{libraries / 'spirv-tools'}"
    return [libraries / "ld-linux-x86-64.so.2", "--library-path", path, *options]


def _script(path: Path, command: Sequence[str | Path]) -> None:
    words = " ".join(f"'{word}'" for word in command)
    path.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


# -- packages --------------------------------------------------------------------------------------


def _unpack(wanted: Iterable[Package], root: Path) -> None:
    with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
        files = {package: Path(scratch) / Path(package.path).name for package in wanted}
        _download(files)
        for package, file in files.items():
            found = hashlib.sha256(file.read_bytes()).hexdigest()
            if found != package.sha256:
                raise SetupError(f"{package.path} should have the hash {package.sha256}: {found}")
            run("dpkg-deb", "--extract", file, root)


def _download(files: dict[Package, Path]) -> None:
    mirror = _mirror()
    if not APT_HELPER.exists():
        raise SetupError(f"{APT_HELPER} is missing, which Debian's apt has")
    words: list[str | Path] = []
    for package, file in files.items():
        words += [f"{mirror}/{package.path}", file, f"SHA256:{package.sha256}"]
    try:
        run(APT_HELPER, "-o", "APT::Sandbox::User=root", "download-file", *words)
    except SetupError as error:
        if re.search(r"\b404\b", str(error)):  # and not within a hash
            raise Gone(
                f"Debian's mirror no longer has all packages of Mesa {version()}; take what it has "
                "now, and look at what changes, with: scripts/gpu_statistics --pin"
            ) from None
        raise


def _mirror() -> str:
    """The address of Debian's archive that this machine's apt uses."""
    lines = run("apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)").splitlines()
    # Its other archives have releases such as bookworm-security.
    found = [uri for uri, release in map(str.split, lines) if re.fullmatch(r"[a-z]+", release)]
    if not found or platform.freedesktop_os_release()["ID"] != "debian":
        raise SetupError("it is made of Debian's packages, and apt knows no mirror of Debian here")
    return found[0].rstrip("/")


def pin() -> None:
    """Write PACKAGES anew: the newest of SUITES that WANTED and what they load consist of."""
    mirror = _mirror()
    with tempfile.TemporaryDirectory() as scratch:
        apt, root = Path(scratch, "apt"), Path(scratch, "root")
        resolved = _resolve(mirror, apt)
        root.mkdir()
        owners: dict[str, Package] = {}
        for package, file in resolved.items():
            run("dpkg-deb", "--extract", file, root)
            for line in run("dpkg-deb", "--contents", file).splitlines():
                owners[line.split(maxsplit=5)[5].partition(" -> ")[0].removeprefix("./")] = package
        used = {owners[name] for name in _loaded(root, OPENED)}
    kept = [package for package in resolved if package in used or package.name in WANTED]
    lines = [f"{package.sha256}  {package.path}" for package in kept]
    about = "# Written by tests/support/mesa.py pin: SHA-256 and place in Debian's archive.\n"
    PACKAGES.write_text(about + "\n".join(sorted(lines, key=lambda line: line[66:])) + "\n")
    packages()  # says where a line is wrong


def _resolve(mirror: str, apt: Path) -> dict[Package, Path]:
    """What apt would install on a machine on which nothing is installed, as downloaded files."""
    for partial in (apt / "lists" / "partial", apt / "archives" / "partial"):
        partial.mkdir(parents=True)
    (apt / "status").touch()
    key = "signed-by=/usr/share/keyrings/debian-archive-keyring.gpg"
    sources = [f"deb [{key} arch=amd64] {mirror} {suite} main\n" for suite in SUITES]
    (apt / "sources.list").write_text("".join(sources))
    settings = {
        "APT::Architecture": "amd64",
        "APT::Sandbox::User": "root",  # apt's own user may have no access to this folder
        "Debug::NoLocking": "1",
        "Dir::Cache": apt,
        "Dir::Etc::PreferencesParts": "/dev/null",
        "Dir::Etc::SourceList": apt / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State": apt,
        "Dir::State::status": apt / "status",
    }
    options = [f"--option={name}={value}" for name, value in settings.items()]
    run("apt-get", *options, "update")
    words = (*options, "install", "--yes", "--no-install-recommends", "-t", SUITES[-1], *WANTED)
    printed = run("apt-get", "--print-uris", *words)
    run("apt-get", "--download-only", *words)
    found = {}
    for uri, name in re.findall(r"^'([^']+)' (\S+\.deb) ", printed, re.MULTILINE):
        file = apt / "archives" / name
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        found[Package(digest, unquote(uri.removeprefix(f"{mirror}/")))] = file
    return found


def _loaded(root: Path, names: Iterable[str]) -> set[str]:
    """These files and every file below `root` that the loader adds to them."""
    found = {f"{LIBRARIES}/ld-linux-x86-64.so.2", *names}
    for name in names:
        for line in run(*_loader(root, "--list"), root / name).splitlines():
            if match := re.search(rf"(?:=> |^\s*){re.escape(str(root))}/(\S+)", line):
                found.add(match[1])
            elif "not found" in line:
                raise SetupError(f"{name} needs what no package brings: {line.strip()}")
    return found


def main(arguments: Sequence[str]) -> int:
    if arguments == ["pin"]:
        before = version() if PACKAGES.exists() else "none"
        pin()
        print(f"Mesa {before} -> {version()}, {len(packages())} packages in {PACKAGES}")
        return 0
    if arguments[:1] != ["run"]:
        print(__doc__)
        return 2
    try:
        mesa = open_mesa()
        executable = python(mesa)
    except SetupError as error:
        print(f"== nothing is run on a newer Mesa: {error}")
        fails = os.environ.get("MXFORGE_REQUIRE_MESA") == "1" and not isinstance(error, Gone)
        return 1 if fails else 0
    environment = mesa.environment("lvp")
    environment["PATH"] = f"{executable.parent}:{environment['PATH']}"
    environment["MXFORGE_REQUIRE_MATRICES"] = "1"  # this driver has them, its tools know them
    return subprocess.call([str(executable), *arguments[1:]], env=environment)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
