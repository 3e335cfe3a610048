"""A launch plan: what the functions of a compiled library do, as data; its bytes, read and written.

A function is a straight line of steps. A step runs one kernel on tensors, some of which are the
function's arguments, and the others lie in storages. Sizes, offsets and what a kernel takes besides
tensors are values, in a list of which each needs only those before it: constants, symbols (extents
of arguments), and operations on two values. Who runs a function evaluates the list once, from the
extents of its arguments, and again when these change.

    value       an index into `Function.values`
    tensor      an index into `Function.tensors`, of which the arguments are the first
    workspace   one for all functions, of which never two run at once; a storage whose size is not
                bounded has memory of its own

The file is little-endian: MAGIC, VERSION, and then what `_Writer` is given by `to_bytes`. Every
index is checked when it is read, so that a reader in another language has to check the same.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from .errors import ArtifactCorruptError, MxforgeError

MAGIC = b"mxplan\x1a\n"
VERSION = 1
MOST = 1 << 20  # of anything that is counted: far more than any model's
DIMENSIONS = 8
MOST_NAME = 256  # bytes of a name: many steps may have one
DTYPES = {
    "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int8": 1, "uint8": 1,
    "uint16": 2, "uint32": 4,
}  # fmt: skip
_DTYPES = tuple(DTYPES)
_NONE = 0xFFFFFFFF
_LARGEST = (1 << 63) - 1


class PlanError(MxforgeError):
    """The values of a plan cannot be computed: a division by zero, or more than 64 bits."""


class Op(enum.IntEnum):
    """Of two values; comparisons give 0 or 1, divisions round down."""

    ADD = 0
    SUB = 1
    MUL = 2
    DIV = 3
    MOD = 4
    MIN = 5
    MAX = 6
    LESS = 7
    LESS_EQUAL = 8
    EQUAL = 9
    AND = 10
    OR = 11


@dataclass(frozen=True)
class Constant:
    number: int


@dataclass(frozen=True)
class Symbol:
    """An extent that arguments have; `most` is its bound, 0 where there is none."""

    name: str
    most: int = 0


@dataclass(frozen=True)
class Operation:
    op: Op
    a: int
    b: int


@dataclass(frozen=True)
class Feature:
    """1 where the device has it, 0 where not."""

    name: str


Value = Constant | Symbol | Operation | Feature


class Role(enum.IntEnum):
    """What a tensor is to who calls the function."""

    INPUT = 0  # of this call
    KV = 1  # the cache of a layer, updated in place
    WEIGHT = 2
    LOCAL = 3  # in a storage


@dataclass(frozen=True)
class Tensor:
    """`name` is an argument's; `storage` and `offset`, a value in bytes, are a local one's."""

    role: Role
    dtype: str
    shape: tuple[int, ...]  # values
    name: str = ""
    storage: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Storage:
    """`size`, a value, in bytes; `at`, in the workspace, or None: then it grows as it is needed."""

    size: int
    at: int | None


@dataclass(frozen=True)
class Number:
    """An integer argument of a device's kernel: a value of 32 or 64 bits."""

    value: int
    bits: int


@dataclass(frozen=True)
class Launch:
    """What a device needs to launch a kernel: values, `shared` in bytes.

    overlaps: it may begin before the launch before has ended, for which it waits itself
    """

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    overlaps: bool


@dataclass(frozen=True)
class Step:
    """A call of `kernel`, where the value `when` is not 0. An argument is a tensor or a `Number`,
    of which the CPU's kernels have none."""

    kernel: str
    arguments: tuple[int | Number, ...]
    launch: Launch | None = None
    when: int | None = None


@dataclass(frozen=True)
class Function:
    name: str
    values: tuple[Value, ...]
    tensors: tuple[Tensor, ...]
    storages: tuple[Storage, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]  # tensors

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in self.tensors if tensor.role is not Role.LOCAL)

    def evaluate(self, symbols: Mapping[str, int], features: Collection[str] = ()) -> list[int]:
        """All values, from those of the symbols and what the device has; PlanError where they
        cannot be computed."""
        known: list[int] = []
        for value in self.values:
            if isinstance(value, Constant):
                known.append(value.number)
            elif isinstance(value, Symbol):
                known.append(symbols[value.name])
            elif isinstance(value, Feature):
                known.append(int(value.name in features))
            else:
                known.append(_computed(value.op, known[value.a], known[value.b]))
        return known


@dataclass(frozen=True)
class Plan:
    """All functions of a library, and the bytes of the workspace that they share."""

    functions: tuple[Function, ...]
    workspace: int

    def __getitem__(self, name: str) -> Function:
        """The function of this name; KeyError where there is none."""
        for function in self.functions:
            if function.name == name:
                return function
        raise KeyError(name)

    def to_bytes(self) -> bytes:
        """The file; equal plans give equal bytes."""
        return _written(self)

    @classmethod
    def from_bytes(cls, data: bytes, where: str = "the launch plan") -> Plan:
        """Read and check; ArtifactCorruptError, which names `where`, for anything else."""
        return _Reader(data, where).plan()


