"""The GPU benchmark: ``python -m exporters.gpu`` verifies and times every stage on every engine.

It writes ``docs/results/gpu-NAME.json`` after every row. Each engine runs in a process of its own
(:mod:`exporters.gpu_worker`), so that a crash loses only that engine's rows. This module imports
neither torch nor anything else that needs installing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from edge_common.files import write_atomically
from edge_common.signals import child_process

SCHEMA = 1
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"

MODELS = ("vit_h", "vit_b", "vit_l", "tiny")  # models with targets first, because time may run out
BASELINE = "pytorch-eager"
ENGINES = (
    BASELINE,
    "pytorch-compiled",
    "tensorrt",
    "onnxruntime",
    "pytorch-packed",
    "pytorch-tuned",
    "tensorrt-rtx",
    "pytorch-folded",
)
NEEDS_GRAPHS = ("tensorrt", "onnxruntime", "tensorrt-rtx")
CASES = (
    ("stack", 25),
    ("tail", 25),
    ("decoder", 1),
    ("stack", 9),  # the largest share of a node whose windows may not touch
    ("stack", 1),
    ("decoder", 16),
    ("encoder", 25),
)
REHEARSED = (("stack", 25), ("stack", 9), ("tail", 25), ("decoder", 1), ("encoder", 25))

WORKER = "exporters.gpu_worker"
REQUIRED = {"msgspec": "msgspec", "segment_anything": "segment-anything"}
"""Modules that every part needs beside PyTorch, with their names on PyPI."""
PYTORCH = ("torch", "torchvision", "numpy")

CLOSING_SECONDS = 20.0
"""Reserved for measuring the matrix rate again at the end."""

NOTES = (
    "Weights are random, so masks mean nothing; parity compares the same weights.",
    "A run's time is between CUDA events on its stream. Runs follow without a pause, so launches "
    "count where they take longest; TensorRT's are waited for one by one, and the launch of each "
    "counts. The level-2 cache is not flushed between runs: the weights of vit_b and larger do not "
    "fit it; those of tiny do, and its times profit.",
    "TFLOP counts upstream's matrix products and convolutions (exporters/flops.py), for every "
    "engine alike. share_of_matmul is against the best dense square product of the same precision "
    "measured in the same run, random values.",
    "Peak memory of PyTorch rows and of the others is measured in different ways: see peak_method.",
)

Row = dict[str, Any]
Event = dict[str, Any]


@dataclass
class Results:
    """The results file, written whole after every change."""

    path: Path
    head: dict[str, Any]
    rates: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Add ``row``, in place of one with the same key."""
        self.rows = [r for r in self.rows if key(r) != key(row)] + [row]
        self.write()

    def find(self, wanted: tuple[Any, ...]) -> Row | None:
        return next((r for r in self.rows if key(r) == wanted), None)

    def content(self) -> dict[str, Any]:
        """The content of the file; shares and targets are computed here from the rows."""
        best = best_rates(self.rates)
        for row in self.rows:
            rate = best.get(row.get("precision", ""))
            if "tflops" in row:
                row["share_of_matmul"] = row["tflops"] / rate if rate else None
        return {
            **self.head,
            "notes": list(NOTES),
            "matmul_tflops": best,
            "matmul_rates": self.rates,
            "targets": targets(self.rows, self.head),
            "rows": self.rows,
        }

    def write(self) -> None:
        text = json.dumps(self.content(), indent=1) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, text)


def key(row: Row) -> tuple[Any, ...]:
    """Engine, model, precision, stage and size of a row."""
    size = row.get("windows", row.get("prompts"))
    return row["engine"], row.get("model"), row.get("precision"), row.get("stage"), size


def best_rates(rates: Iterable[dict[str, Any]]) -> dict[str, float]:
    """The best rate of each precision, in TFLOP/s, over all sizes and both measurements."""
    best: dict[str, float] = {}
    for rate in rates:
        best[rate["precision"]] = max(best.get(rate["precision"], 0.0), rate["tflops"])
    return best


