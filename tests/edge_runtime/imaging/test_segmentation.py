"""Result folders appear whole or not at all, with the right content."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from edge_common.errors import ConfigError, OffloadError
from edge_runtime.imaging import segmentation
from edge_runtime.offload.report import NodeReport, OffloadReport


def test_bounds_are_the_smallest_box() -> None:
    mask = np.zeros((6, 8), bool)
    assert segmentation.bounds(mask) is None
    mask[2, 3] = mask[4, 5] = True
    assert segmentation.bounds(mask) == [3, 2, 6, 5]


def test_json_keeps_lists_of_numbers_on_one_line() -> None:
    report = {"a": [1, 2.5, -3e-9], "b": {"c": [[1, 2], []]}, "d": ["x", "y"], "e": "[\n 1,\n 2\n]"}
    text = segmentation.dumps(report)
    assert json.loads(text) == report
    assert '"a": [1, 2.5, -3e-09]' in text


class Sender:
    """The part of a predictor that `sends_on_record` uses."""

    record: object = None
    report: OffloadReport | None = None

    def send(self) -> None:
        shown = NodeReport(name="alpha", windows=(1, 5), share_of_image=0.4)
        self.record = object()
        self.report = OffloadReport(
            (shown,), (), 0.5, 0.4, 4, 9, 2, bytes_up=10, bytes_down=0, total_ms=1.0, ledger=()
        )


def test_an_unwritable_record_is_reported_in_the_error(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 250)  # with .sends.json, the name is too long

    def fail(sender: Sender) -> None:
        with segmentation.sends_on_record(folder, "a.png", sender):  # type: ignore[arg-type]
            sender.send()
            raise OffloadError("it broke")

    with pytest.raises(OffloadError, match=r"it broke\. Nodes .*alpha: \(1, 5\).*name too long"):
        fail(Sender())
    assert os.listdir(tmp_path) == []


def test_only_sends_of_this_run_are_recorded(tmp_path: Path) -> None:
    sender = Sender()
    sender.send()  # for another photo

    def fail() -> None:
        with segmentation.sends_on_record(tmp_path / "out", "a.png", sender):  # type: ignore[arg-type]
            raise OffloadError("it broke")

    with pytest.raises(OffloadError, match=r"^it broke$"):
        fail()
    assert os.listdir(tmp_path) == []


check = partial(segmentation.check_folder, ours=segmentation.is_ours, marker=segmentation.RESULT)


def test_only_result_folders_are_ever_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    check(folder, overwrite=False)
    folder.mkdir()
    check(folder, overwrite=False)
    (folder / "thesis.tex").touch()
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="holds other things"):
            check(folder, overwrite=overwrite)
    (folder / segmentation.RESULT).touch()  # it could belong to another program
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"other things than these results, such as thesis"):
            check(folder, overwrite=overwrite)
    with pytest.raises(ConfigError, match="in the way"):
        check(folder / "thesis.tex", overwrite=True)
    (folder / "thesis.tex").unlink()
    for name in ("mask-1.png", "mask-2-3.png", "masks.png", "overlay.png"):
        (folder / name).touch()
    with pytest.raises(ConfigError, match="--overwrite"):
        check(folder, overwrite=False)
    check(folder, overwrite=True)
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(ConfigError, match="link is in the way"):
        check(tmp_path / "link", overwrite=True)
    (folder / "mask-3.png").mkdir()
    with pytest.raises(ConfigError, match=r"such as mask-3\.png"):
        check(folder, overwrite=True)
