"""Facts about the machine: board, the vendor's software, memory, power mode and temperature.

Everything is read from small files below one folder, so that recorded trees of other machines can
be examined. No program is run and no GPU library is loaded. Unreadable facts are unknown (None or
empty), never an error.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from engines.driver import driver_version

# Release of Jetson Linux (L4T) -> JetPack.
# https://developer.nvidia.com/embedded/jetpack-archive and the pages it lists; 36.4.7 and 36.5.2
# are updates by apt, named as the package nvidia-jetpack of that release names itself.
_JETPACK = {
    "35.3.1": "5.1.1",
    "35.4.1": "5.1.2",
    "35.5.0": "5.1.3",
    "35.6.0": "5.1.4",
    "36.3": "6.0",
    "36.4": "6.1",
    "36.4.3": "6.2",
    "36.4.4": "6.2.1",
    "36.4.7": "6.2.1",
    "36.5": "6.2.2",
    "36.5.2": "6.2.3",
    "38.2": "7.0",
    "38.2.1": "7.0",
    "38.4": "7.1",
    "39.2": "7.2",
    "39.2.1": "7.2.1",
}
_JETPACK_LINE = {"32": "4", "34": "5", "35": "5", "36": "6", "38": "7", "39": "7"}

# System on chip -> CUDA compute capability. https://developer.nvidia.com/cuda-gpus
_COMPUTE_CAPABILITY = {"tegra194": "7.2", "tegra234": "8.7", "tegra264": "11.0"}

# Device files of the GPU: a process must be able to open each one that exists.
_GPU_NODES = (
    "nvmap",  # Jetson, memory
    "nvhost-ctrl-gpu",  # Jetson up to JetPack 5
    "nvgpu/igpu0/ctrl",  # Jetson from JetPack 6 (Orin)
    "nvidiactl",  # other GPUs, and Jetson Thor
    "nvidia0",
    "dxg",  # Windows Subsystem for Linux
)
_GPU = frozenset({"nvhost-ctrl-gpu", "nvgpu/igpu0/ctrl", "nvidia0", "dxg"})

_LIMIT = 8 << 20  # characters: /var/lib/dpkg/status of a desktop has some 3 million


@dataclass(frozen=True)
class PowerMode:
    """One mode of ``nvpmodel``: the number that ``nvpmodel -m`` takes, and its name."""

    number: int
    name: str


@dataclass(frozen=True)
class Zone:
    """A thermal zone. `throttles`: the kernel slows it down from this temperature on, if known."""

    name: str
    celsius: float
    throttles: float | None


@dataclass(frozen=True)
class Board:
    """One machine; without arguments, an unknown one.

    Attributes:
        model: as the device tree (Jetson) or the firmware (PC) names it.
        jetson: whether it is one; in a container, the kernel's name says so.
        soc: e.g. ``tegra234``, from the device tree.
        compute_capability: of a Jetson's GPU, from ``soc``; e.g. ``8.7``.
        l4t: release of Jetson Linux, e.g. ``36.4.3``.
        jetpack: e.g. ``6.2``: the version of its package if installed, otherwise derived from
            ``l4t``; for an unknown release of a known series, only that: ``6``.
        jetpack_installed: version of the package ``nvidia-jetpack``; None if not installed.
        driver: version of the NVIDIA driver; ``L4T 38.4.0`` if the kernel does not say and the
            driver is part of Jetson Linux.
        cuda: version of the newest CUDA toolkit or runtime installed for the whole system.
        gpu_nodes: the GPU's device files in ``/dev``.
        locked_nodes: those that this process may not open.
        gpus: names of the GPUs as the driver lists them (not on a Jetson Orin).
        tensorrt_folders: versions of the system's own Python that have ``tensorrt``: ``3.10``, or
            ``3`` where the folder is for any.
        tensorrt_package: version of the package ``python3-libnvinfer``.
        container: whether this is one.
        power_mode: the current one; its name is ``?`` if ``nvpmodel.conf`` does not list it.
        fastest_mode: the one without limits, or with the most watts; None if unknown.
        memory_bytes, available_bytes, swap_bytes: total, available without swapping, and total
            swap; 0 if unknown.
        zones: thermal zones, hottest first.
    """

    model: str | None = None
    jetson: bool = False
    soc: str | None = None
    compute_capability: str | None = None
    l4t: str | None = None
    jetpack: str | None = None
    jetpack_installed: str | None = None
    driver: str | None = None
    cuda: str | None = None
    gpu_nodes: tuple[str, ...] = ()
    locked_nodes: tuple[str, ...] = ()
    gpus: tuple[str, ...] = ()
    tensorrt_folders: tuple[str, ...] = ()
    tensorrt_package: str | None = None
    container: bool = False
    power_mode: PowerMode | None = None
    fastest_mode: PowerMode | None = None
    memory_bytes: int = 0
    available_bytes: int = 0
    swap_bytes: int = 0
    zones: tuple[Zone, ...] = ()

    @property
    def gpu_visible(self) -> bool:
        """True if ``/dev`` holds a GPU's device file."""
        return not _GPU.isdisjoint(self.gpu_nodes)


