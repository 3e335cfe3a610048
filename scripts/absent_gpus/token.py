"""What one decoded token of gpt-oss takes: its launches, their blocks, the bytes that they read.

Counted in the code that is compiled for a target, not assumed: calls of kernels in the library's
function `decode`, device functions of each, and their grids at given sizes.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
from benchmarks.results import table
from checkpoints.shapes import hf_config
from tvm import relax, tirx

from mxforge.compile import cuda, pipeline
from mxforge.compile.models.emit import Limits
from mxforge.compile.models.gpt_oss import GPT_OSS
from mxforge.compile.models.gpt_oss.config import GptOssConfig
from mxforge.compile.models.gpt_oss.tensors import EMBEDDING
from mxforge.compile.targets import resolve
from mxforge.compile.weights import packed_weights
from mxforge.kv_layout import PAGE_TOKENS, page_bytes

from . import results, shipped
from .shipped import short

FUNCTIONS = ("decode", "sample")
TITLE = "A decoded token"
CONTEXT = 1024  # tokens that it attends to
MOST_LAUNCHES = 175


@dataclass(frozen=True)
class Card:
    """What a prediction for a GPU goes by.

    gb_s        bandwidth of its memory: the maker's figure, of the H200 a measured copy
    units       streaming multiprocessors, compute units, cores
    lanes, ghz  32-bit instructions a cycle of a unit, and cycles
    launch_us   from the end of a launch to the first loads of the next: assumed
    latency_ns  of a load from memory: assumed
    code        the GPU of the CUDA statistics whose instructions a weight it executes, if any
    """

    target: str
    gb_s: float
    units: int
    lanes: int
    ghz: float
    launch_us: float
    latency_ns: float
    code: str = ""


CARDS = {
    "NVIDIA H200": Card("cuda:sm_90a", 4300, 132, 128, 1.98, 1.0, 700, "sm_90a"),
    "NVIDIA RTX 4090": Card("cuda:sm_89", 1008, 128, 128, 2.52, 2.0, 600, "sm_89"),
    "AMD RX 7900 XTX": Card("vulkan:desktop", 960, 96, 64, 2.5, 3.0, 800),
    "Apple M4 Max": Card("metal", 546, 40, 128, 1.6, 2.0, 600),
}
# Weights a byte, by how kernels that read them are called.
WEIGHTS_A_BYTE = {"mxfp4w": 32 / 17, "bf16w": 1 / 2, "i8w": 32 / 34}
MUCH = 1_000_000  # bytes that a launch reads
RESIDENT = 1024  # threads of a unit at a time
LOADS_AHEAD = 4  # of 16 bytes, by a thread of a tuned kernel whose code was not counted
# (card, function) -> why a kernel that reads much has fewer blocks than the card has units.
EXCEPTIONS: results.Exceptions = {}
SPREAD: dict[str, float] = {}


def measure(_scratch: Path) -> results.Results:
    """Launches of one token on each card, added up by function: how many, blocks and threads of
    one, bytes and predicted microseconds of all."""
    tracked = shipped.ROOT / "docs" / "bench" / "cuda-absent-gpus.json"
    code = json.loads(tracked.read_text())["gpus"]
    cards = {}
    for name, card in CARDS.items():
        functions: dict[str, dict[str, Any]] = {}
        for one in launches(card.target, shipped.MODEL, shipped.NUMERICS, context=CONTEXT):
            sums = functions.setdefault(
                one.function,
                {"launches": 0, "blocks": one.blocks, "threads": one.threads, "bytes": 0,
                 "predicted_us": 0.0},
            )  # fmt: skip
            sums["launches"] += 1
            sums["bytes"] += one.weight_bytes + one.cache_bytes
            us = predicted_us(one, card, code.get(card.code, {}).get(one.function, {}))
            sums["predicted_us"] = round(sums["predicted_us"] + us, 2)
        cards[name] = functions
    return results.results("counted in the compiled code", shipped.MODEL, shipped.NUMERICS, cards)


def predicted_us(launch: Launch, card: Card, statistics: Mapping[str, Any]) -> float:
    """The launch, and the longer of its reads and of its instructions.

    Reads go at the card's bandwidth, or at what is on the way at a time over a load's latency.
    """
    threads = min(launch.blocks * launch.threads, card.units * RESIDENT)
    ahead = statistics.get("wide_loads_ahead", 0 if card.code else LOADS_AHEAD)
    on_the_way = threads * (16 * ahead if ahead else 4)
    rate = min(card.gb_s, on_the_way / card.latency_ns)
    reads = (launch.weight_bytes + launch.cache_bytes) / (rate * 1e3)
    a_byte = next((n for kind, n in WEIGHTS_A_BYTE.items() if launch.function.startswith(kind)), 0)
    count = launch.weight_bytes * a_byte * statistics.get("instructions_a_weight", 0)
    return card.launch_us + max(reads, count / (card.units * card.lanes * card.ghz * 1e3))


def gates(found: results.Results) -> list[str]:
    """A sentence for each card with too many launches, and for each kernel that reads much and
    leaves units without a block."""
    problems = []
    for card, functions in found["gpus"].items():
        count = sum(sums["launches"] for sums in functions.values())
        if count > MOST_LAUNCHES:
            problems.append(f"a token takes {count} launches on {card}, more than {MOST_LAUNCHES}")
        problems += [
            f"{function} on {card} has {sums['blocks']} blocks for {CARDS[card].units} units"
            for function, sums in functions.items()
            if sums["bytes"] > MUCH * sums["launches"]
            and sums["blocks"] < CARDS[card].units
            and (card, function) not in EXCEPTIONS
        ]
    return problems


def page(found: results.Results) -> str:
    """The tables as Markdown."""
    parts = [
        f"# {TITLE}",
        "Written by `scripts/gpu_statistics`; do not edit. Launches, blocks and bytes are counted "
        f"in the compiled code of gpt-oss-{found['model']}, {found['numerics']} numerics, one "
        f"sequence, {CONTEXT:,} tokens into its context. **Microseconds are predictions**: a fixed "
        "time a launch, and the longer of its bytes (at the card's bandwidth, or at what its "
        "threads have on the way) and its instructions (at the card's rate). Nothing ran on these "
        "cards.",
    ]
    for name, functions in found["gpus"].items():
        card, total = CARDS[name], sum(sums["predicted_us"] for sums in functions.values())
        count = sum(sums["launches"] for sums in functions.values())
        gigabytes = sum(sums["bytes"] for sums in functions.values()) / 1e9
        rows = [
            [
                function, str(sums["launches"]), f"{sums['blocks']:,}", str(sums["threads"]),
                f"{sums['bytes'] / sums['launches'] / 1e6:.2f}",
                f"{sums['predicted_us'] / sums['launches']:.1f}", f"{sums['predicted_us']:.0f}",
            ]
            for function, sums in functions.items()
        ]  # fmt: skip
        rows.append(["**all**", str(count), "", "", f"{gigabytes * 1e3:.0f} in all", "",
                     f"**{total:.0f}**"])  # fmt: skip
        header = ["", "launches", "blocks", "threads", "MB each", "us each", "us in all"]
        floor = gigabytes / card.gb_s * 1e6
        parts.append(
            f"## {name}, `{card.target}`\n\nPredicted: {1e6 / total:.0f} tokens a second; floor "
            f"{floor:.0f} us. By {card.gb_s:,.0f} GB/s, {card.units} units of {card.lanes} lanes "
            f"at {card.ghz} GHz, {card.launch_us} us a launch, {card.latency_ns} ns a load.\n\n"
            + table(header, rows)
        )
    return "\n\n".join(parts) + "\n"


@dataclass(frozen=True)
class Launch:
    """One launch of a device function.

    weight_bytes, cache_bytes   what it reads of weights, and of keys and values
    """

    function: str
    blocks: int
    threads: int
    weight_bytes: int = 0
    cache_bytes: int = 0


def launches(
    target_name: str, model: str, numerics: str, sequences: int = 1, context: int = 1024
) -> list[Launch]:
    """Every launch of one decoded token of so many sequences, that many tokens into the context,
    in order: the model, then sampling."""
    token = _Token(target_name, hf_config(model), numerics, sequences, context)
    return [launch for name in FUNCTIONS for launch in _launches(token, name)]


def chunk_launches(
    target_name: str, model: str, numerics: str, tokens: int, sequences: int, context: int = 1024
) -> list[Launch]:
    """Every launch of a chunk of a prompt of so many tokens, together with a decoded one of each of
    so many sequences."""
    chunk = _Token(target_name, hf_config(model), numerics, sequences + 1, context)
    chunk.sizes["n"] = tokens + sequences
    return _launches(chunk, "forward")


def _launches(token: _Token, name: str) -> list[Launch]:
    """Of one of the library's functions."""
    found = []
    for kernel, arguments in _calls(token.functions[name]):
        bytes_, cache = token.reads(kernel, arguments)
        for function, axes in _started(token.hosts[kernel], arguments, token.sizes):
            blocks, threads = (
                math.prod(extent for axis, extent in axes.items() if axis.startswith(kind))
                for kind in ("block", "thread")
            )
            found.append(Launch(short(function), blocks, threads, bytes_, cache))
            bytes_ = cache = 0  # the first of several reads them
    return found


