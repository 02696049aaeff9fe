"""``job=plan`` as a stranger types it: what it prints, stores, refuses, and that it holds."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from ember_pp import __main__ as entry
from ember_pp import __version__
from ember_pp import config as configuration
from ember_pp.coordinator.preparation import prepare
from ember_pp.cost_model import Profile, architecture_key, profile_path
from ember_pp.devices import cpu_device, known_cards
from ember_pp.errors import EXIT_CANNOT_FIT, EXIT_CONFIG, EXIT_OK, ConfigError
from ember_pp.jobs import plan as plan_job
from ember_pp.jobs.plan_workload import make_scheduler, read_trace

RTX_3090 = '{name: "RTX 3090", memory_gib: 24, bandwidth_gbps: 936, tflops: 71}'
PRESETS = ("0.6b", "1.7b", "4b", "8b", "14b", "32b")


@pytest.fixture
def plan(capsys, tmp_path, monkeypatch):
    """Runs the command in this process: (exit code, output, errors)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        folder = f"plan.profile_folder={tmp_path / 'profiles'}"
        code = entry.main(["job=plan", folder, *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def written(path: Path) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(path.read_text())
    return plain


def build(monkeypatch, *arguments: str) -> configuration.Config:
    """What the command line composes to, the job not run."""
    built = []
    with monkeypatch.context() as patch:
        patch.setattr(entry, "_run_job", lambda composed: built.append(composed) or 0)
        assert entry.main(list(arguments)) == EXIT_OK
    plain = entry.OmegaConf.to_container(built[0], resolve=True)
    return configuration.build(plain)  # type: ignore[arg-type]


def test_never_loads_torch_or_asks_the_network(tmp_path) -> None:
    """In a process of its own, with everything that a plan can do but ``profile=true``."""
    code = (
        "import sys, socket\n"
        "socket.socket.connect = None\n"
        "from ember_pp.__main__ import main\n"
        "code = main(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(code)\n"
    )
    arguments = [
        "job=plan",
        "model=qwen3-8b",
        f"plan.devices=[{RTX_3090},{RTX_3090}]",
        "plan.workload=synthetic",
        "plan.sequences=4",
        f"plan.output={tmp_path / 'plan.json'}",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "2 x RTX 3090: 23.6 GiB, 936 GB/s, 71 TFLOPS" in done.stdout


@pytest.mark.parametrize("size", PRESETS)
def test_presets_need_no_files(plan, size) -> None:
    code, out, _ = plan(f"model=qwen3-{size}", "plan.devices=8xRTX 4090", "plan.output=p.json")
    assert code == EXIT_OK
    assert f"{size[:-1]}"[:2] in out.splitlines()[0]
    chosen = written(Path("p.json"))["plan"]
    num_layers = {"0.6b": 28, "1.7b": 28, "4b": 36, "8b": 36, "14b": 40, "32b": 64}[size]
    assert chosen["stages"][0]["layers"][0] == 0
    assert chosen["stages"][-1]["layers"][1] == num_layers
    for stage in chosen["stages"]:
        assert sum(stage["bytes"].values()) == 2 * stage["bytes"]["total"]
        assert stage["bytes"]["total"] <= stage["memory_bytes"]


def test_an_8b_model_on_8_cards_wants_copies(plan) -> None:
    code, out, _ = plan("model=qwen3-8b", f"plan.devices=[{','.join([RTX_3090] * 8)}]")
    assert code == EXIT_OK
    assert "plan: 8 replicas of 1 stage" in out
    listed = out.partition("best layouts of 8 devices\n")[2].splitlines()
    assert "pipeline.replicas=8" in listed[1]
    assert "pipeline.replicas=4" in listed[2]

    code, out, _ = plan("model=qwen3-8b", "plan.devices=8xRTX 3090", "pipeline.stages=8")
    assert code == EXIT_OK
    assert "plan: 8 stages" in out
    assert re.search(r"8 replicas of 1 stage would do better than 8 stages: 1\.\d\dx", out)


def test_a_32b_model_on_4_cards_wants_stages(plan) -> None:
    code, out, _ = plan("model=qwen3-32b", "plan.devices=4xRTX 3090")
    assert code == EXIT_OK
    assert "plan: 4 stages" in out
    assert "would do better" not in out
    assert re.search(r"stage \d \(RTX 3090\) limits", out)


def test_no_more_run_at_once_than_fit(plan) -> None:
    """Exactly: as many as are found are all that fit if so many are asked for, and one more
    is not. The least of memory is left by the stage that is said to limit."""
    given = ["model=qwen3-32b", "plan.devices=4xRTX 3090", "plan.output=p.json"]

    def sequences(wanted: int) -> tuple[int, str]:
        code, out, _ = plan(*given, f"plan.sequences={wanted}")
        assert code == EXIT_OK
        number: int = written(Path("p.json"))["plan"]["sequences"]
        return number, out

    found, out = sequences(256)
    assert 20 < found < 256
    assert f"Of the 256 requests, {found} fit at once" in out
    chosen = written(Path("p.json"))["plan"]
    assert chosen["kv_tokens"] // 768 >= found
    left = [stage["memory_bytes"] - stage["bytes"]["total"] for stage in chosen["stages"]]
    assert left[chosen["limiting_stage"]] == min(left)
    number, out = sequences(found)
    assert (number, "others wait" in out) == (found, False)
    number, out = sequences(found + 1)
    assert (number, "others wait" in out) == (found, True)


def test_unequal_devices_get_unequal_shares(plan) -> None:
    arguments = ("model=qwen3-8b", "pipeline.stages=2", "plan.output=p.json")
    assert plan(*arguments, "plan.devices=[RTX 4090,L4]")[0] == EXIT_OK
    fast, slow = written(Path("p.json"))["plan"]["stages"]
    layers = [end - start for start, end in (fast["layers"], slow["layers"])]
    assert layers[0] > 2 * layers[1]
    assert fast["steady_s"] == pytest.approx(slow["steady_s"], rel=0.15)


def test_unequal_replicas_are_planned_by_the_worst_in_any_order(plan) -> None:
    """The one with the least memory holds the KV cache, the slowest one says how long plans
    take; throughput is the sum."""
    given = ["model=qwen3-8b", "pipeline.stages=1", "pipeline.replicas=2", "plan.sequences=20",
             "plan.output=p.json"]  # fmt: skip

    def planned(*names: str) -> tuple[dict[str, Any], str]:
        code, out, _ = plan(*given, f"plan.devices=[{','.join(names)}]")
        assert code == EXIT_OK
        return written(Path("p.json")), out.partition("\nplan: ")[2].partition("best layouts")[0]

    first, shown = planned("RTX 4090", "A100 40GB")
    again, shown_again = planned("A100 40GB", "RTX 4090")
    assert (first["plan"], first["overrides"]) == (again["plan"], again["overrides"])
    assert shown == shown_again
    (stage,) = first["plan"]["stages"]
    assert (stage["device"], stage["slowest_device"]) == ("RTX 4090", "RTX 4090")
    assert re.search(r"the sum of replicas that are each at their own pace", shown)

    small, _ = planned("RTX 4090", "RTX 4090")
    fast, _ = planned("A100 40GB", "A100 40GB")
    assert first["plan"]["kv_tokens"] == small["plan"]["kv_tokens"] < fast["plan"]["kv_tokens"]
    for name in ("steady_step_s", "decode_step_s", "prompt_s"):
        assert first["plan"][name] == small["plan"][name]
    assert stage["prefill_s"] == small["plan"]["stages"][0]["prefill_s"]
    both = small["plan"]["output_tokens_per_s"], fast["plan"]["output_tokens_per_s"]
    assert both[0] < 0.9 * both[1]
    assert first["plan"]["output_tokens_per_s"] == pytest.approx(sum(both) / 2)

    # Little memory on one, slow memory on the other.
    for names in (("RTX 3090", "A40"), ("A40", "RTX 3090")):
        mixed, shown = planned(*names)
        (stage,) = mixed["plan"]["stages"]
        assert (stage["device"], stage["slowest_device"]) == ("RTX 3090", "A40")
        assert re.search(r"  0 +RTX 3090 +36 \(0-35\)", shown)
        assert re.search(r"  0 +A40 +\d", shown)
        assert "stage 0 (RTX 3090) limits" in shown


def test_replicas_of_stages_are_planned_by_the_worst_in_any_order(plan) -> None:
    given = ["model=qwen3-8b", "pipeline.stages=2", "pipeline.replicas=2", "plan.sequences=40",
             "plan.output_tokens=16", "plan.workload=synthetic", "plan.output=p.json"]  # fmt: skip
    code, out, _ = plan(*given, "plan.devices=[RTX 4090,L4,RTX 3090,RTX 4090]")
    first = written(Path("p.json"))
    assert plan(*given, "plan.devices=[RTX 3090,RTX 4090,RTX 4090,L4]")[0] == code == EXIT_OK
    again = written(Path("p.json"))
    assert again["plan"] == first["plan"]
    assert again["simulation"] == first["simulation"]
    stages = first["plan"]["stages"]
    assert [stage["slowest_device"] for stage in stages] == ["RTX 3090", "L4"]
    assert "(the slowest device of each stage in 2 replicas)" in out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ["model=qwen3-32b", "plan.devices=2xRTX 3090"],
            [r"stage \d of 2 lacks \d+\.\d\d GiB on RTX 3090", r"It fits \d+ of RTX 3090, with"],
        ),
        (
            ["model=qwen3-32b", "plan.devices=8xRTX 3090", "pipeline.stages=2"],
            [r"stages=2: stage \d of 2 lacks", r"These devices hold it with .*pipeline.stages=4"],
        ),
        (
            [
                "model=qwen3-8b",
                "plan.devices=RTX 4080",
                "model.context_length=40000",
                "plan.prompt_tokens=39000",
            ],
            [r"lacks \d+\.\d\d GiB on RTX 4080", r"It fits \d of RTX 4080"],
        ),
        (
            ["model=qwen3-32b", "plan.devices=4xRTX 3090", "pipeline.stages=4",
             "pipeline.split=[1,1,1,61]"],
            [r"stage 3 of 4 lacks .*: 61 layers", r"pipeline.split=\[15,17,17,15\]"],
        ),
        (
            ["model=qwen3-8b", "plan.devices={name: tiny, memory_gib: 0.6, bandwidth_gbps: 9,"
             " tflops: 1}"],
            [r"lacks .* on tiny", r"More of these devices do not help"],
        ),
        (
            ["model=demo", "cache.memory_gib=0.001"],
            [r"the KV cache holds \d+ tokens.* 768; raise cache.memory_gib"],
        ),
    ],
)  # fmt: skip
def test_cannot_fit_is_code_3_and_says_by_how_much(plan, arguments, parts) -> None:
    code, out, err = plan(*arguments)
    assert (code, out) == (EXIT_CANNOT_FIT, "")
    assert err.count("\n") == 1
    for part in parts:
        assert re.search(part, err), err


