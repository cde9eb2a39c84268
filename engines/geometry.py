"""The geometry of a model: image square, patches, attention windows.

A SAM encoder sees a square of ``image_size`` pixels cut into patches, one token each. Its window
blocks attend inside squares of ``window_size`` tokens. If the token grid is not a multiple of the
window, the last row and column of windows contain *grid padding*: tokens without pixels.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

_MAX_WINDOWS = 1024


class Geometry(msgspec.Struct, frozen=True):
    """The sizes that a bundle's graphs were built for. Windows are numbered row by row.

    Attributes:
        image_size: side of the padded square, in pixels (SAM: 1024).
        patch_size: side of a patch, in pixels (SAM: 16).
        window_size: side of an attention window, in tokens (SAM: 14).
        embed_dim: width of a token, ``c`` in shapes.
        out_chans: width of the image embedding, ``d`` in shapes.

    Raises:
        ValueError: the numbers contradict one another, or there are too many windows.
    """

    image_size: Annotated[int, msgspec.Meta(ge=1, le=8192)]
    patch_size: Annotated[int, msgspec.Meta(ge=1, le=256)]
    window_size: Annotated[int, msgspec.Meta(ge=1, le=256)]
    embed_dim: Annotated[int, msgspec.Meta(ge=1, le=16384)]
    out_chans: Annotated[int, msgspec.Meta(ge=1, le=16384)]

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.window_size > self.grid:
            raise ValueError(
                f"window_size {self.window_size} is larger than the grid of {self.grid} tokens"
            )
        if self.windows > _MAX_WINDOWS:
            raise ValueError(f"{self.windows} windows, expected at most {_MAX_WINDOWS}")

    @property
    def grid(self) -> int:
        """Tokens along one side of the square, ``g`` in shapes."""
        return self.image_size // self.patch_size

    @property
    def windows_per_side(self) -> int:
        """Windows along one side of the square."""
        return -(-self.grid // self.window_size)

    @property
    def windows(self) -> int:
        """Windows in the whole square."""
        return self.windows_per_side**2

    @property
    def window_pixels(self) -> int:
        """Side of a window in pixels, grid padding included; ``w`` in shapes."""
        return self.window_size * self.patch_size

    @property
    def tokens_per_window(self) -> int:
        """Tokens of a window, grid padding included; ``t`` in shapes."""
        return self.window_size**2

    @property
    def low_res(self) -> int:
        """Side of the decoder's low-resolution logits and of its mask prompt."""
        return 4 * self.grid

    def window_rect(self, index: int) -> tuple[int, int, int, int]:
        """``(y0, x0, y1, x1)`` of a window in pixels of the square, clipped to the square."""
        row, col = self._place(index)
        w = self.window_pixels
        return (
            row * w,
            col * w,
            min((row + 1) * w, self.image_size),
            min((col + 1) * w, self.image_size),
        )

    def valid_tokens(self, index: int) -> tuple[int, int]:
        """``(rows, cols)`` of a window's tokens inside the grid; the rest is grid padding."""
        row, col = self._place(index)
        return (
            min(self.window_size, self.grid - row * self.window_size),
            min(self.window_size, self.grid - col * self.window_size),
        )

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < self.windows:
            raise IndexError(f"window {index}, expected 0 to {self.windows - 1}")
        return divmod(index, self.windows_per_side)


def resized_shape(height: int, width: int, image_size: int) -> tuple[int, int]:
    """The ``(h, w)`` of an image after resizing its longest side to ``image_size``.

    The same as ``ResizeLongestSide.get_preprocess_shape`` of segment_anything, except that a side
    which would round to 0 becomes 1.

    Raises:
        ValueError: a side is smaller than 1.
    """
    if height < 1 or width < 1:
        raise ValueError(f"an image of {height} x {width} pixels has no size to resize")
    scale = image_size * 1.0 / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
