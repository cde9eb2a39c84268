"""Every stage compared with upstream's modules. The weights are such that each one matters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small_sams import CASES, SPECS, as_tensors, make_image, make_sam, upstream

from engines.windows import Windows, cut
from exporters import stages
from exporters.golden import synthetic_image
from exporters.measure import randomise
from exporters.models import build_sam, reorder
from exporters.stages import (
    Decoder,
    Encoder,
    Stack,
    Tail,
    from_windows,
    geometry_of,
    make_head,
    make_stack,
    to_windows,
    window_blocks,
)

Example = Callable[[Any, str, int], tuple[Windows, torch.Tensor, torch.Tensor]]
TOLERANCE = 5e-5  # float32 rounding over a few blocks; values are about 5


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


def scattered(tokens: torch.Tensor, windows: Windows) -> torch.Tensor:
    """Tokens of every window, with NaN where the tail must not read."""
    every = torch.full((len(windows.present), *tokens.shape[1:]), torch.nan)
    every[torch.from_numpy(windows.present)] = tokens
    return every


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_stack_and_tail_equal_upstream(sam: Any, case: str, example: Example) -> None:
    windows, tokens, embedding = example(sam, case, len(window_blocks(sam.image_encoder)))
    present = torch.from_numpy(windows.present)
    found = make_stack(sam, None)(*as_tensors(windows))
    for row, index in enumerate(windows.window):
        assert difference(found[row], tokens[index]) < TOLERANCE, f"window {index}"
    assert difference(Tail(sam)(scattered(found, windows), present), embedding) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_encoder_in_stock_order_equals_upstream(
    stock_sam: Any, case: str, example: Example
) -> None:
    windows, _, embedding = example(stock_sam, case, 0)
    pixels, extent, window = as_tensors(windows)
    count = len(windows.present)
    every = torch.full((count, *pixels.shape[1:]), 99, dtype=torch.uint8)
    extents = torch.zeros(count, 2, dtype=torch.int64)
    every[window], extents[window] = pixels, extent
    assert difference(Encoder(stock_sam)(every, extents), embedding) < TOLERANCE


@pytest.mark.parametrize("head_blocks", [0, 1, 2])
@pytest.mark.parametrize("case", ["ends inside a patch", "portrait strip"])
def test_head_and_stack_equal_upstream(
    tiny_sam: Any, case: str, head_blocks: int, example: Example
) -> None:
    windows, hidden, _ = example(tiny_sam, case, head_blocks)
    tokens = example(tiny_sam, case, 3)[1]
    present = torch.from_numpy(windows.present)
    found = make_head(tiny_sam, head_blocks)(*as_tensors(windows))
    assert difference(found, hidden[present]) < TOLERANCE
    found = make_stack(tiny_sam, head_blocks)(found, as_tensors(windows)[2])
    assert difference(found, tokens[present]) < TOLERANCE


def test_a_window_does_not_depend_on_its_batch(tiny_sam: Any, example: Example) -> None:
    windows = example(tiny_sam, "square", 3)[0]
    inputs, stack = as_tensors(windows), make_stack(tiny_sam, None)
    together = stack(*inputs)
    backwards = stack(*(x.flip(0) for x in inputs)).flip(0)
    assert difference(together, backwards) < TOLERANCE
    alone = stack(*(x[24:] for x in inputs))
    assert difference(together[24:], alone) < TOLERANCE


def test_pixels_beyond_the_image_are_not_read(tiny_sam: Any, example: Example) -> None:
    windows = example(tiny_sam, "ends inside a patch", 3)[0]
    pixels, extent, window = as_tensors(windows)
    side = torch.arange(pixels.shape[1])
    inside = (side < extent[:, :1])[:, :, None] & (side < extent[:, 1:])[:, None]
    other = torch.where(inside[..., None], pixels, 255 - pixels)
    assert not torch.equal(other, pixels)
    stack = make_stack(tiny_sam, None)
    assert torch.equal(stack(other, extent, window), stack(pixels, extent, window))


def test_grid_padding_comes_out_as_zero_and_is_not_read(sam: Any, example: Example) -> None:
    windows = example(sam, "square", 3)[0]
    valid = stages.valid_tokens(geometry_of(sam))
    hidden = make_head(sam, 1)(*as_tensors(windows))
    window = as_tensors(windows)[2]
    stack = make_stack(sam, 1)
    found = stack(hidden, window)
    assert not found[~valid.expand_as(found)].any()
    poisoned = torch.where(valid, hidden, torch.nan)
    assert torch.equal(stack(poisoned, window), found)


def test_windows_and_grid_are_inverses(sam: Any) -> None:
    geometry = geometry_of(sam)
    grid = torch.arange(geometry.grid**2 * 2.0).reshape(geometry.grid, geometry.grid, 2)
    windows = to_windows(grid, geometry)
    assert torch.equal(from_windows(windows, geometry), grid)
    assert torch.equal(windows[1, 0], grid[0, geometry.window_size])
    assert torch.equal(windows[geometry.windows_per_side, 0], grid[geometry.window_size, 0])


def test_widths_fit_fused_kernels(sam: Any) -> None:
    for block in [*make_stack(sam, None).blocks, *Tail(sam).blocks]:
        attention = block.attn
        wanted = attention.head_dim + 2 * attention.side
        assert attention.width % 8 == 0
        assert wanted <= attention.width < wanted + 8


# Likely mistakes, made on purpose: the comparisons above must notice each.


def grid_padding_left_alone(stack: Any, inputs: list[torch.Tensor]) -> None:
    stack.valid = torch.ones_like(stack.valid)


def image_padding_as_black(stack: Any, inputs: list[torch.Tensor]) -> None:
    inputs[1] = torch.full_like(inputs[1], inputs[0].shape[1])


def extent_of_whole_patches(stack: Any, inputs: list[torch.Tensor]) -> None:
    patch = stack.embed.patch
    inputs[1] = (inputs[1] + patch - 1) // patch * patch


def rows_and_columns_swapped(stack: Any, inputs: list[torch.Tensor]) -> None:
    for block in stack.blocks:
        attention, side = block.attn, block.attn.side
        spare = attention.rel_w.shape[2] - side
        by_row = attention.rel_h
        attention.rel_h = attention.rel_w[:, :, :side]
        attention.rel_w = torch.nn.functional.pad(by_row, (0, spare))


def relative_position_scaled(stack: Any, inputs: list[torch.Tensor]) -> None:
    for block in stack.blocks:
        block.attn.rel_h = block.attn.rel_h * block.attn.scale
        block.attn.rel_w = block.attn.rel_w * block.attn.scale


def position_of_another_window(stack: Any, inputs: list[torch.Tensor]) -> None:
    stack.positions = stack.positions.roll(1, 0)


def channels_reversed(stack: Any, inputs: list[torch.Tensor]) -> None:
    inputs[0] = inputs[0].flip(-1)


@pytest.mark.parametrize(
    "mistake",
    [
        grid_padding_left_alone,
        image_padding_as_black,
        extent_of_whole_patches,
        rows_and_columns_swapped,
        relative_position_scaled,
        position_of_another_window,
        channels_reversed,
    ],
)
def test_deliberate_mistakes_are_noticed(
    tiny_sam: Any, mistake: Callable[[Stack, list[torch.Tensor]], None], example: Example
) -> None:
    windows, tokens, _ = example(tiny_sam, "ends inside a patch", 3)
    stack, inputs = make_stack(tiny_sam, None), list(as_tensors(windows))
    assert difference(stack(*inputs), tokens) < TOLERANCE
    mistake(stack, inputs)
    assert difference(stack(*inputs), tokens) > 100 * TOLERANCE


def test_constants_of_absent_windows_matter(tiny_sam: Any, example: Example) -> None:
    windows, tokens, embedding = example(tiny_sam, "one row of pixels", 3)
    tail, present = Tail(tiny_sam), torch.from_numpy(windows.present)
    assert int(present.sum()) == 5
    assert difference(tail(tokens, present), embedding) < TOLERANCE
    tail.absent = tail.absent.roll(1, 0)  # the padding of another window
    assert difference(tail(tokens, present), embedding) > 100 * TOLERANCE


Prompt = tuple[list[list[float]], list[float], list[float] | None, bool]
PROMPTS: dict[str, Prompt] = {  # points, their labels, box, mask (in thousandths of the image)
    "point": ([[400, 500]], [1], None, False),
    "points": ([[400, 500], [90, 20], [999, 0]], [1, 0, 1], None, False),
    "box": ([], [], [100, 200, 700, 650], False),
    "points and box": ([[300, 300], [600, 400]], [1, 0], [100, 200, 700, 650], False),
    "point and mask": ([[400, 500]], [0], None, True),
    "box and mask": ([], [], [0, 0, 999, 999], True),
    "mask alone": ([], [], None, True),
    "nothing": ([], [], None, False),
}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_decoder_equals_upstream(sam: Any, prompt: str) -> None:
    """Through upstream's public prompt encoder, so that its conventions are tested too."""
    points, labels, box, with_mask = PROMPTS[prompt]
    geometry = geometry_of(sam)
    g, scale = geometry.grid, geometry.image_size / 1000
    generator = torch.Generator().manual_seed(3)
    embedding = torch.randn(1, geometry.out_chans, g, g, generator=generator)
    mask = 8 * torch.randn(1, 1, 4 * g, 4 * g, generator=generator)
    coords, marks = torch.tensor(points).reshape(1, -1, 2) * scale, torch.tensor([labels])
    sparse, dense = sam.prompt_encoder(
        points=(coords, marks) if points else None,
        boxes=torch.tensor([box]) * scale if box else None,
        masks=mask if with_mask else None,
    )
    wanted, scores = sam.mask_decoder.predict_masks(
        image_embeddings=embedding,
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
    )
    if box:
        coords = torch.cat([coords, torch.tensor(box).reshape(1, 2, 2) * scale], 1)
        marks = torch.cat([marks, torch.tensor([[2.0, 3.0]])], 1)
    elif points:  # the padding point that upstream adds
        coords = torch.cat([coords, torch.zeros(1, 1, 2)], 1)
        marks = torch.cat([marks, -torch.ones(1, 1)], 1)
    unused = torch.full_like(mask, torch.nan)
    found, iou = Decoder(sam)(
        embedding, coords, marks, mask if with_mask else unused, torch.tensor([float(with_mask)])
    )
    assert difference(found, wanted) < 1e-5
    assert difference(iou, scores) < 1e-5
    assert float(wanted.abs().max()) > 1e-2


