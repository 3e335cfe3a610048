"""How much memory a model takes and whether it is there: said before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from . import core, vulkan
from .errors import KVMemoryError
from .kv_layout import PAGE_TOKENS, page_shape, pages_needed
from .machine import available_memory
from .manifest import KvGroup, Manifest

# Beside weights, cache and planned workspace: the logits of one step, what TVM and the driver keep.
OVERHEAD_BYTES = 512 << 20
SMALLER_CACHE = "int8"  # what is proposed where it would fit


@dataclass(frozen=True)
class Room:
    """What a model may take of the memory that its tensors lie in; None: unknown, all is tried.

    tensor_bytes    the largest tensor that can be allocated
    where           for a GPU its name in messages, such as " on vulkan:0"
    """

    bytes: int | None
    tensor_bytes: int | None = None
    where: str = ""


@dataclass(frozen=True)
class Demand:
    """What a model takes.

    weights         bytes of what is made in memory or copied to it
    work            bytes beside weights and cache
    prefill_chunk   prompt tokens of one step
    groups          of the cache
    """

    weights: int
    work: int
    prefill_chunk: int
    groups: tuple[KvGroup, ...]

    def pages(self, context: int, batch: int) -> list[int]:
        """Of each group, for so many sequences of that many tokens."""
        step = self.prefill_chunk + batch
        return [pages_needed(group.window, context, batch, step) for group in self.groups]

    def cache_bytes(self, context: int, batch: int) -> int:
        """Of all pages."""
        pages = self.pages(context, batch)
        return sum(n * group.page_bytes for n, group in zip(pages, self.groups, strict=True))

    def bytes(self, context: int, batch: int) -> int:
        """All of it."""
        return self.weights + self.work + self.cache_bytes(context, batch)

    def tensor_bytes(self, context: int, batch: int) -> int:
        """The largest tensor of the cache: a layer's."""
        pages = self.pages(context, batch)
        layers = (n * group.layer_page_bytes for n, group in zip(pages, self.groups, strict=True))
        return max(layers, default=0)

    def fits(self, room: Room, context: int, batch: int) -> bool:
        """Whether there is room for so many sequences of that many tokens."""
        total = room.bytes is None or self.bytes(context, batch) <= room.bytes
        return total and (
            room.tensor_bytes is None or self.tensor_bytes(context, batch) <= room.tensor_bytes
        )


def fit(manifest: Manifest, context_length: int, max_batch: int | None, prefill_chunk: int) -> int:
    """How many sequences run at once.

    KVMemoryError where they do not fit, or a weight does not: it tells what is needed for what,
    what there is, and what would fit. Without a wish as many sequences as fit, at least one.
    """
    room = find_room(manifest.target.name)
    _check_weights(manifest, room)
    demand = Demand(
        manifest.memory.weights_bytes,
        manifest.memory.workspace_bytes + OVERHEAD_BYTES,
        prefill_chunk,
        manifest.kv_groups,
    )
    batch = max_batch or manifest.limits.max_batch
    if max_batch is None:
        batch = _most(lambda count: demand.fits(room, context_length, count), batch) or 1
    if manifest.random_seed is None and manifest.target.kind == "cpu":
        # Weights are mapped files, which can be read from disk again and again.
        demand = replace(demand, weights=0)
    if demand.fits(room, context_length, batch):
        return batch
    raise KVMemoryError(_refusal(manifest, demand, room, context_length, batch))


def find_room(target: str) -> Room:
    """What is left of the memory of the device that code for `target` runs on."""
    kind = target.partition(":")[0]
    if kind == "cpu":
        return Room(available_memory())
    where = f" on {kind}:0"
    if kind == "metal":  # Apple's GPUs have the host's memory, of which the core says no more
        return Room(available_memory(), where=where)
    left = core.device_memory(kind)
    if kind != "vulkan":
        return Room(left, where=where)
    device = vulkan.check()
    if device.type in ("integrated", "cpu"):
        # Its heaps are the host's memory, of which it may not know what others have taken.
        known = [bytes_ for bytes_ in (left, available_memory()) if bytes_ is not None]
        left = min(known, default=None)
    return Room(left, device.max_allocation_bytes, where)


def _check_weights(manifest: Manifest, room: Room) -> None:
    """KVMemoryError where one of them is larger than the device's tensors may be."""
    largest = max(manifest.weights, key=lambda weight: weight.nbytes, default=None)
    if largest and room.tensor_bytes is not None and largest.nbytes > room.tensor_bytes:
        raise KVMemoryError(
            f"The weight {largest.name} takes {_gib(largest.nbytes)}, but one tensor{room.where} "
            f"may take at most {_gib(room.tensor_bytes)}; use another device."
        )


def _refusal(manifest: Manifest, demand: Demand, room: Room, context: int, batch: int) -> str:
    parts = [
        (demand.weights, "weights"),
        (demand.cache_bytes(context, batch), "the cache of keys and values"),
        (demand.work, "the rest"),
    ]
    listed = ", ".join(f"{_gib(count)} for {what}" for count, what in parts if count)
    needed = _gib(demand.bytes(context, batch))
    text = f"{needed} are needed{room.where} for {batch} x {context} tokens ({listed}), but "
    if room.bytes is not None and demand.bytes(context, batch) > room.bytes:
        text += f"{_gib(max(0, room.bytes))} of memory are available"
    else:
        assert room.tensor_bytes is not None
        text += (
            f"a layer's cache is a tensor of {_gib(demand.tensor_bytes(context, batch))}, and one "
            f"tensor may take at most {_gib(room.tensor_bytes)}"
        )
    return f"{text}; {_advice(manifest, demand, room, context, batch)}."


def _advice(manifest: Manifest, demand: Demand, room: Room, context: int, batch: int) -> str:
    """What would fit."""

    def longest(batch: int) -> int:
        return PAGE_TOKENS * _most(
            lambda pages: demand.fits(room, pages * PAGE_TOKENS, batch),
            (context - 1) // PAGE_TOKENS,
        )

    ways = []
    if tokens := longest(batch):
        ways.append(f"a context_length of {tokens}")
    if most := _most(lambda count: demand.fits(room, context, count), batch - 1):
        ways.append(f"a max_batch of {most}")
    elif (alone := longest(1)) > tokens:
        ways.append(f"a context_length of {alone} with a max_batch of 1")
    smaller = replace(demand, groups=_with_cache(manifest, SMALLER_CACHE))
    if smaller.groups != demand.groups and smaller.fits(room, context, batch):
        ways.append(f"a smaller cache, compiled with --kv {SMALLER_CACHE}")
    if not ways:
        return "no context would fit: free memory or use another device"
    return f"{' or '.join(ways)} would fit"


def _with_cache(manifest: Manifest, kv_dtype: str) -> tuple[KvGroup, ...]:
    """The groups, if the cache had this format."""
    heads, head_dim = (int(manifest.config[n]) for n in ("num_key_value_heads", "head_dim"))
    shape = page_shape(heads, head_dim, kv_dtype)
    return tuple(replace(g, dtype=kv_dtype, page_shape=shape) for g in manifest.kv_groups)


def _most(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` that fits, 0 where none does; if one fits, so do all
    below it."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
