"""Graphs: the same numbers as without, from what the inputs hold at the time."""

from __future__ import annotations

import pytest
import torch

from ember_pp.stage.graphs import Graphs


def test_where_there_are_no_graphs_everything_is_computed_anew() -> None:
    graphs = Graphs(torch.device("cpu"), is_on=True)
    assert not graphs.is_on
    calls: list[int] = []

    def compute() -> torch.Tensor:
        calls.append(len(calls))
        return torch.tensor(len(calls))

    assert [int(graphs.run("one", compute)) for _ in range(3)] == [1, 2, 3]
    assert len(graphs) == 0


@pytest.fixture
def own_stream():
    with torch.cuda.stream(torch.cuda.Stream()):
        yield


@pytest.mark.gpu
@pytest.mark.usefixtures("own_stream")
def test_a_replay_reads_what_its_inputs_hold_then() -> None:
    device = torch.device("cuda:0")
    graphs = Graphs(device, is_on=True)
    values = torch.zeros(1000, 100, device=device)
    calls = []

    def compute(rows: int) -> torch.Tensor:
        calls.append(rows)
        return (values[:rows] * 2 + 1).sum(1)

    for turn in range(4):
        for rows in (1000, 10, 300):
            values.fill_(turn)
            found = graphs.run(rows, lambda rows=rows: compute(rows))
            assert found.tolist() == [100 * (2 * turn + 1)] * rows
    assert len(graphs) == 3
    assert len(calls) == 6, "once as it is and once captured, each"


@pytest.mark.gpu
@pytest.mark.usefixtures("own_stream")
def test_graphs_share_the_memory_between_input_and_output() -> None:
    device = torch.device("cuda:0")
    values = torch.ones(2**20, device=device)

    def compute(rows: int) -> torch.Tensor:
        between = [values[:rows] + n for n in range(10)]
        return torch.stack(between).sum().view(1)

    def reserved(num_graphs: int) -> int:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        graphs = Graphs(device, is_on=True)
        for n in range(num_graphs):
            graphs.run(n, lambda n=n: compute(2**20 - n))
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved() - before

    assert reserved(8) < 1.5 * reserved(1)
