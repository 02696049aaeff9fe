"""The plan in words and tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ember_pp.config import Config
from ember_pp.devices import DeviceSpec
from ember_pp.jobs.plan_prediction import Prediction, StagePrediction
from ember_pp.jobs.plan_workload import Simulated
from ember_pp.model_config import ModelConfig
from ember_pp.partition import stage_weight_bytes

_GIB = 1024**3
_MANY_STAGES = 8
_KINDS = (
    ("weights", "layers"),
    ("embedding", "embedding"),
    ("lm_head", "lm_head"),
    ("KV", "kv"),
    ("activations", "activations"),
    ("graphs", "graphs"),
    ("rings", "rings"),
    ("tables", "tables"),
    ("rope", "rope"),
    ("context", "context"),
)


def render(
    config: Config,
    cfg: ModelConfig,
    devices: Sequence[DeviceSpec],
    chosen: Prediction,
    best: Sequence[Prediction],
) -> str:
    """Everything that ``job=plan`` prints before a simulation."""
    overrides = " ".join(_quoted(text) for text in chosen.overrides(config))
    return "\n\n".join(
        [
            _head(config, cfg, devices, chosen),
            _memory(config, chosen),
            _times(chosen),
            _comparison(config, devices, chosen, best),
            f"To run it, add these to the settings given here:\n  {overrides}",
        ]
    )


def _quoted(text: str) -> str:
    """As a shell takes it."""
    return f"'{text}'" if set(text) & set(" []{}$") else text


def _head(
    config: Config, cfg: ModelConfig, devices: Sequence[DeviceSpec], chosen: Prediction
) -> str:
    settings, plan = chosen.layout.settings, config.plan
    weights = stage_weight_bytes(
        cfg, (0, cfg.num_layers), is_first=True, is_last=True, bytes_per_element=1
    )
    lines = [
        f"model     {config.model.path or cfg.model_type}: {cfg.num_layers} layers, "
        f"{weights / 1e9:.2f} B weights, {config.model.dtype}, "
        f"up to {settings.max_model_len:,} tokens"
    ]
    for index, (device, count) in enumerate(_grouped(devices)):
        lines.append(f"{'devices   ' if index == 0 else ' ' * 10}{count} x {_describe(device)}")
    lines.append(
        f"workload  {plan.sequences} requests at once, prompts of {plan.prompt_tokens}, answers of "
        f"{plan.output_tokens} tokens"
    )
    lines.append(f"times     {_source(chosen)}")
    return "\n".join(lines)


def _source(chosen: Prediction) -> str:
    """Where times come from, and what of them is extrapolated."""
    if not chosen.is_measured:
        return "the least possible: bytes and operations at the devices' peak rates"
    profiles = [
        device.profile
        for stage in range(len(chosen.stages))
        for device in chosen.layout.devices_of(stage)
        if device.profile is not None
    ]
    beyond = [
        f"{num_planned:.0f} {kind} (measured up to {most})"
        for kind, num_planned, most in (
            (
                "decodes",
                chosen.workload.sequences / chosen.num_microbatches,
                min(profile.most_decodes for profile in profiles),
            ),
            (
                "prompt tokens",
                chosen.layout.settings.max_tokens_per_plan,
                min(profile.most_tokens for profile in profiles),
            ),
        )
        if num_planned > most
    ]
    extrapolated = f"; extrapolated for plans of {' and of '.join(beyond)}" if beyond else ""
    return f"measured on these devices{extrapolated}"


def _grouped(devices: Sequence[DeviceSpec]) -> list[tuple[DeviceSpec, int]]:
    kinds = dict.fromkeys(devices)
    return [(device, list(devices).count(device)) for device in kinds]


def _describe(device: DeviceSpec) -> str:
    memory = "" if device.memory_bytes is None else f"{device.memory_bytes / _GIB:.1f} GiB, "
    return (
        f"{device.name}: {memory}{device.bandwidth_bytes_per_s / 1e9:.0f} GB/s, "
        f"{device.flops_per_s / 1e12:.3g} TFLOPS ({device.source})"
    )


def layout_name(plan: Prediction) -> str:
    """E.g. ``2 replicas of 4 stages``."""
    num_stages = len(plan.stages)
    stages = "1 stage" if num_stages == 1 else f"{num_stages} stages"
    return stages if plan.num_replicas == 1 else f"{plan.num_replicas} replicas of {stages}"


def _memory(config: Config, chosen: Prediction) -> str:
    kinds = [
        (title, name)
        for title, name in _KINDS
        if any(getattr(stage.held, name) for stage in chosen.stages)
    ]
    rows = [["stage", "device", "layers", *(title for title, _ in kinds), "total", "of"]]
    for index, stage in enumerate(chosen.stages):
        start, end = stage.layers
        rows.append(
            [
                str(index),
                stage.device.spec.name,
                f"{end - start}" + (f" ({start}-{end - 1})" if end > start else ""),
                *(_size(getattr(stage.held, name)) for _, name in kinds),
                _size(stage.held.total),
                _size(stage.device.spec.memory_bytes or 0),
            ]
        )
    title = f"plan: {layout_name(chosen)}; GiB on each device"
    if chosen.has_unequal_replicas:
        title += ", where the replicas differ on the one with the least to spare"
    return "\n".join([title, _table(rows), *_kv_lines(config, chosen)])


def _kv_lines(config: Config, chosen: Prediction) -> list[str]:
    num_tokens, workload, limit = chosen.num_kv_tokens, chosen.workload, chosen.limiting_stage
    limiting = chosen.stages[limit].device.spec.name
    each = " in each replica" if chosen.num_replicas > 1 else ""
    lines = [
        f"KV cache: {num_tokens:,} tokens{each}, {num_tokens // workload.total_tokens:,} requests "
        f"of {workload.total_tokens:,} tokens; stage {limit} ({limiting}) limits"
    ]
    num_wanted = -(-config.plan.sequences // chosen.num_replicas)
    if workload.sequences < num_wanted:
        lines.append(
            f"Of the {num_wanted} requests{each}, {workload.sequences} fit at once; others wait."
        )
    return lines


def _size(num_bytes: float) -> str:
    if not num_bytes:
        return "-"
    return f"{num_bytes / _GIB:.2f}" if num_bytes >= 0.005 * _GIB else f"{num_bytes / _GIB:.4f}"


def _times(chosen: Prediction) -> str:
    differ = chosen.has_unequal_replicas

    def row(index: int, stage: StagePrediction, bubble: float) -> list[str]:
        return [
            str(index),
            *([stage.slowest.spec.name] if differ else []),
            _ms(stage.decode_s),
            _ms(stage.steady_s),
            _ms(stage.prefill_s),
            f"{bubble:.1%}",
        ]

    steady = chosen.steady
    most = chosen.layout.settings.max_tokens_per_plan
    kinds = ["decode plan", "mixed plan", f"{most} prompt tokens", "bubble"]
    rows = [["stage", *(["slowest"] if differ else []), *kinds]]
    rows += [
        row(index, stage, bubble)
        for index, (stage, bubble) in enumerate(zip(chosen.stages, chosen.bubbles, strict=True))
    ]
    return (
        f"milliseconds of a plan; a mixed one has {steady.num_decodes:.0f} decodes and "
        f"{steady.num_prefill_tokens:.0f} prompt tokens\n"
        + _table(rows)
        + f"\nA token every {_ms(chosen.decode_s)} ms in pure decode, {_ms(chosen.steady_s)} ms "
        f"beside prompts; the first token of a prompt alone after {_ms(chosen.prompt_s)} ms."
        f"\n{chosen.output_tokens_per_s:,.0f} output tokens/s"
        + (", the sum of replicas that are each at their own pace." if differ else ".")
    )


def _ms(time_s: float) -> str:
    time_ms = time_s * 1e3
    return f"{time_ms:.0f}" if time_ms >= 100 else f"{time_ms:.3g}"


def _comparison(
    config: Config, devices: Sequence[DeviceSpec], chosen: Prediction, best: Sequence[Prediction]
) -> str:
    is_mixed = len({plan.is_measured for plan in best}) > 1
    kind = ["times"] if is_mixed else []
    rows = [["layout", *kind, "output tokens/s", "token every (ms)", "KV tokens", "overrides"]]
    for plan in best:
        kind = ["measured" if plan.is_measured else "at peak rates"] if is_mixed else []
        rows.append(
            [
                layout_name(plan),
                *kind,
                f"{plan.output_tokens_per_s:,.0f}",
                _ms(plan.steady_s),
                f"{plan.num_kv_tokens * plan.num_replicas:,}",
                " ".join(_quoted(text) for text in plan.overrides(config)),
            ]
        )
    title = f"best layouts of {len(devices)} device{'s' if len(devices) > 1 else ''}"
    note = (
        "\nMeasured times and those at peak rates do not compare. Measure a layout with "
        "profile=true and its overrides."
        if is_mixed
        else ""
    )
    return f"{title}\n{_table(rows)}{note}{_advice(chosen, best)}"


def _advice(chosen: Prediction, best: Sequence[Prediction]) -> str:
    """Says when another layout would do better; the first has times of the chosen one's kind."""
    top = best[0]
    gain = top.output_tokens_per_s / chosen.output_tokens_per_s
    same = (top.num_replicas, len(top.stages)) == (chosen.num_replicas, len(chosen.stages))
    if same or (gain < 1.01 and len(top.stages) >= len(chosen.stages)):
        return ""
    return (
        f"\n{layout_name(top)} would do better than {layout_name(chosen)}: {gain:.2f}x the "
        f"tokens/s, a token every {_ms(top.steady_s)} instead of {_ms(chosen.steady_s)} ms."
    )


