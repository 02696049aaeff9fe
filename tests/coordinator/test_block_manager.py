"""Blocks are handed out once, shared by equal beginnings, and reused oldest first."""

import hashlib

import pytest

from ember_pp.coordinator.block_manager import BlockManager
from ember_pp.coordinator.sequence import Sequence
from ember_pp.sampling_params import SamplingParams

BLOCK_SIZE = 4
PROMPT = list(range(10, 20))  # two full blocks, and two tokens in a third


def make_manager(num_blocks=8, **settings):
    return BlockManager(num_blocks, BLOCK_SIZE, **settings)


def make_sequence(prompt_ids=PROMPT):
    return Sequence("r", prompt_ids, SamplingParams(), seed=0)


def compute(manager, prompt_ids=PROMPT):
    """A sequence that holds its blocks and has published them all."""
    sequence = make_sequence(prompt_ids)
    assert manager.can_allocate(sequence)
    manager.allocate(sequence)
    manager.publish(sequence, len(prompt_ids))
    return sequence


def compute_and_free(manager, prompt_ids=PROMPT):
    """The blocks that stay behind when such a sequence has ended."""
    sequence = compute(manager, prompt_ids)
    blocks = sequence.block_table
    manager.free(sequence)
    return blocks


def drain(manager):
    """Take every block that can be handed out, in the order in which it is."""
    sequence = make_sequence([1])
    while manager.append(sequence) is not None:
        pass
    return sequence.block_table


# ------------------------------------------------------------------------ allocation


@pytest.mark.parametrize(
    ("num_tokens", "num_blocks"),
    [(1, 1), (BLOCK_SIZE - 1, 1), (BLOCK_SIZE, 1), (BLOCK_SIZE + 1, 2), (2 * BLOCK_SIZE + 1, 3)],
)
def test_gives_a_block_for_every_begun_block_of_tokens(num_tokens, num_blocks):
    manager = make_manager()
    sequence = make_sequence(range(num_tokens))

    assert manager.allocate(sequence) == 0
    assert len(set(sequence.block_table)) == num_blocks
    assert manager.num_free == 8 - num_blocks
    assert manager.num_blocks_for(num_tokens) == num_blocks


def test_allocates_for_outputs_too_when_a_sequence_comes_back():
    manager = make_manager()
    sequence = make_sequence()
    sequence.output_ids.extend([1, 2, 3])

    manager.allocate(sequence)
    assert len(sequence.block_table) == 4  # 10 + 3 tokens


def test_hands_every_block_out_once_and_then_none():
    manager = make_manager(5)
    first, second = make_sequence(), make_sequence([1])
    manager.allocate(first)
    manager.allocate(second)

    last = manager.append(second)
    assert sorted(first.block_table + second.block_table) == [0, 1, 2, 3, 4]
    assert second.block_table[-1] == last
    assert manager.append(second) is None
    assert len(second.block_table) == 2
    assert manager.num_free == 0


def test_says_no_when_blocks_or_headroom_are_missing():
    manager = make_manager(4)
    assert manager.can_allocate(make_sequence(), headroom=1)
    assert not manager.can_allocate(make_sequence(), headroom=2)
    assert not manager.can_allocate(make_sequence(range(4 * BLOCK_SIZE + 1)))


def test_takes_back_what_was_never_published_as_free():
    manager = make_manager()
    sequence = make_sequence()
    manager.allocate(sequence)
    manager.free(sequence)

    assert sequence.block_table == []
    assert manager.num_free == 8
    assert manager.num_cached == 0
    assert sorted(drain(manager)) == list(range(8))


def test_refuses_to_free_a_block_twice():
    manager = make_manager()
    sequence = make_sequence()
    manager.allocate(sequence)
    blocks = list(sequence.block_table)
    manager.free(sequence)

    sequence.block_table = blocks
    with pytest.raises(AssertionError, match="freed twice"):
        manager.free(sequence)


