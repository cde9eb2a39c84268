"""Rows about admission, disclosure and leftovers."""

from __future__ import annotations

import ast
import asyncio
import base64
import contextlib
import functools
import importlib.util
import itertools
import logging
import mmap
import os
import pickle
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import zmq
import zmq.asyncio
from faults import sodium
from faults.asking import connected, feeds
from faults.edges import FORGETFUL, with_header
from faults.nodes import FaultyNode
from faults.processes import children_of
from faults.zmtp import Peer

from edge_common.errors import ProtocolError
from edge_runtime.config import Node
from edge_runtime.offload.connection import Connection, _Pending
from reliability.rows import Bench, Questions, Seen, Skip, row, running
from transport.allow_list import AllowList
from transport.auth import Authenticator
from transport.keys import generate
from transport.link import NOT_AUTHORISED, WRONG_SERVER_KEY
from transport.messages import (
    InfoRequest,
    Refused,
    VersionsSpoken,
    decode_header,
    decode_tensors,
    encode,
    new_id,
)
from transport.sockets import server

ROOT = Path(__file__).parents[2]
RUNTIME = ("edge_common", "transport", "edge_runtime", "cloud_node", "engines")


def _tests(path: str) -> ModuleType:
    """A test module, for its tables and scans."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / "tests" / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


async def _link(bench: Bench, node: Node, within_s: float = 3.0) -> str:
    """The final state of a client's link: ``up``, or the reason of the first other state."""
    ctx = zmq.asyncio.Context()
    client = Connection(ctx, node, bench.bundle.stage("stack"), bench.limits)
    client.start()
    try:
        until = time.monotonic() + within_s
        while client.link is None and time.monotonic() < until:
            await asyncio.sleep(0.01)
        if client.link is None:
            return "nothing"
        return "up" if client.link.state == "up" else client.link.reason
    finally:
        await client.close()
        ctx.destroy(linger=0)


async def _unprotected(endpoint: str, plain: bool) -> str:
    """The answer that a DEALER without CURVE gets."""
    ctx = zmq.asyncio.Context()
    socket = ctx.socket(zmq.DEALER)
    try:
        if plain:
            socket.plain_username, socket.plain_password = b"edge", b"secret"
        socket.connect(endpoint)
        with contextlib.suppress(zmq.ZMQError):
            sending = asyncio.ensure_future(socket.send(encode(InfoRequest(new_id()))))
            await asyncio.wait({sending}, timeout=0.2)
        return "answered" if await socket.poll(700) else "nothing"
    finally:
        ctx.destroy(linger=0)


class _Raising(AllowList):
    def name_of(self, public: str) -> str | None:
        raise RuntimeError("a defect")


async def _own_server(bench: Bench, allow: type[AllowList] | None) -> str:
    """Whether a client with an authorised key is admitted by a server with this allow-list, or by
    one without authenticator."""
    keys = FaultyNode(bench.bundle, bench.fresh())
    pair = keys.authorise()
    ctx = zmq.asyncio.Context()
    authenticator = Authenticator(ctx, allow(keys.allowed)) if allow else None
    if authenticator:
        authenticator.start()
    socket = server(ctx, "tcp://127.0.0.1:0", keys.keypair, keys.limits)
    try:
        return await _link(bench, keys.node(pair, endpoint=socket.last_endpoint.decode()), 1.5)
    finally:
        socket.close(linger=0)
        if authenticator:
            await authenticator.stop()
        ctx.destroy(linger=0)


