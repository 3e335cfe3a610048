"""What both halves of an expert share: the arguments of the plan and the weights, case data."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..formats.blocks import BLOCK
from ..kernel import Case, Size, Tensor, f32, i32


def plan_arguments(n: Size, experts: int, top_k: int) -> tuple[Tensor, ...]:
    """moe_plan's results."""
    return (i32("offsets", experts + 1), i32("order", n * top_k))


def weight_arguments(experts: int, rows: int, k: int) -> tuple[Tensor, ...]:
    """MXFP4 weights [experts, rows, k] as stored, and their bias."""
    return (
        Tensor("blocks", (experts, rows, k // BLOCK, BLOCK // 2), "uint8"),
        Tensor("scales", (experts, rows, k // BLOCK), "uint8"),
        f32("bias", experts, rows),
    )


def routing(
    rng: np.random.Generator, n: int, experts: int, top_k: int, choose: range | None
) -> dict[str, np.ndarray]:
    """Distinct random experts for each token, from `choose`, and the plan sorted by expert."""
    pool = np.arange(experts) if choose is None else np.asarray(choose)
    ids = np.stack([rng.permutation(pool)[:top_k] for _ in range(n)]).astype(np.int32)
    order = np.argsort(ids.ravel(), kind="stable").astype(np.int32)
    offsets = np.searchsorted(ids.ravel()[order], np.arange(experts + 1)).astype(np.int32)
    return {"ids": ids, "offsets": offsets, "order": order}


def expert_arrays(
    rng: np.random.Generator, experts: int, rows: int, k: int, edge: tuple[int, ...] = ()
) -> dict[str, np.ndarray]:
    """Random MXFP4 experts whose outputs stay near 1, and their bias, as stored.

    `edge`: scales of the first blocks of each row, the weights of which are small.
    """
    center = 127 - round(np.log2(2.5 * np.sqrt(k)))
    arrays: dict[str, np.ndarray] = {
        "blocks": rng.integers(0, 256, (experts, rows, k // BLOCK, 16), dtype=np.uint8),
        "scales": rng.integers(center - 2, center + 2, (experts, rows, k // BLOCK), dtype=np.uint8),
        "bias": rng.standard_normal((experts, rows), dtype=np.float32),
    }
    if edge:
        arrays["scales"][..., : len(edge)] = edge
        # 0.5 and its negative: none is infinite with the largest scale
        arrays["blocks"][..., : len(edge), :] &= 0x99
        arrays["blocks"][..., : len(edge), :] |= 0x11
    return arrays


def tame(x: np.ndarray, edge: tuple[int, ...]) -> None:
    """Make the inputs [n, k] small where the scales `edge` of `expert_arrays` are so large that
    sums of products would leave the range of f32."""
    for block, scale in enumerate(edge):
        if scale > 200:
            x[:, block * BLOCK : (block + 1) * BLOCK] *= np.float32(2.0**-40)


def _few_rows(**inputs: int) -> dict[str, int]:
    return {"experts": 2, "hidden": 32, "intermediate": 32, **inputs}


def cases(case: Callable[..., Case], largest_scale: int = 254) -> tuple[Case, ...]:
    """What both halves are tested with, whatever their activations.

    `case(name, tokens, **shape)` makes one. largest_scale: of a block, 254 where sums of products
    reach the scale in f32, less where they are integers, which it takes beyond the range of f32.
    """
    return (
        case("one token", 1),
        case("one token, six experts", 1, experts=7, top_k=6),
        case("one token, more steps than warps", 1, intermediate=1248),
        case("partial token tile, experts without tokens", 7, choose=range(2, 5)),
        case("all tokens on one expert", 9, top_k=1, choose=range(3, 4)),
        case("one expert in all", 3, experts=1, top_k=1, hidden=32, intermediate=32),
        case("one channel 1000 times the others", 6, spike=1000),
        case("120b's 128 experts", 5, experts=128, top_k=4),
        case("17 tokens", 17, experts=32, top_k=4),
        case("8 tokens, all on one expert", 8, top_k=1, hidden=576, choose=range(5, 6)),
        case("16 tokens, all on two experts", 16, hidden=576, choose=range(2)),
        case("16 tokens, spread", 16, experts=32, top_k=4, hidden=64, intermediate=32),
        case("64 tokens", 64, experts=32, top_k=4, hidden=160, intermediate=160),
        case("70 tokens, most on two experts", 70, experts=3, hidden=576, intermediate=32),
        case("100 tokens, all on one expert", 100, top_k=1, hidden=576, choose=range(3, 4)),
        case("150 tokens, steps not full", 150, experts=4, hidden=160, intermediate=160),
        case("300 tokens, all on one expert", 300, top_k=1, hidden=256, choose=range(3, 4)),
        case("600 tokens, 128 experts", 600, experts=128, top_k=4, hidden=64, intermediate=32),
        case("600 tokens, more rows than a block", 600, experts=3, intermediate=288),
        case("large, 200 tokens", 200, experts=4, top_k=1, hidden=576, intermediate=576),
        case("two tokens, the same experts", 2, experts=4, top_k=4),
        case("more inputs than a block's threads have at once", 3, **_few_rows(hidden=3136)),
        case("the same of the second half", 3, **_few_rows(intermediate=3136)),
        case("three tokens, the same experts", 3, experts=4, top_k=4, hidden=576),
        case("five tokens, the same experts", 5, experts=4, top_k=4),
        case("scales 0 and 1", 3, hidden=160, intermediate=160, edge=(0, 1)),
        case("the largest scale, beside which the others vanish", 3, edge=(1, largest_scale)),
        case("20b shapes, four experts", 1, experts=4, top_k=4, hidden=2880, intermediate=2880),
    )


def few_cases(case: Callable[..., Case]) -> tuple[Case, ...]:
    """The same of a format whose products are those of another one, but for many tokens."""
    return (
        case("one token", 1),
        case("17 tokens", 17, experts=32, top_k=4),
        case("150 tokens, steps not full", 150, experts=4, hidden=160, intermediate=160),
        case("600 tokens, more rows than a block", 600, experts=3, intermediate=288),
        case("large, 200 tokens", 200, experts=4, top_k=1, hidden=576, intermediate=576),
        case("140 tokens, the largest scale", 140, hidden=288, intermediate=288, edge=(1, 254)),
    )
