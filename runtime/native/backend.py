"""How pip builds mxforge: setuptools, and the Vulkan library where this machine can compile it.

Where it cannot, mxforge is installed without, and says what is missing when Vulkan is asked for.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parents[2]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_headers()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *_headers()]


def _headers() -> list[str]:
    """The wheels whose headers the library needs, if it can be compiled at all."""
    native = _native()
    try:
        native.vulkan_headers(native.find_compiler())
    except native.BuildError:
        return []
    return re.findall(r'"(apache-tvm(?:-ffi)?==[^"]+)"', (ROOT / "pyproject.toml").read_text())


def _native() -> ModuleType:
    """build.py beside this file; by its path, as `build` is the name of another package."""
    spec = importlib.util.spec_from_file_location(
        "mxforge_native_build", Path(__file__).with_name("build.py")
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildPy(build_py):
    """Copies the packages, with the library; an editable installation has it in the checkout."""

    def run(self) -> None:
        super().run()
        native = _native()
        library = native.OUTPUT if self.editable_mode else self._library()
        try:
            native.build(library)
        except native.BuildError as error:
            self.warn(f"mxforge is built without Vulkan: {error}")
            print(f"mxforge is built without Vulkan: {error}", file=sys.stderr)

    def _library(self) -> Path:
        return Path(self.build_lib, "mxforge", "native", _native().OUTPUT.name)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs: list[str] = super().get_outputs(include_bytecode)
        if not self.editable_mode and self._library().exists():
            outputs.append(str(self._library()))
        return outputs


class BdistWheel(bdist_wheel):
    """With the library in it, the wheel is of one platform, though of no Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        built = Path(self.get_finalized_command("build").build_lib)
        if any(built.rglob("libmxforge_*")):
            platform = self.plat_name.replace("-", "_").replace(".", "_")
        return python, abi, platform
