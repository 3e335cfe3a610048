"""The sampler: what it draws, how often, and on which boundary it stops drawing."""

from __future__ import annotations

import numpy as np
import pytest

from mxforge.schedules.sample.adjust_logits import ADJUST_LOGITS, adjust_logits_ref
from mxforge.schedules.sample.sample_token import SAMPLE_TOKEN, sample_token_ref
from mxforge.schedules.sample.threefry import threefry_ref, uniform_ref

FLOAT_BELOW_8 = np.nextafter(np.float32(8), np.float32(0))


def parameters(m: int, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=(1, 2), step=None):
    """One set of parameters for m rows; steps count up."""
    return {
        "temperature": np.full(m, temperature, np.float32),
        "top_k": np.full(m, top_k, np.int32),
        "top_p": np.full(m, top_p, np.float32),
        "min_p": np.full(m, min_p, np.float32),
        "seed": np.tile(np.array(seed, np.int32), (m, 1)),
        "step": np.arange(m, dtype=np.int32) if step is None else np.full(m, step, np.int32),
    }


@pytest.fixture
def sample(harness):
    """sample(logits [m, V], **parameters of all rows) -> (ids [m], weights [m, V])"""

    def call(logits: np.ndarray, **values) -> tuple[np.ndarray, np.ndarray]:
        padded = pad(logits)
        inputs = {"logits": padded, **parameters(len(logits), **values)}
        ids, weights = harness.run(SAMPLE_TOKEN, inputs, {"vocab": padded.shape[1]})
        return ids, weights[:, : logits.shape[1]]

    return call


def pad(logits: np.ndarray) -> np.ndarray:
    """With tokens at -inf up to one of the vocabularies of the kernel's cases: building a kernel
    takes seconds."""
    vocab = min(v for v in (40, 1500, 201_088) if v >= logits.shape[1])
    padded = np.full((len(logits), vocab), -np.inf, np.float32)
    padded[:, : logits.shape[1]] = logits
    return padded


def kept(weights: np.ndarray) -> list[int]:
    return np.flatnonzero(weights).tolist()


# ------------------------------------------------------------------------------ random numbers


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_generator_gives_the_published_words(key, counter, words):
    found = threefry_ref(np.array(key, np.uint32), np.array(counter, np.uint32))
    assert tuple(found.tolist()) == words


@pytest.mark.parametrize("seed", [(0, 0), (-1, -1), (2**31 - 1, -(2**31)), (7, 0), (0, 7)])
def test_kernel_draws_with_the_generator_of_the_reference(sample, seed):
    """Equal weights, a power of two of them: the id is u·V rounded down, exactly."""
    vocab = 1024
    ids, _ = sample(np.zeros((200, vocab)), seed=seed)
    expected = [int(uniform_ref(np.array(seed, np.int32), step) * vocab) for step in range(200)]
    assert ids.tolist() == expected


def test_every_token_of_the_whole_vocabulary_can_be_reached(sample):
    vocab = 201_088
    ids, _ = sample(np.zeros((64, vocab)))
    u = np.array([uniform_ref(np.array((1, 2), np.int32), step) for step in range(64)])
    np.testing.assert_allclose(ids, np.floor(u * vocab), atol=1)
    assert ids.min() >= 0
    assert ids.max() < vocab


# -------------------------------------------------------------------------------- distribution

# Above the 99.9 % quantile of chi-square with 11 degrees of freedom; the draws are always the same.
CHI_SQUARE_LIMIT = 31.3


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 6},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_frequencies_of_20000_steps_follow_the_reference(sample, values):
    rng = np.random.default_rng(3)
    draws = 20_000
    row = rng.standard_normal(12).astype(np.float32) * 1.5
    ids, weights = sample(np.tile(row, (draws, 1)), **values)
    one = {"logits": row[None], **parameters(1, **values)}
    expected = sample_token_ref(**one)[1][0]
    assert kept(weights[0]) == kept(expected)
    counts = np.bincount(ids, minlength=12)
    expected = expected[expected > 0] / expected.sum() * draws
    assert counts[kept(weights[0])].sum() == draws  # nothing else was drawn
    statistic = ((counts[kept(weights[0])] - expected) ** 2 / expected).sum()
    assert statistic < CHI_SQUARE_LIMIT


def test_neighbouring_steps_are_independent(sample):
    """Pairs of them fill a 4 by 3 table evenly."""
    ids, _ = sample(np.zeros((12_001, 12)))
    counts = np.bincount(ids[:-1] // 3 * 3 + ids[1:] // 4, minlength=12)
    assert ((counts - 1000) ** 2 / 1000).sum() < CHI_SQUARE_LIMIT


def test_neighbouring_seeds_are_as_random_as_steps(harness):
    draws = 12_000
    inputs = {"logits": pad(np.zeros((draws, 12))), **parameters(draws, step=5)}
    inputs["seed"][:, 0] = np.arange(draws)
    ids, _ = harness.run(SAMPLE_TOKEN, inputs, {"vocab": 40})
    counts = np.bincount(ids, minlength=12)
    assert ((counts - 1000) ** 2 / 1000).sum() < CHI_SQUARE_LIMIT


def test_same_uniform_number_same_token_as_the_reference(sample):
    rng = np.random.default_rng(5)
    logits = rng.standard_normal((1000, 300)).astype(np.float32) * 3
    values = {"temperature": 0.9, "top_k": 100, "top_p": 0.95, "min_p": 0.001}
    ids, _ = sample(logits, **values)
    expected, _ = sample_token_ref(logits=logits, **parameters(1000, **values))
    np.testing.assert_array_equal(ids, expected)


def test_token_does_not_depend_on_the_batch(sample):
    rng = np.random.default_rng(6)
    logits = rng.standard_normal((5, 1500)).astype(np.float32)
    together, weights = sample(logits, top_p=0.9, step=11)
    for row in range(5):
        alone, alone_weights = sample(logits[row : row + 1], top_p=0.9, step=11)
        assert alone[0] == together[row]
        np.testing.assert_array_equal(alone_weights[0], weights[row])


# ---------------------------------------------------------------------------------- boundaries


def test_greedy_takes_the_lowest_id_of_equals_and_minus_zero_is_zero(sample):
    logits = np.full((3, 40), -1.0, np.float32)
    logits[0, [7, 23, 39]] = 5.0
    logits[1, 30], logits[1, 33] = -0.0, 0.0
    logits[2, 20], logits[2, 3] = -0.0, 0.0
    assert sample(logits, temperature=0.0)[0].tolist() == [7, 30, 3]


def test_top_k_keeps_ties_with_the_last(sample):
    _, weights = sample(np.array([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]]), top_k=2)
    assert kept(weights[0]) == [1, 2, 3, 4]


