"""Shared by commands with long runs: progress, choice of device, and how a result was made."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from edge_common.errors import ConfigError
from edge_common.progress import progress
from edge_common.text import printable

STOPPING = "stopping: this step is finished and saved first; a second signal ends at once"


@contextmanager
def progress_bar(label: str, total: int, done: int = 0, quiet: bool = False) -> Iterator[Any]:
    """Progress in steps; yields ``advance(text="")``, to be called after each of them."""
    with progress(label, total, done=done, quiet=quiet) as work:
        finished = done
        work.note = f"{done} of {total}"

        def advance(note: str = "") -> None:
            nonlocal finished
            finished += 1
            work.advance(1, ", ".join(part for part in (f"{finished} of {total}", note) if part))

        yield advance


def choose_device(name: str) -> torch.device:
    """``auto``, ``cpu`` or ``cuda``; ConfigError when CUDA is asked for and absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda, but PyTorch sees no CUDA device", mend="use --device cpu", code="no_gpu"
        )
    return torch.device(name)


def made_with(command: str) -> dict[str, str]:
    """The command line and versions, for the record."""
    return {
        "command": command,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def say(text: str) -> None:
    """Print one line on stderr."""
    print(printable(text), file=sys.stderr, flush=True)
