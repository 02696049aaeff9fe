"""What the results of ``benchmarks/multi_gpu.py`` come to: ratios beside their aims. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SMALL_BYTES = 2**16
LARGE_BYTES = 2**26
HOP_AIM_US = 4.0
NCCL_AIM = 3.0
BANDWIDTH_AIM = 0.95
SCALING_AIMS = {2: 0.98, 4: 0.96, 8: 0.93}
LATENCY_AIM = 1.02
BUBBLE_AIM = 1.05

_LEAST_BUBBLE = 0.005
"""A prediction below this is nothing to divide by."""

Parts = Mapping[str, Mapping[str, Mapping[str, Any]]]
Row = dict[str, Any]
"""``what``, ``value`` in words, and where there is one the ``aim`` and whether it ``reaches``."""


def summarize(parts: Parts) -> list[Row]:
    """Rows of the table, part by part; a case that did not come to a result says why."""
    rows: list[Row] = []
    rows += _chosen_paths(parts.get("probe", {}))
    rows += _hops(parts.get("handoff", {}))
    rows += _equality(parts.get("equality", {}))
    rows += _models(parts.get("models", {}))
    rows += _failure(parts.get("failure", {}))
    rows += [
        {"what": f"{part}: {name}: {command}", "value": said.get("error") or said["skipped"]}
        for part, cases in parts.items()
        for name, case in cases.items()
        for command, said in case["said"].items()
        if "result" not in said
    ]
    return rows


def result_of(case: Mapping[str, Any], command: str) -> dict[str, Any] | None:
    """What one command of a case measured; None: it did not."""
    result: dict[str, Any] | None = case["said"].get(command, {}).get("result")
    return result


def _at_least(what: str, value: float, aim: float | None, unit: str = "") -> Row:
    return _row(what, value, aim, unit, reaches=aim is not None and value >= aim)


def _at_most(what: str, value: float, aim: float | None, unit: str = "") -> Row:
    return _row(what, value, aim, unit, reaches=aim is not None and value <= aim)


def _row(what: str, value: float, aim: float | None, unit: str, *, reaches: bool) -> Row:
    row: Row = {"what": what, "number": value, "value": f"{value:.4g}{unit}"}
    return row if aim is None else row | {"aim": f"{aim:g}{unit}", "reaches": reaches}


# --------------------------------------------------------------------------------------
# edges


def _chosen_paths(cases: Mapping[str, Any]) -> Iterator[Row]:
    for case in cases.values():
        found = result_of(case, "edges")
        if found is not None:
            paths = ", ".join(f"{edge} {path}" for edge, path in found["edges"].items())
            yield {"what": "path of each edge, handoff=auto", "value": paths}


def _hops(cases: Mapping[str, Any]) -> Iterator[Row]:
    for name, case in cases.items():
        paths = _paths(case)
        nccl = result_of(case, "nccl")
        ours = paths.get("cuda_ipc")
        for path, sizes in paths.items():
            aim = HOP_AIM_US if path == "cuda_ipc" else None
            yield _at_most(
                f"hop {name}, {path}, up to 64 KiB: highest p50", _slowest_small(sizes), aim, " us"
            )
        if nccl is not None:
            theirs = by_size(nccl["sizes"])
            yield _at_most(
                f"hop {name}, NCCL, up to 64 KiB: highest p50", _slowest_small(theirs), None, " us"
            )
            if ours is not None:
                yield _at_least(
                    f"hop {name}, NCCL over cuda_ipc, up to 64 KiB: least",
                    times_faster(ours, theirs),
                    NCCL_AIM,
                )
        peer = _peer_gb_per_s(case)
        if ours is not None and peer is not None:
            yield _at_least(
                f"hop {name}, cuda_ipc, 64 MiB: bandwidth over that of a peer copy",
                ours[LARGE_BYTES]["gb_per_s"] / peer,
                BANDWIDTH_AIM,
            )


def _paths(case: Mapping[str, Any]) -> dict[str, dict[int, Any]]:
    """Sizes of each path that was timed."""
    found = result_of(case, "hops")
    if found is None:
        return {}
    [pair] = found["handoff"]
    return {path["path"]: by_size(path["sizes"]) for path in pair["paths"] if "sizes" in path}


def by_size(sizes: Sequence[Mapping[str, Any]]) -> dict[int, Any]:
    """What was measured, by bytes."""
    return {size["num_bytes"]: size for size in sizes}


def _slowest_small(sizes: Mapping[int, Any]) -> float:
    return max(
        float(size["p50_us"]) for num_bytes, size in sizes.items() if num_bytes <= SMALL_BYTES
    )


def times_faster(ours: Mapping[int, Any], theirs: Mapping[int, Any]) -> float:
    """How many times ours the median hop of theirs is, at the small size where it is the least."""
    return min(
        float(theirs[num_bytes]["p50_us"] / size["p50_us"])
        for num_bytes, size in ours.items()
        if num_bytes <= SMALL_BYTES
    )


def _peer_gb_per_s(case: Mapping[str, Any]) -> float | None:
    """Of the largest size that hops have, the slower direction."""
    found = result_of(case, "peer")
    if found is None:
        return None
    rates = [by_size(pair["copies"])[LARGE_BYTES]["gb_per_s"] for pair in found["pairs"]]
    return float(min(rates))


# --------------------------------------------------------------------------------------
# models


def _equality(cases: Mapping[str, Any]) -> Iterator[Row]:
    for name, case in cases.items():
        if result_of(case, "check") is not None:
            yield {"what": f"equal bits: {name}", "value": "yes"}


def _models(cases: Mapping[str, Any]) -> Iterator[Row]:
    for case in cases.values():
        found = result_of(case, "bench")
        if found is None:
            continue
        facts = case["facts"]
        name = f"{facts['model']}, {facts['load']}, {num_stages(facts['stages'])}"
        name += f", {facts['split']}" if facts["stages"] > 1 else ""
        metric = metric_of(found)
        value = found["summary"][metric]["median"]
        yield {"what": f"{name}: {metric}", "number": value, "value": f"{value:,.4g}"}
        base = base_of(case, cases)
        if base is not None and facts["stages"] > base["facts"]["stages"]:
            yield _against(name, case, base)
        bubble = bubbles(case)
        if bubble is not None:
            yield _bubble_row(name, *bubble, aim=BUBBLE_AIM if facts["has_aims"] else None)


def num_stages(count: int) -> str:
    """In words."""
    return "1 stage" if count == 1 else f"{count} stages"


def metric_of(*results: Mapping[str, Any]) -> str:
    """The key of ``summary`` that a workload is about, if all results have it."""
    names = {
        "single": "step_ms",
        "fixed": "steady_output_tokens_per_s",
        "mixed": "output_tokens_per_s",
        "prefill": "prompt_tokens_per_s",
    }
    metric = names[results[0]["workload"]["name"]]
    return metric if all(metric in one["summary"] for one in results) else "output_tokens_per_s"


def base_of(case: Mapping[str, Any], cases: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The same model and load on the fewest stages that have a result."""
    same = [
        other
        for other in cases.values()
        if all(other["facts"][key] == case["facts"][key] for key in ("model", "load"))
        and result_of(other, "bench") is not None
    ]
    return min(same, key=lambda other: other["facts"]["stages"], default=None)