def test_top_k_tells_logits_apart_whose_weights_round_to_the_same(sample):
    logits = np.zeros((1, 20), np.float32)
    logits[0, 4], logits[0, 5] = FLOAT_BELOW_8, 8.0
    ids, weights = sample(logits, temperature=100.0, top_k=1)
    assert kept(weights[0]) == [5]
    assert ids[0] == 5


@pytest.mark.parametrize(
    ("top_p", "ids"), [(0.5, [0]), (0.51, [0, 1]), (0.75, [0, 1]), (0.76, [0, 1, 2, 3]), (0.0, [0])]
)
def test_top_p_is_reached_exactly(sample, top_p, ids):
    """Weights 4, 2, 1, 1 of 8: all sums are exact but for e^x, which the margins cover."""
    logits = np.log([[4.0, 2.0, 1.0, 1.0]])
    _, weights = sample(logits, top_p=top_p - 1e-4 if top_p in (0.5, 0.75) else top_p)
    assert kept(weights[0]) == ids


def test_top_p_counts_what_top_k_left(sample):
    logits = np.log([[4.0, 2.0, 1.0, 1.0, 1.0, 1.0]])
    _, weights = sample(logits, top_k=2, top_p=0.6)  # 4 of 6, not 4 of 10
    assert kept(weights[0]) == [0]


def test_min_p_is_relative_to_the_largest(sample):
    _, weights = sample(np.log([[0.5, 0.26, 0.24]]), min_p=0.5)
    assert kept(weights[0]) == [0, 1]


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_row_without_distribution_gives_minus_one_and_spares_its_neighbours(
    sample, value, temperature
):
    logits = np.zeros((3, 37))
    logits[1, 36] = value
    ids, weights = sample(logits, temperature=temperature)
    assert ids[1] == -1
    assert not weights[1].any()
    assert (ids[[0, 2]] >= 0).all()


@pytest.mark.parametrize("values", [{"temperature": 0.0}, {}, {"top_k": 3, "top_p": 0.5}], ids=str)
def test_only_token_left_is_taken_and_none_left_is_minus_one(sample, values):
    logits = np.full((2, 40), -np.inf)
    logits[0, 39] = -1e4
    assert sample(logits, **values)[0].tolist() == [39, -1]


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 100.0])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_extreme_temperatures_and_logits_draw_a_token_in_range(sample, temperature, scale):
    logits = np.random.default_rng(8).standard_normal((20, 33)) * scale
    ids, weights = sample(logits, temperature=temperature, top_p=0.9)
    assert ((ids >= 0) & (ids < 33)).all()
    assert (weights[np.arange(20), ids] > 0).all()


@pytest.mark.parametrize(
    "values",
    [{"temperature": np.nan}, {"temperature": -1.0}, {"top_p": np.nan}, {"min_p": np.nan},
     {"top_p": -1.0}, {"min_p": 9.0}, {"top_k": -(2**31)}],
    ids=str,
)  # fmt: skip
def test_absurd_parameters_neither_hang_nor_leave_the_vocabulary(sample, values):
    logits = np.random.default_rng(9).standard_normal((3, 40))
    ids, _ = sample(logits, **values)
    assert ((ids >= -1) & (ids < 40)).all()


# ---------------------------------------------------------------------------- after the edits


def bitmask(allowed: list[list[int]], vocab: int) -> np.ndarray:
    bits = np.zeros((len(allowed), -(-vocab // 32) * 32), np.uint8)
    for row, tokens in enumerate(allowed):
        bits[row, tokens] = 1
    return np.packbits(bits, axis=1, bitorder="little").view(np.int32)


def test_masked_tokens_are_never_drawn(harness, sample):
    vocab, rows = 97, 500
    allowed = [[96], [0, 31, 32, 63, 64]]
    one = np.ones(rows, np.int32)
    inputs = {
        "logits": np.random.default_rng(10).standard_normal((rows, vocab)).astype(np.float32),
        "edit_row": np.arange(rows, dtype=np.int32),
        "edit_token": one,
        "edit_seen": one,
        "edit_count": one,
        "edit_bias": np.full(rows, 100, np.float32),  # a bias does not unmask
        "penalties": np.tile(np.array([1.0, 0.0, 0.0], np.float32), (rows, 1)),
        "mask_row": (np.arange(rows) % 2).astype(np.int32),
        "bitmask": bitmask(allowed, vocab),
    }
    (out,) = harness.run(ADJUST_LOGITS, inputs, {"vocab": vocab})
    np.testing.assert_allclose(out, adjust_logits_ref(**inputs)[0], rtol=1e-6)
    ids, _ = sample(out, temperature=2.0)
    assert set(ids[::2]) == {96}
    assert set(ids[1::2]) == set(allowed[1])