def render_simulation(simulated: Simulated) -> str:
    """What a simulated workload came to."""
    report = simulated.report
    rows = [["", "P50", "P90", "P99"]]
    for title, values, scale in (
        ("first token after (s)", report.ttft_s, 1.0),
        ("a token every (ms)", report.tpot_s, 1e3),
        ("longest gap (ms)", report.max_gap_s, 1e3),
    ):
        rows.append([title, *(f"{values[key] * scale:.3g}" for key in (50, 90, 99))])
    which = "one of" if simulated.has_equal_replicas else "the slowest device of each stage in"
    replicas = f" ({which} {simulated.num_replicas} replicas)" if simulated.num_replicas > 1 else ""
    skipped = (
        f"\n{simulated.num_skipped:,} requests left out: longer than the KV cache or the context"
        if simulated.num_skipped
        else ""
    )
    return (
        f"\nsimulated: {simulated.workload}, {report.num_requests:,} requests in "
        f"{report.makespan_s:,.1f} s{replicas}\n{_table(rows)}\n"
        f"{simulated.output_tokens_per_s:,.0f} output tokens/s; {report.num_plans:,} plans; "
        f"{report.num_preemptions:,} preemptions; {_bubbles(report.bubbles)}{skipped}"
    )


def _bubbles(bubbles: Sequence[float]) -> str:
    if len(bubbles) <= _MANY_STAGES:
        return "bubble per stage " + ", ".join(f"{bubble:.1%}" for bubble in bubbles)
    ends = " to ".join(
        f"{bubble:.1%} (stage {bubbles.index(bubble)})" for bubble in (min(bubbles), max(bubbles))
    )
    return f"bubble {ends}, median {statistics.median(bubbles):.1%}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of numbers to the right, others to the left; the first row is the heading."""
    columns = list(zip(*rows, strict=True))
    is_right = [all(_is_number(cell) for cell in column[1:]) for column in columns]
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, is_right, strict=True)
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def _is_number(cell: str) -> bool:
    return cell == "-" or (cell[:1].isdigit() and set(cell) <= set("0123456789.,%e+-"))
