from __future__ import annotations

import pytest

from mxforge.compile.config import read_json_object
from mxforge.errors import ConfigError


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"a": 1}}', "[" * 100_000, "\udcff", "[" * 65 + "]" * 65]
)
def test_unreadable_file(tmp_path, text: str):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_json_object(path)


def test_absent_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_json_object(tmp_path / "config.json")
