from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tvm
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from mxforge.artifact import read_manifest
from mxforge.compile import compile_model, pipeline, targets
from mxforge.compile.checkpoint import HFCheckpoint
from mxforge.compile.models.emit import ARGUMENTS, Limits
from mxforge.compile.models.gpt_oss import GPT_OSS
from mxforge.compile.plan import ALIGNMENT, plan_of
from mxforge.compile.weights import packed_weights
from mxforge.errors import OutputError, UnscheduledError
from mxforge.plan import Constant
from mxforge.schedules.kernel import scheduled
from mxforge.schedules.linear import LINEAR

Compiled = Callable[..., Path]
Checkpoints = Callable[[str], Path]

PHASE_NAMES = [
    "model", "dead-code", "destination-passing", "memory-plan", "launches",
]  # fmt: skip
FUNCTIONS = {
    "forward",
    "decode",
    "sample",
    "logprobs",
    "next_tokens",
    "kv_copy_pages_sliding",
    "kv_copy_pages_full",
    "embed",
    "layer_sliding",
    "layer_full",
    "head",
}


@pytest.fixture(scope="module")
def cpu() -> targets.CompileTarget:
    return targets.resolve("cpu")


# -- a small module through the phases -------------------------------------------------------------


@T.prim_func(s_tir=True, private=True)
def double(xp: T.handle, yp: T.handle):
    n = T.int64()
    x = T.match_buffer(xp, (n, 4), "float32")
    y = T.match_buffer(yp, (n, 4), "float32")
    for i, j in T.grid(n, 4):
        with T.sblock("item"):
            vi, vj = T.axis.remap("SS", [i, j])
            y[vi, vj] = x[vi, vj] * T.float32(2)


def four_doubles(kernel: tvm.tirx.PrimFunc) -> tvm.IRModule:
    """main(x f32 [n, 4]), n at most 8: doubled three times, and once more for nobody."""
    builder, n = relax.BlockBuilder(), tvm.tirx.Var("n", "int64")
    x = relax.Var("x", relax.TensorType((n, 4), "float32"))
    attributes = {"tir_var_upper_bound": {"n": 8}, ARGUMENTS: ["input x"]}
    function = builder.add_func(kernel, "double")
    with builder.function("main", [x], attrs=attributes, private=False):
        steps = [x]
        for _ in range(4):
            call = relax.call_tir(function, [steps[-1]], [relax.TensorType((n, 4), "float32")])
            steps.append(builder.emit(call))
        builder.emit_func_output(steps[3])
    return builder.finalize()


def after(phase: str, cpu: targets.CompileTarget) -> tvm.IRModule:
    """The small module after that phase and all before it."""
    module = four_doubles(scheduled(double, "double", "by hand"))
    with tvm.target.Target(cpu.tvm):
        for step in pipeline.PHASES[: PHASE_NAMES.index(phase) + 1]:
            for transform in step.passes(cpu):
                module = transform(module)
            relax.analysis.well_formed(module)
    return module


def without_types(module: tvm.IRModule) -> tvm.IRModule:
    """Calls without type arguments, which TVMScript's parser leaves out of allocations."""

    @relax.expr_functor.mutator
    class Plain(relax.PyExprMutator):
        def visit_call_(self, call: relax.Call) -> relax.Expr:
            call = self.visit_expr_post_order(call)
            return relax.Call(call.op, call.args, call.attrs)

    main = Plain().visit_expr(module["main"])
    return tvm.IRModule({**module.functions, module.get_global_var("main"): main})


def same_main(module: tvm.IRModule, expected: tvm.IRModule) -> None:
    tvm.ir.assert_structural_equal(module["main"], expected["main"], map_free_vars=True)


def test_the_phases():
    assert [phase.name for phase in pipeline.PHASES] == PHASE_NAMES


