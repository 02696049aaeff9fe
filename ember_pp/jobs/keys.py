"""``job=keys``: keys for clients on other machines, made, and allowed at the coordinator."""

from __future__ import annotations

from ember_pp.config import Config, KeysJob
from ember_pp.errors import EXIT_OK
from ember_pp.key_files import KeyFolder

_NEXT = {
    "client": "give it to the coordinator's user, who allows it: job=keys job.allow=[client.key]",
    "server": "give it to the clients' users, who put it into their folder of keys",
}


def run(config: Config) -> int:
    """Make the pair of ``job.make`` if it is missing, or allow the keys in ``job.allow``."""
    job = config.job
    assert isinstance(job, KeysJob)
    folder = KeyFolder(config.coordinator.keys)
    for given in job.allow:
        print(f"{folder.allow(given)}: may connect (remove the file to end that)")
    if not job.allow:
        pair = folder.pair(job.make, make=True)
        print(f"{folder.public_path(job.make)}: {pair.public.decode()}; {_NEXT[job.make]}")
        print(f"{folder.path / job.make}.key_secret: its secret half; it stays here")
    return EXIT_OK
