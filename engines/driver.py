"""Which NVIDIA driver a system has, read from its files alone.

No library is imported and nothing of the GPU is asked, so that the doctor can tell where numpy or
the driver itself is broken. What the driver says of its GPUs is in :mod:`engines.cuda`.
"""

from __future__ import annotations

import re
from pathlib import Path


def driver_version(root: Path = Path("/")) -> str | None:
    """Version of the NVIDIA driver of the system under ``root``, None where it says none.

    The kernel module comes first because a container sees it too; a Jetson's L4T release stands
    in where the module does not say, as before JetPack 6.
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
