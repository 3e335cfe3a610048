"""What was asked of a decoded token of gpt-oss-20b, and what is counted in its code: one table.

It is made of what `cuda`, `vulkan` and `token` found. docs/gpu.md tells how the kernels work.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.results import table

from .cuda import COUNTED, WEIGHTS
from .token import CARDS, MOST_LAUNCHES, MUCH

TITLE = "Decoding: asked and counted"
H200, ARCH, NAVI31 = "NVIDIA H200", "sm_90a", "AMD navi31"
READ = 250_000  # bytes of weights or cache: launches that read less are not looked at
LANES = 32
WARPS, BYTES_IN_FLIGHT = 16, 64 << 10  # of an SM
# Mesa's estimates for the schedules before: one thread an item.
BEFORE = {"mxfp4w_moe_gate_up_swiglu": 27_338, "mxfp4w_moe_down": 31_828}
TENTH = 0.1
PRODUCTS, SHARE = ("sm_80", "sm_89"), 0.25
# Kernels whose launch for many tokens keeps tensor cores busy.
EXPERTS = (*BEFORE, "mxfp4w_bf16_moe_gate_up_swiglu", "mxfp4w_bf16_moe_down")
MATRIX = {"experts' products": EXPERTS, "attention of chunks": ("f32_paged_attention",)}
# Of products by wgmma: instructions for each cycle of the tensor cores, and waits for each wgmma.
SLOTS, WAITS = 0.75, 0.5

KINDS = {"mxfp4w": "experts in MXFP4", "bf16w": "dense in bf16", "i8w": "dense in 8 bits"}

Found = Mapping[str, Mapping[str, Any]]  # GPU -> kernel -> statistics


@dataclass(frozen=True)
class Sm:
    """What an SM has: warps, and bytes of shared memory. All have 65,536 registers."""

    warps: int
    shared: int
    blocks: int = 32


SMS = {"sm_80": Sm(64, 164 << 10), "sm_89": Sm(48, 100 << 10, 24), "sm_90a": Sm(64, 228 << 10)}
REGISTERS = 65_536


def resident(arch: str, statistics: Mapping[str, Any]) -> int:
    """Blocks of a kernel that an SM has at a time (CUDA C++ Programming Guide, "Compute
    Capabilities": a warp's registers by 256, a block's shared memory by 128 bytes and 1 KB more).
    """
    sm, warps = SMS[arch], -(-statistics["threads"] // LANES)
    registers = -(-statistics["registers"] * LANES // 256) * 256 * warps
    shared = -(-statistics["shared_bytes"] // 128) * 128 + 1024
    return min(sm.blocks, sm.warps // warps, REGISTERS // registers, sm.shared // shared)


def warps(arch: str, statistics: Mapping[str, Any]) -> int:
    """Of an SM at a time, where the grid is full."""
    return resident(arch, statistics) * -(-statistics["threads"] // LANES)


@dataclass(frozen=True)
class Line:
    """What was asked of kernels, and their counts: (kernel, GPU, count)."""

    what: str
    least: float | None
    most: float | None
    counts: list[tuple[str, str, float]]

    def asked(self) -> str:
        bounds = (("at least", self.least), ("at most", self.most))
        return " and ".join(f"{word} {bound:,}" for word, bound in bounds if bound is not None)

    def holds(self, count: float) -> bool:
        return (self.least or 0) <= count <= (count if self.most is None else self.most)

    def misses(self) -> list[str]:
        """The kernels with a count out of bounds."""
        return sorted({kernel for kernel, _, count in self.counts if not self.holds(count)})

    def shown(self) -> str:
        """From the best count to the worst, and whose that is."""
        in_order = sorted(self.counts, key=lambda one: one[2], reverse=self.most is None)
        (*_, best), (kernel, gpu, worst) = in_order[0], in_order[-1]
        return f"{best:,} to {worst:,}" + ("" if best == worst else f" ({kernel}, {gpu})")


def lines(cuda: Found, vulkan: Found, token: Found) -> list[Line]:
    """All of them, of the objects `gpus` in the results of the three."""
    launches = [
        ("a token", card, sum(one["launches"] for one in kernels.values()))
        for card, kernels in token.items()
    ]
    instructions = {
        kind: [
            (kernel, arch, statistics["instructions_a_weight"])
            for arch in COUNTED
            for kernel, statistics in cuda[arch].items()
            if kernel.startswith(kind) and "instructions_a_weight" in statistics
        ]
        for kind in WEIGHTS
    }
    matrix = {
        what: [
            (kernel, arch, max(shares))
            for arch in PRODUCTS
            for kernel in kernels
            if (
                shares := [
                    statistics["matrix_share"]
                    for name, statistics in cuda[arch].items()
                    if name.startswith(kernel) and "matrix_share" in statistics
                ]
            )
        ]
        for what, kernels in MATRIX.items()
    }
    statistics, functions = cuda[ARCH], token[H200]
    each = {name: one["bytes"] / one["launches"] for name, one in functions.items()}
    occupied = [
        (kernel, arch, warps(arch, cuda[arch][kernel]))
        for arch in COUNTED
        for kernel, bytes_ in each.items()
        if bytes_ > READ
    ]
    in_flight = []
    for kernel, bytes_ in each.items():
        if bytes_ > CARDS[H200].units * BYTES_IN_FLIGHT:
            of_grid = -(-functions[kernel]["blocks"] // CARDS[H200].units)
            blocks = min(resident(ARCH, statistics[kernel]), of_grid)
            loads = 16 * statistics[kernel].get("wide_loads_ahead", 0)
            in_flight.append((kernel, ARCH, blocks * statistics[kernel]["threads"] * loads))
    blocks_a_unit = [
        (kernel, card, round(one["blocks"] / CARDS[card].units, 1))
        for card in token
        for kernel, one in token[card].items()
        if one["bytes"] > MUCH * one["launches"]
    ]
    cycles = [
        (kernel, NAVI31, round(vulkan[NAVI31][kernel]["cycles"] / before, 3))
        for kernel, before in BEFORE.items()
    ]
    wgmma = {kernel: one for kernel, one in statistics.items() if one.get("wgmma", 0)}
    hopper = {
        name: [(kernel, ARCH, one[name]) for kernel, one in wgmma.items()]
        for name in ("waits_a_wgmma", "empty_groups", "bulk_copies")
    }
    slots: dict[str, float] = {}  # of a kernel's largest tiles
    for kernel, one in wgmma.items():
        base = re.sub(r"_\d+$", "", kernel)
        slots[base] = min(one["slots_a_cycle"], slots.get(base, one["slots_a_cycle"]))
    return [
        Line("launches of a token", None, MOST_LAUNCHES, launches),
        *(
            Line(f"instructions a weight, {called}", None, WEIGHTS[kind].most, instructions[kind])
            for kind, called in KINDS.items()
        ),
        Line("warps of an SM, full grid", WARPS, None, occupied),
        Line("bytes on their way to an SM", BYTES_IN_FLIGHT, None, in_flight),
        Line("blocks for each SM, compute unit or core", 1, None, blocks_a_unit),
        *(
            Line(f"tensor cores' part of the instructions, {what}", SHARE, None, shares)
            for what, shares in matrix.items()
        ),
        Line(
            "instructions a cycle of tensor cores, wgmma",
            None,
            SLOTS,
            [(kernel, ARCH, count) for kernel, count in slots.items()],
        ),
        Line("waits for each wgmma", None, WAITS, hopper["waits_a_wgmma"]),
        Line("empty groups of wgmma", None, 0, hopper["empty_groups"]),
        Line("bulk copies where there is wgmma", 1, None, hopper["bulk_copies"]),
        Line("estimated cycles of the experts, of those before tuning", None, TENTH, cycles),
    ]


def gates(asked: list[Line]) -> list[str]:
    """A sentence for each kernel that misses a bound."""
    return [
        f"{kernel} misses its bound: {line.what}, {line.asked()}"
        for line in asked
        for kernel in line.misses()
    ]


def page(asked: list[Line]) -> str:
    """The table as Markdown."""
    parts = [
        f"# {TITLE}",
        "Written by `scripts/gpu_statistics`; do not edit. One token of gpt-oss-20b in fast "
        f"numerics. CUDA is counted in the machine code for {', '.join(COUNTED)}, all that the "
        "token executes; launches and blocks in the compiled library; cycles are Mesa's estimate. "
        "**Nothing ran on these GPUs.**",
        table(
            ["", "asked", "from best to worst"],
            [[line.what, line.asked(), line.shown()] for line in asked],
        ),
        "Every kernel compiles and none spills, but for the exceptions that the pages of "
        "[CUDA](cuda-absent-gpus.md) and [Vulkan](vulkan-absent-gpus.md) list. That accesses are "
        "coalesced and free of bank conflicts, and that no barrier is there twice, the tests in "
        "`tests/simt` assert: at most 1.1 of the fewest sectors, 1.05 of the fewest passes over "
        "shared memory.",
    ]
    return "\n\n".join(parts) + "\n"
