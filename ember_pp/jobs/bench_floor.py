"""The least time that a workload can take on its devices, at the rates that were measured there.

A decode step reads every weight that it multiplies with once, and the keys and values of all its
contexts; a prompt token takes two operations for each weight of the layers. What a plan cannot
avoid on a stage is the longer of its bytes over the read bandwidth and its operations over the
matrix rate. Not counted, so that a floor is one: embedding rows, hidden states, logits, sampling,
and the operations of attention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ember_pp import partition
from ember_pp.jobs.bench_workload import BenchWorkload
from ember_pp.model_config import ModelConfig


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StageFloor:
    """What one stage must read and compute, and how fast its device does that at most."""

    device: str
    read_bytes_per_s: float
    flops_per_s: float
    weight_bytes: int
    """Read by every plan."""
    kv_bytes_per_token: int
    flops_per_token: int
    """Of the layers."""
    flops_per_row: int
    """Of the lm_head, where a token is drawn."""

    def time_s(self, *, tokens: float, rows: float, context_tokens: float, plans: float) -> float:
        """Least time of so many plans together.

        Args:
            tokens: that go through the layers.
            rows: for which a token is drawn.
            context_tokens: whose keys and values are read, over all plans.
            plans: each of which reads the weights.
        """
        num_bytes = plans * self.weight_bytes + context_tokens * self.kv_bytes_per_token
        flops = tokens * self.flops_per_token + rows * self.flops_per_row
        return max(num_bytes / self.read_bytes_per_s, flops / self.flops_per_s)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """The floor of a whole pipeline."""

    stages: list[StageFloor]
    microbatches: int
    """Sets of sequences that take turns; each is a plan of its own."""
    replicas: int = 1

    def step_s(self, *, batch: float, context_tokens: float) -> float:
        """Least time between two tokens of each of ``batch`` sequences.

        A micro-batch goes through all stages (the sum over them, which is all there is to one
        stream), and a device works for all micro-batches (that of the slowest, which is what
        bounds a full pipeline); the longer of the two.
        """
        sets = min(self.microbatches, max(1, int(batch / self.replicas)))
        share = self.replicas * sets
        times = [
            stage.time_s(
                tokens=batch / share,
                rows=batch / share,
                context_tokens=context_tokens / share,
                plans=1,
            )
            for stage in self.stages
        ]
        return max(sum(times), sets * self._slowest(times))

    def prefill_s(self, workload: BenchWorkload) -> float:
        """Least time until every prompt has its first token: that of the slowest device."""
        return self._slowest(
            [
                stage.time_s(
                    tokens=workload.input_tokens / self.replicas,
                    rows=workload.batch / self.replicas,
                    context_tokens=0,
                    plans=1,
                )
                for stage in self.stages
            ]
        )

    def whole_s(self, workload: BenchWorkload) -> float:
        """Least time of a whole workload: that of the slowest device.

        Nothing can be faster than a plan for each token of the longest answer, with every
        request at once, prompts computed beside them.
        """
        plans = max(request.output_tokens for request in workload.requests)
        decoded = workload.output_tokens - workload.batch
        contexts = sum(
            (request.output_tokens - 1) * (len(request.token_ids) + request.output_tokens / 2)
            for request in workload.requests
        )
        return self._slowest(
            [
                stage.time_s(
                    tokens=(workload.input_tokens + decoded) / self.replicas,
                    rows=workload.output_tokens / self.replicas,
                    context_tokens=contexts / self.replicas,
                    plans=plans,
                )
                for stage in self.stages
            ]
        )

    def _slowest(self, times: Sequence[float]) -> float:
        """Of the devices: stages that share a GPU wait for each other; CPU stages have threads of
        their own."""
        by_device: dict[str, float] = {}
        for index, (stage, time_s) in enumerate(zip(self.stages, times, strict=True)):
            key = f"{stage.device} {index}" if stage.device == "cpu" else stage.device
            by_device[key] = by_device.get(key, 0.0) + time_s
        return max(by_device.values())


def stage_floor(
    cfg: ModelConfig,
    layer_range: partition.LayerRange,
    *,
    is_last: bool,
    bytes_per_element: int,
    device: str,
    read_bytes_per_s: float,
    flops_per_s: float,
) -> StageFloor:
    """Of the stage with these layers; the last one has the final norm and the lm_head too.

    An embedding is not read, but for a row of each token; tied to the lm_head it is.
    """
    num_layers = layer_range[1] - layer_range[0]
    layers = num_layers * partition.layer_parameters(cfg)
    head = partition.head_parameters(cfg) if is_last else 0
    norm = cfg.hidden_size if is_last else 0
    return StageFloor(
        device=device,
        read_bytes_per_s=read_bytes_per_s,
        flops_per_s=flops_per_s,
        weight_bytes=(layers + head + norm) * bytes_per_element,
        kv_bytes_per_token=partition.kv_bytes_per_token(cfg, num_layers, bytes_per_element),
        flops_per_token=2 * layers,
        flops_per_row=2 * head,
    )
