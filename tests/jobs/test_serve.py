"""job=serve as a process: what its signals and its exit code mean, and who gets in."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from ember_pp import protocol
from ember_pp.client import Client
from ember_pp.errors import StageDiedError, UnavailableError
from ember_pp.key_files import KeyFolder
from ember_pp.sockets import ClientKeys, DealerSocket, KeyPair

pytestmark = pytest.mark.multiproc

DEADLINE_S = 60.0
SETTINGS = (
    "model.path=demo",
    "model.dtype=float32",
    "pipeline.stages=2",
    "pipeline.devices=cpu",
    "pipeline.cpu_threads=1",
    "cache.memory_gib=0.05",
)
ROOT = Path(__file__).parents[2]
LONG = {"max_tokens": 1900, "ignore_eos": True}


def launch(*overrides, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "ember_pp", *overrides],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


class Server:
    """A coordinator of its own, ready, and a client of it."""

    def __init__(self, address, *overrides, keys=None):
        command = ("job=serve", f"coordinator.address={address}", *SETTINGS, *overrides)
        self.process = launch(*command, stdout=subprocess.DEVNULL)
        target = address.replace("0.0.0.0", "127.0.0.1")
        self.client = Client(target, timeout_s=DEADLINE_S, keys=keys and keys())
        while self.client.status()["phase"] != "ready":
            assert self.process.poll() is None, self.process.stderr.read()
            time.sleep(0.05)
        self.stages = [stage["pid"] for stage in self.client.status()["stages"]]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.client.close()
        self.process.kill()
        self.process.communicate()

    def finish(self):
        _, stderr = self.process.communicate(timeout=DEADLINE_S)
        assert not any(Path(f"/proc/{pid}").exists() for pid in self.stages), "an orphan"
        return self.process.returncode, stderr


@pytest.fixture
def address(tmp_path):
    return f"ipc://{tmp_path}/c.sock"


def first_tokens(client, **sampling):
    request = client.submit("The sea", stream=True, sampling={"ignore_eos": True} | sampling)
    next(iter(request))
    return request


def test_a_signal_lets_what_is_open_end_and_the_code_says_that_it_did(address):
    with Server(address) as server:
        request = first_tokens(server.client, max_tokens=60)
        server.process.send_signal(signal.SIGTERM)
        while server.client.status()["phase"] != "draining":
            assert not request._state.has_ended
        with pytest.raises(UnavailableError, match="takes nothing new"):
            server.client.generate("x")
        assert request.result(DEADLINE_S).num_output_tokens == 60
        code, stderr = server.finish()
        assert code == 0, stderr
        assert "SIGTERM: 1 open requests have 20 s to end" in stderr


def test_the_code_says_that_requests_were_cut_off(address):
    with Server(address, "shutdown.grace_s=0.2") as server:
        request = first_tokens(server.client, **LONG)
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(UnavailableError, match=r"asked to end \(SIGINT\)"):
            request.result(DEADLINE_S)
        code, stderr = server.finish()
        assert code == 75
        assert "1 requests were cut off" in stderr


def test_a_second_signal_ends_everything_at_once(address):
    with Server(address, "shutdown.grace_s=60") as server:
        first_tokens(server.client, **LONG)
        server.process.send_signal(signal.SIGTERM)
        while server.client.status()["phase"] != "draining":
            pass
        started_s = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(DEADLINE_S) == 128 + signal.SIGTERM
        assert time.monotonic() - started_s < 2.0
        deadline_s = time.monotonic() + 1.0  # the stages end with it
        while any(is_running(pid) for pid in server.stages):
            assert time.monotonic() < deadline_s, "an orphan"
            time.sleep(0.01)


def is_running(pid):
    """Also false for what has ended and waits for its new parent to look."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_stages_leave_what_a_signal_means_to_the_coordinator(address):
    """Slurm signals them too; if they ended, the drain would begin with a restart."""
    with Server(address) as server:
        request = first_tokens(server.client, max_tokens=60)
        for pid in server.stages:
            for number in (signal.SIGTERM, signal.SIGINT):
                os.kill(pid, number)
        assert request.result(DEADLINE_S).num_output_tokens == 60
        status = server.client.status()
        assert [stage["pid"] for stage in status["stages"]] == server.stages


