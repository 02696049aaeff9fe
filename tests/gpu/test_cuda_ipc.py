"""cuda_ipc on a card: data, flags and memory, between two processes; under MPS where there is."""

import threading
import time
import traceback

import pytest
import torch

from benchmarks.stage_processes import mps, run_pair
from ember_pp.coordinator.edge_choice import EdgeChoice
from ember_pp.errors import DeadlineExceededError, HandoffError, ProtocolError
from ember_pp.protocol import Probe
from ember_pp.stage.edges import Edges
from ember_pp.stage.handoff import Edge, RingShape, cuda_ipc, make_receiver, make_sender
from ember_pp.stage.timing import StageClock

pytestmark = [pytest.mark.gpu, pytest.mark.multiproc]

WIDTH, MAX_TOKENS, NUM_SLOTS = 1024, 300, 8
SHAPE = RingShape(
    num_slots=NUM_SLOTS, max_tokens=MAX_TOKENS, hidden_size=WIDTH, dtype=torch.bfloat16
)
FEEDBACK = RingShape(num_slots=16, max_tokens=64, hidden_size=2, dtype=torch.int32)
NUM_MESSAGES, NUM_EPOCHS = 100_000, 100


def open_ends(role, other, device, shape=SHAPE):
    """A sender to the other process, and a receiver of what it sends."""
    sender = make_sender("cuda_ipc", Edge(role, 1 - role), shape, device)
    receiver = make_receiver("cuda_ipc", Edge(1 - role, role), shape, device)
    theirs = other.swap((sender.handle, receiver.handle))
    receiver.connect(theirs[0])
    sender.connect(theirs[1])
    other.swap()
    return sender, receiver


# ------------------------------------------------------------------------------------
# data


def sizes_of(count):
    return torch.randint(1, MAX_TOKENS + 1, (count,), generator=torch.Generator().manual_seed(3))


def many_messages(role, other, device):
    sender, receiver = open_ends(role, other, device)
    pattern = torch.arange(MAX_TOKENS * WIDTH, device=device).to(torch.int16).view(-1, WIDTH)
    num_wrong = torch.zeros((), dtype=torch.int64, device=device)
    message = torch.empty(MAX_TOKENS, WIDTH, dtype=torch.int16, device=device)
    for plan, num_tokens in enumerate(sizes_of(NUM_MESSAGES).tolist()):
        if role == 0:
            torch.add(pattern[:num_tokens], plan % 30_000, out=message[:num_tokens])
            sender.send(plan, message[:num_tokens].view(torch.bfloat16))
        else:
            received = message[:num_tokens].view(torch.bfloat16)
            receiver.receive_into(plan, received)
            expected = pattern[:num_tokens] + plan % 30_000
            num_wrong += (message[:num_tokens] != expected).sum()
    if role == 0:
        sender.drain(timeout_s=60.0)
    else:
        receiver.settle(timeout_s=60.0)
    other.swap()
    return int(num_wrong)


def test_100_000_messages_of_random_sizes_arrive_exact_and_in_order(found):
    assert found(many_messages) == [0, 0]


def large_messages(role, other, device):
    """By the copy engine, full slots among small ones."""
    width = 4096
    shape = RingShape(num_slots=2, max_tokens=5000, hidden_size=width, dtype=torch.bfloat16)
    sender, receiver = open_ends(role, other, device, shape)
    num_wrong = 0
    for plan, num_tokens in enumerate((5000, 1, 4096, 4095, 5000, 17)):
        expected = torch.full((num_tokens, width), float(plan + 1), dtype=torch.bfloat16)
        if role == 0:
            sender.send(plan, expected.to(device))
        else:
            num_wrong += int((receiver.receive(plan, num_tokens).cpu() != expected).sum())
    assert 4096 * width * 2 == cuda_ipc.COPY_ENGINE_BYTES
    other.swap()
    return num_wrong


def test_large_messages_arrive_exact(found):
    assert found(large_messages) == [0, 0]


def pairs(role, other, device):
    sender, receiver = open_ends(role, other, device, FEEDBACK)
    target = torch.full((40,), -5, device=device)
    for plan in range(50):
        slots = [(7 * i + plan) % 40 for i in range(plan % 5)]
        message = [[slot, 1000 * plan + slot] for slot in slots]
        if role == 0:
            tensor = torch.tensor(message, dtype=torch.int32, device=device).view(-1, 2)
            sender.send(plan, tensor)
        else:
            expected = target.clone()
            for slot, token in message:
                expected[slot] = token
            receiver.receive_pairs(plan, len(slots), target)
            assert torch.equal(target, expected)
    other.swap()
    return True


