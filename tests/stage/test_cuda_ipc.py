"""cuda_ipc as far as it needs no GPU: the numbers in flags, and why memory cannot be reached."""

import pytest
import torch

from ember_pp.errors import HandoffError
from ember_pp.stage.handoff import Edge, RingShape, make_receiver, make_sender, paths_for
from ember_pp.stage.handoff.cuda_ipc import (
    ARENA_ALIGNMENT,
    flag_of,
    never_reached,
    receiver_bytes,
    why_unreachable,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
HERE = {"host": "boot-1", "pid_namespace": "pid:[1]", "pid": 100, "gpu": "GPU-a"}
THERE = HERE | {"pid": 101, "gpu": "GPU-b"}


def is_passed(flag, awaited):
    """As the device compares: int32(flag - awaited) >= 0."""
    return (flag - awaited) % 2**32 < 2**31


@pytest.mark.parametrize("num_slots", [1, 3, 10])
@pytest.mark.parametrize("first", [-2, 0, 2**31, 2**32], ids=["probe", "start", "half", "wrap"])
def test_a_flag_passes_the_waits_for_its_plan_and_those_before(num_slots, first):
    plans = range(first * num_slots if first < 0 else first - 1, first + 40)
    for flag_plan in plans:
        for plan in plans:
            flag = flag_of(flag_plan, num_slots)
            assert 0 <= flag < 2**32
            assert is_passed(flag, flag_of(plan, num_slots)) == (flag_plan >= plan)


@pytest.mark.parametrize("num_slots", [1, 3])
def test_memory_that_was_never_written_passes_no_wait(num_slots):
    for plan in range(-2 * num_slots, 50):
        assert not is_passed(0, flag_of(plan, num_slots))


@pytest.mark.parametrize("newest", [-6, 0, 10**6, 2**31 - 2, 2**32 + 5])
def test_a_closed_flag_passes_all_waits_that_may_come(newest):
    """Those that are enqueued, those of plans to come, and none is reached by a plan before."""
    flag = never_reached(flag_of(newest, 3))
    for plan in (newest - 5, newest, newest + 1, newest + 10**6):
        assert is_passed(flag, flag_of(plan, 3))


def test_neighbours_on_one_host_that_see_both_gpus_are_in_reach():
    assert why_unreachable(HERE, THERE, ["GPU-a", "GPU-b"]) == ""
    assert why_unreachable(HERE, HERE | {"pid": 101}, ["GPU-a"]) == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"host": "boot-2"}, ["needs both stages on one host"]),
        ({"pid_namespace": "pid:[2]"}, ["different PID namespaces", "--pid=host"]),
        ({"pid": 100}, ["both ends are in process 100"]),
        ({"gpu": "GPU-c"}, ["GPU-c", "GPU-a", "GPU-a, GPU-b", "CUDA_VISIBLE_DEVICES"]),
        ({"gpu": None}, ["hidden"]),
    ],
    ids=["host", "container", "process", "hidden", "nonsense"],
)
def test_what_is_out_of_reach_is_explained(change, words):
    reason = why_unreachable(HERE, THERE | change, ["GPU-a", "GPU-b"])
    for word in words:
        assert word in reason


def test_a_process_of_the_same_number_in_another_namespace_is_another_process():
    reason = why_unreachable(HERE, HERE | {"pid_namespace": "pid:[2]"}, ["GPU-a"])
    assert "different PID namespaces" in reason


@pytest.mark.parametrize(
    ("setting", "device", "paths"),
    [
        ("auto", GPU, ["cuda_ipc", "host_shm"]),
        ("auto", CPU, ["host_shm"]),
        ("cuda_ipc", GPU, ["cuda_ipc"]),
        ("cuda_ipc", CPU, ["cuda_ipc"]),
        ("host_shm", GPU, ["host_shm"]),
    ],
)
def test_a_path_that_is_asked_for_is_the_only_one(setting, device, paths):
    assert paths_for(setting, device) == paths


def test_a_stage_without_a_gpu_says_so():
    shape = RingShape(num_slots=2, max_tokens=3, hidden_size=8, dtype=torch.bfloat16)
    for make in (make_receiver, make_sender):
        with pytest.raises(HandoffError, match="edge 0->1: cuda_ipc needs a GPU; this stage is on"):
            make("cuda_ipc", Edge(0, 1), shape, CPU)


def test_an_arena_holds_all_slots_and_shares_its_allocation_with_nothing():
    shape = RingShape(num_slots=5, max_tokens=8192, hidden_size=4096, dtype=torch.bfloat16)
    size = receiver_bytes(shape)
    assert size % ARENA_ALIGNMENT == 0
    assert 0 < size - 5 * shape.slot_bytes <= ARENA_ALIGNMENT
