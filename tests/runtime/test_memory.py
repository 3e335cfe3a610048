"""Whether a model fits into memory: what is said where it does not, and gpt-oss-20b on GPUs."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
from checkpoints.shapes import hf_config
from support.small import SMALL_MANIFEST

from mxforge import memory
from mxforge.compile import pipeline
from mxforge.compile.config import KINDS
from mxforge.compile.models.emit import Limits
from mxforge.compile.models.gpt_oss import GPT_OSS
from mxforge.compile.models.gpt_oss.config import GptOssConfig
from mxforge.compile.plan import plan_of
from mxforge.compile.targets import resolve
from mxforge.compile.weights import packed_weights
from mxforge.errors import KVMemoryError
from mxforge.kv_layout import page_shape, pages_needed
from mxforge.machine import available_memory
from mxforge.manifest import KvGroup, Manifest, MemoryPlan, WeightInfo
from mxforge.memory import Room, fit

GIB = 1 << 30
GPU = " on vulkan:0"
LONGEST = 131_072


@cache
def big(target_name: str = "vulkan", kv: str = "float16", dense: str = "bf16") -> Manifest:
    """The manifest of gpt-oss-20b for a GPU, as far as memory goes: sizes as it is compiled."""
    target, config = resolve(target_name), GptOssConfig.from_hf(hf_config("20b"))
    precision = replace(target.precision("fast", config), kv=kv, dense=dense)
    weights = packed_weights(GPT_OSS.weights(config), target.kernels, precision)
    module = GPT_OSS.module(config, target.kernels, precision, Limits(16, 512), weights)
    shape = page_shape(config.num_key_value_heads, config.head_dim, kv)
    layers = {kind: tuple(i for i, its in enumerate(config.kinds) if its == kind) for kind in KINDS}
    return replace(
        SMALL_MANIFEST,
        config=config.to_dict(),
        target=replace(SMALL_MANIFEST.target, kind=target_name.partition(":")[0], name=target.name),
        precision=replace(SMALL_MANIFEST.precision, kv_dtype=kv),
        limits=replace(SMALL_MANIFEST.limits, max_batch=16, prefill_chunk=512, context=LONGEST),
        memory=MemoryPlan(
            sum(weight.nbytes for weight in weights),
            plan_of(pipeline.lower(module, target)).workspace,
        ),
        kv_groups=(
            KvGroup("sliding", config.sliding_window, layers["sliding"], kv, shape),
            KvGroup("full", None, layers["full"], kv, shape),
        ),
        weights=tuple(WeightInfo(w.name, w.shape, w.dtype, "x", "uploaded") for w in weights),
    )


def with_room(monkeypatch: pytest.MonkeyPatch, room: Room) -> None:
    monkeypatch.setattr("mxforge.memory.find_room", lambda target: room)


def refused(manifest: Manifest, context: int, batch: int) -> str:
    with pytest.raises(KVMemoryError) as caught:
        fit(manifest, context, batch, 512)
    return str(caught.value)


@pytest.mark.parametrize("target", ["vulkan", "cuda:sm_90a"])
@pytest.mark.parametrize("dense", ["bf16", "i8xf32"])
def test_all_tokens_of_20b_fit_beside_its_weights(
    monkeypatch: pytest.MonkeyPatch, target: str, dense: str
) -> None:
    """In 18 GB with a cache in 16 bits, on a card of 16 GiB in 8 bits: at most this much is taken,
    what drivers keep and logits take included."""
    for kv, room in (("float16", 18_000_000_000), ("int8", 16 * GIB)):
        manifest = big(target, kv, dense)
        with_room(monkeypatch, Room(room, 4 * GIB, GPU))
        batch = fit(manifest, LONGEST, None, 512)
        assert batch >= 1
        pages = [pages_needed(g.window, LONGEST, batch, 512 + batch) for g in manifest.kv_groups]
        assert pages[1] == batch * LONGEST // 16
        cache = sum(n * g.page_bytes for n, g in zip(pages, manifest.kv_groups, strict=True))
        with_room(monkeypatch, Room(manifest.memory.weights_bytes + cache, None, GPU))
        assert "for the rest" in refused(manifest, LONGEST, batch)


def test_in_16_bits_a_card_of_16_gib_is_told_what_would_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_room(monkeypatch, Room(16 * GIB, 4 * GIB, GPU))
    said = refused(big(), LONGEST, 1)
    found = re.fullmatch(
        r"16\.\d\d GiB are needed on vulkan:0 for 1 x 131072 tokens \(12\.83 GiB for weights, "
        r"3\.02 GiB for the cache of keys and values, 0\.5\d GiB for the rest\), but 16\.00 GiB of "
        r"memory are available; a context_length of (\d+) or a smaller cache, compiled with --kv "
        r"int8 would fit\.",
        said,
    )
    assert found, said
    longest = int(found[1])
    assert longest % 16 == 0
    assert fit(big(), longest, 1, 512) == 1
    refused(big(), longest + 16, 1)
    assert fit(big(kv="int8"), LONGEST, 1, 512) == 1


def test_fewer_sequences_are_proposed(monkeypatch: pytest.MonkeyPatch) -> None:
    with_room(monkeypatch, Room(24 * GIB, None, GPU))
    said = refused(big(), LONGEST, 8)
    assert " GiB are needed on vulkan:0 for 8 x 131072 tokens (12.83 GiB for weights, " in said
    most = int(re.search(r"a max_batch of (\d+)", said)[1])
    assert fit(big(), LONGEST, most, 512) == most
    refused(big(), LONGEST, most + 1)
    assert fit(big(), LONGEST, None, 512) == most


def test_without_room_for_weights_nothing_is_proposed(monkeypatch: pytest.MonkeyPatch) -> None:
    with_room(monkeypatch, Room(13 * GIB, None, GPU))
    assert "; no context would fit: free memory or use another device." in refused(big(), 64, 1)


def test_both_smaller_where_either_alone_does_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = big(kv="int8")
    needed = manifest.memory.weights_bytes + manifest.memory.workspace_bytes
    with_room(monkeypatch, Room(needed + memory.OVERHEAD_BYTES + 20_000_000, None, GPU))
    found = re.search(
        r"a context_length of (\d+) with a max_batch of 1 would fit", refused(manifest, 4096, 16)
    )
    assert found
    assert fit(manifest, int(found[1]), 1, 512) == 1
    refused(manifest, int(found[1]) + 16, 1)


def test_a_tensor_that_is_too_large_for_one_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's cache is one tensor, whatever memory there is; so is a weight."""
    with_room(monkeypatch, Room(1000 * GIB, 4 * GIB, GPU))
    assert fit(big(), LONGEST, 16, 512) == 16
    with_room(monkeypatch, Room(1000 * GIB, 4 * GIB - 1, GPU))
    said = refused(big(), LONGEST, 16)
    assert "a layer's cache is a tensor of 4.00 GiB, and one tensor may take at most 4.00" in said
    assert "a max_batch of 15" in said
    assert fit(big(), LONGEST, None, 512) == 15
    with_room(monkeypatch, Room(1000 * GIB, GIB, GPU))
    said = refused(big(), 64, 1)
    assert "takes 1.08 GiB, but one tensor on vulkan:0 may take at most 1.00 GiB" in said


