"""Draws ``how-it-works.png``: the path of a photo through edge and nodes.

Run ``python docs/images/how_it_works.py [BUNDLE]`` in the repository's root, in the full
environment (matplotlib). Windows, placement and masks are the real ones of the demo's photo.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from edge_runtime.demo import MAX_EXPOSURE, NODES, PHOTO, PROMPTS
from edge_runtime.exposure.placement import Placement, place
from edge_runtime.imaging.images import load_image
from edge_runtime.imaging.render import Overlay, colour
from edge_runtime.imaging.segmentation import segment
from edge_runtime.predictor import OffloadPredictor
from engines.geometry import Geometry
from engines.windows import Windows

WIDTH, HEIGHT = 16.0, 7.4
INK, FAINT = "#1f2328", "#5b6270"
EDGE_FILL, EDGE_LINE = "#eef7f0", "#3f9c5f"
CLOUD_FILL, CLOUD_LINE = "#eef3fc", "#4a7bd0"
COLOURS = [tuple(part / 255 for part in colour(k)) for k in (1, 2, 5)]


def box(axes: Axes, x: float, y: float, w: float, h: float, fill: str, line: Any) -> None:
    style = "round,pad=0,rounding_size=0.16"
    axes.add_patch(
        FancyBboxPatch((x, y), w, h, boxstyle=style, facecolor=fill, edgecolor=line, linewidth=1.8)
    )


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], tint: object = INK
) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=16, linewidth=1.9, color=tint, zorder=5
        )
    )


def stage(axes: Axes, x: float, y: float, w: float, h: float, title: str, text: str) -> None:
    box(axes, x, y, w, h, "white", EDGE_LINE)
    axes.text(x + w / 2, y + h - 0.38, title, ha="center", va="center", size=14, weight="bold")
    axes.text(x + w / 2, y + h - 0.68, text, ha="center", va="top", size=10.5, color=FAINT)


def picture(
    figure: Figure, x: float, y: float, w: float, h: float, image: np.ndarray, sharp: bool = False
) -> Axes:
    axes = figure.add_axes((x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT))
    axes.imshow(image, interpolation="nearest" if sharp else "lanczos", aspect="auto")
    axes.set_axis_off()
    return axes


def mosaic(windows: Windows, geometry: Geometry, shown: dict[int, int], tint: bool) -> np.ndarray:
    """The windows with gaps between them. Windows not shown are black. The others may be tinted."""
    w, gap = geometry.window_pixels, 4
    rows = int(windows.window.max()) // geometry.windows_per_side + 1
    columns = int((windows.window % geometry.windows_per_side).max()) + 1
    sheet = np.ones((rows * (w + gap) - gap, columns * (w + gap) - gap, 3))
    bottom = right = 0
    for index, pixels, (h, wide) in zip(
        windows.window, windows.pixels, windows.extent, strict=True
    ):
        r, c = divmod(int(index), geometry.windows_per_side)
        y, x = r * (w + gap), c * (w + gap)
        part = pixels[:h, :wide] / 255
        if int(index) not in shown:
            part = np.zeros_like(part)
        elif tint:
            part = 0.52 * part + 0.48 * np.array(COLOURS[shown[int(index)]])
        sheet[y : y + h, x : x + wide] = part
        bottom, right = max(bottom, y + h), max(right, x + wide)
    return sheet[:bottom, :right]


def draw(
    photo: np.ndarray, result: np.ndarray, windows: Windows, geometry: Geometry, placed: Placement
) -> Figure:
    figure = plt.figure(figsize=(WIDTH, HEIGHT), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(0, HEIGHT)
    axes.set_axis_off()
    box(axes, 0.2, 0.2, 10.9, 7.0, EDGE_FILL, EDGE_LINE)
    axes.text(0.5, 6.82, "Edge", size=17, weight="bold", color=EDGE_LINE, va="center")
    axes.text(1.38, 6.8, "your Jetson, trusted", size=11.5, color=FAINT, va="center")
    box(axes, 12.3, 0.2, 3.5, 7.0, CLOUD_FILL, CLOUD_LINE)
    axes.text(12.6, 6.82, "Nodes", size=17, weight="bold", color=CLOUD_LINE, va="center")
    axes.text(13.72, 6.8, "cloud GPUs", size=11.5, color=FAINT, va="center")

    owner = {w: k for k, name in enumerate(NODES) for w in placed.assignment[name]}
    wide, high = 2.75, 2.17
    top, low = 4.02, 0.72
    picture(figure, 0.5, top, wide, high, photo)
    axes.text(0.5 + wide / 2, top + high + 0.2, "photo", ha="center", size=12, color=INK)
    arrow(axes, (3.32, top + high / 2), (4.05, top + high / 2))
    everything = mosaic(windows, geometry, dict.fromkeys(owner, 0), tint=False)
    picture(figure, 4.12, top, wide, high, everything, sharp=True)
    axes.text(4.12 + wide / 2, top + high + 0.2, "windows", ha="center", size=12, color=INK)
    arrow(axes, (6.94, top + high / 2), (7.67, top + high / 2))
    tinted = mosaic(windows, geometry, owner, tint=True)
    picture(figure, 7.74, top, wide, high, tinted, sharp=True)
    axes.text(7.74 + wide / 2, top + high + 0.2, "placement", ha="center", size=12, color=INK)
    axes.text(
        7.74 + wide / 2,
        top - 0.22,
        "which node may see which window",
        ha="center",
        size=9.5,
        color=FAINT,
    )

    y_node = (4.95, 2.75, 0.55)
    for k, (name, y) in enumerate(zip(NODES, y_node, strict=True)):
        box(axes, 12.55, y - 0.17, 3.0, 1.85, "white", COLOURS[k])
        own = dict.fromkeys(placed.assignment[name], k)
        picture(figure, 12.68, y - 0.02, 1.5, 1.19, mosaic(windows, geometry, own, False), True)
        axes.text(12.7, y + 1.42, name, size=12, weight="bold", color=INK, va="center")
        axes.text(
            14.85, y + 0.72, "stack", ha="center", size=14, weight="bold", color=INK, va="center"
        )
        axes.text(
            14.85,
            y + 0.3,
            "window-\nattention\nblocks",
            ha="center",
            size=9,
            color=FAINT,
            va="center",
        )
        arrow(axes, (10.6, top + high * (0.8 - 0.3 * k)), (12.5, y + 1.05), COLOURS[k])
        arrow(axes, (12.5, y + 0.45), (10.75, low + high * (0.83 - 0.3 * k)), COLOURS[k])
    axes.text(11.7, 6.45, "some\nwindows", ha="center", va="center", size=10, color=INK)
    axes.text(11.7, 0.62, "their\ntokens", ha="center", va="center", size=10, color=INK)

    stage(
        axes,
        8.7,
        low,
        1.95,
        high,
        "gather",
        "check every reply:\nall tokens\nor an error,\nnever a part",
    )
    arrow(axes, (8.62, low + high / 2), (8.27, low + high / 2))
    stage(
        axes,
        6.25,
        low,
        1.95,
        high,
        "tail",
        "global-attention\nblocks:\nonly here does\nanything see all",
    )
    arrow(axes, (6.17, low + high / 2), (5.82, low + high / 2))
    stage(axes, 3.8, low, 1.95, high, "decoder", "clicks, boxes\nto masks,\nas often as\nyou like")
    arrow(axes, (3.72, low + high / 2), (3.37, low + high / 2))
    picture(figure, 0.5, low, wide, high, result)
    axes.text(0.5 + wide / 2, low + high + 0.2, "masks", ha="center", size=12, color=INK)
    axes.text(4.78, low + high + 0.44, "clicks", ha="center", size=12, color=INK, va="center")
    arrow(axes, (4.78, low + high + 0.3), (4.78, low + high + 0.02))
    return figure


def main() -> None:
    """Compute the picture and draw it."""
    photo = load_image(PHOTO)
    with OffloadPredictor(bundle=sys.argv[1] if len(sys.argv) > 1 else None) as predictor:
        drawing = Overlay(photo)
        segment(predictor, photo, PROMPTS, each=lambda _, found: drawing.add(found.masks[0]))
        assert predictor.image is not None
        windows, geometry = predictor.image.windows, predictor.bundle.geometry
    placed = place(
        windows.area().tolist(),
        windows.window.tolist(),
        geometry.windows_per_side,
        NODES,
        MAX_EXPOSURE,
        secret=b"the figure's own",
        image_hash=b"coins",
    )
    result = np.array(drawing.finish(PROMPTS))
    figure = draw(photo, result, windows, geometry, placed)
    figure.savefig(Path(__file__).with_name("how-it-works.png"), dpi=110)


if __name__ == "__main__":
    main()
