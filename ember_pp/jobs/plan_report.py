"""The plan in words and tables."""

from __future__ import annotations

from collections.abc import Sequence

from ember_pp.config import Config
from ember_pp.devices import DeviceSpec
from ember_pp.jobs.plan_layout import LayoutPlan, StagePlan
from ember_pp.jobs.plan_workload import Simulated
from ember_pp.model_config import ModelConfig
from ember_pp.partition import stage_weight_bytes

_GIB = 1024**3
_KINDS = (
    ("weights", "layers"),
    ("embedding", "embedding"),
    ("lm_head", "lm_head"),
    ("KV", "kv"),
    ("activations", "activations"),
    ("rings", "rings"),
    ("tables", "tables"),
    ("rope", "rope"),
    ("context", "context"),
)


def render(
    config: Config,
    cfg: ModelConfig,
    devices: Sequence[DeviceSpec],
    chosen: LayoutPlan,
    best: Sequence[LayoutPlan],
) -> str:
    """Everything that ``job=plan`` prints before a simulation."""
    return "\n\n".join(
        [
            _head(config, cfg, devices, chosen),
            _memory(chosen),
            _times(chosen),
            _comparison(config, devices, chosen, best),
            "To run it:\n  ./launch.sh " + " ".join(_quoted(overrides(config, chosen))),
        ]
    )


def overrides(config: Config, chosen: LayoutPlan) -> list[str]:
    """The settings that make a job run as planned."""
    model = config.model
    given = ["job=batch"]
    given += [] if model.path is None else [f"model.path={model.path}"]
    given += [] if model.dtype == "bfloat16" else [f"model.dtype={model.dtype}"]
    if model.context_length is not None:
        given.append(f"model.context_length={model.context_length}")
    return given + chosen.overrides(config)


def _quoted(given: Sequence[str]) -> list[str]:
    return [f"'{text}'" if set(text) & set(" []{}$") else text for text in given]


def _head(
    config: Config, cfg: ModelConfig, devices: Sequence[DeviceSpec], chosen: LayoutPlan
) -> str:
    settings, plan = chosen.pipelines.settings, config.plan
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
    is_measured = all(stage.device.profile is not None for stage in chosen.stages)
    source = (
        "measured on these devices"
        if is_measured
        else "the least possible: bytes and operations at the devices' peak rates"
    )
    lines.append(f"times     {source}")
    return "\n".join(lines)


def _grouped(devices: Sequence[DeviceSpec]) -> list[tuple[DeviceSpec, int]]:
    kinds = dict.fromkeys(devices)
    return [(device, list(devices).count(device)) for device in kinds]


def _describe(device: DeviceSpec) -> str:
    memory = "" if device.memory_bytes is None else f"{device.memory_bytes / _GIB:.1f} GiB, "
    return (
        f"{device.name}: {memory}{device.bandwidth_bytes_per_s / 1e9:.0f} GB/s, "
        f"{device.flops_per_s / 1e12:.3g} TFLOPS ({device.source})"
    )


def layout_name(plan: LayoutPlan) -> str:
    """E.g. ``2 replicas of 4 stages``."""
    num_stages = len(plan.stages)
    stages = "1 stage" if num_stages == 1 else f"{num_stages} stages"
    return stages if plan.num_replicas == 1 else f"{plan.num_replicas} replicas of {stages}"


def _memory(chosen: LayoutPlan) -> str:
    kinds = [
        (title, name)
        for title, name in _KINDS
        if any(getattr(stage.held, name) for stage in chosen.stages)
    ]
    rows = [["stage", "device", "layers", *(f"{title}" for title, _ in kinds), "total", "of"]]
    for index, stage in enumerate(chosen.stages):
        sizes = [_size(getattr(stage.held, name)) for _, name in kinds]
        start, end = stage.layers
        layers = f"{end - start}" + (f" ({start}-{end - 1})" if end > start else "")
        memory_bytes = stage.device.spec.memory_bytes
        rows.append(
            [
                str(index),
                stage.device.spec.name,
                layers,
                *sizes,
                _size(stage.held.total),
                "-" if memory_bytes is None else _size(memory_bytes),
            ]
        )
    text = f"plan: {layout_name(chosen)}; GiB on each device\n" + _table(rows)
    num_tokens, workload = chosen.num_kv_tokens, chosen.workload
    limit = chosen.limiting_stage
    fits = num_tokens // workload.total_tokens
    each = " in each replica" if chosen.num_replicas > 1 else ""
    return text + (
        f"\nKV cache: {num_tokens:,} tokens{each}, {fits:,} requests of {workload.total_tokens:,}; "
        f"stage {limit} ({chosen.stages[limit].device.spec.name}) limits"
        + (
            f"\nOf the {chosen.pipelines.settings.max_sequences} requests{each} at once, "
            f"{workload.sequences} fit; the others wait."
            if workload.sequences < chosen.pipelines.settings.max_sequences
            else ""
        )
    )


