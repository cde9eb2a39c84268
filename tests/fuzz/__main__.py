"""Fuzz for any time: ``python -m fuzz --seconds 600`` with `tests` on ``PYTHONPATH``.

Each target gets an equal share of the time in its own process. With atheris (``pip install
atheris``; Linux) mutations follow code coverage; otherwise hypothesis makes them, and the output
says so. The last line is one JSON object with inputs, failures and memory of each target. Failing
inputs are written to ``out/fuzz``; ``--replay FILE`` runs one again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ENGINES = ("atheris", "hypothesis")
_SAMPLE_EVERY = 100
_SETTLED = 0.2  # of the time: caches and the engine's corpus fill at first


class Record:
    """Counts a target's inputs and this process's memory and keeps both in a file, because atheris
    ends the process without any clean-up."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.inputs = 0
        self.outcomes: dict[str, int] = {}
        self._path, self._begun, self._seconds = path, time.monotonic(), seconds
        self._first: int | None = None
        self._next = 0.0

    def count(self, outcome: str) -> None:
        self.inputs += 1
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        if self.inputs % _SAMPLE_EVERY == 0 and time.monotonic() > self._next:
            self._next = time.monotonic() + 1
            self.save()

    def save(self) -> None:
        rss = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        if self._first is None and time.monotonic() - self._begun > _SETTLED * self._seconds:
            self._first = rss
        record = {
            "inputs": self.inputs,
            "seconds": round(time.monotonic() - self._begun, 1),
            "rss_settled": self._first,
            "rss_end": rss,
            "outcomes": self.outcomes,
        }
        self._path.write_text(json.dumps(record))


def with_atheris(name: str, seconds: float, folder: Path, record: Record) -> None:
    """Fuzz with atheris. Never returns."""
    import atheris  # type: ignore[import-not-found,unused-ignore]

    with atheris.instrument_imports(
        include=["edge_common", "transport", "edge_runtime", "cloud_node", "fuzz"]
    ):
        from fuzz.targets import TARGETS
    target = TARGETS[name]

    def one(data: bytes) -> None:
        record.count(target(data))

    corpus = folder / f"corpus-{name}"
    corpus.mkdir(exist_ok=True)
    arguments = [f"-max_total_time={max(1, round(seconds))}", "-max_len=512", "-rss_limit_mb=4096"]
    atheris.Setup([sys.argv[0], str(corpus), *arguments, f"-artifact_prefix={folder}/{name}-"], one)
    atheris.Fuzz()


def with_hypothesis(name: str, seconds: float, folder: Path, record: Record) -> None:
    """Run rounds of examples, each with another seed, until the time is up."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import seed as seeded
    from hypothesis import strategies as st

    from fuzz.targets import TARGETS

    target, until, number = TARGETS[name], time.monotonic() + seconds, 0
    checks = list(HealthCheck)

    def one(data: bytes) -> None:
        try:
            record.count(target(data))
        except BaseException:
            (folder / f"{name}-crash").write_bytes(data)
            raise

    while time.monotonic() < until:
        number += 1
        limit = settings(
            max_examples=2_000, deadline=None, database=None, suppress_health_check=checks
        )
        seeded(number)(limit(given(st.binary(max_size=200))(one)))()
    record.save()


def run(name: str, engine: str, seconds: float, folder: Path) -> dict[str, Any]:
    """Run one target in its own process and return its outcome."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "record.json"
        command = [sys.executable, "-m", "fuzz", "--engine", engine, "--one", name]
        command += ["--seconds", str(seconds), "--out", str(folder), "--record", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"inputs": 0}
    found["failed"] = done.returncode != 0
    if found["failed"]:
        found["error"] = (done.stderr or done.stdout)[-4000:]
        print(found["error"], file=sys.stderr)
    return found


def choose(engine: str | None, say: Callable[[str], None]) -> str:
    """The requested engine, or the best available one."""
    if engine:
        return engine
    if importlib.util.find_spec("atheris"):
        return "atheris"
    say("atheris is not installed (pip install atheris): hypothesis makes the inputs, blindly")
    return "hypothesis"


def main() -> int:
    parser = argparse.ArgumentParser("fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600, help="in all (default %(default)s)")
    parser.add_argument("--engine", choices=ENGINES, help="default: atheris if it is installed")
    parser.add_argument("--target", action="append", metavar="NAME", help="only this one")
    parser.add_argument("--out", type=Path, default=Path("out/fuzz"), help="corpora and failures")
    parser.add_argument("--replay", nargs=2, metavar=("NAME", "FILE"), help="run one input")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    engine = choose(options.engine, lambda text: print(text, file=sys.stderr))
    if options.one:
        fuzzing = with_atheris if engine == "atheris" else with_hypothesis
        record = Record(options.record, options.seconds)
        fuzzing(options.one, options.seconds, options.out, record)
        return 0
    from fuzz.targets import TARGETS

    if options.replay:
        name, file = options.replay
        print(TARGETS[name](Path(file).read_bytes()))
        return 0
    names = options.target or list(TARGETS)
    if unknown := set(names) - TARGETS.keys():
        parser.error(f"no target {', '.join(sorted(unknown))}: there are {', '.join(TARGETS)}")
    found = {}
    for name in names:
        print(f"{engine}: {name} for {options.seconds / len(names):.0f} s", file=sys.stderr)
        found[name] = run(name, engine, options.seconds / len(names), options.out)
    print(json.dumps({"engine": engine, "targets": found}))
    return int(any(one["failed"] for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
