"""Facts read from a machine's files, on trees made from public sources (jetson/boards)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edge_runtime.machine.board import PowerMode, read_board

BOARDS = Path(__file__).resolve().parents[3] / "jetson" / "boards"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the Orin Nano's tree that a test may change."""
    return shutil.copytree(BOARDS / "orin-nano-8gb-jetpack-6.2", tmp_path / "root")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "orin-nano-8gb-jetpack-6.2",
            {
                "model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
                "jetson": True,
                "soc": "tegra234",
                "compute_capability": "8.7",
                "l4t": "36.4.3",
                "jetpack": "6.2",
                "jetpack_installed": "6.2",
                "driver": "540.4.0",
                "cuda": "12.6.11",
                "gpu_nodes": ("nvmap", "nvhost-ctrl-gpu", "nvgpu/igpu0/ctrl"),
                "gpus": (),
                "tensorrt_folders": ("3.10",),
                "tensorrt_package": "10.3.0.30",
                "container": False,
                "power_mode": PowerMode(1, "25W"),
                "fastest_mode": PowerMode(2, "MAXN_SUPER"),
                "memory_bytes": 7802840 * 1024,
                "available_bytes": 4921300 * 1024,
                "swap_bytes": 3901416 * 1024,
                "gpu_visible": True,
            },
        ),
        (
            "agx-orin-64gb-jetpack-6.1",
            {
                "l4t": "36.4.0",
                "jetpack": "6.1",
                "jetpack_installed": None,  # removed: its configuration files remain
                "cuda": None,
                "tensorrt_folders": (),
                "tensorrt_package": None,
                "power_mode": PowerMode(2, "MODE_30W"),
                "fastest_mode": PowerMode(0, "MAXN"),
            },
        ),
        (
            "agx-thor-jetpack-7.1",
            {
                "jetson": True,
                "soc": "tegra264",
                "compute_capability": "11.0",
                "l4t": "38.4.0",
                "jetpack": "7.1",
                "driver": "L4T 38.4.0",
                "cuda": "13.0.2",
                "gpu_nodes": ("nvmap", "nvidiactl", "nvidia0"),
                "tensorrt_folders": ("3.12",),
                "tensorrt_package": "10.13.3.9",
                "swap_bytes": 0,
                "gpu_visible": True,
            },
        ),
        (
            "orin-container-without-devices",
            {
                "model": None,
                "jetson": True,
                "soc": None,
                "l4t": None,
                "jetpack": None,
                "container": True,
                "gpu_nodes": (),
                "gpu_visible": False,
                "power_mode": None,
                "fastest_mode": None,
            },
        ),
        (
            "x86-workstation",
            {
                "model": "Precision 3680",
                "jetson": False,
                "compute_capability": None,
                "l4t": None,
                "jetpack": None,
                "driver": "550.163.01",
                "cuda": "13.0.2",
                "gpus": ("NVIDIA GeForce RTX 4090",),
                "container": False,
                "gpu_visible": True,
            },
        ),
    ],
)
def test_the_facts_of_each_board(name: str, expected: dict[str, object]) -> None:
    board = read_board(BOARDS / name)
    assert {key: getattr(board, key) for key in expected} == expected


def test_every_tree_is_small_and_has_a_test() -> None:
    names = {path.name for path in BOARDS.iterdir() if path.is_dir()}
    assert len(names) == 5
    for path in BOARDS.rglob("*"):
        assert not path.is_symlink(), path
        assert path.is_dir() or path.stat().st_size < 10_000, path


def test_a_machine_without_these_files_is_unknown_not_an_error(tmp_path: Path) -> None:
    board = read_board(tmp_path / "nothing")
    assert board.model is None
    assert not board.jetson
    assert not board.container
    assert board.memory_bytes == 0
    assert board.zones == ()


def test_malformed_files_are_unknown_too(tree: Path) -> None:
    for path in sorted(tree.rglob("*")):
        if path.is_file() and "dev" not in path.parts:
            path.write_bytes(b"\xff\x00{[<\n:=" * 50)
    (tree / "etc/nv_tegra_release").unlink()
    (tree / "etc/nv_tegra_release").mkdir()  # reading it is an OSError
    board = read_board(tree)
    assert (board.l4t, board.driver, board.cuda, board.power_mode) == (None, None, None, None)
    assert (board.memory_bytes, board.zones) == (0, ())