def test_what_it_says_would_fit_does_and_one_less_does_not(plan) -> None:
    _, _, err = plan("model=qwen3-32b", "plan.devices=L4")
    found = re.search(r"It fits (\d+) of L4, with (pipeline\.stages=\d+)", err)
    assert found is not None, err
    num_stages = int(found[1])
    assert plan("model=qwen3-32b", f"plan.devices={num_stages}xL4", found[2])[0] == EXIT_OK
    less = [f"plan.devices={num_stages - 1}xL4", f"pipeline.stages={num_stages - 1}"]
    assert plan("model=qwen3-32b", *less)[0] == EXIT_CANNOT_FIT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan.devices=RTX 3091"], r"plan.devices: no card 'RTX 3091'.*RTX 3090"),
        (["plan.devices=[{memory_gib: 2}]"], r"plan.devices: expected auto, a card's name"),
        (["plan.sequences=0"], r"plan.sequences: expected at least 1"),
        (["plan.prompt_tokens=5000"], r"plan.prompt_tokens: 5000 .* than the 2048 tokens"),
        (["plan.workload=missing.csv"], r"plan.workload: missing.csv: .*No such file"),
        (["plan.output=no/such/p.json"], r"plan.output: no/such/p.json cannot be written; is"),
        (["plan.output=."], r"plan.output: \. cannot be written"),
        (["pipeline.stages=11"], r"pipeline.stages: 11 stages for a model of 10 layers"),
        (["model.path=/no/such/folder"], r"model.path: no folder /no/such/folder"),
        (["profile=true", "plan.devices=RTX 3090"], r"profile: RTX 3090 is not on this machine"),
    ],
)
def test_mistakes_are_code_2_and_named(plan, arguments, message) -> None:
    code, _, err = plan(*arguments)
    assert code == EXIT_CONFIG
    assert re.search(message, err), err
    assert "Traceback" not in err


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_computed(
    plan, monkeypatch
) -> None:
    def never(*args: object) -> None:
        raise AssertionError("computed first")

    monkeypatch.setattr(plan_job, "read_model", never)
    monkeypatch.setattr(plan_job, "choose_layout", never)
    code, out, err = plan("plan.output=no/such/p.json")
    assert (code, out) == (EXIT_CONFIG, "")
    assert "plan.output: no/such/p.json cannot be written" in err


