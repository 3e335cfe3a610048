"""What one decoded token of gpt-oss takes: its launches, their blocks, the bytes that they read.

Counted in the code that is compiled for a target, not assumed: the steps of the launch plan's
function `decode`, and their grids at given sizes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import table
from checkpoints.shapes import hf_config

from mxforge.compile import kernels, pipeline
from mxforge.compile.models.emit import Limits
from mxforge.compile.models.gpt_oss import GPT_OSS
from mxforge.compile.models.gpt_oss.config import GptOssConfig
from mxforge.compile.models.gpt_oss.tensors import EMBEDDING
from mxforge.compile.plan import plan_of
from mxforge.compile.targets import CompileTarget, Numerics, resolve
from mxforge.compile.weights import packed_weights
from mxforge.kv_layout import PAGE_TOKENS, page_bytes
from mxforge.plan import Feature, Function, Plan, Role, Step

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
    target_name: str, model: str, numerics: Numerics, sequences: int = 1, context: int = 1024
) -> list[Launch]:
    """Every launch of one decoded token of so many sequences, that many tokens into the context,
    in order: the model, then sampling."""
    token = _counted(target_name, model, numerics, sequences, context)
    return [launch for name in FUNCTIONS for launch in token.launches(name)]


def chunk_launches(
    target_name: str,
    model: str,
    numerics: Numerics,
    tokens: int,
    sequences: int,
    context: int = 1024,
) -> list[Launch]:
    """Every launch of a chunk of a prompt of so many tokens, together with a decoded one of each of
    so many sequences."""
    chunk = _counted(target_name, model, numerics, sequences + 1, context)
    chunk.sizes["n"] = tokens + sequences
    return chunk.launches("forward")


@dataclass(frozen=True)
class Token:
    """One decoded token of so many sequences, some tokens into the context.

    plan    the library's functions
    sizes   the plan's symbols
    read    the bytes that are read of each weight
    page    bytes of a page of the cache
    """

    plan: Plan
    sizes: dict[str, int]
    read: Mapping[str, int]
    page: int

    @classmethod
    def of(
        cls,
        plan: Plan,
        config: GptOssConfig,
        target: CompileTarget,
        numerics: Numerics,
        sequences: int,
        context: int,
    ) -> Token:
        """`plan` is of a model of this config, for the target in these numerics."""
        precision = target.precision(numerics, config)
        weights = packed_weights(GPT_OSS.weights(config), target.kernels, precision)
        return cls(
            plan,
            _sizes(sequences, context),
            {w.name: round(w.nbytes * _share(w.name, config, sequences)) for w in weights},
            page_bytes(config.num_key_value_heads, config.head_dim, precision.kv),
        )

    def launches(self, name: str) -> list[Launch]:
        """Of one of the library's functions, on a card that has the first matrices asked for."""
        function = self.plan[name]
        features = {value.name for value in function.values if isinstance(value, Feature)}
        values = function.evaluate(self.sizes, features)
        found = []
        for step in function.steps:
            if step.launch is not None and (step.when is None or values[step.when]):
                blocks, threads = (
                    math.prod(values[extent] for extent in extents)
                    for extents in (step.launch.grid, step.launch.block)
                )
                launch = Launch(short(step.kernel), blocks, threads, *self.reads(function, step))
                found.append(launch)
        return found

    def reads(self, function: Function, step: Step) -> tuple[int, int]:
        """Bytes that a step reads of weights, and of keys and values."""
        tensors = [function.tensors[a] for a in step.arguments if isinstance(a, int)]
        names = {tensor.name for tensor in tensors if tensor.role is not Role.LOCAL}
        cache = 0
        if "attention" in step.kernel:
            tables = [name for name in names if name.endswith("_table")]
            columns = sum(self.sizes[name.replace("table", "columns")] for name in tables)
            cache = self.sizes["b"] * columns * self.page
        return sum(self.read.get(name, 0) for name in names), cache


def _counted(
    target_name: str, model: str, numerics: Numerics, sequences: int, context: int
) -> Token:
    """Of the code that is compiled for a GPU."""
    target, config = resolve(target_name), GptOssConfig.from_hf(hf_config(model))
    precision = target.precision(numerics, config)
    weights = packed_weights(GPT_OSS.weights(config), target.kernels, precision)
    module = GPT_OSS.module(config, target.kernels, precision, Limits(16, 512), weights)
    lowered = pipeline.lower(module, target)
    plan = plan_of(lowered, kernels.of_gpu(lowered, target).hosts)
    return Token.of(plan, config, target, numerics, sequences, context)


def _share(name: str, config: GptOssConfig, sequences: int) -> float:
    """What part of a weight is read: one row a token of the embedding, and of experts those that
    are chosen, as many as that are expected of chance."""
    if name == EMBEDDING:
        return sequences / config.vocab_size
    if ".experts." in name:
        chance = 1 - config.num_experts_per_tok / config.num_local_experts
        return 1 - chance**sequences
    return 1.0


def _sizes(sequences: int, context: int) -> dict[str, int]:
    """The library's symbolic sizes."""
    columns = -(-context // PAGE_TOKENS)
    window = min(columns, 9)  # 128 keys that begin anywhere in a page
    return {
        "b": sequences, "m": sequences, "e": 0, "g": 0,
        "full_columns": columns, "sliding_columns": window,
        "full_pages": sequences * columns, "sliding_pages": sequences * window,
    }  # fmt: skip
