"""host_shm: exact bytes in order, blocking waits that can be ended, errors that name the edge."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from ember_pp.errors import DeadlineExceededError, HandoffError, ProtocolError
from ember_pp.stage.handoff import Edge, RingShape, host_shm, make_receiver, make_sender
from ember_pp.stage.handoff.probe import probe_receiver, probe_sender
from ember_pp.stage.timing import StageClock

CPU = torch.device("cpu")
EDGE = Edge(0, 1)
NUM_SLOTS, MAX_TOKENS, HIDDEN_SIZE = 3, 7, 40
JOIN_S = 20.0


def make_shape(**changes):
    fields = {
        "num_slots": NUM_SLOTS,
        "max_tokens": MAX_TOKENS,
        "hidden_size": HIDDEN_SIZE,
        "dtype": torch.bfloat16,
    }
    return RingShape(**(fields | changes))


def make_edge(device=CPU, *, clock=None, **changes):
    """Both ends; ``clock`` is that of one stage, as far as the test is concerned."""
    shape = make_shape(**changes)
    receiver = make_receiver("host_shm", EDGE, shape, device, clock)
    sender = make_sender("host_shm", EDGE, shape, device, clock)
    sender.connect(receiver.handle)
    receiver.connect(sender.handle)
    return receiver, sender


def running_clock():
    """Of a stage in the middle of a plan."""
    clock = StageClock()
    clock.begin_plan(after_idle=True)
    return clock


def make_hidden_states(plan, dtype=torch.bfloat16):
    num_tokens = 1 + plan % MAX_TOKENS
    generator = torch.Generator().manual_seed(plan)
    return torch.randn(num_tokens, HIDDEN_SIZE, generator=generator).to(dtype)


class Background(threading.Thread):
    """A thread whose result or exception ``finish`` hands over."""

    def __init__(self, function, *args, **kwargs):
        super().__init__(daemon=True)
        self._call = (function, args, kwargs)
        self.start()

    def run(self):
        function, args, kwargs = self._call
        try:
            self._result, self._error = function(*args, **kwargs), None
        except Exception as error:  # noqa: BLE001  raised again in ``finish``
            self._error = error

    def finish(self):
        self.join(JOIN_S)
        assert not self.is_alive(), "still running"
        if self._error is not None:
            raise self._error
        return self._result


def wait_until(condition):
    deadline = time.monotonic() + JOIN_S
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.001)


DEVICES = [CPU, pytest.param(torch.device("cuda", 0), marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_many_plans_arrive_exact_and_in_order(dtype, device):
    """More plans than slots, sender and receiver each at its own pace."""
    receiver, sender = make_edge(device, dtype=dtype)
    num_plans = 50 * NUM_SLOTS

    def send_all():
        for plan in range(num_plans):
            hidden_states = make_hidden_states(plan, dtype).to(device)
            sender.send(plan, hidden_states)
            hidden_states.zero_()  # allowed once send has returned

    sending = Background(send_all)
    for plan in range(num_plans):
        expected = make_hidden_states(plan, dtype)
        received = receiver.receive(plan, len(expected))
        assert (received.dtype, received.device) == (dtype, device)
        assert torch.equal(received.cpu(), expected), f"{plan=}"
        receiver.release(plan)
    sending.finish()
    sender.drain(timeout_s=0)


def test_sender_stops_when_all_slots_are_taken():
    clock = running_clock()
    receiver, sender = make_edge(clock=clock)
    for plan in range(NUM_SLOTS):
        sender.send(plan, make_hidden_states(plan))
    sending = Background(sender.send, NUM_SLOTS, make_hidden_states(NUM_SLOTS))
    wait_until(lambda: sender.wait is not None)
    text = str(sender.wait)
    assert text.startswith("plan 3: stage 1 to give back slot 0 of edge 0->1, for 0."), text
    receiver.receive(0, 1)
    assert sender.wait is not None, "received is not yet released"
    receiver.release(0)
    sending.finish()
    assert sender.wait is None
    times = clock.totals()
    assert times.wait_output_ns > 0
    assert times.wait_input_ns == 0


def test_receiver_waits_without_using_the_cpu():
    clock = running_clock()
    receiver, sender = make_edge(clock=clock)
    receiving = Background(receiver.receive, 0, 1)
    wait_until(lambda: receiver.wait is not None)
    assert str(receiver.wait).startswith("plan 0: stage 0 to write slot 0 of edge 0->1, for 0.")
    cpu_before, started = time.process_time(), time.monotonic()
    receiving.join(0.3)
    waited_s = time.monotonic() - started
    assert time.process_time() - cpu_before < 0.2 * waited_s
    sender.send(0, make_hidden_states(0))
    assert torch.equal(receiving.finish(), make_hidden_states(0))
    times = clock.totals()
    assert times.wait_input_ns >= 0.25e9
    assert times.wait_output_ns == 0


@pytest.mark.parametrize("side", ["receiver", "sender"])
def test_close_ends_a_wait(side):
    receiver, sender = make_edge()
    if side == "receiver":
        end, waiting = receiver, Background(receiver.receive, 0, 1)
    else:
        for plan in range(NUM_SLOTS):
            sender.send(plan, make_hidden_states(plan))
        end, waiting = sender, Background(sender.send, NUM_SLOTS, make_hidden_states(0))
    wait_until(lambda: end.wait is not None)
    end.close()
    with pytest.raises(HandoffError, match=r"edge 0->1: closed while waiting for plan"):
        waiting.finish()
    end.close()


def test_a_closed_edge_takes_no_more():
    receiver, sender = make_edge()
    sender.send(0, make_hidden_states(0))
    receiver.close()
    with pytest.raises(HandoffError, match="closed"):
        receiver.receive(0, 1)
    sender.close()
    with pytest.raises(HandoffError, match="closed"):
        sender.send(1, make_hidden_states(1))


def test_waits_have_deadlines():
    receiver, sender = make_edge()
    with pytest.raises(DeadlineExceededError, match=r"stage 0 did not write slot 0 for plan 0"):
        receiver.receive(0, 1, timeout_s=0.02)
    sender.send(0, make_hidden_states(0))
    with pytest.raises(DeadlineExceededError, match=r"stage 1 did not give back slot 0"):
        sender.drain(timeout_s=0.02)


@pytest.mark.parametrize(("plan", "num_tokens"), [(NUM_SLOTS, 1), (0, 2)])
def test_another_plan_or_length_is_a_protocol_error(plan, num_tokens):
    receiver, sender = make_edge()
    sender.send(0, make_hidden_states(0))
    message = rf"edge 0->1: slot 0 holds plan 0 with 1 tokens; expected plan {plan} with"
    with pytest.raises(ProtocolError, match=message):
        receiver.receive(plan, num_tokens)


@pytest.mark.parametrize(
    "hidden_states",
    [
        torch.zeros(MAX_TOKENS + 1, HIDDEN_SIZE, dtype=torch.bfloat16),
        torch.zeros(1, HIDDEN_SIZE - 1, dtype=torch.bfloat16),
        torch.zeros(1, HIDDEN_SIZE),
    ],
    ids=["tokens", "hidden", "dtype"],
)
def test_sender_refuses_what_does_not_fit(hidden_states):
    _, sender = make_edge()
    with pytest.raises(ProtocolError, match=r"edge 0->1, plan 4: hidden states \["):
        sender.send(4, hidden_states)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 41}, "hidden_size is 40 at one end, 41 at the other"),
        ({"dtype": "float16"}, "dtype is bfloat16 at one end, float16 at the other"),
        ({"num_slots": None}, "num_slots is 3 at one end, None"),
        ({"host": "elsewhere"}, "needs both stages on one host"),
        ({"fd": 9999}, "shared memory 9999 of process .*: No such file"),
        ({"pid": 2**22 + 1}, "process 4194305: No such file"),
        ({"nonce": "00" * 16}, "not the ring of this handle"),
    ],
)
def test_a_wrong_handle_is_refused_by_name(change, message):
    receiver = make_receiver("host_shm", EDGE, make_shape(), CPU)
    sender = make_sender("host_shm", EDGE, make_shape(), CPU)
    with pytest.raises(HandoffError, match=f"edge 0->1: .*{message}"):
        sender.connect(receiver.handle | change)


def test_a_shorter_file_is_refused(tmp_path):
    receiver = make_receiver("host_shm", EDGE, make_shape(), CPU)
    with (tmp_path / "short").open("w+b") as short:
        handle = receiver.handle | {"fd": short.fileno()}
        with pytest.raises(HandoffError, match="edge 0->1"):
            make_sender("host_shm", EDGE, make_shape(), CPU).connect(handle)


def test_an_unknown_path_is_refused():
    message = "edge 0->1: hand-off path 'pigeon' is not known here; known: cuda_ipc, host_shm"
    for make in (make_receiver, make_sender):
        with pytest.raises(HandoffError, match=message):
            make("pigeon", EDGE, make_shape(), CPU)


def test_too_little_memory_says_what_to_lower(monkeypatch):
    monkeypatch.setattr(host_shm, "available_bytes", lambda: 4096)
    with pytest.raises(HandoffError, match=r"4096 are free; lower scheduler\.max_tokens_per_plan"):
        make_receiver("host_shm", EDGE, make_shape(), CPU)


# ---------------------------------------------------------------- probe


def run_probe(receiver, sender, *, device=CPU, timeout_s=JOIN_S):
    receiving = Background(probe_receiver, receiver, 17, timeout_s=timeout_s)
    return probe_sender(sender, 17, device, timeout_s=timeout_s), receiving.finish()


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_probe_passes_and_leaves_the_edge_fresh(device):
    receiver, sender = make_edge(device)
    for result in run_probe(receiver, sender, device=device):
        assert result.is_ok, result.text
    sender.send(0, make_hidden_states(0).to(device))
    assert torch.equal(receiver.receive(0, 1).cpu(), make_hidden_states(0))


@pytest.mark.gpu
def test_a_cuda_stage_copies_from_pinned_memory():
    receiver, sender = make_edge(torch.device("cuda", 0))
    receiver.prepare()
    sender.prepare()
    assert receiver._ring.slots[0].is_pinned()
    assert sender._other.ring.slots[0].is_pinned()


class BitFlip:
    """A sender that changes one bit of one message."""

    def __init__(self, sender, plan, byte):
        self._sender, self._plan, self._byte = sender, plan, byte

    def __getattr__(self, name):
        return getattr(self._sender, name)

    def send(self, plan, hidden_states, **options):
        if plan == self._plan:
            hidden_states = hidden_states.clone()
            hidden_states.view(torch.uint8).view(-1)[self._byte] ^= 0x10
        self._sender.send(plan, hidden_states, **options)


@pytest.mark.parametrize(
    ("plan", "byte", "slot"),
    [(-6, 0, 0), (-5, MAX_TOKENS * HIDDEN_SIZE * 2 - 1, 1), (-1, 5, 2)],
)
def test_probe_finds_one_wrong_bit(plan, byte, slot):
    receiver, sender = make_edge()
    sent, received = run_probe(receiver, BitFlip(sender, plan, byte))
    assert sent.is_ok
    assert not received.is_ok
    assert f"edge 0->1: slot {slot}: byte {byte} of" in received.text, received.text
    assert "1 bytes differ" in received.text


def test_probe_finds_a_flag_that_does_not_come_back(monkeypatch):
    receiver, sender = make_edge()
    monkeypatch.setattr(receiver, "release", lambda plan: None)
    sent, received = run_probe(receiver, sender, timeout_s=0.2)
    assert not sent.is_ok
    assert "stage 1 did not give back slot 0" in sent.text
    assert not received.is_ok


# ---------------------------------------------------------------- two processes

CHILD = """
import json, sys, torch
from ember_pp.stage.handoff import Edge, RingShape, make_sender
handle = json.loads(sys.argv[1])
shape = RingShape(num_slots=3, max_tokens=7, hidden_size=40, dtype=torch.bfloat16)
sender = make_sender("host_shm", Edge(0, 1), shape, torch.device("cpu"))
sender.connect(handle)
for plan in range(30):
    sender.send(plan, torch.full((1 + plan % 7, 40), float(plan), dtype=torch.bfloat16))