@row(
    "authentication",
    "unknown and revoked key, wrong server key, NULL, PLAIN, no ZAP handler, callback that raises: "
    "0 admitted; a legitimate edge after each; a revoked key gets no answer from 1 s on; reasons "
    "named",
)
@running
async def authentication(bench: Bench) -> Seen:
    told: dict[str, str] = {}
    after: dict[str, bool] = {}
    questions = Questions(bench)
    times = bench.pick(1, 20)
    with bench.node() as node:
        good = bench.edge(node)

        async def legitimate() -> bool:
            async with connected(good, bench.bundle) as client:
                return await questions.ask(client, 10)

        stranger = generate(bench.fresh("stranger"), "stranger")
        other = generate(bench.fresh("other"), "other")
        for _ in range(times):
            told["unknown key"] = await _link(bench, node.node(stranger))
            after["unknown key"] = await legitimate()
            wrong = Node("node", node.endpoint, other.public, good.keypair)
            told["wrong server key"] = await _link(bench, wrong)
            after["wrong server key"] = await legitimate()
            told["NULL"] = await _unprotected(node.endpoint, plain=False)
            after["NULL"] = await legitimate()
            told["PLAIN"] = await _unprotected(node.endpoint, plain=True)
            after["PLAIN"] = await legitimate()
            told["no ZAP handler"] = await _own_server(bench, None)
            told["callback that raises"] = await _own_server(bench, _Raising)
            after["allow-list in order"] = await _own_server(bench, AllowList) == "up"
            name = f"revoked{_}"
            pair = node.authorise(name)
            async with connected(node.node(pair), bench.bundle) as client:
                assert await questions.ask(client, 10)
                (node.allowed / f"{name}.pub").unlink()
                await asyncio.sleep(1.0)
                answered = await questions.ask(client, 2.0)
                told["revoked key, 1 s later"] = "answered" if answered else "nothing"
            told["revoked key, anew"] = await _link(bench, node.node(pair))
            after["revoked key"] = await legitimate()
    expected = {
        "unknown key": NOT_AUTHORISED,
        "wrong server key": WRONG_SERVER_KEY,
        "NULL": "nothing",
        "PLAIN": "nothing",
        "revoked key, 1 s later": "nothing",
        "revoked key, anew": NOT_AUTHORISED,
    }
    admitted = [name for name, what in told.items() if what in ("up", "answered")]
    seen = {"admitted": admitted, "told": told, "legitimate afterwards": after}
    held = not admitted and all(after.values())
    held = held and all(told[name] == what for name, what in expected.items())
    return Seen({"of each": times}, seen, held)