def tape(
    target_name: str, config: Mapping[str, Any], numerics: str, context: int = 1024
) -> dict[str, dict[str, Any]]:
    """The calls of one decoded token of one sequence, so that they can be repeated one by one.

    For `decode` and `sample`, the library's functions (a model's config.json is given):

    values      [name, shape, dtype] of each tensor; first the function's parameters, in order
    parameters  how many those are
    calls       [kernel, values that it takes, bytes that it reads of weights and cache], in order
    result      the value that the function returns
    """
    token = _Token(target_name, config, numerics, 1, context)
    return {name: _tape(token.functions[name], token) for name in FUNCTIONS}


def _tape(function: relax.Function, token: _Token) -> dict[str, Any]:
    values: list[list[Any]] = []
    known: dict[Any, Any] = {}  # variable -> the number of its value, or a tuple of these

    def add(var: Any) -> None:
        known[var] = len(values)
        shape = [_value(extent, token.sizes) for extent in var.ty.shape]
        values.append([var.name, shape, str(var.ty.dtype)])

    def number(expression: Any) -> Any:
        if isinstance(expression, relax.Tuple):
            return tuple(map(number, expression.fields))
        return known[expression]

    for parameter in function.params:
        add(parameter)
    parameters, calls = len(values), []
    for block in function.body.blocks:
        for binding in block.bindings:
            var, value = binding.var, binding.value
            if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar):
                name, arguments = value.op.name_hint, list(value.args)
                read = sum(token.reads(name, arguments))
                calls.append([name, list(map(number, arguments)), read])
            elif isinstance(value, relax.Call) and value.op.name.endswith("alloc_tensor"):
                add(var)
            elif isinstance(value, relax.TupleGetItem):
                known[var] = number(value.tuple_value)[value.index]
            elif isinstance(value, relax.Var | relax.Tuple):
                known[var] = number(value)
            elif not value.op.name.endswith("alloc_storage"):
                raise TypeError(f"no rule for {value.op.name} among the calls of a token")
    return {
        "values": values,
        "parameters": parameters,
        "calls": calls,
        "result": number(function.body.body),
    }


