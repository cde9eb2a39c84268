"""What each connection makes this process hold, and an end to those that overdo it.

libzmq keeps the frames of an unfinished message, and those a peer doesn't read, where a program
can't see them, and bounds neither by bytes. But its monitor tells every connection's file
descriptor, and the kernel counts what went through it: bytes received and not yet delivered to us
lie in libzmq, bytes handed to it and not yet acknowledged wait for a slow reader. `Accounts` is
that arithmetic and knows no sockets; `Meter` feeds it and shuts down the very connection that
breaks the `Bounds`, whereupon libzmq frees what it held for it at once, others untouched. Where the
kernel doesn't tell (not Linux) nothing is metered, only connections are counted. `MemoryWatch` is
the last resort: it says when the process as a whole holds too much, where the system tells that.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import fcntl
import functools
import ipaddress
import math
import os
import socket
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import zmq

from edge_common.memory_limits import MemoryLimits
from transport.messages import Limits

Reason = Literal["endless", "slow", "total", "crowd", "revoked", "banished"]
"""Why a connection was dropped. ``endless``: it sent more than the largest legal messages without
ending one, or without pausing until they were read, or too much in its handshake. ``slow``: it
doesn't read what it asked for. ``total``: it held the most when all together held too much.
``crowd``: there were too many connections, in all or of one party, or handshakes under way.
``revoked``: its key was revoked. ``banished``: its key is kept out for a while because it broke a
rule."""

SLOWEST_LINK = 1_000_000
"""Bytes per second of the slowest link that must not be taken for a dead one (8 Mbit/s)."""
FRAME_BYTES = 33
"""What CURVE adds to a frame, besides ZMTP's 2 or 9 bytes. https://rfc.zeromq.org/spec/26/"""
_TICK_RATE = 256.0
# Heartbeats are received and never delivered: two a second of about 40 bytes. So many bytes a
# second are forgiven, and are all that a patient peer can gain.
_SLACK = 1 << 20
_HANDSHAKE_SENT = 280
# A server that has let its client in has sent a greeting, WELCOME and READY, 301 bytes; one that
# has refused it, 246.
_HANDSHAKE_RECEIVED = 64 << 10
# Either side of a handshake sends less than a kilobyte.
_AT_ONCE = 256  # unfinished handshakes looked at in one poll: the loop has other work
_PACE_S = 5.0  # over which a reader's pace is taken
_HANDSHAKE_S = 4.0  # libzmq itself ends those that take longer (HANDSHAKE_IVL)
_HANDSHAKES = 8192
# Each takes up to 20 kB while it lasts.
_TCP_INFO_BYTES = 208
_RATE_S = 1.0  # over which the rate of all is taken
_LOOK_S = 0.002  # between looks out of turn
_TCP_FAMILIES = (socket.AF_INET, socket.AF_INET6)
SINCE = "X-Since"
"""Name of the property under which every message tells when its connection was let in, as
`time.monotonic` does. Only an authenticator can set it: it goes before what a peer says of itself.
"""
_METERED = sys.platform == "linux" and hasattr(socket, "TCP_INFO")


def message_bytes(limits: Limits) -> int:
    """The largest legal message of one direction, as it travels."""
    return limits.message_bytes + FRAME_BYTES + 9


def frame_bytes(size: int) -> int:
    """What a frame of so many bytes takes on a CURVE connection."""
    return size + FRAME_BYTES + (2 if size + FRAME_BYTES < 256 else 9)


@dataclass(frozen=True)
class Bounds:
    """How much is too much.

    Args:
        unseen: bytes received from one connection and not delivered.
        unheard: the same before its first message, when nobody knows yet whose it is.
        unsent: bytes handed to one connection and not acknowledged.
        total: both, of all connections.
        stall_s: how long what was handed over may go without any of it being acknowledged.
        pace: bytes a second that a connection must acknowledge while much waits: while the `unsent`
            of all is above a quarter of `total`, so that slow readers hold up nobody else.
        handshakes: connections that have not finished theirs; half of these of one address. Beyond
            that the oldest is dropped.
        connections: all of them.
        each: connections of one user, and of one address those that have not said anything: an edge
            has one, or a few where it has several processes, and behind one address there may be
            many edges. More than this starves other clients.
    """

    unseen: int
    unheard: int
    unsent: int
    total: int
    stall_s: float = 10.0
    pace: float = SLOWEST_LINK / 4
    handshakes: int = 2048
    connections: int = 4096
    each: int = 64


