#!/usr/bin/env python3
"""Write the lock files of this directory.

``python requirements/lock.py`` (``make lock``) makes pip resolve the project's dependencies once
per Python version and platform, without installing anything. Each lock file has exact versions,
environment markers where Python versions need different releases, and the hash of every chosen
wheel. Only wheels are considered (and the pure Python sources of ``SDISTS``), so no lock file needs
a compiler. The script needs Python 3.11 and pip, and trusts pip's configured package index.

``python requirements/lock.py --check`` (``make check-locks``) downloads every wheel that a Jetson
needs, as pip would on JetPack 6 and 7. It fails if one does not exist or has another hash.

pip evaluates markers of packages (``python_version < "3.11"``) for the interpreter that runs it,
not for the one it resolves for. This script therefore handles the project's own markers. If a
dependency's own dependencies differ between Python versions, add them to ``EXTRA`` by hand.
"""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
LINUX_X86 = ("manylinux2014_x86_64", *(f"manylinux_2_{v}_x86_64" for v in range(17, 29)))
LINUX_ARM = ("manylinux2014_aarch64", *(f"manylinux_2_{v}_aarch64" for v in range(17, 29)))
MAC_ARM = tuple(f"macosx_{v}_0_arm64" for v in (11, 12, 13, 14))

# Releases that must match each other, or that keep one version for more Python versions.
PINS = {
    "torch": "torch==2.14.1",
    "torchvision": "torchvision==0.29.1",
    "numpy": "numpy>=1.26,<2.5",
}
# Packages that pip omits when it resolves for another Python than its own: package -> Pythons.
EXTRA = {"tomli>=2": ("3.10",), "exceptiongroup": ("3.10",)}
# Published only as pure Python sources. Their dependencies are resolved in their place, for that
# version.
SDISTS = {"tensorrt-rtx-cu13": ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13-libs")}

HEADERS = {
    "cpu": "What an edge or a node needs on a CPU: Linux x86-64 and aarch64, macOS arm64.",
    "gpu": "What a node needs on an NVIDIA GPU: Linux x86-64. onnxruntime-gpu takes the place of\n"
    "# onnxruntime; the two overwrite each other, so install the project itself with --no-deps.",
    "jetson": "What an edge needs on JetPack 6 (Python 3.10, aarch64). On JetPack 7 use cpu.txt.",
    "dev": "Everything: exporting, training, tests, lint and types. Linux x86-64.",
}


def project() -> tuple[list[str], dict[str, list[str]]]:
    """The runtime dependencies and the extras in ``pyproject.toml``."""
    import tomllib

    table = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    return table["dependencies"], table["optional-dependencies"]


def name_of(requirement: str) -> str:
    """``Pillow>=10.3; marker`` -> ``pillow``."""
    for i, char in enumerate(requirement):
        if not (char.isalnum() or char in "-_."):
            requirement = requirement[:i]
            break
    return requirement.lower().replace("_", "-")


def resolve(
    requirements: list[str], python: str, platform: tuple[str, ...]
) -> dict[str, tuple[str, str]]:
    """The packages that pip would install: name -> (version, sha256 of the wheel)."""
    names = [part for r in requirements for part in SDISTS.get(name_of(r), (r,))]
    wanted = [PINS.get(name_of(r), r.split(";")[0].strip()) for r in names]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    command += ["--only-binary=:all:", "--python-version", python]
    for tag in platform:
        command += ["--platform", tag]
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        command += ["--target", scratch, "--report", str(report), *wanted]
        subprocess.run(command, check=True)
        found = json.loads(report.read_text())["install"]
    chosen = {
        name_of(item["metadata"]["name"]): (
            item["metadata"]["version"],
            item["download_info"]["archive_info"]["hashes"]["sha256"],
        )
        for item in found
    }
    for sdist in {name_of(r) for r in requirements} & SDISTS.keys():
        version = chosen[SDISTS[sdist][0]][0]
        chosen[sdist] = version, sdist_hash(f"{sdist}=={version}")
    return chosen


@functools.cache
def sdist_hash(requirement: str) -> str:
    """The sha256 of a source distribution."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "--no-binary=:all:", "-d", scratch, requirement], check=True)
        (archive,) = Path(scratch).iterdir()
        return hashlib.sha256(archive.read_bytes()).hexdigest()


def marker(pythons: list[str], all_pythons: tuple[str, ...]) -> str:
    """The environment marker that selects a contiguous run of Python versions."""
    first, last = all_pythons.index(pythons[0]), all_pythons.index(pythons[-1])
    if last - first + 1 != len(pythons):
        raise SystemExit(f"a release is chosen for the scattered Python versions {pythons}")
    parts = []
    if first > 0:
        parts.append(f"python_version >= '{pythons[0]}'")
    if last < len(all_pythons) - 1:
        parts.append(f"python_version < '{all_pythons[last + 1]}'")
    return " and ".join(parts)


def lock(
    kind: str,
    requirements: list[str],
    pythons: tuple[str, ...],
    platforms: tuple[tuple[str, ...], ...],
) -> None:
    """Resolve for every Python and platform and write ``<kind>.txt``."""
    chosen: dict[str, dict[str, set[str]]] = {}  # name -> version -> Python versions
    hashes: dict[tuple[str, str], set[str]] = {}
    for python in pythons:
        extra = [r for r, versions in EXTRA.items() if python in versions]
        if kind != "dev":
            extra = [r for r in extra if name_of(r) == "tomli"]
        wanted = [r for r in requirements if name_of(r) != "tomli"] + extra
        for platform in platforms:
            print(f"{kind}: Python {python}, {platform[-1]}", file=sys.stderr)
            for name, (version, sha256) in resolve(wanted, python, platform).items():
                chosen.setdefault(name, {}).setdefault(version, set()).add(python)
                hashes.setdefault((name, version), set()).add(sha256)
    lines = [
        f"# {HEADERS[kind]}",
        "# Written by `make lock`; edit pyproject.toml or requirements/lock.py instead.",
    ]
    for name in sorted(chosen):
        for version in sorted(chosen[name], key=lambda v: min(map(pythons.index, chosen[name][v]))):
            where = marker(sorted(chosen[name][version], key=pythons.index), pythons)
            line = f"{name}=={version}" + (f" ; {where}" if where else "")
            parts = [line, *(f"    --hash=sha256:{h}" for h in sorted(hashes[name, version]))]
            lines.append(" \\\n".join(parts))
    (HERE / f"{kind}.txt").write_text("\n".join(lines) + "\n")


def applies(line: str, python: str) -> bool:
    """True if a line of a lock file applies to this Python (with markers from :func:`marker`)."""
    version = tuple(map(int, python.split(".")))
    for condition in line.split(";")[1].split(" and ") if ";" in line else ():
        _, operator, bound = condition.replace("'", "").replace("\\", "").split()
        limit = tuple(map(int, bound.split(".")))
        if not (version >= limit if operator == ">=" else version < limit):
            return False
    return True


def check(kind: str, python: str, platform: tuple[str, ...]) -> int:
    """Download the wheels of a lock file for one Python and platform. Returns the number of
    wheels."""
    blocks = (HERE / f"{kind}.txt").read_text().replace(" \\\n", " ").splitlines()
    lines = [b for b in blocks if not b.startswith("#") and applies(b.split(" --hash")[0], python)]
    with tempfile.TemporaryDirectory() as scratch:
        wanted = Path(scratch) / "wanted.txt"
        # The marker was evaluated above. pip would evaluate it for its own Python.
        wanted.write_text(
            "\n".join(b.split(" ")[0] + b[b.index(" --hash") :] for b in lines) + "\n"
        )
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--require-hashes", "--python-version", python]
        for tag in platform:
            command += ["--platform", tag]
        subprocess.run([*command, "-d", scratch, "-r", str(wanted)], check=True)
        found = len(list(Path(scratch).glob("*.whl")))
    if found != len(lines):
        raise SystemExit(f"{kind}.txt: {len(lines)} releases for Python {python}, {found} wheels")
    return found


def main() -> None:
    """Write all lock files, or those named on the command line. Or check the Jetson's."""
    if sys.argv[1:] == ["--check"]:
        for name, kind, python in (("6", "jetson", "3.10"), ("7", "cpu", "3.12")):
            found = check(kind, python, LINUX_ARM)
            print(
                f"JetPack {name} (Python {python}, aarch64): {kind}.txt, {found} wheels, all found"
            )
        return
    runtime, extras = project()
    wanted = extras["export"] + extras["rtx"] + extras["ray"] + extras["dev"]
    dev = [r for r in wanted if not r.startswith("edge-runtime")]
    gpu = [
        r.replace("onnxruntime", "onnxruntime-gpu[cuda,cudnn]")
        if name_of(r) == "onnxruntime"
        else r
        for r in runtime
    ]
    plans = {
        "cpu": (runtime, PYTHONS, (LINUX_X86, LINUX_ARM, MAC_ARM)),
        "gpu": (gpu, PYTHONS, (LINUX_X86,)),
        "jetson": (runtime, PYTHONS[:1], (LINUX_ARM,)),
        "dev": (runtime + dev, PYTHONS, (LINUX_X86,)),
    }
    for kind in sys.argv[1:] or plans:
        lock(kind, *plans[kind])


if __name__ == "__main__":
    main()