class _Token:
    """One decoded token of so many sequences, that many tokens into the context.

    functions   the library's, their calls in order
    hosts       the host's part of each kernel
    sizes       the library's symbolic sizes
    """

    def __init__(
        self,
        target_name: str,
        raw: Mapping[str, Any],
        numerics: str,
        sequences: int,
        context: int,
    ) -> None:
        target, config = resolve(target_name), GptOssConfig.from_hf(raw)
        precision = target.precision(numerics, config)
        weights = packed_weights(GPT_OSS.weights(config), target.kernels, precision)
        module = GPT_OSS.module(config, target.kernels, precision, Limits(16, 512), weights)
        self.functions, self.hosts = _lowered(module, target)
        self.sizes = _sizes(sequences, context)
        self._sequences = sequences
        self._page = page_bytes(config.num_key_value_heads, config.head_dim, precision.kv)
        self._read = {
            w.name.replace(".", "_"): round(w.nbytes * _share(w.name, config, sequences))
            for w in weights
        }

    def reads(self, kernel: str, arguments: list[Any]) -> tuple[int, int]:
        """Bytes that a call reads of weights, and of keys and values."""
        inputs = [a.name for a in arguments if isinstance(a, relax.Var)]
        cache = 0
        if "attention" in kernel:
            tables = [name for name in inputs if name.endswith("_table")]
            columns = [self.sizes[table.replace("table", "columns")] for table in tables]
            cache = self._sequences * sum(columns) * self._page
        return sum(self._read.get(name, 0) for name in inputs), cache


def _share(name: str, config: GptOssConfig, sequences: int) -> float:
    """What part of a weight is read: one row a token of the embedding, and of experts those that
    are chosen, as many as that are expected of chance."""
    if name == EMBEDDING:
        return sequences / config.vocab_size
    if ".experts." in name:
        chance = 1 - config.num_experts_per_tok / config.num_local_experts
        return 1 - chance**sequences
    return 1.0