@pytest.mark.parametrize(
    "given",
    [
        ["model=qwen3-8b", "plan.devices=8xRTX 3090"],
        ["model=qwen3-32b", "plan.devices=4xRTX 3090"],
        ["model=demo", "pipeline.devices=cpu", "pipeline.stages=3", "plan.sequences=30"],
        ["model=demo", "pipeline.devices=cpu", "pipeline.replicas=2", "pipeline.stages=2"],
    ],
)  # fmt: skip
def test_the_overrides_make_the_layout_that_was_planned(plan, monkeypatch, given) -> None:
    """Added to the settings that were given, through Hydra and ``config.build``, to the split
    that a run gets."""
    code, out, _ = plan(*given, "plan.output=p.json")
    assert code == EXIT_OK
    planned = written(Path("p.json"))
    assert " ".join(planned["overrides"]) == out.strip().splitlines()[-1].strip().replace("'", "")
    config = build(monkeypatch, *given, *planned["overrides"], "job=serve")
    chosen = planned["plan"]
    assert config.pipeline.stages == len(chosen["stages"])
    assert config.pipeline.replicas == chosen["replicas"]
    assert config.scheduler.max_sequences == chosen["sequences"]
    if config.model.path == "demo":
        preparation = prepare(config)
        assert [list(layers) for layers in preparation.layer_ranges] == [
            stage["layers"] for stage in chosen["stages"]
        ]
        assert preparation.max_in_flight == chosen["max_in_flight"]


