"""Settings: every preset composes and builds, the set of keys is frozen, bad values are named."""

import json
from pathlib import Path

import pytest
import yaml

from ember_pp import __main__ as entry
from ember_pp import config
from ember_pp.errors import ConfigError
from scripts import config_docs

ROOT = Path(__file__).parent.parent
PRESETS = sorted(path.stem for path in (ROOT / "conf" / "model").glob("*.yaml"))

# Adding, renaming or removing a setting is a change for everybody who has it in a script: it
# is made here too, in docs/config.md and in CHANGELOG.md.
KEYS = {
    "cache.block_size",
    "cache.memory_gib",
    "cache.memory_share",
    "cache.prefix",
    "coordinator.address",
    "coordinator.curve",
    "coordinator.keys",
    "coordinator.max_logit_bias_entries",
    "coordinator.max_message_bytes",
    "coordinator.max_prompt_characters",
    "coordinator.max_prompt_tokens",
    "coordinator.max_queued_bytes",
    "coordinator.max_queued_requests",
    "coordinator.max_stop_characters",
    "coordinator.max_stop_strings",
    "coordinator.max_stop_token_ids",
    "coordinator.max_unread_messages",
    "coordinator.shutdown_grace_s",
    "coordinator.start_timeout_s",
    "debug.record",
    "debug.tap",
    "debug.tap_every",
    "handoff",
    "job.against",
    "job.allow",
    "job.batch",
    "job.compare",
    "job.device",
    "job.disk_gib",
    "job.enable_thinking",
    "job.errors",
    "job.input",
    "job.input_tokens",
    "job.lengths",
    "job.make",
    "job.max_open_requests",
    "job.name",
    "job.on_bad_line",
    "job.ordered",
    "job.output",
    "job.output_tokens",
    "job.overwrite",
    "job.repeats",
    "job.request_ids",
    "job.requests",
    "job.seed",
    "job.shard",
    "job.system",
    "job.tap_every",
    "job.warmup",
    "job.workload",
    "kernels",
    "cuda_graphs",
    "log_level",
    "metrics.port",
    "model.architecture",
    "model.context_length",
    "model.dtype",
    "model.load",
    "model.path",
    "model.revision",
    "plan.devices",
    "plan.max_requests",
    "plan.output",
    "plan.output_tokens",
    "plan.profile_folder",
    "plan.prompt_tokens",
    "plan.sequences",
    "plan.use_profile",
    "plan.workload",
    "pipeline.cpu_threads",
    "pipeline.devices",
    "pipeline.max_in_flight",
    "pipeline.run_ahead",
    "pipeline.split",
    "pipeline.replicas",
    "pipeline.stages",
    "profile",
    "sampling.frequency_penalty",
    "sampling.ignore_eos",
    "sampling.max_tokens",
    "sampling.min_p",
    "sampling.min_tokens",
    "sampling.presence_penalty",
    "sampling.repetition_penalty",
    "sampling.seed",
    "sampling.temperature",
    "sampling.top_k",
    "sampling.top_p",
    "scheduler.max_sequences",
    "scheduler.max_tokens_per_plan",
    "scheduler.policy",
    "shutdown.grace_s",
    "supervisor.build_timeout_s",
    "supervisor.heartbeat_interval_s",
    "supervisor.heartbeat_max_misses",
    "supervisor.hello_timeout_s",
    "supervisor.max_restarts",
    "supervisor.overdue_factor",
    "supervisor.overdue_min_s",
    "supervisor.restart_window_s",
    "trace.max_plans",
    "trace.output",
    "trace.picture",
    "trace.window_s",
}

# Parameters of the published checkpoints, counting a tied head once.
NUM_PARAMETERS = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}


def plain(**groups):
    """The least that builds, with ``groups`` over it."""
    return {"job": {"name": "batch"}, "model": {"path": "demo"}} | groups


def compose(capsys, *arguments):
    """The configuration that the command line would run with."""
    assert entry.main(["--cfg", "job", "--resolve", *arguments]) == 0
    return config.build(yaml.safe_load(capsys.readouterr().out))


def test_the_set_of_keys_is_frozen():
    assert set(config.dotted_keys()) == KEYS


