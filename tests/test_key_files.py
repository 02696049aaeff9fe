"""key_files: made once, private, readable by zmq.auth; everything wrong is said with what to do."""

import os
import stat
import threading

import pytest
import zmq.auth

from ember_pp.config import CoordinatorSettings
from ember_pp.errors import ConfigError
from ember_pp.key_files import KeyFolder, client_keys, server_keys


@pytest.fixture
def folder(tmp_path):
    return KeyFolder(str(tmp_path / "keys"))


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_server_makes_its_pair_on_first_use_and_keeps_it(folder):
    previous = os.umask(0)
    try:
        first = folder.server_keys().pair
    finally:
        os.umask(previous)
    assert KeyFolder(str(folder.path)).server_keys().pair == first
    assert mode(folder.path) == 0o700
    assert mode(folder.path / "server.key_secret") == 0o600
    public, secret = zmq.auth.load_certificate(folder.path / "server.key_secret")
    assert (public, secret) == (first.public, first.secret)
    assert zmq.auth.load_certificate(folder.path / "server.key") == (first.public, None)
    assert sorted(path.name for path in folder.path.iterdir()) == [
        "server.key",
        "server.key_secret",
    ]


def test_secrets_are_not_shown(folder):
    pair = folder.server_keys().pair
    assert pair.secret.decode() not in repr(pair)


def test_two_that_make_the_pair_at_once_have_the_same(folder):
    start = threading.Barrier(8)
    found = []

    def make():
        start.wait()
        found.append(KeyFolder(str(folder.path)).server_keys().pair)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({pair.secret for pair in found}) == 1
    public, _ = zmq.auth.load_certificate(folder.path / "server.key")
    assert public == found[0].public


def test_files_of_zmq_auth_are_read(folder, tmp_path):
    folder.server_keys()
    path, _ = zmq.auth.create_certificates(tmp_path, "laptop", {"who": "me"})
    allowed = folder.allow(path)
    assert allowed == folder.allowed_path / "laptop.key"
    assert folder.is_allowed(zmq.auth.load_certificate(path)[0])


def test_only_the_public_half_is_copied(folder, tmp_path):
    folder.server_keys()
    _, secret_path = zmq.auth.create_certificates(tmp_path, "laptop")
    text = folder.allow(secret_path).read_text()
    assert "secret" not in text
    assert zmq.auth.load_certificate(secret_path)[1].decode() not in text


def test_keys_of_one_name_do_not_replace_each_other(folder, tmp_path):
    folder.server_keys()
    keys = []
    for owner in "ab":
        (tmp_path / owner).mkdir()
        path, _ = zmq.auth.create_certificates(tmp_path / owner, "client")
        keys.append(zmq.auth.load_certificate(path)[0])
        assert folder.allow(path) == folder.allow(path)  # the same key once
    names = sorted(path.name for path in folder.allowed_path.iterdir())
    assert names == ["client-2.key", "client.key"]
    assert all(folder.is_allowed(key) for key in keys)


def test_a_key_that_is_taken_away_is_allowed_no_more(folder, tmp_path):
    folder.server_keys()
    path, _ = zmq.auth.create_certificates(tmp_path, "laptop")
    public = zmq.auth.load_certificate(path)[0]
    allowed = folder.allow(path)
    allowed.with_name("broken.key").write_text("no key at all")
    assert folder.is_allowed(public)
    allowed.unlink()
    assert not folder.is_allowed(public)


def test_nobody_is_allowed_before_somebody_is(folder):
    assert not folder.is_allowed(folder.server_keys().pair.public)


@pytest.mark.parametrize("others", [0o640, 0o604, 0o620])
def test_a_secret_that_others_can_read_is_refused(folder, others):
    folder.server_keys()
    path = folder.path / "server.key_secret"
    path.chmod(others)
    with pytest.raises(ConfigError, match=rf"^coordinator\.keys: .*chmod 600 {path}"):
        folder.server_keys()


def test_what_a_client_lacks_is_named(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"server\.key is missing; copy server\.key from"):
        folder.client_keys()
    server = KeyFolder(str(tmp_path / "server"))
    server.server_keys()
    folder.path.mkdir(mode=0o700)
    folder.public_path("server").write_text(server.public_path("server").read_text())
    with pytest.raises(ConfigError, match=r"client\.key_secret is missing; job=keys makes it"):
        folder.client_keys()
    made = folder.pair("client", make=True)
    keys = folder.client_keys()
    assert (keys.pair, keys.server) == (made, server.server_keys().pair.public)


def test_a_clients_folder_does_not_become_a_servers(folder):
    """A new pair beside a copied server.key would never fit it."""
    folder.path.mkdir(mode=0o700)
    folder.public_path("server").write_text("anything")
    with pytest.raises(ConfigError, match=r"without its secret half"):
        folder.server_keys()


@pytest.mark.parametrize("text", ["", 'curve\n    public-key = "short"\n', "\xff" * 50])
def test_what_is_no_key_is_named(folder, tmp_path, text):
    path = tmp_path / "client.key"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"{path} has no key in the form of zmq\.auth"):
        folder.allow(str(path))
    with pytest.raises(ConfigError, match="is missing"):
        folder.allow(str(tmp_path / "client.none"))


@pytest.mark.parametrize(
    ("address", "curve", "is_needed"),
    [
        ("ipc:///tmp/x", None, False),
        ("ipc:///tmp/x", True, True),
        ("tcp://127.0.0.1:1", None, False),
        ("tcp://127.0.0.1:1", True, True),
        ("tcp://[::1]:1", False, False),
        ("tcp://0.0.0.0:1", None, True),
        ("tcp://*:1", None, True),
        ("tcp://example.org:1", True, True),
    ],
)
def test_keys_are_for_where_other_machines_can_connect(folder, address, curve, is_needed):
    settings = CoordinatorSettings(keys=str(folder.path), curve=curve)
    assert (server_keys(settings, address) is not None) == is_needed
    if not is_needed:
        assert client_keys(settings, address) is None
        assert not folder.path.exists()


@pytest.mark.parametrize("keys", [server_keys, client_keys])
def test_no_setting_opens_a_port_without_keys(folder, keys):
    settings = CoordinatorSettings(keys=str(folder.path), curve=False)
    with pytest.raises(ConfigError, match=r"^coordinator\.curve: false, but tcp://0"):
        keys(settings, "tcp://0.0.0.0:1")
