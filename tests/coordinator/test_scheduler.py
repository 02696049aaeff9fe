"""Scheduling by example: small numbers, every plan checked by eye.

Sequences are named ``a``, ``b``, ... in the order of arrival; names stand for sequences in all
expectations.
"""

import dataclasses

import pytest

from ember_pp import protocol
from ember_pp.coordinator.policy import POLICIES, Load
from ember_pp.coordinator.scheduler import Scheduler, plan_to_execute
from ember_pp.coordinator.sequence import Sequence, SequenceStatus
from ember_pp.errors import InvalidRequestError, ProtocolError
from ember_pp.sampling_params import SamplingParams

BLOCK_SIZE = 4
TOKEN = 7  # what every row draws
SETTINGS = {
    "num_blocks": 32,
    "block_size": BLOCK_SIZE,
    "max_in_flight": 1,
    "max_sequences": 8,
    "max_tokens_per_plan": 16,
    "max_model_len": 64,
    # Its answers need no arithmetic: equal shares of the sequences, and all the tokens of a plan.
    "policy": POLICIES["fixed"],
}


def make_scheduler(**settings):
    return Scheduler(**SETTINGS | settings)


def make_sequence(name, num_tokens=4, *, prompt_ids=None, **params):
    """Prompts of two names have no token in common."""
    first = 100 * ord(name[0])
    prompt_ids = prompt_ids or range(first, first + num_tokens)
    return Sequence(name, prompt_ids, SamplingParams(**{"max_tokens": 8} | params), seed=1)


def add(scheduler, *named, num_tokens=4, **params):
    sequences = [make_sequence(name, num_tokens, **params) for name in named]
    for sequence in sequences:
        scheduler.add(sequence)
    return sequences[0] if len(sequences) == 1 else sequences


def come_back(scheduler):
    """The oldest plan's tokens arrive; what is long enough is finished, as the caller must."""
    plan = scheduler.in_flight.oldest
    delivered = list(scheduler.complete(plan.number, [TOKEN] * plan.num_rows))
    for sequence, _ in delivered:
        if sequence.num_tokens == sequence.max_total_tokens:
            scheduler.finish(sequence)
    return names(sequence for sequence, _ in delivered)


def step(scheduler):
    """One plan there and back, for schedulers with one plan in flight."""
    plan = scheduler.next_plan()
    come_back(scheduler)
    return plan


def names(sequences):
    return "".join(sequence.request_id for sequence in sequences)


def chunks(plan):
    """(name, start, end) of each chunk; the name is in capitals if its last token samples."""
    return [
        (name.upper() if chunk.samples else name, chunk.start, chunk.start + len(chunk.token_ids))
        for chunk in plan.chunks
        for name in [chunk.sequence.request_id]
    ]


def decoding(scheduler, *named, num_tokens=4, **params):
    """Sequences that have been prefilled and are in the roster; nothing is in flight."""
    sequences = add(scheduler, *named, num_tokens=num_tokens, **params)
    for _ in range(2):
        while scheduler.next_plan():
            pass
        while scheduler.in_flight.oldest:
            come_back(scheduler)
    return sequences


# ------------------------------------------------------------------------ nothing to do


def test_plans_nothing_when_there_is_nothing_to_do():
    scheduler = make_scheduler()
    assert scheduler.next_plan() is None
    assert not scheduler.has_work

    add(scheduler, "a")
    assert scheduler.has_work
    assert scheduler.next_plan() is not None
    assert scheduler.next_plan() is None  # its only micro-batch is in flight


def test_runs_one_request_from_prompt_to_end():
    scheduler = make_scheduler()
    a = add(scheduler, "a", max_tokens=3)

    prefill = step(scheduler)
    assert chunks(prefill) == [("A", 0, 4)]
    assert prefill.num_tokens == 4
    for num_outputs in (1, 2):
        assert a.num_output_tokens == num_outputs
        decode = step(scheduler)
        assert names(decode.decodes) == "a"
        assert decode.feedback == decode.number - 1
        assert not decode.chunks

    assert list(a.output_ids) == [TOKEN] * 3
    assert a.status is SequenceStatus.FINISHED
    assert not scheduler.has_work
    assert scheduler.next_plan() is None


# ------------------------------------------------------------------------ admission


