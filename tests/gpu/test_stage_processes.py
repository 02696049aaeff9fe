"""Stages on one card: equal bits for any number of them, and where their time goes."""

import dataclasses
from pathlib import Path

import pytest
import torch
from recorded_plans import (
    BLOCK_SIZE,
    MAX_IN_FLIGHT,
    MAX_MODEL_LEN,
    MAX_SLOTS,
    MAX_TOKENS_PER_PLAN,
    NUM_BLOCKS,
    record,
)
from safetensors.torch import load_file

from benchmarks.stage_processes import DecodePlans, Pipeline, mps, settle
from ember_pp.checkpoint import read_config
from ember_pp.model_config import ModelConfig

pytestmark = [pytest.mark.gpu, pytest.mark.multiproc]

LIMITS = {
    "max_slots": MAX_SLOTS,
    "max_model_len": MAX_MODEL_LEN,
    "max_in_flight": MAX_IN_FLIGHT,
}
DELAY_MS = 2.0
NUM_DECODES = 150


@pytest.fixture(scope="module", autouse=True)
def own_mps():
    with mps() as is_on:
        yield is_on


@pytest.fixture
def pipeline(demo_path):
    """``pipeline(num_stages)``: ready for plans."""
    running = []

    def start(num_stages, **options):
        running.append(
            Pipeline(
                {"path": str(demo_path), "dtype": "bfloat16"},
                ModelConfig.from_hf(read_config(demo_path)),
                ["cuda:0"] * num_stages,
                LIMITS,
                NUM_BLOCKS,
                cache={"block_size": BLOCK_SIZE, "memory_gib": 0.25},
                scheduler={"max_tokens_per_plan": MAX_TOKENS_PER_PLAN},
                **options,
            )
        )
        return running[-1]

    yield start
    for one in running:
        one.stop()


def test_any_number_of_stages_gives_equal_bits(pipeline, tmp_path):
    """Recorded plans: tokens, log-probabilities, and of every third plan, which is not a graph
    then, the hidden states of every layer."""
    single = pipeline(1)

    def run_single(execute):
        return single.run([with_tap(execute, tmp_path / "1")])[0]

    plans, answers, _ = record(run_single)
    single.stop()
    expected = tensors_of(tmp_path / "1")
    assert len(plans) > 50
    assert len(expected) > 100
    for num_stages in (2, 3, 7):
        folder = tmp_path / str(num_stages)
        several = pipeline(num_stages)
        assert set(several.edges.values()) == {"cuda_ipc"}, several.edge_reasons
        assert several.run([with_tap(execute, folder) for execute in plans]) == answers
        several.stop()
        found = tensors_of(folder)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), f"{num_stages} stages: {name}"


def with_tap(execute, folder):
    tap = str(folder) if execute.plan % 3 == 0 else None
    return dataclasses.replace(execute, tap=tap)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """By plan and name, of all stages; inputs and outputs of stages are layers' outputs."""
    return {
        f"{path.name.partition('.')[0]} {name}": tensor
        for path in sorted(folder.iterdir())
        for name, tensor in load_file(path).items()
        if name != "input"
    }


# ------------------------------------------------------------------------------------
# time


def delayed(worker):
    """Before the layers of each plan, one thread block is busy for ``DELAY_MS``."""
    from ember_pp.stage.captured import CapturedSteps

    hidden_states = CapturedSteps.hidden_states
    cycles = []

    def delay_first(self, *arguments):
        if not cycles:
            cycles.append(cycles_per_ms() * DELAY_MS)
        torch.cuda._sleep(int(cycles[0]))
        return hidden_states(self, *arguments)

    CapturedSteps.hidden_states = delay_first


def cycles_per_ms():
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda._sleep(1_000_000)
    events[0].record()
    torch.cuda._sleep(20_000_000)
    events[1].record()
    events[1].synchronize()
    return 20_000_000 / events[0].elapsed_time(events[1])


def test_a_delay_in_one_stage_is_waiting_in_the_others(pipeline):
    """Each plan needs the tokens of the one before: what stage 1 takes longer, the others wait.
    And a stage that waits says for what."""
    plans = DecodePlans(1).take(NUM_DECODES)
    found = []
    for hooks in ({}, {1: delayed}):
        stages = pipeline(3, hooks=hooks)
        assert set(stages.edges.values()) == {"cuda_ipc"}, stages.edge_reasons
        stages.run(plans[:20])  # graphs are there
        before = [stages.stats(index) for index in range(3)]
        stages.run(plans[20:])
        settle(lambda s=stages: all(s.stats(i).plan == NUM_DECODES - 1 for i in range(3)))
        after = [stages.stats(index) for index in range(3)]
        found.append(
            [
                {
                    name: (getattr(new, name) - getattr(old, name)) / 1e6 / (NUM_DECODES - 20)
                    for name in ("busy_ns", "wait_input_ns", "wait_output_ns", "host_gap_ns")
                }
                for old, new in zip(before, after, strict=True)
            ]
        )
        print(f"ms a plan, by stage: {found[-1]}")  # noqa: T201  a measurement
        if not hooks:
            says_for_what(stages, plans[-1].plan + 1)
        stages.stop()
    without, (first, second, third) = found
    delay_ms = second["busy_ns"] - without[1]["busy_ns"]
    assert delay_ms == pytest.approx(DELAY_MS, rel=0.15), "clocks of a card vary"
    # One process's waiting is the others' work, and what they hand on takes next to nothing.
    tolerance = {"abs": 0.05 * delay_ms}
    first_waits, third_waits = first["wait_input_ns"], third["wait_input_ns"]
    assert first_waits == pytest.approx(second["busy_ns"] + third["busy_ns"], **tolerance)
    assert third_waits == pytest.approx(first["busy_ns"] + second["busy_ns"], **tolerance)
    assert second["wait_input_ns"] < 0.5 * delay_ms


def says_for_what(stages, plan):
    """A plan that stage 0 does not get: stage 1 says whom it waits for, until it comes."""
    execute = DecodePlans(1).take(plan + 1)[plan]
    stages.send(1, execute)
    words = f"plan {plan}: stage 0 to write slot {plan % MAX_IN_FLIGHT} of edge 0->1, for "
    settle(lambda: stages.stats(1).waiting_for.startswith(words))
    stages.send(0, execute)
    settle(lambda: stages.stats(1).plan == plan)
    assert stages.stats(1).waiting_for == ""
