"""The generator against TVM's LLVM backend: random programs, each in two forms."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context

import pytest
from support.differential import Outcome, compare
from support.random_programs import Program
from support.spirv_programs import device

from mxforge.compile.spirv import arithmetic
from mxforge.compile.spirv.encoding import Op

BATCH = 50
EVERYDAY, SLOW = range(0, 300, BATCH), range(300, 1000, BATCH)
# Every seed that ever failed, with what was wrong. A seed names the same program only while
# support/random_programs.py makes the same choices: before that changes, write these out as direct
# tests.
_WIDENED = "Mesa 22.3 has comparisons of numbers widened to 64 bits wrong: see convert.py"
FAILED = dict.fromkeys(
    (1125, 1428, 2227, 4037, 4352, 5042, 5316, 5600, 5856, 6838, 6874, 7477, 10046), _WIDENED
)
# Programs that TVM's passes change on the way to one of the two generators.
_LOST = "FlattenBuffer's simplifier loses x from an index (x - y) % 7: -(y % -7)"
WRONG_IN_TVM = dict.fromkeys((199, 3482), _LOST)


def check(outcome: Outcome, seeds: Collection[int]) -> None:
    failed = {seed: reason for seed, reason in outcome.failed.items() if seed not in WRONG_IN_TVM}
    sources = [f"{reason}\n{Program(seed)}" for seed, reason in failed.items()]
    assert not sources, "\n".join([f"failed seeds: {sorted(failed)}", *sources])
    # TVM's own passes stop at a few programs; were they many, little would be tested.
    assert len(outcome.refused) <= max(3, len(seeds) // 10), outcome.refused


@pytest.fixture(scope="module")
def pool():
    """Processes of their own: a program that crashes its driver ends one of these."""
    device()
    count = min(4, os.cpu_count() or 1)
    executor = ProcessPoolExecutor(count, mp_context=get_context("spawn"))
    yield executor
    executor.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def outcome(pool) -> Callable[[int], Outcome]:
    """outcome(first) -> that of a batch; all of EVERYDAY, or of SLOW, begin with the first one."""
    begun: dict[int, Future[Outcome]] = {}

    def of(first: int) -> Outcome:
        if first not in begun:
            for start in EVERYDAY if first in EVERYDAY else SLOW:
                begun[start] = pool.submit(compare, range(start, start + BATCH))
        return begun[first].result()

    return of


@pytest.mark.parametrize(
    "first", [*EVERYDAY, *(pytest.param(first, marks=pytest.mark.slow) for first in SLOW)]
)
def test_random_programs(outcome, first):
    check(outcome(first), range(first, first + BATCH))


@pytest.mark.full
def test_ten_thousand_random_programs(pool):
    batches = [range(first, first + BATCH) for first in range(1000, 11_000, BATCH)]
    for seeds, outcome in zip(batches, pool.map(compare, batches), strict=True):
        check(outcome, seeds)


def test_a_wrong_generator_is_noticed(monkeypatch):
    """Remainders of signed numbers taken as if they had no sign."""
    monkeypatch.setattr(arithmetic, "divide", lambda b, x, y: b.op(Op.U_DIV, x.dtype, x, y))
    assert compare(range(25)).failed


def test_programs_that_once_failed():
    check(compare(list(FAILED)), FAILED)


@pytest.mark.parametrize("seed", WRONG_IN_TVM)
def test_programs_that_tvm_changes(seed):
    assert compare([seed]).failed, "TVM is right now: take the seed out of WRONG_IN_TVM"
