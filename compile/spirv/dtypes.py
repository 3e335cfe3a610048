"""What a TIR value is made of, and how wide vectors are cut into SPIR-V's two to four lanes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

Kind = Literal["bool", "int", "uint", "float", "bfloat"]
PART_LANES = 4  # the widest vector of SPIR-V without the capability Vector16

# DLPack's type codes, which TVM's dtypes carry.
_KINDS: dict[int, Kind] = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 6: "bool"}
_BITS: dict[Kind, tuple[int, ...]] = {
    "bool": (8,),
    "int": (8, 16, 32, 64),
    "uint": (8, 16, 32, 64),
    "float": (16, 32, 64),
    "bfloat": (16,),
}


@dataclass(frozen=True)
class DType:
    """A scalar (lanes 1) or a vector.

    Integers of either sign are the same SPIR-V type, of signedness 0: instructions carry the
    sign. A bool is OpTypeBool as a value and one byte, 0 or 1, in memory. A bfloat is its 16 bits;
    arithmetic on it happens in float32.
    """

    kind: Kind
    bits: int
    lanes: int = 1

    def __str__(self) -> str:
        name = "bool" if self.kind == "bool" else f"{self.kind}{self.bits}"
        return name if self.lanes == 1 else f"{name}x{self.lanes}"

    @property
    def scalar(self) -> DType:
        return self.with_lanes(1)

    def with_lanes(self, lanes: int) -> DType:
        return self if lanes == self.lanes else replace(self, lanes=lanes)

    @property
    def bytes(self) -> int:
        """Bytes of one lane in memory."""
        return self.bits // 8

    @property
    def is_float(self) -> bool:
        return self.kind == "float"

    @property
    def is_integer(self) -> bool:
        return self.kind in ("int", "uint")

    @property
    def is_signed(self) -> bool:
        return self.kind == "int"


BOOL = DType("bool", 8)
I8, I32, I64 = DType("int", 8), DType("int", 32), DType("int", 64)
U8, U16, U32, U64 = DType("uint", 8), DType("uint", 16), DType("uint", 32), DType("uint", 64)
F16, F32, F64 = DType("float", 16), DType("float", 32), DType("float", 64)


@cache
def widths(lanes: int) -> tuple[int, ...]:
    """Lanes of each part of a vector: fours, then what is left."""
    full, rest = divmod(lanes, PART_LANES)
    return (PART_LANES,) * full + ((rest,) if rest else ())


def from_tvm(dtype: Any) -> DType | None:
    """The DType of a TVM dtype; None where it has none here (void, handles, float8, …)."""
    return _known(dtype.type_code, dtype.bits, dtype.lanes)


@cache
def _known(code: int, bits: int, lanes: int) -> DType | None:
    kind = _KINDS.get(code)
    if kind == "uint" and bits == 1:  # how older passes spell bool
        kind, bits = "bool", 8
    # A scalable vector has negative lanes.
    if kind is None or bits not in _BITS[kind] or lanes < 1:
        return None
    return DType(kind, bits, lanes)


@dataclass(frozen=True)
class Value:
    """A TIR value in SSA form: one id for each part of its lanes (`widths`)."""

    dtype: DType
    parts: tuple[int, ...]

    @property
    def id(self) -> int:
        """The only id of a value of at most four lanes."""
        (part,) = self.parts
        return part
