"""Times of a hop: what the moments come to, whose clock they are of, and when they do not count."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import deque

import pytest
import torch

from ember_pp.errors import HandoffError
from ember_pp.stage import handoff_rates
from ember_pp.stage.handoff_rates import ROW_BYTES, DeviceTimes, HostTimes, Lap, Lead, Peer, echo

CPU = torch.device("cpu")
JOIN_S = 20.0


def run_program(**changes):
    """The program as ``job=bench`` starts it: what it said."""
    wanted = {
        "path": "host_shm",
        "devices": ["cpu", "cpu"],
        "sizes": [ROW_BYTES, 7 * ROW_BYTES],
        "hops": 9,
        "laps": 2,
        "warmup": 1,
        "num_threads": 1,
        "parent_pid": os.getpid(),
    }
    done = subprocess.run(
        [sys.executable, "-m", "ember_pp.stage.handoff_rates"],
        input=json.dumps(wanted | changes),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.multiproc
def test_the_program_times_every_size_between_two_processes() -> None:
    said = run_program()
    assert [size["num_bytes"] for size in said["sizes"]] == [ROW_BYTES, 7 * ROW_BYTES]
    for size in said["sizes"]:
        assert size["num_hops"] == 2 * 9
        assert 0 < size["min_us"] <= size["p50_us"] <= size["p99_us"]
        low, high = size["p50_spread_us"]
        assert low <= size["p50_us"] <= high
        assert size["gb_per_s"] == pytest.approx(size["num_bytes"] / size["p50_us"] / 1e3, rel=1e-2)
        assert not size["is_host_bound"]
    assert said["clock"]["of"] == "cpu"
    assert said["uuids"] == [None, None]
    assert said["versions"]["torch"] == torch.__version__


@pytest.mark.multiproc
def test_a_path_that_cannot_be_had_says_why() -> None:
    said = run_program(path="pigeon")
    assert "sizes" not in said
    assert "hand-off path 'pigeon' is not known here" in said["reason"]


# --------------------------------------------------------------------------------------
# the loop, in two threads of this process


class Pipes:
    """Ends that pass tensors through queues, and lines through pipes."""

    def __init__(self) -> None:
        (from_lead, to_echo), (from_echo, to_lead) = os.pipe(), os.pipe()
        self._files = [os.fdopen(end) for end in (from_echo, from_lead)]
        self._files += [os.fdopen(end, "w") for end in (to_echo, to_lead)]
        self.lead = Peer(self._files[0], self._files[2], is_echo=False)
        self.echo = Peer(self._files[1], self._files[3], is_echo=True)

    def close(self) -> None:
        for file in self._files:
            file.close()


class FakeEnds:
    """One side; ``spoil`` changes what it sends."""

    def __init__(
        self, source: deque, sink: deque, spoil=lambda message: message, *, is_enqueued=False
    ) -> None:
        self.source, self.sink, self.spoil = source, sink, spoil
        self.is_enqueued = is_enqueued
        self.events = []

    def send(self, number, message) -> None:
        self.sink.append((number, self.spoil(message).clone()))

    def receive(self, number, num_rows):
        while not self.source:
            threading.Event().wait(0.0001)
        found, message = self.source.popleft()
        assert (found, len(message)) == (number, num_rows)
        self.events.append(("receive", number))
        return message

    def release(self, number) -> None:
        self.events.append(("release", number))


class CountedTimes(HostTimes):
    """Moments 1000 ns apart."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.noted = []

    def mark(self) -> None:
        self.now_ns += 1000
        self.noted.append(self.now_ns)

    def take(self):
        noted, self.noted = self.noted, []
        return noted


@pytest.fixture
def pair():
    """Makes a lead with an echo in a thread behind it: ``make(spoil, **how)``."""
    threads = []
    pipes = Pipes()
    leads = []

    def make(spoil=lambda message: message, *, is_enqueued=False):
        there, back = deque(), deque()
        ends = FakeEnds(there, back, spoil)
        thread = threading.Thread(target=echo, args=(ends, pipes.echo, CountedTimes()), daemon=True)
        thread.start()
        threads.append(thread)
        own = FakeEnds(back, there, is_enqueued=is_enqueued)
        lead = Lead(own, pipes.lead, CountedTimes(), CPU)
        leads.append(lead)
        return lead, ends

    yield make
    leads[0].finish()
    threads[0].join(JOIN_S)
    assert not threads[0].is_alive()
    pipes.close()


