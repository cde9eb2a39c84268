"""How much of a scene each party sees while the camera moves, and what that keeps at home.

    python docs/results/scenes.py

moves a camera over a scene in three ways, 200 frames of 1024 x 576 pixels each, places every frame
with the rule of ``edge_runtime/exposure/frames.py`` and with three simple rules, and writes
``scenes.json`` beside this file. Positions are known, with the error that each row names: 0 as if
the camera's motion were measured exactly, 1 pixel as it is charged in use. Shake: mean of three
walks. Takes some minutes.
"""

from __future__ import annotations

import json
import math
import platform
import subprocess
import time
from collections.abc import Callable
from itertools import product as product_of
from pathlib import Path
from statistics import mean, median

import numpy as np

from edge_runtime.exposure.colouring import touch
from edge_runtime.exposure.frames import FramePlacer
from edge_runtime.exposure.mosaic import Mosaic
from edge_runtime.exposure.motion import Position
from edge_runtime.exposure.placement import place
from engines.geometry import Geometry

GEOMETRY = Geometry(1024, 16, 14, 1280, 256)
SIZE = (576, 1024)
FRAMES = 200
BUDGET = 0.37
PARTIES = range(3, 10)
ERRORS = (0.0, 1.0)
WINDOWS = range(15)
RECTS = [(y0, x0, min(y1, SIZE[0]), x1) for y0, x0, y1, x1 in map(GEOMETRY.window_rect, WINDOWS)]
SIDE = GEOMETRY.windows_per_side

Path2 = np.ndarray  # [frames, 2]: y and x of the frame's corner
Rule = Callable[[np.ndarray, list[float], "list[int] | None", Position, int], list[int]]


def shake(seed: int) -> Path2:
    """A hand-held camera: jitter with a memory of ten frames, 32 pixels deviation, 96 at most."""
    random, at = np.random.default_rng(seed), np.zeros((FRAMES, 2))
    for t in range(1, FRAMES):
        at[t] = 0.9 * at[t - 1] + math.sqrt(1 - 0.9**2) * 32 * random.normal(size=2)
    return np.rint(np.clip(at, -96, 96))


def pan() -> Path2:
    """16 pixels to the right in every frame."""
    return np.stack([np.zeros(FRAMES), 16.0 * np.arange(FRAMES)], axis=1)


def sweep() -> Path2:
    """A figure of eight, both axes at up to 32 pixels a frame."""
    angle = 2 * np.pi * np.arange(FRAMES) / FRAMES
    return np.rint(np.stack([512 * np.sin(2 * angle), 1024 * np.sin(angle)], axis=1))


PATHS = {"shake": [shake(seed) for seed in range(3)], "pan": [pan()], "sweep": [sweep()]}


def near(parties: int) -> list[list[int]]:
    """For each window, those that touch it: with four parties or more also at a corner."""
    separation = 8 if parties >= 4 else 4
    return [[b for b in WINDOWS if touch(a, b, SIDE, separation)] for a in WINDOWS]


def first(parties: int) -> list[int]:
    areas = [(y1 - y0) * (x1 - x0) for y0, x0, y1, x1 in RECTS]
    names = [str(k) for k in range(parties)]
    placed = place(areas, list(WINDOWS), SIDE, names, 1.0, bytes(32), b"scene")
    return [next(k for k in range(parties) if w in placed.assignment[str(k)]) for w in WINDOWS]


def by_position(
    costs: np.ndarray, loads: list[float], before: list[int] | None, at: Position, parties: int
) -> list[int]:
    """Simple rule 1: a window keeps its party."""
    return before or first(parties)


def by_cell(
    costs: np.ndarray, loads: list[float], before: list[int] | None, at: Position, parties: int
) -> list[int]:
    """Simple rule 2: the party of the scene's cell that holds the window's centre."""
    w = GEOMETRY.window_pixels
    choice = []
    for y0, x0, y1, x1 in RECTS:
        row = math.floor((at.y + (y0 + y1) / 2) / w)
        column = math.floor((at.x + (x0 + x1) / 2) / w)
        choice.append(((2 if parties > 3 else 1) * row + column) % parties)
    return choice