def test_refuses_to_allocate_over_blocks_that_are_held():
    manager = make_manager()
    sequence = make_sequence()
    manager.allocate(sequence)
    with pytest.raises(AssertionError, match="holds blocks already"):
        manager.allocate(sequence)


# ------------------------------------------------------------------------ sharing


def test_shares_the_full_blocks_of_an_equal_beginning():
    manager = make_manager()
    first = compute(manager)
    second = make_sequence([*PROMPT, 99])

    assert manager.allocate(second) == 2 * BLOCK_SIZE
    assert second.block_table[:2] == first.block_table[:2]
    assert second.block_table[2] != first.block_table[2]
    assert manager.num_free == 8 - 4


def test_shares_up_to_the_first_block_that_differs():
    manager = make_manager()
    first = compute(manager)
    other = make_sequence([*PROMPT[:BLOCK_SIZE], 99, *PROMPT[BLOCK_SIZE + 1 :]])

    assert manager.match_prefix(other) == first.block_table[:1]


def test_does_not_share_equal_tokens_after_another_beginning():
    manager = make_manager()
    compute(manager)
    assert manager.match_prefix(make_sequence([99, *PROMPT[1:]])) == []
    assert manager.match_prefix(make_sequence(PROMPT[BLOCK_SIZE:])) == []


@pytest.mark.parametrize(
    ("num_tokens", "num_matched"),
    [
        (BLOCK_SIZE - 1, 0),
        (BLOCK_SIZE, 0),  # all of it is cached, but one token must be left to compute
        (BLOCK_SIZE + 1, 1),
        (2 * BLOCK_SIZE, 1),
        (2 * BLOCK_SIZE + 1, 2),
        (3 * BLOCK_SIZE, 2),
        (3 * BLOCK_SIZE + 1, 2),  # the third block was never full
    ],
)
def test_matches_full_blocks_and_never_the_whole_prompt(num_tokens, num_matched):
    manager = make_manager()
    compute(manager)  # 10 tokens
    longer = [*PROMPT, 97, 98, 99]
    assert len(manager.match_prefix(make_sequence(longer[:num_tokens]))) == num_matched


def test_matches_outputs_as_well_as_the_prompt():
    manager = make_manager()
    first = make_sequence()
    first.output_ids.extend([1, 2, 3])
    manager.allocate(first)
    manager.publish(first, 12)

    assert manager.match_prefix(make_sequence([*PROMPT, 1, 2, 3])) == first.block_table[:3]


def test_keeps_a_shared_block_until_its_last_holder_is_gone():
    manager = make_manager(4)
    first, second = compute(manager), compute(manager)
    shared = first.block_table[:2]
    assert second.block_table[:2] == shared

    private = first.block_table[2]
    manager.free(first)
    assert drain(manager) == [private]
    manager.free(second)
    assert manager.num_free == 3
    assert set(shared) < set(drain(manager))


def test_counts_cached_blocks_as_free_but_not_those_that_a_match_revives():
    manager = make_manager(4)
    compute_and_free(manager)  # leaves two cached blocks
    assert manager.num_free == 4
    assert manager.num_cached == 2

    same = make_sequence()
    assert manager.can_allocate(same, headroom=1)
    assert not manager.can_allocate(same, headroom=2)
    manager.allocate(same)
    assert manager.num_free == 1


# ------------------------------------------------------------------------ publishing


def test_publishes_full_blocks_of_what_is_computed_and_no_others():
    manager = make_manager()
    sequence = make_sequence()
    manager.allocate(sequence)
    for num_computed, num_cached in [(0, 0), (3, 0), (4, 1), (7, 1), (10, 2)]:
        manager.publish(sequence, num_computed)
        assert manager.num_cached == num_cached, f"{num_computed=}"


