"""mxforge diff: an artifact against its checkpoint, tensor by tensor.

Every part of the compiled model is run on the reference's own input of that part, so that an error
shows where it is made and does not grow from layer to layer. One sequence of random tokens goes
through embedding, every layer and head; the first tensor outside its bound ends the comparison.

A tensor's error is ‖ours - reference‖ / ‖reference‖ over all tokens; beside it stands the token
whose row errs most. Bounds: 1e-4 with exact numerics, 1e-2 with fast ones.

Routing is discrete: where two experts' logits are close, an error within the bound picks another
expert, and the token's output is another one, though rightly computed. So each token has in each
layer its *own error*, the most by which two of its router logits can have moved against each other:

    own = 2 (max |norm(a' - a) Wᵀ| + 2⁻²² max Σ |norm(a)| |W|)

over all experts, where a' is the library's residual stream after attention, a the
reference's, norm(a' - a) the difference of both normed, and W the router. The first part is what
the measured error of a' does to the logits, the second what rounding to f32 inside norm and router
may add. A token whose router gap (k-th less k+1-th logit) is below `own` is a *close call*. Where
it took other experts than the reference (it is *rerouted*), it is left out of what follows; both
are counted. Any other token must take the reference's experts, and is compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 (bf16 tensors need it; without it, fail here)
import numpy as np

from mxforge.artifact import Artifact, open_artifact
from mxforge.core import CoreLibrary
from mxforge.errors import ArtifactError, NumericsError, UsageError
from mxforge.kv_layout import PAGE_TOKENS
from mxforge.machine import default_threads
from mxforge.manifest import WeightInfo

from .checkpoint import FolderCheckpoint, open_checkpoint
from .checkpoint.fingerprint import fingerprint
from .models.family import Family, Reference, Trace
from .models.tensors import layer_number

BOUNDS = {"exact": 1e-4, "fast": 1e-2}
_ROUNDING = 2.0**-22  # four times the distance of an f32 to its neighbours, over two
_HEAD_ROWS = 64  # tokens whose logits are compared at a time: 51 MB of a 201,088 vocabulary


@dataclass(frozen=True)
class Comparison:
    """One tensor, of layer `layer` (None: of embedding or head).

    error        relative, over all tokens that count; None where it is not finite
    token        position of the token whose row errs most, by `token_error`
    compared     tokens that count
    close_calls  tokens whose routing could go either way; told with `expert_ids`
    rerouted     how many of them took other experts, and are left out after that

    `expert_ids` has as its errors the largest router gap among tokens that took other experts
    than the reference without being close calls (0: none did), and as its bound the own error of
    the token that it names.
    """

    tensor: str
    layer: int | None
    error: float | None
    bound: float
    token: int
    token_error: float | None
    compared: int
    close_calls: int = 0
    rerouted: int = 0

    @property
    def ok(self) -> bool:
        return self.error is not None and self.error <= self.bound

    @property
    def where(self) -> str:
        return self.tensor if self.layer is None else f"layer {self.layer} {self.tensor}"

    def __str__(self) -> str:
        line = (
            f"{self.where:28} error {_number(self.error):>9}  bound {self.bound:.1e}"
            f"  worst token {self.token} of {self.compared}: {_number(self.token_error)}"
        )
        if self.close_calls:
            line += f"; {self.close_calls} close calls, {self.rerouted} of them rerouted"
        return line


@dataclass
class Report:
    """All comparisons, up to the first outside its bound; `routed` counts token-layers."""

    artifact: str
    target: str
    numerics: str
    tokens: int
    seed: int
    comparisons: list[Comparison] = field(default_factory=list)

    @property
    def failure(self) -> Comparison | None:
        """The tensor outside its bound, if there is one."""
        return next((c for c in self.comparisons if not c.ok), None)

    @property
    def routed(self) -> int:
        """Routing decisions looked at: tokens times layers."""
        return sum(c.compared for c in self.comparisons if c.tensor == "expert_ids")

    @property
    def close_calls(self) -> int:
        """How many of them could go either way."""
        return sum(c.close_calls for c in self.comparisons)

    @property
    def rerouted(self) -> int:
        """How many close calls took other experts than the reference."""
        return sum(c.rerouted for c in self.comparisons)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON-able values."""
        return {
            "artifact": self.artifact,
            "target": self.target,
            "numerics": self.numerics,
            "tokens": self.tokens,
            "seed": self.seed,
            "ok": self.failure is None,
            "routed": self.routed,
            "close_calls": self.close_calls,
            "rerouted": self.rerouted,
            "comparisons": [asdict(c) | {"ok": c.ok} for c in self.comparisons],
        }

    def check(self) -> None:
        """NumericsError naming the tensor outside its bound."""
        wrong = self.failure
        if wrong is None:
            return
        if wrong.tensor == "expert_ids":
            raise NumericsError(
                f"Layer {wrong.layer} routes token {wrong.token} to other experts than the "
                f"reference, though the router gap of {_number(wrong.error)} is above the "
                f"token's own error of {wrong.bound:.1e}; its router or its top-k is wrong."
            )
        raise NumericsError(
            f"{wrong.where} differs by {_number(wrong.error)}, expected at most {wrong.bound:.0e} "
            f"({self.numerics} numerics, {self.target}); worst is token {wrong.token} with "
            f"{_number(wrong.token_error)}. What comes before it agrees."
        )


