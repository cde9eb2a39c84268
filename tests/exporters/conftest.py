from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from small_sams import SPECS, make_image, make_sam, upstream
from torch import nn

from engines.geometry import Geometry
from engines.windows import Windows, cut
from exporters import onnx_export
from exporters.stages import geometry_of


@pytest.fixture(scope="session", autouse=True)
def known_exports() -> Iterator[dict[str, bytes]]:
    """Graphs by the digest of the module they were exported from.

    PyTorch takes seconds to export a stage. A module that equals an earlier one gets the earlier
    graph. A test that compares two real exports clears this cache first.
    """
    known: dict[str, bytes] = {}
    export = onnx_export._to_onnx

    def remember(module: nn.Module, *sides: Any) -> ir.Model:
        key = digest_of(module, sides)
        if key in known:
            return ir.from_proto(onnx.ModelProto.FromString(known[key]))
        model = export(module, *sides)
        if sum(tensor.nbytes for tensor in module.state_dict().values()) < 32 << 20:
            known[key] = ir.to_proto(model).SerializeToString()
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_export, "_to_onnx", remember)
        yield known


def digest_of(module: nn.Module, sides: Any) -> str:
    """Digest of everything that an export depends on: structure, plain attributes, weights,
    signature."""
    digest = hashlib.sha256(f"{module!r}{sides!r}".encode())
    for name, part in module.named_modules():
        plain = {
            key: value
            for key, value in vars(part).items()
            if isinstance(value, (int, float, str, list, tuple, Geometry))
        }
        digest.update(f"{name}{type(part).__qualname__}{plain!r}".encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
    """``example(sam, case, after)``: the image cut into windows, and the results of
    :func:`upstream`."""
    known: dict[Any, Any] = {}

    def get(sam: Any, case: str, after: int) -> tuple[Windows, torch.Tensor, torch.Tensor]:
        key = (id(sam), case, after)
        if key not in known:
            image = make_image(sam, case)
            known[key] = (cut(image, geometry_of(sam)), *upstream(sam, image, after))
        return known[key]

    return get
