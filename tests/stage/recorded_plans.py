"""Recorded plans: what the real scheduler makes of a mix of requests, answered by one stage."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from ember_pp import protocol
from ember_pp.coordinator.scheduler import Scheduler, plan_to_execute
from ember_pp.coordinator.sequence import Sequence
from ember_pp.sampling_params import SamplingParams

BLOCK_SIZE, MAX_SLOTS, MAX_MODEL_LEN, MAX_TOKENS_PER_PLAN, MAX_IN_FLIGHT = 16, 8, 256, 32, 3
NUM_MICROBATCHES, RUN_AHEAD = 2, 1
STOP_AFTER = 5  # of two requests, as if by a stop string: known to the host alone
NUM_BLOCKS = 13  # fewer than the requests below need at once: some are preempted

_PREFIX = [7 * i % 900 + 3 for i in range(35)]  # two full blocks and a bit
_PARAMS = (
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 40, "presence_penalty": 0.7, "repetition_penalty": 1.2},
    {"temperature": 0.0, "logprobs": 3, "frequency_penalty": 0.5},
)


def requests() -> list[Sequence]:
    """Ugly prompt lengths, half of them with a common beginning, four kinds of sampling."""
    sequences = []
    for index, length in enumerate((1, 15, 16, 17, 37, 3, 71, 2, 33, 64)):
        own = [(31 * index + 13 * i) % 1000 + 1 for i in range(length)]
        params = SamplingParams(max_tokens=25 + 3 * index % 17, **_PARAMS[index % len(_PARAMS)])
        prompt = _PREFIX + own if index % 2 else own
        sequences.append(Sequence(f"request-{index}", prompt, params, seed=index))
    return sequences


def stops(sequence: Sequence) -> bool:
    """True for a request that ends before its ``max_tokens``, while planned ahead."""
    return int(sequence.request_id.rpartition("-")[2]) % 5 == 2


def record(
    run: Callable[[protocol.Execute], protocol.Sampled],
    *,
    tap: str | None = None,
    epoch: int = 0,
) -> tuple[list[protocol.Execute], list[protocol.Sampled], list[Sequence]]:
    """Serve ``requests`` through ``run``, several plans in flight; plans, answers, sequences."""
    scheduler = Scheduler(
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        max_in_flight=MAX_IN_FLIGHT,
        num_microbatches=NUM_MICROBATCHES,
        run_ahead=RUN_AHEAD,
        max_sequences=MAX_SLOTS,
        max_tokens_per_plan=MAX_TOKENS_PER_PLAN,
        max_model_len=MAX_MODEL_LEN,
    )
    sequences = requests()
    for sequence in sequences:
        scheduler.add(sequence)
    plans: list[protocol.Execute] = []
    answers: list[protocol.Sampled] = []
    in_flight: deque[protocol.Execute] = deque()
    while scheduler.has_work:
        while (plan := scheduler.next_plan()) is not None:
            in_flight.append(plan_to_execute(plan, epoch, tap))
        execute = in_flight.popleft()
        sampled = run(execute)
        plans.append(execute)
        answers.append(sampled)
        token_ids = protocol.unpack_i32(sampled.token_ids).tolist()
        for sequence, _ in scheduler.complete(execute.plan, token_ids):
            has_stopped = stops(sequence) and sequence.num_output_tokens >= STOP_AFTER
            if has_stopped or sequence.num_tokens >= sequence.max_total_tokens:
                scheduler.finish(sequence)
    return plans, answers, sequences