def _number(error: float | None) -> str:
    return "infinity" if error is None else f"{error:.1e}"


def compare(
    artifact: str | Path,
    checkpoint: str | Path,
    *,
    tokens: int = 64,
    seed: int = 0,
    announce: Callable[[str], None] | None = None,
    dtype: Any = np.float32,
    bound: float | None = None,
) -> Report:
    """Run `artifact` part by part beside the reference over `checkpoint`.

    tokens    length of the sequence, at most the model's context
    seed      of its random token ids, 0 or more
    announce  is told every tensor's error as it is known
    dtype     what the reference computes in, float32 or float64
    bound     of every tensor's error, in place of that of the numerics

    Needs memory for the largest expert and dense tensor of one layer in `dtype`, not for the
    model. Raises ArtifactError (also where the artifact is not of this checkpoint, or has random
    weights), CheckpointError, UsageError; a tensor outside its bound is in the report.
    """
    opened = open_artifact(artifact)
    manifest = opened.manifest
    if tokens < 1 or tokens > manifest.limits.context:
        raise UsageError(f"tokens must be from 1 to {manifest.limits.context}, found {tokens}.")
    if seed < 0:
        raise UsageError(f"seed must be 0 or more, found {seed}.")
    source = open_checkpoint(checkpoint)
    source.check()
    _check_pair(opened, source)
    report = Report(
        str(artifact), opened.variant.target, manifest.numerics, tokens=tokens, seed=seed
    )
    limit = BOUNDS[manifest.numerics] if bound is None else bound
    for comparison in _comparisons(opened, source, dtype, tokens, seed, limit):
        report.comparisons.append(comparison)
        if announce is not None:
            announce(str(comparison))
        if not comparison.ok:
            break
    else:
        if announce is not None:
            announce(
                f"all within bounds on {report.target}; {report.close_calls} of {report.routed} "
                f"routings were close calls, {report.rerouted} took other experts"
            )
    return report


def _check_pair(artifact: Artifact, checkpoint: FolderCheckpoint) -> None:
    """ArtifactError where the artifact was not compiled from this checkpoint."""
    manifest = artifact.manifest
    if manifest.random_seed is not None:
        raise ArtifactError(
            f"{artifact.path} was compiled with --random-weights, so no checkpoint holds its "
            "weights; compile the checkpoint itself to compare."
        )
    ours, theirs = dict(manifest.config), checkpoint.config.to_dict()
    different = sorted(k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k))
    if different:
        key = different[0]
        raise ArtifactError(
            f"{artifact.path} was not compiled from {checkpoint.path}: the artifact has {key} "
            f"{ours.get(key)}, the checkpoint {theirs.get(key)}; give the checkpoint it was "
            "compiled from."
        )
    if manifest.source.sha256 != fingerprint(checkpoint):
        raise ArtifactError(
            f"{artifact.path} was not compiled from {checkpoint.path}: the shapes are the same, "
            "but the weights are others; give the checkpoint it was compiled from."
        )


