"""The engine on a small compiled model: what goes in, what comes out, what is refused."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from support.prompts import CONTEXT, GREEDY, VOCAB, prompt

import mxforge
from mxforge import Engine, SamplingParams
from mxforge.errors import (
    ContextLengthError,
    MxforgeError,
    SamplingError,
    TokenizerError,
    TokenRangeError,
    UsageError,
)


def test_an_answer_has_tokens_reason_usage_and_timings(engine: Engine) -> None:
    answer = engine.generate(prompt(40), GREEDY)
    assert len(answer.token_ids) == 12
    assert all(type(token) is int and 0 <= token < VOCAB for token in answer.token_ids)
    assert (answer.text, answer.finish_reason, answer.logprobs) == ("", "length", None)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (40, 12)
    timings = dataclasses.asdict(answer.timings)
    assert all(math.isfinite(value) and value >= 0 for value in timings.values()), timings
    assert answer.timings.decode_tok_s > 0


def test_a_stream_is_the_answer_piece_by_piece(engine: Engine) -> None:
    whole = engine.generate(prompt(7), GREEDY)
    pieces = list(engine.stream(prompt(7), GREEDY))
    assert tuple(token for piece in pieces for token in piece.token_ids) == whole.token_ids
    assert [piece.finish_reason for piece in pieces] == [None] * 11 + ["length"]
    assert all(piece.usage is None for piece in pieces[:-1])
    assert pieces[-1].usage is not None
    assert pieces[-1].timings is not None


def test_prompts_may_be_any_whole_numbers(engine: Engine) -> None:
    expected = engine.generate([1, 2, 3], GREEDY).token_ids
    for same in ((1, 2, 3), np.array([1, 2, 3]), np.array([1, 2, 3], np.uint8), iter([1, 2, 3])):
        assert engine.generate(same, GREEDY).token_ids == expected


def test_default_parameters_sample_until_the_end(engine: Engine) -> None:
    answer = engine.generate(prompt(CONTEXT - 5))
    assert answer.finish_reason in ("stop", "length")
    assert 1 <= len(answer.token_ids) <= 5


def test_logits_are_float32_for_every_position(engine: Engine) -> None:
    tokens = prompt(150)
    logits = engine.logits(tokens)
    assert logits.shape == (150, VOCAB)
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()
    for length in (1, 2, 31, 32, 33, 64, 65, 149):
        np.testing.assert_array_equal(engine.logits(tokens[:length]), logits[:length])
    assert engine.logits(prompt(CONTEXT)).shape == (CONTEXT, VOCAB)


def test_the_package_exports_what_answers_are_made_of() -> None:
    for name in mxforge.__all__:
        assert getattr(mxforge, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        _ = mxforge.Motor


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("method", ["generate", "stream", "logits"])
@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([], UsageError, "at least one token, found none"),
        ([1, VOCAB], TokenRangeError, f"0 to {VOCAB - 1}, found {VOCAB}"),
        ([1, -1], TokenRangeError, "found -1"),
        ([10**30], TokenRangeError, "found 1000000"),
        ([1, 2.0], UsageError, "found 2.0"),
        (["1"], UsageError, "found '1'"),
        ([True], UsageError, "found True"),
        (b"12", UsageError, "found b'12'"),
        (None, UsageError, "found None"),
        (7, UsageError, "found 7"),
        (np.array([1.5]), UsageError, r"found np.float64\(1.5\)|found 1.5"),
        ([[1, 2]], UsageError, r"found \[1, 2\]"),
        ([1] * (CONTEXT + 1), ContextLengthError, f"{CONTEXT} tokens, found {CONTEXT + 1}"),
        ("text", TokenizerError, "compiled without a tokenizer"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_prompt_that_cannot_be_answered_is_refused(
    engine: Engine, method: str, tokens: object, error: type[MxforgeError], message: str
) -> None:
    with pytest.raises(error, match=message):
        getattr(engine, method)(tokens)


def test_a_prompt_that_fills_the_context_leaves_no_answer(engine: Engine) -> None:
    with pytest.raises(ContextLengthError, match=f"fewer than {CONTEXT} tokens, found {CONTEXT}"):
        engine.generate(prompt(CONTEXT))


def test_parameters_have_to_fit_the_vocabulary(engine: Engine) -> None:
    for params in (
        SamplingParams(logit_bias={VOCAB: 1.0}),
        SamplingParams(stop_token_ids=[VOCAB]),
        SamplingParams(bitmask=np.zeros(3, np.uint32)),
        SamplingParams(bitmask=np.zeros(-(-VOCAB // 32), np.uint32)),
    ):
        with pytest.raises(SamplingError, match="must"):
            engine.generate([1], params)


def test_stop_strings_need_text(engine: Engine) -> None:
    with pytest.raises(TokenizerError, match="Stop strings end a text, .* use stop_token_ids"):
        engine.generate([1], SamplingParams(stop="end"))
