"""The progress line and the closing table, to the letter."""

import io

import pytest

from ember_pp.jobs.progress import (
    Progress,
    Tally,
    closing_table,
    duration,
    loading_line,
    running_line,
)


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


def make(is_terminal, num_total=100):
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream, num_total=num_total, clock=clock, is_terminal=is_terminal)
    return progress, stream, clock


def test_a_log_gets_a_line_every_ten_seconds():
    progress, stream, clock = make(is_terminal=False)
    for tenths in range(0, 251, 5):
        clock.now_s = 100.0 + tenths / 10
        progress.show_running(Tally(num_ok=tenths // 5), num_open=3)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["0/100", "20/100", "40/100"]
    assert "\r" not in stream.getvalue()


def test_a_terminal_has_one_line_that_changes_and_notes_that_stay(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    progress, stream, clock = make(is_terminal=True)
    progress.show_loading({"phase": "loading", "stages": []})
    clock.now_s += 0.1
    progress.show_loading({"phase": "too soon"})
    clock.now_s += 0.15
    progress.show_running(Tally(), num_open=3)
    progress.note("a note")
    progress.show_running(Tally(num_ok=100), num_open=0, is_final=True)
    progress.close()
    assert stream.getvalue() == (
        "\rloading ...\x1b[K\r0/100 done, 3 open\x1b[K\na note\n\r100/100 done, 0 ope\x1b[K\n"
    )


def test_a_closed_stream_does_not_end_the_job():
    progress, stream, _ = make(is_terminal=False)
    stream.close()
    progress.show_running(Tally(), num_open=0)
    progress.note("gone")
    progress.close()


def test_rate_and_time_left_count_from_when_requests_ran():
    progress, stream, clock = make(is_terminal=False)
    clock.now_s += 1000.0  # loading
    progress.show_running(Tally(), num_open=5)
    clock.now_s += 10.0
    progress.show_running(Tally(num_ok=19, num_failed=1, num_output_tokens=5000), num_open=5)
    assert stream.getvalue().splitlines()[-1] == (
        "20/100 done, 1 failed, 5 open, 500 tokens/s, 40 s left"
    )


def test_loading_names_stages_phases_and_sizes():
    stages = [
        {"stage_index": 0, "phase": "weights", "num_done": 1.2e9, "num_total": 4e9},
        {"stage_index": 1, "phase": "weights", "num_done": 2e6, "num_total": 5e6},
        {"stage_index": 2, "phase": "starting", "num_done": 0, "num_total": 0},
    ]
    assert loading_line({"phase": "loading", "stages": stages}) == (
        "loading: stage 0 weights 1.2/4.0 GB, stage 1 weights 2.0/5.0 MB, stage 2 starting"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (250, "4 min 10 s"),
        (12_000, "3 h 20 min"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_line_before_anything_is_done_has_no_rate():
    assert running_line(Tally(), 1200, 64, 5.0) == "0/1,200 done, 64 open"


def test_the_closing_table():
    tally = Tally(
        num_ok=1998,
        num_failed=2,
        num_prompt_tokens=12_345,
        num_cached_tokens=1024,
        num_output_tokens=67_890,
    )
    stage = {"device": "cuda:0", "weight_bytes": 2.5e9, "kv_bytes": 4e9, "peak_bytes": 7e9}
    stage |= {"busy_fraction": 0.915, "wait_input_fraction": 0.06}
    stage |= {"wait_output_fraction": 0.0, "host_gap_fraction": 0.025}
    stages = [
        stage | {"stage_index": 0, "start_layer": 0, "end_layer": 20},
        {"stage_index": 1, "device": "cpu", "start_layer": 20, "end_layer": 36},
    ]
    text = closing_table(
        tally,
        num_answered_before=10,
        num_left=5,
        loading_s=3.25,
        elapsed_s=20.0,
        files={"answers": "out.jsonl", "errors": "out.errors.jsonl"},
        status={"stages": stages},
    )
    assert text.splitlines() == [
        "requests  1,998 answered, 2 failed, 10 answered by an earlier run, 5 left",
        "tokens    12,345 prompt (1,024 from the prefix cache), 67,890 output",
        "time      20 s after 3.2 s of loading, 3,394.5 output tokens/s",
        "answers   out.jsonl",
        "errors    out.errors.jsonl",
        "",
        "stage  device  layers  weights MB    KV MB  peak MB   busy  no input  no slot  no plan",
        "    0  cuda:0    0-19     2,500.0  4,000.0  7,000.0  91.5%      6.0%     0.0%     2.5%",
        "    1     cpu   20-35           -        -        -      -         -        -        -",
    ]
