"""Pictures: the masks on the photo, and what each node saw of it.

Small photos are enlarged and large ones reduced, so that outlines, clicks and titles are readable.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

if TYPE_CHECKING:
    from edge_runtime.imaging.prompts import Box, Point, Prompt
    from edge_runtime.offload.report import OffloadReport
    from engines.geometry import Geometry
    from engines.windows import Windows

Colour = tuple[int, int, int]

_COLOURS: tuple[Colour, ...] = (
    (45, 140, 255),
    (255, 122, 24),
    (35, 200, 100),
    (255, 60, 120),
    (165, 105, 255),
    (255, 205, 40),
    (20, 195, 205),
    (240, 130, 220),
    (160, 220, 50),
    (190, 135, 90),
)
_MIN_SIDE, _MAX_SIDE = 1152, 2048
_PANEL = 520
"""Longest side of a panel with one node's windows; half of it if there are many nodes."""
_MANY, _MOST_NODES = 12, 45
_TINT = 0.42
_ON, _OFF = (28, 190, 90), (230, 50, 60)
_PAPER, _INK, _FAINT = (250, 250, 248), (28, 30, 34), (110, 114, 122)
_GRID = (88, 92, 100)


def colour(number: int) -> Colour:
    """The colour of object ``number`` (from 1): distinct for the first ten, then by hue."""
    if number <= len(_COLOURS):
        return _COLOURS[number - 1]
    hue = (number * 0.618034) % 1  # the golden ratio spreads any number of hues evenly
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.7, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def label_image(labels: np.ndarray) -> Image.Image:
    """Object numbers ``[H, W]`` as a picture: palette indices (uint8), or plain uint16."""
    image = Image.fromarray(labels)
    if labels.dtype == np.uint8:
        image.putpalette([0, 0, 0] + [part for k in range(1, 256) for part in colour(k)])
    return image


def overlay(
    photo: np.ndarray, masks: Sequence[np.ndarray], prompts: Sequence[Prompt]
) -> Image.Image:
    """The photo with tinted, outlined, numbered masks, clicks and boxes; see :class:`Overlay`."""
    drawing = Overlay(photo)
    for mask in masks:
        drawing.add(mask)
    return drawing.finish(prompts)


