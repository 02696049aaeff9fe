"""The result of ``job=check`` for people: what ran, comparisons, the first tensor that is off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ember_pp.jobs.check_verdict import number
from ember_pp.jobs.progress import counted


def render(result: Mapping[str, Any]) -> str:
    """Tables and verdict."""
    lines = [f"{name:<10}{text}" for name, text in _heading(result)]
    if result["one_stage"] is not None:
        lines += ["", *_one_stage_lines(result)]
    if result["transformers"] is not None:
        lines += ["", *_transformers_lines(result)]
    lines += [""]
    for fault in result["faults"]:
        lines += [f"OUTSIDE TOLERANCE  {_describe_fault(fault, result['devices'])}"]
    if not result["faults"]:
        lines += ["within tolerance"]
    return "\n".join(lines)


def _heading(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    model, work, plans = result["model"], result["workload"], result["plans"]
    weights = "random weights" if model["load"] == "random" else "its checkpoint"
    head = "tied" if model["is_tied"] else "own"
    edges = ", ".join(f"{edge} {path}" for edge, path in result["edges"].items())
    every = plans["tap_every"]
    looked_at = "all of them" if every == 1 else f"1 of {every}, {plans['tapped']:,} in all,"
    return [
        ("model", f"{model['path']}, {model['dtype']}, {weights}, {head} lm_head"),
        ("stages", f"{len(result['devices'])} on {', '.join(result['devices'])}"),
        *([("hand-off", edges)] if edges else []),
        (
            "requests",
            f"{work['requests']:,} at once: {work['prompt_tokens']:,} prompt tokens, "
            f"{counted(work['chunked_prompts'], 'prompt')} in chunks, "
            f"{work['cached_tokens']:,} tokens from the prefix cache; "
            f"{work['output_tokens']:,} greedy tokens each",
        ),
        (
            "plans",
            f"{plans['plans']:,}, up to {plans['most_rows']:,} requests in one; {looked_at} "
            "compared tensor by tensor",
        ),
        (
            "seconds",
            ", ".join(f"{name} {seconds:.0f}" for name, seconds in result["seconds"].items()),
        ),
    ]


# --------------------------------------------------------------------------------------
# against one stage


def _one_stage_lines(result: Mapping[str, Any]) -> list[str]:
    part, num_stages = result["one_stage"], len(result["devices"])
    names = [tensor["name"] for tensor in part["tensors"]]
    num_edges = sum(name.startswith("edge") for name in names)
    num_layers = sum(name.startswith("layer") for name in names)
    tensors = sum(tensor["tensors"] for tensor in part["tensors"])
    values = sum(tensor["values"] for tensor in part["tensors"])
    tokens = part["tokens"]
    lines = [
        f"{counted(num_stages, 'stage')} against one: the same plans again on "
        f"{result['devices'][0]}, bit by bit",
        f"  {counted(num_layers, 'layer')}, {counted(num_edges, 'edge')}, logits and tokens: "
        f"{counted(tensors, 'tensor')}, {values:,} values",
        f"  {tokens['compared'] - tokens['differing']:,} of {tokens['compared']:,} tokens of all "
        "plans are equal",
    ]
    differing = [tensor for tensor in part["tensors"] if tensor["differing"]]
    if not differing:
        return [*lines, "  all equal"]
    rows: list[tuple[str, ...]] = [
        ("", "stage", "plans", "differ in", "max abs", "relative", "worst at")
    ]
    for tensor in differing:
        drift = tensor["drift"]
        rows.append(
            (
                tensor["name"],
                str(tensor["stage"]),
                f"{tensor['tensors']:,}",
                f"{tensor['differing']:,}",
                number(drift["max_abs"]),
                number(drift["worst"]),
                _place(drift["where"]),
            )
        )
    return [*lines, "", *_table(rows)]


# --------------------------------------------------------------------------------------
# against transformers


def _transformers_lines(result: Mapping[str, Any]) -> list[str]:
    part = result["transformers"]
    is_bf16 = part["tensors"][-1]["theirs"] is not None
    beside = "; beside it what its own bf16 is off" if is_bf16 else ""
    lines = [
        f"against transformers {part['versions']['transformers']} on {part['device']}, in fp32 "
        f"with the same weights{beside}",
        "  relative: largest error of a row over its largest value, of all rows the worst; mean: "
        "length of the error over length of the row",
        "",
    ]
    theirs = ("transformers",) if is_bf16 else ()
    rows: list[tuple[str, ...]] = [
        (
            *("", "stage", "rows", "max abs", "relative", *theirs, "allowed"),
            *("mean", *theirs, *(("allowed",) if is_bf16 else ()), "worst at"),
        )
    ]
    rows += [_tensor_row(tensor) for tensor in part["tensors"]]
    tokens = part["tokens"]
    text = f"{tokens['equal']:,} of {tokens['compared']:,} tokens are the argmax of its fp32 logits"
    if tokens["equal_theirs"] is not None:
        text += f" (of its own bf16: {tokens['equal_theirs']:,})"
    return [*lines, *_table(rows), f"  {text}"]


def _tensor_row(tensor: Mapping[str, Any]) -> tuple[str, ...]:
    ours, theirs, allowed = tensor["ours"], tensor["theirs"], tensor["allowed"]
    cells = [tensor["name"], str(tensor["stage"]), f"{ours['rows']:,}", number(ours["max_abs"])]
    for kind in ("worst", "mean"):
        cells.append(number(ours[kind]))
        if theirs is not None:
            cells.append(number(theirs[kind]))
        if allowed[kind] is not None:
            cells.append(number(allowed[kind]))
    return (*cells, _place(ours["where"]))


# --------------------------------------------------------------------------------------
# the first that is off


def _describe_fault(fault: Mapping[str, Any], devices: Sequence[str]) -> str:
    stage = fault["stage"]
    of_stage = "" if stage is None else f" of stage {stage} on {devices[stage]}"
    text = f"against {fault['against']}: {fault['name']}{of_stage}: {fault['text']}"
    where = fault["where"]
    if where is None:
        return text
    values = f"{where['actual']!r}, expected {where['expected']!r}"
    if all(isinstance(where[name], float) for name in ("actual", "expected")):
        values += f", off by {abs(where['actual'] - where['expected']):.3g}"
    return f"{text}; {_place(where)}: {values}"


def _place(where: Mapping[str, Any] | None) -> str:
    if where is None:
        return "-"
    element = f" element {where['element']}" if "element" in where else ""
    return (
        f"plan {where['plan']} row {where['row']} (request {where['request']} token "
        f"{where['position']}){element}"
    )


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first and the last column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:-1], widths[1:-1], strict=True)),
                row[-1],
            ]
        ).rstrip()
        for row in rows
    ]