def check_parity(row: Row) -> None:
    """Check a row's output against the tolerance, and fail the row if it misses.

    The baseline never fails: its deviation in half precision is only recorded.
    """
    parity = row.get("parity")
    if not parity:
        return
    limit, iou = parity["tolerance"], parity.get("mask_iou")
    parity["passed"] = bool(
        parity["finite"]
        and parity["cosine"] >= limit["cosine"]
        and parity["error"] <= limit["error"]
        and (iou is None or iou >= limit["mask_iou"])
    )
    if not parity["passed"] and row["engine"] != BASELINE:
        row["status"] = "failed: the output differs from upstream's beyond the tolerance"


# --- Targets -----------------------------------------------------------------------------------

STACK_SHARE, STACK_SPEEDUP = 0.55, 2.0
TAIL_SPEEDUP, TAIL_MEMORY = 3.0, 0.1


def targets(rows: Sequence[Row], head: dict[str, Any]) -> list[dict[str, Any]]:
    """Each target for ViT-H on a data-centre GPU: met, missed, or why it is not measurable.

    The best engine in half precision counts, compared with the baseline of its precision.
    """
    why = None
    if head.get("rehearsal"):
        why = "a rehearsal on the CPU"
    elif head["machine"].get("integrated"):
        why = "the targets are for data-centre GPUs; this one is integrated"

    def good(stage: str, engine: str | None = None) -> list[Row]:
        return [
            row
            for row in rows
            if (row.get("model"), row.get("stage"), row.get("windows")) == ("vit_h", stage, 25)
            and row["status"] == "ok"
            and row["precision"] in ("fp16", "bf16")
            and ((row["engine"] == engine) if engine else row["engine"] != BASELINE)
        ]

    def pairs(stage: str) -> list[tuple[Row, Row]]:
        baselines = {row["precision"]: row for row in good(stage, BASELINE)}
        return [(r, baselines[r["precision"]]) for r in good(stage) if r["precision"] in baselines]

    def speedup(pair: tuple[Row, Row]) -> float:
        return pair[1]["median_ms"] / pair[0]["median_ms"]

    def memory(pair: tuple[Row, Row]) -> float | None:
        ours, theirs = pair[0].get("peak_bytes"), pair[1].get("peak_bytes")
        return ours / theirs if ours and theirs else None

    def said(text: str, row: Row | None, met: bool, **found: Any) -> dict[str, Any]:
        if why or row is None:
            missing = why or "no row of an engine, or of the baseline, with status ok"
            return {"target": text, "status": f"not measurable: {missing}"}
        engine = {"engine": row["engine"], "precision": row["precision"]}
        return {"target": text, "status": "met" if met else "missed", **found, **engine}

    shares = [row for row in good("stack") if row.get("share_of_matmul")]
    best = max(shares, key=lambda row: row["share_of_matmul"], default=None)
    share = best["share_of_matmul"] if best else 0.0
    fast = max(pairs("stack"), key=speedup, default=None)
    tails = pairs("tail")

    def meets(pair: tuple[Row, Row]) -> bool:
        ratio = memory(pair)
        return speedup(pair) >= TAIL_SPEEDUP and ratio is not None and ratio <= TAIL_MEMORY

    tail = max(tails, key=lambda pair: (meets(pair), speedup(pair)), default=None)
    if tail and memory(tail) is None:
        tail = None
    return [
        said(
            f"stack, 25 windows: at least {STACK_SHARE:.0%} of the measured matrix rate",
            best,
            share >= STACK_SHARE,
            share_of_matmul=share,
        ),
        said(
            f"stack, 25 windows: at least {STACK_SPEEDUP:g} times as fast as {BASELINE}",
            fast[0] if fast else None,
            bool(fast and speedup(fast) >= STACK_SPEEDUP),
            speedup=speedup(fast) if fast else None,
        ),
        said(
            f"tail: at least {TAIL_SPEEDUP:g} times as fast as {BASELINE}, with at most "
            f"{TAIL_MEMORY:g} of its peak memory",
            tail[0] if tail else None,
            bool(tail and meets(tail)),
            speedup=speedup(tail) if tail else None,
            memory_ratio=memory(tail) if tail else None,
        ),
    ]


