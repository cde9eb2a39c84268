"""The version of the NVIDIA driver, read from files.

Nothing is imported and the GPU is not asked, so that ``doctor`` works with a broken driver or
numpy. :mod:`engines.cuda` asks the driver about its GPUs.
"""

from __future__ import annotations

import re
from pathlib import Path


def driver_version(root: Path = Path("/")) -> str | None:
    """Version of the NVIDIA driver of the system under ``root``; None if it has none.

    The kernel module is asked first, because a container sees it too. Before JetPack 6 a Jetson's
    module has no version file; then the L4T release is used.
    """
    found = re.search(
        r"^NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\b",
        _text(root / "proc/driver/nvidia/version"),
        re.MULTILINE,
    )
    if found:
        return found[1]
    found = re.search(
        r"^# R(\d+) \(release\), REVISION: ([\d.]+)", _text(root / "etc/nv_tegra_release")
    )
    return f"L4T {found[1]}.{found[2]}" if found else None


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""
