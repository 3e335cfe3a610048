"""Damage that inputs can have, drawn from a `random.Random`: the same seed, the same damage."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

# -- bytes -----------------------------------------------------------------------------------------


def damage_bytes(rng: random.Random, data: bytes, most: int = 4) -> bytes:
    """`data` after one to `most` damages."""
    damaged = bytearray(data)
    for _ in range(rng.randint(1, most)):
        rng.choice(_BYTE_DAMAGES)(rng, damaged)
    return bytes(damaged)


def _stretch(rng: random.Random, data: bytearray) -> slice:
    """A short piece mostly, sometimes a long one."""
    begin = rng.randint(0, len(data))
    return slice(begin, begin + rng.choice((1, 1, 2, 4, 8, 64, rng.randint(0, len(data)))))


def _flip(rng: random.Random, data: bytearray) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _cut_end(rng: random.Random, data: bytearray) -> None:
    del data[rng.randint(0, len(data)) :]


def _cut_out(rng: random.Random, data: bytearray) -> None:
    del data[_stretch(rng, data)]


def _insert(rng: random.Random, data: bytearray) -> None:
    at = rng.randint(0, len(data))
    data[at:at] = rng.randbytes(rng.choice((1, 2, 8, 100)))


def _duplicate(rng: random.Random, data: bytearray) -> None:
    piece, at = data[_stretch(rng, data)], rng.randint(0, len(data))
    data[at:at] = piece


def _overwrite(rng: random.Random, data: bytearray) -> None:
    where = _stretch(rng, data)
    value = rng.choice((0, 0, 255, rng.randrange(256)))
    data[where] = bytes([value]) * len(data[where])


def _extend(rng: random.Random, data: bytearray) -> None:
    data += rng.choice((bytes(1), b"\n", b"}", rng.randbytes(9), bytes(4096)))


_BYTE_DAMAGES = (_flip, _cut_end, _cut_out, _insert, _duplicate, _overwrite, _extend)


# -- JSON ------------------------------------------------------------------------------------------


class Raw(str):
    """JSON text that no Python value gives."""


def _nested(rng: random.Random) -> Raw:
    # Around 1,000 a parser may still take what the next function cannot.
    depth = rng.choice((5, 100, rng.randint(900, 1000), 5000, 100_000))
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    return Raw(opening * depth + "1" + closing * depth)


HOSTILE: tuple[Callable[[random.Random], Any], ...] = (
    lambda rng: rng.choice((None, True, False, 0, 1, -1, 2, 7, 1.0, 0.5, -0.5)),
    lambda rng: rng.choice((255, 256, 1 << 31, 1 << 32, 1 << 62, 1 << 63, 1 << 64, -(1 << 63))),
    lambda rng: Raw(rng.choice("-123456789") + "9" * rng.choice((20, 400, 4200, 4300, 9000))),
    lambda rng: Raw(rng.choice(("NaN", "Infinity", "-Infinity", "1e999", "1e308", "5e-324", "-0"))),
    lambda rng: rng.choice(("", " ", "a", "é", "\0", "\x1b[2J", "\n", "\u202e", "\U0001f642")),
    lambda rng: Raw(rng.choice(('"\\ud800"', '"\\udfff\\ud800"', '"a\\udc00b"', '"\\u0000"'))),
    lambda rng: rng.choice(("x" * 100_000, "../x", "/", "a/b", "%s%n", "(a|aa)+$", "[", "\\")),
    lambda rng: rng.choice(([], {}, [[]], [None], {"": None}, {"a": 1}, [1] * 1000)),
    _nested,
)


def hostile(rng: random.Random) -> Any:
    """A value that nobody expects; some are `Raw`."""
    return rng.choice(HOSTILE)(rng)


def damage_json(rng: random.Random, value: Any, most: int = 3) -> bytes:
    """The text of the JSON `value` after one to `most` damages to its structure."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, most)):
        value = _damage_node(rng, value)
    return to_json(value)


def to_json(value: Any) -> bytes:
    """JSON text; `Raw` values stand in it as they are, keys that are `_Twin` occur twice."""
    raw: list[str] = []

    def prepared(value: Any) -> Any:
        if isinstance(value, Raw):
            raw.append(value)
            return f"@raw{len(raw) - 1}@"
        if isinstance(value, dict):
            return {prepared_key(key): prepared(entry) for key, entry in value.items()}
        return [prepared(entry) for entry in value] if isinstance(value, list) else value

    def prepared_key(key: str) -> str:
        return f"{key}@twin@" if isinstance(key, _Twin) else key

    text = json.dumps(prepared(value)).replace('@twin@"', '"')
    for i, found in enumerate(raw):
        text = text.replace(f'"@raw{i}@"', found)
    return text.encode()


class _Twin(str):
    """A key beside an equal one."""

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def _damage_node(rng: random.Random, value: Any) -> Any:
    """One damage somewhere in `value`, deeper ones as likely as near ones."""
    if isinstance(value, dict) and value:
        key = rng.choice(list(value))
        if rng.random() < 0.6 and isinstance(value[key], (dict, list)):
            value[key] = _damage_node(rng, value[key])
            return value
        return rng.choice(_OBJECT_DAMAGES)(rng, value, key)
    if isinstance(value, list) and value:
        at = rng.randrange(len(value))
        if rng.random() < 0.6 and isinstance(value[at], (dict, list)):
            value[at] = _damage_node(rng, value[at])
            return value
        return rng.choice(_LIST_DAMAGES)(rng, value, at)
    return hostile(rng)


def _replace(rng: random.Random, value: Any, key: Any) -> Any:
    value[key] = hostile(rng)
    return value