def test_prompts_of_a_batch_are_independent(tiny_sam: Any) -> None:
    geometry, decoder = geometry_of(tiny_sam), Decoder(tiny_sam)
    generator = torch.Generator().manual_seed(4)
    low = geometry.low_res
    embedding = torch.randn(1, geometry.out_chans, geometry.grid, geometry.grid)
    coords = 192 * torch.rand(3, 2, 2, generator=generator)
    labels = torch.tensor([[1, -1], [2, 3], [0, 1]])
    mask, has_mask = torch.randn(3, 1, low, low), torch.tensor([0.0, 1.0, 1.0])
    together = decoder(embedding, coords, labels, mask, has_mask)
    for i in range(3):
        one = slice(i, i + 1)
        alone = decoder(embedding, coords[one], labels[one], mask[one], has_mask[one])
        assert difference(together[0][one], alone[0]) < 1e-5
        assert difference(together[1][one], alone[1]) < 1e-5
    assert difference(together[0][0], together[0][1]) > 1e-2


@pytest.mark.slow
@pytest.mark.timeout(900)  # 40 s of two free cores
def test_vit_b_at_full_size() -> None:
    torch.manual_seed(0)
    sam = reorder(randomise(build_sam("vit_b")).requires_grad_(False))
    image = synthetic_image(619, 1024, seed=3)
    geometry = geometry_of(sam)
    windows = cut(image, geometry)
    embedding = sam.image_encoder(
        sam.preprocess(torch.from_numpy(image).permute(2, 0, 1)[None].float())
    )
    tokens = make_stack(sam, None)(*as_tensors(windows))
    tail = Tail(sam)
    del sam
    found = tail(scattered(tokens, windows), torch.from_numpy(windows.present))
    assert difference(found, embedding) < 2e-4
    assert np.count_nonzero(windows.present) == 15


def test_order_of_blocks_matters() -> None:
    """Otherwise comparing with the reordered original would not reveal a wrong order."""
    stock, reordered = make_sam(SPECS["tiny"], "stock"), make_sam(SPECS["tiny"])
    image = make_image(stock, "square")
    assert difference(upstream(stock, image, 0)[1], upstream(reordered, image, 0)[1]) > 0.1
