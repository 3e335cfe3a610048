"""The library's functions in Python: arrays in, arrays out, with weights and KV pages bound.

The argument order of every function stands in the compiler's `models/gpt_oss.py` (ABI 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .artifact import Artifact
from .errors import ArtifactCorruptError
from .kv import PageNeeds, PageTables
from .kv_layout import page_bytes, row_elements
from .library import Library, aligned_empty, keep_forever
from .machine import available_memory
from .manifest import REMEDY, Manifest, WeightInfo
from .prefault import Prefault
from .random_weights import fill_random
from .results import TokenLogprob
from .sampling import SampleArguments
from .sparse_map import map_sparse

EMBEDDING = "model.embed_tokens.weight"


class Model:
    """One artifact on its device; for one thread."""

    def __init__(self, artifact: Artifact, needs: PageNeeds) -> None:
        manifest = artifact.manifest
        self.library = Library(
            artifact.library, artifact.variant.target, device_code=artifact.device_code
        )
        self.kinds = layer_kinds(manifest)
        self.vocab_size = int(manifest.config["vocab_size"])
        self.weights, mapped = load_weights(self.library, artifact)
        self._ordered = [self.weights[name] for name in manifest.weights_order]
        pages = {"full": needs.full_pages, "sliding": needs.sliding_pages}
        self.kv = [
            self.library.empty(kv_shape(manifest, pages[kind]), manifest.precision.kv_dtype)
            for kind in self.kinds
        ]
        self._prefault = Prefault(mapped)  # last, so that an error above leaves no thread behind

    def close(self) -> None:
        """Free all memory; the files can be unmapped. The model is of no use afterwards."""
        try:
            self.library.synchronize()
        except RuntimeError:  # lost since the last step, and nobody asks any more
            self.forsake()
        else:
            self._free()

    def forsake(self) -> None:
        """Close it where its device was lost, so that the device can be opened anew."""
        if self.library.frees_after_loss:
            self._free()
            return
        self._prefault.close()
        keep_forever(self)

    def _free(self) -> None:
        self._prefault.close()
        self.weights.clear()
        self._ordered.clear()
        self.kv.clear()
        self.library.close()

    def forward(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        token_seq: Sequence[int],
        logit_indices: Sequence[int],
        tables: PageTables,
    ) -> Any:
        """Logits f32 [len(logit_indices), vocabulary] of these tokens, on the device.

        Without indices the result is not to be used.
        """
        if not logit_indices and not self.library.on_cpu:
            logit_indices = [0]  # a GPU cannot launch a kernel over nothing
        return self.library["forward"](
            *self._i32(tokens, positions, token_seq, logit_indices),
            *self._tables(tables),
            *self.kv,
            *self._ordered,
        )

    def decode(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        token_seq: Sequence[int],
        tables: PageTables,
    ) -> Any:
        """Logits f32 [sequences, vocabulary] of one token a sequence, on the device."""
        return self.library["decode"](
            *self._i32(tokens, positions, token_seq),
            *self._tables(tables),
            *self.kv,
            *self._ordered,
        )

    def sample(
        self, logits: Any, arguments: SampleArguments, logprobs: bool
    ) -> tuple[list[int], list[TokenLogprob] | None]:
        """Token ids of the first rows of `logits`, as many as `arguments` are for."""
        count = len(arguments.step)
        logits = self._first(logits, count)
        ids = self.library["sample"](logits, *(self.library.tensor(a) for a in arguments))
        chosen_ids = [int(token) for token in self.library.numpy(ids)]
        if not logprobs:
            return chosen_ids, None
        values, top_ids, top_values = (
            self.library.numpy(part) for part in self.library["logprobs"](logits, ids)
        )
        return chosen_ids, [
            TokenLogprob(
                chosen_ids[row],
                float(values[row]),
                tuple(
                    (int(token), float(value))
                    for token, value in zip(top_ids[row], top_values[row], strict=True)
                    if token >= 0
                ),
            )
            for row in range(count)
        ]

    def read_logits(self, logits: Any, start: int, count: int) -> np.ndarray:
        """Rows of device logits, `count` from `start`, as a host array: f32 [count, vocabulary]."""
        return self.library.numpy(logits)[start : start + count]

    def copy_pages(self, kind: str, copies: Sequence[tuple[int, int]]) -> None:
        """Copy KV pages (source, destination) in every layer of `kind`."""
        tensors = [kv for kv, its in zip(self.kv, self.kinds, strict=True) if its == kind]
        if copies and tensors:
            source, destination = zip(*copies, strict=True)
            self.library[f"kv_copy_pages_{kind}"](*self._i32(source, destination), *tensors)

    def _first(self, logits: Any, count: int) -> Any:
        if logits.shape[0] == count:
            return logits
        return self.library.view(logits, (count, self.vocab_size), "float32")

    def _i32(self, *values: Sequence[int]) -> list[Any]:
        return [self.library.tensor(np.asarray(value, np.int32)) for value in values]

    def _tables(self, tables: PageTables) -> list[Any]:
        order = (
            tables.sliding_table,
            tables.sliding_first,
            tables.full_table,
            tables.full_first,
        )
        return [self.library.tensor(table) for table in order]


def layer_kinds(manifest: Manifest) -> list[str]:
    """'sliding' or 'full' for every layer."""
    return [
        "sliding" if layer == "sliding_attention" else "full"
        for layer in manifest.config["layer_types"]
    ]


def kv_shape(manifest: Manifest, pages: int) -> tuple[int, int, int, int]:
    """Shape of one layer's KV tensor of `pages` pages, as schedules/formats/kv.py tells it."""
    heads, head_dim = _kv_heads(manifest)
    return (2, heads, pages, row_elements(head_dim, manifest.precision.kv_dtype))


