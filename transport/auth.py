"""Who may talk to a node: the ZAP authenticator and its allow-list, a folder of public keys.

libzmq asks this authenticator about every client before any message of it is read. Promises that
only a CURVE client whose key lies in the folder gets in, at a bounded pace, that no failure in here
(a malformed key file, an exception, an unknown question) lets anyone in or stops the authenticator,
that a key added to or taken from the folder counts for the next handshake, without a restart, and
that a key taken from it, or a folder that may not be trusted any more, is told within a quarter of
a second or so. Dropping the connections that are open (`meter.Meter.revoke`) and the work that
waits is left to whoever is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import operator
import os
import shlex
import struct
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import zmq
from zmq.utils import z85

from edge_common.errors import KeyFileError
from edge_common.permissions import why_entry_untrusted, why_untrusted
from transport.keys import AUTHORIZED, read_public
from transport.meter import SINCE
from transport.sockets import ZAP_DOMAIN, Bell, Seldom

log = logging.getLogger(__name__)

_ZAP_ENDPOINT = "inproc://zeromq.zap.01"
KEY = "X-Key"
"""Name of the property under which every message tells the key it came with (Z85), besides User-Id,
which is the name. Only an authenticator can set it: it goes before what a peer says of itself."""
_WATCH_S = 0.25
_BURST, _PER_S = 100, 10.0
"""Handshakes of one key: so many at once, so many a second in the long run. libzmq waits a tenth of
a second at least before it connects again, so that no edge comes oftener by itself; the burst is
for many processes of one key that start together."""
_FIRST_S, _MOST_S = 2.0, 300.0
"""Seconds for which an edge is kept out after breaking a rule: at first, and at most."""
# Status codes of ZAP. libzmq passes on 400 and 500 to the client, which tells them apart; after 300
# it would say nothing until the client gives up.
_NEVER, _LATER = b"400", b"500"
_COARSE_NS = 2_000_000_000  # no file system's clock is coarser
_LOOK = 1000  # files: a few milliseconds
_Stamp = tuple[int, ...]
_stamp_of: Callable[[os.stat_result], _Stamp] = operator.attrgetter(
    "st_ctime_ns", "st_mtime_ns", "st_size", "st_ino", "st_dev", "st_mode", "st_uid", "st_gid"
)
# Short of these a folder can't be read, which says nothing about what is in it.
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class AllowList:
    """The public keys in a folder: every ``NAME.pub`` lets in its holder under that name."""

    def __init__(self, folder: Path | str, *, owner: int | None = None) -> None:
        """Read the folder.

        Args:
            owner: uid of another user whose files count, besides ours and root's.

        Raises:
            KeyFileError: it is missing, or others could change it and so let themselves in.
        """
        self.folder = Path(folder)
        self._owner = owner
        self._settled: object = None  # the folder's own stamp, once no change can hide behind it
        self._names: dict[str, str] = {}
        self._files: dict[str, _Stamp | None] = {}  # what each looked like when read
        self._keys: dict[str, str | KeyFileError] = {}
        self._fresh: set[str] = set()  # files that may yet change without looking different
        self._links: set[str] = set()  # where they lead may change without a sign here
        self._ahead: list[str] = []
        self._next_look = 0.0
        self.reload()

    def reload(self) -> dict[str, str]:
        """Names by Z85 public key. Only files that changed are read again.

        With over a thousand files, and none that came or went or that `changed` found, each call
        looks at the next thousand of them.

        A file that is malformed, or that others may write to, lets in nobody. A process short of
        descriptors or memory keeps the names it read last: an attacker who causes the shortage must
        not shut out everybody.

        Raises:
            KeyFileError: as when made.
        """
        settled, self._settled = self._settled, None
        try:
            if found := why_untrusted(self.folder, owner=self._owner, closed=True):
                self._forget()
                raise KeyFileError(found)
            now = _settled(self.folder.stat())
            files = self._some() if now is not None and now == settled else self._all()
            due = {name for name in self._fresh if not _is_fresh(files.get(name))} | self._links
            if due or files != self._files:
                self._read(files, due)
        except OSError as error:
            if error.errno in _SHORTAGES and self._names:
                return self._names
            self._forget()
            raise KeyFileError(
                f"cannot read the folder of authorised keys {self.folder}: {error.strerror}; "
                "`edge-runtime keys node` makes one"
            ) from None
        self._settled = now
        return self._names

    def name_of(self, public: str) -> str | None:
        """The name a Z85 public key is enrolled under, None if it is not.

        Strangers can ask as often as they like. For them, files are looked at only if one came,
        went or was replaced, and at most a tenth of the time; a file that was written over counts
        with the next `reload`.

        Raises:
            KeyFileError: as when made.
        """
        if self._settled is not None:
            with contextlib.suppress(OSError):
                if _settled(self.folder.stat()) == self._settled:
                    name = self._names.get(public)
                    if name is None or not self.changed(name):
                        return name
        began = time.monotonic()
        if public not in self._names and began < self._next_look:
            return None
        try:
            return self.reload().get(public)
        finally:
            took = time.monotonic() - began
            self._next_look = max(self._next_look, began - 1.0) + 10 * took

    def changed(self, name: str) -> bool:
        """Whether the file that gives its holder this name has changed since it was read, or gone:
        one look at one file. If so, the next `reload` looks at all of them."""
        file = f"{name}.pub"
        if _stamp(self.folder / file) == self._files.get(file):
            return False
        self._settled = None
        return True

    def command(self, file: str) -> str:
        """What puts a .pub file into the folder, for people."""
        if self.folder.name == AUTHORIZED:
            return (
                f"edge-runtime keys authorize --dir {shlex.quote(str(self.folder.parent))} {file}"
            )
        return f"cp {file} {shlex.quote(str(self.folder))}"

    def __len__(self) -> int:
        return len(self._names)

    def _all(self) -> dict[str, _Stamp | None]:
        self._ahead = []
        with os.scandir(self.folder) as entries:
            return {
                entry.name: _stamp(entry)
                for entry in entries
                if entry.name.endswith(".pub") and not entry.name.startswith(".")
            }

    def _some(self) -> dict[str, _Stamp | None]:
        """As `_all`, with a new look at some of them."""
        names = self._ahead or [*self._files]
        some, self._ahead = names[:_LOOK], names[_LOOK:]
        return self._files | {name: _stamp(self.folder / name) for name in some}

    def _forget(self) -> None:
        self._names, self._files, self._keys, self._fresh, self._links = {}, {}, {}, set(), set()

    def _read(self, files: dict[str, _Stamp | None], due: set[str]) -> None:
        """Read what is new, has changed or is due, and forget what is gone.

        Raises:
            OSError: a shortage. Nothing is forgotten then.
        """
        names: dict[str, str] = {}
        keys: dict[str, str | KeyFileError] = {}
        fresh, links = self._fresh & files.keys(), self._links & files.keys()
        for name, stamp in sorted(files.items()):
            before = key = self._keys.get(name)
            if key is None or name in due or self._files[name] != stamp:
                file = self.folder / name
                key = _key(file, self._owner)
                (fresh.add if _is_fresh(stamp) else fresh.discard)(name)
                (links.add if file.is_symlink() else links.discard)(name)
                if isinstance(key, KeyFileError) and str(key) != str(before):
                    log.warning("ignored authorised key: %s", key)
            keys[name] = key
            if isinstance(key, str):
                names.setdefault(key, name.removesuffix(".pub"))
        self._names, self._files, self._keys = names, files, keys
        self._fresh, self._links = fresh, links


def _key(file: Path, owner: int | None) -> str | KeyFileError:
    """The key in a file, or why it does not count.

    Raises:
        OSError: a shortage.
    """
    try:
        file.name.encode()
        public = read_public(file)
        if file.is_symlink():
            found = why_untrusted(file, owner=owner)
        else:  # the folder has been judged
            found = why_entry_untrusted(file, os.lstat(file), owner)
        return KeyFileError(found) if found else public
    except UnicodeEncodeError:  # of bytes that are no UTF-8, which libzmq can't be told
        return KeyFileError(f"the file name {file.name!r} is not UTF-8: rename it")
    except (KeyFileError, OSError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno in _SHORTAGES:
            raise cause from None
        return KeyFileError(str(error))


def _settled(status: os.stat_result) -> object:
    """What changes when files come to a folder or go; None as long as another change might leave it
    the same, because the times of files are coarse."""
    if time.time_ns() - status.st_mtime_ns < _COARSE_NS:
        return None
    return _stamp_of(status)


def _stamp(entry: os.DirEntry[str] | Path) -> _Stamp | None:
    """What changes when a key file does; None if it can't be looked at, as a link to nowhere.

    A program that replaces a file's content can keep its size and set its time of modification, but
    not its time of change.
    """
    try:
        return _stamp_of(entry.stat())
    except OSError:
        return None


def _is_fresh(stamp: _Stamp | None) -> bool:
    """Whether the file changed so lately that another change might leave its stamp the same."""
    return stamp is not None and abs(time.time_ns() - stamp[0]) < _COARSE_NS


class Pace:
    """How much each key may do: a token bucket each, of `burst` tokens, refilled by `per_s`.

    Times are passed in, in seconds of a clock that doesn't jump.
    """

    def __init__(self, burst: int = _BURST, per_s: float = _PER_S) -> None:
        self._each = 1 / per_s
        self._most = (burst - 0.9) / per_s  # a tenth of a token for rounding
        self._full: dict[str, float] = {}  # when each key's bucket is full again

    def __call__(self, key: str, now: float, tokens: float = 1) -> bool:
        """Whether it may do this now; takes the tokens only if it may."""
        full = max(now, self._full.get(key, now))
        if full - now > self._most:
            return False
        self._full[key] = full + tokens * self._each
        return True

    def drain(self, key: str, now: float) -> None:
        """Leave it a tenth of a full bucket."""
        self._full[key] = now + 0.9 * self._most

    def keep(self, keys: Iterable[str]) -> None:
        """Forget all other keys."""
        kept = set(keys)
        self._full = {key: at for key, at in self._full.items() if key in kept}


class Penalties:
    """Which edges are kept out for breaking a rule: for `first_s` seconds, twice as long each time,
    up to `most_s`. An edge that has behaved for `most_s` starts anew.

    Times are passed in, in seconds of a clock that doesn't jump.
    """

    def __init__(self, first_s: float = _FIRST_S, most_s: float = _MOST_S) -> None:
        self._first_s, self._most_s = first_s, most_s
        self._kept: dict[str, tuple[float, float]] = {}  # until when, and for how long that was

    def add(self, name: str, now: float) -> float:
        """Keep this edge out from now on; for how many seconds."""
        until, before = self._kept.get(name, (now, 0.0))
        if now - until > self._most_s:
            before = 0.0
        seconds = min(self._most_s, 2 * before or self._first_s)
        self._kept[name] = now + seconds, seconds
        return seconds

    def __call__(self, name: str, now: float) -> bool:
        """Whether this edge is kept out."""
        kept = self._kept.get(name)
        return kept is not None and now < kept[0]

    def forget(self, names: Iterable[str]) -> None:
        """These edges have other keys now, or none."""
        for name in names:
            self._kept.pop(name, None)


def _property(name: str, value: bytes) -> bytes:
    """As ZMTP writes it."""
    return bytes([len(name)]) + name.encode() + struct.pack(">I", len(value)) + value


class Authenticator:
    """Answers libzmq's ZAP questions on `ctx` from an `AllowList`, from `start` to `stop`.

    Args:
        ctx: context of the servers.
        allowed: who gets in.
        on_revoked: called in the event loop with the names that were authorised and are not, or not
            with the same key; that may be all of them. Where it raises, it is called again soon.
        on_broken: called in the event loop if it can't go on: nobody is let in, or nobody revoked,
            any more.
        before_each: called before anybody is let in: has a `meter.Meter` catch up, which needs to
            know when (`SINCE`).
        on_refused: called with the reason of each refused handshake, see `sockets.REFUSALS`.
        penalties: of an authenticator before this one.
    """

    def __init__(
        self,
        ctx: zmq.Context[Any],
        allowed: AllowList,
        on_revoked: Callable[[frozenset[str]], None] | None = None,
        on_broken: Callable[[asyncio.Task[None]], None] | None = None,
        before_each: Callable[[], None] | None = None,
        on_refused: Callable[[str], None] = lambda reason: None,
        penalties: Penalties | None = None,
    ) -> None:
        self._on_refused = on_refused
        self._ctx = ctx
        self._allowed = allowed
        self._on_revoked = on_revoked
        self._on_broken = on_broken
        self._before_each = before_each
        self._known = {name: key for key, name in allowed.reload().items()}
        self._gone: frozenset[str] = frozenset()  # revoked, and `on_revoked` has not taken it in
        self._socket: zmq.Socket[bytes] | None = None
        self._bell: Bell | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._seldom = Seldom()
        self._pace = Pace()
        self._penalties = penalties or Penalties()

    def start(self) -> None:
        """Begin answering; needs a running event loop. Call before binding any server on `ctx`."""
        plain: zmq.Context[Any] = zmq.Context.shadow(self._ctx.underlying)
        self._socket = plain.socket(zmq.REP)
        self._socket.linger = 0
        self._socket.bind(_ZAP_ENDPOINT)
        self._bell = Bell(self._socket)
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._serve(), name="zap"),
            loop.create_task(self._watch(), name="allow-list"),
        ]
        for task in self._tasks:
            task.add_done_callback(self._ended)

    async def stop(self) -> None:
        """Stop; from now on nobody is let in."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._bell and self._socket:
            self._bell.close()
            self._socket.close()
        self._socket = self._bell = None

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task in self._tasks and self._on_broken:
            self._on_broken(task)

    def admits(self, name: str, key: str) -> bool:
        """Whether messages under this name, of connections let in with this key (`KEY`), are to be
        taken. What was replaced or taken away counts at once, unlike what makes the folder as a
        whole unsafe."""
        if self._known.get(name) == key and self._allowed.changed(name):
            self._look()
        return self._known.get(name) == key

    def banish(self, name: str) -> float:
        """Keep out this edge because it broke a rule; for how many seconds."""
        return self._penalties.add(name, time.monotonic())

    def banished(self, name: str, now: float) -> bool:
        """Whether this edge is kept out at this time (of `time.monotonic`)."""
        return self._penalties(name, now)

    async def _watch(self) -> None:
        """Look at the folder again and again: no notification works on every file system."""
        while True:
            await asyncio.sleep(_WATCH_S)
            try:
                self._look()
            except Exception as error:  # whatever happens, keep looking
                log.error("authenticator failed: %s", error)

    def _look(self) -> None:
        try:
            now = {name: key for key, name in self._allowed.reload().items()}
        except Exception as error:
            now = {}
            if self._known or self._seldom("folder"):
                log.error("nobody is authorised any more: %s", error)
        gone = frozenset(name for name, key in self._known.items() if now.get(name) != key)
        come = sorted(now.keys() - self._known.keys())
        self._known = now
        if gone:
            self._pace.keep(now.values())
            self._penalties.forget(gone)
        if come:
            log.info("authorised now: %s", ", ".join(come))
        if gone:
            log.warning("no longer authorised: %s", ", ".join(sorted(gone)))
        self._gone |= gone
        if self._gone and self._on_revoked:
            self._on_revoked(self._gone)
        self._gone = frozenset()

    async def _serve(self) -> None:
        assert self._socket is not None
        assert self._bell is not None
        while True:
            try:
                request = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                await self._bell.wait()
                continue
            try:
                status, text, name = self._judge(request)
                user = name.encode()
            except Exception as error:  # whatever happens, answer no and stay alive
                reason = "folder" if isinstance(error, KeyFileError) else "internal"
                self._on_refused(reason)
                if self._seldom(reason):
                    log.error("authenticator failed, client refused: %s", error)
                status, text, user = _LATER, b"internal error", b""
            request_id = request[1] if len(request) > 1 else b""
            told = b""
            if user:
                told = _property(KEY, z85.encode(request[6]))
                if self._before_each:
                    self._before_each()
                    told += _property(SINCE, str(time.monotonic()).encode())
            reply = [b"1.0", request_id, status, text, user, told]
            try:
                self._socket.send_multipart(reply, zmq.NOBLOCK)
            except zmq.ZMQError as error:
                log.error("authenticator could not answer: %s", error)
            await asyncio.sleep(0)  # a flood of questions must not hold up everything else

    def _judge(self, request: list[bytes]) -> tuple[bytes, bytes, str]:
        """(status, text, user id) for one ZAP question. https://rfc.zeromq.org/spec/27/"""
        if len(request) != 7 or request[0] != b"1.0":
            self._on_refused("protocol")
            return _NEVER, b"malformed question", ""
        _, _, domain, address, _, mechanism, credential = request
        if domain != ZAP_DOMAIN or mechanism != b"CURVE" or len(credential) != 32:
            self._on_refused("protocol")
            return _NEVER, b"only CURVE clients", ""
        public = z85.encode(credential).decode()
        name = self._allowed.name_of(public)
        if name is None:
            self._on_refused("not_authorised")
            self._log_refusal(public, address.decode("ascii", "replace"))
            return _NEVER, b"key not authorised", ""
        # Each connection may give itself a routing id, and each takes the next of libzmq's: who
        # comes without end meets, in the end, one that is due to another edge.
        now = time.monotonic()
        if self._penalties(name, now):
            self._on_refused("banished")
            return _LATER, b"kept out, try again", ""
        if not self._pace(public, now):
            self._on_refused("too_often")
            if self._seldom(("too_often", name)):
                log.warning("%s connects too often, some connections are refused", name)
            return _LATER, b"too often, try again", ""
        if self._known.get(name) != public:
            self._look()  # sooner than it would be due, so that `admits` knows of it
        return b"200", b"OK", name

    def _log_refusal(self, public: str, address: str) -> None:
        if not self._seldom(public):
            return
        log.warning(
            "refused %s: its key %s is not authorised; to let it in, put its .pub file in place "
            "with `%s` (no restart needed)",
            address,
            public,
            self._allowed.command("FILE.pub"),
        )