def test_admits_in_the_order_of_arrival_as_slots_allow():
    scheduler = make_scheduler(max_sequences=2)
    a, _, _, _ = add(scheduler, "a", "b", "c", "d")
    assert chunks(step(scheduler)) == [("A", 0, 4), ("B", 0, 4)]
    assert names(step(scheduler).decodes) == "ab"

    scheduler.finish(a)
    plan = scheduler.next_plan()
    assert names(plan.decodes) == "b"
    assert chunks(plan) == [("C", 0, 4)]


def test_nobody_passes_a_request_that_waits_for_blocks():
    scheduler = make_scheduler(num_blocks=8, max_tokens_per_plan=64)
    a = add(scheduler, "a", num_tokens=20)  # 5 of 8 blocks
    add(scheduler, "b", num_tokens=16)  # 4 blocks
    add(scheduler, "c", num_tokens=1)  # would fit

    assert chunks(step(scheduler)) == [("A", 0, 20)]
    scheduler.finish(a)
    assert chunks(step(scheduler)) == [("B", 0, 16), ("C", 0, 1)]


def test_admission_leaves_a_block_for_each_one_that_runs():
    scheduler = make_scheduler(num_blocks=4)
    add(scheduler, "a", "b", num_tokens=7)  # 2 + 2 blocks, but the next one of `a` would be none
    assert chunks(step(scheduler)) == [("A", 0, 7)]

    scheduler = make_scheduler(num_blocks=5)
    add(scheduler, "a", "b", num_tokens=7)
    assert chunks(step(scheduler)) == [("A", 0, 7), ("B", 0, 7)]


def test_tells_stages_of_slots_and_blocks_once():
    scheduler = make_scheduler()
    add(scheduler, "a", num_tokens=9)
    plan = step(scheduler)
    (opened,) = plan.open
    assert (opened.slot, opened.seed, opened.num_prompt_tokens) == (0, 1, 9)
    assert plan.blocks == [0, 0, 0, 1, 0, 2]  # (slot, block) pairs
    assert plan.join == []

    plan = step(scheduler)
    assert (plan.open, plan.blocks, plan.join) == ([], [], [0])
    plan = step(scheduler)
    assert (plan.open, plan.blocks, plan.join) == ([], [], [])


def test_gives_a_block_with_the_row_that_needs_it():
    scheduler = make_scheduler()
    add(scheduler, "a", num_tokens=3)
    given = [step(scheduler).blocks for _ in range(7)]
    #        prefill 0..2, row 3, row 4 opens the second block, 5, 6, 7, row 8 the third
    assert given == [[0, 0], [], [0, 1], [], [], [], [0, 2]]


# ------------------------------------------------------------------------ balance and budget


def test_spreads_a_burst_over_the_micro_batches():
    scheduler = make_scheduler(max_in_flight=2)
    add(scheduler, "a", "b", "c", "d")
    first, second = scheduler.next_plan(), scheduler.next_plan()
    assert (first.microbatch_id, chunks(first)) == (0, [("A", 0, 4), ("B", 0, 4)])
    assert (second.microbatch_id, chunks(second)) == (1, [("C", 0, 4), ("D", 0, 4)])
    assert scheduler.next_plan() is None


@dataclasses.dataclass(frozen=True)
class Says(type(POLICIES["fixed"])):
    """As ``fixed``, with a number of prompt tokens that is given; keeps what it was asked."""

    num_tokens: int = 0
    loads: list = dataclasses.field(default_factory=list)

    def prefill_tokens(self, load):
        self.loads.append(load)
        return self.num_tokens


def test_a_plan_takes_the_prompt_tokens_that_the_policy_says():
    scheduler = make_scheduler(max_in_flight=2, policy=Says(num_tokens=14))
    add(scheduler, "a", "b", num_tokens=12)
    add(scheduler, "c", "d", num_tokens=2)
    assert chunks(scheduler.next_plan()) == [("A", 0, 12), ("b", 0, 2)]
    # The prompt that was begun goes on in the next plan, while its first chunk is in flight.
    assert chunks(scheduler.next_plan()) == [("B", 2, 12), ("C", 0, 2)]
    come_back(scheduler)
    plan = scheduler.next_plan()
    assert (names(plan.decodes), chunks(plan)) == ("a", [("D", 0, 2)])


