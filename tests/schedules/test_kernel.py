"""The mechanism: signatures, tables of schedules, the choice, layouts."""

from __future__ import annotations

import inspect
from dataclasses import replace

import numpy as np
import pytest
from support.targets import CUDA, METAL, PLAIN_CPU, VULKAN

from mxforge.compile import cuda
from mxforge.compile.targets import gpu_target
from mxforge.errors import ScheduleTableError, SignatureError, UnscheduledError
from mxforge.schedules.gather import GATHER_ROWS
from mxforge.schedules.kernel import (
    AS_STORED,
    Kernel,
    Layout,
    Schedule,
    Signature,
    Size,
    T,
    cpu,
    f32,
    gpu,
    i32,
    prim_func,
)
from mxforge.schedules.linear import LINEAR
from mxforge.schedules.rms_norm import RMS_NORM

N, M = Size("n"), Size("m")


def with_table(kernel: Kernel, *schedules: Schedule) -> Kernel:
    return replace(kernel, schedules=schedules)


def named(name: str, needs: frozenset[str] = frozenset({"gpu"}), **fields) -> Schedule:
    return replace(RMS_NORM.schedules[0], name=name, needs=needs, **fields)


def test_the_first_schedule_whose_needs_are_met_is_chosen():
    kernel = with_table(
        RMS_NORM,
        named("of one architecture", gpu("sm_90a")),
        named("of later ones", gpu("sm_80")),
        named("of any GPU"),
        named("of CPUs", cpu()),
    )
    static = RMS_NORM.cases[0].static

    def chosen(arch: str) -> str:
        return kernel.choose(gpu_target("cuda", *cuda.features(arch)), **static).name

    assert [chosen(arch) for arch in ("sm_75", "sm_80", "sm_89", "sm_90", "sm_90a", "sm_100a")] == [
        "of any GPU", "of later ones", "of later ones", "of later ones", "of one architecture",
        "of later ones",
    ]  # fmt: skip
    assert kernel.choose(METAL, **static).name == "of any GPU"
    assert kernel.choose(PLAIN_CPU, **static).name == "of CPUs"


def test_a_schedule_may_depend_on_shapes():
    kernel = with_table(
        RMS_NORM, named("wide", fits=lambda hidden, **_: hidden % 64 == 0), named("any")
    )
    assert kernel.choose(VULKAN, hidden=128, eps=1e-5).name == "wide"
    assert kernel.choose(VULKAN, hidden=96, eps=1e-5).name == "any"


def test_where_none_fits_kernel_and_features_are_named():
    kernel = with_table(RMS_NORM, named("of CPUs", cpu()))
    with pytest.raises(
        UnscheduledError, match="of f32_rms_norm for hidden=4 fits metal, whose.*gpu, metal"
    ):
        kernel.choose(METAL, hidden=4)


def test_no_two_architectures_have_the_same_features():
    assert len({frozenset(cuda.features(arch)) for arch in cuda.ARCHS}) == len(cuda.ARCHS)


def test_a_table_with_two_schedules_of_one_name_is_refused():
    with pytest.raises(ScheduleTableError, match="two schedules called 'twice'"):
        with_table(RMS_NORM, named("twice"), named("once"), named("twice"))


def test_an_empty_table_is_refused():
    with pytest.raises(ScheduleTableError, match="f32_rms_norm has no schedule"):
        with_table(RMS_NORM)


def test_a_layout_of_what_is_no_input_is_refused():
    with pytest.raises(ScheduleTableError, match="of 'wieght', which is no input; .*weight"):
        with_table(RMS_NORM, named("typo", layouts={"wieght": AS_STORED}))


def test_a_layout_without_a_packer_is_refused():
    layout = Layout(shape=lambda shape: shape, pack=None)
    with pytest.raises(ScheduleTableError, match="'weight' in the schedule 'half'.*lacks a packer"):
        with_table(RMS_NORM, named("half", layouts={"weight": layout}))


def test_an_unused_input_that_is_none_is_refused():
    with pytest.raises(ScheduleTableError, match="'half' of f32_rms_norm does without 'wieght'"):
        with_table(RMS_NORM, named("half", unused=frozenset({"wieght"})))