class Overlay:
    """The photo with masks on it. Masks are added one by one, so that none need to be kept.

    Args:
        photo: uint8 ``[H, W, 3]``.
    """

    def __init__(self, photo: np.ndarray) -> None:
        height, width = photo.shape[:2]
        self._scale = _scale(width, height)
        self._size = max(1, round(width * self._scale)), max(1, round(height * self._scale))
        self._canvas = Image.fromarray(photo).resize(self._size, Image.Resampling.LANCZOS)
        self._line = max(2, round(max(self._size) / 400))
        self._lines = Image.new("RGBA", self._size)  # drawn over the tints of all masks
        self._count = 0

    def add(self, mask: np.ndarray) -> None:
        """Draw the next object's mask: bool, the photo's size or that divided by a number."""
        self._count += 1
        rgb, line = colour(self._count), self._line
        found = _soft(mask, self._size, 2 * line)
        if found is None:
            return
        soft, corner = found
        self._canvas.paste(rgb, corner, soft.point(lambda v: round(v * _TINT)))
        halo = _outline(soft, 2 * line).point(lambda v: v // 3)
        for ink, alpha in (((255, 255, 255), halo), (_darker(rgb), _outline(soft, line))):
            layer = Image.new("RGBA", soft.size, ink)
            layer.putalpha(alpha)
            self._lines.alpha_composite(layer, corner)

    def finish(self, prompts: Sequence[Prompt]) -> Image.Image:
        """The picture, with clicks and boxes: one prompt per object, in pixels of the photo."""
        canvas, line = self._canvas, self._line
        canvas.paste(self._lines, mask=self._lines)
        for number, prompt in enumerate(prompts, 1):
            if prompt.box:
                _draw_box(canvas, prompt.box, self._scale, line, colour(number))
            for point in prompt.points:
                _draw_click(canvas, point, self._scale, 5 * line)
        if len(prompts) > 1:
            for number, prompt in enumerate(prompts, 1):
                _draw_number(canvas, number, prompt, self._scale, line)
        return canvas


def what_each_node_saw(
    photo: np.ndarray,
    windows: Windows,
    geometry: Geometry,
    report: OffloadReport,
    hidden: bool = False,
) -> Image.Image:
    """Side by side: the photo, and for each node the windows it was sent, the rest black.

    If there are many nodes, only those that saw something are shown; if very many, those that saw
    most.

    Args:
        photo: uint8 ``[H, W, 3]``.
        windows: of the photo; the panels show the very pixels the nodes were sent.
        geometry: of the bundle.
        report: which node saw which windows.
        hidden: the nodes got hidden states of the windows, not their pixels.
    """
    small = _reassembled(windows, geometry)
    height, width = windows.size
    many = len(report.nodes) > _MANY
    side = _PANEL // 2 if many else _PANEL
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))

    panels = [("The photo", "no node sees the whole", _photo_panel(photo, size))]
    by_share = sorted(report.nodes, key=lambda node: -node.share_of_image)
    shown = [node for node in by_share if node.windows or not many][:_MOST_NODES]
    rest = len(report.nodes) - len(shown)
    form = " as hidden states" if hidden else ""
    for node in report.nodes:
        if node not in shown:
            continue
        count = len(node.windows)
        share = f"{node.share_of_image:.0%} of the picture"
        detail = f"{count} of {report.windows_total} windows{form}, {share}"
        seen = _panel(small, windows, geometry, node.windows, size, scale)
        panels.append((f"What {node.name} saw", detail, seen))
    if rest:
        saw = "more" if by_share[len(shown)].windows else "anything"
        panels.append((f"{rest} more nodes", f"none of them saw {saw}", Image.new("RGB", size)))
    if report.home:
        detail = f"{len(report.home)} windows, computed at home"
        kept = _panel(small, windows, geometry, report.home, size, scale)
        panels.append(("The edge itself", detail, kept))
    return _sheet(panels, side)


def what_each_party_has_seen(
    title: tuple[str, str],
    shown: np.ndarray,
    seen: Mapping[str, np.ndarray],
    shares: Mapping[str, float],
) -> Image.Image:
    """Side by side: a scene or photo in grey, and for each party in colour what it may have seen.

    If there are very many parties, those that saw most are shown.

    Args:
        title: of the first panel, and what stands below it.
        shown: bool ``[rows, columns]``, the cells of the scene that the camera has shown.
        seen: party -> bool ``[rows, columns]``.
        shares: party -> share of the scene.
    """
    parties = sorted(shares, key=lambda party: -shares[party])[:_MOST_NODES]
    side = _PANEL // 2 if len(parties) > _MANY else _PANEL
    used = np.logical_or.reduce([shown, *seen.values()])
    y, x = (np.flatnonzero(used.any(axis)) if used.any() else np.arange(1) for axis in (1, 0))
    crop = np.s_[y[0] : y[-1] + 1, x[0] : x[-1] + 1]
    rows, columns = shown[crop].shape
    scale = side / max(rows, columns)
    size = max(1, round(columns * scale)), max(1, round(rows * scale))

    def panel(cells: np.ndarray, tint: Colour) -> Image.Image:
        picture = np.zeros((rows, columns, 3), np.uint8)
        picture[shown[crop]] = _GRID
        picture[cells[crop]] = tint
        return Image.fromarray(picture).resize(size, Image.Resampling.NEAREST)

    panels = [(*title, panel(np.zeros_like(shown), _GRID))]
    for number, party in enumerate(sorted(shares), 1):
        if party in parties:
            detail = f"may have seen {shares[party]:.1%}"
            panels.append((party, detail, panel(seen[party], colour(number))))
    return _sheet(panels, side)


