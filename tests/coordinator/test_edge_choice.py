"""EdgeChoice: which paths are probed, in what order, and what is said when none works."""

import itertools

import pytest

from ember_pp.coordinator.edge_choice import EdgeChoice
from ember_pp.errors import HandoffError
from ember_pp.protocol import ProbeReport

BOTH = {"cuda_ipc": "", "host_shm": ""}


def started(choice, paths_in, paths_out=None):
    """All stages have the same paths for the edge that comes in, and for the one that goes out."""
    num_stages, probes = choice._num_stages, []
    for index in range(num_stages):
        assert probes == []
        edge_in = f"{(index - 1) % num_stages}->{index}"
        edge_out = f"{index}->{(index + 1) % num_stages}"
        probes = choice.add(index, {edge_in: paths_in, edge_out: paths_out or paths_in})
    return probes


def report(choice, probe, *, text="", by=None):
    """Both ends report; ``by``: the end that has ``text`` to say. What is to be probed next."""
    following = []
    for index in (probe.sender_index, probe.receiver_index):
        failed = text if by in (None, index) else ""
        message = ProbeReport(0, index, probe.edge, probe.path, not failed, failed)
        following += choice.report(message)
    return following


def test_a_single_stage_has_nothing_to_choose():
    choice = EdgeChoice(1)
    assert choice.add(0, {}) == []
    assert choice.is_done
    assert choice.reasons == {}


@pytest.mark.parametrize("num_stages", [2, 3])
def test_the_best_path_of_every_edge_is_probed_in_the_order_of_stages(num_stages):
    choice = EdgeChoice(num_stages)
    probes = started(choice, BOTH)
    assert [probe.sender_index for probe in probes] == list(range(num_stages))
    assert all(a.receiver_index == b.sender_index for a, b in itertools.pairwise(probes))
    for probe in probes:
        assert probe.path == "cuda_ipc"
        assert not choice.is_done
        assert report(choice, probe) == []
    assert choice.is_done
    assert not choice.has_fallen_back
    assert choice.chosen == {probe.edge: "cuda_ipc" for probe in probes}


@pytest.mark.parametrize("by", [0, 1])
def test_what_either_end_cannot_use_is_not_probed(by):
    choice = EdgeChoice(2)
    refused = {"cuda_ipc": "no peer access", "host_shm": ""}
    paths = (refused, BOTH) if by else (BOTH, refused)
    probes = started(choice, *paths)
    assert [probe.path for probe in probes] == ["host_shm", "host_shm"]
    for probe in probes:
        report(choice, probe)
    assert choice.has_fallen_back
    assert choice.reasons["0->1"] == "cuda_ipc: no peer access; probe passed"


def test_a_stage_without_a_gpu_has_fewer_paths():
    choice = EdgeChoice(2)
    [probe, _] = started(choice, {"host_shm": ""}, BOTH)
    assert probe.path == "host_shm"
    report(choice, probe)
    assert choice.reasons["0->1"] == "cuda_ipc: stage 1 does not have it; probe passed"


@pytest.mark.parametrize("by", [0, 1, None])
def test_a_probe_that_fails_at_either_end_is_followed_by_the_next_path(by):
    choice = EdgeChoice(2)
    [probe, other] = started(choice, BOTH)
    [again] = report(choice, probe, text="byte 3", by=by)
    assert (again.edge, again.path) == ("0->1", "host_shm")
    assert report(choice, probe) == [], "what comes late says nothing"
    report(choice, other)
    report(choice, again)
    assert choice.chosen == {"0->1": "host_shm", "1->0": "cuda_ipc"}
    assert choice.reasons["0->1"] == "cuda_ipc: failed its probe: byte 3; probe passed"


def test_a_path_that_was_asked_for_is_the_only_one():
    choice = EdgeChoice(2)
    [probe, _] = started(choice, {"cuda_ipc": ""})
    message = r"edge 0->1 has no path that works: cuda_ipc: failed its probe: zeros"
    with pytest.raises(HandoffError, match=message):
        report(choice, probe, text="zeros", by=1)
    with pytest.raises(HandoffError, match="edge 0->1 has no path that works: cuda_ipc: hidden"):
        started(EdgeChoice(2), {"cuda_ipc": "hidden"})
