from __future__ import annotations

import numpy as np
import pytest

from mxforge.kv_layout import PAGE_TOKENS, page_bytes, row_elements
from mxforge.schedules.formats import KV
from mxforge.schedules.formats.kv import scale_at

EVERY = [(dtype, head_dim) for dtype in KV for head_dim in (2, 6, 24, 40, 64, 128, 250)]
ROUNDING = {"float32": 1e-7, "float16": 1e-3, "bfloat16": 1e-2, "int8": 1e-2}


@pytest.mark.parametrize(("kv_dtype", "head_dim"), EVERY)
def test_every_element_has_a_place_of_its_own(kv_dtype, head_dim):
    d, slot = np.meshgrid(np.arange(head_dim), np.arange(PAGE_TOKENS), indexing="ij")
    for places in (KV[kv_dtype].key_at(d, slot), KV[kv_dtype].value_at(head_dim, d, slot)):
        taken = places.ravel().tolist()
        if KV[kv_dtype].scaled:
            scales = scale_at(head_dim, np.arange(PAGE_TOKENS))
            taken += [*scales.tolist(), *(scales + 1).tolist()]
        assert len(set(taken)) == len(taken)
        assert min(taken) >= 0
        assert max(taken) < row_elements(head_dim, kv_dtype)


@pytest.mark.parametrize("head_dim", [2, 6, 24, 40, 64, 128, 250])
def test_8_bit_rows_begin_at_cache_lines_and_can_be_read_in_whole_vectors(head_dim):
    row = row_elements(head_dim, "int8")
    assert row % 64 == 0
    last_vector = KV["int8"].value_at(head_dim, (head_dim - 1) // 16 * 16, 12) + 64
    assert last_vector <= row


@pytest.mark.parametrize(("kv_dtype", "head_dim"), EVERY)
def test_what_is_packed_unpacks(kv_dtype, head_dim):
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((2, 3, head_dim, PAGE_TOKENS))
    values = rng.standard_normal((2, 3, PAGE_TOKENS, head_dim))
    kv = KV[kv_dtype].packed(keys, values)
    assert kv.shape == KV[kv_dtype].shape(3, 2, head_dim)
    assert kv.nbytes == 3 * page_bytes(2, head_dim, kv_dtype)
    for found, meant in zip(KV[kv_dtype].unpacked(kv, head_dim), (keys, values), strict=True):
        error = np.linalg.norm(found - meant) / np.linalg.norm(meant)
        assert error <= ROUNDING[kv_dtype]


def test_no_8_bit_number_is_cut_off():
    """The scale is rounded up: the largest of a head is 127 steps at most."""
    rng = np.random.default_rng(1)
    keys = rng.standard_normal((50, 4, 64, PAGE_TOKENS)) * rng.uniform(1e-20, 1e20, (50, 4, 1, 1))
    kv = KV["int8"].packed(keys, keys.swapaxes(2, 3))
    found, _ = KV["int8"].unpacked(kv, 64)
    step = np.abs(keys).max(axis=2, keepdims=True) / 127
    assert (np.abs(found - keys) <= 0.51 * step).all()


def test_a_slot_that_is_not_a_number_stays_one():
    keys = np.ones((1, 1, 8, PAGE_TOKENS))
    keys[..., 3] = np.nan
    int8 = KV["int8"]
    found, _ = int8.unpacked(int8.packed(keys, keys.swapaxes(2, 3)), 8)
    assert np.isnan(found[..., 3]).all()
    assert not np.isnan(np.delete(found, 3, axis=-1)).any()
