"""A random GGUF of a gpt-oss shape for llama.cpp: MXFP4 experts, Q8_0 dense layers, f32 rest.

Only for speed: the weights have the scale of real ones, so that activations stay near 1 and
routing stays spread, and are slices of one random pool, so that a full-size file is a matter of
disk speed. The vocabulary is a dummy of the right size.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import gguf
import numpy as np
from tqdm import tqdm

from mxforge.compile.config import FULL, SLIDING
from mxforge.compile.models.gpt_oss.config import GptOssConfig

ARCH = "gpt-oss"
_BLOCK = 32  # values of one block, of both formats
_POOL_BLOCKS = 1_000_003  # a prime, so that rows of no length repeat within a pool

F32 = gguf.GGMLQuantizationType.F32
MXFP4 = gguf.GGMLQuantizationType.MXFP4
Q8_0 = gguf.GGMLQuantizationType.Q8_0


@dataclass(frozen=True)
class Tensor:
    """`shape` in NumPy's order: the last axis is the one that a product sums over.

    Quantized values have a variance of 1 / shape[-1]; f32 ones are normal with `deviation`
    around `mean`.
    """

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType = F32
    deviation: float = 0.02
    mean: float = 0.0

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * size


def unsupported(config: GptOssConfig) -> str | None:
    """Why llama.cpp cannot run this shape; None where it can."""
    alternating = tuple(FULL if i % 2 else SLIDING for i in range(config.num_hidden_layers))
    if config.layer_types != alternating:
        return "its layers must alternate between sliding and full attention"
    if config.q_size % _BLOCK or config.hidden_size % _BLOCK:
        return f"its row lengths must be multiples of {_BLOCK}"
    if config.rope_type != "yarn":
        return "its RoPE must be YaRN"
    return None


def tensors(config: GptOssConfig) -> list[Tensor]:
    """Every tensor that llama.cpp's gpt-oss wants, in the order of the file."""
    c = config
    hidden, units, experts = c.hidden_size, c.intermediate_size, c.num_local_experts
    listed = [Tensor("token_embd.weight", (c.vocab_size, hidden), Q8_0)]
    for layer in range(c.num_hidden_layers):
        block = f"blk.{layer}"
        listed += [
            Tensor(f"{block}.attn_norm.weight", (hidden,), deviation=0.0, mean=1.0),
            Tensor(f"{block}.post_attention_norm.weight", (hidden,), deviation=0.0, mean=1.0),
            Tensor(f"{block}.attn_sinks.weight", (c.num_attention_heads,), deviation=1.0),
            *_linear(f"{block}.attn_q", (c.q_size, hidden), Q8_0),
            *_linear(f"{block}.attn_k", (c.kv_size, hidden), Q8_0),
            *_linear(f"{block}.attn_v", (c.kv_size, hidden), Q8_0),
            *_linear(f"{block}.attn_output", (hidden, c.q_size), Q8_0),
            Tensor(f"{block}.ffn_gate_inp.weight", (experts, hidden), deviation=hidden**-0.5),
            Tensor(f"{block}.ffn_gate_inp.bias", (experts,)),
            *_linear(f"{block}.ffn_gate_exps", (experts, units, hidden), MXFP4),
            *_linear(f"{block}.ffn_up_exps", (experts, units, hidden), MXFP4),
            *_linear(f"{block}.ffn_down_exps", (experts, hidden, units), MXFP4),
        ]
    return [
        *listed,
        Tensor("output_norm.weight", (hidden,), deviation=0.0, mean=1.0),
        Tensor("output.weight", (c.vocab_size, hidden), Q8_0),
    ]


