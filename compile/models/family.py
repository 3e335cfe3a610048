"""What a model family is: the one object through which the compiler knows it.

Config, tensors and chat format are told at once. The modules with graph, reference and ONNX graph
are imported when they are asked for, since TVM and onnx take a second to load.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol

import numpy as np

from ..config import Config, Layout, ModelConfig
from .tensors import Tensor, Weight

if TYPE_CHECKING:
    import tvm

    from mxforge.schedules.kernel import Target

    from ..checkpoint import Checkpoint
    from ..formats import Precision
    from ..onnx_builder import Graph
    from ..weights import PackedWeight
    from .emit import Limits


@dataclass(frozen=True)
class ChatFormat:
    """How a family's models are talked to.

    tokenizer       the kind of tokenizer (see `mxforge.tokenizer`) that has the format's tokens
    vocab_size      size of its vocabulary; a model of another size is not made for the format
    stop_token_ids  end a generation where a checkpoint does not say what does
    """

    tokenizer: str
    vocab_size: int
    stop_token_ids: tuple[int, ...]


class Trace(Protocol):
    """What `mxforge diff` compares of one layer, each [n, ...]: see `Reference.layer`."""

    @property
    def after_attention(self) -> np.ndarray: ...  # [n, H] residual stream
    @property
    def mlp_input(self) -> np.ndarray: ...  # [n, H] normed
    @property
    def router_gap(self) -> np.ndarray: ...  # [n]
    @property
    def expert_ids(self) -> np.ndarray: ...  # i32 [n, k]
    @property
    def expert_weights(self) -> np.ndarray: ...  # [n, k]
    @property
    def output(self) -> np.ndarray: ...  # [n, H] residual stream


class Reference(Protocol):
    """The model in NumPy over a checkpoint: what every compiled tensor is held against."""

    def embed(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """[n] token ids → [n, H]."""
        ...

    def layer(self, layer: int, x: np.ndarray) -> Trace:
        """One layer over one sequence from position 0: x [n, H]."""
        ...

    def head(self, x: np.ndarray) -> np.ndarray:
        """Final norm and output layer: [m, H] → logits [m, V]."""
        ...

    def mlp_norm(self, layer: int, x: np.ndarray) -> np.ndarray:
        """x [n, H], the residual stream after attention, as router and experts take it."""
        ...

    def router(self, layer: int) -> np.ndarray:
        """The router's matrix [E, H]."""
        ...


class Family(ABC, Generic[Config]):
    """A model family.

    name          in messages, and of the ONNX graph
    model_type    of config.json
    architecture  of config.json: the class in Hugging Face transformers
    layouts       of checkpoints that can be read
    chat          the chat format of its models; None: text is only continued
    """

    name: ClassVar[str]
    model_type: ClassVar[str]
    architecture: ClassVar[str]
    layouts: ClassVar[tuple[Layout, ...]] = ("huggingface",)
    chat: ClassVar[ChatFormat | None] = None

    def is_named_by(self, raw: Mapping[str, Any]) -> bool:
        """Whether `model_type` and `architectures` of a config.json both mean this family.

        One of them suffices where the other is absent.
        """
        model_type, architectures = raw.get("model_type"), raw.get("architectures")
        named = architectures if isinstance(architectures, list) else []
        if model_type is None:
            return self.architecture in named
        return model_type == self.model_type and (not named or self.architecture in named)

    def layout(self, raw: Mapping[str, Any]) -> Layout | None:
        """The layout whose keys a config.json has, None where no layout's of this family.

        ConfigError where it mixes two.
        """
        return "huggingface" if self.is_named_by(raw) else None

    @abstractmethod
    def parse(self, raw: Mapping[str, Any], layout: Layout) -> Config:
        """The content of a config.json; ConfigError naming what is wrong."""

    @abstractmethod
    def tensors(self, config: Config) -> dict[str, Tensor]:
        """Every tensor of a checkpoint by its canonical name, in the order of use."""

    def stored_names(self, config: Config, layout: Layout) -> Mapping[str, tuple[str, ...]]:
        """Names in the files of a layout -> the canonical tensors whose rows each holds."""
        return {name: (name,) for name in self.tensors(config)}

    def stop_token_ids(self, config: ModelConfig) -> tuple[int, ...]:
        """What ends a generation where the checkpoint does not say."""
        if self.chat is None or self.chat.vocab_size != config.vocab_size:
            return ()
        return self.chat.stop_token_ids

    @abstractmethod
    def weights(self, config: Config) -> list[Weight]:
        """Every weight in the order of the library's arguments."""

    @abstractmethod
    def piece_weights(self, piece: str | int, names: Iterable[str]) -> list[str]:
        """Which of the library's weights a piece takes: "embed", "head", or a layer's number."""

    @abstractmethod
    def module(
        self,
        config: Config,
        target: Target,
        precision: Precision,
        limits: Limits,
        weights: Sequence[PackedWeight],
    ) -> tvm.IRModule:
        """All functions of the library in Relax, unlowered."""

    @abstractmethod
    def reference(self, checkpoint: Checkpoint, dtype: Any = np.float32) -> Reference:
        """The model in NumPy, in float32 or float64; raises what `checkpoint.check` does."""

    @abstractmethod
    def add_onnx(self, graph: Graph, config: Config, token_ids: str, logits: str) -> None:
        """Add the nodes that make f32 [n, V] `logits` of i64 [n] `token_ids`."""
