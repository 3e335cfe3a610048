"""KV page book-keeping: a simulated cache checks that every visible position reads back right."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from mxforge.errors import KVMemoryError
from mxforge.kv import (
    KVPages,
    PagePool,
    first_visible_page,
    page_needs,
)
from mxforge.kv_layout import PAGE_TOKENS


class Simulation:
    """What the library would do with the pages: each slot holds the token written there."""

    def __init__(self, kv):
        self.kv = kv
        self.memory = [np.full((pool.size, PAGE_TOKENS), -1) for pool in (kv.full, kv.sliding)]

    def step(self, batch):
        """`batch`: (sequence, all its tokens so far, how many of the next to compute)."""
        for sequence, _, count in batch:
            for memory, copies in zip(self.memory, self.kv.prepare(sequence, count), strict=True):
                for source, destination in copies:
                    memory[destination] = memory[source]
        tables = self.kv.tables([sequence for sequence, _, _ in batch])
        for row, (sequence, tokens, count) in enumerate(batch):
            span = range(sequence.length, sequence.length + count)
            for position in span:
                for memory, slot in self.slots(tables, row, position):
                    memory[slot] = tokens[position]
            for position in span:
                self.check(tables, row, position, tokens)
        for sequence, _, count in batch:
            self.kv.commit(sequence, count)

    def slots(self, tables, row, position):
        """(memory, (page, slot)) of a position in either kind."""
        pairs = (
            (tables.full_table, tables.full_first),
            (tables.sliding_table, tables.sliding_first),
        )
        for memory, (table, first) in zip(self.memory, pairs, strict=True):
            column = position // PAGE_TOKENS - first[row]
            page = table[row, column] if column >= 0 else None
            yield memory, (page, position % PAGE_TOKENS)

    def check(self, tables, row, position, tokens):
        for key in range(position + 1):
            (full, full_slot), (sliding, sliding_slot) = self.slots(tables, row, key)
            assert full[full_slot] == tokens[key]
            if key > position - self.kv.window:
                assert sliding[sliding_slot] == tokens[key]


def check_references(kv, sequences):
    """Every reference has an owner, and a page without one is free."""
    owners = [*sequences, *(entry.pages for entry in kv.cache._entries.values())]
    for pool, kind in ((kv.full, "full"), (kv.sliding, "sliding")):
        held = Counter(page for owner in owners for page in getattr(owner, kind))
        assert all(pool.references(page) == held[page] for page in range(pool.size))
        assert pool.free == pool.size - len(held)
        assert all(len(set(getattr(s, kind))) == len(getattr(s, kind)) for s in owners)


# ---------------------------------------------------------------------------------- the pool


def test_a_pool_hands_out_each_page_once_and_again_after_release():
    pool = PagePool(3)
    pages = pool.allocate(3)
    assert sorted(pages) == [0, 1, 2]
    with pytest.raises(KVMemoryError, match="0 of 3"):
        pool.allocate()
    pool.retain(pages[:1])
    pool.release(pages)
    assert pool.free == 2
    pool.release(pages[:1])
    assert sorted(pool.allocate(3)) == [0, 1, 2]


def test_a_pool_hands_out_the_lowest_pages_in_order():
    pool = PagePool(6)
    pages = pool.allocate(6)
    pool.release([pages[4], pages[1], pages[3]])
    pool.release([pages[2]])
    assert pool.allocate(3) == [1, 2, 3]
    assert pool.allocate() == [4]


def test_too_large_an_allocation_takes_nothing():
    pool = PagePool(3)
    with pytest.raises(KVMemoryError):
        pool.allocate(4)
    assert pool.free == 3


def test_a_free_page_cannot_be_released_or_retained():
    pool = PagePool(1)
    with pytest.raises(ValueError, match="page 0"):
        pool.release([0])
    with pytest.raises(ValueError, match="page 0"):
        pool.retain([0])


# ------------------------------------------------------------------------------ sequences


@pytest.mark.parametrize("chunk", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("window", [1, 3, 16, 17, 40])
def test_every_visible_position_reads_back(chunk, window):
    kv = KVPages(16, 16, window)
    simulation, sequence, tokens = Simulation(kv), kv.start([]), list(range(200))
    while sequence.length < 200:
        simulation.step([(sequence, tokens, min(chunk, 200 - sequence.length))])
    assert sequence.sliding_first == first_visible_page(199, window)
    kv.release(sequence)
    check_references(kv, [])


def test_a_sequence_of_131072_tokens_holds_nine_sliding_pages_at_most():
    kv = KVPages(8192, 9, 128)
    sequence = kv.start([])
    most = 0
    while sequence.length < 131_072:
        kv.prepare(sequence, 1)
        most = max(most, len(sequence.sliding))
        kv.commit(sequence, 1)
    assert most == 9
    assert len(sequence.full) == 8192
    tables = kv.tables([sequence])
    assert tables.sliding_table.shape == (1, 8)
    assert tables.sliding_first[0] == (131_071 - 127) // 16
    with pytest.raises(KVMemoryError):
        kv.prepare(sequence, 1)


def test_a_window_edge_drops_the_page_only_when_the_last_position_leaves_it():
    kv = KVPages(64, 64, 128)
    sequence = kv.start([])
    first = []
    for _ in range(300):
        kv.prepare(sequence, 1)
        kv.commit(sequence, 1)
        first.append(sequence.sliding_first)  # after position `length - 1`
    # Position 142 is the last that sees position 15; position 143 sees 16 and up.
    assert first[142] == 0
    assert first[143] == 1


def test_tables_are_padded_int32_arrays():
    kv = KVPages(16, 16, 16)
    long, short = kv.start([]), kv.start([])
    kv.prepare(long, 60)
    kv.commit(long, 60)
    kv.prepare(short, 1)
    tables = kv.tables([short, long])
    assert [table.dtype for table in tables] == [np.int32] * 4
    assert tables.full_table.shape == (2, 4)
    assert tables.full_table[0].tolist() == [short.full[0], 0, 0, 0]
    assert tables.full_first.tolist() == [0, 0]
    assert tables.sliding_first.tolist() == [0, 2]
    assert kv.tables([kv.start([])]).full_table.shape == (1, 1)


def test_preparing_again_takes_no_more_pages():
    kv = KVPages(16, 16, 16)
    sequence = kv.start([])
    kv.prepare(sequence, 20)
    free = kv.full.free
    kv.prepare(sequence, 20)
    assert kv.full.free == free
    kv.commit(sequence, 3)  # fewer than prepared, as when a step is given up
    kv.prepare(sequence, 29)
    assert kv.full.free == free


def test_committing_what_was_not_prepared_is_an_error():
    kv = KVPages(4, 4, 16)
    with pytest.raises(ValueError, match="17"):
        kv.commit(kv.start([]), 17)


def test_prepare_without_enough_pages_changes_nothing():
    kv = KVPages(8, 2, 128)
    sequence = kv.start([])
    with pytest.raises(KVMemoryError, match="3 KV pages"):
        kv.prepare(sequence, 33)
    check_references(kv, [sequence])
    assert sequence.full == []


# -------------------------------------------------------------------------------- sharing


def test_a_fork_copies_only_the_begun_page_and_only_when_written():
    kv = KVPages(16, 16, 128)
    a = kv.start([])
    kv.prepare(a, 40)
    kv.commit(a, 20)  # holds a third page that is not begun
    b = kv.fork(a)
    assert b.full == a.full[:2]
    source = a.full[1]
    copies = kv.prepare(a, 1)
    assert copies.full == [(source, a.full[1])]
    assert len(copies.sliding) == 1
    assert b.full[1] == source != a.full[1]
    assert kv.prepare(b, 1) == ([], [])  # the page is b's alone by now
    check_references(kv, [a, b])


def test_a_fork_at_a_page_edge_copies_nothing():
    kv = KVPages(16, 16, 128)
    a = kv.start([])
    kv.prepare(a, 32)
    kv.commit(a, 32)
    b = kv.fork(a)
    assert kv.prepare(a, 1) == kv.prepare(b, 1) == ([], [])
    assert a.full[:2] == b.full[:2]
    assert a.full[2] != b.full[2]


def run(kv, tokens):
    sequence = kv.start(tokens)
    reused = sequence.length
    kv.prepare(sequence, len(tokens) - reused)
    kv.commit(sequence, len(tokens) - reused)
    return sequence, reused


@pytest.mark.parametrize("length", range(140, 180))
def test_the_same_prompt_again_computes_one_position(length):
    kv = KVPages(64, 64, 128)
    prompt = list(range(length))
    first, reused = run(kv, prompt)
    assert reused == 0
    kv.insert_prefix(first, prompt)
    _, reused = run(kv, prompt)
    assert reused == length - 1
    _, reused = run(kv, [*prompt, 7, 8, 9])
    assert reused == length


def test_a_prefix_counts_only_while_its_window_is_there():
    kv = KVPages(64, 64, 32)
    tokens = list(range(200))
    sequence, _ = run(kv, tokens)
    kv.insert_prefix(sequence, tokens)
    assert kv.start([*tokens[:100], 7]).length == 0
    # Position 199 sees 168 to 199, so the pages from position 160 on are held.
    assert kv.start([*tokens[:191], 7]).length == 191
    assert kv.start([*tokens[:190], 7]).length == 0
    assert kv.start([8, *tokens]).length == 0


def test_a_prefix_shorter_than_the_window_branches_anywhere():
    kv = KVPages(64, 64, 128)
    tokens = list(range(100))
    sequence, _ = run(kv, tokens)
    kv.insert_prefix(sequence, tokens)
    assert [kv.start([*tokens[:n], 7]).length for n in (1, 16, 50, 99)] == [1, 16, 50, 99]


def test_the_longest_prefix_is_taken():
    kv = KVPages(64, 64, 128)
    tokens = list(range(100))
    for length in (60, 90, 30):
        sequence, _ = run(kv, [*tokens[:length], 500])
        kv.insert_prefix(sequence, [*tokens[:length], 500])
    assert kv.start(tokens).length == 90


def test_an_exact_prefix_is_kept_once_and_the_least_recently_used_goes():
    kv = KVPages(64, 64, 128, prefixes=2)
    prompts = [[n] * 20 for n in range(3)]
    for prompt in (*prompts[:2], prompts[1]):
        sequence, _ = run(kv, prompt)
        kv.insert_prefix(sequence, prompt)
        kv.release(sequence)
    assert len(kv.cache) == 2
    kv.release(kv.start(prompts[0]))  # used: prompt 1 is the oldest now
    sequence, _ = run(kv, prompts[2])
    kv.insert_prefix(sequence, prompts[2])
    lengths = [kv.start(prompt).length for prompt in prompts]
    assert lengths == [19, 0, 19]


def test_kept_prefixes_give_way_to_sequences():
    kv = KVPages(4, 4, 128)
    for n in range(4):
        sequence, _ = run(kv, [n] * 16)
        kv.insert_prefix(sequence, [n] * 16)
        kv.release(sequence)
    assert kv.full.free == 0
    sequence, reused = run(kv, [3] * 64)
    assert reused == 16
    assert len(kv.cache) <= 1
    check_references(kv, [sequence])


def test_a_begun_page_shared_with_a_prefix_alone_is_freed_instead_of_copied():
    kv = KVPages(1, 1, 128)
    sequence, _ = run(kv, [1] * 5)
    kv.insert_prefix(sequence, [1] * 5)
    assert kv.prepare(sequence, 1) == ([], [])
    assert len(kv.cache) == 0


def test_without_a_limit_nothing_is_kept():
    kv = KVPages(4, 4, 128, prefixes=0)
    sequence, _ = run(kv, [1] * 5)
    kv.insert_prefix(sequence, [1] * 5)
    assert len(kv.cache) == 0


@pytest.mark.parametrize("seed", range(12))
def test_random_use_never_leaks_or_mixes_pages(seed):
    rng = random.Random(seed)
    window = rng.choice([1, 5, 16, 33, 128])
    kv = KVPages(rng.choice([40, 60, 100]), rng.choice([40, 60, 100]), window, prefixes=5)
    simulation = Simulation(kv)
    alive = []  # [sequence, tokens]; more tokens than computed positions
    for _ in range(120):
        action = rng.random()
        if action < 0.25 and len(alive) < 5:
            tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 120))]
            alive.append([kv.start(tokens), tokens])
        elif action < 0.35 and alive:
            sequence, tokens = rng.choice(alive)
            if len(alive) < 5:
                alive.append([kv.fork(sequence), tokens[: sequence.length]])
        elif action < 0.5 and alive:
            kv.insert_prefix(*rng.choice(alive))
        elif action < 0.6 and alive:
            kv.release(alive.pop(rng.randrange(len(alive)))[0])
        elif alive:
            batch = []
            for sequence, tokens in rng.sample(alive, k=rng.randrange(1, len(alive) + 1)):
                count = rng.randrange(1, 30)
                missing = sequence.length + count - len(tokens)
                tokens += [rng.randrange(2) for _ in range(missing)]
                batch.append((sequence, tokens, count))
            try:
                simulation.step(batch)
            except KVMemoryError:
                assert len(kv.cache) == 0
                kv.release(alive.pop()[0])
        check_references(kv, [sequence for sequence, _ in alive])
    for sequence, _ in alive:
        kv.release(sequence)
    kv.clear()
    assert (kv.full.free, kv.sliding.free) == (kv.full.size, kv.sliding.size)


# --------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("seed", range(20))
def test_pools_of_the_needed_size_never_run_out(seed):
    rng = random.Random(seed)
    context, batch, chunk = rng.randrange(20, 400), rng.randrange(1, 6), rng.randrange(1, 90)
    window = rng.randrange(1, 150)
    needs = page_needs(context, batch, chunk, window, 1, 1)
    kv = KVPages(needs.full_pages, needs.sliding_pages, window, prefixes=3)
    alive = []
    for _ in range(300):
        if len(alive) < batch:
            prompt = [rng.randrange(2) for _ in range(rng.randrange(1, context + 1))]
            alive.append([kv.start(prompt), prompt])
        budget = chunk
        for entry in alive:
            sequence, prompt = entry
            count = min(budget, context - sequence.length, rng.choice([1, chunk]))
            if count > 0:
                kv.prepare(sequence, count)
                budget -= count
                entry.append(count)
        for entry in alive:
            if len(entry) == 3:
                kv.commit(entry[0], entry.pop())
                entry[1] += [0] * (entry[0].length - len(entry[1]))
        for entry in [entry for entry in alive if entry[0].length == context or rng.random() < 0.1]:
            kv.insert_prefix(*entry)
            kv.release(entry[0])
            alive.remove(entry)


def test_needs_of_the_20b_model():
    # 12 layers of a kind, 8 heads of 64, K and V, float16: 24 KiB a token.
    page = 24 * 1024 * 16
    needs = page_needs(131_072, 1, 512, 128, page, page)
    assert needs.full_bytes == 3 * 2**30
    assert needs.sliding_pages == 9 + 1 + 32
    assert needs.bytes == needs.full_bytes + needs.sliding_bytes