def read_board(root: Path = Path("/")) -> Board:
    """Read what the files below ``root`` say about the machine."""
    model = _device_tree(root, "model")
    compatible = _device_tree(root, "compatible")
    soc = re.search(r"\btegra\d+\b", " ".join(compatible))
    packages = _packages(root, {"nvidia-jetpack", "nvidia-l4t-core", "python3-libnvinfer"})
    l4t = _l4t(root, packages)
    installed = re.split(r"[+-]", packages.get("nvidia-jetpack", ""))[0] or None
    nodes = tuple(node for node in _GPU_NODES if (root / "dev" / node).exists())
    modes = _power_modes(root)
    memory = _memory(root)
    kernel = _text(root / "proc/sys/kernel/osrelease").strip()
    return Board(
        model=model[0] if model else _text(root / "sys/class/dmi/id/product_name").strip() or None,
        jetson=bool(soc or l4t or kernel.endswith("tegra")),
        soc=soc[0] if soc else None,
        compute_capability=_COMPUTE_CAPABILITY.get(soc[0]) if soc else None,
        l4t=l4t,
        jetpack=installed or _jetpack(l4t),
        jetpack_installed=installed,
        driver=driver_version(root) or (f"L4T {l4t}" if l4t else None),
        cuda=_cuda(root),
        gpu_nodes=nodes,
        locked_nodes=tuple(
            node for node in nodes if not os.access(root / "dev" / node, os.R_OK | os.W_OK)
        ),
        gpus=_gpus(root),
        tensorrt_folders=_tensorrt_folders(root),
        tensorrt_package=packages.get("python3-libnvinfer", "").split("-")[0] or None,
        container=_in_container(root),
        power_mode=_power_mode(root, modes),
        fastest_mode=_fastest(modes),
        memory_bytes=memory.get("MemTotal", 0),
        available_bytes=memory.get("MemAvailable", 0),
        swap_bytes=memory.get("SwapTotal", 0),
        zones=_zones(root),
    )


def _text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(_LIMIT)
    except OSError:
        return ""


def _glob(root: Path, pattern: str) -> list[Path]:
    try:
        return sorted(root.glob(pattern))
    except OSError:
        return []


def _device_tree(root: Path, name: str) -> list[str]:
    """A property of the device tree's root: strings, each ended by a NUL."""
    # The first is a link to the second, but a copied tree may hold only one.
    for folder in ("proc/device-tree", "sys/firmware/devicetree/base"):
        words = [word.strip() for word in _text(root / folder / name).split("\0") if word.strip()]
        if words:
            return words
    return []


def _packages(root: Path, wanted: set[str]) -> dict[str, str]:
    """Versions of those Debian packages that are installed."""
    found = {}
    for paragraph in _text(root / "var/lib/dpkg/status").split("\n\n"):
        fields = dict(re.findall(r"^(Package|Status|Version): *(.+?) *$", paragraph, re.MULTILINE))
        name = fields.get("Package")
        if name in wanted and fields.get("Status", "").endswith(" installed"):
            found[name] = fields.get("Version", "")
    return found


def _l4t(root: Path, packages: dict[str, str]) -> str | None:
    match = re.search(
        r"R(\d+) \(release\), REVISION: (\d+(?:\.\d+)*)", _text(root / "etc/nv_tegra_release")
    )
    if match:
        return f"{match[1]}.{match[2]}"
    # 36.4.7-20250918154033
    return packages.get("nvidia-l4t-core", "").split("-")[0] or None


def _jetpack(l4t: str | None) -> str | None:
    if l4t is None:
        return None
    # One release is called 38.2.0 or 38.2.
    return _JETPACK.get(l4t) or _JETPACK.get(
        l4t.removesuffix(".0"), _JETPACK_LINE.get(l4t.split(".")[0])
    )