def test_unknown_memory_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with_room(monkeypatch, Room(None))
    assert fit(big(), LONGEST, None, 512) == 16


@pytest.mark.parametrize(
    ("target", "type_", "device", "host", "room"),
    [
        ("cpu:avx2", "", None, 3, Room(3)),
        ("metal", "", None, 3, Room(3, None, " on metal:0")),
        ("cuda:sm_90a", "", 6, 3, Room(6, None, " on cuda:0")),
        ("vulkan:desktop", "discrete", 6, 3, Room(6, 5, GPU)),
        ("vulkan:desktop", "integrated", 6, 3, Room(3, 5, GPU)),
        ("vulkan:desktop", "cpu", None, 3, Room(3, 5, GPU)),
        ("vulkan:desktop", "cpu", None, None, Room(None, 5, GPU)),
    ],
)
def test_where_tensors_lie(
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    type_: str,
    device: int | None,
    host: int | None,
    room: Room,
) -> None:
    monkeypatch.setattr("mxforge.memory.available_memory", lambda: host)
    monkeypatch.setattr("mxforge.core.device_memory", lambda _: device)
    described = SimpleNamespace(type=type_, max_allocation_bytes=5)
    monkeypatch.setattr("mxforge.vulkan.check", lambda: described)
    assert memory.find_room(target) == room


def test_available_memory_is_plausible() -> None:
    available = available_memory()
    assert available is None or 1 << 20 < available < 1 << 50
