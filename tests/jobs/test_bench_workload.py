"""What the workloads send, and what is read off the times at which tokens came."""

from __future__ import annotations

import pytest
from bench_requests import workload_of

from ember_pp.config import BenchJob
from ember_pp.errors import ConfigError
from ember_pp.jobs.bench_workload import Stream, find_steady_decode, make_workload

VOCABULARY = 151_936


def make(vocab_size=VOCABULARY, max_model_len=40_960, **fields):
    return make_workload(BenchJob(**fields), vocab_size, max_model_len)


def test_the_mixed_workload_is_the_published_one():
    workload = make(workload="mixed")
    assert workload.batch == 256
    assert workload.output_tokens == 133_966  # as the benchmark of nano-vllm reports it
    assert workload.input_tokens == 142_827
    lengths = [len(request.token_ids) for request in workload.requests]
    lengths += [request.output_tokens for request in workload.requests]
    assert min(lengths) >= 100
    assert max(lengths) <= 1024
    assert make(workload="mixed", seed=1).output_tokens != workload.output_tokens


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"workload": "single"}, (1, 128, 128)),
        ({"workload": "fixed"}, (64, 512, 256)),
        ({"workload": "fixed", "batch": 3, "input_tokens": 5, "output_tokens": 7}, (3, 5, 7)),
        ({"workload": "prefill"}, (8, 2048, 1)),
    ],
)
def test_equal_requests_have_the_lengths_that_were_asked_for(fields, expected):
    workload = make(**fields)
    batch, prompt, output = expected
    assert [len(request.token_ids) for request in workload.requests] == [prompt] * batch
    assert [request.output_tokens for request in workload.requests] == [output] * batch
    ids = {token for request in workload.requests for token in request.token_ids}
    assert min(ids) >= 0
    assert max(ids) < VOCABULARY
    assert make(**fields) == workload, "the same seed"


def test_ids_stay_in_a_small_vocabulary():
    workload = make(workload="mixed", vocab_size=300)
    assert max(token for request in workload.requests for token in request.token_ids) < 300


def test_no_turn_begins_a_prompt_as_another_did():
    workload = workload_of([(20, 2), (30, 2)])
    turns = [workload.turn(number, 50) for number in range(4)]
    firsts = [turn.requests[1].token_ids[0] for turn in turns]
    assert len(set(firsts)) == 4
    assert all(turn.requests[1].token_ids[1:] == list(range(2, 31)) for turn in turns)
    assert workload.turn(50, 50) == workload, "ids stay in the vocabulary"


@pytest.mark.parametrize(
    ("fields", "keys"),
    [({"workload": "mixed"}, r"job\.lengths"), ({"input_tokens": 300}, r"job\.input_tokens")],
)
def test_what_exceeds_the_context_is_refused_by_name(fields, keys):
    with pytest.raises(ConfigError, match=f"^{keys}.*do not fit the context of 400"):
        make(max_model_len=400, **fields)


# --------------------------------------------------------------------------------------
# times


def stream(*arrivals, input_tokens=10):
    return Stream(input_tokens=input_tokens, arrivals=list(arrivals), first_token=0)


def test_times_of_one_answer():
    answer = stream((2.0, 1), (3.0, 2), (6.0, 1))
    assert answer.output_tokens == 4
    assert answer.ttft_s == 2.0
    assert answer.tpot_s == pytest.approx(4.0 / 3)
    assert stream((1.0, 1)).tpot_s is None


def test_the_steady_part_is_where_all_decode():
    first = stream(*((float(second), 1) for second in range(1, 8)))  # tokens at 1 .. 7 s
    second = stream(*((float(second), 1) for second in range(4, 11)), input_tokens=100)
    steady = find_steady_decode([first, second])
    assert (steady.start_s, steady.end_s) == (4.0, 7.0)
    assert steady.steps == 3
    assert steady.step_s == pytest.approx(1.0)
    # Prompts of 110 tokens; 4 + 1 answered at its start, 7 + 4 at its end
    assert steady.context_tokens == pytest.approx(110 + (5 + 11) / 2)


def test_no_steady_part_where_one_ends_before_another_begins():
    early = stream((1.0, 1), (2.0, 1))
    late = stream((3.0, 1), (4.0, 1))
    assert find_steady_decode([early, late]) is None
    assert find_steady_decode([stream((1.0, 1), (2.0, 1))]) is None, "one step is none"