def _cuda(root: Path) -> str | None:
    found = []
    for path in _glob(root, "usr/local/cuda*/version.json"):
        try:
            facts = json.loads(_text(path))
            found += [facts[part]["version"] for part in ("cuda", "cuda_cudart") if part in facts][
                :1
            ]
        except (ValueError, TypeError, KeyError):
            continue
    if not found:  # a container image may hold the runtime alone
        for pattern in ("usr/local/cuda*/lib64", "usr/local/cuda*/targets/*/lib", "usr/lib/*"):
            for path in _glob(root, f"{pattern}/libcudart.so.*.*"):
                found.append(path.name.removeprefix("libcudart.so."))
    versions = [text for text in found if re.fullmatch(r"\d+(\.\d+)+", str(text))]
    return max(versions, key=lambda text: [int(n) for n in text.split(".")], default=None)


def _gpus(root: Path) -> tuple[str, ...]:
    names = []
    for path in _glob(root, "proc/driver/nvidia/gpus/*/information"):
        match = re.search(r"^Model:\s*(.+?)\s*$", _text(path), re.MULTILINE)
        names.append(match[1] if match else "unnamed")
    return tuple(names)


def _tensorrt_folders(root: Path) -> tuple[str, ...]:
    pattern = "usr/lib/python3*/dist-packages/tensorrt"
    return tuple(p.parent.parent.name.removeprefix("python") for p in _glob(root, pattern))


def _in_container(root: Path) -> bool:
    if any((root / name).exists() for name in (".dockerenv", "run/.containerenv")):
        return True
    return re.search(r"docker|kubepods|containerd|/lxc/", _text(root / "proc/1/cgroup")) is not None


def _power_modes(root: Path) -> tuple[PowerMode, ...]:
    text = _text(root / "etc/nvpmodel.conf")
    found = re.findall(r"^\s*<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+?)\s*>", text, re.MULTILINE)
    return tuple(PowerMode(int(number), name) for number, name in found)


def _power_mode(root: Path, modes: tuple[PowerMode, ...]) -> PowerMode | None:
    match = re.search(r"pmode:(\d+)", _text(root / "var/lib/nvpmodel/status"))
    if match is None:
        return None
    number = int(match[1])
    return next((mode for mode in modes if mode.number == number), PowerMode(number, "?"))


def _fastest(modes: tuple[PowerMode, ...]) -> PowerMode | None:
    """MAXN_SUPER, else MAXN, else the most watts, then the most cores (MODE_20W_6CORE).

    The mode's number does not help: MAXN_SUPER is 2 on an Orin Nano and 0 on an Orin NX.
    """

    def rank(mode: PowerMode) -> tuple[int, int, int]:
        maxn = 0 if not mode.name.startswith("MAXN") else 1 + mode.name.endswith("SUPER")
        watts = re.search(r"(\d+)W", mode.name)
        cores = re.search(r"(\d+)CORE", mode.name)
        # A name without cores means all of them.
        return maxn, int(watts[1]) if watts else 0, int(cores[1]) if cores else 1000

    named = [mode for mode in modes if rank(mode)[:2] != (0, 0)]
    return max(named, key=rank, default=None)


def _memory(root: Path) -> dict[str, int]:
    text = _text(root / "proc/meminfo")
    return {name: int(kib) << 10 for name, kib in re.findall(r"^(\w+): +(\d+) kB$", text, re.M)}


def _zones(root: Path) -> tuple[Zone, ...]:
    zones = []
    for folder in _glob(root, "sys/class/thermal/thermal_zone*"):
        celsius = _celsius(folder / "temp")
        if celsius is None:
            continue
        trips = []
        for path in _glob(folder, "trip_point_*_type"):
            trip = _celsius(path.with_name(path.name.replace("_type", "_temp")))
            # A trip point at or below zero is disabled.
            if _text(path).strip() == "passive" and trip is not None and trip > 0:
                trips.append(trip)
        name = _text(folder / "type").strip() or folder.name
        zones.append(Zone(name, celsius, min(trips, default=None)))
    return tuple(sorted(zones, key=lambda zone: -zone.celsius))


def _celsius(path: Path) -> float | None:
    try:
        return int(_text(path)) / 1000  # a disabled zone cannot be read
    except ValueError:
        return None
