"""1, 2, 3 and 8 stages: the same plans give the same bits at every layer, edge and token.

One list of plans is recorded with a single stage (chunked prefill of ugly lengths, decodes,
several micro-batches in flight, shared prefixes, preemption, four kinds of sampling) and
replayed through stages that run in threads with real ``host_shm`` edges between them.
"""

import dataclasses
import threading
import time

import pytest
import torch
from recorded_plans import (
    BLOCK_SIZE,
    MAX_IN_FLIGHT,
    MAX_MODEL_LEN,
    MAX_SLOTS,
    MAX_TOKENS_PER_PLAN,
    NUM_BLOCKS,
    NUM_MICROBATCHES,
    STOP_AFTER,
    record,
    stops,
)
from replayed_graphs import ReplayedGraphs
from safetensors.torch import load_file

from ember_pp import partition
from ember_pp.checkpoint import Checkpoint, read_config
from ember_pp.kernels import make_ops
from ember_pp.model_config import ModelConfig
from ember_pp.protocol import unpack_u32
from ember_pp.stage.captured import CapturedSteps, StepLimits
from ember_pp.stage.captured_runner import CapturedRunner
from ember_pp.stage.handoff import Edge, RingShape, make_receiver, make_sender
from ember_pp.stage.input_batch import SlotTable
from ember_pp.stage.kv_cache import KVCache
from ember_pp.stage.last_tokens import LastTokens
from ember_pp.stage.model import StageModel
from ember_pp.stage.runner import StageRunner
from ember_pp.stage.sampler import Sampler
from ember_pp.stage.slots import Slots
from ember_pp.stage.weights import load_stage

JOIN_S = 120.0


@pytest.fixture(autouse=True)
def one_thread():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def use_own_stream(device):
    """As a stage's process does: the default stream cannot be captured."""
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))


def make_stages(folder, num_stages, dtype, device, kind):
    """Runners of all stages with their edges, and the edges' ends to close.

    ``kind`` is ``eager``, ``captured`` for steps of padded sizes (on a CPU as if they were graphs),
    or ``graphs`` for those as CUDA graphs.
    """
    cfg = ModelConfig.from_hf(read_config(folder))
    shape = RingShape(
        num_slots=MAX_IN_FLIGHT,
        max_tokens=MAX_TOKENS_PER_PLAN,
        hidden_size=cfg.hidden_size,
        dtype=dtype,
    )
    edges = [Edge(i, i + 1) for i in range(num_stages - 1)]
    receivers = [make_receiver("host_shm", edge, shape, device) for edge in edges]
    senders = [make_sender("host_shm", edge, shape, device) for edge in edges]
    tokens_in, tokens_out = None, None
    if num_stages > 1:
        shape = RingShape(
            num_slots=2 * MAX_IN_FLIGHT, max_tokens=MAX_SLOTS, hidden_size=2, dtype=torch.int32
        )
        tokens_in = make_receiver("host_shm", Edge(num_stages - 1, 0), shape, device)
        tokens_out = make_sender("host_shm", tokens_in.edge, shape, device)
        for receiver, sender in zip([*receivers, tokens_in], [*senders, tokens_out], strict=True):
            sender.connect(receiver.handle)
    ranges = partition.split_layers(cfg, num_stages, "equal")
    stages = [
        make_stage(
            *(folder, cfg, dtype, device, kind, stage_index, layers),
            num_stages=num_stages,
        )
        for stage_index, layers in enumerate(ranges)
    ]
    ends_of_stages = zip(stages, [tokens_in, *receivers], [*senders, tokens_out], strict=True)
    for stage, receiver, sender in ends_of_stages:
        stage.connect(receiver, sender)
    ends = [*receivers, *senders, tokens_in, tokens_out]
    return stages, [end for end in ends if end is not None]


