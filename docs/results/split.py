"""How the encoder's work divides between edge and nodes, for each model.

    edge-runtime export --model vit_b --checkpoint sam_vit_b_01ec64.pth --out bundles/vit_b
    python docs/results/split.py bundles/vit_b bundles/vit_l bundles/vit_h --machine "..."

writes ``split.json`` beside this file: the share of the arithmetic that stays on the edge, by the
formulas of :mod:`exporters.flops`, and what stack, tail and decoder take on this CPU for a square
image, in seconds of wall time. The models take turns, so that drift of the machine hits all alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import onnxruntime

from engines.bundle import Bundle
from engines.pipeline import Pipeline
from engines.samples import synthetic_image
from engines.windows import cut
from exporters import flops
from exporters.models import MODELS


def timed(bundle: Bundle) -> dict[str, float]:
    """Wall seconds of each stage, after one run to warm up."""
    side = bundle.geometry.image_size
    windows = cut(synthetic_image(side, side, seed=0), bundle.geometry)
    point, label = np.full((1, 1, 2), side / 2, np.float32), np.ones((1, 1), np.float32)
    grid = bundle.geometry.grid
    no_mask = np.zeros((1, 1, 4 * grid, 4 * grid), np.float32), np.zeros(1, np.float32)
    with Pipeline(bundle, device="cpu") as pipeline:
        for _ in range(2):
            began = time.perf_counter()
            tokens = pipeline.stack(pipeline.stack_inputs(windows))
            stacked = time.perf_counter()
            embedding = pipeline.tail(tokens, windows)
            tailed = time.perf_counter()
            pipeline.decode(embedding, point, label, *no_mask)
            ended = time.perf_counter()
    return {"stack": stacked - began, "tail": tailed - stacked, "decoder": ended - tailed}


def main() -> None:
    """Write ``split.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--machine", default="unnamed machine")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    bundles = [Bundle.load(path) for path in options.bundles]
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(options.rounds):
        for bundle in bundles:
            found.setdefault(bundle.manifest.model, []).append(timed(bundle))
    rows = []
    for bundle in bundles:
        model = bundle.manifest.model
        spec, rounds = MODELS[model], found[model]
        seconds = {s: round(statistics.median(r[s] for r in rounds), 3) for s in rounds[0]}
        rows.append(
            {
                "model": model,
                "precision": bundle.manifest.precision,
                "edge_share": round(flops.tail(spec) / flops.encoder(spec), 4),
                "gflop": {"encoder": round(flops.encoder(spec) / 1e9)},
                "seconds": seconds,
            }
        )
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    out = Path(__file__).with_suffix(".json")
    result = {
        "command": "python docs/results/split.py " + " ".join(p.name for p in options.bundles),
        "commit": commit.stdout.strip(),
        "machine": options.machine,
        "onnxruntime": onnxruntime.__version__,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "weights": "random",
        "rounds": options.rounds,
        "rows": rows,
    }
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
