"""What scripts/bench_peers and bench_formats measure, and what it cannot do without."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mxforge.compile.config import FULL, SLIDING
from mxforge.compile.models.gpt_oss.config import GptOssConfig
from mxforge.kv_layout import KV_BYTES, PAGE_TOKENS, page_bytes
from mxforge.manifest import WEIGHT_BYTES

if TYPE_CHECKING:
    from mxforge.compile.formats import Precision
    from mxforge.compile.targets import CompileTarget

CONTEXT = 8192
CHUNK = 512  # prompt tokens in one step, of both engines


@dataclass(frozen=True)
class Bound:
    """What the median has to reach: of a ratio at least, of mxforge's own values at most."""

    value: float
    of: str = "ratio"


@dataclass(frozen=True)
class Figure:
    """`batch` sequences of `prompt` tokens each, `depth` tokens into their context, `new` more.

    kind is "decode" (tokens a second of all sequences), "prefill" (prompt tokens a second),
    "start" (seconds) or "memory" (bytes).
    """

    label: str
    kind: str
    prompt: int
    new: int = 1
    batch: int = 1
    depth: int = 0
    limit: Bound | None = None
    aim: Bound | None = None

    @property
    def unit(self) -> str:
        return {"start": "s", "memory": "GiB"}.get(self.kind, "tok/s")

    @property
    def context(self) -> int:
        """The context to ask an engine for: the usual one, where that is enough."""
        needed = self.depth + self.prompt + self.new + 1
        return CONTEXT if needed <= CONTEXT else -(-needed // 256) * 256

    def shown(self, value: float) -> float:
        """A sample in `unit`."""
        return value / 2**30 if self.kind == "memory" else value

    def advantage(self, ours: float, theirs: float) -> float:
        """How many times better mxforge is."""
        return theirs / ours if self.kind in ("start", "memory") else ours / theirs


_PREFILL = {"limit": Bound(2.5), "aim": Bound(4)}
FIGURES: dict[str, Figure] = {
    "prefill_128": Figure("prefill of 128", "prefill", 128, **_PREFILL),
    "prefill_512": Figure("prefill of 512", "prefill", 512, **_PREFILL),
    "prefill_2048": Figure("prefill of 2048", "prefill", 2048, **_PREFILL),
    "decode": Figure("decode", "decode", 128, 32, limit=Bound(1), aim=Bound(1.12)),
    "batch_8": Figure(
        "decode, 8 sequences together", "decode", 16, 16, 8, limit=Bound(1.3), aim=Bound(2)
    ),
    "decode_1k": Figure("decode, 1k into the context", "decode", 16, 16, depth=1024),
    "decode_8k": Figure("decode, 8k into the context", "decode", 16, 16, depth=8192),
    "decode_32k": Figure("decode, 32k into the context", "decode", 16, 16, depth=32768),
    "first_token": Figure(
        "first token from process start, prompt of 16",
        "start",
        16,
        limit=Bound(2, "value"),
        aim=Bound(1.2, "value"),
    ),
    "memory": Figure(
        "peak resident, 8k context",
        "memory",
        512,
        8,
        depth=7664,
        limit=Bound(16, "value"),
        aim=Bound(1),
    ),
}


@dataclass(frozen=True)
class Traffic:
    """Bytes of an engine's weights, and of its keys and values for one position."""

    dense: int  # read in every step
    experts: int  # all of them; a step reads those that its tokens chose
    kv_full: float  # of all full layers
    kv_sliding: float

    @classmethod
    def of_manifest(cls, manifest: Mapping[str, Any]) -> Traffic:
        """Counted from the tensors that an artifact's manifest lists."""

        def token_bytes(windowed: bool) -> float:
            groups = (group for group in manifest["kv_groups"] if windowed == bool(group["window"]))
            page = sum(
                len(group["layers"]) * math.prod(group["page_shape"]) * KV_BYTES[group["dtype"]]
                for group in groups
            )
            return page / PAGE_TOKENS

        return cls(
            *_dense_and_experts((w["name"], w["shape"], w["dtype"]) for w in manifest["weights"]),
            token_bytes(windowed=False),
            token_bytes(windowed=True),
        )

    @classmethod
    def of_model(cls, config: GptOssConfig, target: CompileTarget, precision: Precision) -> Traffic:
        """Counted from the tensors that an artifact would hold, without compiling one."""
        from mxforge.compile.models.gpt_oss.tensors import weights
        from mxforge.compile.weights import packed_weights

        packed = packed_weights(weights(config), target.kernels, precision)
        page = page_bytes(config.num_key_value_heads, config.head_dim, precision.kv)
        return cls(
            *_dense_and_experts((w.name, w.shape, w.dtype) for w in packed),
            config.layer_types.count(FULL) * page / PAGE_TOKENS,
            config.layer_types.count(SLIDING) * page / PAGE_TOKENS,
        )

    @classmethod
    def of_gguf(cls, config: GptOssConfig) -> Traffic:
        """Counted from the tensors that the random GGUF holds; keys and values are f16."""
        from benchmarks.random_gguf import tensors

        dense = experts = 0
        for tensor in tensors(config):
            if "_exps." in tensor.name:
                experts += tensor.nbytes
            elif not tensor.name.startswith("token_embd"):
                dense += tensor.nbytes
        return cls(
            dense, experts, config.kv_bytes_per_token(FULL), config.kv_bytes_per_token(SLIDING)
        )

    def weights(self, config: GptOssConfig, tokens: int) -> float:
        """Bytes of weights that a step of so many tokens reads."""
        share = distinct_experts(config, tokens) / config.num_local_experts
        return self.dense + share * self.experts


def _dense_and_experts(weights: Iterable[tuple[str, Sequence[int], str]]) -> tuple[int, int]:
    """Bytes of dense weights and of experts, from names, shapes and dtypes."""
    dense = experts = 0
    for name, shape, dtype in weights:
        nbytes = math.prod(shape) * WEIGHT_BYTES[dtype]
        if ".experts." in name:
            experts += nbytes
        elif "embed_tokens" not in name:  # a row of it
            dense += nbytes
    return dense, experts


def distinct_experts(config: GptOssConfig, tokens: int) -> float:
    """How many experts of a layer so many tokens take, if each takes them evenly at random."""
    missed = 1 - config.num_experts_per_tok / config.num_local_experts
    return config.num_local_experts * (1 - missed**tokens)


def flops_per_token(config: GptOssConfig) -> int:
    """Of one prompt token: 2 for each weight it meets. The output layer sees the last one only."""
    return 2 * (config.active_parameter_count - config.vocab_size * config.hidden_size)


def work(figure: Figure, config: GptOssConfig, traffic: Traffic) -> dict[str, float]:
    """What one decode step, or one prefill, cannot do without: its tokens, bytes and flops."""
    if figure.kind == "prefill":
        chunks = [min(CHUNK, figure.prompt - at) for at in range(0, figure.prompt, CHUNK)]
        nbytes = sum(traffic.weights(config, tokens) for tokens in chunks)
        return {
            "tokens": figure.prompt,
            "bytes": nbytes,
            "flops": figure.prompt * flops_per_token(config),
        }
    length = figure.depth + figure.prompt + figure.new // 2
    cache = length * traffic.kv_full
    cache += min(length, config.sliding_window) * traffic.kv_sliding
    nbytes = traffic.weights(config, figure.batch) + figure.batch * cache
    return {"tokens": figure.batch, "bytes": nbytes, "flops": 0}