@pytest.mark.parametrize("said", [0, -5])
def test_a_prompt_goes_on_by_a_token_at_least(said):
    """Whatever the policy says: or it would wait for ever."""
    scheduler = make_scheduler(policy=Says(num_tokens=said))
    add(scheduler, "a", num_tokens=2)
    assert [chunks(step(scheduler)) for _ in range(2)] == [[("a", 0, 1)], [("A", 1, 2)]]


def test_tells_the_policy_what_waits_and_what_runs():
    policy = Says(num_tokens=100)
    scheduler = make_scheduler(max_in_flight=2, policy=policy, max_sequences=5, num_blocks=40)
    decoding(scheduler, "a", "b", "c", num_tokens=4)  # and two tokens each
    policy.loads.clear()
    add(scheduler, "d", "e", "f", "g", num_tokens=30)
    plan = scheduler.next_plan()
    assert (names(plan.decodes), chunks(plan)) == ("ab", [("d", 0, 14)])
    scheduler.next_plan()
    first, second = policy.loads
    assert first == Load(
        num_decodes=2,
        num_context_tokens=2 * 6,  # the token that is computed included
        num_decoding=3,
        num_decoding_context_tokens=3 * 6,
        backlog_tokens=60,  # two slots are left for four prompts
        num_begun_tokens=0,
        num_microbatches=2,
        max_tokens_per_plan=16,
        plan_time_s=None,
    )
    assert (second.num_decodes, second.num_begun_tokens) == (1, 14)
    assert second.backlog_tokens == 30 - 14 + 30  # of `d`, and one slot for three prompts
    assert plan.num_context_tokens == 2 * 6 + 14


def test_fewer_sequences_than_micro_batches_get_a_plan_each():
    scheduler = make_scheduler(max_in_flight=4)
    add(scheduler, "a", "b")
    assert chunks(scheduler.next_plan()) == [("A", 0, 4)]
    assert chunks(scheduler.next_plan()) == [("B", 0, 4)]
    assert scheduler.next_plan() is None


def test_keeps_a_sequence_in_its_micro_batch():
    scheduler = make_scheduler(max_in_flight=2)
    add(scheduler, "a", "b", "c", "d")
    for _ in range(2):
        scheduler.next_plan()
    for rows, microbatch_id in [("ab", 0), ("cd", 1)] * 3:
        come_back(scheduler)
        plan = scheduler.next_plan()
        assert (names(plan.decodes), plan.microbatch_id) == (rows, microbatch_id)


def test_micro_batches_take_turns_where_fewer_plans_are_in_flight():
    scheduler = make_scheduler(max_in_flight=1, num_microbatches=3)
    add(scheduler, "a", "b", "c", "d", "e", "f")
    for _ in range(3):
        step(scheduler)
    assert [names(step(scheduler).decodes) for _ in range(6)] == ["ab", "cd", "ef"] * 2


def test_fills_a_plan_up_to_the_token_budget():
    scheduler = make_scheduler(max_tokens_per_plan=6)
    add(scheduler, "a", "b", "c", num_tokens=5)
    seen = [step(scheduler) for _ in range(4)]
    assert [(names(plan.decodes), chunks(plan)) for plan in seen] == [
        ("", [("A", 0, 5), ("b", 0, 1)]),
        ("a", [("B", 1, 5), ("c", 0, 1)]),
        ("ab", [("C", 1, 5)]),
        ("abc", []),
    ]
    assert [plan.num_tokens for plan in seen] == [6, 6, 6, 3]


def test_computes_a_long_prompt_in_chunks_and_samples_after_the_last():
    scheduler = make_scheduler()
    add(scheduler, "a", num_tokens=40)
    for expected, delivered in [(("a", 0, 16), ""), (("a", 16, 32), ""), (("A", 32, 40), "a")]:
        assert chunks(scheduler.next_plan()) == [expected]
        assert come_back(scheduler) == delivered


def test_decodes_go_on_beside_a_long_prompt():
    scheduler = make_scheduler()
    decoding(scheduler, "a")
    add(scheduler, "b", num_tokens=40)
    seen = [step(scheduler) for _ in range(3)]
    assert [(names(plan.decodes), *chunks(plan)) for plan in seen] == [
        ("a", ("b", 0, 15)),
        ("a", ("b", 15, 30)),
        ("a", ("B", 30, 40)),
    ]