def make_stage(folder, cfg, dtype, device, kind, stage_index, layers, *, num_stages):
    last_tokens = None
    ends = {"is_first": stage_index == 0, "is_last": stage_index == num_stages - 1}
    if ends["is_first"]:
        last_tokens = LastTokens(MAX_SLOTS, device, max_in_flight=MAX_IN_FLIGHT)
    checkpoint = Checkpoint.open(folder)
    weights = load_stage(checkpoint, cfg, *layers, **ends, dtype=dtype, device=device)
    max_blocks = -(-MAX_MODEL_LEN // BLOCK_SIZE)
    ops = make_ops("auto", device)
    model = StageModel(cfg, weights, *layers, **ends, ops=ops)
    cache = KVCache.allocate(cfg, layers[1] - layers[0], NUM_BLOCKS, BLOCK_SIZE, dtype, device)
    sizes = MAX_SLOTS, max_blocks, BLOCK_SIZE
    sampler = Sampler(cfg.vocab_size, MAX_SLOTS, (), device, ops) if ends["is_last"] else None
    around = {"sampler": sampler, "last_tokens": last_tokens}
    if kind == "eager":
        table = SlotTable(*sizes, num_blocks=NUM_BLOCKS, device=device)
        return StageRunner(stage_index, model, cache, table, **around)
    steps = CapturedSteps(
        model,
        cache,
        ops,
        StepLimits(
            max_slots=MAX_SLOTS,
            max_tokens=MAX_TOKENS_PER_PLAN,
            max_blocks_per_sequence=max_blocks,
            max_pending=MAX_IN_FLIGHT + 1,
        ),
        sampler=sampler,
        last_tokens=None if last_tokens is None else last_tokens.tokens,
        uses_graphs=kind == "graphs",
    )
    if device.type == "cpu":
        steps._graphs = ReplayedGraphs()
    return CapturedRunner(stage_index, steps, Slots(*sizes, num_blocks=NUM_BLOCKS), **around)


def replay(folder, num_stages, dtype, device, kind, plans, *, is_last_late=False):
    """Run all plans through ``num_stages`` stages at once, a thread each; what was drawn.

    With ``is_last_late`` the last stage starts a plan only when the first cannot go on.
    """
    stages, ends = make_stages(folder, num_stages, dtype, device, kind)
    answers, errors = [], []

    def work(runner):
        use_own_stream(device)
        runner.warm_up()
        is_late = is_last_late and runner is stages[-1]
        try:
            for execute in plans:
                while is_late and threads[0].is_alive() and not any(end.wait for end in of_first):
                    time.sleep(0.0001)
                sampled = runner.run(execute)
                if sampled is not None:
                    answers.append(sampled)
        except Exception as error:  # noqa: BLE001  shown by the assertion below
            errors.append(error)
            for end in ends:  # let the other stages go
                end.close()

    of_first = [end for end in ends if end.edge in (Edge(0, 1), Edge(num_stages - 1, 0))]
    threads = [threading.Thread(target=work, args=(stage,), daemon=True) for stage in stages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(JOIN_S)
    assert errors == []
    assert not any(thread.is_alive() for thread in threads)
    return answers


@pytest.fixture(
    scope="module",
    params=[
        ("float32", "cpu", "eager"),
        ("bfloat16", "cpu", "eager"),
        ("float32", "cpu", "captured"),
        ("bfloat16", "cpu", "captured"),
        pytest.param(("float32", "cuda:0", "eager"), marks=pytest.mark.gpu),
        pytest.param(("bfloat16", "cuda:0", "captured"), marks=pytest.mark.gpu),
        pytest.param(("bfloat16", "cuda:0", "graphs"), marks=pytest.mark.gpu),
    ],
    ids="-".join,
)
def recorded(request, tmp_path_factory, demo_path):
    """Plans and answers of one stage, and the folder with all that it computed."""
    dtype, device = getattr(torch, request.param[0]), torch.device(request.param[1])
    kind = request.param[2]
    tap = tmp_path_factory.mktemp("one-stage")
    torch.set_num_threads(1)
    [runner], _ = make_stages(demo_path, 1, dtype, device, kind)
    plans, answers, sequences = record(runner.run, tap=str(tap))
    return (dtype, device, kind), plans, answers, sequences, tap


def load_taps(folder, plan, num_stages):
    """Every tensor that the stages wrote for a plan; those of edges as ``edge i->i+1``."""
    tensors = {}
    for stage_index in range(num_stages):
        kept = load_file(folder / f"plan-{plan}.stage-{stage_index}.safetensors")
        received = kept.pop("input", None)
        if stage_index:
            tensors[f"edge {stage_index - 1}->{stage_index}"] = received
        tensors |= kept
    return tensors


def starts_behind_a_cached_prefix(execute):
    chunks = unpack_u32(execute.chunks).tolist()
    opened = {slot.slot for slot in execute.open}
    return any(
        slot in opened and start for slot, start in zip(chunks[0::4], chunks[1::4], strict=True)
    )


def test_the_recording_has_everything(recorded):
    """The plans would prove little if they were all of one kind."""
    _, plans, answers, sequences, _ = recorded
    num_opens = sum(len(execute.open) for execute in plans)
    assert num_opens > len(sequences), "nothing was preempted"
    assert any(starts_behind_a_cached_prefix(execute) for execute in plans)
    assert len({execute.microbatch for execute in plans}) == NUM_MICROBATCHES
    assert any(execute.feedback >= 0 and execute.chunks for execute in plans)
    assert any(execute.feedback >= 0 and not execute.chunks for execute in plans)
    # Planned ahead: the plan before that of the same micro-batch was still in flight.
    assert any(execute.feedback > execute.plan - MAX_IN_FLIGHT for execute in plans)
    assert any(len(execute.leave) and len(execute.join) for execute in plans)
    for sequence in sequences:
        num_tokens = STOP_AFTER if stops(sequence) else sequence.params.max_tokens
        assert sequence.num_output_tokens == num_tokens
    num_drawn = sum(len(unpack_u32(sampled.token_ids)) for sampled in answers)
    assert num_drawn > sum(s.num_output_tokens for s in sequences), "no token was thrown away"


@pytest.mark.parametrize("num_stages", [2, 3, 8])
def test_the_split_is_invisible(recorded, num_stages, tmp_path, demo_path):
    where, plans, answers, _, one_stage = recorded
    tapped = [dataclasses.replace(execute, tap=str(tmp_path)) for execute in plans]

    assert replay(demo_path, num_stages, *where, tapped) == answers

    cfg = ModelConfig.from_hf(read_config(demo_path))
    ranges = partition.split_layers(cfg, num_stages, "equal")
    for execute in plans:
        expected = load_taps(one_stage, execute.plan, 1)
        for stage_index, (start_layer, _) in enumerate(ranges[1:]):
            expected[f"edge {stage_index}->{stage_index + 1}"] = expected[
                f"layer.{start_layer - 1}"
            ]
        found = load_taps(tmp_path, execute.plan, num_stages)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name]), f"{name} of plan {execute.plan} differs"


