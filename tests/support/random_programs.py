"""Random programs for the differential test: one specification, written out in two forms.

A program is a grid of blocks of threads that read inputs, keep local values, exchange values
through shared memory between barriers, and write outputs. Its specification is made of functions
from a form (program_forms.py) to TIR: `Threaded` binds blocks and threads and writes barriers;
`Serial` has loops in their place, a thread's locals become arrays over the threads of a block, and
each phase between barriers is a loop of its own. The first form runs on Vulkan, the second on the
CPU; what they write must be the same bits.

So that it must, nothing is written whose result is left open: every integer expression carries
the range it lies in and is reduced before it would leave its dtype's; floats are rounded at each
step, never divided, kept small, and never NaN.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from support.program_forms import Argument, Form, Own, Shared, Stmt, Threaded, write_all
from support.ranged import (
    FLOATS,
    INTEGERS,
    NUMBERS,
    SIGNED,
    STORED,
    UNSIGNED,
    Expr,
    cast,
    combine,
    limits,
    literal,
    modulo,
    stored,
)  # fmt: skip
from tvm import tirx
from tvm.tirx import stmt as tir

_ELEMENTS = 8  # of a local array


class Program:
    """What a seed makes."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.name = f"program{seed}"
        self.rng = rng = random.Random(seed)
        self.block = rng.choice(((1, 1), (8, 1), (31, 1), (32, 1), (64, 1), (4, 4), (5, 3)))
        self.grid = rng.choice(((1, 1), (2, 1), (7, 1), (3, 2)))
        self.threads = self.block[0] * self.block[1]
        self.total = self.threads * self.grid[0] * self.grid[1]
        # A number of blocks known only at launch.
        self.scalars = [("blocks", "int32", self.grid[0])] if rng.random() < 0.3 else []
        for dtype in rng.choices((*SIGNED, "float32"), k=rng.choice((0, 0, 1, 2))):
            self.scalars.append((f"a{len(self.scalars)}", dtype, rng.randint(-90, 90)))
        names = ("tx", "ty", "bx", "by")
        extents = (*self.block, *self.grid)
        self.indices = [
            (name, "blocks" if name == "bx" and self.is_open else extent)
            for name, extent in zip(names, extents, strict=True)
            if extent > 1 or name in ("tx", "bx")
        ]
        self.width = rng.choice((1, 1, 1, 2, 4, 8))  # elements of an output that a thread writes
        self.inputs = [
            Argument(
                f"A{i}",
                rng.choice(NUMBERS),
                rng.choice((1, 7, 64, 130, self.total * self.width)),
                rng.random() < 0.2,
            )
            for i in range(rng.randint(1, 3))
        ]
        self.outputs = [
            Argument(f"O{i}", rng.choice(NUMBERS), self.total * self.width)
            for i in range(rng.randint(1, 2))
        ]
        dtypes = ["int32", "float32", *rng.choices((*NUMBERS, "bool"), k=rng.randint(1, 3))]
        self.locals = [Own(f"x{i}", dtype) for i, dtype in enumerate(dtypes)]
        self.arrays = [Own("v0", rng.choice(NUMBERS), _ELEMENTS)]
        self.owned = [*self.locals, *self.arrays]  # and, as they come, the counters of loops
        self.shared = [Shared(f"s{i}", rng.choice(NUMBERS)) for i in range(2)]
        self._readable: Shared | None = None
        self._counters: list[Expr] = []
        self._names = 0
        self._parts = [self._phase() for _ in range(rng.randint(1, 2))]
        if rng.random() < 0.3:
            self._parts.append(self._group())
        if rng.random() < 0.3:
            self._parts.append(self._reduction())
        self._parts.append(self._last())

    @property
    def is_open(self) -> bool:
        return any(name == "blocks" for name, _, _ in self.scalars)

    # What the forms ask for

    def extent(self, form: Form, extent: int | str) -> Any:
        return form.variables[extent] if isinstance(extent, str) else tirx.const(extent, "int32")

    def thread(self, form: Form) -> Any:
        """A thread's number in its block."""
        tx, ty = form.variables["tx"], form.variables.get("ty")
        return tx if ty is None else ty * self.block[0] + tx

    def place(self, form: Form) -> Any:
        """A thread's number in the grid."""
        bx, by = form.variables["bx"], form.variables.get("by")
        number = bx if by is None else by * self.grid[0] + bx
        return number * self.threads + self.thread(form)

    def body(self, form: Form) -> list[Any]:
        """The statements of a block."""
        cleared = [self._cleared(memory) for memory in self.owned]
        cleared += [self._cleared_shared(array) for array in self.shared]
        lines = form.phase(cleared)
        for part in self._parts:
            lines += part(form)
        return lines

    def _cleared(self, memory: Own) -> Stmt:
        def write(form: Form) -> Any:
            i = tirx.Var("i", "int32")
            store = form.store(memory.name, form.own(memory, i), _zero(memory.dtype))
            return tir.For(i, 0, memory.size, tir.ForKind.SERIAL, store)

        return write

    def _cleared_shared(self, array: Shared) -> Stmt:
        return lambda form: form.store(array.name, self.thread(form), _zero(array.dtype))

    def data(self) -> list[np.ndarray]:
        """The inputs."""
        rng = np.random.default_rng(self.seed)
        arrays = []
        for argument in self.inputs:
            if argument.dtype in FLOATS:
                array = rng.integers(-800, 800, argument.size) / 8
            else:
                low, high = STORED[argument.dtype]
                wide = rng.integers(low, high, argument.size, endpoint=True)
                small = rng.integers(max(low, -100), 100, argument.size)
                array = np.where(rng.random(argument.size) < 0.5, small, wide)
            arrays.append(array.astype(argument.dtype))
        return arrays

    def __str__(self) -> str:
        return f"seed {self.seed}:\n{Threaded(self).function().script()}"

    # Phases: lists of statements of a form

    def _phase(self) -> Callable[[Form], list[Any]]:
        """Statements of every thread between two barriers: a store to one shared array, and
        reads of the other one."""
        written, self._readable = self.rng.sample(self.shared, 2)
        lines = self._statements(self.rng.randint(1, 3), 2)
        value = stored(self._any(2), written.dtype)
        lines.append(lambda form: form.store(written.name, self.thread(form), value.write(form)))
        return lambda form: form.phase(lines)

    def _group(self) -> Callable[[Form], list[Any]]:
        """Phases that all threads of a block repeat, or leave out."""
        phases = [self._phase(), self._phase()]
        times = self.rng.randint(1, 3)

        def repeated(form: Form) -> list[Any]:
            lines = [line for phase in phases for line in phase(form)]
            counter = tirx.Var("r", "int32")
            return [tir.For(counter, 0, times, tir.ForKind.SERIAL, tir.stmt_seq(*lines))]

        return repeated

    def _reduction(self) -> Callable[[Form], list[Any]]:
        """One shared array's sum, or least, or largest, as a tree."""
        array = self.rng.choice(self.shared)
        operator = self.rng.choice(("+", "min", "max"))
        steps, size = [], self.threads
        while size > 1:
            half = (size + 1) // 2
            steps.append((half, size - half))
            size = half

        def element(offset: int) -> Expr:
            write = lambda form: form.load(array.name, self.thread(form) + offset)  # noqa: E731
            return Expr(write, array.dtype, *STORED[array.dtype], varies=True)

        def step(half: int, active: int) -> Stmt:
            value = stored(combine(operator, element(0), element(half)), array.dtype)

            def write(form: Form) -> Any:
                store = form.store(array.name, self.thread(form), value.write(form))
                test = tirx.LT(self.thread(form), tirx.const(active, "int32"))
                return tir.IfThenElse(test, store, None)

            return write

        phases = [[step(half, active)] for half, active in steps]
        return lambda form: [line for lines in phases for line in form.phase(lines)]

    def _last(self) -> Callable[[Form], list[Any]]:
        self._readable = self.rng.choice(self.shared)
        lines = self._statements(self.rng.randint(1, 2), 2)
        lines += [self._output(out) for out in self.outputs]
        return lambda form: form.phase(lines)

    def _output(self, out: Argument) -> Stmt:
        if self.width == 1:
            value = stored(self._any(self._depth()), out.dtype)
            return lambda form: form.store(out.name, self.place(form), value.write(form))
        kind = self.rng.choice((tir.ForKind.VECTORIZED, tir.ForKind.VECTORIZED, tir.ForKind.SERIAL))
        lane = self._name("lane")
        with self._counting(_counter(lane, self.width)):
            value = stored(self._any(2), out.dtype)

        def write(form: Form) -> Any:
            variable = form.variables[lane] = tirx.Var(lane, "int32")
            index = self.place(form) * self.width + variable
            store = form.store(out.name, index, value.write(form))
            return tir.For(variable, 0, self.width, kind, store)

        return write

    # Statements

    def _statements(self, count: int, depth: int) -> list[Stmt]:
        """Some statements; what one of them binds is known to those after it."""
        known = len(self._counters)
        lines = [self._statement(depth) for _ in range(count)]
        del self._counters[known:]
        return lines

    def _statement(self, depth: int) -> Stmt:
        kinds = {"assign": 8, "element": 2, "vector": 2, "bind": 2}
        if depth > 0:
            kinds |= {"if": 3, "for": 2, "while": 1}
        kind = self.rng.choices(list(kinds), list(kinds.values()))[0]
        return {
            "assign": self._assign,
            "element": self._element,
            "vector": self._vector,
            "bind": self._bind,
            "if": lambda: self._if(depth - 1),
            "for": lambda: self._for(depth - 1),
            "while": lambda: self._while(depth - 1),
        }[kind]()

    def _assign(self) -> Stmt:
        return self._kept(self.rng.choice(self.locals), _index(0), self._any(self._depth()))

    def _element(self) -> Stmt:
        return self._kept(self.rng.choice(self.arrays), self._index(_ELEMENTS), self._any(1))

    def _kept(self, memory: Own, index: Expr, expr: Expr) -> Stmt:
        value = stored(expr, memory.dtype)
        return lambda form: form.store(
            memory.name, form.own(memory, index.write(form)), value.write(form)
        )

    def _bind(self) -> Stmt:
        value = cast(self._any(1), "int32")
        name = self._name("let")
        self._counters.append(_named(name, value.low, value.high, value.varies))

        def write(form: Form) -> Any:
            variable = form.variables[name] = tirx.Var(name, "int32")
            return tir.Bind(variable, value.write(form))

        return write

    def _vector(self) -> Stmt:
        """Some lanes of a local array at once, perhaps strided."""
        memory = self.rng.choice(self.arrays)
        lanes = self.rng.choice((2, 4, 8))
        stride = self.rng.choice((1, 1, 2)) if lanes < _ELEMENTS else 1
        begin = self.rng.randint(0, _ELEMENTS - lanes * stride)
        lane = self._name("lane")
        with self._counting(_counter(lane, lanes)):
            value = stored(self._any(2), memory.dtype)

        def write(form: Form) -> Any:
            variable = form.variables[lane] = tirx.Var(lane, "int32")
            index = form.own(memory, variable * stride + begin)
            store = form.store(memory.name, index, value.write(form))
            return tir.For(variable, 0, lanes, tir.ForKind.VECTORIZED, store)

        return write

    def _if(self, depth: int) -> Stmt:
        test = self._branch()
        then = self._statements(self.rng.randint(1, 2), depth)
        otherwise = self._statements(1, depth) if self.rng.random() < 0.5 else []

        def write(form: Form) -> Any:
            condition = test.write(form)
            yes = tir.stmt_seq(*write_all(form, then))
            no = tir.stmt_seq(*write_all(form, otherwise)) if otherwise else None
            return tir.IfThenElse(condition, yes, no)

        return write

    def _for(self, depth: int) -> Stmt:
        rng = self.rng
        times, name = rng.randint(1, 5), self._name("k")
        first, step = rng.choice(((0, 1), (0, 1), (2, 1), (1, 3)))
        kind = rng.choice((tir.ForKind.SERIAL, tir.ForKind.SERIAL, tir.ForKind.UNROLLED))
        if kind == tir.ForKind.UNROLLED:
            step = 1
        with self._counting(_named(name, 0, first + times)):
            body = self._statements(rng.randint(1, 2), depth)
            if kind == tir.ForKind.SERIAL and rng.random() < 0.25:
                body.insert(rng.randint(0, len(body)), self._leave())
        limit: Expr | None = None
        if rng.random() < 0.3 and kind == tir.ForKind.SERIAL:  # a number of times of its own
            limit = modulo(cast(self._any(1, shares=False), "int32"), times + 1)

        def write(form: Form) -> Any:
            extent = tirx.const(times, "int32") if limit is None else limit.write(form)
            variable = form.variables[name] = tirx.Var(name, "int32")
            inner = tir.stmt_seq(*write_all(form, body))
            return tir.For(variable, first, extent, kind, inner, step=None if step == 1 else step)

        return write

    def _leave(self) -> Stmt:
        """A jump out of, or on to the next round of, the innermost loop."""
        leave = self.rng.choice(("tirx.break_loop", "tirx.continue_loop"))
        jump = tir.Evaluate(tirx.call_intrin("void", leave))
        test = self._branch()
        return lambda form: tir.IfThenElse(test.write(form), jump, None)

    def _while(self, depth: int) -> Stmt:
        times = self.rng.randint(1, 5)
        memory = Own(self._name("w"), "int32")
        self.owned.append(memory)

        def load(form: Form) -> Any:
            return form.load(memory.name, form.own(memory, tirx.const(0, "int32")))

        def set_to(form: Form, value: Any) -> Any:
            return form.store(memory.name, form.own(memory, tirx.const(0, "int32")), value)

        with self._counting(Expr(load, "int32", 0, times, varies=True)):
            body = self._statements(self.rng.randint(1, 2), depth)
            if self.rng.random() < 0.25:
                body.insert(self.rng.randint(0, len(body)), self._leave())

        def write(form: Form) -> Any:
            advance = set_to(form, load(form) + 1)
            inner = tir.stmt_seq(advance, *write_all(form, body))
            loop = tir.While(tirx.LT(load(form), tirx.const(times, "int32")), inner)
            return tir.stmt_seq(set_to(form, tirx.const(0, "int32")), loop)

        return write

    # Expressions

    def _any(self, depth: int, shares: bool = True) -> Expr:
        """Any expression; without `shares`, one that does not read shared memory."""
        if not shares:
            readable, self._readable = self._readable, None
            expr = self._any(depth)
            self._readable = readable
            return expr
        if depth == 0 or self.rng.random() < 0.15:
            return self._leaf()
        kinds = {
            self._binary: 8,
            self._divided: 2,
            self._bits: 2,
            self._shifted: 1,
            self._choice: 3,
            self._unary: 2,
            self._converted: 2,
            self._guarded: 1,
        }
        return self.rng.choices(list(kinds), list(kinds.values()))[0](depth - 1)

    def _number(self, depth: int, dtypes: Sequence[str] = NUMBERS) -> Expr:
        """An expression of one of some dtypes."""
        expr = self._any(depth)
        return expr if expr.dtype in dtypes else cast(expr, self.rng.choice(dtypes))

    def _binary(self, depth: int) -> Expr:
        left = self._number(depth)
        return combine(
            self.rng.choice(("+", "-", "*", "min", "max")), left, cast(self._any(depth), left.dtype)
        )

    def _divided(self, depth: int) -> Expr:
        """By a constant, or by a value that is not zero."""
        rng = self.rng
        left = self._number(depth, INTEGERS)
        form = rng.choice((tirx.floordiv, tirx.floormod, tirx.truncdiv, tirx.truncmod))
        if rng.random() < 0.4:
            right = combine("+", modulo(cast(self._leaf(), left.dtype), 9), literal(1, left.dtype))
        else:
            sign = -1 if left.dtype in SIGNED and rng.random() < 0.2 else 1
            right = literal(sign * rng.choice((1, 2, 3, 7, 10, 16, 100)), left.dtype)
        if left.dtype in SIGNED and left.low == limits(left.dtype)[0]:
            left = combine("max", left, literal(left.low + 1, left.dtype))  # lest -low overflows
        most = max(abs(left.low), abs(left.high))
        if form in (tirx.floormod, tirx.truncmod):
            most = min(most, 100) if form is tirx.truncmod else 100
        least = 0 if left.dtype in UNSIGNED or (left.low >= 0 and right.low > 0) else -most
        if form is tirx.floormod and right.low > 0:
            least = 0
        if form is tirx.floordiv and least < 0:
            least = max(least - 1, limits(left.dtype)[0])
        write = lambda f: form(left.write(f), right.write(f))  # noqa: E731
        return Expr(write, left.dtype, least, most, left.varies)

    def _bits(self, depth: int) -> Expr:
        left = self._number(depth, INTEGERS)
        right = cast(self._any(depth), left.dtype)
        varies = left.varies or right.varies
        if self.rng.random() < 0.2:
            count = lambda f: tirx.popcount(left.write(f))  # noqa: E731
            return Expr(count, left.dtype, 0, int(np.iinfo(left.dtype).bits), left.varies)
        if self.rng.random() < 0.2 and left.dtype in SIGNED:
            inverse = lambda f: tirx.bitwise_not(left.write(f))  # noqa: E731
            return Expr(inverse, left.dtype, ~left.high, ~left.low, left.varies)
        form = self.rng.choice((tirx.bitwise_and, tirx.bitwise_or, tirx.bitwise_xor))
        most = max(abs(left.low), abs(left.high), abs(right.low), abs(right.high))
        most = (1 << most.bit_length()) - 1
        least = 0 if left.low >= 0 and right.low >= 0 else -most - 1
        low, high = limits(left.dtype)
        write = lambda f: form(left.write(f), right.write(f))  # noqa: E731
        return Expr(write, left.dtype, max(least, low), min(most, high), varies)

    def _shifted(self, depth: int) -> Expr:
        left = self._number(depth, INTEGERS)
        if self.rng.random() < 0.5:
            amount = literal(self.rng.randint(0, 7), left.dtype)
        else:
            amount = modulo(cast(self._leaf(), left.dtype), 8)
        _, high = limits(left.dtype)
        if self.rng.random() < 0.4 and left.low >= 0:
            if left.high << 7 > high:
                left = modulo(left, (high >> 7) + 1)
            up = lambda f: tirx.shift_left(left.write(f), amount.write(f))  # noqa: E731
            return Expr(up, left.dtype, 0, left.high << 7, left.varies)
        down = lambda f: tirx.shift_right(left.write(f), amount.write(f))  # noqa: E731
        return Expr(down, left.dtype, min(left.low, 0), max(left.high, 0), left.varies)

    def _choice(self, depth: int) -> Expr:
        left = self._any(depth)
        right = cast(self._any(depth), left.dtype)
        test = self._condition(1)
        form = self.rng.choice((tirx.Select, tirx.if_then_else))
        return Expr(
            lambda f: form(test.write(f), left.write(f), right.write(f)),
            left.dtype,
            min(left.low, right.low),
            max(left.high, right.high),
            left.varies and right.varies,
        )

    def _unary(self, depth: int) -> Expr:
        value = self._any(depth)
        if value.dtype in FLOATS:
            names = ("abs", "floor", "ceil", "trunc") if value.dtype == "float32" else ("abs",)
            form = getattr(tirx, self.rng.choice(names))
            return replace(value, write=lambda f: form(value.write(f)))
        if value.dtype in SIGNED and value.low > limits(value.dtype)[0]:
            most = max(abs(value.low), abs(value.high))
            return replace(value, write=lambda f: tirx.abs(value.write(f)), low=0, high=most)
        return value

    def _converted(self, depth: int) -> Expr:
        if self.rng.random() < 0.3:
            value = self._input()  # constants TVM reinterprets wrongly for LLVM
            if value.dtype in INTEGERS:
                other = value.dtype[1:] if value.dtype in UNSIGNED else "u" + value.dtype
                same = lambda f: tirx.reinterpret(other, value.write(f))  # noqa: E731
                return modulo(replace(value, write=same, dtype=other), 113)
        return cast(self._any(depth), self.rng.choice(NUMBERS))

    def _guarded(self, depth: int) -> Expr:
        """An input's element where the index lies in it; far outside, nothing may be read."""
        source = self.rng.choice(self.inputs)
        spread = literal(self.rng.choice((1, 3, 1 << 18)), "int32")
        index = combine("*", modulo(cast(self._any(depth), "int32"), 2 * source.size), spread)
        other = cast(self._leaf(), source.dtype)
        natural = tirx.const(0, "int32")

        def write(form: Form) -> Any:
            place = index.write(form)
            inside = tirx.And(tirx.LE(natural, place), tirx.LT(place, source.size))
            return tirx.if_then_else(inside, form.load(source.name, place), other.write(form))

        low, high = STORED[source.dtype]
        low, high = min(low, other.low), max(high, other.high)
        return Expr(write, source.dtype, low, high, varies=other.varies)

    def _branch(self) -> Expr:
        """The condition of an `if`: TVM refuses one that reads shared memory."""
        readable, self._readable = self._readable, None
        test = self._condition(1)
        self._readable = readable
        return test

    def _condition(self, depth: int) -> Expr:
        rng = self.rng
        if depth and rng.random() < 0.3:
            left, right = self._condition(depth - 1), self._condition(depth - 1)
            form = rng.choice((tirx.And, tirx.Or, None))
            if form is None:
                return Expr(lambda f: tirx.Not(left.write(f)), "bool", 0, 1)
            return Expr(lambda f: form(left.write(f), right.write(f)), "bool", 0, 1)
        left = self._any(depth)
        if left.dtype == "bool":
            return left
        right = cast(self._leaf(), left.dtype)
        compare = rng.choice((tirx.LT, tirx.LE, tirx.GT, tirx.GE, tirx.EQ, tirx.NE))
        return Expr(lambda f: compare(left.write(f), right.write(f)), "bool", 0, 1)

    def _leaf(self) -> Expr:
        rng = self.rng
        leaves = {
            self._local: 6, self._input: 6, self._literal: 3, self._thread: 2, self._counter: 3,
            self._from_shared: 4, self._from_array: 2, self._scalar: 1,
        }  # fmt: skip
        return rng.choices(list(leaves), list(leaves.values()))[0]()

    def _local(self) -> Expr:
        return self._loaded(self.rng.choice(self.locals), _index(0))

    def _from_array(self) -> Expr:
        return self._loaded(self.rng.choice(self.arrays), self._index(_ELEMENTS))

    def _loaded(self, memory: Own, index: Expr) -> Expr:
        def write(form: Form) -> Any:
            return form.load(memory.name, form.own(memory, index.write(form)))

        return Expr(write, memory.dtype, *STORED[memory.dtype], varies=True)

    def _input(self) -> Expr:
        source = self.rng.choice(self.inputs)
        if source.symbolic:
            place = self.rng.choice(([], self._counters))
            offset = self.rng.choice(place) if place else _index(self.rng.randint(0, 9))

            def wide(form: Form) -> Any:
                number = self.place(form) + tirx.Cast("int32", offset.write(form))
                size = form.variables[f"n{source.name}"]
                return form.load(source.name, tirx.floormod(tirx.Cast("int64", number), size))

            return Expr(wide, source.dtype, *STORED[source.dtype], varies=True)
        index = self._index(source.size)
        return Expr(
            lambda form: form.load(source.name, index.write(form)),
            source.dtype,
            *STORED[source.dtype],
            varies=True,
        )

    def _from_shared(self) -> Expr:
        array = self._readable
        if array is None:
            return self._local()
        index = self._index(self.threads)
        return Expr(
            lambda form: form.load(array.name, index.write(form)),
            array.dtype,
            *STORED[array.dtype],
            varies=True,
        )

    def _literal(self) -> Expr:
        dtype = self.rng.choice(NUMBERS)
        value = self.rng.randint(1 if dtype in UNSIGNED else -100, 100)
        return literal(value / 8 if dtype in FLOATS else value, dtype)

    def _thread(self) -> Expr:
        name, _ = self.rng.choice(self.indices)
        return _named(name, 0, 63)

    def _counter(self) -> Expr:
        return self.rng.choice(self._counters) if self._counters else self._thread()

    def _scalar(self) -> Expr:
        if not self.scalars:
            return self._literal()
        name, dtype, value = self.rng.choice(self.scalars)
        return replace(_named(name, min(value, 0), max(value, 1), varies=True), dtype=dtype)

    def _depth(self) -> int:
        """Of an expression: most are small, for TVM's passes take long over large ones."""
        return self.rng.choice((1, 2, 2, 3))

    def _index(self, size: int) -> Expr:
        """Into an array."""
        rng = self.rng
        if size == 1:
            return _index(0)
        if rng.random() < 0.25:
            return _index(rng.randrange(size))
        if rng.random() < 0.3:
            return modulo(cast(self._any(1, shares=False), "int32"), size)
        choice: list[Callable[[Form], Any]] = [
            self.thread,
            self.place,
            *(counter.write for counter in self._counters),
        ]
        first, second = rng.choice(choice), rng.choice(choice)
        factor, offset = rng.choice((0, 1, 2, 3, 4)), rng.randint(0, 9)
        last = self._counters[-1].write if self._counters else None
        if self.width > 1 and last is not None and size == self.total * self.width:
            # As the outputs are written: adjacent elements of adjacent threads.
            first, second, factor, offset = last, self.place, self.width, 0
        write = lambda f: first(f) + second(f) * factor + offset  # noqa: E731
        return modulo(Expr(write, "int32"), size)

    # Names

    def _name(self, stem: str) -> str:
        self._names += 1
        return f"{stem}{self._names}"

    @contextmanager
    def _counting(self, counter: Expr):
        """`counter` is known to what is made inside."""
        self._counters.append(counter)
        yield
        self._counters.remove(counter)


def _zero(dtype: str) -> Any:
    return tirx.const(False, "bool") if dtype == "bool" else tirx.const(0, dtype)


def _index(value: int) -> Expr:
    return literal(value, "int32")


def _named(name: str, low: int, high: int, varies: bool = False) -> Expr:
    return Expr(lambda form: form.variables[name], "int32", low, high, varies)


def _counter(name: str, extent: int) -> Expr:
    return _named(name, 0, extent - 1)