def _kv_heads(manifest: Manifest) -> tuple[int, int]:
    """How many, and their size."""
    return int(manifest.config["num_key_value_heads"]), int(manifest.config["head_dim"])


def check_memory_plan(manifest: Manifest) -> None:
    """Raise ArtifactCorruptError where loading would take more memory than the plan says."""
    memory, kinds = manifest.memory, layer_kinds(manifest)
    page = page_bytes(*_kv_heads(manifest), manifest.precision.kv_dtype)
    made = [weight for weight in manifest.weights if weight.file is None]
    for name, planned, needed in (
        ("kv_bytes_per_page_full", memory.kv_bytes_per_page_full, page * kinds.count("full")),
        (
            "kv_bytes_per_page_sliding",
            memory.kv_bytes_per_page_sliding,
            page * kinds.count("sliding"),
        ),
        ("weights_bytes", memory.weights_bytes, sum(weight.nbytes for weight in made)),
    ):
        if planned < needed:
            raise ArtifactCorruptError(
                f"The manifest's memory.{name} should be at least {needed}, but is {planned}; "
                f"{REMEDY}"
            )


def load_weights(library: Library, artifact: Artifact) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Every weight by name: views of the mapped files, copies on a GPU, or random ones made here.

    Beside them what is worth mapping ahead, in order: all that is mapped but the embedding, on a
    CPU; nothing where it does not fit into memory. Raises ArtifactCorruptError where the system
    does not map a file.
    """
    try:
        return _load_weights(library, artifact)
    except OSError as error:
        raise ArtifactCorruptError(
            f"{artifact.path}: its weights should be files that can be mapped into memory, but: "
            f"{error}. See whether they are still there, and `ulimit -v`; else {REMEDY}"
        ) from error


def _load_weights(library: Library, artifact: Artifact) -> tuple[dict[str, Any], list[np.ndarray]]:
    files = {
        name: np.memmap(opened.path, np.uint8, mode="c")  # copy-on-write: TVM refuses read-only
        for name, opened in artifact.weight_files.items()
    }
    weights, mapped = {}, []
    for weight in artifact.manifest.weights:
        if weight.file is None:
            content = _made(weight, artifact.manifest)
        else:
            where = artifact.weight_files[weight.file].tensors[weight.name]
            if weight.name == EMBEDDING and library.on_cpu:  # a step reads a row a token
                path = artifact.weight_files[weight.file].path
                content = map_sparse(path, where.begin, where.end)
            else:
                content = files[weight.file][where.begin : where.end]
                mapped.append(content)
        weights[weight.name] = library.weight(content, weight.shape, weight.dtype)
    available = available_memory()
    fits = available is None or sum(array.nbytes for array in mapped) <= available
    return weights, mapped if library.on_cpu and fits else []


def _made(weight: WeightInfo, manifest: Manifest) -> np.ndarray:
    assert weight.fill is not None  # the manifest was checked
    assert manifest.random_seed is not None
    content = aligned_empty([weight.nbytes], np.uint8)
    fill_random(content, weight.name, weight.dtype, weight.fill, manifest.random_seed)
    return content
