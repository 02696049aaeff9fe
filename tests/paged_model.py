"""A whole model as stages in one process, fed with rows of chosen lengths: no scheduler."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from conftest import BLOCK_SIZE
from ember_pp.checkpoint import Checkpoint, read_config
from ember_pp.kernels import make_ops
from ember_pp.model_config import ModelConfig
from ember_pp.partition import split_layers
from ember_pp.stage.input_batch import BatchInputs
from ember_pp.stage.kv_cache import KVCache
from ember_pp.stage.model import StageModel
from ember_pp.stage.weights import load_stage

NUM_BLOCKS = 256


@dataclasses.dataclass
class _Sequence:
    num_computed: int
    blocks: list[int]


class PagedModel:
    """Stages of a checkpoint (None: random weights), and the sequences that they have seen.

    Every unused KV slot holds NaN, and the blocks of a sequence lie in no order.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        cfg: ModelConfig | None = None,
        num_stages: int = 1,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        kernels: Literal["auto", "cuda", "reference"] = "auto",
    ) -> None:
        self.cfg = cfg or ModelConfig.from_hf(read_config(folder))
        checkpoint = None if folder is None else Checkpoint.open(folder)
        if checkpoint is not None:
            checkpoint.check(self.cfg)
        self.device = device
        ops = make_ops(kernels, torch.device(device))
        self.stages: list[tuple[StageModel, KVCache]] = []
        for stage, (start, end) in enumerate(split_layers(self.cfg, num_stages, "equal")):
            ends = {"is_first": stage == 0, "is_last": stage == num_stages - 1}
            weights = load_stage(
                checkpoint, self.cfg, start, end, dtype=dtype, device=device, **ends
            )
            model = StageModel(self.cfg, weights, start, end, **ends, ops=ops)
            cache = KVCache.allocate(self.cfg, end - start, NUM_BLOCKS, BLOCK_SIZE, dtype, device)
            cache.storage.fill_(float("nan"))
            self.stages.append((model, cache))
        generator = torch.Generator().manual_seed(0)
        self._free = torch.randperm(NUM_BLOCKS, generator=generator).tolist()
        self._sequences: dict[str, _Sequence] = {}

    def step(
        self, rows: Mapping[str, Sequence[int]], *, hidden: list[Tensor] | None = None
    ) -> Tensor:
        """[T, V] logits of every token of every row: sequence -> its next tokens.

        ``hidden`` takes the hidden states that leave each layer.
        """
        inputs = self.inputs(rows)
        before = 0 if hidden is None else len(hidden)

        def keep(layer_index: int, states: Tensor) -> None:
            assert hidden is not None
            assert layer_index == len(hidden) - before, "layers are numbered through all stages"
            hidden.append(states.clone())

        on_layer = None if hidden is None else keep
        states = None
        for model, cache in self.stages:
            states = model.forward(inputs, states, cache, on_layer=on_layer)
        return self.stages[-1][0].logits(states)

    def greedy(self, prompts: Mapping[str, Sequence[int]], num_tokens: int) -> dict[str, list[int]]:
        """``num_tokens`` tokens after each prompt, all decoded together."""
        logits = self.step(prompts)
        ends = torch.tensor([len(ids) for ids in prompts.values()]).cumsum(0) - 1
        output: dict[str, list[int]] = {name: [] for name in prompts}
        for _ in range(num_tokens):
            drawn = logits[ends.to(logits.device)].argmax(-1).tolist()
            for name, token in zip(output, drawn, strict=True):
                output[name].append(token)
            logits = self.step({name: ids[-1:] for name, ids in output.items()})
            ends = torch.arange(len(output))
        return output

    def inputs(self, rows: Mapping[str, Sequence[int]]) -> BatchInputs:
        """The ``BatchInputs`` of a step; every row samples after its last token."""
        lens = [len(ids) for ids in rows.values()]
        positions, slots, tables, contexts = [], [], [], []
        for name, ids in rows.items():
            sequence = self._sequences.setdefault(name, _Sequence(0, []))
            position = torch.arange(sequence.num_computed, sequence.num_computed + len(ids))
            sequence.num_computed += len(ids)
            while len(sequence.blocks) * BLOCK_SIZE < sequence.num_computed:
                sequence.blocks.append(self._free.pop())
            blocks = torch.tensor(sequence.blocks)
            positions.append(position)
            slots.append(blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
            tables.append(blocks.int())
            contexts.append(sequence.num_computed)
        cumulative = torch.tensor([0, *lens]).cumsum(0)
        block_tables = torch.nn.utils.rnn.pad_sequence(tables, batch_first=True, padding_value=-1)
        token_ids = torch.tensor([token for ids in rows.values() for token in ids])
        return BatchInputs(
            token_ids=token_ids.to(self.device),
            positions=torch.cat(positions).to(self.device),
            slot_mapping=torch.cat(slots).to(self.device),
            cu_seqlens_q=cumulative.int().to(self.device),
            context_lens=torch.tensor(contexts, dtype=torch.int32, device=self.device),
            block_tables=block_tables.to(self.device),
            table_rows=None,
            decode_lens=torch.tensor(
                [context if n == 1 else 0 for n, context in zip(lens, contexts, strict=True)],
                dtype=torch.int32,
                device=self.device,
            ),
            decode_slots=torch.empty(0, dtype=torch.int64),
            num_decode_rows=next((i for i, n in enumerate(lens) if n != 1), len(lens)),
            max_query_len=max(lens),
            sample_rows=(cumulative[1:] - 1).to(self.device),
            sample_slots=list(range(len(lens))),
            sample_positions=contexts,
        )
