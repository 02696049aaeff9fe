"""The folder of CURVE keys (``coordinator.keys``): made, checked, read.

    server.key_secret   of the coordinators of this user: made when one first needs it
    server.key          its public half; on a client's machine, a copy of it
    client.key_secret   of the clients of this user: ``job=keys`` makes it
    client.key          its public half, to be allowed at the coordinator
    allowed/NAME.key    public halves of clients that may connect; looked at for each connection

Files are those of ``zmq.auth``. The folder has mode 0700 and secrets 0600; a secret that others
could read is refused.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import tempfile
from pathlib import Path

from ember_pp.config import CoordinatorSettings
from ember_pp.errors import ConfigError
from ember_pp.sockets import ClientKeys, KeyPair, ServerKeys, can_be_reached_from_elsewhere

_SETTING = "coordinator.keys"
_MAX_FILE_BYTES = 4096
_KEY = r'"([0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40})"'  # the alphabet of Z85
_PUBLIC = re.compile(rf"^\s*public-key\s*=\s*{_KEY}\s*$", re.M)
_SECRET = re.compile(rf"^\s*secret-key\s*=\s*{_KEY}\s*$", re.M)


class KeyFolder:
    """The keys in one folder; nothing is made or read before it is asked for.

    Raises (each method):
        ConfigError: a file is missing, no key, or a secret that others can read; says what to do.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path).expanduser()
        self.allowed_path = self.path / "allowed"

    def pair(self, name: str, *, make: bool) -> KeyPair:
        """The pair ``name``, ``server`` or ``client``; made if it is missing and ``make``."""
        secret_path = self.path / f"{name}.key_secret"
        if make and not secret_path.exists():
            self._make(name)
        _check_private(secret_path)
        text = _read(secret_path)
        return KeyPair(_find(_PUBLIC, text, secret_path), _find(_SECRET, text, secret_path))

    def public_path(self, name: str) -> Path:
        """The file with the public half of ``name``."""
        return self.path / f"{name}.key"

    def server_keys(self) -> ServerKeys:
        """For a coordinator; its pair is made on first use."""
        return ServerKeys(self.pair("server", make=True), self.is_allowed)

    def client_keys(self) -> ClientKeys:
        """For a client; both have to be there: its own pair, and the public key of the server."""
        path = self.public_path("server")
        if not path.exists():
            raise ConfigError(
                f"{_SETTING}: {path} is missing; copy server.key from the folder of that name on "
                "the coordinator's machine"
            )
        return ClientKeys(self.pair("client", make=False), _find(_PUBLIC, _read(path), path))

    def is_allowed(self, public: bytes) -> bool:
        """Whether a file in ``allowed/`` has this public key; a file that has none is skipped."""
        for path in sorted(self.allowed_path.glob("*.key")):
            with contextlib.suppress(ConfigError):
                if _find(_PUBLIC, _read(path), path) == public:
                    return True
        return False

    def allow(self, given: str) -> Path:
        """Copy a client's public key into ``allowed/``; returns the file, under a name of its own.

        The secret half, should the file have it, is left out.
        """
        source = Path(given).expanduser()
        public = _find(_PUBLIC, _read(source), source)
        self._make_folder(self.allowed_path)
        for number in range(1000):
            suffix = f"-{number + 1}" if number else ""
            path = self.allowed_path / f"{source.stem}{suffix}.key"
            if _write_new(path, _public_text(public), 0o644) or (
                _find(_PUBLIC, _read(path), path) == public
            ):
                return path
        raise ConfigError(f"{_SETTING}: {self.allowed_path} has a thousand keys of that name")

    def _make(self, name: str) -> None:
        self._make_folder(self.path)
        public_path = self.public_path(name)
        if public_path.exists():
            raise ConfigError(
                f"{_SETTING}: {public_path} is there without its secret half: this folder is a "
                f"client's, or the secret was lost; remove {public_path} to make a new pair"
            )
        pair = KeyPair.make()
        text = _public_text(pair.public) + f'    secret-key = "{pair.secret.decode()}"\n'
        if _write_new(self.path / f"{name}.key_secret", text, 0o600):
            _write_new(public_path, _public_text(pair.public), 0o644)

    def _make_folder(self, path: Path) -> None:
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{_SETTING}: {path} cannot be made: {error.strerror}") from None


def server_keys(settings: CoordinatorSettings, address: str) -> ServerKeys | None:
    """The keys with which a coordinator listens at ``address``; None: it needs none.

    Raises:
        ConfigError: they cannot be had, or are refused where other machines can connect.
    """
    return KeyFolder(settings.keys).server_keys() if _is_needed(settings, address) else None


def client_keys(settings: CoordinatorSettings, address: str) -> ClientKeys | None:
    """The keys with which a client connects to ``address``; as ``server_keys``."""
    return KeyFolder(settings.keys).client_keys() if _is_needed(settings, address) else None


def _is_needed(settings: CoordinatorSettings, address: str) -> bool:
    if not can_be_reached_from_elsewhere(address):
        return bool(settings.curve)
    if settings.curve is False:
        raise ConfigError(
            f"coordinator.curve: false, but {address} can be reached from other machines; use "
            "ipc://PATH or tcp://127.0.0.1:PORT (and a tunnel)"
        )
    return True


def _public_text(public: bytes) -> str:
    return f'curve\n    public-key = "{public.decode()}"\n'


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_FILE_BYTES).decode("ascii", errors="replace")
    except FileNotFoundError:
        hint = "; job=keys makes it" if path.name.startswith("client") else ""
        raise ConfigError(f"{_SETTING}: {path} is missing{hint}") from None
    except OSError as error:
        raise ConfigError(f"{_SETTING}: {path} cannot be read: {error.strerror}") from None


def _find(pattern: re.Pattern[str], text: str, path: Path) -> bytes:
    match = pattern.search(text)
    if match is None:
        raise ConfigError(f"{_SETTING}: {path} has no key in the form of zmq.auth")
    return match[1].encode()


def _check_private(path: Path) -> None:
    try:
        facts = path.stat()
    except OSError:
        return  # told when it is read
    if facts.st_uid != os.getuid() or stat.S_IMODE(facts.st_mode) & 0o077:
        raise ConfigError(
            f"{_SETTING}: {path} is not this user's alone (mode {stat.S_IMODE(facts.st_mode):o}); "
            f"chmod 600 {path}, or make a new key if others may have read it"
        )


def _write_new(path: Path, text: str, mode: int) -> bool:
    """Write a file, whole or not at all; False if it is there, and then leave it as it is."""
    try:
        descriptor, scratch = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                os.fchmod(file.fileno(), mode)
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.link(scratch, path)
        finally:
            os.unlink(scratch)
    except FileExistsError:
        return False
    except OSError as error:
        raise ConfigError(f"{_SETTING}: {path} cannot be written: {error.strerror}") from None
    return True
