"""What a kernel is: one operation, its signature, its reference, its cases, a table of schedules.

A kernel's own file reads in this order: the math, the NumPy reference (float64 accumulation), the
signature, the cases, the table of schedules. The code of the schedules stands beside it, a file
for each target family; a small kernel is one file. `mxforge.schedules.KERNELS` holds all kernels.

Kernel names carry types: f32_ is the activation, bf16w_ or mxfp4w_ the weight.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

import ml_dtypes  # noqa: F401 (NumPy learns "bfloat16" from it)
import numpy as np
import tvm
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.script.parser.core.parser import ScriptMacro

from mxforge.errors import ScheduleTableError, SignatureError, UnscheduledError


@dataclass(frozen=True)
class Target:
    """What a schedule is chosen for.

    `kind` is the device that the runtime opens: "cpu", "cuda", "vulkan" or "metal". Schedules look
    at `features` alone, which names all that code for the target may count on: its family ("cpu",
    or "gpu" and one of "cuda", "vulkan", "metal"), instruction sets in LLVM's spelling
    ("avx512vnni"), architectures ("sm_80"), and abilities ("float16", "simdgroup_matrix").
    """

    kind: str
    features: frozenset[str]


# -- signatures -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """A size that is known at run time: `factor` times the number called `name`."""

    name: str
    factor: int = 1

    def __mul__(self, factor: int) -> Size:
        return Size(self.name, self.factor * factor)


@dataclass(frozen=True)
class Tensor:
    """One argument of a kernel: its name, its shape, its dtype."""

    name: str
    shape: tuple[int | Size, ...]
    dtype: str

    @property
    def static_shape(self) -> tuple[int, ...]:
        """The shape where it has no symbolic sizes, such as a weight's."""
        return self.sizes({})

    @property
    def nbytes(self) -> int:
        """Of a shape without symbolic sizes."""
        return math.prod(self.static_shape) * np.dtype(self.dtype).itemsize

    def sizes(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """The shape where symbolic sizes have these values: integers, or expressions."""
        return tuple(_value(size, values) for size in self.shape)


def _value(size: int | Size, values: Mapping[str, Any]) -> Any:
    if not isinstance(size, Size):
        return size
    value = values[size.name]
    return value if size.factor == 1 else value * size.factor


@dataclass(frozen=True)
class Signature:
    """The arguments of a kernel in order: inputs, then fresh outputs, then scratch.

    `updated` names the inputs that the kernel changes in place. `scratch` is room for what its
    launches tell each other: it holds nothing before the call, and nobody reads it after.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...] = ()
    updated: tuple[str, ...] = ()
    scratch: tuple[Tensor, ...] = ()

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        return (*self.inputs, *self.outputs, *self.scratch)

    def solve(self, shapes: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """The symbolic sizes, from the shapes of all inputs.

        A size that stands alone somewhere is taken from there, so that nothing is divided.
        """
        alone: dict[str, Any] = {}
        multiples: dict[str, Any] = {}
        for tensor, shape in zip(self.inputs, shapes, strict=True):
            for size, extent in zip(tensor.shape, shape, strict=True):
                if isinstance(size, Size):
                    if size.factor == 1:
                        alone.setdefault(size.name, extent)
                    else:
                        multiples.setdefault(size.name, extent // size.factor)
        return multiples | alone


def f32(name: str, *shape: int | Size) -> Tensor:
    return Tensor(name, shape, "float32")


def i32(name: str, *shape: int | Size) -> Tensor:
    return Tensor(name, shape, "int32")


def prim_func(arguments: Sequence[Tensor], body: Callable[..., Any]) -> tvm.tirx.PrimFunc:
    """The PrimFunc with these arguments around a T.inline `body`.

    The body's parameters are names of arguments and of their symbolic sizes, in any order; those
    with a default are of optional arguments. SignatureError where there is none of a name.
    """

    @T.prim_func(s_tir=True, private=True)
    def main():
        _declare(arguments, body)

    return main


def _find_parser(_: ScriptMacro) -> Any:
    """The parser that expands a T.inline, out of the frames of its callers."""
    frame = inspect.currentframe()
    while frame is not None:
        if parser := frame.f_globals.get(ScriptMacro.parser_object_name):
            return parser
        frame = frame.f_back
    raise RuntimeError("T.inline is called outside of T.prim_func")


# TVM's own reads the source line of every frame first: three quarters of what a large kernel takes
# to build.
ScriptMacro._find_parser_def = _find_parser


def _declare(arguments: Sequence[Tensor], body: Callable[..., Any]) -> None:
    sizes: dict[str, Any] = {}
    for tensor in arguments:
        for size in tensor.shape:
            if isinstance(size, Size) and size.name not in sizes:
                sizes[size.name] = T.int64()
                IRBuilder.name(size.name, sizes[size.name])
    known = dict(sizes)
    for tensor in arguments:
        known[tensor.name] = T.arg(tensor.name, T.Buffer(tensor.sizes(sizes), tensor.dtype))
    # T.inline hides the function that it wraps.
    (inline,) = (cell.cell_contents for cell in body.__closure__ or ())
    wanted = inspect.signature(inline.func).parameters
    for name, parameter in wanted.items():
        if name not in known and parameter.default is inspect.Parameter.empty:
            raise SignatureError(
                f"The body of a kernel asks for {name!r}, but the arguments and sizes are "
                f"{', '.join(known)}; name one of them, or give the parameter a default."
            )
    body(**{name: known.get(name, wanted[name].default) for name in wanted})


# -- schedules ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TileConfig:
    """Base of the frozen tile tables. A subclass holds the numbers of one kernel."""

    def describe(self) -> str:
        return ",".join(f"{name}={value}" for name, value in asdict(self).items())


@dataclass(frozen=True)
class Layout:
    """How a schedule wants one weight in memory.

    shape(stored shape) -> packed shape
    pack(array) -> packed array; of the whole weight, or of any chunk along its first axis that
        begins at a multiple of `rows`: packed chunks, one after the other, are the packed weight
    dtype: of what is packed, where it is not the weight's own
    """

    shape: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    pack: Callable[[np.ndarray], np.ndarray]
    rows: int = 1
    dtype: str | None = None

    def packed(self, tensor: Tensor) -> Tensor:
        return Tensor(tensor.name, self.shape(tensor.shape), self.dtype or tensor.dtype)


AS_STORED = Layout(shape=lambda shape: shape, pack=np.ascontiguousarray)


def _always(**_static: Any) -> bool:
    return True


def _nothing(**_static: Any) -> tuple[Tensor, ...]:
    return ()


@dataclass(frozen=True, eq=False)
class Schedule:
    """One way to compute a kernel.

    It fits a target that has all features of `needs`, and shapes of which `fits(**static)` is true.

    build(arguments, **static) -> PrimFunc: its code, for arguments in the layout of `layouts`,
        which are AS_STORED where they are not named; `tile=` is passed too where there is one.
    unused: inputs that its code does without, and which are not among its arguments
    scratch(**static): the signature's scratch, of its symbolic sizes
    """

    name: str
    needs: frozenset[str]
    build: Callable[..., tvm.tirx.PrimFunc]
    tile: TileConfig | None = None
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    fits: Callable[..., bool] = _always
    unused: frozenset[str] = frozenset()
    scratch: Callable[..., tuple[Tensor, ...]] = _nothing

    def layout(self, argument: str) -> Layout:
        return self.layouts.get(argument, AS_STORED)


def cpu(*features: str) -> frozenset[str]:
    """What a schedule needs of a CPU."""
    return frozenset({"cpu", *features})


def gpu(*features: str) -> frozenset[str]:
    """What a schedule needs of a GPU, of any family unless one is among the features."""
    return frozenset({"gpu", *features})


# -- kernels --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One input on which a kernel is tested and timed.

    `name` says which boundary it stands on. `static` holds the keyword arguments of the kernel's
    signature and schedules; `inputs` makes the inputs by name, in the signature's order, as stored.
    `tolerance` bounds ‖ours − reference‖ / ‖reference‖. `flops` and `bytes` are what the
    operation cannot do without: the roofline a timing is held against.
    """

    name: str
    static: Mapping[str, Any]
    inputs: Callable[[np.random.Generator], dict[str, np.ndarray]]
    tolerance: float = 1e-5
    flops: int = 0
    bytes: int = 0


@dataclass(frozen=True, eq=False)
class Kernel:
    """One operation.

    signature(**static) -> Signature, of inputs as stored
    reference(**inputs, **static) -> tuple of the fresh outputs, then of the new values of the
        updated inputs; in float64 where these are real
    schedules: the table, best first

    ScheduleTableError where the table contradicts itself.
    """

    name: str
    signature: Callable[..., Signature]
    reference: Callable[..., tuple[np.ndarray, ...]]
    cases: tuple[Case, ...]
    schedules: tuple[Schedule, ...]

    def __post_init__(self) -> None:
        if not self.schedules:
            raise ScheduleTableError(f"{self.name} has no schedule; a kernel needs at least one.")
        names = [schedule.name for schedule in self.schedules]
        for name in names:
            if names.count(name) > 1:
                raise ScheduleTableError(
                    f"The table of {self.name} has two schedules called {name!r}; each needs a "
                    "name of its own, by which manifests and figures tell them apart."
                )
        inputs = {t.name for case in self.cases for t in self.signature(**case.static).inputs}
        for schedule in self.schedules:
            for argument, layout in schedule.layouts.items():
                where = f"the schedule {schedule.name!r} of {self.name}"
                if argument not in inputs:
                    raise ScheduleTableError(
                        f"A layout in {where} is of {argument!r}, which is no input; the inputs "
                        f"are {', '.join(sorted(inputs))}."
                    )
                if not (callable(layout.pack) and callable(layout.shape)):
                    raise ScheduleTableError(
                        f"The layout of {argument!r} in {where} lacks a packer; give it both "
                        "`shape` and `pack`."
                    )
            for argument in schedule.unused - inputs:
                raise ScheduleTableError(
                    f"The schedule {schedule.name!r} of {self.name} does without {argument!r}, "
                    f"which is no input; the inputs are {', '.join(sorted(inputs))}."
                )

    def runs_on(self, target: Target) -> bool:
        """Whether a schedule fits the target for some shapes."""
        return any(schedule.needs <= target.features for schedule in self.schedules)

    def schedules_for(self, target: Target, **static: Any) -> tuple[Schedule, ...]:
        """Every schedule that fits, best first."""
        return tuple(
            schedule
            for schedule in self.schedules
            if schedule.needs <= target.features and schedule.fits(**static)
        )

    def fits(self, target: Target, **static: Any) -> bool:
        """Whether a schedule fits."""
        return bool(self.schedules_for(target, **static))

    def choose(self, target: Target, **static: Any) -> Schedule:
        """The best schedule that fits; UnscheduledError where none does."""
        fitting = self.schedules_for(target, **static)
        if not fitting:
            shape = ", ".join(f"{name}={value}" for name, value in static.items())
            raise UnscheduledError(
                f"No schedule of {self.name} for {shape} fits {target.kind}, whose features are "
                f"{', '.join(sorted(target.features))}; add one to its table in schedules/, or "
                "compile for another target."
            )
        return fitting[0]

    def build(
        self, target: Target, schedule: Schedule | None = None, **static: Any
    ) -> tvm.tirx.PrimFunc:
        """The code of the best schedule, or of the one given; the same object for equal calls."""
        schedule = schedule or self.choose(target, **static)
        return _built(self, schedule, tuple(sorted(static.items())))

    def packed_signature(self, schedule: Schedule, **static: Any) -> Signature:
        """The signature of a schedule's code: weights in its layout, no input that it ignores, and
        its scratch."""
        signature = self.signature(**static)
        inputs = tuple(
            schedule.layout(t.name).packed(t)
            for t in signature.inputs
            if t.name not in schedule.unused
        )
        return replace(signature, inputs=inputs, scratch=schedule.scratch(**static))

    def pack(
        self,
        target: Target,
        inputs: Mapping[str, np.ndarray],
        schedule: Schedule | None = None,
        **static: Any,
    ) -> dict[str, np.ndarray]:
        """What the code of the best schedule, or of the one given, takes of the inputs, in order
        and in its layouts."""
        schedule = schedule or self.choose(target, **static)
        return {
            name: schedule.layout(name).pack(array)
            for name, array in inputs.items()
            if name not in schedule.unused
        }

    def outputs(
        self, inputs: Mapping[str, np.ndarray], **static: Any
    ) -> list[tuple[tuple[int, ...], str]]:
        """Shape and dtype of the fresh outputs for these inputs, as stored."""
        return self._shapes(inputs, self.signature(**static).outputs, **static)

    def scratch(
        self, inputs: Mapping[str, np.ndarray], schedule: Schedule, **static: Any
    ) -> list[tuple[tuple[int, ...], str]]:
        """The same of the scratch of a schedule."""
        return self._shapes(inputs, schedule.scratch(**static), **static)

    def _shapes(
        self, inputs: Mapping[str, np.ndarray], tensors: Sequence[Tensor], **static: Any
    ) -> list[tuple[tuple[int, ...], str]]:
        sizes = self.signature(**static).solve([array.shape for array in inputs.values()])
        return [(tensor.sizes(sizes), tensor.dtype) for tensor in tensors]


@cache
def _built(
    kernel: Kernel, schedule: Schedule, static: tuple[tuple[str, Any], ...]
) -> tvm.tirx.PrimFunc:
    """Cached, as a model calls a kernel once a layer, and parsing TVMScript takes seconds."""
    values = dict(static)
    arguments = kernel.packed_signature(schedule, **values).arguments
    tile = {} if schedule.tile is None else {"tile": schedule.tile}
    return scheduled(
        schedule.build(arguments, **values, **tile),
        kernel.name,
        schedule.name,
        schedule.tile.describe() if schedule.tile else "",
    )


def scheduled(
    func: tvm.tirx.PrimFunc, kernel: str, schedule: str, tile: str = ""
) -> tvm.tirx.PrimFunc:
    """Mark a function as scheduled and say how; the pipeline refuses functions without the mark."""
    return func.with_attrs(
        {
            "tirx.noalias": True,
            "tirx.is_scheduled": True,
            "mxforge.kernel": kernel,
            "mxforge.schedule": schedule,
            "mxforge.tile": tile,
        }
    )


__all__ = [
    "AS_STORED",
    "Case",
    "Kernel",
    "Layout",
    "Schedule",
    "Signature",
    "Size",
    "T",
    "Target",
    "Tensor",
    "TileConfig",
    "cpu",
    "f32",
    "gpu",
    "i32",
    "prim_func",
    "scheduled",
]
