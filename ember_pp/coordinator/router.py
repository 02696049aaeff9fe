"""Which replica a new request goes to: the one that has its prefix, unless that is too busy.

Pure policy, like the scheduler: no I/O, no clock. Replicas have prefix caches of their own, so
requests that begin alike should meet in one; but a popular beginning must not fill one replica
while the others idle.
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Sequence as Ordered

_MAX_REMEMBERED = 65_536
_MAX_EXTRA_LOAD = 0.25
"""A replica keeps its prefixes while its load is no more than this share above the least."""


class Router:
    """Remembers where beginnings of prompts went.

    Args:
        num_replicas: copies of the model.
        prefix_tokens: length of the beginning that is looked at; shorter prompts go by load.
    """

    def __init__(self, num_replicas: int, *, prefix_tokens: int) -> None:
        self._num_replicas = num_replicas
        self._prefix_tokens = prefix_tokens
        self._homes: collections.OrderedDict[bytes, int] = collections.OrderedDict()

    def choose(self, prompt_ids: Ordered[int], loads: Ordered[float]) -> int:
        """Replica for a prompt; ``loads`` are the open tokens of each, inf to avoid it."""
        least = min(range(self._num_replicas), key=lambda replica: (loads[replica], replica))
        if len(prompt_ids) < self._prefix_tokens:
            return least
        beginning = ",".join(map(str, prompt_ids[: self._prefix_tokens])).encode()
        key = hashlib.blake2b(beginning, digest_size=16).digest()
        home = self._homes.pop(key, least)
        allowed = (loads[least] + len(prompt_ids)) * (1 + _MAX_EXTRA_LOAD)
        if loads[home] > allowed:
            home = least
        self._homes[key] = home
        if len(self._homes) > _MAX_REMEMBERED:
            self._homes.popitem(last=False)
        return home