def _size(num_bytes: float) -> str:
    return f"{num_bytes / _GIB:.2f}" if num_bytes >= 0.005 * _GIB else f"{num_bytes / _GIB:.4f}"


def _times(chosen: LayoutPlan) -> str:
    def row(index: int, stage: StagePlan) -> list[str]:
        return [
            str(index),
            _ms(stage.decode_s),
            _ms(stage.steady_s),
            _ms(stage.prefill_s),
            f"{stage.bubble:.1%}",
        ]

    steady = chosen.steady
    most = chosen.pipelines.settings.max_tokens_per_plan
    rows = [["stage", "decode plan", "mixed plan", f"{most} prompt tokens", "bubble"]]
    rows += [row(index, stage) for index, stage in enumerate(chosen.stages)]
    return (
        f"milliseconds of a plan; a mixed one has {steady.num_decodes:.0f} decodes and "
        f"{steady.num_prefill_tokens:.0f} prompt tokens\n"
        + _table(rows)
        + f"\nA token every {_ms(chosen.decode_s)} ms in pure decode, {_ms(chosen.steady_s)} ms "
        f"beside prompts; the first token of a prompt alone after {_ms(chosen.prompt_s)} ms."
        f"\n{chosen.output_tokens_per_s:,.0f} output tokens/s."
    )


def _ms(time_s: float) -> str:
    time_ms = time_s * 1e3
    return f"{time_ms:.0f}" if time_ms >= 100 else f"{time_ms:.3g}"


def _comparison(
    config: Config, devices: Sequence[DeviceSpec], chosen: LayoutPlan, best: Sequence[LayoutPlan]
) -> str:
    rows = [["layout", "output tokens/s", "token every (ms)", "KV tokens", "overrides"]]
    for plan in best:
        rows.append(
            [
                layout_name(plan),
                f"{plan.output_tokens_per_s:,.0f}",
                _ms(plan.steady_s),
                f"{plan.num_kv_tokens * plan.num_replicas:,}",
                " ".join(plan.overrides(config)),
            ]
        )
    title = f"best layouts of {len(devices)} device{'s' if len(devices) > 1 else ''}"
    return f"{title}\n{_table(rows)}" + _advice(chosen, best)


def _advice(chosen: LayoutPlan, best: Sequence[LayoutPlan]) -> str:
    """Says when copies would do better than the stages that were asked for."""
    if not best:
        return ""
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
    rows = [["", "P50", "P90", "P99"]]
    for title, values in (
        ("first token after (s)", simulated.ttft_s),
        ("token every (ms)", {key: value * 1e3 for key, value in simulated.tpot_s.items()}),
    ):
        rows.append([title, *(f"{values[key]:.3g}" for key in (50, 90, 99))])
    bubbles = ", ".join(f"{bubble:.1%}" for bubble in simulated.bubbles)
    skipped = (
        f"; {simulated.num_skipped} left out that are longer than the KV cache or the context"
        if simulated.num_skipped
        else ""
    )
    of = f" (one of {simulated.num_replicas} equal replicas)" if simulated.num_replicas > 1 else ""
    return (
        f"\nsimulated: {simulated.num_requests:,} requests of {simulated.workload} in "
        f"{simulated.makespan_s:,.1f} s{of}{skipped}\n{_table(rows)}\n"
        f"{simulated.output_tokens_per_s:,.0f} output tokens/s; bubble per stage {bubbles}"
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column in (0, 1) and not _is_number(cell) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() and all(letter.isdigit() or letter in ".,%e-+" for letter in cell)