def _nudge(rng: random.Random, value: Any, key: Any) -> Any:
    """A value of the right type, and wrong."""
    old = value[key]
    if isinstance(old, bool):
        value[key] = not old
    elif isinstance(old, (int, float)):
        value[key] = rng.choice((old + 1, old - 1, -old, old * 2, old // 2, old * 1000))
    elif isinstance(old, str) and not isinstance(old, Raw):
        value[key] = rng.choice((old[:-1], old + old, old.upper(), old[::-1], "\x1b" + old))
    else:
        value[key] = hostile(rng)
    return value


def _drop(rng: random.Random, value: Any, key: Any) -> Any:
    del value[key]
    return value


def _rename(rng: random.Random, value: Any, key: Any) -> Any:
    new = rng.choice((key[:-1], key + "x", "", "a", "\ud800", "\x1b[2J", rng.choice(list(value))))
    value[new] = value.pop(key)
    return value


def _twin(rng: random.Random, value: Any, key: Any) -> Any:
    value[_Twin(key)] = rng.choice((value[key], hostile(rng)))
    return value


def _swap(rng: random.Random, value: Any, key: Any) -> Any:
    other = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    value[key], value[other] = value[other], value[key]
    return value


def _add(rng: random.Random, value: Any, key: Any) -> Any:
    value[rng.choice(("more", "type", "dtype", "__metadata__", "id"))] = hostile(rng)
    return value


def _repeat(rng: random.Random, value: Any, at: Any) -> Any:
    value[at:at] = [copy.deepcopy(value[at])] * rng.choice((1, 1, 2, 100))
    return value


def _whole(rng: random.Random, value: Any, key: Any) -> Any:
    return rng.choice((hostile(rng), [value], {"a": value}))


_OBJECT_DAMAGES = (_replace, _replace, _nudge, _nudge, _drop, _rename, _twin, _swap, _add, _whole)
_LIST_DAMAGES = (_replace, _replace, _nudge, _nudge, _drop, _swap, _repeat, _whole)


def damage_text(rng: random.Random, value: Any) -> bytes:
    """The text of the JSON `value`, damaged in its structure, its bytes or both."""
    draw = rng.random()
    text = damage_json(rng, value) if draw < 0.75 else to_json(value)
    return damage_bytes(rng, text) if draw > 0.65 else text


# -- safetensors -----------------------------------------------------------------------------------


def damage_safetensors(rng: random.Random, data: bytes) -> bytes:
    """A .safetensors file after damage to its length, its header, an entry or its bytes."""
    return rng.choice(_FILE_DAMAGES)(rng, data)


def join_safetensors(header: bytes, payload: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + payload


def split_safetensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the bytes of the tensors."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def _any_bytes(rng: random.Random, data: bytes) -> bytes:
    return damage_bytes(rng, data)


def _header_bytes(rng: random.Random, data: bytes) -> bytes:
    header, payload = split_safetensors(data)
    return join_safetensors(damage_bytes(rng, to_json(header)), payload)


def _header_json(rng: random.Random, data: bytes) -> bytes:
    header, payload = split_safetensors(data)
    return join_safetensors(damage_json(rng, header), payload)


def _length(rng: random.Random, data: bytes) -> bytes:
    true = int.from_bytes(data[:8], "little")
    lies = (0, 1, 7, true - 1, true + 1, len(data) - 8, len(data) - 7, len(data), 100_000_000)
    lies += (100_000_001, 1 << 31, 1 << 32, (1 << 63) - 8, 1 << 63, (1 << 64) - 1)
    return rng.choice(lies).to_bytes(8, "little") + data[8:]


_DTYPE_NAMES = ("BOOL", "U8", "I8", "F16", "BF16", "F32", "I64", "F8_E4M3", "F4", "F128", "u8", "")
_SIZES = (0, 1, 2, 3, 1 << 16, 1 << 31, 1 << 32, (1 << 32) + 1, 1 << 62, (1 << 63) - 1, 1 << 63)


def _entry(rng: random.Random, data: bytes) -> bytes:
    header, payload = split_safetensors(data)
    for _ in range(rng.randint(1, 2)):
        name = rng.choice([name for name in header if name != "__metadata__"])
        rng.choice(_ENTRY_DAMAGES)(rng, header[name], len(payload))
        if rng.random() < 0.2:
            header[_Twin(name)] = dict(header[name])
    return join_safetensors(to_json(header), payload)


def _shape(rng: random.Random, entry: dict[str, Any], size: int) -> None:
    entry["shape"] = [rng.choice(_SIZES) for _ in range(rng.choice((0, 1, 2, 3, 32, 33)))]


def _offsets(rng: random.Random, entry: dict[str, Any], size: int) -> None:
    near = [offset + rng.choice((-8, -1, 0, 1, 8)) for offset in entry["data_offsets"]]
    entry["data_offsets"] = rng.choice(
        (near, near[::-1], [0, size], [size, size], [0, size + 1], rng.choices(_SIZES, k=2))
    )


def _dtype(rng: random.Random, entry: dict[str, Any], size: int) -> None:
    entry["dtype"] = rng.choice(_DTYPE_NAMES)


def _as_bytes(rng: random.Random, entry: dict[str, Any], size: int) -> None:
    """Another view of the same bytes: valid where they divide."""
    begin, end = entry["data_offsets"]
    dtype, width = rng.choice((("U8", 1), ("F8_E8M0", 1), ("BOOL", 1), ("BF16", 2), ("F64", 8)))
    entry |= {"dtype": dtype, "shape": [1, (end - begin) // width, 1]}


_ENTRY_DAMAGES = (_shape, _offsets, _dtype, _as_bytes)
_FILE_DAMAGES = (_any_bytes, _header_bytes, _header_json, _header_json, _length, _entry, _entry)
