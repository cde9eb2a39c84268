"""TensorRT and TensorRT-RTX behind one face: every difference between their versions, once.

``tensorrt`` (JetPack, data centre) and ``tensorrt_rtx`` (workstations) have nearly the same Python
interface, from 10.3 to 11 and beyond. Where they differ, a function here takes the branch and says
why, so that builder and engine read the same for all. The module promises to import neither library
until :func:`load` is called, and that a missing one is a single line naming what installs it.
Building, running and judging plans are left to the modules that use it.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from engines.errors import EngineError

Flavour = Literal["tensorrt", "tensorrt-rtx"]
Backend = Literal["auto", "tensorrt", "tensorrt-rtx"]

FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "tensorrt-rtx")
_MODULES: dict[Flavour, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_TITLES: dict[Flavour, str] = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
_INSTALL: dict[Flavour, str] = {
    "tensorrt": (
        "on a Jetson `sudo apt install python3-libnvinfer` installs it, and a virtual environment "
        "sees it when made with `python3 -m venv --system-site-packages`"
    ),
    "tensorrt-rtx": "`pip install 'edge-runtime[rtx]'` installs it",
}


@dataclass(frozen=True)
class Library:
    """One imported library. ``module`` is ``tensorrt`` or ``tensorrt_rtx`` itself."""

    flavour: Flavour
    version: tuple[int, int, int]
    module: Any = field(repr=False, compare=False)

    @property
    def version_text(self) -> str:
        """``10.3.0``."""
        return ".".join(map(str, self.version))

    @property
    def name(self) -> str:
        """``TensorRT 10.3.0`` or ``TensorRT-RTX 1.7.1``."""
        return f"{_TITLES[self.flavour]} {self.version_text}"

    @property
    def parses_attention(self) -> bool:
        """Whether the ONNX parser knows the operator ``Attention`` of opset 23."""
        # TensorRT learned it in 10.14; the oldest TensorRT-RTX tried here (1.7) knows it.
        return self.flavour == "tensorrt-rtx" or self.version >= (10, 14, 0)


@dataclass(frozen=True)
class Defect:
    """Something known to be wrong with a library on some GPU; ``source`` is a URL."""

    what: str
    source: str


def installed() -> list[Flavour]:
    """The libraries that Python can find, without importing them, in order of preference."""
    return [flavour for flavour in FLAVOURS if _found(_MODULES[flavour])]


def load(flavour: Flavour) -> Library:
    """Import the library.

    Raises:
        EngineError: when it is not installed, cannot be imported, or has no version to read.
    """
    name = _MODULES[flavour]
    if not _found(name):
        raise EngineError(f"{_TITLES[flavour]} is not installed: {_INSTALL[flavour]}")
    try:
        module = importlib.import_module(name)
    except Exception as error:  # its loaders raise OSError, RuntimeError and others
        reason = (str(error).splitlines() or [""])[0]
        raise EngineError(
            f"{_TITLES[flavour]} is installed, but `import {name}` fails "
            f"({type(error).__name__}: {reason}): {_INSTALL[flavour]}"
        ) from error
    text = str(getattr(module, "__version__", ""))
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", text)
    if match is None:
        raise EngineError(
            f"the module {name} at {getattr(module, '__file__', None)} has the version {text!r}, "
            f"expected one like 10.3.0: something else lies in its place. {_INSTALL[flavour]}"
        )
    major, minor, patch = map(int, match.groups())
    return Library(flavour, (major, minor, patch), module)


def choose(backend: Backend) -> Library:
    """The library of that name; ``auto``: TensorRT where it is installed, else TensorRT-RTX.

    Raises:
        EngineError: as :func:`load`; for ``auto`` when neither is installed.
    """
    if backend != "auto":
        return load(backend)
    found = installed()
    if not found:
        ways = "; ".join(f"{_TITLES[flavour]}: {_INSTALL[flavour]}" for flavour in FLAVOURS)
        raise EngineError(f"neither TensorRT nor TensorRT-RTX is installed. {ways}")
    return load(found[0])


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a half-installed module without a spec
        return False
