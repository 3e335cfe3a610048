"""Threefry-2x32 with 20 rounds, the counter-based random numbers of sampling.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import numpy as np

from ..kernel import T

THREEFRY_PARITY = 0x1BD11BDA
# Rotations of the four rounds of a group, lowest byte first.
ROTATIONS_EVEN = 13 | 15 << 8 | 26 << 16 | 6 << 24
ROTATIONS_ODD = 17 | 29 << 8 | 16 << 16 | 24 << 24


def threefry_ref(key: np.ndarray, counter: np.ndarray) -> np.ndarray:
    """Threefry-2x32-20 of u32 [2] and u32 [2] -> u32 [2]."""
    k = [int(key[0]), int(key[1]), int(key[0]) ^ int(key[1]) ^ THREEFRY_PARITY]
    a, b = (int(counter[0]) + k[0]) % 2**32, (int(counter[1]) + k[1]) % 2**32
    for group in range(5):
        for rotation in (ROTATIONS_ODD if group % 2 else ROTATIONS_EVEN).to_bytes(4, "little"):
            a = (a + b) % 2**32
            b = ((b << rotation | b >> (32 - rotation)) % 2**32) ^ a
        a = (a + k[(group + 1) % 3]) % 2**32
        b = (b + k[(group + 2) % 3] + group + 1) % 2**32
    return np.array([a, b], np.uint32)


def uniform_ref(seed: np.ndarray, step: int) -> float:
    """The uniform number that sample_token draws with; seed i32 [2]."""
    counter = np.array([step, 0], np.int32).view(np.uint32)
    return int(threefry_ref(seed.view(np.uint32), counter)[0] >> 8) / 2**24


@T.inline
def threefry(x, key, turn):
    """x u32 [2], the counter, becomes the random words; key u32 [3], the third is made here.

    turn u32 [1] is scratch: the rotation of a round, a byte of its group's four.
    """
    key[2] = T.bitwise_xor(T.bitwise_xor(key[0], key[1]), T.uint32(THREEFRY_PARITY))
    x[0] = x[0] + key[0]
    x[1] = x[1] + key[1]
    for group in T.serial(5):
        for i in T.serial(4):
            turn[0] = T.Select(group % 2 == 0, T.uint32(ROTATIONS_EVEN), T.uint32(ROTATIONS_ODD))
            turn[0] = T.bitwise_and(T.shift_right(turn[0], T.Cast("uint32", 8 * i)), T.uint32(31))
            x[0] = x[0] + x[1]
            x[1] = T.bitwise_xor(
                T.bitwise_or(
                    T.shift_left(x[1], turn[0]), T.shift_right(x[1], T.uint32(32) - turn[0])
                ),
                x[0],
            )
        x[0] = x[0] + key[(group + 1) % 3]
        x[1] = x[1] + key[(group + 2) % 3] + T.Cast("uint32", group + 1)