def random_tokens(vocab_size: int, count: int, seed: int = 0) -> np.ndarray:
    """Token ids i32 [count], the same for a seed on every machine."""
    drawn = np.asarray(np.random.PCG64(seed).random_raw(count), np.uint64)
    tokens: np.ndarray = (drawn % np.uint64(vocab_size)).astype(np.int32)
    return tokens


def _comparisons(
    artifact: Artifact,
    checkpoint: FolderCheckpoint,
    dtype: Any,
    count: int,
    seed: int,
    bound: float,
) -> Iterator[Comparison]:
    """Every tensor in the order of computation, as it is asked for."""
    family, config = checkpoint.family, checkpoint.config
    reference = family.reference(checkpoint, dtype)
    parts = _Parts(artifact, family, count)
    everyone = np.ones(count, bool)
    ids = random_tokens(config.vocab_size, count, seed)
    x = reference.embed(ids)
    yield _tensor("embedding", None, parts.embed(ids), x, bound, everyone)
    for layer in range(config.num_hidden_layers):
        truth = reference.layer(layer, x)
        yield from _layer(parts.layer(layer, x), truth, layer, reference, bound)
        x = truth.output
        _drop(checkpoint, layer)
    rows = [x[start : start + _HEAD_ROWS] for start in range(0, count, _HEAD_ROWS)]
    squares = [_squares(parts.head(block), reference.head(block)) for block in rows]
    yield _compared("logits", None, np.concatenate(squares, axis=1), bound, everyone)


def _layer(
    ours: _LayerOutputs,
    truth: Trace,
    layer: int,
    reference: Reference,
    bound: float,
) -> Iterator[Comparison]:
    everyone = np.ones(len(truth.output), bool)
    yield _tensor(
        "after_attention", layer, ours.after_attention, truth.after_attention, bound, everyone
    )
    own = _own_error(ours.after_attention, truth, layer, reference)
    close = truth.router_gap < own
    # The order among a token's experts is no matter of routing: compare by expert id.
    order, true_order = np.argsort(ours.expert_ids), np.argsort(truth.expert_ids)
    expert_ids = np.take_along_axis(ours.expert_ids, order, 1)
    same = (expert_ids == np.take_along_axis(truth.expert_ids, true_order, 1)).all(axis=1)
    gap = np.where(same | close, 0, truth.router_gap)
    token = int(np.argmax(gap))
    yield Comparison(
        "expert_ids",
        layer,
        error=_finite(gap[token]),
        bound=float(own[token]),
        token=token,
        token_error=_finite(gap[token]),
        compared=len(gap),
        close_calls=int(close.sum()),
        rerouted=int((close & ~same).sum()),
    )
    weights = np.take_along_axis(ours.expert_weights, order, 1)
    true_weights = np.take_along_axis(truth.expert_weights, true_order, 1)
    yield _tensor("expert_weights", layer, weights, true_weights, bound, same)
    yield _tensor("output", layer, ours.output, truth.output, bound, same)


def _own_error(
    after_attention: np.ndarray, truth: Trace, layer: int, reference: Reference
) -> np.ndarray:
    """f64 [n]: the most by which two of a token's router logits can have moved against each other;
    see the module."""
    normed = reference.mlp_norm(layer, after_attention.astype(truth.mlp_input.dtype))
    router = reference.router(layer).T
    moved = np.abs((normed - truth.mlp_input) @ router).max(axis=1)
    rounded = _ROUNDING * (np.abs(truth.mlp_input) @ np.abs(router)).max(axis=1)
    return np.asarray(2 * (moved + rounded), np.float64)


def _tensor(
    name: str,
    layer: int | None,
    ours: np.ndarray,
    truth: np.ndarray,
    bound: float,
    kept: np.ndarray,
) -> Comparison:
    """Two tensors [n, ...], of which the `kept` rows count."""
    return _compared(name, layer, _squares(ours, truth), bound, kept)


