"""The checkout's own Python environment, `.venv`: made on first use, left alone afterwards.

The scripts beside this file need nothing but Python and its standard library; what they run lives
in the environment. A stamp inside it says what was installed and from which pyproject.toml, so
that a second run starts at once and an interrupted one is finished by the next.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "mxforge-setup.json"

PYTHONS = ((3, 11), (3, 14))  # oldest and newest that the dependencies have wheels for
OLDEST_PIP = (25, 1)  # the first that installs dependency groups


def say(text: str) -> None:
    """Tell what is being done, on stderr: stdout belongs to the result."""
    print(f"== {text}", file=sys.stderr, flush=True)


def run(*command: str | Path) -> int:
    """Run a command from the checkout's root; returns its exit code."""
    return subprocess.run([str(part) for part in command], cwd=ROOT).returncode


def environment(*groups: str) -> Path:
    """The environment's Python, with mxforge[compile] (editable) and these dependency groups.

    Installs what is missing. Groups installed earlier are kept, so that all of them agree.
    """
    with _alone():
        wanted = set(groups)
        stamp = _read_stamp()
        if stamp.get("key") == _key() and wanted <= set(stamp.get("groups", ())):
            return PYTHON
        if stamp.get("key") is not None:
            wanted |= set(stamp["groups"])
        if not _usable():
            _create()
        _install(sorted(wanted))
        STAMP.write_text(json.dumps({"key": _key(), "groups": sorted(wanted)}) + "\n")
    return PYTHON


def continue_in_venv(error: ModuleNotFoundError, group: str | None = None) -> NoReturn:
    """Run this script again with .venv's Python, because the one that runs it lacks a module.

    Ends the process where .venv lacks it too, or does not exist: then mxforge[compile], or this
    dependency group, has to be installed first.
    """
    if PYTHON.exists() and Path(sys.prefix) != VENV:
        os.execv(PYTHON, [str(PYTHON), *sys.argv])
    missing = f"the dependency group {group}" if group else "mxforge[compile]"
    hint = "" if group else " (scripts/demo does)"
    sys.exit(f"{Path(sys.argv[0]).name}: {error}; install {missing} first{hint}.")


@contextlib.contextmanager
def _alone():
    """One setup at a time: a second script waits for the first."""
    folder = os.open(ROOT, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another script that sets up .venv")
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _key() -> str:
    """Changes when what is installed would: another pyproject.toml, other C++ sources, or a moved
    checkout."""
    native = ROOT / "runtime" / "native"
    files = [
        ROOT / "pyproject.toml",
        *sorted(native.glob("*.py")),
        *sorted(native.rglob("*.[ch]*")),
    ]
    text = b"".join(path.read_bytes() for path in files) + str(ROOT).encode()
    return hashlib.sha256(text).hexdigest()


def _read_stamp() -> dict:
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}
    return stamp if _version_of(PYTHON) else {}


def _usable() -> bool:
    """Whether .venv holds a working Python of a supported version, with pip."""
    return _supported(_version_of(PYTHON)) and _pip_version() is not None


def _create() -> None:
    base = _base_python()
    version = ".".join(map(str, _version_of(base) or ()))
    say(f"creating .venv with Python {version} ({base})")
    if _quietly(base, "-m", "venv", "--clear", VENV) is None:
        return
    # Some systems split `ensurepip` off from Python; then the system's own pip can fill in.
    problem = _quietly(base, "-m", "venv", "--clear", "--without-pip", VENV) or _quietly(
        base, "-m", "pip", "--python", PYTHON, "install", "pip"
    )
    if problem:
        sys.exit(
            f"{problem}\n{base} can make no environment with pip in it; install its venv module "
            "(on Debian and Ubuntu the package python3-venv) and try again."
        )


def _install(groups: list[str]) -> None:
    pip = (PYTHON, "-m", "pip", "install", "--disable-pip-version-check")
    if (_pip_version() or (0,)) < OLDEST_PIP:
        _must(*pip, "--upgrade", "pip>=" + ".".join(map(str, OLDEST_PIP)))
    what = " and ".join(["mxforge[compile]", *(f"the group {group}" for group in groups)])
    say(f"installing {what} into .venv (the first time takes minutes)")
    options = [option for group in groups for option in ("--group", group)]
    _must(*pip, "--editable", f"{ROOT}[compile]", *options)


def _must(*command: str | Path) -> None:
    """Run a command; where it fails, show what it said and end."""
    if problem := _quietly(*command):
        sys.exit(problem)


def _quietly(*command: str | Path) -> str | None:
    """Run a command without its chatter; what it said, where it fails."""
    words = [str(part) for part in command]
    result = subprocess.run(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if result.returncode == 0:
        return None
    return f"{result.stdout}\n{shlex.join(words)}\nfailed with exit code {result.returncode}"


def _base_python() -> str:
    """A Python to build the environment on: the one that runs this, or a supported one on PATH."""
    minors = range(PYTHONS[1][1], PYTHONS[0][1] - 1, -1)
    found = [sys.executable, *(shutil.which(f"python3.{minor}") or "" for minor in minors)]
    for candidate in found:
        if candidate and _supported(_version_of(candidate)):
            return candidate
    oldest, newest = (".".join(map(str, version)) for version in PYTHONS)
    here = ".".join(map(str, sys.version_info[:3]))
    sys.exit(f"mxforge needs Python {oldest} to {newest}, and this is {here}; install one of them.")


def _supported(version: tuple[int, ...] | None) -> bool:
    return version is not None and PYTHONS[0] <= version[:2] <= PYTHONS[1]


def _version_of(python: str | Path) -> tuple[int, ...] | None:
    """Its version; None where it does not run."""
    return _numbers(python, "-c", "import sys; print(*sys.version_info[:3], sep='.')")


def _pip_version() -> tuple[int, ...] | None:
    return _numbers(PYTHON, "-c", "import pip; print(pip.__version__)")


def _numbers(*command: str | Path) -> tuple[int, ...] | None:
    """A printed version as numbers; None where the command fails."""
    try:
        result = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return tuple(int(part) for part in result.stdout.split(".") if part.strip().isdigit())
