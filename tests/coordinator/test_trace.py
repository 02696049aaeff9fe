"""A trace: what is kept, what the JSON says, what the picture shows; from times made by hand."""

import collections
import dataclasses
import io
import json
import xml.etree.ElementTree as ElementTree

import pytest

from ember_pp import config as configuration
from ember_pp.coordinator import drawing as drawing_module
from ember_pp.coordinator import gantt
from ember_pp.coordinator.drawing import Drawing, Line, Rectangle, Words
from ember_pp.coordinator.plan import Chunk, Plan
from ember_pp.coordinator.trace import (
    BUSY,
    HOST_GAP,
    IDLE,
    WAIT_INPUT,
    WAIT_OUTPUT,
    TraceLog,
    timeline,
)
from ember_pp.coordinator.trace_events import write_events
from ember_pp.coordinator.trace_output import check_trace
from ember_pp.errors import ConfigError
from ember_pp.protocol import StageTrace, pack_i64
from ember_pp.stage.timing import StageState

EPOCH = 3
MS = 1_000_000
BASE_NS = 7_000_000_000_123  # nanoseconds that a float of microseconds has to keep


def make_plan(number, *, num_decodes=2, prefill=(), feedback=-1):
    """Plan ``number`` of two micro-batches; ``prefill`` are the lengths of its chunks."""
    chunks = [Chunk(None, 0, 0, range(length), False) for length in prefill]
    return Plan(
        number,
        number % 2,
        [],
        decodes=[None] * num_decodes,
        feedback=feedback,
        chunks=chunks,
    )


def make_trace(stage_index, plans, waits=(), epoch=EPOCH):
    """A batch of one stage, times in ms after ``BASE_NS``; 0 stays 0."""

    def at(ms):
        return BASE_NS + round(ms * MS) if ms else 0

    packed_plans = [(plan, *map(at, times)) for plan, *times in plans]
    packed_waits = [(state, at(start), at(end)) for state, start, end in waits]
    return StageTrace(
        epoch,
        stage_index,
        pack_i64([value for fields in packed_plans for value in fields]),
        pack_i64([value for fields in packed_waits for value in fields]),
    )


@pytest.fixture
def log():
    """Two stages, three plans: a prefill, a mixed one, and a decode that needs its tokens."""
    log = TraceLog(0, 2, max_plans=100)
    log.issue(make_plan(0, num_decodes=0, prefill=(5, 3)), EPOCH)
    log.issue(make_plan(1, num_decodes=1, prefill=(4,), feedback=0), EPOCH)
    log.issue(make_plan(2, feedback=0), EPOCH)
    for number in range(2):
        log.returned(number, EPOCH)
    # plan, came, input there, handed on, done
    log.add(
        make_trace(
            0,
            [(0, 10, 0, 14, 15), (1, 15.5, 19.5, 24, 24), (2, 24, 24.1, 28, 29)],
            [(IDLE, 1, 10), (HOST_GAP, 15, 15.5), (WAIT_INPUT, 16, 19.5), (WAIT_OUTPUT, 27, 27.5)],
        )
    )
    log.add(make_trace(1, [(0, 10.2, 14.1, 19, 19.2)], [(IDLE, 1, 10.2), (WAIT_INPUT, 10.3, 14)]))
    log.add(make_trace(1, [(1, 19.2, 24.2, 30, 31)], [(WAIT_INPUT, 19.3, 24.1)]))
    return log


def ms(time_ns):
    return (time_ns - BASE_NS) / MS


def test_states_are_those_of_the_stage():
    assert {state.name: state.value for state in StageState} == {
        "BUSY": BUSY,
        "WAIT_INPUT": WAIT_INPUT,
        "WAIT_OUTPUT": WAIT_OUTPUT,
        "HOST_GAP": HOST_GAP,
        "IDLE": IDLE,
    }


def test_a_slice_starts_when_its_input_is_there(log):
    first, last = timeline([log]).rows
    slices = [(plan.facts.number, ms(plan.start_ns), ms(plan.end_ns)) for plan in first.plans]
    assert slices == [(0, 10, 15), (1, 19.5, 24), (2, 24, 29)]
    slices = [(plan.facts.number, ms(plan.start_ns), ms(plan.end_ns)) for plan in last.plans]
    assert slices == [(0, 14, 19.2), (1, 24.1, 31)]