@row("keys", "secret keys 0600 under umask 000 and 022; a looser key file is refused at start")
def key_modes(bench: Bench) -> Seen:
    seen: dict[str, Any] = {}
    held = True
    for umask in (0o000, 0o022):
        folder = bench.fresh("keys")
        command = [sys.executable, "-m", "edge_runtime.cli", "keys", "node", "--dir", str(folder)]
        subprocess.run(command, check=True, capture_output=True, umask=umask)
        mode = stat.S_IMODE((folder / "node.key").stat().st_mode)
        seen[f"umask {umask:03o}"] = f"{mode:04o}"
        held = held and mode == 0o600
        for loose in (0o640, 0o604):
            (folder / "node.key").chmod(loose)
            command = [sys.executable, "-m", "cloud_node.cli", "serve", "--bundle", str(bench.toy)]
            command += ["--bind", "tcp://127.0.0.1:0", "--keys", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
            refused = done.returncode != 0 and "chmod 600" in done.stderr
            seen[f"start with {loose:04o}, umask {umask:03o}"] = "refused" if refused else "started"
            held = held and refused
    return Seen({"umasks": ["000", "022"], "modes": ["0640", "0604"]}, seen, held)


class _Canary:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@row(
    "no pickle", "0 uses in the runtime; a pickle as header and as tensor never runs, at either end"
)
@running
async def no_pickle(bench: Bench) -> Seen:
    scan = _tests("transport/test_no_pickle.py")
    uses, files = [], 0
    for package in RUNTIME:
        for path in sorted((ROOT / package).rglob("*.py")):
            files += 1
            found = scan.offences(ast.parse(path.read_text(), str(path)))
            uses += [f"{path.relative_to(ROOT)}:{line} {name}" for line, name in found]
    trap = bench.folder / "sprung"
    payload = pickle.dumps(_Canary(trap))
    sent = 0
    questions = Questions(bench)
    shaped = np.frombuffer(payload + bytes(-len(payload) % 16), np.uint8)
    fed = feeds(bench.bundle)
    padded = np.resize(shaped, fed["pixels"].shape).copy()
    if sodium.MISSING is None:
        with bench.node() as node:
            hostile = bench.hostile(node)
            good = hostile.request(fed)
            for parts in (
                [payload],
                [b"ERT\2" + len(payload).to_bytes(4, "little") + payload],
                [good[0][: -len(payload)] + payload],
                hostile.request({**fed, "pixels": padded}),
            ):
                await hostile.answer_to(parts)
                sent += 1
            async with connected(bench.edge(node), bench.bundle) as client:
                assert await questions.ask(client)
    start = b"ERT\2" + len(payload).to_bytes(4, "little")
    for frame in (payload, start + payload, b"ERT\2\x0d\0\0\0\x81\xa4type\xa6result" + payload):
        client = bench.idle_client()
        with contextlib.suppress(ProtocolError):
            client._handle(frame, 0.0)  # type: ignore[arg-type]
        sent += 1
    ran = trap.exists()
    with contextlib.suppress(Exception):
        pickle.loads(payload)  # noqa: S301 (the canary itself works)
    assert trap.exists()
    seen = {"uses": uses, "files scanned": files, "canary ran": ran}
    return Seen({"canaries sent": sent}, seen, not uses and not ran)


@row(
    "stolen routing ids",
    "10,000 connections that take the routing id of an edge that has just left, of a node that "
    "notices nothing, under load: 0 results can be read",
)
@running
async def thefts(bench: Bench) -> Seen:
    if sodium.MISSING is not None:
        raise Skip(str(sodium.MISSING))
    count, each = bench.pick(160, 10_000), 80  # a key may connect a hundred times at once
    questions = Questions(bench)
    stolen: list[bytes] = []
    node = bench.node()
    node.command[1:3] = ["-c", FORGETFUL]
    with node:
        async with connected(bench.edge(node), bench.bundle) as client:
            pairs = [(bench.hostile(node), bench.hostile(node)) for _ in range(count // each)]
            await questions.until_right(client, 20)
            turn = asyncio.Semaphore(16)

            async def theft(number: int) -> None:
                victim, thief = pairs[number % len(pairs)]
                async with turn:
                    stolen.extend(await victim.stolen_by(thief, questions.fed[0], number))

            async with questions.going_on(client):
                await asyncio.gather(*(theft(number) for number in range(count)))
    readable = 0
    plain = [array.tobytes()[:16] for array in bench.truth[0].values()]
    for frame in stolen:
        message = decode_header(frame)
        try:
            decode_tensors(message, frame, bench.limits.result, bytes(32))
            readable += 1
        except ProtocolError:
            readable += any(start in frame for start in plain)
    seen = {**questions.told(), "results that reached a thief": len(stolen), "readable": readable}
    held = bool(stolen) and not readable and not questions.wrong and not questions.failed
    return Seen({"thefts": count}, seen, held)


@row("linkability", "no id, key, nonce, routing id or cookie shared between what two nodes see")
@running
async def linkability(bench: Bench) -> Seen:
    if sodium.MISSING is not None:
        raise Skip(str(sodium.MISSING))
    requests = bench.pick(50, 5_000)
    views: list[dict[str, set[bytes]]] = []

    async with contextlib.AsyncExitStack() as stack:
        clients = []
        secret = bench.fresh("edge")
        questions = Questions(bench)
        for number in range(3):
            node = FaultyNode(bench.bundle, bench.fresh(), wire="raw", name=f"node-{number}")
            view: dict[str, set[bytes]] = {"ids": set(), "keys": set(), "handshakes": set()}
            views.append(view)
            _record(node, view)
            await stack.enter_async_context(node)
            pair = node.authorise(f"for-node-{number}", secret)
            edge = node.node(pair)
            clients.append(await stack.enter_async_context(connected(edge, bench.bundle)))
        for _ in range(requests):
            await asyncio.gather(*(questions.ask(client) for client in clients))
    shared = {
        kind: len(
            (views[0][kind] & views[1][kind])
            | (views[1][kind] & views[2][kind])
            | (views[0][kind] & views[2][kind])
        )
        for kind in views[0]
    }
    each = {kind: min(len(view[kind]) for view in views) for kind in views[0]}
    held = not any(shared.values()) and each["ids"] >= requests and each["keys"] >= 1
    held = held and each["handshakes"] >= 3 and not questions.wrong
    return Seen({"nodes": 3, "requests to each": requests}, {"shared": shared, "least": each}, held)


def _record(node: FaultyNode, view: dict[str, set[bytes]]) -> None:
    """Make a raw node record ids, the client's key, and the random values of its handshake."""
    take, converse = node.take, node._converse

    def taking(channel: Any, frames: Any) -> None:
        message = decode_header(frames[0])
        view["ids"].add(getattr(message, "id", b""))
        view["keys"].add(channel.peer.client_key)
        # Headers hold no other text of that length except the stack's hash, which all must know.
        end = 8 + int.from_bytes(frames[0][4:8], "little")
        fields = msgspec.msgpack.decode(frames[0][8:end])
        assert set(fields) <= {"type", "id", "stage", "deadline_ms", "seal", "tensors"}
        if "seal" in fields:
            view["ids"].add(fields["seal"])
        take(channel, frames)

    async def conversing(peer: Peer) -> None:
        command = peer._command

        async def reading(name: bytes) -> bytes:
            data = await command(name)
            if name == b"HELLO":
                # the transient key and the sealed part
                view["handshakes"] |= {data[74:106], data[114:130]}
            else:
                view["handshakes"].add(data[104:136])  # the sealed part of INITIATE
            return data

        peer._command = reading  # type: ignore[method-assign]
        await converse(peer)

    node.take = taking  # type: ignore[method-assign]
    node._converse = conversing  # type: ignore[method-assign]


def _forms(secret: bytes) -> list[bytes]:
    """The forms in which bytes may appear in text or files."""
    listed = ", ".join(map(str, secret[:12])).encode()
    encoded = base64.b64encode(secret)[2:-4]
    return [secret, secret.hex().encode(), repr(secret)[2:-1].encode(), listed, encoded]


def _search(paths: list[Path], forms: list[bytes]) -> list[str]:
    hits = []
    for path in paths:
        with contextlib.suppress(OSError):
            data = path.read_bytes()
            hits += [path.name for form in forms if form in data]
    return hits


def _memfds(pids: list[int]) -> list[Path]:
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(link).startswith("/memfd:"):
                        found.append(link)
    return found


@row(
    "log hygiene",
    "canary image and secret keys at DEBUG, through errors and a killed worker: 0 hits in logs, "
    "metrics, temporary files, /dev/shm and core files",
)
@running
async def hygiene(bench: Bench) -> Seen:
    scratch = bench.fresh("tmp")
    scratch.mkdir()
    os.environ["TMPDIR"] = str(scratch)
    canary = bytes(b or 1 for b in os.urandom(16))
    fed = feeds(bench.bundle)
    fed["pixels"] = np.resize(np.frombuffer(canary, np.uint8), fed["pixels"].shape).copy()
    shm = set(Path("/dev/shm").glob("*"))
    edge_log = bench.folder / "edge.log"
    logging.basicConfig(filename=edge_log, level=logging.DEBUG, force=True)
    questions = Questions(bench)
    questions.fed = [fed] * len(questions.fed)
    questions.compare = False  # the table has no answers to this picture
    with socket.create_server(("127.0.0.1", 0)) as free:
        metrics = f"127.0.0.1:{free.getsockname()[1]}"
    with bench.node(options=["--metrics", metrics]) as node:
        edge = bench.edge(node)
        async with connected(edge, bench.bundle) as client:
            for _ in range(bench.pick(20, 2_000)):
                await questions.ask(client)
            refused = 0
            if sodium.MISSING is None:
                hostile = bench.hostile(node)
                for build in hostile.defects(fed).values():
                    await hostile.answer_to(build())
                    refused += 1
            pids = [node.pid, *children_of(node.pid)]
            shared = _memfds(pids)
            in_memory = len(_search(shared, [canary]))
            limits = Path(f"/proc/{node.pid}/limits").read_text()
            if workers := children_of(node.pid):
                async with questions.going_on(client, client, pause_s=0):
                    await asyncio.sleep(0.02)
                    os.kill(min(workers), signal.SIGABRT)
                    await asyncio.sleep(0.2)
                await questions.until_right(client, 60)
        for page in ("metrics", "healthz", "readyz"):
            fetch = functools.partial(urllib.request.urlopen, f"http://{metrics}/{page}")
            with await asyncio.to_thread(fetch) as answer:
                (bench.folder / page).write_bytes(answer.read())
        node.term()
        await asyncio.sleep(1)
        files = [path for path in [*bench.folder.rglob("*")] if path.is_file()]
        files = [path for path in files if path.suffix != ".key" and bench.toy not in path.parents]
    files += [p for p in Path("/dev/shm").glob("*") if p.is_file() and p not in shm]
    files += [Path(p) for p in Path.cwd().glob("core*") if p.is_file()]
    secrets = [edge.keypair.secret.encode(), node.keypair.secret.encode()]
    forms = [*_forms(canary), *secrets]
    hits = _search(files, forms)
    core = re.search(r"Max core file size\s+(\S+)", limits)
    seen = {
        "hits": hits,
        "files searched": len(files),
        "pages searched": ["/metrics", "/healthz", "/readyz"],
        "bytes of logs": sum(path.stat().st_size for path in files if path.exists()),
        "core file limit of the node": core[1] if core else "?",
        "shared memory segments that still hold it (memory, not files)": in_memory,
    }
    held = not hits and core is not None and core[1] == "0" and questions.right > 0
    return Seen({"requests": questions.asked, "refused ones": refused}, seen, held)


@row(
    "cancellation",
    "cancelled at every await: no task or pending entry left, the node's answers stay right",
    short_s=90,
)
@running
async def cancellation(bench: Bench) -> Seen:
    frames, questions, rng = bench.pick(1_000, 10_000), Questions(bench), np.random.default_rng(6)
    cancelled = 0
    with bench.node() as node:
        async with connected(bench.edge(node), bench.bundle) as client:
            assert await questions.ask(client)
            tasks_before = len(asyncio.all_tasks())
            for number in range(frames):
                task = asyncio.create_task(questions.ask(client))
                for _ in range(number % 40):
                    await asyncio.sleep(0)
                if number % 3 == 0:
                    await asyncio.sleep(float(rng.uniform(0, 0.004)))
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
                cancelled += task.cancelled()
            finished = questions.right + questions.failed.total() - 1
            await questions.until_right(client, 20)
            await asyncio.sleep(0.2)
            left = len(asyncio.all_tasks()) - tasks_before
            pending = len(client._pending)
        alive = node.running and node.starts == 1
    seen = {**questions.told(), "cancelled": cancelled, "tasks left": left, "pending left": pending}
    held = alive and left <= 0 and not pending and not questions.wrong and cancelled > frames / 3
    held = held and finished == frames - cancelled
    return Seen({"questions": frames}, seen, held)


@row(
    "clock jump",
    "wall clock +-1 h at both ends: every answer right, deadlines unaffected",
)
def clock(bench: Bench) -> Seen:
    if "WALL_OFFSET" not in os.environ:
        # Modules that move the clock must be there from the start: run the same row again, with
        # them.
        compiler = shutil.which("cc") or shutil.which("gcc")
        if not compiler:
            raise Skip("moving a process's wall clock needs a C compiler, and there is none")
        library, state = bench.folder / "wallclock.so", bench.folder / "offset"
        source = Path(__file__).with_name("wallclock.c")
        command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
        subprocess.run(command, check=True, capture_output=True)
        state.write_bytes(struct.pack("=q", 0))
        environment = {**os.environ, "LD_PRELOAD": str(library), "WALL_OFFSET": str(state)}
        os.execve(sys.executable, [sys.executable, "-m", "reliability", *sys.argv[1:]], environment)
    with open(os.environ["WALL_OFFSET"], "r+b") as state_file:
        return asyncio.run(_jumps(bench, mmap.mmap(state_file.fileno(), 8)))


async def _jumps(bench: Bench, offset: mmap.mmap) -> Seen:
    questions, slow = Questions(bench), Questions(bench)
    jumps = bench.pick([3600, -3600, 0], [3600, -3600, 0] * 40)
    wall = []
    with bench.node() as node, bench.node(policy="stall") as stalled:
        async with (
            connected(bench.edge(node), bench.bundle) as client,
            connected(bench.edge(stalled), bench.bundle) as waiting,
            questions.going_on(client),
        ):
            for jump in jumps:
                asked = asyncio.create_task(slow.ask(waiting, 1.0))
                await asyncio.sleep(0.4)
                before = time.time()
                offset[:] = struct.pack("=q", jump)
                wall.append(round(time.time() - before))
                await asked
    seen = {
        **questions.told(),
        "wall clock moved s": wall[:3],
        "deadline of 1 s missed by ms, worst": round(1000 * slow.over_s, 1),
        "ended before it": sum(took < 0.95 for took in slow.times_s),
    }
    held = questions.right == questions.asked > 0 and all(abs(moved) > 3000 for moved in wall)
    held = held and slow.over_s <= 0.1 and not seen["ended before it"]
    return Seen({"jumps": len(jumps)}, seen, held)


_STUCK = (
    "import signal, time; signal.signal(signal.SIGUSR1, lambda *_: time.sleep({seconds})); "
    "from cloud_node.cli import main; raise SystemExit(main())"
)


@row(
    "watchdog",
    "a node whose event loop is stuck sends the service manager no sign of life meanwhile; before "
    "and after it does in time, and serves",
)
@running
async def watchdog(bench: Bench) -> Seen:
    period, stuck_s, times = 0.4, 1.5, bench.pick(2, 40)
    questions, pings = Questions(bench), list[float]()
    silent: list[int] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        address = str(bench.folder / "notify")
        manager.bind(address)
        manager.setblocking(False)

        def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
            told = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": str(round(period * 1e6))}
            changed = [sys.executable, "-c", _STUCK.format(seconds=stuck_s), *command[3:]]
            return subprocess.Popen(changed, **{**options, "env": {**options["env"], **told}})

        def read() -> None:
            if b"WATCHDOG=1" in manager.recv(1000):
                pings.append(time.monotonic())

        loop = asyncio.get_running_loop()
        loop.add_reader(manager, read)
        try:
            with bench.node(popen=start) as node:
                async with connected(bench.edge(node), bench.bundle) as client:
                    for _ in range(times):
                        await questions.until_right(client, 30)
                        await asyncio.sleep(4 * period)
                        os.kill(node.pid, signal.SIGUSR1)
                        await asyncio.sleep(0.05)
                        begun = time.monotonic()
                        await asyncio.sleep(stuck_s - 0.2)
                        silent.append(sum(ping > begun for ping in pings))
                        await asyncio.sleep(0.2)
                    await questions.until_right(client, 30)
                    await asyncio.sleep(2 * period)
                alive = node.running and node.starts == 1
        finally:
            loop.remove_reader(manager)
    pauses = [later - sooner for sooner, later in itertools.pairwise(pings)]
    sound = [pause for pause in pauses if pause < stuck_s - 0.2]
    seen = {
        **questions.told(),
        "signs of life": len(pings),
        "of these while stuck": sum(silent),
        "longest pause otherwise ms": round(1000 * max(sound, default=0.0), 1),
    }
    held = alive and not questions.wrong and not sum(silent) and len(pauses) - len(sound) == times
    held = held and max(sound) <= period
    return Seen({"watchdog ms": 1000 * period, "stuck for s": stuck_s, "times": times}, seen, held)


@row(
    "schema skew",
    "one version older and newer, both ways: works or is refused clearly; golden bytes stable",
)
@running
async def skew(bench: Bench) -> Seen:
    if sodium.MISSING is not None:
        raise Skip(str(sodium.MISSING))
    module = _tests("transport/test_messages.py")
    stable = [
        name
        for name, (message, arrays) in module.MESSAGES.items()
        if bytes(encode(message, arrays, module.SEAL)) == module._golden(name)
    ]
    told: dict[str, str] = {}
    fed = feeds(bench.bundle)
    with bench.node() as node:
        hostile = bench.hostile(node)
        (good,) = hostile.request(fed)

        async def say(name: str, message: bytes) -> None:
            answer = await hostile.answer_to([message])
            told[name] = answer.code if isinstance(answer, Refused) else repr(answer)

        await say("older edge", b"ERT\1" + good[4:])
        await say("newer edge", b"ERT\3" + good[4:])
        await say("edge with a new field", with_header(good, priority=3))
        await say("edge with a new message", with_header(good, type="subscribe"))
        await say("as it is", good)

    def at_edge(name: str, frame: Any, id: bytes) -> None:
        client = bench.idle_client()
        client._pending[id] = pending = _Pending()
        try:
            client._handle(frame, 0.0)
            answer = pending.answer.result() if pending.answer.done() else "waits"
            told[name] = type(answer[0]).__name__ if isinstance(answer, tuple) else answer
        except Exception as error:
            told[name] = getattr(error, "code", repr(error))

    id = new_id()
    refused = bytes(encode(Refused(id, "overloaded", "later", 250)))
    at_edge("older node: no retry hint", with_header(refused, retry_ms=None), id)
    at_edge("newer node: a code unknown here", with_header(refused, code="quota_exceeded"), id)
    at_edge("older node: versions", encode(VersionsSpoken((7,))), id)
    at_edge("newer node", b"ERT\3" + refused[4:], id)
    expected = {
        "older edge": "VersionsSpoken(versions=(2,))",
        "newer edge": "VersionsSpoken(versions=(2,))",
        "edge with a new field": "malformed",
        "edge with a new message": "malformed",
        "older node: no retry hint": "Refused",
        "newer node: a code unknown here": "Refused",
        "older node: versions": "wrong_version",
        "newer node": "wrong_version",
    }
    held = len(stable) == len(module.MESSAGES) and told["as it is"].startswith("Accepted")
    held = held and all(told[name] == what for name, what in expected.items())
    seen = {"golden stable": f"{len(stable)} of {len(module.MESSAGES)}", "told": told}
    return Seen({"messages": 8}, seen, held)
