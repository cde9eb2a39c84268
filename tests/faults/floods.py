"""Floods from separate processes: messages of an authorised key, and connections of strangers.

Each is a `Child`, so it can be stopped and continued. It sends until it is killed. `told` has its
progress.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import zmq

from edge_common.process import raise_file_limit
from engines.bundle import Bundle
from faults import zmtp
from faults.asking import feeds
from faults.processes import Child
from faults.zmtp import ClientHandshake, Curve
from transport.keys import KeyPair, make_directory
from transport.messages import Cancel, InfoRequest, Request, encode, new_id, new_seal

Kind = Literal["cancel", "info", "request"]
Words = Literal["nothing", "greeting", "hello"]
_TELL_S = 0.2


class _Flood(Child):
    def __init__(self, folder: Path, name: str, told: Mapping[str, Any]) -> None:
        """Run the function of that name in its own process."""
        asked = folder / f"{name}.json"
        make_directory(folder)
        asked.touch(0o600)
        asked.write_text(json.dumps(told))
        work = "import sys, faults.floods as floods; getattr(floods, sys.argv[1])(sys.argv[2])"
        paths = [str(Path(__file__).parents[number]) for number in (1, 2)]
        super().__init__(
            [sys.executable, "-c", f"import sys; sys.path[:0] = {paths}; {work}", name, str(asked)],
            log=folder / f"{name}.log",
        )

    def told(self) -> dict[str, Any]:
        """Its counts, at most a fifth of a second old. Empty before the first ones."""
        lines = self.log.read_text().splitlines()
        whole = [line for line in lines if line.endswith("}")]
        return dict(json.loads(whole[-1])) if whole else {}


class MessageFlood(_Flood):
    """Send messages of one key as fast as libzmq does. Replies are read and discarded. A connection
    that accepts nothing for a while is replaced.

    Args:
        folder: for its settings and its counts.
        endpoint: of the node. server_key: its public key.
        pair: an authorised key.
        kind: of message. bundle: of the requests. windows: per request.
        connections: how many at once.
        stuck_s: how long a connection may accept nothing.
    """

    def __init__(
        self,
        folder: Path,
        endpoint: str,
        server_key: str,
        pair: KeyPair,
        kind: Kind,
        *,
        bundle: Path | None = None,
        windows: int = 1,
        connections: int = 1,
        stuck_s: float = 1.0,
    ) -> None:
        told = {
            "endpoint": endpoint,
            "server_key": server_key,
            "pair": [pair.name, pair.public, pair.secret],
            "kind": kind,
            "bundle": str(bundle),
            "windows": windows,
            "connections": connections,
            "stuck_s": stuck_s,
        }
        super().__init__(folder, "send_messages", told)


class ConnectionFlood(_Flood):
    """Open connections that never finish their handshake, at a fixed rate. Each stays open until
    the node closes it.

    Args:
        folder: for its settings and its counts.
        endpoint: of the node.
        rate: connections per second.
        addresses: the first source address, and how many.
        say: the bytes that each connection sends.
    """

    def __init__(
        self,
        folder: Path,
        endpoint: str,
        server_key: str,
        *,
        rate: float,
        addresses: tuple[str, int] = ("127.0.0.1", 1),
        say: Words = "nothing",
    ) -> None:
        told = {
            "endpoint": endpoint,
            "server_key": server_key,
            "rate": rate,
            "first": addresses[0],
            "addresses": addresses[1],
            "say": say,
        }
        super().__init__(folder, "open_connections", told)


def _messages(asked: dict[str, Any]) -> Iterator[memoryview]:
    if asked["kind"] == "request":
        bundle = Bundle.load(Path(asked["bundle"]))
        fed, stage = feeds(bundle, 0, range(asked["windows"])), bundle.stage("stack").sha256
        while True:
            yield encode(Request(new_id(), stage, 60_000, new_seal()), fed)
    frame = encode({"cancel": Cancel, "info": InfoRequest}[asked["kind"]](new_id()))
    while True:
        yield frame


def send_messages(path: str) -> None:
    asked = json.loads(Path(path).read_text())
    large = asked["kind"] == "request"
    ctx, pair = zmq.Context(), KeyPair(*asked["pair"])
    connections = 0

    def connect() -> Any:
        nonlocal connections
        made = ctx.socket(zmq.DEALER)
        made.linger, made.immediate, made.rcvhwm = 0, 1, 0
        made.sndhwm = 16 if large else 1000
        made.reconnect_ivl, made.handshake_ivl = 1, 1000
        made.curve_serverkey = asked["server_key"].encode()
        made.curve_publickey = pair.public.encode()
        made.curve_secretkey = pair.secret.encode()
        made.connect(asked["endpoint"])
        connections += 1
        return made

    sockets = [connect() for _ in range(asked["connections"])]
    moved = [time.monotonic()] * len(sockets)
    messages = _messages(asked)
    frame = next(messages)
    sent, tell_at = 0, 0.0
    while True:
        now, before = time.monotonic(), sent
        for number, dealer in enumerate(sockets):
            try:
                for _ in range(2 if large else 100):
                    dealer.send(frame, zmq.NOBLOCK, copy=not large)
                    frame = next(messages)
                    sent += 1
                    moved[number] = now
            except zmq.Again:
                pass
            try:
                for _ in range(400):
                    dealer.recv(zmq.NOBLOCK)
            except zmq.Again:
                pass
            if now - moved[number] > asked["stuck_s"]:
                dealer.close()
                sockets[number], moved[number] = connect(), now
        if now >= tell_at:
            print(json.dumps({"sent": sent, "connections": connections}), flush=True)
            tell_at = now + _TELL_S
        if sent == before:
            time.sleep(0.02)  # its own work must not load the machine


def open_connections(path: str) -> None:
    asked = json.loads(Path(path).read_text())
    raise_file_limit()
    target, count = zmtp.address_of(asked["endpoint"]), asked["addresses"]
    first = int.from_bytes(socket.inet_aton(asked["first"]), "big")
    sources = [socket.inet_ntoa((first + number).to_bytes(4, "big")) for number in range(count)]
    hello = zmtp.frame(ClientHandshake(Curve.throwaway(asked["server_key"])).hello(), command=True)
    words = {"nothing": b"", "greeting": zmtp.greeting(), "hello": zmtp.greeting() + hello}
    data = words[asked["say"]]
    poller, open_ = select.epoll(), dict[int, socket.socket]()
    made = closed = failed = 0
    begun = time.monotonic()
    tell_at = 0.0
    while True:
        now = time.monotonic()
        while made + failed < (now - begun) * asked["rate"]:
            end = socket.socket()
            end.setblocking(False)
            try:
                end.bind((sources[made % count], 0))
                if end.connect_ex(target):  # the connection is under way
                    made += 1
                poller.register(end.fileno(), select.EPOLLIN | (select.EPOLLOUT if data else 0))
                open_[end.fileno()] = end
            except OSError:
                failed += 1
                end.close()
        for number, event in poller.poll(0.001):
            end = open_[number]
            try:
                if event & select.EPOLLOUT:
                    end.send(data)
                    poller.modify(number, select.EPOLLIN)
                if not event & select.EPOLLIN or end.recv(4096):
                    continue
            except OSError:
                pass
            poller.unregister(number)
            open_.pop(number).close()
            closed += 1
        if now >= tell_at:
            told = {"connections": made, "closed": closed, "open": len(open_), "failed": failed}
            print(json.dumps(told), flush=True)
            tell_at = now + _TELL_S
