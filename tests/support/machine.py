"""TVM's virtual machine, which runs in another way what a launch plan says."""

from __future__ import annotations

import tvm
from tvm import relax

from mxforge.compile.targets import CompileTarget


def executable(module: tvm.IRModule, target: CompileTarget) -> relax.VMExecutable:
    """Code for the machine, from a module that `pipeline.lower` has lowered."""
    with tvm.target.Target(target.tvm):
        for step in (
            relax.transform.LowerAllocTensor(),
            relax.transform.KillAfterLastUse(),
            relax.transform.LowerRuntimeBuiltin(),
            relax.transform.ComputePrimValue(),
            relax.transform.VMShapeLower(),
            relax.transform.AttachGlobalSymbol(),
        ):
            module = step(module)
    whole = tvm.target.Target(target.tvm)
    if target.host is None:  # what calls a GPU's kernels is code here
        whole = whole.with_host(tvm.target.Target("llvm"))
    return relax.build(module, whole, relax_pipeline=None, tir_pipeline="default")
