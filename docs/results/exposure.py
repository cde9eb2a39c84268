"""Largest share of an image that a node sees, by aspect ratio and number of nodes.

    python docs/results/exposure.py

places blank images and writes ``exposure.json`` beside this file: for each, the worst of many
placements, since each is drawn with another key, and what the two nodes that saw most would know
together. Placement is a matter of areas alone, so these figures hold for any picture of that shape.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np

from edge_runtime.exposure.placement import place
from engines.geometry import Geometry, resized_shape
from engines.windows import cut

GEOMETRIES = {
    "tiny": Geometry(192, 8, 5, 128, 128),
    "vit_b, vit_l, vit_h": Geometry(1024, 16, 14, 768, 256),
}
ASPECTS = {"1:1": (1, 1), "4:3": (3, 4), "3:2": (2, 3), "16:9": (9, 16)}  # height, width
NODES = range(3, 9)
DRAWS = 200


def main() -> None:
    """Write ``exposure.json``."""
    rows = []
    for model, geometry in GEOMETRIES.items():
        for aspect, (height, width) in ASPECTS.items():
            shape = resized_shape(height * 1000, width * 1000, geometry.image_size)
            windows = cut(np.zeros((*shape, 3), np.uint8), geometry)
            for nodes in NODES:
                placed = [
                    place(
                        windows.area().tolist(),
                        windows.window.tolist(),
                        geometry.windows_per_side,
                        [f"node-{k}" for k in range(nodes)],
                        1.0,
                        bytes(32),
                        draw.to_bytes(4, "big"),
                    )
                    for draw in range(DRAWS)
                ]
                shares = [sorted(p.exposure.values()) for p in placed]
                rows.append(
                    {
                        "model": model,
                        "aspect": aspect,
                        "windows": len(windows),
                        "nodes": nodes,
                        "largest_share": round(max(s[-1] for s in shares), 4),
                        "largest_share_of_two_together": round(max(sum(s[-2:]) for s in shares), 4),
                        "separation": min(p.separation for p in placed),
                    }
                )
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
    ).stdout.strip()
    result = {
        "command": "python docs/results/exposure.py",
        "commit": commit,
        "machine": "any: placement is integer arithmetic",
        "draws": DRAWS,
        "rows": rows,
    }
    (here / "exposure.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
