"""What ``job=check`` allows, and what of a result is outside of it.

Against transformers, errors are relative: ``worst`` and ``mean`` of ``stage/drift.py``. In fp32 the
bound is a number. In bf16 it is what transformers' own bf16 is away from its fp32, tensor by
tensor: both are sums of many roundings that agree in size and not bit by bit, so the bound has
a factor. Against one stage, every bit counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FP32 = 1e-4
"""Largest ``worst`` of fp32 hidden states and logits."""
BF16_WORST = 1.5
"""Largest ``worst`` in bf16, over that of transformers' bf16. A maximum over few rows varies."""
BF16_MEAN = 1.1
"""The same of ``mean``, which hardly varies."""

_NOT_A_NUMBER = 1e99


def judge(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What is outside tolerance, the first of each comparison; adds ``allowed`` to its tensors.

    Returns:
        Maps with ``against``, ``name``, ``stage``, ``text`` and ``where``; empty: all is well.
    """
    faults = []
    if result["failed_requests"]:
        first = result["failed_requests"][0]
        faults.append(
            {
                "against": "itself",
                "name": "tokens",
                "stage": None,
                "text": f"{len(result['failed_requests'])} requests failed, "
                f"request {first['request']} first: {first['error']}",
                "where": None,
            }
        )
    if result["one_stage"] is not None:
        faults += _judge_one_stage(result["one_stage"])
    if result["transformers"] is not None:
        faults += _judge_transformers(result["transformers"])
    return faults


def _judge_one_stage(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    first, tokens = part["first"], part["tokens"]
    if first is not None:
        text = "differs"
        if "num_differing" in first:
            text = f"{first['num_differing']:,} of {first['num_elements']:,} values differ"
            if first["num_differing"] == 1:
                text = f"1 of {first['num_elements']:,} values differs"
        return [_fault("one stage", first["name"], first["stage"], text, first)]
    if tokens["first"] is not None:
        text = f"{tokens['differing']:,} of {tokens['compared']:,} tokens differ"
        return [_fault("one stage", "tokens", None, text, tokens["first"])]
    return []


def _judge_transformers(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    for tensor in part["tensors"]:
        tensor["allowed"] = allowed = _allowed(tensor["theirs"])
    for tensor in part["tensors"]:
        ours, allowed = tensor["ours"], tensor["allowed"]
        for kind, what in (("worst", "relative error"), ("mean", "mean relative error")):
            if allowed[kind] is not None and not ours[kind] <= allowed[kind]:
                text = f"{what} {number(ours[kind])}, allowed {number(allowed[kind])}"
                return [
                    _fault("transformers", tensor["name"], tensor["stage"], text, ours["where"])
                ]
    tokens, logits = part["tokens"], part["tensors"][-1]
    # Logits that are so near on both sides put a drawn token no further below the best.
    gap = 2 * logits["allowed"]["worst"]
    tokens["allowed_gap"] = gap
    if tokens["gap"] > gap:
        text = f"its logit is {tokens['gap']:.3g} below the best, allowed {gap:.3g}"
        return [_fault("transformers", "tokens", logits["stage"], text, tokens["where"])]
    return []


def _allowed(theirs: Mapping[str, Any] | None) -> dict[str, float | None]:
    if theirs is None:
        return {"worst": FP32, "mean": None}
    return {"worst": BF16_WORST * theirs["worst"], "mean": BF16_MEAN * theirs["mean"]}


def number(error: float) -> str:
    """An error of ``stage/drift.py`` for people; where there was no number it is huge."""
    return "not finite" if error >= _NOT_A_NUMBER else f"{error:.3g}"


def _fault(
    against: str, name: str, stage: int | None, text: str, where: Mapping[str, Any] | None
) -> dict[str, Any]:
    return {"against": against, "name": name, "stage": stage, "text": text, "where": where}
