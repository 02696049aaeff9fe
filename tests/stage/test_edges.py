"""Edges: which ends a stage has, what they carry, and what is used of what they offer."""

import threading

import pytest
import torch

from ember_pp.errors import HandoffError, ProtocolError
from ember_pp.protocol import Probe
from ember_pp.stage import edges as edges_module
from ember_pp.stage.edges import Edges
from ember_pp.stage.handoff import RingShape
from ember_pp.stage.handoff.host_shm import HostShmReceiver, HostShmSender
from ember_pp.stage.timing import StageClock

HIDDEN = RingShape(num_slots=3, max_tokens=7, hidden_size=40, dtype=torch.bfloat16)
FEEDBACK = RingShape(num_slots=6, max_tokens=4, hidden_size=2, dtype=torch.int32)
JOIN_S = 20.0


def make_circle(num_stages, setting="auto"):
    """The edges of all stages, open."""
    circle = [
        Edges(
            index,
            num_stages,
            setting=setting,
            ring_shape=HIDDEN,
            feedback_shape=FEEDBACK,
            device=torch.device("cpu"),
            clock=StageClock(),
        )
        for index in range(num_stages)
    ]
    for index, edges in enumerate(circle):
        edges.open(circle[(index + 1) % num_stages].handle, circle[index - 1].handle)
    return circle


def probe(circle, sender_index, path="host_shm"):
    """Reports of the sender and of the receiver."""
    receiver_index = (sender_index + 1) % len(circle)
    message = Probe(5, f"{sender_index}->{receiver_index}", path, 99)
    reports = {}

    def run(index):
        reports[index] = circle[index].probe(message)

    sending = threading.Thread(target=run, args=(sender_index,), daemon=True)
    sending.start()
    run(receiver_index)
    sending.join(JOIN_S)
    return reports[sender_index], reports[receiver_index]


def test_a_single_stage_has_none():
    [edges] = make_circle(1)
    assert (edges.receiver, edges.sender, edges.handle, edges.paths) == (None, None, {}, {})
    assert edges.waiting_for == ""
    edges.check()
    edges.close()
    edges.disconnect()
    edges.free()


@pytest.mark.parametrize("num_stages", [2, 3])
def test_every_stage_receives_from_the_one_before_it_and_the_first_feedback(num_stages):
    circle = make_circle(num_stages)
    for index in range(num_stages):
        for report in probe(circle, index):
            assert report.is_ok, report.text
    for index, edges in enumerate(circle):
        assert str(edges.receiver.edge) == f"{(index - 1) % num_stages}->{index}"
        assert str(edges.sender.edge) == f"{index}->{(index + 1) % num_stages}"
        assert edges.receiver.shape == (FEEDBACK if index == 0 else HIDDEN)
        assert edges.sender.shape == (FEEDBACK if index == num_stages - 1 else HIDDEN)


def test_both_ends_of_an_edge_report_their_part_of_its_probe():
    circle = make_circle(3)
    for index, report in enumerate(probe(circle, 1), start=1):
        assert (report.epoch, report.edge, report.path) == (5, "1->2", "host_shm")
        assert (report.stage_index, report.is_ok) == (index, True)
    with pytest.raises(ProtocolError, match="stage 0 is no end of edge 1->2"):
        circle[0].probe(Probe(5, "1->2", "host_shm", 99))
    with pytest.raises(ProtocolError, match="edge 1->2: stage 1 cannot use cuda_ipc"):
        circle[1].probe(Probe(5, "1->2", "cuda_ipc", 99))


def test_a_path_that_cannot_be_had_is_a_reason():
    [first, _] = make_circle(2, "cuda_ipc")
    assert first.handle == {"receiver": {}, "sender": {}}
    reasons = [paths["cuda_ipc"] for paths in first.paths.values()]
    assert reasons == [f"edge {e}: cuda_ipc needs a GPU; this stage is on cpu" for e in first.paths]


def test_a_path_that_a_neighbour_lacks_or_refuses_is_a_reason():
    [first, second] = make_circle(2)
    first.open({"receiver": {}}, second.handle)
    assert first.paths["0->1"]["host_shm"] == "edge 0->1: stage 1 does not have it"
    assert first.paths["1->0"]["host_shm"] == ""
    handle = second.handle["receiver"]["host_shm"] | {"host": "elsewhere"}
    first.open({"receiver": {"host_shm": handle}}, second.handle)
    assert "needs both stages on one host" in first.paths["0->1"]["host_shm"]


class LyingReceiver(HostShmReceiver):
    """Gets zeros, as with a peer access that lies."""

    path = "liar"

    def receive(self, plan, num_tokens, **options):
        return torch.zeros_like(super().receive(plan, num_tokens, **options))


class LyingSender(HostShmSender):
    path = "liar"


def test_the_end_of_the_path_probed_last_is_used_and_a_failed_one_is_closed(monkeypatch):
    kinds = {"liar": (LyingReceiver, LyingSender), "host_shm": (HostShmReceiver, HostShmSender)}
    monkeypatch.setattr(edges_module, "paths_for", lambda setting, device: list(kinds))
    monkeypatch.setattr(edges_module, "make_receiver", lambda path, *rest: kinds[path][0](*rest))
    monkeypatch.setattr(edges_module, "make_sender", lambda path, *rest: kinds[path][1](*rest))
    circle = make_circle(2)
    assert circle[0].paths["0->1"] == {"liar": "", "host_shm": ""}
    sent, received = probe(circle, 0, "liar")
    assert sent.is_ok
    assert not received.is_ok
    assert "bytes differ" in received.text
    failed = circle[1].receiver
    with pytest.raises(HandoffError, match="closed"):
        failed.receive(0, 1)
    assert all(report.is_ok for report in probe(circle, 0))
    assert (circle[0].sender.path, circle[1].receiver.path) == ("host_shm", "host_shm")


def test_a_wait_of_the_device_is_described_by_its_edge():
    circle = make_circle(2)
    assert circle[1].describe(4, 0, is_for_input=True) == "", "not probed yet"
    probe(circle, 0)
    text = circle[1].describe(4, 0, is_for_input=True)
    assert text.startswith("plan 4: stage 0 to write slot 1 of edge 0->1, for ")
    text = circle[0].describe(5, 0, is_for_input=False)
    assert text.startswith("plan 5: stage 1 to give back slot 2 of edge 0->1, for ")


def test_close_ends_the_waits_of_both_ends():
    circle = make_circle(2)
    for index in range(2):
        probe(circle, index)
    first = circle[0]
    first.close()
    with pytest.raises(HandoffError, match="edge 1->0: closed"):
        first.receiver.receive(0, 1)
    with pytest.raises(HandoffError, match="edge 0->1: closed"):
        first.sender.send(0, torch.zeros(1, 40, dtype=torch.bfloat16))
