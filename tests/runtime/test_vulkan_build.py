"""Building the native library: what is missing is named, and a compiler's words are passed on."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from support.vulkan_device import VulkanDevice, run_apart

from mxforge.errors import VulkanError
from mxforge.native import build


def test_no_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(build.BuildError, match="apt-get install g"):
        build.find_compiler()


def test_ziglang_serves_where_there_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ziglang")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert build.find_compiler() == [sys.executable, "-m", "ziglang", "c++"]


def test_pips_builds_find_the_ziglang_that_is_installed(tmp_path: Path) -> None:
    """With PYTHONPATH and a sitecustomize.py pip hides the packages of the environment."""
    venv.create(tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
    zig = site / "ziglang" / "zig"
    zig.parent.mkdir()
    zig.touch()
    (zig.parent / "__init__.py").touch()
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    hide = f"import sys\nsys.path[:] = [p for p in sys.path if p != {str(site)!r}]\n"
    (overlay / "sitecustomize.py").write_text(hide)
    backend = build.HERE / "backend.py"
    code = (
        "import sys, types\n"
        "for name in ('setuptools', 'setuptools.build_meta', 'setuptools.command',\n"
        "             'setuptools.command.bdist_wheel', 'setuptools.command.build_py'):\n"
        "    sys.modules[name] = types.ModuleType(name)\n"
        "sys.modules['setuptools'].build_meta = sys.modules['setuptools.build_meta']\n"
        "sys.modules['setuptools.command.bdist_wheel'].bdist_wheel = object\n"
        "sys.modules['setuptools.command.build_py'].build_py = object\n"
        f"sys.path.insert(0, {str(backend.parent)!r})\n"
        "import backend\n"
        "print(*backend._native().find_compiler())\n"
    )
    outside = {name: value for name, value in os.environ.items() if name != "CXX"}
    result = subprocess.run(
        [str(python), "-c", code], capture_output=True, text=True,
        env={**outside, "PATH": str(tmp_path), "PYTHONPATH": str(overlay)},
    )  # fmt: skip
    assert result.stdout == f"{zig} c++\n", result.stderr


def test_the_environment_chooses_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "ccache my-c++")
    assert build.find_compiler() == ["ccache", "my-c++"]


def test_missing_headers_name_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VULKAN_SDK", str(tmp_path))
    with pytest.raises(build.BuildError, match="libvulkan-dev"):
        build.build(build.VULKAN, tmp_path / "lib.so", compiler=["false"])


def test_the_headers_of_an_sdk_come_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    header = tmp_path / "include" / "vulkan" / "vulkan_core.h"
    header.parent.mkdir(parents=True)
    header.touch()
    monkeypatch.setenv("VULKAN_SDK", str(tmp_path))
    assert build.vulkan_headers(["true"]) == [tmp_path / "include"]


@pytest.mark.parametrize("sdk", ["/usr", "/usr/local", "/nowhere"])
def test_the_compilers_own_headers_are_not_added(monkeypatch: pytest.MonkeyPatch, sdk: str) -> None:
    """-isystem/usr/include breaks g++'s own headers."""
    monkeypatch.setenv("VULKAN_SDK", sdk)
    assert build.vulkan_headers(["true"]) == []


def test_a_library_of_other_sources_is_refused(vulkan: VulkanDevice) -> None:
    assert vulkan.hook("build_id")() == build.VULKAN.build_id() != ""
    code = (
        "from mxforge.compile import tvm_vulkan as vulkan\nfrom mxforge.errors import VulkanError\n"
        "from mxforge.native import build\n"
        "vulkan._BUILT = vulkan.library_path()\nvulkan.load()\nvulkan.load.cache_clear()\n"
        "build.Library.build_id = lambda self: 'another'\n"
        "for _ in range(2):\n"
        "    try:\n        vulkan.load()\n    except VulkanError as e:\n        print(e)\n"
        "build.Library.build_id = lambda self: ''\nvulkan.load()\nprint('without sources')"
    )
    lines = run_apart(code).stdout.splitlines()
    assert len(lines) == 3
    for line in lines[:2]:
        assert "other sources" in line
        assert "run: python -m mxforge.native.build" in line
    assert lines[2] == "without sources"


def test_what_the_compiler_says_is_passed_on(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-E*) exit 0;; esac\necho broken >&2; exit 1\n')
    compiler.chmod(0o755)
    with pytest.raises(build.BuildError, match="broken"):
        build.build(build.VULKAN, tmp_path / "lib.so", compiler=[str(compiler)])
    assert not (tmp_path / "lib.so").exists()


def test_the_tracker_needs_no_vulkan(tmp_path: Path) -> None:
    """hazards.cc compiles alone: no header but the standard library's."""
    try:
        compiler = build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    source = build.HERE / "vulkan" / "hazards.cc"
    assert "vulkan/" not in source.read_text()
    result = subprocess.run(
        [*compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", str(source)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    (tmp_path / "lib.so").write_text("not a library")
    code = (
        "from mxforge.compile import tvm_vulkan as vulkan\nfrom mxforge.errors import VulkanError\n"
        "try:\n    vulkan.load()\nexcept VulkanError as e:\n    print(e)"
    )
    result = run_apart(code, MXFORGE_VULKAN_LIBRARY=str(tmp_path / "lib.so"))
    assert "should load but does not" in result.stdout, result.stderr


def test_a_path_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mxforge.compile import tvm_vulkan as vulkan

    monkeypatch.setenv("MXFORGE_VULKAN_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(VulkanError, match=r"python -m mxforge\.native\.build"):
        vulkan.library_path()
