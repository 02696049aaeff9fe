"""The Prometheus endpoint: valid text, numbers of now, a loop that is never kept waiting."""

import http.client
import re
import select
import socket
import threading
import time
import urllib.error
import urllib.request

import pytest

from ember_pp.coordinator import metrics as metrics_module
from ember_pp.coordinator.metrics import MetricsServer, render
from ember_pp.errors import ConfigError

STAGE = {
    "replica": 0,
    "stage_index": 0,
    "plan": 41,
    "busy_ns": 1_500_000_001,
    "wait_input_ns": 2,
    "wait_output_ns": 3,
    "host_gap_ns": 4,
    "idle_ns": 5,
    "weight_bytes": 100,
    "kv_bytes": 200,
    "peak_bytes": 300,
}
STATUS = {
    "version": "1.2.3",
    "phase": "ready",
    "model": {"path": 'a "b"\\c\nd', "model_type": "qwen3"},
    "open_requests": 7,
    "finished_requests": 8,
    "num_plans": 42,
    "num_running": 6,
    "num_waiting": 1,
    "num_in_flight": 3,
    "num_blocks": 100,
    "num_free_blocks": 60,
    "num_cached_blocks": 20,
    "num_restarts": 3,
    "num_preemptions": 2,
    "num_prompt_tokens": 1000,
    "num_prefix_hit_tokens": 300,
    "num_output_tokens": 555,
    "num_refused_connections": 9,
    "num_refused_messages": 10,
    "num_dropped_clients": 11,
    "stages": [STAGE, STAGE | {"stage_index": 1}],
}
LOADING = {
    "version": "1.2.3",
    "phase": "loading",
    "model": {"path": None, "model_type": "qwen3"},
    "open_requests": 0,
    "stages": [{"replica": 0, "stage_index": 0}],
}

_LABEL = r'[a-z_]+="(?:[^"\\\n]|\\\\|\\"|\\n)*"'
_SAMPLE = re.compile(rf"(ember_pp_[a-z_]+)(\{{{_LABEL}(?:,{_LABEL})*\}})? ([0-9.e+-]+)")


def parse(page):
    """Samples by name and labels; asserts the rules of text format 0.0.4 that we use."""
    samples, kinds, last = {}, {}, ""
    assert page.endswith("\n")
    for line in page.splitlines():
        if line.startswith("# "):
            _, what, name, rest = line.split(" ", 3)
            assert what in ("HELP", "TYPE")
            if what == "TYPE":
                assert name not in kinds
                kinds[name] = rest
            last = name
            continue
        match = _SAMPLE.fullmatch(line)
        assert match is not None, line
        name, labels, value = match.groups()
        assert name == last, "the samples of a family stand together, below its TYPE"
        assert (name, labels) not in samples
        samples[name, labels] = float(value)
    assert {name for name, _ in samples} <= set(kinds)
    for name, kind in kinds.items():
        assert (kind == "counter") == name.endswith("_total"), name
    return samples


def test_every_number_is_on_the_page():
    samples = parse(render(STATUS))
    plain = {name: value for (name, labels), value in samples.items() if labels is None}
    assert plain == {
        "ember_pp_ready": 1,
        "ember_pp_requests_open": 7,
        "ember_pp_requests_finished_total": 8,
        "ember_pp_sequences_running": 6,
        "ember_pp_sequences_waiting": 1,
        "ember_pp_plans_in_flight": 3,
        "ember_pp_plans_total": 42,
        "ember_pp_blocks": 100,
        "ember_pp_blocks_free": 60,
        "ember_pp_blocks_cached": 20,
        "ember_pp_restarts_total": 3,
        "ember_pp_preemptions_total": 2,
        "ember_pp_prompt_tokens_total": 1000,
        "ember_pp_prefix_hit_tokens_total": 300,
        "ember_pp_output_tokens_total": 555,
        "ember_pp_connections_refused_total": 9,
        "ember_pp_messages_refused_total": 10,
        "ember_pp_clients_dropped_total": 11,
    }
    seconds = {
        labels: value for (name, labels), value in samples.items() if "stage_seconds" in name
    }
    assert len(seconds) == 10
    assert seconds['{replica="0",stage="1",state="busy"}'] == 1.500000001
    assert seconds['{replica="0",stage="0",state="idle"}'] == 5e-9
    assert samples["ember_pp_stage_plan", '{replica="0",stage="1"}'] == 41
    assert samples["ember_pp_stage_peak_bytes", '{replica="0",stage="0"}'] == 300