def test_dead_code_drops_what_nobody_reads(cpu):
    @I.ir_module
    class Expected:
        @T.prim_func(s_tir=True, private=True)
        def double(x: T.handle, y: T.handle):
            T.evaluate(0)

        @R.function
        def main(x: R.Tensor(("n", 4), "float32")) -> R.Tensor(("n", 4), "float32"):
            n = T.int64()
            R.func_attr({"tir_var_upper_bound": {"n": 8}, "mxforge.arguments": ["input x"]})
            cls = Expected
            a = R.call_tir(cls.double, (x,), out_ty=R.Tensor((n, 4), "float32"))
            b = R.call_tir(cls.double, (a,), out_ty=R.Tensor((n, 4), "float32"))
            c = R.call_tir(cls.double, (b,), out_ty=R.Tensor((n, 4), "float32"))
            return c

    same_main(after("dead-code", cpu), Expected)


def test_destination_passing_allocates_every_output(cpu):
    @I.ir_module
    class Expected:
        @T.prim_func(s_tir=True, private=True)
        def double(x: T.handle, y: T.handle):
            T.evaluate(0)

        @R.function
        def main(x: R.Tensor(("n", 4), "float32")) -> R.Tensor(("n", 4), "float32"):
            n = T.int64()
            R.func_attr(
                {
                    "relax.force_pure": True,
                    "tir_var_upper_bound": {"n": 8},
                    "mxforge.arguments": ["input x"],
                }
            )
            cls = Expected
            a = R.builtin.alloc_tensor(R.shape([n, 4]), R.dtype("float32"), 0, R.str("global"))
            cls.double(x, a)
            a1: R.Tensor((n, 4), "float32") = a
            b = R.builtin.alloc_tensor(R.shape([n, 4]), R.dtype("float32"), 0, R.str("global"))
            cls.double(a1, b)
            b1: R.Tensor((n, 4), "float32") = b
            c = R.builtin.alloc_tensor(R.shape([n, 4]), R.dtype("float32"), 0, R.str("global"))
            cls.double(b1, c)
            c1: R.Tensor((n, 4), "float32") = c
            return c1

    same_main(without_types(after("destination-passing", cpu)), Expected)


def test_memory_is_planned_for_the_upper_bound(cpu):
    plan = plan_of(after("memory-plan", cpu))
    # Two intermediate tensors of f32 [8, 4]; the output's size is known when it is called.
    planned = [storage for storage in plan["main"].storages if storage.at is not None]
    sizes = [plan["main"].values[storage.size] for storage in planned]
    assert sizes == [Constant(8 * 4 * 4)] * 2
    assert [storage.at for storage in planned] == [0, ALIGNMENT]
    assert plan.workspace == 2 * ALIGNMENT


# -- nothing unscheduled ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kernel",
    [
        double,
        double.with_attr("tirx.is_scheduled", True),  # by whom?
        double.with_attr("mxforge.kernel", "double"),
    ],
)
def test_a_function_without_a_schedule_is_named(kernel, cpu):
    with pytest.raises(UnscheduledError, match=r"but double has none; .* schedules/"):
        pipeline.lower(four_doubles(kernel), cpu)


def test_a_function_that_loses_its_schedule_on_the_way_is_named(cpu, monkeypatch):
    @tvm.transform.module_pass(opt_level=0)
    def forget(module: tvm.IRModule, _context: Any) -> tvm.IRModule:
        module = tvm.IRModule(module.functions)
        module["double"] = double
        return module

    phases = (*pipeline.PHASES[:2], pipeline.Phase("forgetful", lambda _target: [forget]))
    monkeypatch.setattr(pipeline, "PHASES", phases)
    with pytest.raises(UnscheduledError, match="double"):
        pipeline.lower(four_doubles(scheduled(double, "double", "by hand")), cpu)