def test_feedback_that_is_as_late_as_can_be_changes_nothing(recorded, demo_path):
    """Stage 0 has run as far ahead as it can each time that the last stage draws."""
    where, plans, answers, _, _ = recorded
    plans = [dataclasses.replace(execute, tap=None) for execute in plans]
    assert replay(demo_path, 3, *where, plans, is_last_late=True) == answers


def test_one_stage_that_writes_no_taps_draws_the_same(recorded, demo_path):
    """Taps see each layer, so nothing is captured where there are any; here everything is."""
    where, plans, answers, _, _ = recorded
    plans = [dataclasses.replace(execute, tap=None) for execute in plans]
    assert replay(demo_path, 1, *where, plans) == answers


def test_padding_changes_no_token(recorded, demo_path):
    """Steps of padded sizes against steps as they are. Rounding differs with the size of a
    product, so this holds for float32, where it decides no token."""
    (dtype, device, kind), plans, answers, _, _ = recorded
    if dtype != torch.float32 or kind != "eager" or device.type != "cpu":
        pytest.skip("asked once")
    plans = [dataclasses.replace(execute, tap=None) for execute in plans]
    expected = [sampled.token_ids for sampled in answers]
    for num_stages in (1, 2):
        padded = replay(demo_path, num_stages, dtype, device, "captured", plans)
        assert [sampled.token_ids for sampled in padded] == expected, num_stages
