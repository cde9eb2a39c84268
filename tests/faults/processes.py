"""Faults of processes and links: signals at chosen instants, /proc samples, network namespaces.

A `Child` can be killed, frozen, thawed and restarted. A `Plan` is a reproducible list of actions
with times, run by `run_plan`. `Sampler` follows a process's memory, descriptors and threads.
`Netns` is two namespaces joined by a veth pair, with a rate limit and a cable that can be pulled;
it needs root (`Netns.unavailable` says why it can't run). All of them clean up at the end of their
``with``, or at the latest with the program.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from typing_extensions import Self

Action = Literal["kill", "stop", "cont", "term", "restart"]


class Child:
    """A process that runs from its creation to the end of its ``with``.

    Args:
        command: to run.
        log: file for its output. Restarts append to it.
        ready: called until it returns True. The constructor and `restart` wait for that.
        wait: if False, the constructor does not wait. Call `wait_ready`.
        timeout_s: time to become ready.
        popen: starts it, for example in a `Netns`.
        environment: None is this process's environment.

    Attributes:
        starts: how often it was started. pid: of the current process.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        ready: Callable[[], bool] | None = None,
        wait: bool = True,
        timeout_s: float = 60.0,
        popen: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.command, self.log = list(command), log
        self.starts = self._forgotten = 0
        self._ready, self._timeout_s, self._popen = ready, timeout_s, popen
        self._environment = environment
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self.start(wait=wait)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    def logged(self) -> str:
        """Its output, since `forget_log` if that was called."""
        return self.log.read_bytes()[self._forgotten :].decode(errors="replace")

    def forget_log(self) -> None:
        """Make `logged` skip the output so far."""
        self._forgotten = self.log.stat().st_size

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, *, wait: bool = True) -> None:
        """Start it, and `wait_ready` unless `wait` is False."""
        with self._lock, self.log.open("ab") as out:
            if self.running:
                return
            self._process = self._popen(
                self.command,
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                env=self._environment,
            )
            self.starts += 1
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Wait until it is ready.

        Raises:
            RuntimeError: it ended, or was not ready in time.
        """
        give_up = time.monotonic() + self._timeout_s
        while self._ready and not self._ready():
            if not self.running or time.monotonic() > give_up:
                text = self.logged()[-2000:]
                self.kill()
                raise RuntimeError(f"{self.command[0]} did not become ready: {text}")
            time.sleep(0.01)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait. Returns the exit status."""
        self.signal(number)
        return self.process.wait(60)

    def signal(self, number: int) -> bool:
        """Send a signal. False if it has ended. A reused pid is never hit."""
        with self._lock:
            if not self.running:
                return False
            assert self._process is not None
            self._process.send_signal(number)
            return True

    def stop(self) -> bool:
        """Freeze it (SIGSTOP) and wait until it has stopped."""
        sent = self.signal(signal.SIGSTOP)
        give_up = time.monotonic() + 5
        while sent and self.running and state(self.pid) != "T" and time.monotonic() < give_up:
            time.sleep(0.001)
        return sent

    def cont(self) -> bool:
        """Thaw it (SIGCONT)."""
        return self.signal(signal.SIGCONT)

    def kill(self) -> int | None:
        """Send SIGKILL and wait. Returns the exit status."""
        self.signal(signal.SIGKILL)
        return self._process.wait(30) if self._process else None

    def term(self) -> bool:
        """Send SIGTERM."""
        return self.signal(signal.SIGTERM)

    def restart(self) -> None:
        """Kill it if it runs, and start it again."""
        self.kill()
        self.start()

    def do(self, action: Action) -> None:
        getattr(self, action)()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()


@dataclass(frozen=True)
class Step:
    """At `at_s` seconds from the start, apply `action` to the named child."""

    at_s: float
    child: str
    action: Action


Plan = Sequence[Step]


def random_plan(
    seed: int,
    children: Sequence[str],
    *,
    seconds: float,
    every_s: float,
    actions: Sequence[Action] = ("kill", "stop"),
    down_s: tuple[float, float] = (0.1, 1.0),
) -> list[Step]:
    """Random faults, on average every `every_s`. Each is undone after a time in `down_s`: a kill by
    a restart, a stop by a cont. A child has one fault at a time, and all are undone."""
    rng = random.Random(f"{seed}/plan")
    busy = dict.fromkeys(children, 0.0)
    steps: list[Step] = []
    at = rng.expovariate(1 / every_s)
    while at < seconds:
        free = [name for name, until in busy.items() if until <= at]
        if free:
            name, action = rng.choice(free), rng.choice(list(actions))
            until = at + rng.uniform(*down_s)
            undo: Action = "cont" if action == "stop" else "restart"
            steps += [Step(at, name, action), Step(until, name, undo)]
            busy[name] = until
        at += rng.expovariate(1 / every_s)
    return sorted(steps, key=lambda step: step.at_s)