def bounds(
    inbound: Limits,
    outbound: Limits,
    *,
    backlog: int,
    total: int = 1 << 30,
    files: int | None = None,
    stall_s: float = 10.0,
    results: int = 4,
) -> Bounds:
    """Bounds that no honest peer reaches.

    Args:
        inbound: limits of what is received. outbound: of what is sent.
        backlog: so many of the largest messages may wait in libzmq, while one is under way.
        total: for all connections together; more, if a few of the largest messages take more.
        files: most open descriptors of this process (each connection takes two), None if known to
            suffice.
        stall_s: see `Bounds`; longer than a heartbeat's timeout, which ends a dead link by itself.
        results: so many of the largest messages may be on the way to one peer, if that is not too
            much of `total`.
    """
    one_in, one_out = message_bytes(inbound), message_bytes(outbound)
    total = max(total, 3 * one_in + 4 * one_out + _SLACK)
    spare = 4096 if files is None else max(16, (files - min(128, files // 4)) // 2)
    return Bounds(
        unseen=(backlog + 1) * one_in + _SLACK,
        unheard=one_in + _SLACK,
        unsent=max(32 << 20, 4 * one_out, min(results * one_out, total // 2)),
        total=total,
        stall_s=stall_s,
        handshakes=min(_HANDSHAKES, spare // 2),
        connections=spare,
    )


@dataclass(frozen=True)
class Breach:
    """A connection dropped. `address` is the peer's, without port; `user` as authenticated, empty
    if no message of its has been seen."""

    fd: int
    address: str
    user: str
    reason: Reason
    bytes: int

    def __str__(self) -> str:
        who = f"{self.user} at {self.address}" if self.user else self.address
        held = f"{self.bytes / 1e6:.1f} MB"
        return (
            f"connection of {who} dropped: "
            + {
                "endless": f"it sent {held} without ending a message, or too fast to be read",
                "slow": f"it does not read its replies, or too slowly; {held} wait",
                "total": f"all connections together hold too much, and its share is {held}",
                "crowd": "there are too many connections, of all or of this one's",
                "revoked": "its key is no longer authorised",
                "banished": "its key is kept out for a while",
            }[self.reason]
        )


@dataclass(slots=True)
class Account:
    """One connection's bytes. `unseen` and `unsent` as of the last sample; `paced`: since when its
    pace is taken, what it had acknowledged then, and what waited for it."""

    fd: int
    address: str
    opened: float
    user: str = ""
    established: bool = False
    received: int = 0
    acked: int = 0
    unseen: float = 0.0
    unsent: int = 0
    queued: int = 0
    credit: int = 0
    moved: float = 0.0
    sampled: float = 0.0
    paced: tuple[float, int, int] = (0.0, 0, 0)
    heard: bool = False
    dropped: bool = False
    route: bytes = b""

    @property
    def inside(self) -> float:
        """Bytes in libzmq on the way in: the kernel's own queue, which TCP bounds, left out."""
        return max(0.0, self.unseen - self.queued)

    @property
    def held(self) -> float:
        return self.inside + self.unsent

    @property
    def whose(self) -> str:
        """Whom to hold responsible: the user or, while unknown, the address."""
        return f"user {self.user}" if self.user else network(self.address)


@functools.lru_cache(4096)
def network(address: str) -> str:
    """The address that one party may be taken to hold: an IPv4 address, an IPv6 /64."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if parsed.version == 4:
        return address
    mapped = parsed.ipv4_mapped
    return str(mapped or ipaddress.ip_network((int(parsed), 64), strict=False))


class Accounts:
    """The arithmetic: openings, samples, deliveries and hand-overs in, breaches out.

    Times are passed in, in seconds of any one clock. Descriptor numbers are reused: an account
    lives from `open` to `close` or the next `open` of its number.

    Attributes:
        unsent, unsent_of: bytes handed over and not acknowledged, of all and by user.
        rate: bytes a second that all together have acknowledged of late, while there were any.
    """

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.accounts: dict[int, Account] = {}
        # Handshakes under way, the oldest first: all, and by address.
        self.pending: dict[int, Account] = {}
        self._parties: dict[str, dict[int, Account]] = {}
        self._talkative: list[Account] = []  # said more than a handshake takes
        self.unsent = 0
        self.unsent_of: collections.Counter[str] = collections.Counter()
        self.routes: dict[bytes, int] = {}
        self.rate = 0.0
        self._rated, self._read, self._idle = -math.inf, 0, False

    def open(self, fd: int, address: str, now: float) -> None:
        self.close(fd)
        account = Account(fd, address, opened=now, moved=now, sampled=now)
        self.accounts[fd] = self.pending[fd] = account
        self._parties.setdefault(account.whose, {})[fd] = account

    def close(self, fd: int) -> None:
        account = self.accounts.pop(fd, None)
        if account is None:
            return
        self.settle(account)
        self._owe(account, 0)
        if self.routes.get(account.route) == fd:
            del self.routes[account.route]

    def settle(self, account: Account) -> None:
        """Its handshake is over, one way or the other."""
        if self.pending.pop(account.fd, None) is not None:
            party = network(account.address)
            del self._parties[party][account.fd]
            if not self._parties[party]:
                del self._parties[party]

    def surplus(self, address: str) -> Account | None:
        """The handshake that is one too many after a connection from this address, if any."""
        party = self._parties.get(network(address), {})
        if len(party) > max(1, self.bounds.handshakes // 2):
            return next(iter(party.values()))
        if len(self.pending) > self.bounds.handshakes:
            return next(iter(self.pending.values()))
        return None

    def name(self, account: Account, user: str, route: bytes) -> None:
        """A message has told whose connection this is, and its routing id."""
        waiting = account.unsent
        self._owe(account, 0)
        account.user, account.route = user, route
        self._owe(account, waiting)
        self.routes[route] = account.fd

    def delivered(self, account: Account, size: int) -> None:
        """`size` bytes received on this connection have reached the program."""
        account.credit += size
        account.heard = True
        self._establish(account)

    def handed(self, fd: int, size: int, now: float) -> None:
        """`size` bytes are to leave by this connection."""
        if account := self.accounts.get(fd):
            if not account.unsent:
                account.moved = now
                account.paced = now, account.acked, size
            self._owe(account, account.unsent + size)

    def sample(
        self, fd: int, received: int, acked: int, queued: int, now: float, sent: int = 0
    ) -> None:
        """The kernel's counts: received and acknowledged in all, received and not yet read, and
        sent."""
        account = self.accounts[fd]
        forgiven = (now - account.sampled) * _TICK_RATE
        came = received - account.received
        account.unseen = max(0.0, account.unseen + came - account.credit - forgiven)
        account.credit, account.received, account.queued = 0, received, queued
        if acked != account.acked:
            self._read += acked - account.acked
            self._owe(account, max(0, account.unsent - (acked - account.acked)))
            account.acked, account.moved = acked, now
        if not account.unsent:
            account.moved = now
        if sent >= _HANDSHAKE_SENT:
            self._establish(account)
        elif received > _HANDSHAKE_RECEIVED and not account.established:
            self._talkative.append(account)
        account.sampled = now

    def _establish(self, account: Account) -> None:
        if not account.established:
            account.established = True
            self.settle(account)

    def _owe(self, account: Account, size: int) -> None:
        """So much now waits for this connection to read it."""
        self.unsent += size - account.unsent
        self.unsent_of[account.user] += size - account.unsent
        if not self.unsent_of[account.user]:
            del self.unsent_of[account.user]
        account.unsent = size

    def _take_rate(self, now: float) -> None:
        self._idle = self._idle or not self.unsent
        seconds = now - self._rated
        if seconds >= _RATE_S:
            rate = self._read / seconds
            # Where all was read in between, more might have been.
            self.rate = max(self.rate, rate) if self._idle else rate
            self._rated, self._read, self._idle = now, 0, False

    def _trickles(self, account: Account, now: float) -> bool:
        """Whether its reader has kept less than the least pace, though there was enough to read,
        while much waits."""
        since, acked, waited = account.paced
        if not account.unsent or now - since < _PACE_S:
            return False
        slow = account.acked - acked < min(waited, self.bounds.pace * (now - since))
        if slow and self.unsent > self.bounds.total / 4:
            return True
        account.paced = now, account.acked, account.unsent
        return False

    def judge(self, now: float) -> list[Breach]:
        """Who has to go; each is told once. The caller drops the connections."""
        self._take_rate(now)
        found: list[Breach] = []

        def drop(account: Account, reason: Reason, size: float = 0) -> None:
            account.dropped = True
            found.append(Breach(account.fd, account.address, account.user, reason, int(size)))

        while self.pending:
            oldest = next(iter(self.pending.values()))
            if now - oldest.opened <= _HANDSHAKE_S:
                break
            self._establish(oldest)  # libzmq has ended all others
        for account in self._talkative:
            if not account.dropped:
                drop(account, "endless", account.received)
        self._talkative.clear()
        live = [a for a in self.accounts.values() if a.established and not a.dropped]
        for account in live:
            if account.inside > (self.bounds.unseen if account.heard else self.bounds.unheard):
                drop(account, "endless", account.inside)
            elif account.unsent > self.bounds.unsent or (
                account.unsent and now - account.moved > self.bounds.stall_s
            ):
                drop(account, "slow", account.unsent)
        live = [account for account in live if not account.dropped]
        # One at a time: there may be less to wait for without it.
        trickling = [account for account in live if self._trickles(account, now)]
        if trickling:
            slowest = max(trickling, key=lambda a: a.unsent)
            drop(slowest, "slow", slowest.unsent)
            live.remove(slowest)
        while sum(account.held for account in live) > self.bounds.total:
            # From whoever holds the most in all connections, the largest of these.
            shares: collections.Counter[str] = collections.Counter()
            for account in live:
                shares[account.whose] += int(account.held)
            worst = shares.most_common(1)[0][0]
            largest = max((a for a in live if a.whose == worst), key=lambda a: a.held)
            drop(largest, "total", largest.held)
            live.remove(largest)
        groups: dict[str, list[Account]] = collections.defaultdict(list)
        for account in live:
            groups[account.whose].append(account)
        for group in groups.values():
            self._thin(group, self.bounds.each, drop)
        # Handshakes go first, then connections that have said nothing.
        goes: Callable[[Account], bool]
        for goes in (lambda a: not a.established, lambda a: not a.user, lambda a: True):
            if len(self.accounts) - len(found) <= self.bounds.connections:
                break
            live = [account for account in self.accounts.values() if not account.dropped]
            excess = len(live) - self.bounds.connections
            group = [account for account in live if goes(account)]
            self._thin(group, max(0, len(group) - excess), drop)
        return found

    @staticmethod
    def _thin(accounts: list[Account], most: int, drop: Any) -> None:
        """Drop all but `most`: the oldest of whoever has the most of them."""
        if len(accounts) <= most:
            return
        groups: dict[str, collections.deque[Account]] = collections.defaultdict(collections.deque)
        for account in sorted(accounts, key=lambda a: a.opened):
            groups[account.whose].append(account)
        for _ in range(len(accounts) - most):
            drop(max(groups.values(), key=len).popleft(), "crowd")


class Ended(NamedTuple):
    """A connection that is no more: whose, whether its handshake was done and, if it was not, the
    bytes of it; its routing id, if it said anything."""

    address: str
    established: bool
    received: int = 0
    sent: int = 0
    user: str = ""
    route: bytes = b""


class Meter:
    """Follows the connections of one socket, from its monitor's events to `close`.

    Use in one thread. `sockets.peers` and `sockets.watch` feed it the events; whoever receives
    calls `delivered`, whoever sends `handed`.

    Attributes:
        metered: whether the kernel tells bytes; if not, only connections are counted.
        dropped: connections dropped, by reason.
        catch_up: reads the news of connections that there are already; set by `sockets.peers`.
    """

    def __init__(self, bounds: Bounds) -> None:
        self.metered = _METERED
        self.dropped: collections.Counter[str] = collections.Counter()
        self._accounts = Accounts(bounds)
        self._ends: dict[int, socket.socket] = {}
        self._surplus: list[Breach] = []  # dropped since the last look
        self._turn = 0
        self._port = 0
        self._look_at = 0.0
        self.catch_up: Callable[[], None] = lambda: None

    def bound(self, bounds: Bounds) -> None:
        """Other bounds from the next look on."""
        self._accounts.bounds = bounds

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._ends)

    def users(self) -> set[str]:
        """Users of the open connections, as far as they have said anything."""
        return {a.user for a in self._accounts.accounts.values() if a.user}

    def held(self) -> int:
        """Bytes held for all connections, as of the last `poll`."""
        return int(sum(account.held for account in self._accounts.accounts.values()))

    def opened(self, fd: int, now: float) -> bool:
        """The monitor told of a connection (ACCEPTED, CONNECTED); whether it may stay.

        libzmq may have closed the descriptor since, and something else have got its number. Then
        the news of that is on its way: told before the descriptor was closed, it ends this account
        before long.
        """
        if fd in self._ends:
            self.closed(fd)
        try:
            # A duplicate stays the connection's, whatever becomes of the number.
            copy = os.dup(fd)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                return True  # it has ended already
            return self._shut_unseen(fd)
        try:
            end = socket.socket(fileno=copy)
        except OSError:  # it was closed, and its number is no socket's now
            os.close(copy)
            return True
        address = ""
        with contextlib.suppress(OSError, IndexError, TypeError):
            address = str(end.getpeername()[0])
            self._port = self._port or end.getsockname()[1]
        self._ends[fd] = end
        self._accounts.open(fd, address, now)
        while surplus := self._accounts.surplus(address):
            self._look_at_one(surplus, now)
            if not surplus.established:
                surplus.dropped = True
                self._accounts.settle(surplus)
                self._surplus.append(
                    Breach(surplus.fd, surplus.address, "", "crowd", surplus.received)
                )
                self._drop(self._surplus[-1])
        return True

    def _shut_unseen(self, fd: int) -> bool:
        """End a connection that there is no descriptor left to follow by. Whether it may stay.

        Its number may have gone to another one in this very instant: of this socket's at worst, and
        then a peer has to come again.
        """
        with contextlib.suppress(OSError):
            borrowed = socket.socket(fileno=fd)
            try:
                if borrowed.family in _TCP_FAMILIES and borrowed.getsockname()[1] == self._port:
                    self.dropped["crowd"] += 1
                    _cut(borrowed)
            finally:
                borrowed.detach()
        return False

    def closed(self, fd: int) -> Ended:
        """The monitor told of a connection's end."""
        account = self._accounts.accounts.get(fd)
        self._accounts.close(fd)
        end = self._ends.pop(fd, None)
        if end is None or account is None:  # it had ended before anybody looked
            return Ended("", False)
        established = account.established or not self.metered
        received = sent = 0
        with end, contextlib.suppress(OSError):
            if not established and (counts := _counts(end)):
                received, _, sent = counts
                established = sent >= _HANDSHAKE_SENT
        return Ended(account.address, established, received, sent, account.user, account.route)

    def close(self) -> None:
        """Forget all connections, because their socket closes or disconnects: then libzmq tells
        nothing."""
        for fd in list(self._ends):
            self.closed(fd)

    def delivered(self, frame: zmq.Frame, route: bytes = b"") -> None:
        """A message was received with ``copy=False``, by a ROUTER on the connection of `route`."""
        try:
            number = int(frame.get(zmq.SRCFD))
        except (zmq.ZMQError, TypeError, ValueError):
            return  # not by TCP
        account = self._accounts.accounts.get(number)
        if account is None or account.route != route:
            account = self._sender(number, frame)
            if account is None:
                return
            self._accounts.name(account, str(frame.get("User-Id")), route)
        self._accounts.delivered(account, frame_bytes(len(frame)))

    def _sender(self, number: int, frame: zmq.Frame) -> Account | None:
        """The connection that a message came by; None if it has ended.

        Another connection may have its number by now. The authenticator, before it lets in
        anybody, has this meter `catch_up`, so that a connection is let in after its account was
        opened, and before the account of the next one with its number is.
        """
        self.catch_up()
        account = self._accounts.accounts.get(number)
        if account is not None:
            with contextlib.suppress(zmq.ZMQError):  # let in by another authenticator than ours
                if float(frame.get(SINCE)) < account.opened:
                    return None
        return account

    def handed(self, size: int, now: float, *, route: bytes) -> None:
        """A message of so many bytes was given to the socket, for this routing id."""
        fd = self._accounts.routes.get(route)
        if self.metered and fd is not None:
            self._accounts.handed(fd, frame_bytes(size), now)

    def waiting(self, user: str | None = None) -> int:
        """Bytes handed over and not acknowledged when last looked at: a user's, or all; 0 where
        nothing is metered."""
        accounts = self._accounts
        return accounts.unsent if user is None else accounts.unsent_of[user]

    @property
    def rate(self) -> float:
        """Bytes a second that all peers together have been reading of late."""
        return self._accounts.rate

    def look(self) -> bool:
        """Look at all connections now, unless that was done a moment ago; whether it was done."""
        begun = time.monotonic()
        if not self.metered or begun < self._look_at:
            return False
        self._sample(begun)
        # Many connections are a lot to look at; a fifth of the time is enough for it.
        self._look_at = begun + max(_LOOK_S, 5 * (time.monotonic() - begun))
        return True

    def poll(self, now: float) -> list[Breach]:
        """Look at all connections and drop those that break the bounds."""
        self._sample(now)
        found = self._accounts.judge(now)
        for breach in found:
            self._drop(breach)
        found, self._surplus = self._surplus + found, []
        return found

    def _sample(self, now: float) -> None:
        """Look at what has changed; of many unfinished handshakes, only at some each time."""
        if not self.metered:
            return
        accounts, pending = self._accounts.accounts, self._accounts.pending
        parts = 1 + len(pending) // _AT_ONCE
        self._turn = (self._turn + 1) % parts
        for fd in self._ends:
            if parts == 1 or fd not in pending or fd % parts == self._turn:
                self._look_at_one(accounts[fd], now)

    def _look_at_one(self, account: Account, now: float) -> None:
        end = self._ends.get(account.fd)
        if end is None or not self.metered:
            return
        with contextlib.suppress(OSError):
            counts = _counts(end)
            if counts is None:
                self.metered = False
                return
            received, acked, sent = counts
            much = account.unseen + received - account.received > _SLACK // 4
            queued = _readable(end) if much else 0
            self._accounts.sample(account.fd, received, acked, queued, now, sent)

    def revoke(self, users: Iterable[str]) -> list[Breach]:
        """Drop the connections of these users, and those that have not said yet whose they are:
        an honest one comes back at once."""
        gone = {*users, ""}
        accounts = self._accounts.accounts.values()
        return self._drop_all([a for a in accounts if a.user in gone], "revoked")

    def banish(self, user: str) -> list[Breach]:
        """Drop the connections of this user."""
        accounts = self._accounts.accounts.values()
        return self._drop_all([a for a in accounts if a.user == user], "banished")

    def unwanted(self, frame: zmq.Frame) -> None:
        """A message of a banished user was received: its connection has to go too, if it had said
        nothing before."""
        with contextlib.suppress(zmq.ZMQError, TypeError, ValueError):
            number = int(frame.get(zmq.SRCFD))
            account = self._accounts.accounts.get(number)
            if account and not account.dropped and (account := self._sender(number, frame)):
                self._drop_all([account], "banished")

    def _drop_all(self, accounts: Iterable[Account], reason: Reason) -> list[Breach]:
        found = []
        for account in accounts:
            if not account.dropped:
                account.dropped = True
                held = int(account.held)
                breach = Breach(account.fd, account.address, account.user, reason, held)
                self._drop(breach)
                found.append(breach)
        return found

    def _drop(self, breach: Breach) -> None:
        self.dropped[breach.reason] += 1
        with contextlib.suppress(OSError):  # it has ended by itself
            _cut(self._ends[breach.fd])


def _cut(end: socket.socket) -> None:
    """End a connection of libzmq's without closing it: libzmq must find its end there, which it
    does at once, and frees everything."""
    # A reset in place of a farewell. The kernel would wait a minute for the peer's, holding the
    # connection, and a peer that only writes would never learn.
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.shutdown(socket.SHUT_RDWR)


def _counts(end: socket.socket) -> tuple[int, int, int] | None:
    """Bytes received, acknowledged and sent; None if this kernel is too old to tell."""
    info = end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    if len(info) < 136:
        return None
    acked, received = struct.unpack_from("=QQ", info, 120)
    sent = struct.unpack_from("=Q", info, 200)[0] if len(info) >= 208 else acked
    return received, acked, sent


def _readable(end: socket.socket) -> int:
    """Bytes in the kernel's receive queue."""
    buffer = bytearray(4)
    fcntl.ioctl(end, termios.FIONREAD, buffer)
    return int(struct.unpack("i", buffer)[0])


class MemoryWatch:
    """Says when this process holds more than `ceiling` bytes: the last resort before the kernel's.

    Attributes:
        breaches: how often it did; counted once until it is below again.
    """

    def __init__(self, ceiling: int, read: Callable[[], int | None] | None = None) -> None:
        self.ceiling = ceiling
        self.breaches = 0
        self._read = read or MemoryLimits(group="").resident
        self._above = False

    def breached(self) -> int | None:
        """The bytes held if they have risen above the ceiling since the last call, else None."""
        held = self._read()
        above = held is not None and held > self.ceiling
        risen = above and not self._above
        self._above = above
        self.breaches += risen
        return held if risen else None
