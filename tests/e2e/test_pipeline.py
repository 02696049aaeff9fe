"""The whole engine: coordinator and stage processes on the demo model, through the client."""

import os
import time

import pytest

from ember_pp.errors import (
    CheckpointError,
    ConfigError,
    InvalidRequestError,
)
from tests.e2e.engines import GREEDY, PROMPTS, engine, has_ended, run_all, stage_pids

pytestmark = pytest.mark.multiproc


@pytest.fixture(scope="module")
def client():
    """Two stages, for the tests that do not care how many."""
    with engine() as client:
        yield client


@pytest.fixture(scope="module")
def alone():
    """Greedy tokens of each prompt, one request at a time through a single stage."""
    with engine(pipeline={"stages": 1, "run_ahead": 0}) as client:
        return [client.generate(prompt, sampling=GREEDY).token_ids for prompt in PROMPTS]


def test_replicas_share_the_work_and_change_no_token(alone):
    with engine(pipeline={"replicas": 2, "stages": 2}) as client:
        assert run_all(client, [(prompt, GREEDY) for prompt in PROMPTS]) == alone
        stages = client.status()["stages"]
    assert [(stage["replica"], stage["stage_index"]) for stage in stages] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    assert all(stage["plan"] > 0 for stage in stages)


@pytest.mark.parametrize(
    ("num_stages", "run_ahead"), [(1, 1), (2, 1), (3, 1), (8, 1), (1, 0), (3, 0), (1, 2), (3, 2)]
)
def test_tokens_depend_neither_on_stages_nor_on_company_nor_on_run_ahead(
    num_stages, run_ahead, alone
):
    with engine(pipeline={"stages": num_stages, "run_ahead": run_ahead}) as client:
        assert run_all(client, [(prompt, GREEDY) for prompt in PROMPTS]) == alone
        edges = [f"{i}->{(i + 1) % num_stages}" for i in range(num_stages)]
        assert client.status()["edges"] == dict.fromkeys(
            edges if num_stages > 1 else [], "host_shm"
        )


def test_preemption_does_not_change_tokens(alone):
    # 12 blocks of 8 tokens: the four sequences need about 28 in the end.
    block_bytes = 8 * 10 * 2 * 2 * 64 * 4
    memory_gib = 12.5 * block_bytes / 2 / 1024**3
    with engine(cache={"memory_gib": memory_gib, "block_size": 8}) as client:
        tokens = run_all(client, [(prompt, GREEDY) for prompt in PROMPTS])
        assert client.status()["num_preemptions"] > 0
    assert tokens == alone


def test_tiny_plans_and_no_prefix_cache_do_not_change_tokens(alone):
    settings = {"scheduler": {"max_tokens_per_plan": 7}, "cache": {"prefix": False}}
    with engine(**settings) as client:
        assert run_all(client, [(prompt, GREEDY) for prompt in PROMPTS]) == alone


def test_seeds_hold_over_company_stages_and_preemption():
    sampled = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "max_tokens": 24, "ignore_eos": True}
    requests = [(prompt, sampled | {"seed": i}) for i, prompt in enumerate(PROMPTS * 2)]
    with engine(pipeline={"stages": 1, "run_ahead": 0}) as client:
        alone = [client.generate(prompt, sampling=params).token_ids for prompt, params in requests]
    assert len({tuple(tokens) for tokens in alone}) > len(PROMPTS)  # the seeds matter
    block_bytes = 8 * 10 * 2 * 2 * 64 * 4
    tight = {"memory_gib": 16.5 * block_bytes / 3 / 1024**3, "block_size": 8}
    with engine(pipeline={"stages": 3}, cache=tight) as client:
        assert run_all(client, requests) == alone
        assert client.status()["num_preemptions"] > 0


def test_a_seed_key_stands_for_a_seed(client):
    def tokens(**options):
        sampling = {"temperature": 1.0, "max_tokens": 16, "ignore_eos": True}
        return client.generate(PROMPTS[0], sampling=sampling, **options).token_ids

    assert tokens(seed_key="a") == tokens(seed_key="a")
    assert tokens(seed_key="a") != tokens(seed_key="b")


def test_prefix_cache_is_used_and_changes_nothing(client):
    prompt = "The history of the city begins with a small village. " * 6
    first = client.generate(prompt, sampling=GREEDY)
    second = client.generate(prompt, sampling=GREEDY)
    assert second.num_cached_tokens >= 16 > first.num_cached_tokens
    assert second.token_ids == first.token_ids


def test_streams_add_up_and_stop_strings_are_never_shown(client):
    whole = client.generate(PROMPTS[1], sampling=GREEDY)
    words = whole.text.split()
    stop = f"{words[4]} {words[5][:2]}"
    cut = whole.text.index(stop)
    parts = [d.text for d in client.stream(PROMPTS[1], sampling=GREEDY | {"stop": [stop]})]
    assert "".join(parts) == whole.text[:cut]
    stopped = client.generate(PROMPTS[1], sampling=GREEDY | {"stop": [stop]})
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    assert stopped.text == whole.text[:cut]


