"""Measure the rows of the reliability bar: ``python -m reliability``, with `tests` on
``PYTHONPATH``.

Every row runs in its own process, so a crash or a hang costs no other row, and memory is measured
per row. ``--out`` saves each row's results as soon as it has run, keeps the other rows in the file
and loses none to Ctrl-C. ``--doc`` instead writes the page that quotes the results, and its figure.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reliability.figure import figure
from reliability.page import FIGURE, page
from reliability.rows import ROWS, Bench, Form, Row, Skip
from reliability.telling import VERDICTS, brief

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs/results/reliability.json"
PAGE = ROOT / "docs/reliability.md"
MODULES = ("network", "hostile", "floods", "load", "trust", "throughput", "images")


def load_rows() -> dict[str, Row]:
    for module in MODULES:
        importlib.import_module(f"reliability.{module}")
    return ROWS


def measure(row: Row, bench: Bench) -> dict[str, Any]:
    """Run a row in this process."""
    told: dict[str, Any] = {"row": row.name, "bar": row.bar, "form": bench.form}
    begun = time.monotonic()
    try:
        seen = row.work(bench)
        told |= {"injected": dict(seen.injected), "seen": dict(seen.seen), "held": bool(seen.held)}
    except Skip as skip:
        told |= {"held": None, "skipped": str(skip)}
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        told |= {"held": False, "error": f"{type(error).__name__} at {where}: {error}"[:2000]}
    told["seconds"] = round(time.monotonic() - begun, 1)
    return told


def apart(row: Row, form: Form, toy: Path, folder: Path) -> dict[str, Any]:
    """Run a row in its own process, and kill it when its time is up."""
    folder.mkdir()
    out = folder / "told.json"
    command = [sys.executable, "-m", "reliability", "--one", row.name, "--form", form]
    command += ["--toy", str(toy), "--folder", str(folder / "work"), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "tests", ROOT)))}
    begun = time.monotonic()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, env=environment
        )
        try:
            process.wait(row.seconds[form])
            end = f"ended with status {process.returncode}"
        except subprocess.TimeoutExpired:
            end = f"still ran after {row.seconds[form]:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and any processes it left behind
            process.wait()
    if out.exists():
        told: dict[str, Any] = json.loads(out.read_text())
        return told
    text = (folder / "log").read_text(errors="replace")[-1500:]
    return {
        "row": row.name,
        "bar": row.bar,
        "form": form,
        "held": False,
        "error": f"the row's process {end}: {text}",
        "seconds": round(time.monotonic() - begun, 1),
    }


def about(arguments: list[str], machine: str) -> dict[str, Any]:
    """The facts about these numbers: command, commit, machine."""
    import msgspec
    import numpy
    import onnxruntime
    import zmq

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    dirty = git(
        "status",
        "--porcelain",
        "--",
        "edge_common",
        "transport",
        "cloud_node",
        "edge_runtime",
        "engines",
    )
    return {
        "command": " ".join(["PYTHONPATH=tests python -m reliability", *arguments]),
        "commit": git("rev-parse", "HEAD") + ("+changes" if dirty else ""),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine,
        "versions": {
            "python": platform.python_version(),
            "kernel": platform.release().partition("-")[0],
            "libzmq": zmq.zmq_version(),
            "pyzmq": zmq.__version__,
            "msgspec": msgspec.__version__,
            "numpy": numpy.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
    }


def merge(path: Path, told: list[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    """The results with the new rows, the other rows unchanged, each with its facts."""
    kept: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    fresh = {(one["row"], one["form"]) for one in told}
    rows = [one for one in kept if (one["row"], one["form"]) not in fresh]
    rows += [{**one, "run": facts} for one in told]
    order = {name: number for number, name in enumerate(ROWS)}
    rows.sort(key=lambda one: (order.get(one["row"], len(order)), one["form"] == "long"))
    return {"rows": rows}


def write(path: Path, text: str) -> None:
    """Write the file completely or not at all, even if this process is killed."""
    scratch = path.with_name(f"{path.name}.new")
    scratch.write_text(text)
    scratch.replace(path)


def write_page(results: dict[str, Any], to: Path) -> None:
    """Write the page, and its figure if there is anything to draw."""
    write(to, page(results))
    drawn, place = figure(results["rows"]), to.parent / FIGURE
    if drawn is None:
        place.unlink(missing_ok=True)
    else:
        write(place, drawn)


def recorded(form: Form, *paths: Path) -> dict[str, float]:
    """Seconds that each row took according to its results, by name. Later paths win."""
    found = [json.loads(path.read_text())["rows"] for path in paths if path.exists()]
    return {one["row"]: one["seconds"] for ones in found for one in ones if one["form"] == form}


def left(rows: Sequence[Row], seconds: dict[str, float]) -> str:
    """The expected time for these rows, as far as it is known."""
    known = [seconds[row.name] for row in rows if row.name in seconds]
    if not known:
        return "nobody knows how long is left: none of these rows was measured before"
    total = sum(known)
    words = f"{total:.0f} s" if total < 90 else f"{total / 60:.0f} min"
    least = "" if len(known) == len(rows) else "at least "
    return f"{least}about {words} left, by the rows' recorded seconds"


def shown(told: dict[str, Any], which: str) -> str:
    """A row's results for the terminal. The file has all the numbers."""
    first = f"{which:>6}  {VERDICTS[told['held']]:8}{told['seconds']:7.1f} s  {told['row']}"
    width, indent = min(shutil.get_terminal_size().columns, 110), " " * 8
    rest = textwrap.fill(brief(told), width, initial_indent=indent, subsequent_indent=indent)
    return f"{first}\n{rest}"