_COMPUTED: dict[Op, Callable[[int, int], int]] = {
    Op.ADD: lambda a, b: a + b,
    Op.SUB: lambda a, b: a - b,
    Op.MUL: lambda a, b: a * b,
    Op.DIV: lambda a, b: a // b,
    Op.MOD: lambda a, b: a % b,
    Op.MIN: min,
    Op.MAX: max,
    Op.LESS: lambda a, b: int(a < b),
    Op.LESS_EQUAL: lambda a, b: int(a <= b),
    Op.EQUAL: lambda a, b: int(a == b),
    Op.AND: lambda a, b: int(bool(a) and bool(b)),
    Op.OR: lambda a, b: int(bool(a) or bool(b)),
}


def _computed(op: Op, a: int, b: int) -> int:
    if op in (Op.DIV, Op.MOD) and b <= 0:
        raise PlanError(f"{a} {op.name} {b}: divisors are positive")
    result = _COMPUTED[op](a, b)
    if not -_LARGEST - 1 <= result <= _LARGEST:
        raise PlanError(f"{a} {op.name} {b} takes more than 64 bits")
    return result


# -- bytes ----------------------------------------------------------------------------------------


class _Writer:
    """Words of 32 bits, numbers of 64, and texts, each once."""

    def __init__(self) -> None:
        self.texts: dict[str, int] = {}
        self._words = bytearray()

    def word(self, *words: int) -> None:
        self._words += struct.pack(f"<{len(words)}I", *words)

    def number(self, number: int) -> None:
        self._words += struct.pack("<q", number)

    def text(self, text: str) -> None:
        self.word(self.texts.setdefault(text, len(self.texts)))

    def optional(self, number: int | None) -> None:
        self.word(_NONE if number is None else number)

    def bytes(self, workspace: int) -> bytes:
        head = bytearray(MAGIC + struct.pack("<IIq", VERSION, len(self.texts), workspace))
        for text in self.texts:
            encoded = text.encode()
            head += struct.pack("<I", len(encoded)) + encoded + bytes(-len(encoded) % 4)
        return bytes(head + self._words)


def _written(plan: Plan) -> bytes:
    out = _Writer()
    out.word(len(plan.functions))
    for function in plan.functions:
        out.text(function.name)
        out.word(
            len(function.values), len(function.storages), len(function.tensors),
            len(function.steps), len(function.outputs),
        )  # fmt: skip
        for value in function.values:
            if isinstance(value, Constant):
                out.word(_CONSTANT)
                out.number(value.number)
            elif isinstance(value, Symbol):
                out.word(_SYMBOL)
                out.text(value.name)
                out.word(value.most)
            elif isinstance(value, Feature):
                out.word(_FEATURE)
                out.text(value.name)
            else:
                out.word(value.op, value.a, value.b)
        for storage in function.storages:
            out.word(storage.size)
            out.number(-1 if storage.at is None else storage.at)
        for tensor in function.tensors:
            out.word(tensor.role, _DTYPES.index(tensor.dtype), len(tensor.shape), *tensor.shape)
            if tensor.role is Role.LOCAL:
                out.word(tensor.storage, tensor.offset)
            else:
                out.text(tensor.name)
        for step in function.steps:
            out.text(step.kernel)
            out.optional(step.when)
            out.word(len(step.arguments))
            for argument in step.arguments:
                if isinstance(argument, Number):
                    out.word(argument.bits, argument.value)
                else:
                    out.word(0, argument)
            out.word(step.launch is not None)
            if launch := step.launch:
                out.word(*launch.grid, *launch.block, launch.shared, launch.overlaps)
        out.word(*function.outputs)
    return out.bytes(plan.workspace)


# Codes of values besides those of Op.
_CONSTANT, _SYMBOL, _FEATURE = 32, 33, 34

_T = TypeVar("_T")