@pytest.mark.parametrize("run_ahead", [0, 1, 2])
def test_stops_that_only_the_host_can_see_change_no_other_answer(run_ahead, alone):
    """Rows planned past a stop are thrown away while others take over slots and blocks."""
    with engine(
        pipeline={"run_ahead": run_ahead},
        scheduler={"max_sequences": 3},
        cache={"memory_gib": 0.002, "block_size": 8},
    ) as client:
        whole = [client.generate(prompt, sampling=GREEDY) for prompt in PROMPTS]
        assert [completion.token_ids for completion in whole] == alone
        stops = [completion.text[len(completion.text) // 3 :][:4] for completion in whole]
        requests = [
            (prompt, GREEDY | ({"stop": [stop]} if is_stopped else {}))
            for prompt, stop in zip(PROMPTS, stops, strict=True)
            for is_stopped in (True, False, True)
        ]
        submitted = [client.submit(prompt, sampling=sampling) for prompt, sampling in requests]
        for index, request in enumerate(submitted):
            completion, expected = request.result(120.0), whole[index // 3]
            stop = requests[index][1].get("stop", [None])[0]
            if stop is None:
                assert completion.token_ids == expected.token_ids
            else:
                assert completion.stop_reason == stop
                assert completion.text == expected.text[: expected.text.index(stop)]
                num_tokens = completion.num_output_tokens
                assert completion.token_ids == expected.token_ids[:num_tokens]
        deadline_s = time.monotonic() + 10.0
        while client.status()["num_free_blocks"] < client.status()["num_blocks"]:
            assert time.monotonic() < deadline_s, "blocks are still held"
            time.sleep(0.02)


def test_max_tokens_and_eos_end_an_answer(client):
    completion = client.generate(PROMPTS[0], sampling=GREEDY | {"max_tokens": 5})
    assert (completion.finish_reason, completion.num_output_tokens) == ("length", 5)
    chat = client.chat(
        [{"role": "user", "content": "Hello!"}], sampling={"temperature": 0.0, "max_tokens": 200}
    )
    assert chat.finish_reason == "stop"
    assert "<|im_end|>" not in chat.text


def test_logprobs_come_with_each_token(client):
    completion = client.generate(PROMPTS[0], sampling=GREEDY | {"logprobs": 3, "max_tokens": 6})
    assert len(completion.logprobs) == 6
    assert all(entry.logprob <= 0.0 for entry in completion.logprobs)
    assert all(len(entry.top_ids) == 12 for entry in completion.logprobs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "prompt: empty"),
        ({"prompt": "x", "token_ids": [1]}, "expected one of prompt, messages and token_ids"),
        ({"token_ids": [10**6]}, r"token_ids: expected ids in \[0,"),
        ({"prompt": "word " * 5000}, "max_model_len|context|cache"),
        ({"prompt": "x", "sampling": {"top_q": 1}}, "did you mean 'top_p'"),
        ({"prompt": "x", "sampling": {"logit_bias": {10**6: 1.0}}}, "logit_bias"),
        ({"messages": [{"role": "user"}]}, "content"),
    ],
)
def test_bad_requests_get_a_reply_and_others_go_on(client, options, message):
    request = client.submit(PROMPTS[0], sampling=GREEDY)
    with pytest.raises(InvalidRequestError, match=message):
        client.submit(**options).result(60.0)
    assert request.result(60.0).num_output_tokens == 24


def test_cancel_ends_a_request_and_frees_its_blocks(client):
    request = client.submit(PROMPTS[0], sampling=GREEDY | {"max_tokens": 1500}, stream=True)
    next(iter(request))
    request.cancel()
    assert request.result(30.0).finish_reason == "abort"
    deadline_s = time.monotonic() + 10.0
    while time.monotonic() < deadline_s:
        status = client.status()
        if status["num_running"] == 0 and status["num_free_blocks"] == status["num_blocks"]:
            return
        time.sleep(0.05)
    pytest.fail(f"blocks are still held: {status}")


def test_closing_leaves_no_process_and_no_shared_memory():
    before = set(os.listdir("/dev/shm"))
    with engine() as client:
        client.submit(PROMPTS[0], sampling=GREEDY | {"max_tokens": 1500})
        pids = stage_pids(client)
        client.generate(PROMPTS[1], sampling=GREEDY)
        pids += stage_pids(client)
    assert all(has_ended(pid) for pid in pids)
    assert set(os.listdir("/dev/shm")) <= before


def test_errors_at_start_reach_the_job(tmp_path):
    with (
        pytest.raises(CheckpointError, match="nowhere"),
        engine(model={"path": str(tmp_path / "nowhere")}) as client,
    ):
        client.generate("x")
    with pytest.raises(ConfigError, match="stages"), engine(pipeline={"stages": 99}) as client:
        client.generate("x")