@pytest.mark.parametrize(
    ("release", "jetpack"),
    [
        ("# R36 (release), REVISION: 3.0, GCID: 1", "6.0"),
        ("# R36 (release), REVISION: 4.7, GCID: 1", "6.2.1"),
        ("# R36 (release), REVISION: 99.0, GCID: 1", "6"),  # the line is known, the release is not
        ("# R38 (release), REVISION: 2.1, GCID: 1", "7.0"),
        ("# R39 (release), REVISION: 2.0, GCID: 1", "7.2"),
        ("# R77 (release), REVISION: 1.0, GCID: 1", None),
    ],
)
def test_l4t_gives_the_jetpack_version_where_no_package_does(
    tree: Path, release: str, jetpack: str | None
) -> None:
    (tree / "var/lib/dpkg/status").unlink()
    (tree / "etc/nv_tegra_release").write_text(release)
    assert read_board(tree).jetpack == jetpack


@pytest.mark.parametrize("state", ["install ok half-installed", "deinstall ok config-files"])
def test_a_package_that_is_not_installed_does_not_count(tree: Path, state: str) -> None:
    status = tree / "var/lib/dpkg/status"
    before = status.read_text()
    assert read_board(tree).tensorrt_package
    status.write_text(before.replace("install ok installed", state))
    assert read_board(tree).tensorrt_package is None


def test_l4t_comes_from_its_package_without_a_release_file(tree: Path) -> None:
    (tree / "etc/nv_tegra_release").unlink()
    assert read_board(tree).l4t == "36.4.3"


@pytest.mark.parametrize(
    ("names", "fastest"),
    [
        (["15W", "7W"], 0),
        (["7W", "15W"], 1),
        (["MAXN_SUPER", "10W", "15W", "25W", "40W"], 0),  # Orin NX
        (["MAXN", "MAXN_SUPER"], 1),
        (["MODE_15W_2CORE", "MODE_20W_4CORE", "MODE_20W_6CORE"], 2),  # Xavier NX
        (["QUIET", "LOUD"], None),
    ],
)
def test_the_fastest_mode_is_found_by_name_not_by_number(
    tree: Path, names: list[str], fastest: int | None
) -> None:
    lines = [f"< POWER_MODEL ID={i} NAME={name} >" for i, name in enumerate(names)]
    (tree / "etc/nvpmodel.conf").write_text("\n".join(lines))
    found = read_board(tree).fastest_mode
    assert found == (None if fastest is None else PowerMode(fastest, names[fastest]))


def test_a_mode_without_a_name_in_the_configuration(tree: Path) -> None:
    (tree / "var/lib/nvpmodel/status").write_text("pmode:0009 fmode:cool\n")
    assert read_board(tree).power_mode == PowerMode(9, "?")


def test_zones_are_sorted_by_heat_and_have_their_throttling_point() -> None:
    hot = read_board(BOARDS / "agx-orin-64gb-jetpack-6.1").zones
    assert [(zone.name, zone.celsius, zone.throttles) for zone in hot] == [
        ("cpu-thermal", 99.5, 99.0),
        ("gpu-thermal", 97.0, 99.0),
    ]
    # An active trip point starts a fan. A point at or below zero is off. A zone may have no
    # reading.
    nano = read_board(BOARDS / "orin-nano-8gb-jetpack-6.2").zones
    assert nano[0].name == "tj-thermal"
    assert nano[0].throttles == 99.0
    assert "cv0-thermal" not in [zone.name for zone in nano]
    assert read_board(BOARDS / "x86-workstation").zones[0].throttles is None


def test_cuda_without_a_toolkit_is_found_by_its_runtime_library(tree: Path) -> None:
    shutil.rmtree(tree / "usr/local/cuda-12.6")
    library = tree / "usr/local/cuda-12.6/targets/aarch64-linux/lib/libcudart.so.12.6.68"
    library.parent.mkdir(parents=True)
    library.touch()
    assert read_board(tree).cuda == "12.6.68"


def test_the_newest_of_several_cuda_toolkits_counts(tree: Path) -> None:
    for number in ("9.2", "12.10"):
        path = tree / f"usr/local/cuda-{number}/version.json"
        path.parent.mkdir()
        path.write_text(f'{{"cuda": {{"version": "{number}.1"}}}}')
    assert read_board(tree).cuda == "12.10.1"


def test_the_device_tree_is_also_found_where_the_link_points(tree: Path) -> None:
    (tree / "sys/firmware/devicetree").mkdir(parents=True)
    (tree / "proc/device-tree").rename(tree / "sys/firmware/devicetree/base")
    assert read_board(tree).soc == "tegra234"


@pytest.mark.parametrize("sign", ["run/.containerenv", "proc/1/cgroup"])
def test_other_signs_of_a_container_are_recognised(tree: Path, sign: str) -> None:
    assert not read_board(tree).container
    (tree / sign).parent.mkdir(parents=True, exist_ok=True)
    (tree / sign).write_text("12:devices:/kubepods/besteffort/pod1/2\n")
    assert read_board(tree).container


def test_device_files_without_permission_are_reported(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # root may open everything, so the answer is simulated
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "ctrl")
    assert read_board(tree).locked_nodes == ("nvgpu/igpu0/ctrl",)