def test_code_and_weights_come_from_the_same_entry():
    static = {"rows": 130, "k": 32, "with_bias": False, "with_residual": False}
    weight = np.arange(130 * 32, dtype=np.float32).reshape(130, 32).astype("bfloat16")
    inputs = {"x": np.zeros((1, 32), np.float32), "weight": weight}
    for target in (PLAIN_CPU, CUDA):
        packed = LINEAR.pack(target, inputs, **static)["weight"]
        func = LINEAR.build(target, **static)
        buffer = func.params[1]
        assert tuple(int(extent) for extent in buffer.shape) == packed.shape
        assert str(buffer.dtype) == packed.dtype.name


def test_packed_chunks_are_the_packed_weight():
    weight = np.arange(200 * 32, dtype=np.float32).reshape(200, 32).astype("bfloat16")
    layout = LINEAR.schedules[0].layout("weight")
    chunks = [layout.pack(weight[start : start + 2 * layout.rows]) for start in (0, 128)]
    assert np.concatenate(chunks).tobytes() == layout.pack(weight).tobytes()


def test_sizes_are_solved_from_what_stands_alone():
    signature = Signature((f32("h", N * 4, 8), f32("ids", N, 4)), (f32("y", N, M),))
    assert signature.solve([(28, 8), (7, 4)]) == {"n": 7}
    assert Signature((f32("h", N * 4),)).solve([(28,)]) == {"n": 7}


def test_outputs_follow_from_the_inputs():
    inputs = {"x": np.zeros((6, 16), np.float32), "rows": np.zeros(3, np.int32)}
    assert GATHER_ROWS.outputs(inputs, hidden=16) == [((3, 16), "float32")]


def test_scratch_follows_the_outputs_and_is_none_of_them():
    def scratch(hidden, **_):
        return (f32("sums", N * 2, hidden), i32("places", N))

    schedule = named("in parts", scratch=scratch)
    kernel = with_table(RMS_NORM, schedule)
    static = {"hidden": 8, "eps": 1e-5}
    inputs = {"x": np.zeros((3, 8), np.float32), "weight": np.zeros(8, np.float32)}
    signature = kernel.packed_signature(schedule, **static)
    assert [tensor.name for tensor in signature.arguments] == ["x", "weight", "y", "sums", "places"]
    assert kernel.outputs(inputs, **static) == [((3, 8), "float32")]
    assert kernel.scratch(inputs, schedule, **static) == [((6, 8), "float32"), ((3,), "int32")]
    assert not kernel.signature(**static).scratch


def test_equal_calls_build_one_function():
    first = RMS_NORM.build(PLAIN_CPU, hidden=64, eps=1e-5)
    assert RMS_NORM.build(PLAIN_CPU, eps=1e-5, hidden=64) is first
    assert GATHER_ROWS.build(CUDA, hidden=64) is GATHER_ROWS.build(METAL, hidden=64)


def test_expanding_an_inline_does_not_read_the_sources_of_all_callers(monkeypatch):
    calls = []
    original = inspect.getouterframes

    def counted(*arguments):
        calls.append(arguments)
        return original(*arguments)

    @T.inline
    def nothing(n):
        T.evaluate(n)

    @T.inline
    def body(n):
        nothing(n)
        nothing(n)
        nothing(n)

    monkeypatch.setattr(inspect, "getouterframes", counted)
    prim_func((f32("x", N),), body)
    assert len(calls) <= 2  # of the function, not of each inline in it


def test_a_body_that_asks_for_what_is_no_argument_is_refused():
    @T.inline
    def body(n, wieght):
        T.evaluate(n)

    with pytest.raises(SignatureError, match="asks for 'wieght', but .* are n, x; name one"):
        _declared((f32("x", N),), body)


def _declared(arguments, body):
    """TVMScript reports an error of what it calls by a text of its own, and keeps the cause."""
    try:
        prim_func(arguments, body)
    except Exception as error:
        found: BaseException | None = error
        while found is not None and not isinstance(found, SignatureError):
            found = found.__cause__ or found.__context__
        raise found or error from None