def test_every_layout_that_is_listed_can_be_asked_for(plan, monkeypatch) -> None:
    given = ["model=qwen3-1.7b", "plan.devices=4xL4"]
    plan(*given, "plan.output=p.json")
    for layout in written(Path("p.json"))["best"]:
        assert plan(*given, *layout["overrides"], "plan.output=again.json")[0] == EXIT_OK
        assert written(Path("again.json"))["plan"]["replicas"] == layout["replicas"]
        asked = build(monkeypatch, *given, *layout["overrides"], "job=serve")
        assert (asked.pipeline.replicas, asked.pipeline.stages) == (
            layout["replicas"],
            len(layout["stages"]),
        )


def test_a_checkpoint_folder_is_read_by_its_headers(plan, tiny_checkpoint, tmp_path) -> None:
    devices = ["plan.devices=2xL4", "plan.prompt_tokens=100", "plan.output_tokens=50"]
    code, out, _ = plan(f"model.path={tiny_checkpoint}", *devices)
    assert code == EXIT_OK
    assert "8 layers" in out
    alone = tmp_path / "config only"
    alone.mkdir()
    (alone / "config.json").write_text((tiny_checkpoint / "config.json").read_text())
    assert plan(f"model.path={alone}", *devices)[:2] == (
        code,
        out.replace(str(tiny_checkpoint), str(alone)),
    )
    (alone / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    code, _, err = plan(f"model.path={alone}", *devices)
    assert code == EXIT_CONFIG
    assert "model.embed_tokens.weight" in err


# --------------------------------------------------------------------------------------
# the page


PAGE = (Path(__file__).parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("shown", re.findall(r"^    \$ (.*\n(?:    .*\n|\n(?=    ))*)", PAGE, re.M))
def test_the_page_shows_what_is_printed(plan, shown) -> None:
    command, *lines = shown.splitlines()
    program, *arguments = shlex.split(command)
    assert (program, arguments[0]) == ("./launch.sh", "job=plan")
    _, out, err = plan(*arguments[1:])
    expected = "\n".join(line.removeprefix("    ") for line in lines)
    assert (out + err).strip() == expected.strip()


def test_the_page_has_the_table_of_cards() -> None:
    rows = re.findall(
        r"^\| (.*) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (yes)? *\| (.*) \|$", PAGE, re.M
    )
    assert [(name, float(gib), float(bandwidth), float(flops), bool(ecc), source)
            for name, gib, bandwidth, flops, ecc, source in rows] == [
        (card.name, card.memory_gib, card.bandwidth_gbps, card.tflops, card.has_inline_ecc,
         card.source)
        for card in known_cards()
    ]  # fmt: skip


# --------------------------------------------------------------------------------------
# profiles


@pytest.mark.slow
def test_a_profile_is_measured_stored_and_used(plan, tmp_path) -> None:
    given = ["model=demo", "pipeline.cpu_threads=1", "cache.memory_gib=0.5", "plan.output=p.json"]
    code, out, err = plan(*given, "profile=true")
    assert code == EXIT_OK, err
    (stored,) = (tmp_path / "profiles").iterdir()
    assert str(stored) in out
    assert "one layer, ms by decode rows: 1: " in out
    measured = written(Path("p.json"))["plan"]
    assert all(stage["is_measured"] for stage in measured["stages"])
    assert "times     measured on these devices" in out

    code, _, _ = plan(*given)
    assert code == EXIT_OK
    assert written(Path("p.json"))["plan"] == measured

    # Used, and not only mentioned: with a layer that takes ten times as long, so does a plan.
    slower = written(stored)
    for name in ("layer_decode", "layer_prefill", "head"):
        slower[name] = [[size, 10 * time_s] for size, time_s in slower[name]]
    slower["context_token_s"] *= 10
    slower["plan_overhead_s"] *= 10
    stored.write_text(json.dumps(slower))
    plan(*given)
    for before, after in zip(
        measured["stages"], written(Path("p.json"))["plan"]["stages"], strict=True
    ):
        if before["layers"] == after["layers"]:
            assert after["decode_s"] == pytest.approx(10 * before["decode_s"])

    plan(*given, "plan.use_profile=false")
    assert not written(Path("p.json"))["plan"]["stages"][0]["is_measured"]
    plan(*given, "pipeline.cpu_threads=2")  # measured with one thread
    assert not written(Path("p.json"))["plan"]["stages"][0]["is_measured"]

    stored.write_text("{")
    code, out, err = plan(*given)
    assert code == EXIT_OK
    assert str(stored) in err
    assert "measure again" in err


def write_profile(folder: Path, num_threads: int, layer_s: float, **changes: object) -> None:
    """Of the demo model on this processor: every layer takes as long, whatever it does."""
    cfg = plan_job.read_model(configuration.build({"model": {"path": "demo"}}).model)
    device = cpu_device().name
    profile = Profile(
        model=architecture_key(cfg),
        dtype="float32",
        device=device,
        num_threads=num_threads,
        version=__version__,
        decode_context=128,
        layer_decode=((1, layer_s), (64, layer_s)),
        layer_prefill=((1, 0.0), (512, 0.0)),
        context_token_s=0.0,
        head=((1, 0.0), (64, 0.0)),
        plan_overhead_s=0.0,
    )
    path = profile_path(str(folder), cfg, "float32", device, num_threads, __version__)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(profile.to_plain() | changes))


def test_measured_layouts_are_not_ranked_with_those_at_peak_rates(
    plan, monkeypatch, tmp_path
) -> None:
    """Two stages have two threads each on four cores, and one has four."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(4)))
    given = ["pipeline.devices=cpu", "pipeline.stages=2", "plan.output=p.json"]

    def listed() -> tuple[list[tuple[int, bool]], str]:
        code, out, _ = plan(*given)
        assert code == EXIT_OK
        stored = written(Path("p.json"))
        assert len(stored["plan"]["stages"]) == 2
        best = [(len(one["stages"]), one["stages"][0]["is_measured"]) for one in stored["best"]]
        return best, out

    write_profile(tmp_path / "profiles", 2, layer_s=1.0)  # far slower than at peak rates
    best, out = listed()
    assert best == [(2, True), (1, False)]
    assert re.search(r"  2 stages  measured .*\n  1 stage   at peak rates ", out)
    assert "do not compare" in out
    assert "would do better" not in out

    write_profile(tmp_path / "profiles", 4, layer_s=0.1)
    best, out = listed()
    assert best == [(1, True), (2, True)]
    assert "at peak rates" not in out
    assert re.search(r"1 stage would do better than 2 stages: \d", out)

    # The one that was asked for is not measured: it comes first, with what compares to it.
    (tmp_path / "profiles").rename(tmp_path / "old")
    write_profile(tmp_path / "profiles", 4, layer_s=1e-9)
    best, out = listed()
    assert best == [(2, False), (1, True)]
    assert "do not compare" in out
    assert "would do better" not in out


def test_layouts_are_ranked_among_their_kind() -> None:
    """By tokens/s; what is within a percent of the best of its kind, by fewer stages."""

    def layout(is_measured: bool, num_stages: int, output_tokens_per_s: float) -> Any:
        return types.SimpleNamespace(
            is_measured=is_measured,
            stages=[None] * num_stages,
            output_tokens_per_s=output_tokens_per_s,
        )

    order = [
        layout(True, 2, 99.5),
        layout(True, 4, 100.0),
        layout(True, 1, 90.0),
        layout(False, 1, 1000.0),
        layout(False, 8, 50.0),
        layout(False, 2, 40.0),
    ]
    assert plan_job.rank(order[::-1]) == order


def test_what_no_profile_measured_is_said_to_be_extrapolated(plan, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(4)))
    write_profile(tmp_path / "profiles", 2, layer_s=1.0)
    given = ["pipeline.devices=cpu", "pipeline.stages=2"]

    def times_line(*more: str) -> str:
        code, out, _ = plan(*given, *more)
        assert code == EXIT_OK
        (line,) = re.findall(r"^times +(.*)$", out, re.M)
        return line

    assert times_line("plan.sequences=128") == "measured on these devices"
    assert times_line("plan.sequences=256") == (
        "measured on these devices; extrapolated for plans of 128 decodes (measured up to 64)"
    )
    assert times_line("plan.sequences=256", "scheduler.max_tokens_per_plan=1024") == (
        "measured on these devices; extrapolated for plans of 128 decodes (measured up to 64) "
        "and of 1024 prompt tokens (measured up to 512)"
    )


def test_a_profile_that_is_no_map_is_a_warning(plan, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(4)))
    write_profile(tmp_path / "profiles", 2, layer_s=1.0)
    (stored,) = (tmp_path / "profiles").iterdir()
    stored.write_text("[1, 2]")
    code, out, err = plan("pipeline.devices=cpu", "pipeline.stages=2")
    assert code == EXIT_OK
    assert "times     the least possible" in out
    assert f"profile not used: {stored}: expected a map" in err


# --------------------------------------------------------------------------------------
# workloads


def write_trace(path: Path, rows: list[tuple[str, object, object]]) -> None:
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    with opener(path, "wt", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["TIMESTAMP", "ContextTokens", "GeneratedTokens"])
        writer.writerows(rows)


def test_a_trace_is_read_in_order_of_time(tmp_path) -> None:
    path = tmp_path / "trace.csv.xz"
    write_trace(
        path,
        [
            ("2023-11-16 18:15:46.6805900", 374, 44),
            ("2023-11-16 18:15:50.9951690", 396, 109),
            ("2023-11-16 18:15:47.0000000", 5, 6),
            ("2023-11-16 18:15:48.0000000", 0, 6),  # no prompt
        ],
    )
    arrivals = read_trace(path)
    assert [(one.num_prompt_tokens, one.num_output_tokens) for one in arrivals] == [
        (374, 44),
        (5, 6),
        (396, 109),
    ]
    assert [one.time_s for one in arrivals] == pytest.approx([0.0, 0.31941, 4.314579], abs=1e-5)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("0,3,4\n1,x,4", r"line 3: ContextTokens: expected a whole number, got 'x'$"),
        ("0,3,4.5", r"line 2: GeneratedTokens: expected a whole number, got '4\.5'$"),
        ("noon,3,4", r"line 2: TIMESTAMP: expected seconds, or a date and time, got 'noon'$"),
        ("nan,3,4", r"line 2: TIMESTAMP: expected seconds"),
        (99 * "n" + ",3,4", r"line 2: TIMESTAMP: .*'n{60}\.\.\.'$"),
        ("0,3", r"line 2: GeneratedTokens: missing$"),
        ("0,3," + 200_000 * "4", r"field larger than field limit"),
    ],
)
def test_a_damaged_trace_is_named_by_line_and_column(tmp_path, rows, message) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{rows}\n")
    with pytest.raises(ConfigError, match=rf"^plan\.workload: {path}: {message}"):
        read_trace(path)


def test_a_trace_without_a_column_is_named(tmp_path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match=r"trace.csv: no column TIMESTAMP"):
        read_trace(path)


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_a_damaged_archive_is_named(plan, tmp_path, suffix) -> None:
    path = tmp_path / f"trace.csv{suffix}"
    write_trace(path, [(f"{second}", 100 + second % 7, 20) for second in range(2000)])
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes(byte ^ 0xFF for byte in whole[middle:-8]) + whole[-8:]
    for damaged in (whole[:middle], flipped, b"TIMESTAMP,ContextTokens,GeneratedTokens\n"):
        path.write_bytes(damaged)
        code, _, err = plan("plan.workload=" + path.name)
        assert code == EXIT_CONFIG
        assert err.startswith(f"ember-pp: plan.workload: {path.name}: "), err
        assert err.count("\n") == 1


def test_a_trace_is_simulated(plan, tmp_path) -> None:
    write_trace(
        tmp_path / "trace.csv",
        [(str(second / 10), 100 + second % 7, 20 + second % 5) for second in range(60)]
        + [("6.5", 41_000, 10)],
    )
    arguments = ["model=qwen3-32b", "plan.devices=4xRTX 3090", "plan.workload=trace.csv"]
    code, out, _ = plan(*arguments, "plan.output=p.json")
    assert code == EXIT_OK
    assert "simulated: trace.csv, 60 requests" in out
    assert "1 requests left out: longer than the KV cache or the context" in out
    simulation = written(Path("p.json"))["simulation"]
    report = simulation["one_replica"]
    assert report["num_output_tokens"] == sum(20 + second % 5 for second in range(60))
    assert report["num_requests"] == 60
    assert len(report["bubbles"]) == 4
    assert 0 < report["ttft_s"]["50"] <= report["ttft_s"]["99"]
    # A request is at least as long as its plans, one after the other, at peak rates.
    decode_s = (
        sum(stage["bytes"]["layers"] for stage in written(Path("p.json"))["plan"]["stages"]) / 936e9
    )
    assert report["tpot_s"]["50"] >= decode_s
    assert simulation["output_tokens_per_s"] == pytest.approx(
        report["num_output_tokens"] / report["makespan_s"]
    )

    plan(*arguments, "plan.output=p.json", "plan.max_requests=10")
    assert written(Path("p.json"))["simulation"]["one_replica"]["num_requests"] == 10


def test_of_replicas_one_is_simulated_with_its_share(plan) -> None:
    code, out, _ = plan(
        "model=qwen3-8b", "plan.devices=2xRTX 4090", "pipeline.replicas=2", "plan.sequences=8",
        "plan.output_tokens=16", "plan.workload=synthetic", "plan.output=p.json",
    )  # fmt: skip
    assert code == EXIT_OK
    simulation = written(Path("p.json"))["simulation"]
    assert simulation["one_replica"]["num_requests"] == 16  # of 4 x 8
    assert simulation["output_tokens_per_s"] == pytest.approx(
        2 * simulation["one_replica"]["output_tokens_per_s"]
    )
    assert "(one of 2 replicas)" in out


def times_of_the_simulated(config: configuration.Config):
    """What the scheduler of a simulation takes plans to last, and the prediction."""
    cfg = plan_job.read_model(config.model)
    chosen, _ = plan_job.choose_layout(config, cfg, plan_job.choose_plan_devices(config))
    return make_scheduler(config, chosen)._plan_time_s, chosen


def test_a_simulated_scheduler_knows_no_times_that_a_run_does_not(monkeypatch, tmp_path) -> None:
    given = ["model=demo", "pipeline.devices=cpu", "pipeline.stages=2"]
    given.append(f"plan.profile_folder={tmp_path}")
    assert prepare(build(monkeypatch, *given, "job=serve")).plan_cost is None
    plan_time_s, _ = times_of_the_simulated(build(monkeypatch, *given, "job=plan"))
    assert plan_time_s is None


def test_a_simulated_scheduler_times_plans_by_the_slowest_stage(monkeypatch) -> None:
    given = ["model=qwen3-8b", "plan.devices=2xRTX 4090", "pipeline.stages=2"]
    plan_time_s, chosen = times_of_the_simulated(build(monkeypatch, *given, "job=plan"))
    slowest = max(chosen.stages, key=lambda stage: stage.steady_s)
    assert plan_time_s.__self__ == slowest.cost


def test_none_of_the_requests_fits(plan, tmp_path) -> None:
    write_trace(tmp_path / "trace.csv", [("0", 50_000, 10)])
    code, _, err = plan("model=qwen3-8b", "plan.devices=L4", "plan.workload=trace.csv")
    assert code == EXIT_CONFIG
    assert "plan.workload: trace.csv: none of 1 requests fits" in err


def test_64_stages_are_planned_and_simulated(plan) -> None:
    code, out, _ = plan(
        "model=qwen3-32b", "plan.devices=64xRTX 3090", "pipeline.stages=64", "plan.sequences=64",
        "plan.prompt_tokens=32", "plan.output_tokens=8", "plan.workload=synthetic",
        "plan.output=p.json",
    )  # fmt: skip
    assert code == EXIT_OK
    assert len(written(Path("p.json"))["simulation"]["one_replica"]["bubbles"]) == 64
    assert "256 requests" in out
