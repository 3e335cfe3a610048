"""TIR to SPIR-V for Vulkan 1.2: the code generator that TVM's wheels lack.

    generate   a module of lowered device functions -> the bytes of a module of kernels
    build      the same, as a runtime module: TVM's target.build.vulkan
    register   make `build` known to TVM

The rooms, from the bottom: `encoding` has SPIR-V's numbers, `assembler` its binary form, `dtypes`
and `builder` typed values and blocks; `convert`, `arithmetic`, `rounding`, `exponential`,
`trigonometry` and `functions` are what operators and math functions mean; `memory` and
`alignment` are buffers; `calls`, `subgroups`, `atomics`, `matrices`, `expressions` and `statements`
walk TIR;
`arguments` and `kernel` make a module of a function, `container` puts modules together.
"""

from __future__ import annotations

from .build import build, generate, register
from .container import KernelCode, pack, unpack

__all__ = ["KernelCode", "build", "generate", "pack", "register", "unpack"]