sender.send(30, torch.zeros(1, 40, dtype=torch.bfloat16))
sender.drain()
"""


def shared_memory_names():
    return sorted(path.name for path in Path("/dev/shm").iterdir())


@pytest.mark.multiproc
def test_between_processes_and_after_a_kill():
    """Another process sends; killed in the middle of a wait, it leaves nothing behind."""
    names_before = shared_memory_names()
    receiver = make_receiver("host_shm", EDGE, make_shape(), CPU)
    command = [sys.executable, "-c", CHILD, json.dumps(receiver.handle)]
    with subprocess.Popen(command) as child:
        for plan in range(30):
            received = receiver.receive(plan, 1 + plan % 7, timeout_s=JOIN_S)
            assert torch.equal(received, torch.full_like(received, plan))
            receiver.release(plan)
        receiver.receive(30, 1, timeout_s=JOIN_S)  # never released: the child waits in drain
        assert shared_memory_names() == names_before
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait(JOIN_S) == -signal.SIGKILL
    assert shared_memory_names() == names_before


def test_memory_goes_with_the_receiver():
    receiver = make_receiver("host_shm", EDGE, make_shape(), CPU)
    link = f"/proc/self/fd/{receiver.handle['fd']}"
    assert "ember-pp ring 0->1 (deleted)" in os.readlink(link)
    del receiver
    assert not os.path.lexists(link)