@dataclass(frozen=True)
class Done:
    """A performed step. `at_s` is the time at which it was done."""

    step: Step
    at_s: float


@contextlib.contextmanager
def run_plan(plan: Plan, children: Mapping[str, Child]) -> Iterator[list[Done]]:
    """Run the steps in a thread while the body runs. The list fills with performed steps.

    Leaving the body ends the plan and thaws every child. Killed children stay dead. An error in a
    step ends the plan and is raised on leaving.
    """
    done: list[Done] = []
    ended = threading.Event()
    failed: list[BaseException] = []

    def work() -> None:
        begun = time.monotonic()
        try:
            for step in plan:
                if ended.wait(max(0.0, begun + step.at_s - time.monotonic())):
                    return
                children[step.child].do(step.action)
                done.append(Done(step, time.monotonic() - begun))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work, name="plan", daemon=True)
    thread.start()
    try:
        yield done
    finally:
        ended.set()
        thread.join()
        for child in children.values():
            child.cont()
    if failed:
        raise failed[0]


def children_of(pid: int) -> set[int]:
    """Processes that any thread of this process started and that still exist, zombies included."""
    found: set[int] = set()
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            found |= set(map(int, listed.read_text().split()))
    return found


def descendants_of(pid: int) -> set[int]:
    """Its children, their children and so on."""
    children = children_of(pid)
    return children.union(*map(descendants_of, children))


def state(pid: int) -> str:
    """The state as in ``ps``: R, S, D, T (stopped) or Z. Empty if the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


@dataclass(frozen=True)
class Sample:
    """Values of a process: `at_s` on the monotonic clock, `rss` and `peak` (the highest) in bytes,
    open descriptors, threads, and processor seconds."""

    at_s: float
    rss: int
    peak: int
    fds: int
    threads: int
    cpu_s: float


def sample(pid: int) -> Sample:
    """Read a process's current values from /proc.

    Raises:
        ProcessLookupError: it has ended.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        fds = len(os.listdir(f"/proc/{pid}/fd"))
        times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError as error:
        raise ProcessLookupError(f"no process {pid}: {error.strerror}") from None
    fields = dict(re.findall(r"^(\w+):\s+(\d+)", status, re.MULTILINE))
    if "VmRSS" not in fields:
        raise ProcessLookupError(f"process {pid} has ended")
    cpu = (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")
    rss, peak = int(fields["VmRSS"]) * 1024, int(fields["VmHWM"]) * 1024
    return Sample(time.monotonic(), rss, peak, fds, int(fields["Threads"]), cpu)


class Sampler:
    """Samples of a process every `every_s`, taken in a thread inside the ``with``.

    Keeps at most `most` samples: it then drops every other one and samples half as often. The end
    of the process ends the sampling.
    """

    def __init__(self, pid: int, *, every_s: float = 0.1, most: int = 10_000) -> None:
        self.samples: list[Sample] = []
        self._pid, self._every_s, self._most = pid, every_s, most
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="sampler", daemon=True)

    @property
    def peak_rss(self) -> int:
        """Highest memory among the samples, in bytes."""
        return max(one.rss for one in self.samples)

    def growth(self, field: str = "rss") -> float:
        """The last sample minus the first."""
        return float(getattr(self.samples[-1], field) - getattr(self.samples[0], field))

    def slope(self, field: str = "rss", *, skip: float = 0.2) -> float:
        """Least-squares growth per hour, without the first `skip` (a share) of the samples."""
        kept = self.samples[int(len(self.samples) * skip) :]
        times = [one.at_s for one in kept]
        values = [float(getattr(one, field)) for one in kept]
        if len(kept) < 2 or times[-1] == times[0]:
            return 0.0
        mid_t, mid_v = sum(times) / len(kept), sum(values) / len(kept)
        over = sum((t - mid_t) * (v - mid_v) for t, v in zip(times, values, strict=True))
        return 3600 * over / sum((t - mid_t) ** 2 for t in times)

    def _take(self) -> bool:
        try:
            self.samples.append(sample(self._pid))
        except ProcessLookupError:
            return False
        if len(self.samples) >= self._most:
            del self.samples[1::2]
            self._every_s *= 2
        return True

    def _work(self) -> None:
        while not self._ended.wait(self._every_s) and self._take():
            pass

    def __enter__(self) -> Sampler:
        self._take()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self._take()


_numbers = itertools.count()
_PREFIX = "faults"


