"""The error classes: one base, one tree, exit codes."""

from __future__ import annotations

import inspect
import re

import pytest

from mxforge import errors

CLASSES = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, errors.MxforgeError)
]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_each_class_has_its_line_in_the_tree_under_its_base(cls):
    lines = errors.__doc__.splitlines()
    depth = {
        match[2]: len(match[1])
        for line in lines
        if (match := re.match(r"    ([│├└─ ]*)([A-Z]\w+)\s{2,}\S", line))
    }
    names = list(depth)
    assert cls.__name__ in names
    if cls is not errors.MxforgeError:
        above = names[: names.index(cls.__name__)]
        parents = [name for name in above if depth[name] < depth[cls.__name__]]
        assert parents[-1] == cls.__base__.__name__


def test_the_tree_names_no_class_that_is_not_there():
    named = re.findall(r"[├└]── (\w+)", errors.__doc__)
    assert sorted(named) == sorted(c.__name__ for c in CLASSES if c is not errors.MxforgeError)


def test_exit_codes():
    for cls in CLASSES:
        assert cls.exit_code == (2 if issubclass(cls, errors.UsageError) else 1)