def by_new_area(
    costs: np.ndarray, loads: list[float], before: list[int] | None, at: Position, parties: int
) -> list[int]:
    """Simple rule 3: window by window, the party that sees least new area, then least in all."""
    apart, choice, loads = near(parties), [-1] * len(WINDOWS), list(loads)
    for w in WINDOWS:
        taken = {choice[other] for other in apart[w]}
        free = [k for k in range(parties) if k not in taken] or list(range(parties))
        choice[w] = min(free, key=lambda k: (costs[k, w], loads[k]))
        loads[choice[w]] += costs[choice[w], w]
    return choice


def simple(
    rule: Rule, path: Path2, parties: int, budget: float, error: float
) -> tuple[float, float]:
    """Largest share of any party at the end, and the share of windows that stayed at home.

    Windows that would take their party over the budget stay at home, largest new area first.
    """
    mosaic, names = Mosaic(GEOMETRY.image_size), [str(k) for k in range(parties)]
    before: list[int] | None = None
    home = 0
    for t, (y, x) in enumerate(path):
        at = Position(float(y), float(x), error if t else 0.0)
        mosaic.show(at, SIZE)
        costs = mosaic.unseen(at, RECTS, names)
        loads, shown = mosaic.loads(0, names)
        before = rule(costs, loads, before, at, parties)
        for w in sorted(WINDOWS, key=lambda w: costs[before[w], w]):
            k = before[w]
            if loads[k] + costs[k, w] > budget * shown:
                home += 1
            else:
                loads[k] += costs[k, w]
                mosaic.see(names[k], at, [RECTS[w]])
    return max(map(mosaic.share, names)), home / (len(path) * len(WINDOWS))


def product(path: Path2, parties: int, budget: float, error: float) -> dict[str, float]:
    """The same two figures for the product's rule, and its time per frame."""
    names = [str(k) for k in range(parties)]
    placer = FramePlacer(GEOMETRY, budget, bytes(32), b"scene")
    home = seconds = 0
    times = []
    for t, (y, x) in enumerate(path):
        at = Position(float(y), float(x), error if t else 0.0)
        start = time.perf_counter()
        placement = placer.place(SIZE, at, names)
        times.append(time.perf_counter() - start)
        home += len(placement.home)
        seconds += len(placement.second)
        assert placement.separation >= (8 if parties >= 4 else 4)
    windows = len(path) * len(WINDOWS)
    return {
        "largest_share": max(map(placer.mosaic.share, names)),
        "at_home": home / windows,
        "with_a_second": seconds / max(1, windows - home),
        "ms_per_frame": median(times) * 1000,
    }


def measure() -> list[dict[str, object]]:
    rules: dict[str, Rule] = {
        "position": by_position,
        "cell": by_cell,
        "least new area": by_new_area,
    }
    rows = []
    for (camera, paths), error, k in product_of(PATHS.items(), ERRORS, PARTIES):
        row: dict[str, object] = {"camera": camera, "error_px": error, "parties": k}
        shares, homes = {}, {}
        for label, rule in rules.items():
            homes[label] = mean(simple(rule, path, k, BUDGET, error)[1] for path in paths)
            if not error:
                shares[label] = max(simple(rule, path, k, 1.0, error)[0] for path in paths)
        ours = [product(path, k, BUDGET, error) for path in paths]
        homes["product"] = mean(run["at_home"] for run in ours)
        if not error:
            free = [product(path, k, 1.0, error) for path in paths]
            shares["product"] = max(run["largest_share"] for run in free)
            row["largest share without a budget"] = rounded(shares)
        row["windows at home under the budget"] = rounded(homes)
        row["largest share under the budget"] = round(max(r["largest_share"] for r in ours), 4)
        row["sent windows with a second"] = round(mean(r["with_a_second"] for r in ours), 4)
        row["ms per frame"] = round(median(r["ms_per_frame"] for r in ours), 2)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def rounded(figures: dict[str, float]) -> dict[str, float]:
    return {label: round(figure, 4) for label, figure in figures.items()}


def main() -> None:
    """Write ``scenes.json``."""
    here = Path(__file__).parent
    rows = measure()
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
    ).stdout.strip()
    result = {
        "command": "python docs/results/scenes.py",
        "commit": commit,
        "machine": f"{platform.machine()}, Python {platform.python_version()}, busy; for the times",
        "frames": FRAMES,
        "size": SIZE,
        "budget": BUDGET,
        "rows": rows,
    }
    (here / "scenes.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