def test_runs_no_more_rows_than_a_plan_has_tokens():
    scheduler = make_scheduler(max_tokens_per_plan=2)
    add(scheduler, "a", "b", "c", num_tokens=2, max_tokens=4)
    seen = [step(scheduler) for _ in range(7)]
    assert [(names(plan.decodes), *chunks(plan)) for plan in seen] == [
        ("", ("A", 0, 2)),
        ("a", ("b", 0, 1)),
        ("a", ("B", 1, 2)),
        ("ab",),  # `c` would never get a token here: it stays outside
        ("b", ("c", 0, 1)),
        ("b", ("C", 1, 2)),
        ("c",),
    ]


# ------------------------------------------------------------------------ prefix cache

PROMPT = list(range(10))  # two full blocks and two tokens


def test_starts_after_the_blocks_that_another_request_computes():
    scheduler = make_scheduler(max_in_flight=2)
    a = add(scheduler, "a", prompt_ids=PROMPT)
    scheduler.next_plan()
    b = add(scheduler, "b", prompt_ids=PROMPT)
    plan = scheduler.next_plan()  # `a` is still in flight, but stages will run it before this

    assert chunks(plan) == [("B", 8, 10)]
    assert b.block_table[:2] == a.block_table[:2]
    assert plan.blocks == [1, 0, 1, 1, 1, b.block_table[2]]
    assert (a.num_cached_tokens, b.num_cached_tokens) == (0, 8)
    stats = scheduler.stats()
    assert (stats["num_prompt_tokens"], stats["num_prefix_hit_tokens"]) == (20, 8)


def test_a_plan_reads_no_block_that_it_writes():
    scheduler = make_scheduler(max_tokens_per_plan=32)
    add(scheduler, "a", "b", prompt_ids=PROMPT)
    assert chunks(scheduler.next_plan()) == [("A", 0, 10), ("B", 0, 10)]


def test_shares_only_what_earlier_plans_compute_of_a_long_prompt():
    scheduler = make_scheduler(max_tokens_per_plan=6)
    add(scheduler, "a", "b", prompt_ids=PROMPT)
    assert chunks(step(scheduler)) == [("a", 0, 6)]
    # Its second block is filled by this very plan: `b` shares the first one alone.
    assert chunks(step(scheduler)) == [("A", 6, 10), ("b", 4, 6)]


def test_finds_the_prompt_and_the_answer_of_a_request_that_ended():
    scheduler = make_scheduler()
    add(scheduler, "a", prompt_ids=PROMPT, max_tokens=4)
    while scheduler.has_work:
        step(scheduler)
    add(scheduler, "b", prompt_ids=[*PROMPT, TOKEN, TOKEN, TOKEN, 99])
    assert chunks(scheduler.next_plan()) == [("B", 12, 14)]


def test_computes_everything_with_prefix_caching_off():
    scheduler = make_scheduler(prefix_caching=False)
    decoding(scheduler, "a", prompt_ids=PROMPT)
    add(scheduler, "b", prompt_ids=PROMPT)
    assert chunks(scheduler.next_plan()) == [("B", 0, 10)]
    assert scheduler.stats()["num_cached_blocks"] == 0


# ------------------------------------------------------------------------ preemption


def test_preempts_the_youngest_and_lets_it_come_back_first():
    scheduler = make_scheduler(num_blocks=5, max_sequences=2)
    a, b = decoding(scheduler, "a", "b", num_tokens=7)  # position 7 is computed; 1 block is left
    add(scheduler, "c", num_tokens=1)

    plan = step(scheduler)  # both need a block for position 8
    assert names(plan.decodes) == "a"
    assert plan.leave == [1]
    assert plan.blocks == [0, 4]
    assert not plan.open  # whoever was preempted does not come straight back
    assert b.status is SequenceStatus.WAITING
    assert b.block_table == []
    assert scheduler.stats()["num_preemptions"] == 1

    scheduler.finish(a)
    plan = step(scheduler)  # before `c`, and all but the newest token is still cached
    assert chunks(plan) == [("B", 8, 9), ("C", 0, 1)]
    assert plan.open[0].num_output_tokens == 2
    assert (b.num_admissions, b.num_cached_tokens) == (2, 0)


