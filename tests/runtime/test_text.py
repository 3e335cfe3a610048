"""Bytes to text, and stop strings, however the output is cut into tokens."""

from __future__ import annotations

import itertools
import random

import pytest

from mxforge.text import IncrementalDecoder, StopMatcher, TextStream


def stream(pieces, stops=()):
    text = TextStream(stops)
    out = "".join([*map(text.push, pieces), text.finish()])
    return out, text.stop_string


def cut(data, points):
    points = [0, *sorted(points), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(points)]


def test_a_character_split_over_tokens_waits_for_its_end():
    decoder = IncrementalDecoder()
    assert [decoder.push(bytes([byte])) for byte in "é漢🙂".encode()] == [
        *("", "é"),
        *("", "", "漢"),
        *("", "", "", "🙂"),
    ]
    assert decoder.finish() == ""


def test_invalid_bytes_are_replaced_and_what_follows_survives():
    assert stream([b"a\xff", b"b\xe6\xbc", b"c"])[0] == "a\ufffdb\ufffdc"


def test_an_incomplete_end_is_replaced_at_the_end():
    assert stream([b"a", b"\xf0\x9f"])[0] == "a\ufffd"


def test_what_could_become_a_stop_string_is_held_back():
    matcher = StopMatcher(["END"])
    assert [matcher.push(c) for c in "xENxE"] == ["x", "", "", "ENx", ""]
    assert matcher.finish() == "E"
    assert matcher.matched is None


def test_a_stop_string_across_tokens_cuts_and_ends():
    matcher = StopMatcher(["END"])
    assert [matcher.push(t) for t in ("aE", "N", "Db", "c")] == ["a", "", "", ""]
    assert matcher.matched == "END"
    assert matcher.finish() == ""


def test_a_failed_prefix_that_contains_the_real_one():
    assert stream([b"aa", b"ab"], ["aab"]) == ("a", "aab")


def test_a_stop_string_split_inside_a_character():
    data = "x終y".encode()
    assert stream(cut(data, [2, 3]), ["終"]) == ("x", "終")


def test_of_two_that_end_together_the_longer_is_cut():
    assert stream([b"abc"], ["bc", "abc"]) == ("", "abc")


def test_the_end_of_the_bytes_can_complete_a_stop_string():
    assert stream([b"a\xf0"], ["\ufffd"]) == ("a", "\ufffd")


def test_no_stops_holds_nothing_back():
    assert StopMatcher().push("abc") == "abc"


@pytest.mark.parametrize("seed", range(200))
def test_how_the_text_is_cut_changes_nothing(seed):
    rng = random.Random(seed)
    text = "".join(rng.choices("abé", k=rng.randrange(30)))
    stops = {"".join(rng.choices("abé", k=rng.randrange(1, 5))) for _ in range(rng.randrange(4))}
    data = text.encode()
    points = rng.sample(range(len(data) + 1), k=rng.randrange(len(data) + 1))
    found = [(i, s) for i in range(len(text) + 1) for s in stops if text[:i].endswith(s)]
    if found:
        end = min(found)[0]
        stop = max((s for i, s in found if i == end), key=len)
        expected = text[: end - len(stop)], stop
    else:
        expected = text, None
    assert stream(cut(data, points), stops) == expected