def test_ill_formed_ir_ends_the_compilation(cpu, monkeypatch):
    @tvm.transform.module_pass(opt_level=0)
    def damage(module: tvm.IRModule, _context: Any) -> tvm.IRModule:
        stranger = relax.Var("stranger", relax.TensorType((2,), "float32"))
        function = relax.Function([], stranger, relax.TensorType((2,), "float32"))
        module = tvm.IRModule(module.functions)
        module["broken"] = function.with_attr("global_symbol", "broken")
        return module

    phases = (pipeline.PHASES[0], pipeline.Phase("careless", lambda _target: [damage]))
    monkeypatch.setattr(pipeline, "PHASES", phases)
    with pytest.raises(Exception, match="(?i)stranger|broken|well.formed"):
        pipeline.lower(four_doubles(scheduled(double, "double", "by hand")), cpu)


# -- the model through the phases ------------------------------------------------------------------


def model_module(checkpoint: Path, cpu: targets.CompileTarget, limits: Limits) -> tvm.IRModule:
    config = HFCheckpoint(checkpoint).config
    precision = cpu.precision("exact", config)
    weights = packed_weights(GPT_OSS.weights(config), cpu.kernels, precision)
    return GPT_OSS.module(config, cpu.kernels, precision, limits, weights)


def test_the_library_has_the_functions_of_its_abi(cpu, odd_checkpoint: Checkpoints):
    module = model_module(odd_checkpoint("odd-1"), cpu, Limits(2, 32))
    names = {
        var.name_hint
        for var, function in module.functions.items()
        if isinstance(function, relax.Function)
    }
    assert names == FUNCTIONS


def test_workspace_follows_the_limits(cpu, odd_checkpoint: Checkpoints):
    """odd-1, forward: n tokens of 3 experts each, hidden 96, 160 units; f32."""

    def workspace(chunk: int) -> int:
        module = model_module(odd_checkpoint("odd-1"), cpu, Limits(2, chunk))
        return plan_of(pipeline.lower(module, cpu)).workspace

    small, large = workspace(30), workspace(510)  # with a token of each sequence: 32 and 512
    experts, stream = 3 * 160 * 4, 96 * 4
    assert large >= 512 * (experts + 2 * stream)
    assert large <= 512 * 4 * (experts + 2 * stream)
    assert 10 * small < large <= 16 * small


def test_the_manifest_has_the_workspace(compiled: Compiled):
    assert read_manifest(compiled("odd-1")).memory.workspace_bytes > 512 * 96 * 4


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_the_kernel_table_is_complete(numerics, compiled: Compiled):
    manifest = read_manifest(compiled("odd-1", numerics))
    names = {kernel.name for kernel in manifest.kernels}
    assert {kernel.target for kernel in manifest.kernels} == {manifest.target.name}
    assert all(kernel.schedule and kernel.functions for kernel in manifest.kernels)
    functions = [name for kernel in manifest.kernels for name in kernel.functions]
    assert len(functions) == len(set(functions))
    assert LINEAR.name in names
    kinds = "embed norm rope attention router moe_plan gate_up down gather"
    for kind in (*kinds.split(), "kv_insert", "copy_pages", "adjust_logits", "sample", "logprobs"):
        assert any(kind in name for name in names), f"no kernel for {kind} among {sorted(names)}"
    # Window and no window are two kernels, as are the dense layers' shapes.
    attention = [k for k in manifest.kernels if "attention" in k.name]
    assert sum(len(kernel.functions) for kernel in attention) == 2


def test_every_function_of_the_library_is_in_the_kernel_table(cpu, odd_checkpoint: Checkpoints):
    module = pipeline.lower(model_module(odd_checkpoint("odd-1"), cpu, Limits(2, 32)), cpu)
    listed = {name for kernel in pipeline.kernel_table(module, cpu) for name in kernel.functions}
    present = {
        var.name_hint
        for var, function in module.functions.items()
        if isinstance(function, tvm.tirx.PrimFunc)
    }
    assert listed == present