def test_the_oldest_waits_when_all_others_are_in_flight():
    scheduler = make_scheduler(num_blocks=5, max_in_flight=2)
    add(scheduler, "a", num_tokens=6)
    b = decoding(scheduler, "b", num_tokens=7)
    assert names(scheduler.next_plan().decodes) == "a"  # position 7, in its second block
    assert scheduler.next_plan().blocks == [1, 4]  # `b`, position 8, in the last free block

    assert come_back(scheduler) == "a"
    assert scheduler.next_plan() is None  # position 8 needs a block: that of `b`
    assert scheduler.stats()["num_preemptions"] == 0

    assert come_back(scheduler) == "b"
    assert names(scheduler.next_plan().decodes) == "a"
    assert b.status is SequenceStatus.WAITING


def test_preempts_the_youngest_that_is_not_in_flight():
    scheduler = make_scheduler(num_blocks=10, max_in_flight=3)
    _, b = add(scheduler, "a", "b", num_tokens=8, max_tokens=30)
    assert (scheduler.next_plan().microbatch_id, scheduler.next_plan().microbatch_id) == (0, 1)
    c = add(scheduler, "c", num_tokens=11, max_tokens=30)
    while scheduler.next_plan():
        if len(scheduler.in_flight) == 3:
            come_back(scheduler)

    # `a` has position 12 to store and no block; `b` and `c` are in flight. `b` comes back first.
    stats = scheduler.stats()
    assert (stats["num_free_blocks"], stats["num_in_flight"]) == (0, 2)
    assert stats["num_preemptions"] == 0
    assert come_back(scheduler) == "b"
    assert names(scheduler.next_plan().decodes) == "a"
    assert b.status is SequenceStatus.WAITING
    assert c.status is SequenceStatus.DECODING  # younger, but in flight


def test_one_request_may_fill_the_whole_cache():
    scheduler = make_scheduler(num_blocks=3)
    a = add(scheduler, "a", num_tokens=4, max_tokens=9)  # 13 tokens, of which 12 are stored
    add(scheduler, "b", num_tokens=4, max_tokens=9)
    while a.status is not SequenceStatus.FINISHED:
        step(scheduler)
    assert a.num_output_tokens == 9
    while scheduler.has_work:
        step(scheduler)
    assert scheduler.stats()["num_free_blocks"] == 3


# ------------------------------------------------------------------------ leave, open, join


def test_a_slot_is_opened_again_with_the_plan_that_takes_it_out_of_the_roster():
    scheduler = make_scheduler(max_in_flight=2, max_sequences=1)
    a = decoding(scheduler, "a")
    scheduler.finish(a)
    add(scheduler, "b")

    plan = scheduler.next_plan()
    assert plan.microbatch_id == 0  # the other one has not the roster with the slot
    assert plan.leave == [0]
    assert [opened.slot for opened in plan.open] == [0]
    assert names(plan.decodes) == ""


def test_a_slot_in_flight_is_not_opened_again():
    scheduler = make_scheduler(max_in_flight=2, max_sequences=1)
    a = decoding(scheduler, "a")
    scheduler.next_plan()
    scheduler.finish(a)
    add(scheduler, "b")

    assert scheduler.next_plan() is None
    assert come_back(scheduler) == ""
    plan = scheduler.next_plan()
    assert (plan.leave, [opened.slot for opened in plan.open]) == ([0], [0])


def test_gives_the_slot_of_one_that_ended_to_one_other():
    scheduler = make_scheduler(max_sequences=4)
    a, b, _ = decoding(scheduler, "a", "b", "c")
    for ended in (a, b):
        scheduler.finish(ended)
        step(scheduler)
    add(scheduler, "d", "e", "f", "g")
    assert sorted(opened.slot for opened in step(scheduler).open) == [0, 1, 3]
    assert scheduler.stats()["num_waiting"] == 1


def test_leaves_and_joins_keep_the_order_of_the_other_rows():
    scheduler = make_scheduler()
    _, b, _ = decoding(scheduler, "a", "b", "c")
    add(scheduler, "d")
    step(scheduler)
    scheduler.finish(b)

    plan = step(scheduler)
    assert (plan.leave, plan.join) == ([1], [3])
    assert names(plan.decodes) == "acd"