def _lowered(module: tvm.IRModule, target: Any) -> tuple[tvm.IRModule, dict[str, Any]]:
    """The module with its calls in order, and the host's part of each kernel, by name."""
    kept: dict[str, tvm.IRModule] = {}

    @tvm.instrument.pass_instrument
    class AfterSplit:
        def run_after_pass(self, split: tvm.IRModule, info: Any) -> None:
            if info.name == "tirx.SplitHostDevice":
                kept.setdefault("split", split)

    with tvm.target.Target(target.tvm):
        for phase in pipeline.PHASES:
            for step in phase.passes(target):
                module = step(module)
            if phase.name == "memory-plan":
                kept["planned"] = module
    with tvm.transform.PassContext(instruments=[AfterSplit()]):
        pipeline.build(module, target)
    hosts = {var.name_hint: function for var, function in kept["split"].functions.items()}
    return kept["planned"], hosts


def _calls(function: relax.Function) -> list[tuple[str, list[Any]]]:
    """The kernels that a function calls, in order, with their arguments."""
    found = []
    for block in function.body.blocks:
        for binding in block.bindings:
            value = binding.value
            if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar):
                found.append((value.op.name_hint, list(value.args)))
    return found


def _started(
    host: tirx.PrimFunc, arguments: list[Any], sizes: Mapping[str, int]
) -> list[tuple[str, dict[str, int]]]:
    """The device functions that the host's part of a kernel starts, and their extents by axis."""
    values: dict[Any, int] = {}
    for parameter, argument in zip(host.params, arguments, strict=True):
        for own, theirs in zip(parameter.ty.shape, argument.ty.shape, strict=True):
            values.setdefault(own, _value(theirs, sizes))
    found = []

    def walk(statement: Any) -> None:
        kind = type(statement).__name__
        if kind == "SeqStmt":
            for one in statement.seq:
                walk(one)
        elif kind == "Bind":
            values[statement.var] = _value(statement.value, values)
        elif kind == "IfThenElse":
            taken = _value(statement.condition, values)
            walk(statement.then_case if taken else statement.else_case)
        elif kind == "AttrStmt":
            walk(statement.body)
        elif kind == "Evaluate":
            call = statement.value
            axes = [str(axis) for axis in call.attrs["launch_params"] if axis != cuda.OVERLAP]
            extents = [_value(extent, values) for extent in list(call.args)[-len(axes) :]]
            found.append((call.args[0].value, dict(zip(axes, extents, strict=True))))
        elif kind != "DeclBuffer" and statement is not None:
            raise TypeError(f"no rule for {kind} in the host's part of a kernel")

    walk(host.body)
    return found


_OPERATORS: dict[str, Callable[[int, int], int]] = {
    "Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "FloorDiv": operator.floordiv,
    "FloorMod": operator.mod, "Max": max, "Min": min, "LT": operator.lt, "LE": operator.le,
    "GT": operator.gt, "GE": operator.ge, "EQ": operator.eq, "NE": operator.ne,
    "And": operator.and_, "Or": operator.or_,
}  # fmt: skip


def _value(expression: Any, values: Mapping[Any, int]) -> int:
    """An integer expression, where its variables, or their names, have these values."""
    kind = type(expression).__name__
    if kind == "int":
        return int(expression)
    if kind == "IntImm":
        return int(expression.value)
    if kind == "Var":
        return values[expression] if expression in values else values[expression.name]
    if kind == "Cast":
        return _value(expression.value, values)
    if kind == "Call":  # whether the card has matrices: it has the first that is asked for
        return 1
    if kind == "Select":
        taken = _value(expression.condition, values)
        return _value(expression.true_value if taken else expression.false_value, values)
    return _OPERATORS[kind](_value(expression.a, values), _value(expression.b, values))


def _sizes(sequences: int, context: int) -> dict[str, int]:
    """The library's symbolic sizes."""
    columns = -(-context // PAGE_TOKENS)
    window = min(columns, 9)  # 128 keys that begin anywhere in a page
    return {
        "b": sequences, "m": sequences, "e": 0, "g": 0,
        "full_columns": columns, "sliding_columns": window,
        "full_pages": sequences * columns, "sliding_pages": sequences * window,
    }  # fmt: skip