def test_a_hop_is_half_of_a_round_trip(pair) -> None:
    lead, ends = pair()
    lap = lead.lap(3, 70)
    assert lap == Lap(hops_ns=[500.0] * 70, is_host_bound=False)
    assert [event for event in ends.events if event[0] == "release"] == [
        ("release", number) for number in range(70)
    ], "every slot is given back, in order, over several batches"


def test_a_clock_is_described_by_what_it_counts_in_and_by_two_kernels_in_a_row(pair) -> None:
    lead, _ = pair()
    ticks = iter([32 * tick for tick in (1, 60, 121, 181, *range(250, 1000, 60))])
    lead._times.take = lambda: [next(ticks) for _ in range(4)]
    assert lead.clock_ns() == {"step_ns": 32.0, "between_ns": 32.0 * 60}


def test_a_gate_that_opens_too_early_is_tried_again_with_a_longer_one(pair, monkeypatch) -> None:
    answers = [True, True, False, False]
    cycles = []

    class Gate:
        def query(self):
            return answers.pop(0)

    def close(lead):
        cycles.append(lead._gate_cycles)
        return Gate()

    monkeypatch.setattr(Lead, "_close_gate", close)
    lead, _ = pair(is_enqueued=True)
    lap = lead.lap(1, 40)
    assert cycles == [handoff_rates._GATE_CYCLES * factor for factor in (1, 2, 4, 4)]
    assert (len(lap.hops_ns), lap.is_host_bound) == (40, False)


def test_hosts_that_are_never_in_time_are_named(pair, monkeypatch) -> None:
    class Gate:
        def query(self):
            return True

    monkeypatch.setattr(Lead, "_close_gate", lambda lead: Gate())
    lead, _ = pair(is_enqueued=True)
    lap = lead.lap(1, 3)
    assert (len(lap.hops_ns), lap.is_host_bound) == (3, True)


def test_what_comes_back_different_stops_the_path(pair) -> None:
    def spoil(message):
        changed = message.view(torch.int16).clone()
        changed[1, 5] ^= 1
        return changed.view(torch.bfloat16)

    lead, _ = pair(spoil)
    with pytest.raises(HandoffError, match=r"^1 of 2048 values of a message of 4096 bytes"):
        lead.check(2)


def test_what_comes_back_as_it_was_is_fine(pair) -> None:
    lead, _ = pair()
    lead.check(5)
    assert lead.lap(2, 3).hops_ns == [500.0] * 3, "numbers go on after the check"


# --------------------------------------------------------------------------------------
# numbers


def test_percentiles_are_over_all_laps_and_the_spread_is_that_of_their_medians() -> None:
    laps = [
        Lap(hops_ns=[float(us * 1000) for us in range(1, 101)], is_host_bound=False),
        Lap(hops_ns=[float(us * 1000) for us in range(101, 201)], is_host_bound=True),
    ]
    assert handoff_rates.summarize(4096, laps) == {
        "num_bytes": 4096,
        "num_hops": 200,
        "p50_us": 100.5,
        "p99_us": 198.0,
        "min_us": 1.0,
        "p50_spread_us": [50.5, 150.5],
        "gb_per_s": round(4096 / 100.5 / 1e3, 4),
        "is_host_bound": True,
    }


@pytest.mark.parametrize(
    ("num_bytes", "hops"), [(2**11, 200), (2**20, 200), (2**22, 50), (2**24, 25), (2**26, 25)]
)
def test_large_messages_are_sent_less_often(num_bytes, hops) -> None:
    assert handoff_rates.num_hops(num_bytes, 200) == hops


def test_a_handle_survives_a_line_of_json() -> None:
    handle = {"path": "cuda_ipc", "pid": 7, "memory": bytes(range(64))}
    line = json.dumps(handoff_rates._as_json(handle))
    assert handoff_rates._from_json(json.loads(line)) == handle


def test_a_process_that_is_gone_ends_the_wait_for_it() -> None:
    source, sink = os.pipe()
    os.close(sink)
    with os.fdopen(source) as pipe, pytest.raises(HandoffError, match="ended"):
        Peer(pipe, pipe, is_echo=False).hear()


@pytest.mark.gpu
def test_the_device_notes_when_the_stream_comes_there() -> None:
    device = torch.device("cuda", 0)
    times = DeviceTimes(device)
    times.mark()
    torch.cuda._sleep(4_000_000)
    times.mark()
    times.mark()
    before, after, at_once = times.take()
    assert 1_000_000 < after - before < 20_000_000, "2 ms at 2 GHz"
    assert 0 <= at_once - after < 100_000
    assert times.take() == []