def _linear(name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> list[Tensor]:
    return [Tensor(f"{name}.weight", shape, kind), Tensor(f"{name}.bias", shape[:-1])]


def active_bytes(config: GptOssConfig, distinct_experts: float | None = None) -> float:
    """Weight bytes that one decode step reads, if so many experts of a layer take part."""
    used = config.num_experts_per_tok if distinct_experts is None else distinct_experts
    total = 0.0
    for tensor in tensors(config):
        if tensor.name == "token_embd.weight":
            continue  # a row of it
        part = used / config.num_local_experts if "_exps." in tensor.name else 1.0
        total += part * tensor.nbytes
    return total


def write_gguf(path: Path, config: GptOssConfig, seed: int = 0) -> None:
    """Write the file under a temporary name, and rename it when it is complete."""
    work = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    writer = gguf.GGUFWriter(work, ARCH)
    try:
        _metadata(writer, config)
        listed = tensors(config)
        for tensor in listed:
            writer.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        pools = _Pools(np.random.default_rng(seed))
        total = sum(tensor.nbytes for tensor in listed)
        with tqdm(
            total=total, unit="B", unit_scale=True, desc="GGUF", disable=not sys.stderr.isatty()
        ) as bar:
            for tensor in listed:
                writer.write_tensor_data(pools.content(tensor))
                bar.update(tensor.nbytes)
        writer.close()
        work.rename(path)
    finally:
        work.unlink(missing_ok=True)


def _metadata(writer: gguf.GGUFWriter, c: GptOssConfig) -> None:
    writer.add_name("random gpt-oss")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_MXFP4_MOE)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_expert_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(c.yarn_factor)
    writer.add_rope_scaling_orig_ctx_len(c.original_max_position_embeddings)
    writer.add_sliding_window(c.sliding_window)
    writer.add_expert_count(c.num_local_experts)
    writer.add_expert_used_count(c.num_experts_per_tok)
    tokens = list(_vocabulary(c.vocab_size))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-4o")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges([f"{tokens[0]} {tokens[1]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(c.vocab_size - 1)


def _vocabulary(size: int) -> Iterator[str]:
    """Distinct strings. (Every byte's own token would come first in a real one.)"""
    for token in range(size):
        yield chr(0x21 + token) if token < 94 else f"t{token}"


class _Pools:
    """Random blocks of each format, made once for a row length."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._made: dict[Any, np.ndarray] = {}

    def content(self, tensor: Tensor) -> Any:
        if tensor.kind == F32:
            values = self._rng.normal(tensor.mean, tensor.deviation, tensor.shape)
            return values.astype(np.float32)
        key = (tensor.kind, tensor.shape[-1])
        if key not in self._made:
            self._made[key] = _BLOCKS[tensor.kind](self._rng, tensor.shape[-1])
        start = int(self._rng.integers(_POOL_BLOCKS))
        return _Repeated(self._made[key], start, tensor.nbytes)


def _mxfp4(rng: np.random.Generator, k: int) -> np.ndarray:
    """u8 [blocks, 17]: an exponent, then 32 nibbles of e2m1 (root mean square 2.9)."""
    blocks = rng.integers(0, 256, (_POOL_BLOCKS, 17), np.uint8)
    blocks[:, 0] = 127 - round(math.log2(2.9 * math.sqrt(k)))
    return blocks


def _q8_0(rng: np.random.Generator, k: int) -> np.ndarray:
    """u8 [blocks, 34]: an f16 scale, then 32 signed bytes (root mean square 73)."""
    blocks = rng.integers(-127, 128, (_POOL_BLOCKS, 34), np.int8).view(np.uint8)
    scale = np.array([1 / (73 * math.sqrt(k))], np.float16)
    blocks[:, :2] = scale.view(np.uint8)
    return blocks


_BLOCKS = {MXFP4: _mxfp4, Q8_0: _q8_0}


class _Repeated:
    """As much of an array as GGUFWriter uses, of any size: a pool of blocks over and over."""

    def __init__(self, blocks: np.ndarray, start: int, nbytes: int) -> None:
        self._blocks, self._start, self.nbytes = blocks, start, nbytes

    def tofile(self, file: IO[bytes]) -> None:
        left, start = self.nbytes // self._blocks.shape[1], self._start
        while left:
            chunk = self._blocks[start : start + left]
            file.write(chunk.data)
            left -= len(chunk)
            start = 0