def test_keeps_the_first_of_two_equal_blocks():
    manager = make_manager()
    first, second = make_sequence(), make_sequence()
    manager.allocate(first)
    manager.allocate(second)  # nothing is published yet: both compute
    manager.publish(first, 10)
    manager.publish(second, 10)

    assert manager.num_cached == 2
    assert manager.match_prefix(make_sequence()) == first.block_table[:2]
    manager.free(second)  # its private copies
    assert manager.match_prefix(make_sequence()) == first.block_table[:2]


def test_publishes_nothing_new_after_its_twin_was_evicted():
    manager = make_manager(6)
    first, second = make_sequence(), make_sequence()
    manager.allocate(first)
    manager.allocate(second)
    manager.publish(first, 10)
    manager.publish(second, 10)
    manager.free(first)
    drain(manager)

    assert manager.num_cached == 0
    assert manager.match_prefix(make_sequence()) == []


def test_refuses_to_publish_tokens_that_are_not_known():
    manager = make_manager()
    sequence = make_sequence()
    manager.allocate(sequence)
    with pytest.raises(AssertionError, match="not known"):
        manager.publish(sequence, 3 * BLOCK_SIZE)


def test_the_key_of_a_block_is_a_digest_of_all_tokens_up_to_its_end():
    """128 bits of BLAKE2b over the block before and exact ids: nothing that one could collide."""
    manager = make_manager()
    sequence = compute(manager)
    key = b""
    for start in (0, BLOCK_SIZE):
        ids = b"".join(token.to_bytes(4, "little") for token in PROMPT[start : start + BLOCK_SIZE])
        key = hashlib.blake2b(key + ids, digest_size=16).digest()
        assert sequence.block_digests[start // BLOCK_SIZE] == key


def test_tokens_that_python_hashes_alike_do_not_match():
    assert hash(-1) == hash(-2)
    manager = make_manager()
    compute(manager, [-1] * 5)
    assert manager.match_prefix(make_sequence([-2] * 5)) == []


# ------------------------------------------------------------------------ eviction


def test_takes_free_blocks_before_cached_ones():
    manager = make_manager(4)
    cached = compute_and_free(manager)[:2]
    assert drain(manager)[-2:] == [cached[1], cached[0]]


def test_evicts_the_least_recently_held_block_first():
    manager = make_manager(4)
    old = compute_and_free(manager, [1] * BLOCK_SIZE)
    new = compute_and_free(manager, [2] * BLOCK_SIZE)
    assert drain(manager)[-2:] == old + new


def test_holding_a_cached_block_makes_it_recent():
    manager = make_manager(4)
    old = compute_and_free(manager, [1] * BLOCK_SIZE)
    new = compute_and_free(manager, [2] * BLOCK_SIZE)
    compute_and_free(manager, [1] * BLOCK_SIZE + [3])  # shares `old`
    assert drain(manager)[-2:] == new + old


def test_evicts_the_end_of_a_prompt_before_its_beginning():
    manager = make_manager(4)
    beginning, end = compute_and_free(manager)[:2]
    sequence = make_sequence([1])
    for _ in range(3):
        manager.append(sequence)

    assert sequence.block_table[-1] == end
    assert manager.match_prefix(make_sequence()) == [beginning]


def test_never_evicts_what_is_held():
    manager = make_manager(3)
    sequence = compute(manager)
    assert drain(manager) == []
    assert manager.match_prefix(make_sequence()) == sequence.block_table[:2]


def test_forgets_the_content_of_an_evicted_block():
    manager = make_manager(3)
    compute_and_free(manager)
    drain(manager)
    assert manager.num_cached == 0
    assert manager.match_prefix(make_sequence()) == []


def test_shares_nothing_with_caching_off():
    manager = make_manager(prefix_caching=False)
    first = compute(manager)
    second = make_sequence()

    assert manager.allocate(second) == 0
    assert set(first.block_table).isdisjoint(second.block_table)
    assert manager.num_cached == 0
    manager.free(first)
    manager.free(second)
    assert sorted(drain(manager)) == list(range(8))
