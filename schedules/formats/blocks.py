"""Blocks: neighbouring inputs that share a scale, in MXFP4 as in the 8-bit formats."""

from __future__ import annotations

BLOCK = 32
DIGIT_BITS = 7  # of numbers in two digits, one of hi is 128 of lo
TINY = 1e-30  # a block whose largest number, or scale, is not above it counts as zeros
