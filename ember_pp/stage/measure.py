"""``python -m ember_pp.stage.measure``: time one layer and the lm_head on this machine's device.

Started by ``job=plan profile=true``. What to measure comes as JSON on stdin, the times go as JSON
to stdout (``Profile.to_plain``). Weights are random, shapes and code are the real ones: the model
of a stage, its paged KV cache, its sampler. A few layers, not one: a single layer of a small model
would stay in the processor's cache, as it never does in a run.

Shape letters: R rows that decode, T tokens, L layers, S block size, D hidden.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ember_pp import memory_model, partition, protocol
from ember_pp.cost_model import Profile, architecture_key
from ember_pp.kernels import make_ops
from ember_pp.model_config import ModelConfig
from ember_pp.stage.graphs import Graphs
from ember_pp.stage.input_batch import BatchInputs
from ember_pp.stage.kv_cache import KVCache
from ember_pp.stage.model import StageModel
from ember_pp.stage.sampler import Sampler
from ember_pp.stage.weights import load_stage

DECODE_ROWS = (1, 4, 16, 64)
PREFILL_TOKENS = (1, 16, 64, 256, 512)
SHORT_CONTEXT, LONG_CONTEXT = 128, 1024
LONG_CONTEXT_ROWS = 16
_BLOCK_SIZE = 16
_SAMPLING = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}  # what Qwen3's checkpoints ask for
_WORKING_SET_BYTES = 512 * 1024**2
_MAX_LAYERS = 8
_REPEATS, _MAX_REPEAT_S = 7, 1.5
_MAX_CONTEXT_BYTES = 2 * 1024**3
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def main() -> None:
    """Measure what stdin says."""
    wanted = json.load(sys.stdin)
    profile = measure(
        ModelConfig.from_plain(wanted["model_config"]),
        dtype=wanted["dtype"],
        device=torch.device(wanted["device"]),
        device_name=wanted["device_name"],
        num_threads=wanted["num_threads"],
        version=wanted["version"],
    )
    sys.stdout.write(json.dumps(profile.to_plain()) + "\n")


def measure(
    cfg: ModelConfig,
    *,
    dtype: str,
    device: torch.device,
    device_name: str,
    num_threads: int,
    version: str,
) -> Profile:
    """The times of one layer and of the head. ``num_threads`` 0: as torch is."""
    if num_threads:
        torch.set_num_threads(num_threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # The default one cannot be captured.
        torch.cuda.set_stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
    bench = _Bench(cfg, _DTYPES[dtype], device)
    decode = {rows: bench.layers(*bench.decode(rows, SHORT_CONTEXT)) for rows in DECODE_ROWS}
    prefill = {tokens: bench.layers(*bench.prefill(tokens)) for tokens in PREFILL_TOKENS}
    long_s, _ = bench.layers(*bench.decode(LONG_CONTEXT_ROWS, LONG_CONTEXT))
    short_s, overhead_s = decode[LONG_CONTEXT_ROWS]
    return Profile(
        model=architecture_key(cfg),
        dtype=dtype,
        device=device_name,
        num_threads=num_threads,
        version=version,
        decode_context=SHORT_CONTEXT,
        layer_decode=tuple((rows, layer_s) for rows, (layer_s, _) in decode.items()),
        layer_prefill=tuple((tokens, layer_s) for tokens, (layer_s, _) in prefill.items()),
        context_token_s=max(0.0, long_s - short_s)
        / (LONG_CONTEXT_ROWS * (LONG_CONTEXT - SHORT_CONTEXT)),
        head=tuple((rows, bench.head(rows)) for rows in DECODE_ROWS),
        plan_overhead_s=overhead_s,
        context_bytes=_context_bytes(device),
    )


def num_layers_to_measure(cfg: ModelConfig, bytes_per_element: int) -> int:
    """L: enough to be larger than a cache, at least 2 where there are two."""
    layer_bytes = partition.layer_parameters(cfg) * bytes_per_element
    wanted = max(2, -(-_WORKING_SET_BYTES // layer_bytes))
    return min(wanted, _MAX_LAYERS, cfg.num_layers)


class _Bench:
    """L layers and the head on a device."""

    def __init__(self, cfg: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._cfg = cfg
        self._dtype = dtype
        self._device = device
        self._num_layers = num_layers_to_measure(cfg, dtype.itemsize)
        layers = 0, self._num_layers
        weights = load_stage(
            None, cfg, *layers, is_first=False, is_last=True, dtype=dtype, device=device
        )
        longest = max(LONG_CONTEXT, *PREFILL_TOKENS)
        ops = make_ops("auto", device)
        ends = {"is_first": False, "is_last": True}
        self._model = StageModel(cfg, weights, *layers, **ends, max_model_len=longest, ops=ops)
        self._num_first = max(1, self._num_layers // 2)
        first = dataclasses.replace(weights, layers=weights.layers[: self._num_first])
        self._first_layers = StageModel(
            cfg, first, 0, self._num_first, **ends, max_model_len=longest, ops=ops
        )
        group_size = cfg.num_heads // cfg.num_kv_heads
        is_captured = ops.captures_attention(dtype, cfg.head_dim, group_size, _BLOCK_SIZE)
        self._graphs = Graphs(device, is_on=is_captured)
        most = max(LONG_CONTEXT_ROWS * LONG_CONTEXT, max(DECODE_ROWS) * SHORT_CONTEXT, longest)
        self._kv_cache = KVCache.allocate(
            cfg, self._num_layers, most // _BLOCK_SIZE, _BLOCK_SIZE, dtype, device
        )
        self._kv_cache.storage.zero_()
        self._sampler = Sampler(cfg.vocab_size, max(DECODE_ROWS), [], device, ops)
        for slot in range(max(DECODE_ROWS)):
            self._sampler.open(protocol.OpenSlot(slot, slot, dict(_SAMPLING), 1, 0, b"", b""))

    def decode(self, num_rows: int, context: int) -> tuple[BatchInputs, Tensor]:
        """Inputs of R rows that each attend to ``context`` tokens."""
        return self._inputs([1] * num_rows, [context] * num_rows)

    def prefill(self, num_tokens: int) -> tuple[BatchInputs, Tensor]:
        """Inputs of one fresh prompt."""
        return self._inputs([num_tokens], [num_tokens])

    def _inputs(self, lens: list[int], contexts: list[int]) -> tuple[BatchInputs, Tensor]:
        num_rows, width = len(lens), -(-max(contexts) // _BLOCK_SIZE)
        tables = torch.arange(num_rows * width, dtype=torch.int32).view(num_rows, width)
        positions = torch.cat(
            [torch.arange(end - length, end) for length, end in zip(lens, contexts, strict=True)]
        )
        rows = torch.repeat_interleave(torch.arange(num_rows), torch.tensor(lens))
        blocks = tables[rows, positions // _BLOCK_SIZE].long()
        ends = torch.tensor(lens).cumsum(0)
        device = self._device
        inputs = BatchInputs(
            token_ids=torch.zeros(len(positions), dtype=torch.int64, device=device),
            positions=positions.to(device),
            slot_mapping=(blocks * _BLOCK_SIZE + positions % _BLOCK_SIZE).to(device),
            cu_seqlens_q=torch.cat((torch.zeros(1), ends)).to(torch.int32).to(device),
            context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
            block_tables=tables.to(device),
            table_rows=None,
            decode_lens=None,
            decode_slots=torch.arange(num_rows, device=device),
            num_decode_rows=num_rows,
            max_query_len=max(lens),
            sample_rows=(ends - 1).to(device),
            sample_slots=list(range(num_rows)),
            sample_positions=list(contexts),
        )
        shape = (len(positions), self._cfg.hidden_size)
        return inputs, torch.randn(shape, device=device).to(self._dtype)

    def layers(self, inputs: BatchInputs, hidden_states: Tensor) -> tuple[float, float]:
        """(time of one layer, time of a forward beside its layers), medians in seconds.

        Where a stage would capture its steps they are captured here: all layers, and half of them,
        so that the difference is that of layers alone.
        """
        if self._graphs.is_on:
            whole_s = self._replay(self._model, inputs, hidden_states)
            if self._num_layers == self._num_first:
                return whole_s, 0.0
            first_s = self._replay(self._first_layers, inputs, hidden_states)
            each_s = (whole_s - first_s) / (self._num_layers - self._num_first)
            return each_s, max(0.0, first_s - each_s * self._num_first)
        layer_s, rest_s = [], []

        def run() -> None:
            marks = _Marks(self._device)
            self._model.forward(
                inputs, hidden_states, self._kv_cache, on_layer=lambda *_: marks.add()
            )
            ends_s = marks.read()
            each_s = (ends_s[-1] - ends_s[0]) / max(1, len(ends_s) - 1) or ends_s[0]
            layer_s.append(each_s)
            rest_s.append(max(0.0, ends_s[0] - each_s))

        self._repeat(run)
        return statistics.median(layer_s[1:]), statistics.median(rest_s[1:])

    def _replay(self, model: StageModel, inputs: BatchInputs, hidden_states: Tensor) -> float:
        """Median time of a captured forward."""
        times_s = []
        key = object()

        def run() -> None:
            marks = _Marks(self._device)
            self._graphs.run(key, lambda: model.forward(inputs, hidden_states, self._kv_cache))
            marks.add()
            times_s.append(marks.read()[-1])

        self._repeat(run)
        return statistics.median(times_s[1:])

    def head(self, num_rows: int) -> float:
        """Final norm, lm_head and sampling of R rows, to the ids on the host; a median."""
        shape = (num_rows, self._cfg.hidden_size)
        hidden_states = torch.randn(shape, device=self._device).to(self._dtype)
        slots, times_s = list(range(num_rows)), []

        def run() -> None:
            started_s = time.perf_counter()
            logits = self._model.logits(hidden_states)
            self._sampler.sample(logits, slots, [1] * num_rows).read()
            times_s.append(time.perf_counter() - started_s)

        self._repeat(run)
        return statistics.median(times_s[1:])

    def _repeat(self, run: Callable[[], None]) -> None:
        """Once to warm up, then a few times, fewer if they take long."""
        run()
        started_s = time.perf_counter()
        for _ in range(_REPEATS):
            run()
            if time.perf_counter() - started_s > _MAX_REPEAT_S:
                return


class _Marks:
    """Moments on the device's clock, in seconds since the first."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._marks: list[Any] = []
        self.add()

    def add(self) -> None:
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def read(self) -> list[float]:
        start, *ends = self._marks
        if not self._is_cuda:
            return [end - start for end in ends]
        ends[-1].synchronize()
        return [start.elapsed_time(end) / 1e3 for end in ends]


def _context_bytes(device: torch.device) -> int:
    """What this process takes of a GPU beside its tensors, if no other process is there."""
    if device.type != "cuda":
        return 0
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    taken = total_bytes - free_bytes - torch.cuda.memory_reserved(device)
    return taken if 0 < taken < _MAX_CONTEXT_BYTES else memory_model.CUDA_CONTEXT_BYTES


if __name__ == "__main__":
    main()