def _squares(ours: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """f64 [2, n]: the squared norms of every row's difference and of the true row."""
    return np.stack(
        [np.square(array, dtype=np.float64).sum(axis=1) for array in (ours - truth, truth)]
    )


def _compared(
    name: str,
    layer: int | None,
    squares: np.ndarray,
    bound: float,
    kept: np.ndarray,
) -> Comparison:
    """The comparison of two tensors by their `_squares`."""
    difference, size = np.where(kept, squares, 0)
    # argmax: the first row that is no number, if one is
    token = int(np.argmax(_relative(difference, size)))
    return Comparison(
        name,
        layer,
        error=_finite(_relative(difference.sum(), size.sum())),
        bound=bound,
        token=token,
        token_error=_finite(_relative(difference[token], size[token])),
        compared=int(kept.sum()),
    )


def _relative(difference: np.ndarray, size: np.ndarray) -> np.ndarray:
    """√(difference / size); where size is 0, anything but 0 is infinitely wrong."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: np.ndarray = np.sqrt(np.where(difference == 0, 0.0, difference / size))
    return ratio


def _finite(value: np.ndarray) -> float | None:
    return float(value) if math.isfinite(value) else None


def _drop(checkpoint: FolderCheckpoint, layer: int) -> None:
    """Let go of a layer's pages of the mapped checkpoint."""
    for name in checkpoint.family.tensors(checkpoint.config):
        if layer_number(name) == layer:
            checkpoint.drop(name)


@dataclass(frozen=True)
class _LayerOutputs:
    """What `layer_sliding` and `layer_full` return."""

    after_attention: np.ndarray  # f32 [n, H]
    expert_ids: np.ndarray  # i32 [n, k]
    expert_weights: np.ndarray  # f32 [n, k]
    output: np.ndarray  # f32 [n, H]


class _Parts:
    """The library's functions embed, layer_* and head on one sequence from position 0."""

    def __init__(self, artifact: Artifact, family: Family[Any], count: int) -> None:
        self._family = family
        manifest = artifact.manifest
        variant = artifact.variant
        self._library = CoreLibrary(
            variant.target, artifact.path / variant.plan, artifact.library, default_threads()
        )
        self._weights = {weight.name: _content(artifact, weight) for weight in manifest.weights}
        self._kinds = manifest.layer_groups
        pages = -(-count // PAGE_TOKENS)
        *heads, row = manifest.kv_groups[0].page_shape
        # One layer's: every layer writes all positions before it reads them.
        self._kv = np.zeros((*heads, pages, row), manifest.kv_groups[0].dtype)
        # Backwards, so that a logical page is not its physical one.
        table = np.arange(pages, dtype=np.int32)[None, ::-1].copy()
        first = np.zeros(1, np.int32)
        positions, token_seq = np.arange(count, dtype=np.int32), np.zeros(count, np.int32)
        self._step = [positions, token_seq, table, first, table, first]

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        """i32 [n] -> f32 [n, H]."""
        return self._library.call("embed", [tokens, *self._of_piece("embed")])[0]

    def layer(self, layer: int, x: np.ndarray) -> _LayerOutputs:
        """x [n, H], the whole sequence's."""
        x = np.ascontiguousarray(x, np.float32)
        given = [x, *self._step, self._kv, *self._of_piece(layer)]
        return _LayerOutputs(*self._library.call(f"layer_{self._kinds[layer]}", given))

    def head(self, x: np.ndarray) -> np.ndarray:
        """x [m, H] -> logits f32 [m, V]."""
        x = np.ascontiguousarray(x, np.float32)
        return self._library.call("head", [x, *self._of_piece("head")])[0]

    def _of_piece(self, piece: str | int) -> list[np.ndarray]:
        """The weights that a piece of the model takes."""
        return [self._weights[name] for name in self._family.piece_weights(piece, self._weights)]


def _content(artifact: Artifact, weight: WeightInfo) -> np.ndarray:
    assert weight.file is not None  # random weights are not compared
    return artifact.weight_files[weight.file].array(weight.name)


__all__ = ["BOUNDS", "Comparison", "Report", "compare", "random_tokens"]