def test_pairs_are_scattered(found):
    assert found(pairs) == [True, True]


# ------------------------------------------------------------------------------------
# flags


def another_plan(role, other, device):
    sender, receiver = open_ends(role, other, device)
    message = torch.zeros(3, WIDTH, dtype=torch.bfloat16, device=device)
    if role == 0:
        sender.send(5, message)
        other.swap()
        return ""
    receiver.receive_into(5, message[:2])
    with pytest.raises(ProtocolError) as error:
        receiver.settle(timeout_s=10.0)
    other.swap()
    return str(error.value)


def test_another_length_is_a_protocol_error_that_names_edge_plan_and_slot(found):
    _, text = found(another_plan)
    assert text == ("edge 0->1: slot 5 holds plan 5 with 3 tokens; expected plan 5 with 2")


def closing(role, other, device):
    """A wait for what never comes, in a process with many streams; ended by another thread."""
    for _ in range(40):
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.zeros(4, device=device).add_(1)
    sender, receiver = open_ends(role, other, device)
    message = torch.zeros(3, WIDTH, dtype=torch.bfloat16, device=device)
    for plan in range(4):
        receiver.receive_into(plan, message)
    with pytest.raises(DeadlineExceededError, match=r"was not done within 0\.2 s"):
        receiver.settle(timeout_s=0.2)
    began_s = time.monotonic()
    thread = threading.Thread(target=receiver.close)
    thread.start()
    thread.join(5.0)
    torch.cuda.current_stream().synchronize()
    took_s = time.monotonic() - began_s
    with pytest.raises(HandoffError, match="closed"):
        receiver.receive_into(4, message)
    other.swap()
    for end in (sender, receiver):
        end.disconnect()
    other.swap()
    for end in (sender, receiver):
        end.free()
    return took_s


def test_close_ends_a_wait_of_the_device_from_any_thread(found):
    assert max(found(closing)) < 1.0