def test_what_a_plan_does_before_it_waits_is_shown_too(log):
    first, last = timeline([log]).rows
    prepared = [(ms(plan.came_ns), ms(plan.paused_ns)) for plan in [*first.plans, *last.plans]]
    assert prepared == [(10, 10), (15.5, 16), (24, 24), (10.2, 10.3), (19.2, 19.3)]
    found = [(e["name"], e["dur"]) for e in events_of(log) if e.get("cat") == "inputs"]
    assert found == [("inputs of 1", 500), ("inputs of 0", 100), ("inputs of 1", 100)]


def test_kinds_and_counts_are_those_of_the_plan(log):
    plans = log.facts()
    assert [plan.kind for plan in plans] == ["prefill", "mixed", "decode"]
    assert [plan.num_sequences for plan in plans] == [2, 2, 2]
    assert [plan.num_prefill_tokens for plan in plans] == [8, 4, 0]
    assert [bool(plan.returned_ns) for plan in plans] == [True, True, False]


def test_shares_of_a_window_add_up_and_leave_idleness_out(log):
    row = timeline([log]).rows[0]
    shares = row.shares(BASE_NS + 5 * MS, BASE_NS + 25 * MS)
    # 20 ms, of which 5 are idle, 0.5 a host gap, 3.5 a wait for input.
    assert shares == pytest.approx(
        {WAIT_INPUT: 3.5 / 15, WAIT_OUTPUT: 0.0, HOST_GAP: 0.5 / 15, BUSY: 11 / 15}
    )
    assert sum(row.shares(BASE_NS, BASE_NS + 100 * MS).values()) == pytest.approx(1)
    # Nothing is known after the end of plan 2, at 29 ms.
    assert row.shares(BASE_NS + 28 * MS, BASE_NS + 99 * MS)[BUSY] == 1.0
    assert set(row.shares(BASE_NS + 50 * MS, BASE_NS + 99 * MS).values()) == {0.0}


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_memory_is_bounded_and_the_newest_plans_are_kept(batch_size):
    log = TraceLog(0, 1, max_plans=10)
    for start in range(0, 105, batch_size):
        numbers = range(start, start + batch_size)
        for number in numbers:
            log.issue(make_plan(number), EPOCH)
            log.returned(number, EPOCH)
        plans = [(number, 2 * number + 1, 0, 0, 2 * number + 2) for number in numbers]
        waits = [(HOST_GAP, 2 * number + 0.5, 2 * number + 1) for number in numbers]
        log.add(make_trace(0, plans, waits))
        assert sum(len(batch.plans) for batch in log._batches[0]) <= 40 * (10 + batch_size)
        assert len(log._returned_ns) <= 10
    [row] = timeline([log]).rows
    newest = numbers[-1]
    assert [plan.facts.number for plan in row.plans] == list(range(newest - 9, newest + 1))
    assert len(row.waits) == 10


def test_plans_of_different_epochs_are_not_confused():
    log = TraceLog(0, 1, max_plans=10)
    log.issue(make_plan(0, num_decodes=0, prefill=(1,)), 0)
    log.issue(make_plan(0), 1)
    log.add(make_trace(0, [(0, 1, 0, 0, 2)], epoch=0))
    log.add(make_trace(0, [(0, 3, 0, 0, 4)], epoch=1))
    [row] = timeline([log]).rows
    assert [plan.facts.kind for plan in row.plans] == ["prefill", "decode"]


# ------------------------------------------------------------------ JSON


def events_of(*logs):
    stream = io.StringIO()
    write_events(timeline(list(logs)), {"model": 'a "quoted" name'}, stream)
    document = json.loads(stream.getvalue())
    assert document["otherData"] == {"model": 'a "quoted" name'}
    return document["traceEvents"]


def test_an_event_per_plan_and_wait(log):
    events = events_of(log)
    names = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event["name"] == "thread_name"
    }
    found = collections.defaultdict(list)
    for event in events:
        if event["ph"] == "X" and event["cat"] != "inputs":
            found[names[event["pid"], event["tid"]]].append((event["name"], event["cat"]))
    assert found == {
        "stage 0": [("prefill 0", "prefill"), ("mixed 1", "mixed"), ("decode 2", "decode")],
        "stage 1": [("prefill 0", "prefill"), ("mixed 1", "mixed")],
        "stage 0 waits": [
            (name, "wait") for name in ("idle", "host gap", "wait for input", "wait for a slot")
        ],
        "stage 1 waits": [("idle", "wait"), ("wait for input", "wait"), ("wait for input", "wait")],
    }
    colours = {event["cat"]: event["cname"] for event in events if "cname" in event}
    assert len(set(colours.values())) == len(colours) == 3