# --- Child processes ---------------------------------------------------------------------------


def child(request: dict[str, Any], limit: float, handle: Callable[[Event], None]) -> str | None:
    """Run one request in its own process, at most ``limit`` seconds.

    Args:
        request: see :mod:`exporters.gpu_worker`.
        limit: seconds after which it is killed, with everything it started.
        handle: called with each event.

    Returns:
        None if it finished; otherwise the reason, in one line.
    """
    environment = dict(os.environ)
    paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    events: queue.Queue[Event | None] = queue.Queue()
    finished, problem = False, None
    with (
        tempfile.TemporaryFile("w+", errors="replace") as chatter,
        child_process(
            [sys.executable, "-m", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=chatter,
            env=environment,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None

        def read(lines: Iterable[bytes]) -> None:
            for line in lines:
                with contextlib.suppress(ValueError):
                    events.put(json.loads(line))
            events.put(None)

        reader = threading.Thread(target=read, args=(process.stdout,), daemon=True)
        reader.start()
        end = time.monotonic() + limit
        with contextlib.suppress(BrokenPipeError):  # it is dead already, which is reported below
            process.stdin.write(json.dumps({**request, "seconds": limit}).encode())
            process.stdin.close()
        while True:
            try:
                event = events.get(timeout=max(0.01, end - time.monotonic()))
            except queue.Empty:
                problem = f"no end within {limit:.0f} s"
                break
            if event is None:
                break
            if event["event"] == "done":
                finished = True
            elif event["event"] == "failed":
                problem = event["why"]
            else:
                handle(event)
        if problem is None and not finished:
            code = process.wait()
            chatter.seek(0)
            problem = f"{_ending(code)}{_last_words(chatter.read())}"
    return problem


def _ending(code: int) -> str:
    if code >= 0:
        return f"the process ended with status {code}"
    with contextlib.suppress(ValueError):
        return f"the process was ended by {signal.Signals(-code).name}"
    return f"the process was ended by signal {-code}"


def _last_words(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f" ({lines[-1][:200]})" if lines else ""


# --- The run -----------------------------------------------------------------------------------


class Benchmark:
    """One run: its options, its remaining time and its results."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args = args
        self.end = time.monotonic() + args.seconds
        self.cases = REHEARSED if args.cpu_rehearsal else CASES
        self.base = {
            "device": "cpu" if args.cpu_rehearsal else "cuda",
            "directory": str(scratch),
            "precisions": args.precisions,
            "cases": self.cases,
            "row_seconds": args.row_seconds,
            "runs": [3, 5] if args.cpu_rehearsal else [10, 200],
            "warm_up": [1, 0.0] if args.cpu_rehearsal else [3, 0.5],
        }
        self.commit = commit()
        self.versions: dict[str, str] = {}
        self.absent: dict[str, str] = {}
        self.prepared: dict[tuple[str, ...], str | None] = {}
        self.results: Results

    def left(self) -> float:
        return self.end - time.monotonic()

    def ask(self, limit: float | None = None, **request: Any) -> tuple[list[Event], str | None]:
        """Run a child for ``request``; return its events and its error, if any."""
        events: list[Event] = []
        limit = max(1.0, min(limit or self.args.engine_seconds, self.left()))
        return events, child({**self.base, **request}, limit, events.append)

    def machine(self) -> dict[str, Any]:
        """Facts about the machine; SystemExit with one line if there is nothing to measure."""
        events, problem = self.ask(task="probe")
        for event in events:
            if event["event"] == "no gpu":
                sys.exit(f"no NVIDIA GPU that PyTorch can use here ({event['why']}): {NOTHING}")
            if event["event"] == "machine":
                return event["machine"]
        sys.exit(f"the machine could not be asked what it is ({problem}): {NOTHING}")

    def measure_rates(self, when: str) -> None:
        """Measure the GPU's matrix rate. Without it, shares are not measured."""
        if when == "before" and self.left() < CLOSING_SECONDS:
            return
        events, problem = self.ask(limit=max(CLOSING_SECONDS, 60.0), task="rates")
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        found = [e["rate"] for e in events if e["event"] == "rate"]
        self.results.rates += [{**rate, "when": when, "time": now} for rate in found]
        self.results.write()
        if problem:
            say(f"matrix rate {when}: {problem}")
        for precision, rate in best_rates(self.results.rates).items():
            say(f"matrix rate {when}, {precision}: {rate:.4g} TFLOP/s")

    def check_engines(self) -> None:
        """Find the engines of this machine."""
        for engine in self.args.engines:
            if engine.startswith("pytorch"):  # probing the machine has proved it is here
                self.versions[engine] = f"PyTorch {self.results.head['machine']['torch']}"
                continue
            events, problem = self.ask(limit=120, task="check", engine=engine)
            for event in events:
                if event["event"] == "engine":
                    self.versions[engine] = event["version"]
                elif event["event"] == "absent":
                    problem = event["why"]
            if engine not in self.versions:
                self.absent[engine] = problem or "it did not say its version"
                say(f"{engine}: absent: {self.absent[engine]}")
                self.results.add({"engine": engine, "status": f"absent: {self.absent[engine]}"})

    def prepare(self, task: str, **request: Any) -> str | None:
        """Make the reference or a bundle, once; return why that failed, if so."""
        known = (task, *request.values())
        if known not in self.prepared:
            begun = time.monotonic()
            events, problem = self.ask(task=task, **request)
            for event in events:
                if event["event"] == "absent":
                    problem = event["why"]
            self.prepared[known] = problem and f"{task} failed: {problem}"
            outcome = problem or f"{time.monotonic() - begun:.0f} s"
            say(f"{' '.join(known)}: {outcome}")
        return self.prepared[known]

    def rows(self, model: str, precision: str, engine: str) -> None:
        """Measure all cases of one engine that the file lacks."""
        about = {"engine": engine, "model": model, "precision": precision}

        def size(case: tuple[str, int]) -> dict[str, Any]:
            return {"stage": case[0], "prompts" if case[0] == "decoder" else "windows": case[1]}

        def add(row: Row) -> None:
            row = {**about, **row, "commit": self.commit}
            check_parity(row)
            self.results.add(row)
            say(describe(row))

        def known(case: tuple[str, int]) -> bool:
            row = self.results.find(key({**about, **size(case)}))
            return row is not None and row["status"] == "ok"

        todo = [case for case in self.cases if not known(case)]
        if engine in NEEDS_GRAPHS:
            todo = [case for case in todo if case[0] != "encoder"]  # a split bundle has none
        problem = None
        if todo and self.left() > CLOSING_SECONDS:
            problem = self.prepare("reference", model=model)
            if engine in NEEDS_GRAPHS and not problem:
                problem = self.prepare("export", model=model, precision=precision)
        if problem:
            for case in todo:
                add({**size(case), "status": f"failed: {problem}"})
            return
        begun: list[Row] = []

        def handle(event: Event) -> None:
            if event["event"] == "begin":
                begun.append(event["row"])
            elif event["event"] == "row":
                begun.clear()
                case = (event["row"]["stage"], _count(event["row"]))
                todo.remove(case)
                add(event["row"])
            elif event["event"] == "masks":
                row = self.results.find(key({**about, **event}))
                if row and "parity" in row:
                    row["parity"]["mask_iou"] = event["mask_iou"]
                    check_parity(row)
                    self.results.write()

        end = min(time.monotonic() + self.args.engine_seconds, self.end - CLOSING_SECONDS)
        while todo and time.monotonic() < end:
            begun.clear()
            request = {**self.base, "task": "engine", **about, "cases": list(todo)}
            problem = child(request, max(1.0, end - time.monotonic()), handle)
            if problem is None:
                break
            # The case that ended the process is lost; the others run in a new process.
            if not begun and todo:
                begun.append(size(todo[0]))
            for row in begun:
                todo.remove((row["stage"], _count(row)))
                add({**row, "status": f"failed: {problem}"})
            if not begun:
                say(f"{engine}: the masks were not compared: {problem}")
        for case in todo:
            add({**size(case), "status": "not run: the time was up; --resume goes on"})

    def run(self) -> int:
        """Measure everything; return the number of rows with status ok."""
        machine = self.machine()
        path, head = (
            self.args.out,
            {
                "schema": SCHEMA,
                "rehearsal": bool(self.args.cpu_rehearsal),
                "command": shlex.join(["python", "-m", "exporters.gpu", *self.args.command]),
                "commit": self.commit,
                "machine": machine,
                "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            },
        )
        if path is None:
            path = RESULTS / f"gpu-{self.args.name or short_name(machine['gpu'])}.json"
        self.results = Results(path, head)
        if self.args.resume and path.exists():
            resume(self.results)
        self.results.write()
        say(f"{machine['gpu'] or 'CPU (rehearsal)'}: writing {path}")
        self.check_engines()
        self.results.head["engines"] = self.versions
        self.measure_rates("before")
        for model in self.args.models:
            for precision in self.args.precisions:
                for engine in self.args.engines:
                    if engine not in self.absent:
                        self.rows(model, precision, engine)
        self.end = max(self.end, time.monotonic() + CLOSING_SECONDS)
        self.measure_rates("after")
        self.results.write()
        for target in self.results.content()["targets"]:
            figures = [f"{k} {v:.3g}" for k, v in target.items() if isinstance(v, float)]
            say(f"{target['target']}: {target['status']} {' '.join(figures)}".rstrip())
        return sum(row["status"] == "ok" for row in self.results.rows)


def _count(row: Row) -> int:
    return int(row["windows"] if "windows" in row else row["prompts"])


def resume(results: Results) -> None:
    """Keep what an earlier run measured on this machine; SystemExit if it ran on another.

    Rows that failed, were absent or had no time are measured again.
    """
    try:
        old = json.loads(results.path.read_text())
        same = old["schema"] == SCHEMA and old["rehearsal"] == results.head["rehearsal"]
        machine = old["machine"]
        rates, rows = old["matmul_rates"], [r for r in old["rows"] if r["status"] == "ok"]
    except (ValueError, KeyError, TypeError) as error:
        sys.exit(f"{results.path} is no file of this benchmark ({error}): leave out --resume")
    for what in ("gpu", "driver", "cuda"):
        same = same and machine.get(what) == results.head["machine"].get(what)
    if not same:
        sys.exit(
            f"{results.path} was measured on {machine.get('gpu')} with driver "
            f"{machine.get('driver')}, not on this machine: choose another --out"
        )
    results.head["resumed"] = [*old.get("resumed", []), old["time"]]
    results.rates, results.rows = rates, rows


def describe(row: Row) -> str:
    """A row as one line."""
    size = f"{_count(row)} {'prompts' if 'prompts' in row else 'windows'}"
    what = f"{row['model']} {row['precision']} {row['stage']} ({size}) {row['engine']}"
    if "median_ms" not in row:
        return f"{what}: {row['status']}"
    memory = row.get("peak_bytes")
    peak = f", {memory / 2**20:,.0f} MiB" if memory else ""
    rate = f"{row['tflops']:.3g} TFLOP/s"
    if row.get("share_of_matmul"):
        rate += f" ({row['share_of_matmul']:.0%} of the matrix rate)"
    return (
        f"{what}: {row['median_ms']:.3f} ms, p95 {row['p95_ms']:.3f}, {rate}{peak}, {row['status']}"
    )


def short_name(gpu: str | None) -> str:
    """The name of a results file: ``h200`` for ``NVIDIA H200``."""
    words = re.findall(r"[a-z0-9]+", (gpu or "unknown").lower())
    ordinary = {"nvidia", "geforce", "tesla", "graphics", "gpu", "device"}
    return "-".join(word for word in words if word not in ordinary) or "unknown"


def commit() -> str:
    """The commit of this checkout, ``+`` where tracked files differ; ``unknown`` without git."""
    try:
        ask = ["git", "-C", str(ROOT)]
        run = subprocess.run([*ask, "rev-parse", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*ask, "diff", "--quiet", "HEAD"], capture_output=True)
    except OSError:
        return "unknown"
    return run.stdout.strip() + "+" * (changed.returncode == 1) if run.stdout else "unknown"


def missing() -> str | None:
    """The packages this Python lacks, and how to install them; None if it has all."""

    def lacking(modules: Iterable[str]) -> list[str]:
        return [module for module in modules if importlib.util.find_spec(module) is None]

    if modules := lacking(PYTORCH):
        return (
            f"{sys.executable} lacks {', '.join(modules)}: name a Python that has PyTorch for this "
            "GPU, as in `make gpu PYTHON=/opt/torch/bin/python3`"
        )
    if names := " ".join(REQUIRED[module] for module in lacking(REQUIRED)):
        return (
            f"{sys.executable} lacks {names}, which every part of this needs. Nothing is installed "
            f"here: run `python3 -m pip install --no-deps --target DIR {names}` with the same "
            "Python version where there is a network, then `PYTHONPATH=DIR make gpu`"
        )
    return None


NOTHING = "nothing was measured, nothing was written"


def say(text: str) -> None:
    print(text, flush=True)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m exporters.gpu", description="Verify and time every stage on this GPU."
    )
    add = parser.add_argument
    add("--out", type=Path, help="results file (default: docs/results/gpu-NAME.json)")
    add("--name", help="NAME in the file's name (default: from the GPU's)")
    add("--models", nargs="+", choices=MODELS)
    add("--precisions", nargs="+", choices=("fp16", "bf16", "fp32"))
    add("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    add("--seconds", type=float, default=3600.0, help="time budget of the whole run")
    add("--engine-seconds", type=float, default=400.0, help="time one process may take")
    add("--row-seconds", type=float, default=1.0, help="time spent on a row's timed runs, about")
    add("--resume", action="store_true", help="keep the rows of the file that are ok")
    add("--check", action="store_true", help="only say whether a GPU and all that's needed is here")
    add("--cpu-rehearsal", action="store_true", help="run through it on the CPU; not a result")
    args = parser.parse_args(arguments)
    args.command = list(arguments)
    args.models = args.models or (["tiny"] if args.cpu_rehearsal else list(MODELS))
    args.precisions = args.precisions or (["fp32"] if args.cpu_rehearsal else ["fp16", "bf16"])
    if args.name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", args.name):
        parser.error("--name is part of a file name: letters, digits, '.', '_' and '-'")
    if args.cpu_rehearsal and (args.out is None or RESULTS in args.out.resolve().parents):
        parser.error("a rehearsal is no result: give it an --out outside docs/results")
    if min(args.seconds, args.engine_seconds, args.row_seconds) <= 0:
        parser.error("times are seconds, more than 0")
    return args


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 0 if at least one row was measured."""
    args = parse(sys.argv[1:] if arguments is None else arguments)
    if lacking := missing():
        sys.exit(f"error: {lacking}")
    with tempfile.TemporaryDirectory(prefix="edge-runtime-gpu-") as scratch:
        benchmark = Benchmark(args, Path(scratch))
        if args.check:
            say(f"found {benchmark.machine()['gpu'] or 'no GPU; a rehearsal is possible'}")
            return 0
        try:
            return 0 if benchmark.run() else 1
        except KeyboardInterrupt:
            say("stopped; the rows so far are in the file, and --resume goes on")
            return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)  # what `timeout` sends
    sys.exit(main())