def test_an_unchanged_roster_is_the_same_list():
    scheduler = make_scheduler()
    decoding(scheduler, "a", "b")
    assert step(scheduler).decodes is step(scheduler).decodes


def test_moves_the_youngest_when_a_micro_batch_has_two_less():
    scheduler = make_scheduler(max_in_flight=2)
    a, b, c, d = decoding(scheduler, "a", "b", "c", "d")
    assert [s.microbatch_id for s in (a, b, c, d)] == [0, 0, 1, 1]
    scheduler.finish(c)
    scheduler.finish(d)

    first, second = scheduler.next_plan(), scheduler.next_plan()
    assert (names(first.decodes), first.leave) == ("a", [1])
    assert (names(second.decodes), second.leave, second.join) == ("b", [2, 3], [1])
    assert not second.open  # it keeps its slot and its blocks
    assert not second.blocks


def test_moves_nobody_for_a_difference_of_one():
    scheduler = make_scheduler(max_in_flight=2)
    *_, d = decoding(scheduler, "a", "b", "c", "d")
    scheduler.finish(d)
    assert names(scheduler.next_plan().decodes) == "ab"
    assert names(scheduler.next_plan().decodes) == "c"


# ------------------------------------------------------------------------ finish and abort


@pytest.mark.parametrize("end", ["finish", "abort"])
def test_ends_a_sequence_that_waits(end):
    scheduler = make_scheduler()
    a = add(scheduler, "a")
    getattr(scheduler, end)(a)
    assert a.status is SequenceStatus.FINISHED
    assert not scheduler.has_work
    assert scheduler.next_plan() is None


@pytest.mark.parametrize("end", ["finish", "abort"])
def test_ends_a_sequence_that_is_not_in_flight_at_once(end):
    scheduler = make_scheduler()
    a, _ = decoding(scheduler, "a", "b")
    getattr(scheduler, end)(a)
    assert a.status is SequenceStatus.FINISHED
    assert scheduler.stats()["num_free_blocks"] == 30  # `b` has 5 tokens stored
    assert names(scheduler.next_plan().decodes) == "b"


@pytest.mark.parametrize("end", ["finish", "abort"])
@pytest.mark.parametrize("is_prefill", [True, False])
def test_ends_a_sequence_in_flight_when_its_plan_is_back(end, is_prefill):
    scheduler = make_scheduler()
    a, b = (add if is_prefill else decoding)(scheduler, "a", "b")
    scheduler.next_plan()
    num_outputs = a.num_output_tokens
    getattr(scheduler, end)(a)

    assert a.is_finished
    assert a.block_table  # stages may be writing there
    assert come_back(scheduler) == "b"
    assert a.status is SequenceStatus.FINISHED
    assert a.num_output_tokens == num_outputs
    assert a.block_table == []
    assert names(scheduler.next_plan().decodes) == "b"
    assert b.num_output_tokens == num_outputs + 1


def test_aborts_between_two_chunks():
    scheduler = make_scheduler()
    a = add(scheduler, "a", num_tokens=40)
    step(scheduler)
    scheduler.abort(a)
    assert not scheduler.has_work
    assert scheduler.stats()["num_free_blocks"] == 32
    assert scheduler.next_plan() is None


def test_ending_twice_changes_nothing():
    scheduler = make_scheduler()
    a, _ = decoding(scheduler, "a", "b")
    scheduler.next_plan()
    for _ in range(2):
        scheduler.finish(a)
    come_back(scheduler)
    before = scheduler.stats()
    scheduler.abort(a)
    assert scheduler.stats() == before
    assert before["num_running"] == 1


def test_a_sequence_at_its_longest_is_planned_no_more_and_waits_for_finish():
    scheduler = make_scheduler()
    a = add(scheduler, "a", max_tokens=1)
    plan = scheduler.next_plan()
    assert a.status is SequenceStatus.DRAINING
    scheduler.complete(plan.number, [TOKEN])
    assert scheduler.next_plan() is None
    assert scheduler.has_work
    scheduler.finish(a)
    assert not scheduler.has_work


# ------------------------------------------------------------------------ complete