def test_times_are_exact_to_the_nanosecond(log):
    stream = io.StringIO()
    write_events(timeline([log]), {}, stream)
    assert f'"ts":{(BASE_NS + 10 * MS) // 1000}.123,"dur":5000.000' in stream.getvalue()


def test_arguments_of_a_plan(log):
    [event] = [event for event in events_of(log) if event["name"] == "mixed 1"][:1]
    assert event["args"] == {
        "plan": 1,
        "micro-batch": 1,
        "decodes": 1,
        "prefill tokens": 4,
        "sequences": 2,
    }


def arrows_of(events):
    """``(name, (sender row, ts), (receiver row, ts))`` by flow id."""
    ends = collections.defaultdict(dict)
    for event in events:
        if event["ph"] in "sf":
            assert (event["ph"] == "f") == (event.get("bp") == "e")
            ends[event["id"]][event["ph"]] = event
    assert all(set(pair) == {"s", "f"} for pair in ends.values())
    return [
        (
            pair["s"]["name"],
            (pair["s"]["tid"], pair["s"]["ts"]),
            (pair["f"]["tid"], pair["f"]["ts"]),
        )
        for pair in ends.values()
    ]


def test_arrows_go_from_the_moment_of_sending_to_that_of_receiving(log):
    def at(time_ms):
        return pytest.approx((BASE_NS + time_ms * MS) / 1000, abs=0.001)

    first, last = 2, 4
    assert arrows_of(events_of(log)) == [
        ("hand-off", (first, at(14)), (last, at(14.1))),
        ("hand-off", (first, at(24)), (last, at(24.2))),
        ("feedback", (last, at(19)), (first, at(19.5))),
        ("feedback", (last, at(19)), (first, at(24.1))),
    ]


def test_the_coordinator_row_counts_plans_in_flight(log):
    events = events_of(log)
    counts = [event["args"]["plans"] for event in events if event["ph"] == "C"]
    assert counts == [1, 2, 3, 2, 1]
    instants = [(event["cat"], event["args"]["plan"]) for event in events if event["ph"] == "i"]
    assert instants == [("issue", 0), ("issue", 1), ("issue", 2), ("return", 0), ("return", 1)]


def test_replicas_are_processes_of_their_own(log):
    other = TraceLog(1, 2, max_plans=100)
    other.issue(make_plan(0), EPOCH)
    other.add(make_trace(0, [(0, 10, 0, 14, 15)]))
    other.add(make_trace(1, [(0, 10, 14.5, 19, 20)]))
    events = events_of(log, other)
    assert {event["pid"] for event in events} == {0, 1}
    ids = [event["id"] for event in events if event["ph"] == "s"]
    assert len(ids) == len(set(ids)) == 5
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert processes == {0: "ember-pp, replica 0", 1: "ember-pp, replica 1"}


def test_a_trace_of_nothing_is_valid():
    assert events_of(TraceLog(0, 2, max_plans=1))[0]["ph"] == "M"


# ------------------------------------------------------------------ picture


CAPTIONS = gantt.Captions(title="a <model>", conditions="conditions", rows=["cpu", "cpu"])


def steady_log(num_plans=200, num_stages=2):
    """One plan after the other on each stage, 2 ms each, without a gap."""
    log = TraceLog(0, num_stages, max_plans=1000)
    for number in range(num_plans):
        log.issue(make_plan(number), EPOCH)
    for stage in range(num_stages):
        plans = [
            (n, 10 + 2 * (n + stage), 0, 11.9 + 2 * (n + stage), 12 + 2 * (n + stage))
            for n in range(num_plans)
        ]
        log.add(make_trace(stage, plans))
    return log


def test_a_short_run_is_shown_whole(log):
    assert gantt.choose_window(timeline([log]), None) == (BASE_NS + 10 * MS, BASE_NS + 31 * MS)
    assert gantt.choose_window(timeline([log]), 5.0) == (BASE_NS + 10 * MS, BASE_NS + 31 * MS)


def test_of_a_long_run_the_middle_is_shown():
    steady = timeline([steady_log()])
    start_ns, end_ns = gantt.choose_window(steady, None)
    assert (ms(start_ns), ms(end_ns)) == (10 + 2 * 76, 10 + 2 * 124)
    start_ns, end_ns = gantt.choose_window(steady, 0.02)
    assert (ms(start_ns), ms(end_ns)) == (200, 220)