def beside_a_wait(role, other, device):
    """Times of a product of matrices in one process, alone and while the other waits."""
    sender, receiver = open_ends(role, other, device)
    message = torch.zeros(1, WIDTH, dtype=torch.bfloat16, device=device)
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for plan in range(-1, 4):
        other.swap()
        if role == 0 and plan % 2:
            receiver.receive_into(plan // 2, message)
        time.sleep(0.02)
        other.swap()
        if role == 1:
            times.append(median_ms(a, b))
            if plan % 2:
                sender.send(plan // 2, message)
        elif plan % 2:
            receiver.settle(timeout_s=20.0)
    return times[1:]  # the first warms up


def median_ms(a, b):
    events = [torch.cuda.Event(enable_timing=True) for _ in range(31)]
    for event in events[:-1]:
        event.record()
        torch.mm(a, b)
    events[-1].record()
    torch.cuda.current_stream().synchronize()
    times = sorted(events[i].elapsed_time(events[i + 1]) for i in range(30))
    return times[15]


def test_a_wait_holds_no_multiprocessor(found):
    _, (alone, waiting, alone_again, waiting_again) = found(beside_a_wait)
    assert min(waiting, waiting_again) < 1.01 * max(alone, alone_again)


# ------------------------------------------------------------------------------------
# epochs


def make_edges(role, device, setting="auto"):
    return Edges(
        role,
        2,
        setting=setting,
        ring_shape=SHAPE,
        feedback_shape=FEEDBACK,
        device=device,
        clock=StageClock(),
    )


def probe_edges(role, other, edges):
    """Both processes make the same choice."""
    choice, probes = EdgeChoice(2), []
    mine, theirs = edges.paths, other.swap(edges.paths)
    for index, paths in enumerate((mine, theirs) if role == 0 else (theirs, mine)):
        probes += choice.add(index, paths)
    while probes:
        probe = probes.pop(0)
        report = edges.probe(Probe(0, probe.edge, probe.path, 9))
        theirs = other.swap(report)
        by_stage = sorted((report, theirs), key=lambda r: r.stage_index)
        for found in by_stage:
            probes += choice.report(found)
    return choice


def many_epochs(role, other, device):
    free_bytes, before = [], None
    message = torch.ones(3, WIDTH, dtype=torch.bfloat16, device=device)
    for _ in range(NUM_EPOCHS):
        edges = make_edges(role, device)
        handle = other.swap(edges.handle)
        edges.open(handle, handle)
        if before is not None:
            before.free()  # its neighbour's new handle is there: it has let go of the old one
        choice = probe_edges(role, other, edges)
        assert set(choice.chosen.values()) == {"cuda_ipc"}, choice.reasons
        if role == 0:
            edges.sender.send(0, message)
        else:
            edges.receiver.receive_into(0, message)
            edges.receiver.receive_into(1, message)  # never comes
        edges.close()
        edges.disconnect()
        before = edges
        free_bytes.append(torch.cuda.mem_get_info(device)[0])
        other.swap()
    return free_bytes


def test_100_epochs_leak_no_memory(found):
    for free_bytes in found(many_epochs):
        assert free_bytes[99] >= free_bytes[10] - 2**23, free_bytes[::10]


class WrongByte(cuda_ipc.CudaIpcSender):
    """As a path that gets one byte wrong."""

    def send(self, plan, hidden_states, **options):
        if plan == -5:
            hidden_states = hidden_states.clone()
            hidden_states.view(torch.uint8).view(-1)[77] ^= 1
        super().send(plan, hidden_states, **options)


class Zeros(cuda_ipc.CudaIpcSender):
    """As peer access that lies: it copies zeros."""

    def send(self, plan, hidden_states, **options):
        super().send(plan, torch.zeros_like(hidden_states), **options)


def with_a_wrong_byte(role, other, device):
    return with_a_liar(role, other, device, WrongByte)


def with_zeros(role, other, device):
    return with_a_liar(role, other, device, Zeros)


def with_a_liar(role, other, device, kind):
    from ember_pp.stage import handoff

    with pytest.MonkeyPatch.context() as patch:
        if role == 0:
            patch.setattr(handoff, "_SENDERS", handoff._SENDERS | {"cuda_ipc": kind})
        edges = make_edges(role, device)
    handle = other.swap(edges.handle)
    edges.open(handle, handle)
    choice = probe_edges(role, other, edges)
    message = torch.full((3, WIDTH), 4.0, dtype=torch.bfloat16, device=device)
    received = torch.zeros_like(message)
    if role == 0:
        edges.sender.send(0, message)
    else:
        edges.receiver.receive_into(0, received)
        torch.cuda.synchronize()
        assert torch.equal(received, message)
    other.swap()
    return choice.chosen, choice.reasons["0->1"]


@pytest.mark.parametrize(
    ("lie", "text"),
    [
        (with_a_wrong_byte, "slot 3: byte 77 of 2048 is "),
        (with_zeros, "slot 0: byte 0 of 614400 is 0"),
    ],
)
def test_a_path_that_lies_is_found_and_the_next_one_taken(found, lie, text):
    for chosen, reason in found(lie):
        assert chosen == {"0->1": "host_shm", "1->0": "cuda_ipc"}
        assert reason.startswith("cuda_ipc: failed its probe: edge 0->1: ")
        assert text in reason


def with_expandable_segments(role, other, device):
    """torch's memory is of them from here on; what is sent lies in one."""
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    sender, receiver = open_ends(role, other, device)
    message = torch.full((200, 200 * WIDTH), 3.0, dtype=torch.bfloat16, device=device)
    message = message.view(-1, WIDTH)[-2:]
    if role == 0:
        sender.send(0, message)
        sender.drain(timeout_s=10.0)
        return True
    return bool((receiver.receive(0, 2) == 3.0).all())


def test_expandable_segments_of_torch_do_not_matter(found):
    assert found(with_expandable_segments) == [True, True]


# ------------------------------------------------------------------------------------
# all of it in two processes: to start them takes longer than the rest

TRIALS = (
    pairs,
    large_messages,
    another_plan,
    many_messages,
    with_a_wrong_byte,
    with_zeros,
    many_epochs,
    beside_a_wait,
    closing,
    with_expandable_segments,
)


def in_turn(role, other, device):
    """What each of ``TRIALS`` returned, or the text of what it raised."""
    results = {}
    for trial in TRIALS:
        try:
            results[trial.__name__] = trial(role, other, device)
        except Exception:  # noqa: BLE001  it is that trial's test that fails
            results[trial.__name__] = traceback.format_exc()
    return results


@pytest.fixture(scope="module")
def found():
    """``found(trial)``: what it returned in both processes."""
    with mps():
        both = run_pair(in_turn)

    def of(trial):
        results = [results[trial.__name__] for results in both]
        assert not [r for r in results if isinstance(r, str) and r.startswith("Traceback")], results
        return results

    return of
