"""gpt-oss: OpenAI's mixture-of-experts models with MXFP4 experts, attention sinks and harmony."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mxforge.tokenizer import HARMONY_SPECIAL_TOKENS, HARMONY_VOCAB

from ...config import Layout
from ..family import ChatFormat, Family
from ..tensors import Tensor, Weight
from . import tensors
from .config import GptOssConfig, config_layout

if TYPE_CHECKING:
    import tvm

    from mxforge.schedules.kernel import Target

    from ...checkpoint import Checkpoint
    from ...formats import Precision
    from ...onnx_builder import Graph
    from ...weights import PackedWeight
    from ..emit import Limits
    from .reference import ReferenceModel

HARMONY = ChatFormat(
    tokenizer="o200k_harmony",
    vocab_size=HARMONY_VOCAB,
    stop_token_ids=tuple(
        HARMONY_SPECIAL_TOKENS[name] for name in ("<|return|>", "<|endoftext|>", "<|call|>")
    ),
)


class GptOssFamily(Family[GptOssConfig]):
    """Every method does what its base says."""

    name = "gpt-oss"
    model_type = "gpt_oss"
    architecture = "GptOssForCausalLM"
    layouts = ("huggingface", "openai")
    chat = HARMONY

    def layout(self, raw: Mapping[str, Any]) -> Layout | None:
        return config_layout(raw)

    def parse(self, raw: Mapping[str, Any], layout: Layout) -> GptOssConfig:
        return GptOssConfig.from_openai(raw) if layout == "openai" else GptOssConfig.from_hf(raw)

    def tensors(self, config: GptOssConfig) -> dict[str, Tensor]:
        return tensors.expected_tensors(config)

    def stored_names(self, config: GptOssConfig, layout: Layout) -> dict[str, tuple[str, ...]]:
        return tensors.stored_names(config, layout)

    def weights(self, config: GptOssConfig) -> list[Weight]:
        return tensors.weights(config)

    def piece_weights(self, piece: str | int, names: Iterable[str]) -> list[str]:
        return tensors.piece_weights(piece, names)

    def module(
        self,
        config: GptOssConfig,
        target: Target,
        precision: Precision,
        limits: Limits,
        weights: Sequence[PackedWeight],
    ) -> tvm.IRModule:
        from .graph import GptOss

        return GptOss(config, target, precision, limits, weights).module()

    def reference(self, checkpoint: Checkpoint, dtype: Any = np.float32) -> ReferenceModel:
        from .reference import ReferenceModel

        return ReferenceModel(checkpoint, dtype)

    def add_onnx(self, graph: Graph, config: GptOssConfig, token_ids: str, logits: str) -> None:
        from .onnx_graph import add_model

        add_model(graph, config, token_ids, logits)


GPT_OSS = GptOssFamily()