class Netns:
    """Two namespaces, ``near`` and ``far``, connected by one link only.

    Start children with `popen`, or work in one with `enter`. Addresses: `NEAR` and `FAR`.

    Args:
        rate: of either direction, as ``tc`` writes it (``8mbit``). None is unlimited.
        mtu: of the link.
    """

    NEAR, FAR = "10.0.0.1", "10.0.0.2"

    def __init__(self, *, rate: str | None = None, mtu: int = 1500) -> None:
        tag = f"{_PREFIX}-{os.getpid()}-{next(_numbers)}"
        self.names = {"near": f"{tag}-near", "far": f"{tag}-far"}
        self._first_rate, self._mtu = rate, mtu
        self._children: list[subprocess.Popen[bytes]] = []

    @staticmethod
    @functools.cache
    def unavailable() -> str | None:
        """Why namespaces can't be used here. None if they can."""
        if not sys.platform.startswith("linux") or os.geteuid() != 0:
            return "network namespaces need Linux and root"
        if missing := [tool for tool in ("ip", "tc") if not shutil.which(tool)]:
            return f"network namespaces need {' and '.join(missing)} (iproute2)"
        try:
            with Netns(rate="8mbit"):
                return None
        except (OSError, subprocess.CalledProcessError) as error:
            told = getattr(error, "stderr", None) or str(error)
            return f"the kernel grants no network namespaces here: {told.strip()}"

    def popen(
        self, command: Sequence[str], *, side: Literal["near", "far"] = "far", **options: Any
    ) -> subprocess.Popen[bytes]:
        """`subprocess.Popen` in one of the namespaces. Leaving the ``with`` kills the process."""
        # becomes the command, with the same pid
        whole = ["ip", "netns", "exec", self.names[side], *command]
        process = subprocess.Popen(whole, **options)
        self._children.append(process)
        return process

    @contextlib.contextmanager
    def enter(self, side: Literal["near", "far"] = "near") -> Iterator[None]:
        """Move this thread into a namespace. New sockets and threads stay there.

        A `zmq.Context` starts threads with its first socket and opens all sockets in them. Create
        both inside.
        """
        libc = ctypes.CDLL(None, use_errno=True)
        new_net = 0x40000000
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            there = os.open(f"/run/netns/{self.names[side]}", os.O_RDONLY)
            try:
                if libc.setns(there, new_net) != 0:
                    raise OSError(ctypes.get_errno(), "setns failed")
            finally:
                os.close(there)
            try:
                yield
            finally:
                if libc.setns(home, new_net) != 0:
                    raise OSError(ctypes.get_errno(), "setns back failed")
        finally:
            os.close(home)

    def rate(self, rate: str | None, *, side: Literal["near", "far", "both"] = "both") -> None:
        """Limit the outgoing rate of a side (token bucket, no ``netem``). None removes the
        limit."""
        for name in self._sides(side):
            # There may be no limit to remove.
            _quiet("tc", "-n", name, "qdisc", "del", "dev", "eth0", "root")
            if rate:
                # A queue of 200 ms and a bucket of a few frames, like an ordinary home router.
                shape = ["tbf", "rate", rate, "burst", "16kb", "latency", "200ms"]
                _run("tc", "-n", name, "qdisc", "add", "dev", "eth0", "root", *shape)

    def down(self) -> None:
        """Pull the cable. Neither end is notified."""
        # Only the far end goes down. That takes the carrier of both, and the near address keeps its
        # routes.
        _run("ip", "-n", self.names["far"], "link", "set", "eth0", "down")

    def up(self) -> None:
        """Plug the cable in again."""
        _run("ip", "-n", self.names["far"], "link", "set", "eth0", "up")

    def _sides(self, side: str) -> list[str]:
        return list(self.names.values()) if side == "both" else [self.names[side]]

    def __enter__(self) -> Netns:
        _sweep()
        atexit.register(self._remove)
        near, far = self.names.values()
        try:
            for name in (near, far):
                _run("ip", "netns", "add", name)
            peer = ["peer", "name", "eth0", "netns", far]
            _run("ip", "-n", near, "link", "add", "name", "eth0", "type", "veth", *peer)
            for name, address in ((near, self.NEAR), (far, self.FAR)):
                _run("ip", "-n", name, "addr", "add", f"{address}/30", "dev", "eth0")
                _run("ip", "-n", name, "link", "set", "eth0", "mtu", str(self._mtu), "up")
                _run("ip", "-n", name, "link", "set", "lo", "up")
            self.rate(self._first_rate)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._remove()
        atexit.unregister(self._remove)

    def _remove(self) -> None:
        for child in self._children:
            if child.poll() is None:
                child.kill()
            child.wait()
        self._children.clear()
        for name in self.names.values():
            _quiet("ip", "netns", "del", name)


def _sweep() -> None:
    """Remove such namespaces whose creator has ended, for example by SIGKILL."""
    with contextlib.suppress(OSError):
        for name in os.listdir("/run/netns"):
            match = re.fullmatch(rf"{_PREFIX}-(\d+)-\d+-(near|far)", name)
            if match and not Path(f"/proc/{match[1]}").exists():
                _quiet("ip", "netns", "del", name)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)


def _quiet(*command: str) -> None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run(command, check=False, capture_output=True, timeout=30)