def run_rows(chosen: Sequence[Row], form: Form, out: Path, facts: dict[str, Any]) -> int:
    """Measure the rows one after another and save each. Returns the exit status."""
    found: list[dict[str, Any]] = []
    seconds = recorded(form, OUT, out)
    status = "\r\033[K" if sys.stdout.isatty() else None  # a line that the next one replaces
    try:
        with tempfile.TemporaryDirectory(prefix="reliability-") as scratch:
            from toy import write_toy_bundle

            toy = write_toy_bundle(Path(scratch) / "toy")
            for number, row in enumerate(chosen):
                line = f"{number} of {len(chosen)}, {left(chosen[number:], seconds)}: {row.name}"
                if status:
                    columns = shutil.get_terminal_size().columns
                    print(f"{status}{line[: columns - 1]}", end="", flush=True)
                elif number == 0:
                    print(line, flush=True)
                told = apart(row, form, toy, Path(scratch) / str(number))
                write(out, json.dumps(merge(out, [told], facts), indent=1) + "\n")
                found.append(told)
                which = f"{len(found)}/{len(chosen)}"
                print(f"{status or ''}{shown(told, which)}", flush=True)
    except KeyboardInterrupt:
        kept = f"what was measured is in {out}" if found else "nothing was measured"
        missing = ", ".join(row.name for row in chosen[len(found) :])
        print(f"{status or ''}stopped; {kept}; not run: {missing}")
        return 130
    failed = [one["row"] for one in found if one["held"] is False]
    skipped = sum(one["held"] is None for one in found)
    words = f"{sum(bool(one['held']) for one in found)} of {len(found)} rows held"
    words += f", {skipped} could not be run" if skipped else ""
    print(f"{words}{'; not held: ' if failed else ''}{', '.join(failed)}. All numbers: {out}")
    return int(bool(failed))


def main() -> int:
    parser = argparse.ArgumentParser("reliability", description=__doc__.splitlines()[0])
    parser.add_argument("--form", choices=("short", "long"), default="short")
    parser.add_argument("--row", action="append", metavar="NAME", help="only rows so named")
    parser.add_argument("--machine", default=f"{os.cpu_count()} CPU cores, {platform.machine()}")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--doc", action="store_true", help="write the page from the results")
    parser.add_argument("--list", action="store_true", help="the rows and their bars")
    for hidden in ("--one", "--toy", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    rows = load_rows()
    if options.one:
        folder = Path(options.folder)
        folder.mkdir(exist_ok=True)
        told = measure(rows[options.one], Bench(folder, Path(options.toy), options.form))
        options.out.write_text(json.dumps(told))
        return 0
    if options.list:
        for row in rows.values():
            print(f"{row.name}: {row.bar}")
        return 0
    if options.doc:
        write_page(json.loads(options.out.read_text()), PAGE)
        return 0
    chosen = [row for name, row in rows.items() if not options.row or name in options.row]
    if unknown := set(options.row or ()) - rows.keys():
        parser.error(f"no row {', '.join(sorted(unknown))}; --list shows them")
    return run_rows(chosen, options.form, options.out, about(sys.argv[1:], options.machine))


if __name__ == "__main__":
    sys.exit(main())
