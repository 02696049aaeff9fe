"""``python -m ember_pp.stage.transformers_run``: a workload with transformers, on one device.

Started by ``job=bench job.compare=transformers`` when the stages are gone. What to run comes as
JSON on stdin, times go as JSON to stdout. The same prompts, the same dtype, and the same weights:
those of the checkpoint, or the numbers that ``model.load=random`` draws. A plain greedy loop
around the model and its own KV cache, which costs less than its ``generate``; nothing reads a
token before the last one is there.

Shape letters: N prompts, T tokens of each.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ember_pp.errors import ConfigError
from ember_pp.model_config import ModelConfig
from ember_pp.stage.__main__ import die_with_parent
from ember_pp.stage.weights import draw_random

ATTENTION = ("eager", "sdpa")
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_WARMUP_TOKENS = 8


def main() -> None:
    """Run what stdin says, with each kind of attention."""
    wanted = json.load(sys.stdin)
    die_with_parent(wanted["parent_pid"])
    torch.set_num_threads(wanted["num_threads"])
    device = torch.device(wanted["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        model = load_model(
            ModelConfig.from_plain(wanted["model_config"]),
            wanted["architecture"],
            wanted["folder"],
            dtype=_DTYPES[wanted["dtype"]],
            device=device,
        )
    except ConfigError as error:
        sys.stdout.write(json.dumps({"error": error.to_wire()}) + "\n")
        return
    token_ids = torch.tensor(wanted["token_ids"], device=device)
    runs = {
        attention: measure(
            model, attention, token_ids, wanted["output_tokens"], repeats=wanted["repeats"]
        )
        for attention in ATTENTION
    }
    sys.stdout.write(json.dumps({"runs": runs}) + "\n")


def load_model(
    cfg: ModelConfig,
    architecture: dict[str, Any],
    folder: str | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    draw_device: torch.device | None = None,
    what: str = "job.compare",
) -> Any:
    """transformers' model with the weights of ``folder``; None: with those that a stage draws.

    Args:
        draw_device: of that stage; None: ``device``. Random numbers differ from kind to kind.
        what: the setting that asked for it.

    Raises:
        ConfigError: this version of transformers cannot make it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    try:
        hf_config = AutoConfig.for_model(**architecture)
        with device:
            model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{what}: transformers: {error}") from None
    like = torch.empty((), dtype=dtype, device=draw_device or device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(draw_random(cfg, name, tuple(parameter.shape), like))
    return model.eval()


def measure(
    model: Any, attention: str, token_ids: Tensor, output_tokens: int, *, repeats: int
) -> dict[str, Any]:
    """Times of greedy decoding from [N, T] prompts, or the error that ended it.

    Returns:
        ``repeats``: of each run ``first_s``, until the first tokens, and ``elapsed_s``, until the
        last; ``first_tokens``: the first of each answer. Or ``error``.
    """
    try:
        model.set_attn_implementation(attention)
        decode(model, token_ids, min(output_tokens, _WARMUP_TOKENS))
        runs = [decode(model, token_ids, output_tokens) for _ in range(repeats)]
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    except (ValueError, ImportError, NotImplementedError) as error:
        return {"error": str(error).partition("\n")[0]}
    return {
        "repeats": [{"first_s": first_s, "elapsed_s": end_s} for first_s, end_s, _ in runs],
        "first_tokens": runs[0][2][:, 0].tolist(),
    }


@torch.inference_mode()
def decode(model: Any, token_ids: Tensor, output_tokens: int) -> tuple[float, float, Tensor]:
    """Seconds to the first and to the last token, and the tokens, [N, output_tokens]."""
    synchronize = _synchronizer(token_ids.device)
    synchronize()
    started_s = time.perf_counter()
    out = model(token_ids, use_cache=True, logits_to_keep=1)
    drawn = [out.logits[:, -1].argmax(-1)]
    synchronize()
    first_s = time.perf_counter() - started_s
    for _ in range(output_tokens - 1):
        out = model(
            drawn[-1][:, None],
            past_key_values=out.past_key_values,
            use_cache=True,
            logits_to_keep=1,
        )
        drawn.append(out.logits[:, -1].argmax(-1))
    synchronize()
    return first_s, time.perf_counter() - started_s, torch.stack(drawn, dim=1)


def _synchronizer(device: torch.device) -> Callable[[], None]:
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


if __name__ == "__main__":
    main()
