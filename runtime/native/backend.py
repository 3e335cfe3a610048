"""How pip builds mxforge: setuptools, and libmxforge by the C++ compiler that is here.

A wheel for another system: MXFORGE_SYSTEM=windows-x86_64 pip wheel . (the systems: build.SYSTEMS;
zig compiles).
"""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ZIG = "ziglang>=0.13"
SYSTEM = os.environ.get("MXFORGE_SYSTEM")  # another one that the wheel is for


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_compiler()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *_compiler()]


def _compiler() -> list[str]:
    """A compiler's package, where this machine has none, or not one for the wheel's system."""
    native = _native()
    try:
        if SYSTEM is None:
            native.find_compiler()
            return []
    except native.BuildError:
        pass
    return [ZIG]


@cache
def _native() -> ModuleType:
    """build.py beside this file; by its path, as `build` is the name of another package."""
    spec = importlib.util.spec_from_file_location(
        "mxforge_native_build", Path(__file__).with_name("build.py")
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for themselves
    spec.loader.exec_module(module)
    return module


class BuildPy(build_py):
    """Copies the packages, with libmxforge; an editable installation has it in the checkout."""

    def run(self) -> None:
        super().run()
        native = _native()
        native.build(native.CORE, self._output(), system=SYSTEM)

    def _output(self) -> Path:
        core = _native().CORE
        built = Path(self.build_lib, "mxforge", "native", core.output_on(SYSTEM).name)
        return core.output if self.editable_mode else built

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs: list[str] = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, str(self._output())]


class BdistWheel(bdist_wheel):
    """The wheel is of one platform, as libmxforge in it is, though of no Python version."""

    def finalize_options(self) -> None:
        # Which puts the package where Python looks for files of one platform.
        self.distribution.has_ext_modules = lambda: True
        super().finalize_options()

    def get_tag(self) -> tuple[str, str, str]:
        platform = _native().SYSTEMS[SYSTEM].platform if SYSTEM is not None else self.plat_name
        return "py3", "none", platform.replace("-", "_").replace(".", "_")