class _Reader:
    """Reads what `_written` wrote, and checks everything that who runs it relies on."""

    def __init__(self, data: bytes, where: str) -> None:
        self._data = data
        self._where = where
        self._at = 0
        self._texts: tuple[str, ...] = ()

    def plan(self) -> Plan:
        if self._take(len(MAGIC)) != MAGIC:
            raise self._corrupt("it does not begin as one")
        version = self._word()
        if version != VERSION:
            raise self._corrupt(f"its version is {version}, and this runtime reads {VERSION}")
        count, workspace = self._count(), self._number()
        if workspace < 0:
            raise self._corrupt("its workspace is smaller than nothing")
        self._texts = tuple(self._string() for _ in range(count))
        functions = tuple(self._function(workspace) for _ in range(self._count()))
        if self._at != len(self._data):
            raise self._corrupt("something follows it")
        if len({function.name for function in functions}) != len(functions):
            raise self._corrupt("two functions have one name")
        return Plan(functions, workspace)

    def _function(self, workspace: int) -> Function:
        name = self._text()
        values, storages, tensors, steps, outputs = (self._count() for _ in range(5))
        made = tuple(self._value(index) for index in range(values))
        stored = tuple(self._storage(values, made, workspace) for _ in range(storages))
        known = tuple(self._tensor(values, storages) for _ in range(tensors))
        function = Function(
            name,
            made,
            known,
            stored,
            tuple(self._step(values, tensors) for _ in range(steps)),
            tuple(self._index(tensors) for _ in range(outputs)),
        )
        self._check_arguments(function)
        return function

    def _check_arguments(self, function: Function) -> None:
        """Arguments come first, have names of their own, and every symbol is an extent of one."""
        roles = [tensor.role is Role.LOCAL for tensor in function.tensors]
        if roles != sorted(roles):
            raise self._corrupt(f"an argument of {function.name} comes after a local tensor")
        names = [tensor.name for tensor in function.arguments]
        if len(set(names)) != len(names):
            raise self._corrupt(f"two arguments of {function.name} have one name")
        extents = {extent for tensor in function.arguments for extent in tensor.shape}
        symbols = [
            (index, value.name)
            for index, value in enumerate(function.values)
            if isinstance(value, Symbol)
        ]
        if len({name for _, name in symbols}) != len(symbols):
            raise self._corrupt(f"two symbols of {function.name} have one name")
        for index, name in symbols:
            if index not in extents:
                raise self._corrupt(f"no argument of {function.name} has the extent {name}")
        if not all(isinstance(function.values[extent], Constant | Symbol) for extent in extents):
            raise self._corrupt(f"an argument of {function.name} has a computed extent")

    def _value(self, index: int) -> Value:
        code = self._word()
        if code == _CONSTANT:
            return Constant(self._number())
        if code == _SYMBOL:
            return Symbol(self._text(), self._word())
        if code == _FEATURE:
            return Feature(self._text())
        return Operation(self._known(Op, code), self._index(index), self._index(index))

    def _storage(self, values: int, made: Sequence[Value], workspace: int) -> Storage:
        size, at = self._index(values), self._number()
        if at < 0:
            return Storage(size, None)
        constant = made[size]
        if not isinstance(constant, Constant) or not 0 <= constant.number <= workspace - at:
            raise self._corrupt("a storage lies outside the workspace")
        return Storage(size, at)

    def _tensor(self, values: int, storages: int) -> Tensor:
        role, dtype = self._known(Role, self._word()), self._word()
        if dtype >= len(_DTYPES):
            raise self._corrupt(f"there is no number format {dtype}")
        dimensions = self._word()
        if dimensions > DIMENSIONS:
            raise self._corrupt(f"a tensor has {dimensions} dimensions")
        shape = tuple(self._index(values) for _ in range(dimensions))
        if role is Role.LOCAL:
            storage, offset = self._index(storages), self._index(values)
            return Tensor(role, _DTYPES[dtype], shape, storage=storage, offset=offset)
        return Tensor(role, _DTYPES[dtype], shape, self._text())

    def _step(self, values: int, tensors: int) -> Step:
        kernel, when = self._text(), self._word()
        if when != _NONE and when >= values:
            raise self._corrupt(f"{kernel} depends on a value that is not there")
        arguments = tuple(self._argument(values, tensors) for _ in range(self._count()))
        launch = None
        if self._word():
            a, b, c, x, y, z, shared = (self._index(values) for _ in range(7))
            launch = Launch((a, b, c), (x, y, z), shared, bool(self._index(2)))
        return Step(kernel, arguments, launch, None if when == _NONE else when)

    def _argument(self, values: int, tensors: int) -> int | Number:
        bits = self._word()
        if bits == 0:
            return self._index(tensors)
        if bits not in (32, 64):
            raise self._corrupt(f"a kernel takes an integer of {bits} bits")
        return Number(self._index(values), bits)

    # -- words -------------------------------------------------------------------------------------

    def _take(self, size: int) -> bytes:
        if size > len(self._data) - self._at:
            raise self._corrupt("it ends too early")
        taken = self._data[self._at : self._at + size]
        self._at += size
        return taken

    def _word(self) -> int:
        return int.from_bytes(self._take(4), "little")

    def _number(self) -> int:
        return int.from_bytes(self._take(8), "little", signed=True)

    def _count(self) -> int:
        """How many follow, each of at least four bytes."""
        count = self._word()
        if count > min(MOST, (len(self._data) - self._at) // 4):
            raise self._corrupt(f"{count} of something do not fit into it")
        return count

    def _index(self, count: int) -> int:
        index = self._word()
        if index >= count:
            raise self._corrupt(f"number {index} of {count} is not there")
        return index

    def _known(self, kind: Callable[[int], _T], number: int) -> _T:
        try:
            return kind(number)
        except ValueError as error:
            raise self._corrupt(str(error)) from None

    def _string(self) -> str:
        size = self._word()
        if size > MOST_NAME:
            raise self._corrupt(f"a name has {size} bytes")
        encoded = self._take(size + -size % 4)
        try:
            return encoded[:size].decode()
        except UnicodeDecodeError:
            raise self._corrupt("a name is no UTF-8") from None

    def _text(self) -> str:
        return self._texts[self._index(len(self._texts))]

    def _corrupt(self, reason: str) -> ArtifactCorruptError:
        return ArtifactCorruptError(
            f"{self._where} should be a launch plan, but {reason}; compile the model again, or "
            "copy the artifact again."
        )
