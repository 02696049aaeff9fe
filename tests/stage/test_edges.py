"""Edges: which ends a stage has, and what they carry."""

import threading

import pytest
import torch

from ember_pp.errors import HandoffError, ProtocolError
from ember_pp.protocol import Probe
from ember_pp.stage.edges import Edges
from ember_pp.stage.handoff import RingShape
from ember_pp.stage.timing import StageClock

HIDDEN = RingShape(num_slots=3, max_tokens=7, hidden_size=40, dtype=torch.bfloat16)
FEEDBACK = RingShape(num_slots=6, max_tokens=4, hidden_size=1, dtype=torch.int32)
JOIN_S = 20.0


def make_circle(num_stages):
    """The edges of all stages, open."""
    circle = [
        Edges(
            index,
            num_stages,
            path="auto",
            ring_shape=HIDDEN,
            feedback_shape=FEEDBACK,
            device=torch.device("cpu"),
            clock=StageClock(),
        )
        for index in range(num_stages)
    ]
    for index, edges in enumerate(circle):
        edges.open_next(circle[(index + 1) % num_stages].handle)
    return circle


def test_a_single_stage_has_none():
    [edges] = make_circle(1)
    assert (edges.receiver, edges.sender, edges.handle, edges.waiting_for) == (None, None, {}, "")
    edges.close()


@pytest.mark.parametrize("num_stages", [2, 3])
def test_every_stage_receives_from_the_one_before_it_and_the_first_feedback(num_stages):
    for index, edges in enumerate(make_circle(num_stages)):
        assert str(edges.receiver.edge) == f"{(index - 1) % num_stages}->{index}"
        assert str(edges.sender.edge) == f"{index}->{(index + 1) % num_stages}"
        assert edges.receiver.shape == (FEEDBACK if index == 0 else HIDDEN)
        assert edges.sender.shape == (FEEDBACK if index == num_stages - 1 else HIDDEN)


def test_both_ends_of_an_edge_report_their_part_of_its_probe():
    circle = make_circle(3)
    probe = Probe(5, "1->2", 99)
    reports = []
    sending = threading.Thread(target=lambda: reports.append(circle[1].probe(probe)), daemon=True)
    sending.start()
    reports.append(circle[2].probe(probe))
    sending.join(JOIN_S)
    assert sorted(report.stage_index for report in reports) == [1, 2]
    for report in reports:
        assert (report.epoch, report.edge, report.path) == (5, "1->2", "host_shm")
        assert report.is_ok, report.text
    with pytest.raises(ProtocolError, match="stage 0 is no end of edge 1->2"):
        circle[0].probe(probe)


def test_close_ends_the_waits_of_both_ends():
    [first, _] = make_circle(2)
    first.close()
    with pytest.raises(HandoffError, match="edge 1->0: closed"):
        first.receiver.receive(0, 1)
    with pytest.raises(HandoffError, match="edge 0->1: closed"):
        first.sender.send(0, torch.zeros(1, 40, dtype=torch.bfloat16))