def test_plans_are_drawn_where_and_as_long_as_they_were(log):
    drawing = gantt.draw(timeline([log]), CAPTIONS, None)
    plans = [shape for shape in drawing.shapes if isinstance(shape, Rectangle) and shape.title]
    assert [shape.title.partition(",")[0] for shape in plans] == [
        *("plan 0", "plan 1", "plan 2", "plan 0", "plan 1")
    ]
    scale = 1100 / 21  # the run takes 21 ms
    for shape, (start, end) in zip(
        plans, [(10, 15), (19.5, 24), (24, 29), (14, 19.2), (24.1, 31)], strict=True
    ):
        assert shape.x == pytest.approx(150 + (start - 10) * scale)
        assert shape.width == pytest.approx((end - start) * scale)
    assert [shape.fill for shape in plans[:3]] == ["#e08a1e", "#5b9a52", "#2f6fb2"]
    assert len({shape.y for shape in plans}) == 2


def test_the_bubble_of_each_stage_is_written_at_its_right(log):
    traced = timeline([log])
    words = [s.text for s in gantt.draw(traced, CAPTIONS, None).shapes if isinstance(s, Words)]
    for row in traced.rows:
        bubble = 1 - row.shares(*traced.window_ns)[BUSY]
        assert f"{bubble:.1%}" in words
    assert {"stage 0", "stage 1", "a <model>", "prefill", "decode", "mixed"} <= set(words)


def test_a_picture_of_many_plans_stays_small():
    drawing = gantt.draw(timeline([steady_log(num_plans=900)]), CAPTIONS, 60.0)
    assert len(drawing.shapes) < 4000
    many = timeline([steady_log(num_plans=900)])
    start_ns, end_ns = many.window_ns
    assert gantt.choose_window(many, 60.0) == (start_ns, end_ns)


def test_the_svg_is_well_formed_and_escaped(log):
    svg = gantt.draw(timeline([log]), CAPTIONS, None).to_svg()
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "a <model>" in texts


def test_a_picture_of_nothing_says_so():
    drawing = gantt.draw(timeline([TraceLog(0, 2, max_plans=1)]), CAPTIONS, None)
    assert "No plan was traced." in drawing.to_svg()


def test_a_png_shows_the_same_shapes():
    image_module = pytest.importorskip("PIL.Image")
    drawing = Drawing(40, 20)
    drawing.add(Rectangle(10, 5, 10, 10, "#ff0000"), Line(0, 0, 40, 0, "#00ff00", 2))
    drawing.add(Words(25, 15, "x", 8))
    stream = io.BytesIO()
    drawing.write_png(stream)
    image = image_module.open(stream)
    assert image.size == (80, 40)
    assert [image.getpixel(at) for at in [(20, 10), (39, 29), (40, 20), (19, 10)]] == [
        *((255, 0, 0), (255, 0, 0), (255, 255, 255), (255, 255, 255))
    ]
    assert image.getpixel((70, 0)) == (0, 255, 0)


# ------------------------------------------------------------------ settings


def make_config(**trace):
    return configuration.build({"model": {"path": "demo"}, "trace": trace})


@pytest.mark.parametrize("key", ["output", "picture"])
def test_a_file_that_cannot_be_written_is_refused_at_the_start(tmp_path, key):
    check_trace(make_config(**{key: str(tmp_path / "run.svg")}))
    missing = str(tmp_path / "no" / "run.svg")
    with pytest.raises(ConfigError, match=rf"trace\.{key}: {missing}"):
        check_trace(make_config(**{key: missing}))


def test_png_without_pillow_is_refused_and_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("ember_pp.coordinator.trace_output.has_pillow", lambda: False)
    check_trace(make_config(picture=str(tmp_path / "run.svg")))
    with pytest.raises(ConfigError, match=r"ember-pp\[picture\]"):
        check_trace(make_config(picture=str(tmp_path / "run.png")))


def test_pillow_is_looked_for_without_being_loaded(monkeypatch):
    monkeypatch.setattr(drawing_module.importlib.util, "find_spec", lambda name: None)
    assert not drawing_module.has_pillow()


@pytest.mark.parametrize(
    ("changes", "is_on"), [({}, False), ({"output": "x"}, True), ({"picture": "x.svg"}, True)]
)
def test_tracing_is_on_when_somebody_wants_a_file(changes, is_on):
    assert dataclasses.replace(configuration.TraceSettings(), **changes).is_on is is_on
