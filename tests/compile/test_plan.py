"""Launch plans say what the virtual machine does: every function of a model, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from support.calls import CALLS, arguments
from support.machine import executable
from tvm import relax

from mxforge.compile import kernels, pipeline, targets
from mxforge.compile.checkpoint import open_checkpoint
from mxforge.compile.models.emit import Limits
from mxforge.compile.models.gpt_oss import GPT_OSS
from mxforge.compile.plan import plan_of
from mxforge.compile.plan_values import NotStraightError
from mxforge.compile.targets import CPU_LEVELS, CompileTarget
from mxforge.compile.weights import packed_weights
from mxforge.core import CoreLibrary
from mxforge.errors import UsageError
from mxforge.machine import architecture, missing_cpu_features
from mxforge.plan import Role

LEVELS = [
    level.name
    for level in CPU_LEVELS
    if level.machine == architecture() and not missing_cpu_features(level.required)
]
# The best of this machine on two shapes and on nano, the others on one.
CASES = [
    *((LEVELS[0], name, numerics) for name, numerics in (("odd-1", "exact"), ("odd-4", "fast"))),
    pytest.param(LEVELS[0], "nano", "fast", marks=pytest.mark.slow),
    *(pytest.param(level, "odd-1", "fast", marks=pytest.mark.slow) for level in LEVELS[1:]),
]


def lowered(checkpoint: Path, target: CompileTarget, numerics: Any) -> tvm.IRModule:
    opened = open_checkpoint(checkpoint)
    precision = target.precision(numerics, opened.config)
    weights = packed_weights(GPT_OSS.weights(opened.config), target.kernels, precision)
    return GPT_OSS.module(opened.config, target.kernels, precision, Limits(4, 64), weights)


@pytest.mark.parametrize(("level", "name", "numerics"), CASES)
def test_plan_and_virtual_machine_give_the_same_bits(
    level: str,
    name: str,
    numerics: str,
    odd_checkpoint: Callable[[str], Path],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    checkpoint = request.getfixturevalue("nano") if name == "nano" else odd_checkpoint(name)
    target = targets.resolve(f"cpu:{level}")
    model = lowered(checkpoint, target, numerics)
    module = pipeline.lower(model, target)
    (tmp_path / "model.plan").write_bytes(plan_of(module).to_bytes())
    kernels.write_library(kernels.of_cpu(module, target), tmp_path / "model.so", target.host)
    core = CoreLibrary(target.name, tmp_path / "model.plan", tmp_path / "model.so", threads=2)
    machine = relax.VirtualMachine(executable(module, target), tvm.cpu())
    vocabulary = open_checkpoint(checkpoint).config.vocab_size
    assert {name for name, _ in CALLS} == {function.name for function in core.plan.functions}
    for called, sizes in CALLS:
        function = core[called]
        given = arguments(function, sizes, vocabulary)
        theirs = [tvm.runtime.tensor(array) for array in given]
        result = machine[called](*theirs)
        results = [result] if isinstance(result, tvm.runtime.Tensor) else list(result)
        ours = core.call(called, given)
        assert len(ours) == len(function.outputs)
        for mine, their in zip(ours, results, strict=True):
            assert np.isfinite(mine.astype(np.float64)).all(), called
            assert mine.tobytes() == their.numpy().tobytes(), (called, sizes)
        for tensor, mine, their in zip(function.arguments, given, theirs, strict=True):
            if tensor.role is Role.KV:  # updated in place
                assert mine.tobytes() == their.numpy().tobytes(), (called, tensor.name)
    core.close()


def test_arguments_are_checked(
    compiled: Callable[..., Path],
) -> None:
    folder = compiled("odd-1")
    core = CoreLibrary("cpu", folder / "model.plan", folder / "model.so", threads=1)
    tokens, table = arguments(core["embed"], {"n": 3}, 1003)
    for wrong, message in (
        ([tokens.astype(np.int64), table], "tokens of embed should be contiguous int32"),
        ([tokens[:, None], table], "another number of dimensions"),
        ([tokens, table[:-1]], "of embed has another shape"),
    ):
        with pytest.raises(UsageError, match=message):
            core.call("embed", wrong)
    (found,) = core.call("embed", [tokens, table])
    np.testing.assert_array_equal(found, table[tokens].astype(np.float32))
    core.close()


def test_what_is_not_straight_is_refused() -> None:
    """A call of anything but a kernel, as before `CallTIRRewrite`."""
    builder, x = relax.BlockBuilder(), relax.Var("x", relax.TensorType((2,), "float32"))
    with builder.function("main", [x], attrs={"mxforge.arguments": ["input x"]}, private=False):
        builder.emit_func_output(builder.emit(relax.op.add(x, x)))
    with pytest.raises(NotStraightError, match="no words for"):
        plan_of(builder.finalize())
