"""NVIDIA's machine code: parsed, and followed as one decoded token takes it, to count instructions.

Only what steers a thread is computed: integers, predicates, votes. A warp's lanes go on at the
least of their addresses, so that they meet again where branches do. What is followed is a block's
every warp, of block 0, with these data:

- each argument is 1, a size and an address alike: one token. Of experts, block 0 has the first.
- word i of every array is the number i: the experts that the router chose differ.
- floats are 1.0, sums of tensor cores and shared memory 0: division and square roots take the
  usual way, not that of denormals.

An instruction without a rule is an error, where it is met.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LANES = 32
ONE = np.uint64(0x3F800000)  # the bits of 1.0
WORD = np.uint64(0xFFFFFFFF)
MOST = 100_000  # instructions of a warp


@dataclass(frozen=True)
class Instruction:
    """`guard` is the predicate that it stands under, or ""; `target` the address that a branch
    goes to."""

    address: int
    guard: str
    opcode: str
    operands: tuple[str, ...]
    target: int | None


@dataclass(frozen=True)
class Followed:
    """What the warps of a block executed: instructions; and bytes that its lanes loaded 16 at a
    time past L1, which is how weights are read."""

    instructions: int
    weight_bytes: int


class NoRuleError(Exception):
    """An instruction that steers a thread in a way that is not known here."""


# nvcc writes a jump to afar as a call that never comes back.
_JUMPS = ("BRA", "CALL.REL.NOINC")
_INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.x]*)([^;]*);", re.MULTILINE
)


def functions(sass: str) -> Iterator[tuple[str, list[Instruction]]]:
    """The instructions of each function, without the padding."""
    parts = re.split(r"^\s*Function : (\S+)$", sass, flags=re.MULTILINE)[1:]
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        found = []
        for address, guard, opcode, rest in _INSTRUCTION.findall(text):
            jumps = opcode.startswith(_JUMPS)
            target = re.search(r"0x([0-9a-f]+)\s*$", rest) if jumps else None
            if opcode != "NOP":
                operands = tuple(part.strip() for part in rest.split(",") if part.strip())
                to = int(target[1], 16) if target else None
                found.append(Instruction(int(address, 16), guard, opcode, operands, to))
        yield name, found


# A factor that only scales of 128 and more ask for: 2^126 (schedules/cuda/mxfp4.py).
_SELDOM = re.compile(r"^8\.507059\d*e\+37$")
MATRIX = ("HMMA", "IMMA", "QMMA")  # tensor cores
_BEYOND = ("HGMMA", "LD", "ST", "BAR", "DEPBAR", "BRA", "EXIT")  # more than computing


def matrix_share(code: Sequence[Instruction]) -> float | None:
    """The part of the main loop that is of tensor cores. None where no loop has any."""
    loop = main_loop(code, MATRIX)
    matrix = sum(code[i].opcode.startswith(MATRIX) for i in loop)
    return round(matrix / len(loop), 3) if loop else None


def main_loop(code: Sequence[Instruction], matrix: tuple[str, ...]) -> list[int]:
    """Which instructions the loop has that has most of some kinds, or none.

    Not counted is what is seldom taken: what runs from one jump to the next, or to where one leads,
    and multiplies by 2^126, as no real weight asks for; and what a jump leads over that only
    computes, but for products of matrices.
    """
    addresses = [one.address for one in code]
    best: list[int] = []
    most = 0
    for end, one in enumerate(code):
        if one.target is None or one.target > one.address:
            continue
        begin = bisect_left(addresses, one.target)
        loop = [i for run in _runs(code, begin, end + 1) for i in run]
        count = sum(code[i].opcode.startswith(matrix) for i in loop)
        if count > most:
            best, most = loop, count
    return best


def _runs(code: Sequence[Instruction], begin: int, end: int) -> Iterator[range]:
    """The instructions from `begin` on, in runs that only their first enters and their last leaves,
    but for those that are seldom taken."""
    targets = {one.target for one in code[begin:end] if one.target is not None}
    first = begin
    for i in range(begin, end):
        if i + 1 == end or code[i].target is not None or code[i + 1].address in targets:
            run = range(first, i + 1)
            scales = any(_SELDOM.match(operand) for j in run for operand in code[j].operands)
            if not scales and not _led_over(code, run):
                yield run
            first = i + 1


def _led_over(code: Sequence[Instruction], run: range) -> bool:
    """Whether a jump over just this run comes before it, and it only computes."""
    before = code[run.start - 1] if run.start else None
    if before is None or not before.guard or run.stop == len(code):
        return False
    over = before.target == code[run.stop].address
    return over and not any(code[i].opcode.startswith((*MATRIX, *_BEYOND)) for i in run)


def follow(code: Sequence[Instruction], threads: int) -> Followed:
    """What a block of so many threads executes for one token."""
    done = [_Warp(code, first).run() for first in range(0, threads, LANES)]
    return Followed(sum(d.instructions for d in done), sum(d.weight_bytes for d in done))


# -- one warp -------------------------------------------------------------------------------------


class _Warp:
    """Registers hold a word of each lane, in 64 bits; uniform ones the same word in all."""

    def __init__(self, code: Sequence[Instruction], first_thread: int) -> None:
        self._code = code
        self._addresses = [instruction.address for instruction in code]
        self._registers: dict[str, np.ndarray] = {}
        self._predicates: dict[str, np.ndarray] = {}
        self._first = np.uint64(first_thread)
        self._active = np.ones(LANES, bool)

    def run(self) -> Followed:
        at = np.zeros(LANES, np.int64)  # of each lane, what comes next; -1 behind the end
        instructions = weight_bytes = 0
        while (at >= 0).any():
            place = at[at >= 0].min()
            one = self._code[place]
            here = at == place
            self._active = here & self.predicate(one.guard or "PT")
            instructions += 1
            if instructions > MOST:
                raise NoRuleError(f"a warp executes more than {MOST} instructions")
            at[here] = self._place_after(place)
            if one.opcode.startswith(("LDG", "LD.")) and ".NA" in one.opcode:
                weight_bytes += 16 * int(self._active.sum()) * (".128" in one.opcode)
            if one.opcode == "EXIT":
                at[self._active] = -1
            elif one.opcode.startswith(_JUMPS):
                taken = self._active
                for condition in one.operands[:-1]:
                    taken = taken & self.predicate(condition)
                assert one.target is not None
                at[taken] = bisect_left(self._addresses, one.target)  # of padding, what follows
            elif self._active.any():
                self._execute(one)
        return Followed(instructions, weight_bytes)

    def _place_after(self, place: int) -> int:
        return place + 1 if place + 1 < len(self._code) else -1

    def _execute(self, one: Instruction) -> None:
        name, *modifiers = one.opcode.split(".")
        if name in _NOTHING:
            return
        for known in (one.opcode, name):
            if known in _FLOATS:
                self._execute_float(one, known)
                return
        rule = _RULES.get(name.removeprefix("U") if name not in _RULES else name)
        if rule is None:
            raise NoRuleError(f"{one.opcode} at {one.address:#x}")
        rule(self, modifiers, list(one.operands))

    def _execute_float(self, one: Instruction, name: str) -> None:
        """1.0 for a number, no for a question; nothing of tensor cores."""
        for operand in one.operands[:2] if name in ("FSETP", "FCHK") else one.operands[:1]:
            if re.fullmatch(r"P\d|PT", operand):
                self.set_predicate(operand, np.zeros(LANES, bool))
            else:
                width = _FLOATS[name]
                for i in range(width):
                    self.write(operand, np.uint64(0) if width == 4 else ONE, i)

    # -- operands --

    def read(self, operand: str, word: int = 0) -> np.ndarray:
        """A register, the one `word` after it, an argument or a number; uint64 below 2^32."""
        operand = operand.replace(".reuse", "")
        if operand[0] in "-~" and not operand[1].isdigit():
            value = self.read(operand[1:], word)
            return (~value if operand[0] == "~" else -value.astype(np.int64).view(np.uint64)) & WORD
        if register := re.fullmatch(r"(U?R)(\d+|Z)(\.64|\.U32|\.X\d+)?", operand):
            kind, number = register[1], register[2]
            if number == "Z":
                return np.zeros(LANES, np.uint64)
            return self._registers.get(f"{kind}{int(number) + word}", np.zeros(LANES, np.uint64))
        if constant := re.search(r"^cx?\[\S+\]\[(0x[0-9a-f]+)\]$", operand):
            is_low = (int(constant[1], 16) + 4 * word) % 8 == 0
            return np.full(LANES, int(is_low), np.uint64)
        if re.fullmatch(r"-?0x[0-9a-f]+", operand):
            value = int(operand, 16)
            return np.full(LANES, (value >> (32 * word)) % 2**32, np.uint64)
        raise NoRuleError(f"operand {operand}")

    def signed(self, operand: str) -> np.ndarray:
        return self.read(operand).astype(np.uint32).view(np.int32).astype(np.int64)

    def pair(self, operand: str) -> np.ndarray:
        return self.read(operand) | self.read(operand, 1) << np.uint64(32)

    def write(self, operand: str, value: Any, word: int = 0) -> None:
        register = re.fullmatch(r"(U?R)(\d+|Z)", operand)
        if register is None:
            raise NoRuleError(f"a result in {operand}")
        if register[2] != "Z":
            name = f"{register[1]}{int(register[2]) + word}"
            before = self._registers.get(name, np.zeros(LANES, np.uint64))
            value = np.broadcast_to(np.asarray(value).astype(np.uint64) & WORD, LANES)
            self._registers[name] = np.where(self._active, value, before)

    def write_pair(self, operand: str, value: np.ndarray) -> None:
        self.write(operand, value)
        self.write(operand, value >> np.uint64(32), 1)

    def predicate(self, operand: str) -> np.ndarray:
        if operand.startswith("!"):
            return ~self.predicate(operand[1:])
        if operand in ("PT", "UPT"):
            return np.ones(LANES, bool)
        return self._predicates.get(operand, np.zeros(LANES, bool))

    def set_predicate(self, operand: str, value: np.ndarray) -> None:
        if operand not in ("PT", "UPT"):
            before = self.predicate(operand)
            self._predicates[operand] = np.where(self._active, value, before)

    @property
    def active(self) -> np.ndarray:
        return self._active

    @property
    def threads(self) -> np.ndarray:
        return self._first + np.arange(LANES, dtype=np.uint64)


# -- rules ----------------------------------------------------------------------------------------

# (warp, what follows the opcode's name, operands): the results of an instruction
Rule = Callable[[_Warp, list[str], list[str]], None]
# What changes nothing that steers a thread.
_NOTHING = frozenset(
    {"BSSY", "BSYNC", "BAR", "WARPSYNC", "PREEXIT", "ACQBULK", "STS", "STG", "STL", "ST",
     "DEPBAR", "MEMBAR", "ERRBAR", "LDGDEPBAR", "LDGSTS", "CCTL"}
)  # fmt: skip
# Results that are floats, or numbers made of them: how many registers. Products of pairs are those
# of bfloat16 only: by those of float16 nvcc moves constants.
_FLOATS = {
    "FADD": 1, "FMUL": 1, "FFMA": 1, "MUFU": 1, "FSETP": 1, "FSEL": 1, "FMNMX": 1, "FCHK": 1,
    "I2F": 1, "I2FP": 1, "F2FP": 1, "F2F": 1, "HADD2": 1, "F2I": 1,
    "HFMA2.BF16_V2": 1, "HMUL2.BF16_V2": 1, **dict.fromkeys(MATRIX, 4),
}  # fmt: skip


def _is_predicate(operand: str) -> bool:
    return re.fullmatch(r"!?U?P(\d|T)", operand) is not None


def _split(operands: list[str]) -> tuple[str, list[str], list[str], list[str]]:
    """Result, predicates that are results, values, predicates that are read."""
    result, rest = operands[0], operands[1:]
    out = [operand for i, operand in enumerate(rest) if all(map(_is_predicate, rest[: i + 1]))]
    values = [operand for operand in rest if not _is_predicate(operand)]
    asked = [operand for operand in rest[len(out) :] if _is_predicate(operand)]
    return result, out, values, asked


def _move(warp: _Warp, modifiers: list[str], operands: list[str]) -> None:
    for word in range(2 if "64" in modifiers else 1):
        warp.write(operands[0], warp.read(operands[1], word), word)


def _clear(warp: _Warp, modifiers: list[str], operands: list[str]) -> None:
    for word in range(1 if "32" in modifiers else 2):
        warp.write(operands[0], np.zeros(LANES), word)


def _special(warp: _Warp, _modifiers: list[str], operands: list[str]) -> None:
    of_thread = {"SR_TID.X": warp.threads, "SR_LANEID": np.arange(LANES)}
    warp.write(operands[0], of_thread.get(operands[1], np.zeros(LANES)))


def _multiply(warp: _Warp, modifiers: list[str], operands: list[str]) -> None:
    result, out, (a, b, c), carry = _split(operands)
    wide, high = "WIDE" in modifiers, "HI" in modifiers
    if wide or high:
        read = warp.read if "U32" in modifiers else warp.signed
        product = read(a).astype(np.int64) * read(b).astype(np.int64)
        total = product.view(np.uint64) + (
            warp.pair(c) if c[0] != "-" else np.uint64(0) - warp.pair(c[1:])
        )
        for one in out:
            warp.set_predicate(one, total < product.view(np.uint64))
    else:
        total = warp.read(a) * warp.read(b) + warp.read(c)
    if "X" in modifiers:
        total = total + warp.predicate(carry[0]).astype(np.uint64)
    if wide:
        warp.write_pair(result, total)
    else:
        warp.write(result, total >> np.uint64(32) if high else total)


def _add(warp: _Warp, modifiers: list[str], operands: list[str]) -> None:
    result, out, values, carries = _split(operands)
    total = np.zeros(LANES, np.uint64)
    for value in values:
        # -a is ~a + 1: what is carried tells it from 0
        zero = (value[0] == "-") & (warp.read(value) == 0)
        total = total + warp.read(value) + (zero.astype(np.uint64) << np.uint64(32))
    if "X" in modifiers:
        for carry in carries:
            total = total + warp.predicate(carry).astype(np.uint64)
    for one in out:
        warp.set_predicate(one, total > WORD)
    warp.write(result, total)


def _shifted_add(warp: _Warp, modifiers: list[str], operands: list[str]) -> None:
    result, out, values, carries = _split(operands)
    shift = warp.read(values[-1])
    a, b = values[:2]
    if "HI" not in modifiers:
        shifted = warp.read(a) << shift & WORD
    elif "SX32" in modifiers:
        shifted = (warp.signed(a) << shift.astype(np.int64) >> np.int64(32)).view(np.uint64) & WORD
    else:
        both = warp.read(a) | warp.read(values[2]) << np.uint64(32)
        shifted = both << shift >> np.uint64(32)
    total = shifted + warp.read(b)
    if "X" in modifiers:
        total = total + warp.predicate(carries[0]).astype(np.uint64)
    for one in out:
        warp.set_predicate(one, total > WORD)
    warp.write(result, total)


def _shift(warp: _Warp, modifiers: list[str], operands: list[str]) -> None:
    result, low, by, high = operands
    is_signed = modifiers[1][0] == "S"
    wide = modifiers[1][1:] == "64"
    amount = np.minimum(warp.read(by), np.uint64(63 if wide else 32))
    both = warp.read(low) | warp.read(high) << np.uint64(32)
    if modifiers[0] == "L":
        both = both << amount
    elif is_signed:
        both = (both.view(np.int64) >> amount.astype(np.int64)).view(np.uint64)
    else:
        both = both >> amount
    warp.write(result, both >> np.uint64(32) if "HI" in modifiers else both)


def _table(code: int, values: Sequence[np.ndarray], ones: Any) -> np.ndarray:
    """A function of three bits, by its table."""
    found = values[0] & ~values[0]
    for row in range(8):
        if code >> row & 1:
            term = ones
            for i, value in enumerate(values):
                term = term & (value if row >> (2 - i) & 1 else ~value)
            found = found | term
    return found


def _logic(warp: _Warp, _modifiers: list[str], operands: list[str]) -> None:
    out = [operand for operand in operands[:1] if _is_predicate(operand)]
    result, *values, code, _ = operands[len(out) :]
    found = _table(int(code, 16), [warp.read(value) for value in values], WORD)
    for one in out:
        warp.set_predicate(one, found != 0)
    warp.write(result, found)


def _predicate_logic(warp: _Warp, _modifiers: list[str], operands: list[str]) -> None:
    first, second, a, b, c, *codes = operands
    values = [warp.predicate(operand) for operand in (a, b, c)]
    for result, code in zip((first, second), codes, strict=True):
        warp.set_predicate(result, _table(int(code, 16), values, np.ones(LANES, bool)))


_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "EQ": np.equal, "NE": np.not_equal, "LT": np.less, "LE": np.less_equal, "GT": np.greater,
    "GE": np.greater_equal,
}  # fmt: skip


def _compare(warp: _Warp, modifiers: list[str], operands: list[str]) -> None:
    first, second, a, b, *asked = operands
    read = warp.read if "U32" in modifiers else warp.signed
    found = _COMPARE[modifiers[0]](read(a), read(b))
    if "EX" in modifiers:  # the high words; that of the low ones counts where these are equal
        found = np.where(read(a) == read(b), warp.predicate(asked[1]), found)
    other = warp.predicate(asked[0])
    combine = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}[
        next(modifier for modifier in modifiers if modifier in ("AND", "OR", "XOR"))
    ]
    warp.set_predicate(first, combine(found, other))
    warp.set_predicate(second, combine(~found, other))


def _select(warp: _Warp, _modifiers: list[str], operands: list[str]) -> None:
    result, a, b, condition = operands
    warp.write(result, np.where(warp.predicate(condition), warp.read(a), warp.read(b)))


def _least(warp: _Warp, modifiers: list[str], operands: list[str]) -> None:
    """The least, or the greatest, of two or three."""
    result, _, values, (least,) = _split(operands)
    read = warp.read if "U32" in modifiers else warp.signed
    numbers = [read(value) for value in values]
    low, high = np.minimum.reduce(numbers), np.maximum.reduce(numbers)
    warp.write(result, np.where(warp.predicate(least), low, high))


def _sum_or_least(warp: _Warp, modifiers: list[str], operands: list[str]) -> None:
    result, a, b, c, least = operands
    read = warp.read if "U32" in modifiers else warp.signed
    total = read(a) + read(b)
    low, high = np.minimum(total, read(c)), np.maximum(total, read(c))
    warp.write(result, np.where(warp.predicate(least), low, high))


def _bytes(warp: _Warp, _modifiers: list[str], operands: list[str]) -> None:
    result, low, selector, high = operands
    both = warp.read(low) | warp.read(high) << np.uint64(32)
    chosen, found = warp.read(selector), np.zeros(LANES, np.uint64)
    for i in range(4):
        byte = both >> ((chosen >> np.uint64(4 * i) & np.uint64(7)) * np.uint64(8))
        found = found | (byte & np.uint64(0xFF)) << np.uint64(8 * i)
    warp.write(result, found)


def _count_bits(warp: _Warp, _modifiers: list[str], operands: list[str]) -> None:
    warp.write(operands[0], np.array([int(value).bit_count() for value in warp.read(operands[1])]))


def _vote(warp: _Warp, _modifiers: list[str], operands: list[str]) -> None:
    votes = warp.predicate(operands[2]) & warp.active
    warp.write(operands[0], np.full(LANES, int((votes << np.arange(LANES)).sum()), np.uint64))


def _reduce(warp: _Warp, modifiers: list[str], operands: list[str]) -> None:
    read = warp.signed if "S32" in modifiers else warp.read
    reduce = {"MIN": np.min, "MAX": np.max, "SUM": np.sum, "OR": np.bitwise_or.reduce}
    kind = modifiers[0] if modifiers[0] in reduce else "SUM"
    warp.write(operands[0], np.full(LANES, reduce[kind](read(operands[1])[warp.active])))


def _shuffle(warp: _Warp, modifiers: list[str], operands: list[str]) -> None:
    _, result, value, lane, _ = operands
    by = warp.read(lane).astype(np.int64)
    source = np.arange(LANES) ^ by if modifiers[0] == "BFLY" else by
    if modifiers[0] not in ("BFLY", "IDX"):
        raise NoRuleError(f"SHFL.{modifiers[0]}")
    warp.write(result, warp.read(value)[source % LANES])


def _load(warp: _Warp, modifiers: list[str], operands: list[str]) -> None:
    """Word i of an array is i; an address has the word's number, times four, in its low word."""
    result, address = operands[0], operands[-1]
    terms = re.sub(r"^desc\[\w+\]|[\[\]]", "", address).split("+")
    low = sum((warp.read(term) for term in terms), start=np.zeros(LANES, np.uint64)) & WORD
    for word in range({"64": 2, "128": 4}.get(next((m for m in modifiers if m.isdigit()), ""), 1)):
        warp.write(result, low // np.uint64(4) + np.uint64(word), word)


def _load_nothing(warp: _Warp, modifiers: list[str], operands: list[str]) -> None:
    for word in range({"64": 2, "128": 4}.get(next((m for m in modifiers if m.isdigit()), ""), 1)):
        warp.write(operands[0], np.zeros(LANES), word)


def _predicates_to_register(warp: _Warp, modifiers: list[str], operands: list[str]) -> None:
    result, _, kept, mask = operands
    place = np.uint64(8 * int(next((m[1] for m in modifiers if m[0] == "B"), "0")))
    bits = sum(warp.predicate(f"P{i}").astype(np.uint64) << np.uint64(i) for i in range(7))
    chosen = warp.read(mask)
    found = (bits & chosen) << place
    warp.write(result, warp.read(kept) & ~(chosen << place) | found)


def _register_to_predicates(warp: _Warp, _modifiers: list[str], operands: list[str]) -> None:
    register, _, byte = operands[1].partition(".B")
    bits = warp.read(register) >> np.uint64(8 * int(byte or 0))
    for i in range(7):
        if int(operands[2], 16) >> i & 1:
            warp.set_predicate(f"P{i}", bits >> np.uint64(i) & np.uint64(1) == 1)


_RULES: dict[str, Rule] = {
    "MOV": _move, "LDC": _move, "CS2R": _clear, "S2R": _special, "S2UR": _special, "R2UR": _move,
    "IMAD": _multiply, "IADD3": _add, "VIADD": _add, "LEA": _shifted_add, "SHF": _shift,
    "LOP3": _logic, "PLOP3": _predicate_logic, "ISETP": _compare, "SEL": _select,
    "IMNMX": _least, "VIMNMX": _least, "VIMNMX3": _least, "VIADDMNMX": _sum_or_least,
    "PRMT": _bytes, "POPC": _count_bits, "VOTE": _vote, "VOTEU": _vote, "REDUX": _reduce,
    "P2R": _predicates_to_register, "R2P": _register_to_predicates, "SHFL": _shuffle,
    "LDG": _load, "LD": _load, "LDS": _load_nothing, "LDL": _load_nothing,
}  # fmt: skip