def _scale(width: int, height: int) -> float:
    """How much to enlarge the photo: by whole numbers, so that all pixels have the same size."""
    side = max(width, height)
    if side < _MIN_SIDE:
        return float(min(-(-_MIN_SIDE // side), 64))
    return min(1.0, _MAX_SIDE / side)


def _soft(
    mask: np.ndarray, size: tuple[int, int], margin: int
) -> tuple[Image.Image, tuple[int, int]] | None:
    """The mask at drawing size in grey with smooth edges, cropped to what is not empty.

    Returns the picture and its left top corner; None if all is empty.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    height, width = mask.shape
    across, down = size[0] / width, size[1] / height
    factor = max(size) / max(width, height)
    margin += math.ceil(3 * factor)  # for the blur
    left = max(0, math.floor(columns[0] * across) - margin)
    top = max(0, math.floor(rows[0] * down) - margin)
    right = min(size[0], math.ceil((columns[-1] + 1) * across) + margin)
    bottom = min(size[1], math.ceil((rows[-1] + 1) * down) + margin)
    grown = (
        Image.fromarray(mask)
        .convert("L")
        .resize(
            (right - left, bottom - top),
            Image.Resampling.BICUBIC,
            (left / across, top / down, right / across, bottom / down),
        )
    )
    if factor > 1:  # smooth the steps of enlarging, then make the edge two pixels wide
        blur = factor * 0.6
        gain = max(1.0, blur * math.sqrt(2 * math.pi) / 2)
        grown = grown.filter(ImageFilter.GaussianBlur(blur))
        grown = grown.point(lambda v: max(0, min(255, round((v - 128) * gain + 128))))
    return grown, (left, top)


def _outline(mask: Image.Image, width: int) -> Image.Image:
    """A line along the inside of the mask's border."""
    # The mean over a square is lower where the border is nearer than the line's width.
    inner = mask.filter(ImageFilter.BoxBlur(width))
    inner = inner.point(lambda v: max(0, 255 - (255 - v) * (2 * width + 1)))
    return ImageChops.subtract(mask, inner)


def _darker(rgb: Colour) -> Colour:
    red, green, blue = (round(part * 0.92) for part in rgb)
    return red, green, blue


def _draw_click(canvas: Image.Image, point: Point, scale: float, radius: int) -> None:
    """A dot with a white rim: green with a plus on the object, red with a minus off it."""
    fine = 4
    side = 2 * radius + 3
    sprite = Image.new("RGBA", (side * fine, side * fine))
    draw = ImageDraw.Draw(sprite)
    centre = side * fine / 2

    def disc(r: float, fill: tuple[int, ...]) -> None:
        draw.ellipse((centre - r, centre - r, centre + r, centre + r), fill=fill)

    disc(radius * fine + fine, (0, 0, 0, 110))
    disc(radius * fine, (255, 255, 255, 255))
    disc(radius * fine * 0.78, (*(_ON if point.label else _OFF), 255))
    arm, half = radius * fine * 0.45, radius * fine * 0.11
    draw.rectangle((centre - arm, centre - half, centre + arm, centre + half), fill="white")
    if point.label:
        draw.rectangle((centre - half, centre - arm, centre + half, centre + arm), fill="white")
    sprite = sprite.resize((side, side), Image.Resampling.LANCZOS)
    # A click on pixel x means its centre.
    x, y = (point.x + 0.5) * scale, (point.y + 0.5) * scale
    canvas.paste(sprite, (round(x - side / 2), round(y - side / 2)), sprite)


def _draw_box(canvas: Image.Image, box: Box, scale: float, line: int, rgb: Colour) -> None:
    draw = ImageDraw.Draw(canvas)
    corners = tuple(round(v * scale) for v in (box.x0, box.y0, box.x1, box.y1))
    draw.rectangle(corners, outline="white", width=line + 2)
    inner = (corners[0] + 1, corners[1] + 1, corners[2] - 1, corners[3] - 1)
    if inner[0] < inner[2] and inner[1] < inner[3]:
        draw.rectangle(inner, outline=_darker(rgb), width=line)


def _draw_number(canvas: Image.Image, number: int, prompt: Prompt, scale: float, line: int) -> None:
    """The object's number, on its box's corner or beside its first click."""
    if prompt.box:
        x, y = prompt.box.x0 * scale, prompt.box.y0 * scale
    else:
        first = next(point for point in prompt.points if point.label)
        x, y = first.x * scale + 9 * line, first.y * scale - 9 * line
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(9 * line)
    text = str(number)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    pad = 2 * line
    wide = max(right - left, bottom - top) + 2 * pad
    high = bottom - top + 2 * pad
    x = min(max(x - wide / 2, 0), canvas.width - wide)
    y = min(max(y - high / 2, 0), canvas.height - high)
    draw.rounded_rectangle((x, y, x + wide, y + high), radius=pad, fill=_darker(colour(number)))
    place = (x + (wide - right + left) / 2 - left, y + pad - top)
    draw.text(place, text, font=font, fill="white")


def _reassembled(windows: Windows, geometry: Geometry) -> np.ndarray:
    """The resized photo, put together from the windows' pixels."""
    image = np.zeros((*windows.size, 3), np.uint8)
    for row, index in enumerate(windows.window):
        y0, x0, _, _ = geometry.window_rect(int(index))
        h, w = windows.extent[row]
        image[y0 : y0 + h, x0 : x0 + w] = windows.pixels[row, :h, :w]
    return image


def _photo_panel(photo: np.ndarray, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(photo).resize(size, Image.Resampling.LANCZOS)


def _panel(
    small: np.ndarray,
    windows: Windows,
    geometry: Geometry,
    shown: Sequence[int],
    size: tuple[int, int],
    scale: float,
) -> Image.Image:
    """Some windows of the photo on black, in the grid of all windows."""
    masked = np.zeros_like(small)
    frames = []
    for row, index in enumerate(windows.window):
        y0, x0, _, _ = geometry.window_rect(int(index))
        y1, x1 = y0 + int(windows.extent[row, 0]), x0 + int(windows.extent[row, 1])
        if int(index) in shown:
            masked[y0:y1, x0:x1] = small[y0:y1, x0:x1]
        frames.append((x0, y0, x1, y1))
    # Nearest neighbour, so that a window's pixels end exactly at its border.
    panel = Image.fromarray(masked).resize(size, Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(panel)
    for frame in frames:
        x0, y0, x1, y1 = (math.floor(v * scale) for v in frame)
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=_GRID)
    return panel


def _sheet(panels: Sequence[tuple[str, str, Image.Image]], side: int) -> Image.Image:
    """Titled panels, none larger than a square of ``side``, on one light sheet."""
    columns = min(4 * _PANEL // side, len(panels))
    gap, title, detail = (24, 26, 17) if side == _PANEL else (24, 18, 13)
    header = title + detail + 20
    rows = -(-len(panels) // columns)
    wide, high = panels[0][2].size
    cell = max(wide, side * 5 // 8)  # titles need room beside narrow photos too
    width = columns * cell + (columns + 1) * gap
    height = rows * (high + header) + (rows + 1) * gap
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for position, (name, text, panel) in enumerate(panels):
        x = gap + (position % columns) * (cell + gap)
        y = gap + (position // columns) * (high + header + gap)
        draw.text((x, y), name, font=_fitting(name, title, cell), fill=_INK)
        draw.text((x, y + title + 7), text, font=_fitting(text, detail, cell), fill=_FAINT)
        sheet.paste(panel, (x, y + header))
    return sheet


def _fitting(text: str, size: int, width: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font at ``size``, or smaller if the text is wider than ``width`` pixels."""
    font = ImageFont.load_default(size)
    wide = font.getlength(text)
    return font if wide <= width else ImageFont.load_default(max(7, int(size * width / wide)))
