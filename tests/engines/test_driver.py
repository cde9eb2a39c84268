"""The driver's version, from files as real systems have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.driver import driver_version


@pytest.mark.parametrize(
    ("module", "release", "expected"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 2023\n"
            "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n",
            None,
            "535.104.05",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build\n",
            "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
            "540.4.0",
        ),
        (
            None,
            "# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref, EABI: aarch64\n",
            "L4T 35.4.1",
        ),
        ("nothing of use\n", "nor here\n", None),
        (None, None, None),
    ],
)
def test_the_version_of_the_driver(
    tmp_path: Path, module: str | None, release: str | None, expected: str | None
) -> None:
    for name, text in (("proc/driver/nvidia/version", module), ("etc/nv_tegra_release", release)):
        if text is not None:
            (tmp_path / name).parent.mkdir(parents=True)
            (tmp_path / name).write_text(text)
    assert driver_version(tmp_path) == expected