@pytest.mark.parametrize(("ahead", "num_token_ids"), [(1, 2), (-1, 2), (0, 1), (0, 3)])
def test_refuses_tokens_that_are_not_due_and_changes_nothing(ahead, num_token_ids):
    scheduler = make_scheduler()
    a, b = decoding(scheduler, "a", "b")
    plan = scheduler.next_plan()
    before = scheduler.stats()

    with pytest.raises(ProtocolError, match=f"plan {plan.number + ahead}"):
        scheduler.complete(plan.number + ahead, [TOKEN] * num_token_ids)
    assert scheduler.stats() == before
    assert a.num_output_tokens == b.num_output_tokens == 2
    assert come_back(scheduler) == "ab"


def test_delivers_decodes_first_and_then_chunks_that_sample():
    scheduler = make_scheduler()
    a = decoding(scheduler, "a")
    b, c = add(scheduler, "b", "c", num_tokens=10)
    plan = scheduler.next_plan()
    assert chunks(plan) == [("B", 0, 10), ("c", 0, 5)]
    assert list(scheduler.complete(plan.number, [11, 12])) == [(a, 11), (b, 12)]
    assert list(c.output_ids) == []
    following = scheduler.next_plan()
    assert names(following.decodes) == "ab"
    assert following.feedback == plan.number


# ------------------------------------------------------------------------ limits


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_tokens", "message"),
    [
        (0, 1, r"prompt: no tokens"),
        (31, 1, r"prompt: 31 tokens; at most 30 .*coordinator\.max_prompt_tokens"),
        (9, 12, r"21 tokens do not fit the KV cache of 16 tokens; .*cache\.memory_gib"),
        (17, 1, r"18 tokens do not fit the KV cache of 16 tokens"),
    ],
)
def test_refuses_what_could_not_run_alone(num_prompt_tokens, max_tokens, message):
    scheduler = make_scheduler(num_blocks=4, max_prompt_tokens=30)
    with pytest.raises(InvalidRequestError, match=message):
        scheduler.check_fits(num_prompt_tokens, max_tokens)
    sequence = Sequence(
        "a", range(num_prompt_tokens), SamplingParams(max_tokens=max_tokens), seed=0
    )
    with pytest.raises(InvalidRequestError, match=message):
        scheduler.add(sequence)
    assert not scheduler.has_work


def test_refuses_a_prompt_as_long_as_the_context():
    scheduler = make_scheduler()
    scheduler.check_fits(63, None)
    with pytest.raises(InvalidRequestError, match=r"64 .*context of 64 \(model\.context_length\)"):
        scheduler.check_fits(64, None)


@pytest.mark.parametrize(
    ("num_blocks", "max_tokens", "max_total_tokens"),
    [
        (32, 8, 12),
        (32, 1000, 64),  # the context
        (32, None, 64),
        (4, None, 17),  # the whole cache, and a token that is never an input
        (4, 13, 17),
    ],
)
def test_tells_how_long_a_sequence_may_grow(num_blocks, max_tokens, max_total_tokens):
    scheduler = make_scheduler(num_blocks=num_blocks)
    assert add(scheduler, "a", max_tokens=max_tokens).max_total_tokens == max_total_tokens


# ------------------------------------------------------------------------ stats and epochs


def test_counts_what_status_shows():
    scheduler = make_scheduler(max_in_flight=2, max_sequences=2)
    add(scheduler, "a", "b", "c", num_tokens=6)
    scheduler.next_plan()
    scheduler.next_plan()
    assert scheduler.stats() == {
        "num_running": 2,
        "num_waiting": 1,
        "num_in_flight": 2,
        "num_blocks": 32,
        "num_free_blocks": 28,
        "num_cached_blocks": 2,
        "num_preemptions": 0,
        "num_prompt_tokens": 12,
        "num_prefix_hit_tokens": 0,
    }