def test_the_code_of_a_failure_is_another_one(address):
    with Server(address, "supervisor.max_restarts=0") as server:
        request = first_tokens(server.client, **LONG)
        os.kill(server.stages[1], signal.SIGKILL)
        with pytest.raises(StageDiedError, match="killed by signal 9"):
            request.result(DEADLINE_S)
        code, stderr = server.finish()
        assert code == 1
        assert "Traceback" not in stderr


def test_with_nothing_open_the_end_is_at_once(address):
    with Server(address, "shutdown.grace_s=60") as server:
        started_s = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        code, _ = server.finish()
        assert code == 0
        assert time.monotonic() - started_s < 15.0


# --------------------------------------------------------------------------------------
# keys


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def run_keys(folder, *overrides):
    done = launch("job=keys", f"coordinator.keys={folder}", *overrides, stdout=subprocess.PIPE)
    stdout, stderr = done.communicate(timeout=DEADLINE_S)
    assert done.returncode == 0, stderr
    return stdout


def test_a_client_on_another_machine_gets_in_with_its_key_alone(tmp_path):
    """The whole way, as docs/trust.md tells it; the other machine is another folder of keys."""
    here, there = tmp_path / "server", tmp_path / "client"
    address, port = f"tcp://0.0.0.0:{free_port()}", free_port()
    made = run_keys(there)
    assert str(there / "client.key") in made
    assert "allowed" not in made
    assert "may connect" in run_keys(here, f"job.allow=[{there}/client.key]")
    run_keys(here, "job.make=server")
    (there / "server.key").write_bytes((here / "server.key").read_bytes())
    overrides = (f"coordinator.keys={here}", f"metrics.port={port}")
    with Server(address, *overrides, keys=KeyFolder(str(there)).client_keys) as server:
        assert server.client.generate("The sea", sampling={"max_tokens": 3}).num_output_tokens == 3
        target = address.replace("0.0.0.0", "127.0.0.1")
        # From the shell, too.
        asked = f"coordinator.address=tcp://127.0.0.1:{target.rpartition(':')[2]}"
        status = launch(
            *("job=status", asked, "coordinator.curve=true", f"coordinator.keys={there}"),
            stdout=subprocess.PIPE,
        )
        stdout, stderr = status.communicate(timeout=DEADLINE_S)
        assert status.returncode == 0, stderr
        assert json.loads(stdout)["num_refused_connections"] == 0
        stranger = DealerSocket(
            target, keys=ClientKeys(KeyPair.make(), KeyFolder(str(there)).client_keys().server)
        )
        nobody = DealerSocket(target)
        for refused in (stranger, nobody):
            refused.send(protocol.Status())
        deadline_s = time.monotonic() + DEADLINE_S
        while server.client.status()["num_refused_connections"] < 2:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        for refused in (stranger, nobody):
            refused.close(linger_ms=0)
        count = server.client.status()["num_refused_connections"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
            lines = page.read().decode().splitlines()
        name = "ember_pp_connections_refused_total "
        (counted,) = [int(line.removeprefix(name)) for line in lines if line.startswith(name)]
        assert counted >= count >= 2


def test_an_open_port_without_keys_is_refused_at_start(tmp_path):
    keys = tmp_path / "keys"
    refused = launch(
        *("job=serve", f"coordinator.address=tcp://0.0.0.0:{free_port()}", *SETTINGS),
        *("coordinator.curve=false", f"coordinator.keys={keys}"),
    )
    _, stderr = refused.communicate(timeout=DEADLINE_S)
    assert refused.returncode == 2
    assert "coordinator.curve: false, but tcp://0.0.0.0" in stderr
    assert not keys.exists()
    client = launch(
        "job=status", "coordinator.address=tcp://192.0.2.1:5", f"coordinator.keys={keys}"
    )
    _, stderr = client.communicate(timeout=DEADLINE_S)
    assert client.returncode == 2
    assert "server.key is missing; copy server.key" in stderr
