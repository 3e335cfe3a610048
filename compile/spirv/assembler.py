"""Words of one SPIR-V module: ids, the sections in their order, nothing declared twice.

The assembler knows the binary form and no semantics: what an instruction means, which types its
operands have and when a capability is needed is the business of the rooms above.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Iterator

from .encoding import (
    ADDRESSING_PHYSICAL_STORAGE_BUFFER_64,
    EXECUTION_MODE_LOCAL_SIZE,
    EXECUTION_MODEL_GL_COMPUTE,
    MAGIC,
    MEMORY_GLSL450,
    MEMORY_VULKAN,
    VERSION,
    Capability,
    Decoration,
    Op,
)

Instruction = tuple[int, list[int]]  # opcode, operands
GENERATOR = 0  # not in Khronos' registry


class Assembler:
    """Collects instructions section by section; `assemble` puts them in the order SPIR-V wants."""

    def __init__(self) -> None:
        self._bound = 1
        self._glsl = 0
        self.capabilities: set[Capability] = set()
        self.extensions: set[str] = set()
        self._names: list[int] = []
        self._decorations: list[int] = []
        self._declarations: list[int] = []
        self._declared: dict[tuple[int, ...], int] = {}
        self._interface: list[int] = []
        self._variables: list[int] = []
        self.body: list[int] = []

    def fresh(self) -> int:
        """An id that nothing else has."""
        self._bound += 1
        return self._bound - 1

    def emit(self, op: Op, *operands: int) -> None:
        """Append an instruction without a result to the function's body."""
        self.body.append((len(operands) + 1) << 16 | op)
        self.body.extend(operands)

    def value(self, op: Op, type_id: int, *operands: int) -> int:
        """Append an instruction with a result to the function's body; its id."""
        result = self.fresh()
        self.body.append((len(operands) + 3) << 16 | op)
        self.body.append(type_id)
        self.body.append(result)
        self.body.extend(operands)
        return result

    def type(self, op: Op, *operands: int, distinct: bool = False) -> int:
        """A type's id; equal types are one, except where `distinct` (decorated ones) asks."""
        key = (op, *operands)
        if not distinct and key in self._declared:
            return self._declared[key]
        result = self.fresh()
        _append(self._declarations, op, result, *operands)
        if not distinct:
            self._declared[key] = result
        return result

    def constant(self, op: Op, type_id: int, *operands: int, distinct: bool = False) -> int:
        """A constant's id; equal constants are one, except where `distinct` asks."""
        key = (op, type_id, *operands)
        if not distinct and key in self._declared:
            return self._declared[key]
        result = self.fresh()
        _append(self._declarations, op, type_id, result, *operands)
        if not distinct:
            self._declared[key] = result
        return result

    def define_constant(self, result: int, op: Op, type_id: int, *operands: int) -> None:
        """Give an id that the body uses already its constant value."""
        _append(self._declarations, op, type_id, result, *operands)

    def global_variable(self, pointer_type: int, storage_class: int) -> int:
        """A variable outside the function; SPIR-V 1.5 lists all of them at the entry point."""
        result = self.fresh()
        _append(self._declarations, Op.VARIABLE, pointer_type, result, storage_class)
        self._interface.append(result)
        return result

    def local_variable(self, pointer_type: int, storage_class: int) -> int:
        """A variable of the function, whatever block the body is in."""
        result = self.fresh()
        _append(self._variables, Op.VARIABLE, pointer_type, result, storage_class)
        return result

    def glsl(self) -> int:
        """The id of the imported instruction set GLSL.std.450."""
        if not self._glsl:
            self._glsl = self.fresh()
        return self._glsl

    def name(self, target: int, text: str) -> None:
        """A name for disassemblers and debuggers."""
        _append(self._names, Op.NAME, target, *_string(text))

    def decorate(self, target: int, decoration: Decoration, *literals: int) -> None:
        _append(self._decorations, Op.DECORATE, target, decoration, *literals)

    def decorate_member(
        self, target: int, member: int, decoration: Decoration, *literals: int
    ) -> None:
        _append(self._decorations, Op.MEMBER_DECORATE, target, member, decoration, *literals)

    def declarations(self) -> Iterator[Instruction]:
        """Types, constants and variables, so far."""
        return _instructions(self._declarations)

    def instructions(self) -> Iterator[Instruction]:
        """The body, so far."""
        return _instructions(self.body)

    def assemble(self, local_size: tuple[int, int, int] | None) -> bytes:
        """The module's bytes, little-endian: one entry point, "main", whose body is `body`.

        `local_size` None: the decoration WorkgroupSize on a constant says it.
        """
        void = self.type(Op.TYPE_VOID)
        function_type = self.type(Op.TYPE_FUNCTION, void)
        main, entry = self.fresh(), self.fresh()
        words: list[int] = []
        for capability in sorted(self.capabilities):
            _append(words, Op.CAPABILITY, capability)
        for extension in sorted(self.extensions):
            _append(words, Op.EXTENSION, *_string(extension))
        if self._glsl:
            _append(words, Op.EXT_INST_IMPORT, self._glsl, *_string("GLSL.std.450"))
        is_vulkan = Capability.VULKAN_MEMORY_MODEL in self.capabilities
        memory = MEMORY_VULKAN if is_vulkan else MEMORY_GLSL450
        _append(words, Op.MEMORY_MODEL, ADDRESSING_PHYSICAL_STORAGE_BUFFER_64, memory)
        _append(
            words,
            Op.ENTRY_POINT,
            EXECUTION_MODEL_GL_COMPUTE,
            main,
            *_string("main"),
            *self._interface,
        )
        if local_size is not None:
            _append(words, Op.EXECUTION_MODE, main, EXECUTION_MODE_LOCAL_SIZE, *local_size)
        words += self._names + self._decorations + self._declarations
        _append(words, Op.FUNCTION, void, main, 0, function_type)
        _append(words, Op.LABEL, entry)
        words += self._variables + self.body
        _append(words, Op.FUNCTION_END)
        header = struct.pack("<5I", MAGIC, VERSION, GENERATOR, self._bound, 0)
        code = array("I", words)
        if code.itemsize != 4 or struct.pack("=I", 1) != struct.pack("<I", 1):
            return header + struct.pack(f"<{len(words)}I", *words)
        return header + code.tobytes()


def _instructions(section: list[int]) -> Iterator[Instruction]:
    at = 0
    while at < len(section):
        words = section[at] >> 16
        yield section[at] & 0xFFFF, section[at + 1 : at + words]
        at += words


def _append(section: list[int], op: Op, *operands: int) -> None:
    section.append((len(operands) + 1) << 16 | op)
    section.extend(operands)


def _string(text: str) -> Iterable[int]:
    """UTF-8, terminated by zero, in words of four bytes."""
    data = text.encode() + b"\0"
    data += b"\0" * (-len(data) % 4)
    return struct.unpack(f"<{len(data) // 4}I", data)