def test_debug_dump_writes_every_phase_and_the_code(odd_checkpoint: Checkpoints, tmp_path: Path):
    dump = tmp_path / "a" / "dump"
    compile_model(odd_checkpoint("odd-5"), output=tmp_path / "artifact", debug_dump=dump)
    for number, name in enumerate(PHASE_NAMES):
        text = (dump / f"{number}-{name}.py").read_text()
        for function in ("forward", "layer_sliding"):
            # From Python 3.12 on TVM prints type parameters: forward[n](…).
            assert f"def {function}(" in text or f"def {function}[" in text
    assert "R.call_tir(" in (dump / "0-model.py").read_text()
    assert "R.call_tir(" not in (dump / "3-memory-plan.py").read_text()
    assert "define" in (dump / "code-llvm.txt").read_text()


def test_a_full_disk_under_the_dump_is_not_the_artifacts(
    odd_checkpoint: Checkpoints, tmp_path: Path, monkeypatch
):
    write_text = Path.write_text

    def full(path: Path, *arguments, **options):
        if path.name == "code-llvm.txt":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write_text(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match=r"--debug-dump.*llvm\.txt cannot be written \(No space"):
        compile_model(
            odd_checkpoint("odd-5"), output=tmp_path / "artifact", debug_dump=tmp_path / "dump"
        )
    assert not (tmp_path / "artifact").exists()


# -- the same bytes --------------------------------------------------------------------------------


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_two_processes_write_the_same_bytes(odd_checkpoint: Checkpoints, tmp_path: Path):
    code = "import sys, mxforge; mxforge.compile_model(sys.argv[1], output=sys.argv[2])"
    runs = []
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()  # also another folder to work in, and for temporary files
        output = tmp_path / f"artifact-{seed}"
        environment = {**os.environ, "PYTHONHASHSEED": seed, "TMPDIR": str(tmp_path / seed)}
        command = [sys.executable, "-c", code, str(odd_checkpoint("odd-1")), str(output)]
        runs.append((output, subprocess.Popen(command, cwd=tmp_path / seed, env=environment)))
    for _, process in runs:
        assert process.wait() == 0
    first, second = (hashes(output) for output, _ in runs)
    assert {"manifest.json", "model.plan", "model.so", "weights-00001.safetensors"} <= first.keys()
    assert first == second


# -- the compiler stays out of the runtime ---------------------------------------------------------


RUN = """
import json, sys
import mxforge

with mxforge.Engine.load(sys.argv[1], context_length=64) as engine:
    params = mxforge.SamplingParams(max_tokens=4, seed=1, ignore_eos=True)
    answer = engine.generate([1, 2, 3], params)
    engine.logits([1, 2, 3])
maps = open("/proc/self/maps").read()
libraries = sorted({line.split("/")[-1] for line in maps.splitlines() if ".so" in line})
print(json.dumps({"tokens": answer.token_ids, "modules": sorted(sys.modules), "maps": libraries}))
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc here")
def test_a_runtime_process_never_sees_the_compiler(compiled: Compiled):
    result = subprocess.run(
        [sys.executable, "-c", RUN, str(compiled("odd-1"))],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    seen = json.loads(result.stdout)
    assert len(seen["tokens"]) == 4
    assert "libmxforge.so" in seen["maps"]
    assert not [name for name in seen["maps"] if "tvm" in name or "LLVM" in name]
    compiler = ("mxforge.compile", "mxforge.schedules", "torch", "tvm")
    assert not [name for name in seen["modules"] if name.startswith(compiler)]


def test_launches_overlap_only_where_the_target_can(cpu):
    hopper = replace(cpu, archs=("sm_90a",))
    for target, expected in ((cpu, None), (hopper, ["tirx.use_programtic_dependent_launch"])):
        kernel = after("launches", target)["double"]
        launch = kernel.attrs.get("tirx.kernel_launch_params")
        assert (launch and list(launch)) == expected
