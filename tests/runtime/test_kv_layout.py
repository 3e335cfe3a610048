from __future__ import annotations

import pytest

from mxforge.kv_layout import KV_BYTES, PAGE_TOKENS, page_bytes, row_elements


@pytest.mark.parametrize("kv_dtype", KV_BYTES)
def test_a_row_has_room_for_every_position(kv_dtype):
    for head_dim in (2, 6, 24, 64, 250):
        elements = PAGE_TOKENS * head_dim
        scales = 2 * PAGE_TOKENS if kv_dtype == "int8" else 0
        assert elements + scales <= row_elements(head_dim, kv_dtype) <= elements + scales + 64


def test_bytes_of_a_page_of_gpt_oss():
    found = {kv_dtype: page_bytes(8, 64, kv_dtype) for kv_dtype in KV_BYTES}
    assert found == {"float32": 65536, "float16": 32768, "bfloat16": 32768, "int8": 17408}
