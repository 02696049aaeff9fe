"""Stages that die or fall silent in the middle of work: a pause, and not one token differs."""

import os
import signal
import time
from pathlib import Path

import pytest

from ember_pp.errors import StageDiedError
from tests.e2e.engines import (
    GREEDY,
    PROMPTS,
    engine,
    has_ended,
    parent_of,
    rings_of,
    run_all,
    stage_pids,
    wait_until_ended,
)

pytestmark = pytest.mark.multiproc

PATIENCE_S = 120.0
DRAWN = {"temperature": 0.9, "top_k": 50, "max_tokens": 60, "ignore_eos": True}
PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2}
PREFIX = "The history of the city begins with a small village by the river. " * 4
REQUESTS = [
    *((prompt, GREEDY | {"max_tokens": 80}) for prompt in PROMPTS),
    *((prompt, DRAWN | {"seed": seed}) for seed, prompt in enumerate(PROMPTS)),
    *((prompt, DRAWN | PENALTIES | {"seed": 7, "min_tokens": 50}) for prompt in PROMPTS[:2]),
    *((PREFIX + prompt, GREEDY) for prompt in PROMPTS),
]


@pytest.fixture(scope="module")
def undisturbed():
    """Tokens of ``REQUESTS``, through one stage that nothing happens to."""
    with engine(pipeline={"stages": 1}) as client:
        return run_all(client, REQUESTS)


@pytest.fixture(scope="module")
def client():
    with engine(pipeline={"stages": 3}, supervisor={"max_restarts": 100}) as client:
        yield client


def wait_for_status(client, condition):
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition(status := client.status()):
        assert time.monotonic() < deadline_s, status
        time.sleep(0.01)
    return status


def streams(client):
    """``REQUESTS`` as streams, once the first tokens of each are there."""
    submitted = [client.submit(prompt, sampling=s, stream=True) for prompt, s in REQUESTS]
    begun = [list(next(iter(request)).token_ids) for request in submitted[:4]]
    return submitted, begun


def rest_of(request, begun):
    tokens = list(begun)
    for delta in request:
        tokens += delta.token_ids
    return tokens


@pytest.mark.parametrize(
    ("victim", "number"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (2, signal.SIGKILL),
                           (0, signal.SIGSTOP), (2, signal.SIGSTOP)],
)  # fmt: skip
def test_streams_go_on_where_they_were(client, undisturbed, victim, number):
    before = client.status()
    submitted, begun = streams(client)
    pids = stage_pids(client)
    at_s = time.monotonic()
    os.kill(pids[victim], number)
    wait_for_status(client, lambda status: status["num_restarts"] > before["num_restarts"])
    noticed_s = time.monotonic() - at_s
    begun += [[] for _ in submitted[len(begun) :]]
    tokens = [rest_of(*pair) for pair in zip(submitted, begun, strict=True)]
    assert tokens == [list(ids) for ids in undisturbed]
    results = [request.result(PATIENCE_S) for request in submitted]
    assert [result.token_ids for result in results] == undisturbed
    after = client.status()
    assert (after["phase"], after["problems"]) == ("ready", [])
    changed = [index for index in range(3) if stage_pids(client)[index] != pids[index]]
    assert changed == [victim]
    # Under a second, as benchmarks.chaos measures; a busy test machine is given more, but not the
    # time after which a plan would be overdue.
    assert noticed_s < 4.5
    assert has_ended(pids[victim])


def test_requests_after_a_failure_that_share_a_prefix_are_right(client, undisturbed):
    """Nobody has the blocks any more that the prefix cache knew."""
    with_prefix = REQUESTS[-len(PROMPTS) :]
    run_all(client, with_prefix)
    before = client.status()
    assert before["num_cached_blocks"] > 0
    os.kill(stage_pids(client)[1], signal.SIGKILL)
    wait_for_status(client, lambda status: status["num_restarts"] > before["num_restarts"])
    assert client.status()["num_cached_blocks"] == 0
    assert run_all(client, with_prefix) == undisturbed[-len(PROMPTS) :]


def test_status_names_what_is_awaited_while_a_stage_is_replaced(client):
    before = client.status()
    assert (before["phase"], before["problems"]) == ("ready", [])
    os.kill(stage_pids(client)[2], signal.SIGKILL)
    status = wait_for_status(client, lambda status: status["phase"] == "renewing")
    [problem] = status["problems"]
    assert "stages [2] are starting" in problem
    assert "killed by signal 9" in problem
    assert wait_for_status(client, lambda status: status["phase"] == "ready")["problems"] == []


def test_rings_of_epochs_that_ended_are_given_back(client):
    wait_for_status(client, lambda status: status["phase"] == "ready")
    # One of these processes is new, the others have lived through epochs.
    numbers = {len(rings_of(pid)) for pid in stage_pids(client)}
    assert len(numbers) == 1, numbers
    assert 0 not in numbers


def test_a_stage_that_dies_again_and_again_ends_the_run_with_its_signal():
    with engine(supervisor={"max_restarts": 1}) as client:
        client.generate(PROMPTS[0], sampling=GREEDY)
        pending = [
            client.submit(prompt, sampling=GREEDY | {"max_tokens": 1500}) for prompt in PROMPTS
        ]
        first = stage_pids(client)
        os.kill(first[1], signal.SIGKILL)
        wait_for_status(client, lambda status: status["num_restarts"] == 1)
        wait_for_status(client, lambda status: status["phase"] == "ready")
        second = stage_pids(client)
        killed_at_s = time.monotonic()
        os.kill(second[1], signal.SIGKILL)
        for request in pending:
            with pytest.raises(StageDiedError, match=r"signal 9(?s:.*)max_restarts=1") as failure:
                request.result(PATIENCE_S)
            assert failure.value.stage_index == 1
        assert time.monotonic() - killed_at_s < 2.0
        wait_until_ended([*first, *second], timeout_s=10.0)


def test_a_killed_coordinator_takes_its_stages_and_their_memory_along():
    with engine(pipeline={"stages": 3}) as client:
        client.generate(PROMPTS[0], sampling=GREEDY)
        client.submit(PROMPTS[1], sampling=GREEDY | {"max_tokens": 1500})
        pids = stage_pids(client)
        assert all(rings_of(pid) for pid in pids)
        os.kill(parent_of(pids[0]), signal.SIGKILL)
        wait_until_ended(pids, timeout_s=1.0)
    processes = [path.name for path in Path("/proc").iterdir() if path.name.isdecimal()]
    assert not set(pids) & {pid for pid in map(int, processes) if rings_of(pid)}


def test_a_replica_that_fails_does_not_disturb_the_other(undisturbed):
    with engine(pipeline={"stages": 2, "replicas": 2}) as client:
        client.generate(PROMPTS[0], sampling=GREEDY)
        pids = stage_pids(client)
        os.kill(pids[0], signal.SIGKILL)
        wait_for_status(client, lambda status: status["phase"] == "renewing")
        short = GREEDY | {"max_tokens": 5}
        tokens = client.generate(PROMPTS[0], sampling=short).token_ids  # of the one that is ready
        assert client.status()["phase"] == "renewing"
        assert tokens == undisturbed[0][:5]
        assert run_all(client, REQUESTS) == undisturbed
        wait_for_status(client, lambda status: status["phase"] == "ready")
        assert stage_pids(client)[2:] == pids[2:]
        assert run_all(client, REQUESTS) == undisturbed