def scaling(case: Mapping[str, Any], base: Mapping[str, Any]) -> float:
    """Throughput of each GPU over that of each GPU of ``base``; of one stream, time over time."""
    ours, theirs = (result_of(one, "bench") or {} for one in (case, base))
    metric = metric_of(ours, theirs)
    ratio = ours["summary"][metric]["median"] / theirs["summary"][metric]["median"]
    if metric == "step_ms":
        return float(ratio)
    return float(ratio * base["facts"]["gpus"] / case["facts"]["gpus"])


def _against(name: str, case: Mapping[str, Any], base: Mapping[str, Any]) -> Row:
    facts, base_facts = case["facts"], base["facts"]
    ratio = scaling(case, base)
    of_base = num_stages(base_facts["stages"])
    if metric_of(result_of(case, "bench") or {}) == "step_ms":
        what = f"{name}: time of a token over that of {of_base}"
        return _at_most(what, ratio, LATENCY_AIM if facts["has_aims"] else None)
    is_spread = facts["gpus"] == facts["stages"] and base_facts["stages"] == 1
    is_spread &= facts["has_aims"]
    aim = SCALING_AIMS.get(facts["stages"]) if is_spread else None
    return _at_least(f"{name}: throughput of a GPU over that with {of_base}", ratio, aim)


def bubbles(case: Mapping[str, Any]) -> tuple[float, float] | None:
    """Measured and predicted, means over the stages; None where there is only one of them."""
    found, plan = result_of(case, "bench"), result_of(case, "plan")
    if found is None or plan is None or plan["simulation"] is None:
        return None
    predicted: list[float] = plan["simulation"]["one_replica"]["bubbles"]
    measured = statistics.mean(1 - stage["busy_fraction"] for stage in found["stages"])
    return measured, statistics.mean(predicted)


def _bubble_row(name: str, measured: float, predicted: float, *, aim: float | None) -> Row:
    what = f"{name}: bubble {measured:.1%} over {predicted:.1%} as predicted"
    if predicted < _LEAST_BUBBLE:
        return {"what": what, "value": "-"}
    return _at_most(what, measured / predicted, aim)


def _failure(cases: Mapping[str, Any]) -> Iterator[Row]:
    for name, case in cases.items():
        found = result_of(case, "killed")
        if found is None:
            continue
        yield {
            "what": f"{name}: until tokens come again",
            "number": found["serving_again_s"],
            "value": f"{found['serving_again_s']:.3g} s",
        }
        grown = [
            found["memory_after_mib"].get(index, 0) - used
            for index, used in found["memory_before_mib"].items()
        ]
        if grown:
            yield {"what": f"{name}: most memory more than before", "value": f"{max(grown)} MiB"}


def render(rows: Sequence[Row]) -> str:
    """The table."""
    lines = [("", "measured", "aim", "")]
    for row in rows:
        reaches = {True: "reached", False: "not reached", None: ""}[row.get("reaches")]
        lines.append((row["what"], row["value"], row.get("aim", ""), reaches))
    width = max(len(line[0]) for line in lines)
    return "\n".join(
        f"{what:<{width}}  {value:>12}  {aim:>7}  {note}".rstrip()
        for what, value, aim, note in lines
    )
