"""The wire between a coordinator and its stages, with faults: ``python -m benchmarks.chaos_link``.

Every stage of a ``chaos`` run connects here, and for each one this connects to the coordinator
under the same name. Messages are passed on as they are, until a fault is asked for: the next
message of one kind, to or from any stage, is then dropped, sent twice or cut short, and the time of
it is told. Stages and coordinator know nothing of this.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from typing import Any

import zmq

from ember_pp import protocol
from ember_pp.errors import ProtocolError
from ember_pp.sockets import heart_of
from ember_pp.stage.__main__ import die_with_parent

DROP, REPEAT, TRUNCATE = "drop", "repeat", "truncate"
ACTIONS = (DROP, REPEAT, TRUNCATE)


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens to one message.

    ``name`` is the class of the message; ``skip`` lets so many of them pass before.
    """

    action: str
    name: str
    is_to_stage: bool
    skip: int


class Link:
    """Passes messages on, in one thread."""

    def __init__(self, front: str, back: str, control: str) -> None:
        self._context = zmq.Context()
        self._back_address = back
        self._front = self._socket(zmq.ROUTER)
        self._front.bind(front)
        self._control = self._socket(zmq.PAIR)
        self._control.connect(control)
        self._backs: dict[bytes, zmq.Socket[bytes]] = {}
        self._poller = zmq.Poller()
        for socket in (self._front, self._control):
            self._poller.register(socket, zmq.POLLIN)
        self._fault: Fault | None = None
        self._num_skipped = 0

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(kind)
        socket.linger, socket.sndhwm, socket.rcvhwm = 0, 0, 0
        return socket

    def run(self) -> None:
        """Until the process is ended."""
        while True:
            ready = dict(self._poller.poll())
            if self._control in ready:
                self._take_order()
            if self._front in ready:
                self._from_stages()
            for identity, back in list(self._backs.items()):
                if back in ready:
                    self._to_stage(identity, back)

    def _take_order(self) -> None:
        order: Any = json.loads(self._control.recv())
        self._fault = None if order is None else Fault(**order)
        self._num_skipped = 0

    def _from_stages(self) -> None:
        while self._front.poll(0):
            identity, payload = self._front.recv_multipart()
            if identity not in self._backs:
                self._connect(identity)
                self._connect(heart_of(identity))  # which does not speak before it is spoken to
            for part in self._pass(payload, is_to_stage=False):
                self._backs[identity].send(part)

    def _to_stage(self, identity: bytes, back: zmq.Socket[bytes]) -> None:
        while back.poll(0):
            for part in self._pass(back.recv(), is_to_stage=True):
                self._front.send_multipart([identity, part])

    def _connect(self, identity: bytes) -> None:
        for known in [known for known in self._backs if not _is_alive(known)]:
            self._poller.unregister(self._backs[known])
            self._backs.pop(known).close()
        back = self._socket(zmq.DEALER)
        back.identity = identity
        back.connect(self._back_address)
        self._backs[identity] = back
        self._poller.register(back, zmq.POLLIN)

    def _pass(self, payload: bytes, *, is_to_stage: bool) -> list[bytes]:
        fault = self._fault
        if fault is None or fault.is_to_stage != is_to_stage or _name_of(payload) != fault.name:
            return [payload]
        if self._num_skipped < fault.skip:
            self._num_skipped += 1
            return [payload]
        self._fault = None
        self._control.send(json.dumps(time.monotonic()).encode())
        if fault.action == DROP:
            return []
        return [payload, payload] if fault.action == REPEAT else [payload[: len(payload) // 2]]


def _is_alive(identity: bytes) -> bool:
    return os.path.exists(f"/proc/{identity.rpartition(b'-')[2].decode()}")


def _name_of(payload: bytes) -> str:
    try:
        return type(protocol.decode(payload)).__name__
    except ProtocolError:
        return ""


def main() -> None:
    """Run the link."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--front", "--back", "--control"):
        parser.add_argument(name, required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    options = parser.parse_args()
    die_with_parent(options.parent_pid)
    Link(options.front, options.back, options.control).run()


if __name__ == "__main__":
    main()