def test_labels_are_escaped():
    assert r'model="a \"b\"\\c\nd"' in render(STATUS)


def test_while_stages_load_there_is_a_page_too():
    samples = parse(render(LOADING))
    assert samples["ember_pp_ready", None] == 0
    assert not any("stage_seconds" in name for name, _ in samples)


@pytest.fixture
def server():
    server = MetricsServer(0)
    yield server
    server.close()


class Loop(threading.Thread):
    """What the coordinator's loop does: answer when it is asked to, with a number that counts."""

    def __init__(self, server):
        super().__init__(daemon=True)
        self.server = server
        self.num_asked = 0
        self.is_done = threading.Event()
        self.start()

    def run(self):
        while not self.is_done.is_set():
            if select.select([self.server.request_descriptor], [], [], 0.05)[0]:
                self.num_asked += 1
                self.server.publish(STATUS | {"num_plans": self.num_asked})


@pytest.fixture
def loop(server):
    loop = Loop(server)
    yield loop
    loop.is_done.set()
    loop.join(5)


def fetch(url):
    with urllib.request.urlopen(url, timeout=10) as reply:
        return reply.headers["Content-Type"], reply.read().decode()


def test_each_scrape_gets_numbers_of_now(server, loop):
    for count in (1, 2, 3):
        kind, page = fetch(server.url)
        assert kind == "text/plain; version=0.0.4; charset=utf-8"
        assert parse(page)["ember_pp_plans_total", None] == count
    assert loop.num_asked == 3


def test_only_loopback_listens(server):
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/metrics", server.url)


def test_another_path_is_not_found(server, loop):
    with pytest.raises(urllib.error.HTTPError) as failure:
        fetch(server.url.replace("/metrics", "/"))
    failure.value.close()
    assert failure.value.code == 404
    assert loop.num_asked == 0


def test_a_loop_that_does_not_answer_is_said_so(server, monkeypatch):
    monkeypatch.setattr(metrics_module, "_SNAPSHOT_TIMEOUT_S", 0.05)
    with pytest.raises(urllib.error.HTTPError) as failure:
        fetch(server.url)
    failure.value.close()
    assert failure.value.code == 503


def test_a_reader_that_says_nothing_does_not_keep_others_out(server, loop):
    port = int(server.url.split(":")[2].split("/")[0])
    with socket.create_connection(("127.0.0.1", port)):
        assert parse(fetch(server.url)[1])["ember_pp_ready", None] == 1


def test_a_reader_that_goes_away_ends_nothing(server, loop):
    port = int(server.url.split(":")[2].split("/")[0])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", "/metrics")
    connection.close()
    assert parse(fetch(server.url)[1])["ember_pp_ready", None] == 1


def test_a_port_in_use_is_refused_by_name(server):
    port = int(server.url.split(":")[2].split("/")[0])
    with pytest.raises(ConfigError, match=rf"metrics\.port: 127\.0\.0\.1:{port} .*in use"):
        MetricsServer(port)


def test_close_ends_the_thread_at_once_and_frees_the_port():
    server = MetricsServer(0)
    port = int(server.url.split(":")[2].split("/")[0])
    started_s = time.monotonic()
    server.close()
    assert time.monotonic() - started_s < 0.9
    assert not server._thread.is_alive()
    again = MetricsServer(port)
    again.close()
