"""What a message costs beside its encryption on the way: copying it into one frame, sealing it.

    python docs/results/wire.py

writes ``wire.json`` beside this file. For the messages of one image it times, in turn and in one
thread each: making the frame of a request (`encode`: a copy), sealing a result (`encode`: AES-GCM),
opening it (`decode`), and sending a frame of that size over a CURVE connection on loopback.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zmq

from transport.messages import Limits, Request, Result, decode, encode, new_id, new_seal

ROUNDS = 21
WINDOW, WINDOWS = 14, 25
MODELS = {"vit_b fp32": (768, np.float32), "vit_h fp16": (1280, np.float16)}
ANY = Limits(16, 1 << 30)


def ms(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return (time.perf_counter() - begun) * 1000


def sockets(ctx: zmq.Context[zmq.Socket[bytes]]) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
    """Two ends of a CURVE connection."""
    (public, secret), (mine, own) = zmq.curve_keypair(), zmq.curve_keypair()
    server, client = ctx.socket(zmq.PAIR), ctx.socket(zmq.PAIR)
    server.curve_server, server.curve_secretkey = True, secret
    client.curve_serverkey, client.curve_publickey, client.curve_secretkey = public, mine, own
    port = server.bind_to_random_port("tcp://127.0.0.1")
    client.connect(f"tcp://127.0.0.1:{port}")
    return server, client


def measure(send: Callable[[memoryview], object], width: int, dtype: type) -> dict[str, object]:
    """Bytes and median times of one model's messages."""
    rng, side, seal = np.random.default_rng(0), 16 * WINDOW, new_seal()
    feeds = {
        "pixels": rng.integers(0, 256, (WINDOWS, side, side, 3), dtype=np.uint8),
        "extent": np.full((WINDOWS, 2), side),
        "window": np.arange(WINDOWS),
    }
    tokens = {"tokens": rng.standard_normal((WINDOWS, WINDOW**2, width)).astype(dtype)}
    request, result = Request(new_id(), "0" * 64, 1, seal), Result(new_id(), 1, 1)
    asked, answered = encode(request, feeds), encode(result, tokens, seal)
    work: dict[str, Callable[[], object]] = {
        "request: copy": lambda: encode(request, feeds),
        "request: CURVE": lambda: send(asked),
        "result: seal": lambda: encode(result, tokens, seal),
        "result: CURVE": lambda: send(answered),
        "result: open": lambda: decode(answered, ANY, seal),
    }
    timed: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(ROUNDS):
        for name, each in work.items():
            timed[name].append(ms(each))
    return {
        "bytes": {"request": asked.nbytes, "result": answered.nbytes},
        "median_ms": {name: round(statistics.median(t), 2) for name, t in timed.items()},
    }


def main() -> None:
    """Write ``wire.json``."""
    ctx: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    server, client = sockets(ctx)

    def send(frame: memoryview) -> None:
        client.send(frame, copy=False)
        server.recv(copy=False)

    rows = [
        {"model": model, "windows": WINDOWS, **measure(send, *of)} for model, of in MODELS.items()
    ]
    client.close(linger=0)
    server.close(linger=0)
    ctx.term()
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    cpu = next(
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    out = {
        "command": "python docs/results/wire.py",
        "commit": commit,
        "machine": f"{cpu}, 2 shared cores, Python {platform.python_version()}",
        "rounds": ROUNDS,
        "rows": rows,
    }
    (Path(__file__).parent / "wire.json").write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
