from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_sams import SPECS, make_image, make_sam, upstream

from engines.windows import Windows, cut
from exporters.stages import geometry_of


@pytest.fixture(scope="session", params=SPECS)
def sam(request: pytest.FixtureRequest) -> Any:
    """A reordered SAM of each geometry."""
    return make_sam(SPECS[request.param])


@pytest.fixture(scope="session", params=SPECS)
def stock_sam(request: pytest.FixtureRequest) -> Any:
    return make_sam(SPECS[request.param], "stock")


@pytest.fixture(scope="session")
def tiny_sam() -> Any:
    """The reordered SAM of tiny's geometry."""
    return make_sam(SPECS["tiny"])


@pytest.fixture(scope="session")
def example() -> Callable[[Any, str, int], tuple[Windows, torch.Tensor, torch.Tensor]]:
    """``example(sam, case, after)``: the image cut, and what :func:`upstream` says of it."""
    known: dict[Any, Any] = {}

    def get(sam: Any, case: str, after: int) -> tuple[Windows, torch.Tensor, torch.Tensor]:
        key = (id(sam), case, after)
        if key not in known:
            image = make_image(sam, case)
            known[key] = (cut(image, geometry_of(sam)), *upstream(sam, image, after))
        return known[key]

    return get