def test_every_file_in_conf_is_composed_below():
    files = {str(path.relative_to(ROOT / "conf")) for path in (ROOT / "conf").rglob("*.*")}
    assert files == {"config.yaml"} | {f"model/{name}.yaml" for name in PRESETS}


@pytest.mark.parametrize("job", config.JOBS)
def test_every_job_composes_with_its_defaults(capsys, job):
    assert compose(capsys, f"job={job}").job == config.JOBS[job]()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_composes(capsys, preset):
    composed = compose(capsys, f"model={preset}")
    assert composed.model.path == (
        "demo" if preset == "demo" else f"Qwen/Qwen3-{preset[6:].upper()}"
    )
    assert composed.model.architecture["model_type"] == "qwen3"
    assert composed.model.dtype == ("float32" if preset == "demo" else "bfloat16")
    assert composed.pipeline.stages == (2 if preset == "demo" else 1)


def test_without_a_preset_the_defaults_are_those_of_the_code(capsys):
    composed = compose(capsys, "model.path=/m")
    assert composed == config.Config(model=config.ModelSettings(path="/m"))


@pytest.mark.parametrize("preset", NUM_PARAMETERS)
def test_a_preset_has_the_shape_of_the_published_model(capsys, preset):
    shape = compose(capsys, f"model={preset}").model.architecture
    hidden, head = shape["hidden_size"], shape["head_dim"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    layer = (
        2 * hidden * heads * head  # Q and O
        + 2 * hidden * kv_heads * head  # K and V
        + 2 * head  # QK-norm
        + 3 * hidden * shape["intermediate_size"]
        + 2 * hidden  # the two norms
    )
    embedding = shape["vocab_size"] * hidden
    tables = 1 if shape["tie_word_embeddings"] else 2
    total = tables * embedding + shape["num_hidden_layers"] * layer + hidden
    assert total == NUM_PARAMETERS[preset]
    assert (shape["rope_theta"], shape["rms_norm_eps"]) == (1_000_000, 1e-6)
    assert (shape["max_position_embeddings"], shape["eos_token_id"]) == (40_960, 151_645)


def test_the_demo_preset_has_the_shape_of_the_bundled_model(capsys):
    bundled = json.loads((ROOT / "ember_pp" / "demo" / "config.json").read_text())
    assert compose(capsys, "model=demo").model.architecture == bundled


def test_the_page_of_settings_is_what_the_code_says():
    assert config_docs.PAGE.read_text(encoding="utf-8") == config_docs.render(), (
        "run: python -m scripts.config_docs --write"
    )


def test_the_page_lists_exactly_the_keys():
    rows = [line.split("`")[1] for line in config_docs.render().splitlines() if "| `" in line[:3]]
    listed = {row for row in rows if row.partition("=")[0] not in ("model", "job.name")}
    assert listed - set(PRESETS) == KEYS - {"job.name"}


# --------------------------------------------------------------------------------------
# build


def test_plain_values_come_back():
    composed = config.build(plain(pipeline={"stages": 2, "split": [3, 5]}, sampling={"top_k": 5}))
    assert config.build(config.to_plain(composed)) == composed


@pytest.mark.parametrize(("on_gpus", "expected"), [(False, (64, 512)), (True, (256, 2048))])
def test_devices_decide_where_nothing_is_said(on_gpus, expected):
    def sizes(**given):
        scheduler = config.build(plain(scheduler=given), on_gpus=on_gpus).scheduler
        return scheduler.max_sequences, scheduler.max_tokens_per_plan

    assert sizes() == sizes(max_sequences=None) == expected
    assert sizes(max_sequences=7) == (7, expected[1])
    assert config.default_plain()["scheduler"]["max_sequences"] is None


def test_nothing_can_be_changed_afterwards():
    composed = config.build(plain())
    with pytest.raises(AttributeError):
        composed.pipeline.stages = 2
    with pytest.raises(AttributeError):
        composed.handoff = "auto"


@pytest.mark.parametrize("key", sorted(KEYS - {"job.name"}))
def test_every_key_refuses_a_value_of_the_wrong_type_by_name(key):
    """A map where a value is expected, and a number where a map is."""
    group, _, name = key.rpartition(".")
    wrong = 7 if key == "model.architecture" else {"not": "this"}
    job = next(job for job in config.JOBS if group != "job" or name in field_names(job))
    settings = plain(job={"name": job})
    if group:
        settings[group] = settings.get(group, {}) | {name: wrong}
    else:
        settings[name] = wrong
    if key == "job.input":  # Any: the job reads it
        return
    with pytest.raises(ConfigError, match=rf"^{key}: "):
        config.build(settings)


def field_names(job):
    return config.JOBS[job].__dataclass_fields__


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.context_length", 0),
        ("model.dtype", "float16"),
        ("model.load", "lazy"),
        ("pipeline.stages", 0),
        ("pipeline.stages", True),
        ("pipeline.stages", 2.0),
        ("pipeline.max_in_flight", 0),
        ("pipeline.run_ahead", -1),
        ("pipeline.run_ahead", 9),
        ("pipeline.cpu_threads", 0),
        ("pipeline.devices", "gpu"),
        ("pipeline.devices", ["cpu", "cpu"]),
        ("pipeline.devices", ["cuda"]),
        ("pipeline.split", "even"),
        ("pipeline.split", [4, 4]),
        ("pipeline.split", [0]),
        ("pipeline.split", [0, 4]),
        ("plan.devices", 4),
        ("plan.devices", ["RTX 4090", {"memory_gib": 24}]),
        ("plan.output_tokens", 0),
        ("plan.prompt_tokens", 0),
        ("plan.sequences", 0),
        ("plan.max_requests", 0),
        ("cache.memory_gib", 0),
        ("cache.memory_gib", "8"),
        ("cache.memory_share", 0.0),
        ("cache.memory_share", 1.1),
        ("cache.block_size", 0),
        ("cache.block_size", 257),
        ("scheduler.policy", "fifo"),
        ("scheduler.max_sequences", 0),
        ("scheduler.max_tokens_per_plan", 0),
        ("sampling.temperature", -0.1),
        ("sampling.top_p", 0.0),
        ("sampling.top_k", -1),
        ("sampling.min_p", 1.5),
        ("sampling.repetition_penalty", 0.0),
        ("sampling.presence_penalty", 3.0),
        ("sampling.frequency_penalty", float("nan")),
        ("sampling.max_tokens", 0),
        ("coordinator.max_queued_requests", 0),
        ("coordinator.max_queued_bytes", 1024),
        ("coordinator.max_prompt_tokens", 0),
        ("coordinator.max_message_bytes", 1023),
        ("coordinator.max_stop_strings", -1),
        ("coordinator.max_logit_bias_entries", -1),
        ("coordinator.max_unread_messages", 0),
        ("coordinator.start_timeout_s", 0),
        ("shutdown.grace_s", -0.1),
        ("shutdown.grace_s", float("inf")),
        ("shutdown.grace_s", float("nan")),
        ("coordinator.shutdown_grace_s", -1),
        ("job.on_bad_line", "ignore"),
        ("job.max_open_requests", 0),
        ("job.shard", "0/4"),
        ("job.shard", "5/4"),
        ("job.shard", "4"),
        ("job.shard", "a/b"),
        ("handoff", "nccl"),
        ("kernels", "fast"),
        ("log_level", "loud"),
    ],
)
def test_a_bad_value_is_refused_by_name(key, value):
    group, _, name = key.rpartition(".")
    settings = plain()
    if group:
        settings[group] = settings.get(group, {}) | {name: value}
    else:
        settings[name] = value
    with pytest.raises(ConfigError, match=rf"^{key}\b"):
        config.build(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (plain(pipline={}), r"pipline: no such setting; did you mean 'pipeline'"),
        (plain(cache={"blok_size": 1}), r"cache\.blok_size: .* did you mean 'cache.block_size'"),
        (plain(job={"name": "bacth"}), r"job: expected one of batch, .*; did you mean 'batch'"),
        (plain(job="batch"), r"job: expected one of"),
        (plain(job={"name": "chat", "input": "x"}), r"job\.input: no such setting"),
        (plain(model={}), r"model\.path: missing"),
        (plain(model=None), r"model: expected a group of settings"),
    ],
)
def test_unknown_and_missing_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        config.build(settings)
