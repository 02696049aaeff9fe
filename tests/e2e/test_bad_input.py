"""Every row of docs/errors.md: exit code, one message that names what to change, no traceback."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import ember_pp
from ember_pp.key_files import KeyFolder
from ember_pp.sockets import PrivateDirectory, RouterSocket, wait_readable

DEMO = Path(ember_pp.__file__).parent / "demo"
SECONDS_TO_NOTICE = 20.0  # generous on a busy machine; nothing here loads weights


def run(*overrides, cwd, timeout_s=120.0):
    """Run ember-pp as a user would; returns exit code, stderr and seconds."""
    started_s = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(Path(ember_pp.__file__).parent.parent)}
    ended = subprocess.run(
        [sys.executable, "-m", "ember_pp", *overrides],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    return ended.returncode, ended.stderr, time.monotonic() - started_s


def assert_refused(result, exit_code, *needles):
    code, stderr, seconds = result
    assert code == exit_code, stderr
    assert "Traceback" not in stderr
    messages = [line for line in stderr.splitlines() if line.startswith("ember-pp: ")]
    assert len(messages) == 1, stderr
    for needle in needles:
        assert needle in stderr, f"{needle!r} is not in {stderr!r}"
    assert seconds < SECONDS_TO_NOTICE


@pytest.fixture
def copy(tmp_path):
    """A copy of the demo checkpoint, to be damaged."""
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    return folder


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "The sea", "max_tokens": 4}\n')
    return path


def batch(model, lines, tmp_path, *more):
    overrides = (
        f"model.path={model}",
        f"job.input={lines}",
        f"job.output={tmp_path / 'out.jsonl'}",
    )
    return run(*overrides, *more, cwd=tmp_path)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_shard(folder, change):
    """Apply ``change`` to the tensors of the first shard; returns one tensor name in it."""
    shard = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    name = next(name for name in sorted(tensors) if "mlp.gate_proj" in name)
    change(tensors, name)
    save_file(tensors, shard, metadata={"format": "pt"})
    return name


def test_missing_model(tmp_path, lines):
    assert_refused(batch("/nowhere/model", lines, tmp_path), 2, "model.path", "/nowhere/model")


def test_folder_without_config(tmp_path, lines):
    (tmp_path / "empty").mkdir()
    assert_refused(batch(tmp_path / "empty", lines, tmp_path), 2, "config.json")


def test_unreadable_config(copy, lines, tmp_path):
    (copy / "config.json").write_text("{ not json")
    assert_refused(batch(copy, lines, tmp_path), 2, "config.json")


def test_unsupported_model_type(copy, lines, tmp_path):
    edit_json(copy / "config.json", model_type="mamba")
    assert_refused(batch(copy, lines, tmp_path), 2, "model_type", "mamba", "qwen3")


def test_truncated_shard(copy, lines, tmp_path):
    shard = copy / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    assert_refused(batch(copy, lines, tmp_path), 2, shard.name)


def test_missing_shard(copy, lines, tmp_path):
    (copy / "model-00002-of-00002.safetensors").unlink()
    assert_refused(batch(copy, lines, tmp_path), 2, "model-00002-of-00002.safetensors")


def test_missing_tensor(copy, lines, tmp_path):
    name = edit_shard(copy, lambda tensors, name: tensors.pop(name))
    index = copy / "model.safetensors.index.json"
    plain = json.loads(index.read_text())
    del plain["weight_map"][name]
    index.write_text(json.dumps(plain))
    assert_refused(batch(copy, lines, tmp_path), 2, name)


def test_extra_tensor(copy, lines, tmp_path):
    extra = "model.layers.0.mlp.router.weight"
    edit_shard(copy, lambda tensors, name: tensors.update({extra: tensors[name].clone()}))
    index = copy / "model.safetensors.index.json"
    plain = json.loads(index.read_text())
    plain["weight_map"][extra] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(plain))
    assert_refused(batch(copy, lines, tmp_path), 2, extra)


def test_misshapen_tensor(copy, lines, tmp_path):
    def narrow(tensors, name):
        tensors[name] = tensors[name][:, :-1].contiguous()

    name = edit_shard(copy, narrow)
    assert_refused(batch(copy, lines, tmp_path), 2, name)


def test_more_stages_than_layers(tmp_path, lines):
    result = batch("demo", lines, tmp_path, "pipeline.stages=99")
    assert_refused(result, 2, "pipeline.stages", "99")


def test_unknown_override_with_suggestion(tmp_path):
    assert_refused(run("pipeline.stage=2", cwd=tmp_path), 2, "did you mean 'pipeline.stages'?")


def test_wrong_type(tmp_path):
    assert_refused(run("pipeline.stages=two", cwd=tmp_path), 2, "pipeline.stages", "'two'")


def test_unknown_preset(tmp_path):
    assert_refused(run("model=qwen3-9b", cwd=tmp_path), 2, "qwen3-8b")


def test_occupied_address(tmp_path):
    with PrivateDirectory() as directory:
        address = directory.address("c")
        router = RouterSocket(address, max_message_bytes=1024)
        result = run("job=serve", f"coordinator.address={address}", cwd=tmp_path)
        router.close(linger_ms=0)
    assert_refused(result, 2, address, "in use")


def test_open_port_without_keys(tmp_path):
    result = run(
        *("job=serve", "coordinator.address=tcp://0.0.0.0:5600", "coordinator.curve=false"),
        cwd=tmp_path,
    )
    assert_refused(result, 2, "coordinator.curve", "tcp://0.0.0.0:5600")


def test_no_key_of_the_coordinator(tmp_path):
    keys = tmp_path / "keys"
    result = run(
        *("job=status", "coordinator.address=tcp://192.0.2.1:5600", f"coordinator.keys={keys}"),
        cwd=tmp_path,
    )
    assert_refused(result, 2, "coordinator.keys", f"{keys}/server.key is missing")


def test_key_that_the_coordinator_does_not_know(tmp_path):
    folder = KeyFolder(str(tmp_path / "keys"))  # of both: what is missing is that it is allowed
    server = folder.server_keys()
    folder.pair("client", make=True)
    with PrivateDirectory() as directory:
        address = directory.address("c")
        router = RouterSocket(address, max_message_bytes=1024, keys=server)
        has_ended = threading.Event()

        def answer():
            while not has_ended.is_set():
                wait_readable([router], [], 0.05)

        thread = threading.Thread(target=answer)
        thread.start()
        result = run(
            *("job=status", f"coordinator.address={address}", "coordinator.curve=true"),
            f"coordinator.keys={folder.path}",
            cwd=tmp_path,
        )
        has_ended.set()
        thread.join()
        router.close(linger_ms=0)
    assert_refused(result, 2, address, "does not accept this key", "job.allow")


def test_nobody_at_the_address(tmp_path):
    result = run("job=status", f"coordinator.address=ipc://{tmp_path}/c", cwd=tmp_path)
    assert_refused(result, 1, f"ipc://{tmp_path}/c")


def test_unwritable_output(tmp_path, lines):
    result = run(
        "model.path=demo", f"job.input={lines}", "job.output=/proc/nowhere/out.jsonl", cwd=tmp_path
    )
    assert_refused(result, 2, "job.output", "/proc/nowhere")


def test_missing_input(tmp_path):
    result = run("job.input=nowhere.jsonl", "job.output=out.jsonl", cwd=tmp_path)
    assert_refused(result, 2, "job.input", "nowhere.jsonl")


@pytest.mark.multiproc
def test_full_disk(tmp_path, lines):
    overrides = ("model.path=demo", f"job.input={lines}", "job.output=/dev/full")
    code, stderr, _ = run(*overrides, cwd=tmp_path)
    assert code in (1, 2), stderr
    assert "Traceback" not in stderr
    assert "/dev/full" in stderr