def test_starts_anew_after_the_stages_were_lost():
    scheduler = make_scheduler(max_tokens_per_plan=32, max_sequences=3)
    a, b, c = decoding(scheduler, "a", "b", "c")
    add(scheduler, "d")
    scheduler.next_plan()
    scheduler.abort(b)  # in flight: it ends when its plan is back, which is never

    scheduler.forget()
    assert b.status is SequenceStatus.FINISHED
    stats = scheduler.stats()
    assert (stats["num_running"], stats["num_in_flight"], stats["num_waiting"]) == (0, 0, 3)
    assert (stats["num_free_blocks"], stats["num_cached_blocks"]) == (32, 0)

    plan = scheduler.next_plan()
    assert plan.number == 0
    # Two tokens of output each are replayed, the prefix cache is empty, `d` is behind.
    assert chunks(plan) == [("A", 0, 6), ("C", 0, 6), ("D", 0, 4)]
    assert [opened.num_output_tokens for opened in plan.open] == [2, 2, 0]
    assert plan.leave == []
    assert come_back(scheduler) == "acd"
    assert a.num_output_tokens == c.num_output_tokens == 3


# ------------------------------------------------------------------------ the message


def decode_plans(num_rows):
    """A scheduler whose roster has ``num_rows`` rows, and its rows."""
    scheduler = make_scheduler(
        num_blocks=4 * (num_rows + 2),
        block_size=16,
        max_sequences=num_rows + 1,
        max_tokens_per_plan=num_rows + 1,
    )
    sequences = [make_sequence("a", prompt_ids=[row]) for row in range(num_rows)]
    for sequence in sequences:
        scheduler.add(sequence)
    step(scheduler)
    step(scheduler)
    return scheduler, sequences


def message(plan):
    return protocol.encode(plan_to_execute(plan, epoch=3))


def test_packs_a_plan_into_a_message():
    scheduler = make_scheduler()
    _, b, _ = decoding(scheduler, "a", "b", "c", num_tokens=2)
    scheduler.finish(b)
    add(scheduler, "d", num_tokens=2, temperature=0.5)
    plan = step(scheduler)

    execute = plan_to_execute(plan, epoch=3, tap="/tap")
    assert execute == protocol.Execute(
        epoch=3,
        plan=2,
        microbatch=0,
        leave=protocol.pack_u32([1]),
        open=plan.open,
        blocks=protocol.pack_u32([1, 1]),
        join=b"",
        chunks=protocol.pack_u32([1, 0, 2, 1]),
        chunk_ids=protocol.pack_i32([10000, 10001]),
        feedback=1,
        after_idle=False,
        tap="/tap",
    )
    assert protocol.decode(protocol.encode(execute)) == execute


def test_sends_token_ids_only_where_a_penalty_counts_them():
    scheduler = make_scheduler()
    decoding(scheduler, "a")
    decoding(scheduler, "b", presence_penalty=1.0)
    scheduler.forget()
    first, second = scheduler.next_plan().open
    assert (first.prompt_ids, first.output_ids) == (b"", b"")
    assert second.prompt_ids == protocol.pack_i32(range(9800, 9804))
    assert second.output_ids == protocol.pack_i32([TOKEN, TOKEN])


@pytest.mark.parametrize("num_rows", [1, 64, 511, 512])
def test_a_steady_decode_costs_four_bytes_a_row(num_rows):
    scheduler, _ = decode_plans(num_rows)
    plan = step(scheduler)
    assert len(plan.decodes) == num_rows
    assert len(message(plan)) <= 200 + 4 * num_rows


@pytest.mark.parametrize("num_rows", [64, 512])
def test_leaving_and_joining_cost_the_same_at_any_roster(num_rows):
    scheduler, sequences = decode_plans(num_rows)
    scheduler.finish(sequences[num_rows // 2])
    left = step(scheduler)
    assert len(left.leave) == 1
    assert len(message(left)) <= 200 + 4 * len(left.decodes) + 4

    add(scheduler, "b", num_tokens=1)
    opened = step(scheduler)
    assert len(opened.open) == 1
    assert len(message(opened)) <= 300 + 4 * len(opened.decodes)
    joined = step(scheduler)
    assert len(joined.decodes) == num_rows
    assert len(message(joined)) <= 200 + 4 * num_rows + 4


def test_a_plan_packs_alike_whatever_becomes_of_its_sequences():
    scheduler = make_scheduler()
    a, _ = decoding(scheduler, "a", "b")
    plan = scheduler.next_plan()
    before = message(plan)
    scheduler.finish(a)
    come_back(scheduler)
    scheduler.next_plan()
    assert message(plan) == before
