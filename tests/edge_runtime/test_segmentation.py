"""Folders that appear whole or not at all, and what is in them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from edge_runtime import segmentation
from edge_runtime.offload import NodeReport, OffloadReport
from engines.errors import ConfigError, OffloadError


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


def test_a_folder_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "result"
    with segmentation.whole_folder(folder) as scratch:
        (scratch / "a").write_text("new")
        assert not folder.exists()
    assert (folder / "a").read_text() == "new"
    assert os.listdir(folder.parent) == ["result"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_the_old_folder_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    folder = tmp_path / "result"
    folder.mkdir()
    (folder / "a").write_text("old")

    def fail() -> None:
        with segmentation.whole_folder(folder) as scratch:
            (scratch / "a").write_text("new")
            raise error

    with pytest.raises(error):
        fail()
    assert (folder / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["result"]


def test_an_error_leaves_no_parent_folders_either(tmp_path: Path) -> None:
    def fail() -> None:
        with segmentation.whole_folder(tmp_path / "a" / "b" / "result"):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert os.listdir(tmp_path) == []


class Sender:
    """What `sends_on_record` looks at of a predictor."""

    report: OffloadReport | None = None

    def send(self) -> None:
        shown = NodeReport(name="alpha", windows=(1, 5), exposure=0.4)
        self.report = OffloadReport(
            (shown,), (), 0.4, 4, 9, 2, bytes_up=10, bytes_down=0, total_ms=1.0, ledger=()
        )


def test_a_record_that_cannot_be_written_is_told_instead(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 250)  # with .sends.json, longer than names may be

    def fail(sender: Sender) -> None:
        with segmentation.sends_on_record(folder, "a.png", sender):  # type: ignore[arg-type]
            sender.send()
            raise OffloadError("it broke")

    with pytest.raises(OffloadError, match=r"it broke\. Nodes .*alpha: \(1, 5\).*name too long"):
        fail(Sender())
    assert os.listdir(tmp_path) == []


def test_only_what_was_sent_meanwhile_is_put_on_record(tmp_path: Path) -> None:
    sender = Sender()
    sender.send()  # another photo

    def fail() -> None:
        with segmentation.sends_on_record(tmp_path / "out", "a.png", sender):  # type: ignore[arg-type]
            raise OffloadError("it broke")

    with pytest.raises(OffloadError, match=r"^it broke$"):
        fail()
    assert os.listdir(tmp_path) == []


def test_replacing_a_folder_keeps_nothing_of_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "result"
    folder.mkdir()
    (folder / "old").touch()
    with segmentation.whole_folder(folder) as scratch:
        (scratch / "new").touch()
    assert os.listdir(folder) == ["new"]
    assert os.listdir(tmp_path) == ["result"]


def test_only_results_are_ever_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    segmentation.check_folder(folder, overwrite=False)
    folder.mkdir()
    segmentation.check_folder(folder, overwrite=False)
    (folder / "thesis.tex").touch()
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="holds other things"):
            segmentation.check_folder(folder, overwrite=overwrite)
    (folder / segmentation.RESULT).touch()  # some other program's, for all we know
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"holds other things than results, such as thesis"):
            segmentation.check_folder(folder, overwrite=overwrite)
    with pytest.raises(ConfigError, match="is a file, not a folder"):
        segmentation.check_folder(folder / "thesis.tex" / "results", overwrite=True)
    with pytest.raises(ConfigError, match="in the way"):
        segmentation.check_folder(folder / "thesis.tex", overwrite=True)
    (folder / "thesis.tex").unlink()
    for name in ("mask-1.png", "mask-2-3.png", "masks.png", "overlay.png"):
        (folder / name).touch()
    with pytest.raises(ConfigError, match="--overwrite"):
        segmentation.check_folder(folder, overwrite=False)
    segmentation.check_folder(folder, overwrite=True)
    (folder / "mask-3.png").mkdir()
    with pytest.raises(ConfigError, match=r"such as mask-3\.png"):
        segmentation.check_folder(folder, overwrite=True)
