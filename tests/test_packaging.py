"""The installed product: the wheel, the lock files, and the two setup commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("edge_common", "engines", "transport", "cloud_node", "edge_runtime", "exporters")
LOCKS = ("cpu", "gpu", "jetson", "dev")
RUNTIME = {
    "numpy",
    "pyzmq",
    "cryptography",
    "onnxruntime",
    "pillow",
    "msgspec",
    "rich",
    "prometheus-client",
}


def locked(kind: str) -> dict[str, dict[str, str]]:
    """Name -> version -> marker of a lock file. Every line must be pinned and hashed."""
    text = (ROOT / "requirements" / f"{kind}.txt").read_text()
    found: dict[str, dict[str, str]] = {}
    for entry in text.replace(" \\\n", " ").splitlines():
        if entry.startswith("#"):
            continue
        match = re.fullmatch(
            r"([a-z0-9-]+)==([\w.]+)(?: ; (.*?))?((?: +--hash=sha256:[0-9a-f]{64})+)", entry
        )
        assert match, f"{kind}.txt: {entry!r} is not a pinned and hashed release"
        found.setdefault(match[1], {})[match[2]] = match[3] or ""
    return found


@pytest.mark.process
def test_no_text_suggests_installing_this_project_from_an_index() -> None:
    """The project is on no index. Anybody could register its name there and reach its users."""
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if files.returncode:
        pytest.skip("this is no checkout")
    advice = re.compile(
        r"pip\d? (?:install|download)[^`\n]*?[ '\"]edge-runtime(?:\W|$)|edge-runtime\["
    )
    found = []
    for name in files.stdout.split("\0"):
        path = ROOT / name
        if path.suffix not in (".py", ".md", ".toml", ".txt", ".service", "") or not path.is_file():
            continue
        for number, line in enumerate(path.read_bytes().decode(errors="replace").splitlines(), 1):
            # In pyproject.toml the name means the project that is being installed.
            if advice.search(line) and path not in (ROOT / "pyproject.toml", Path(__file__)):
                found.append(f"{name}:{number}: {line.strip()}")
    assert not found, "\n".join(found)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that the checkout stays clean."""
    copy = tmp_path_factory.mktemp("copy")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in (*PACKAGES, "tests", "jetson"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    subprocess.run(
        [*command, "--no-build-isolation", "--wheel-dir", str(out), str(copy)], check=True
    )
    (built,) = out.glob("*.whl")
    return built


@pytest.mark.process
def test_the_wheel_holds_the_packages_and_their_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(n for n in names if n.endswith("/METADATA"))).decode()
        scripts = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    tops = {name.split("/")[0] for name in names}
    assert tops == {*PACKAGES, next(n for n in tops if n.endswith(".dist-info"))}
    for package in PACKAGES:
        sources = {
            str(path.relative_to(ROOT))
            for path in (ROOT / package).rglob("*.py")
            if "__pycache__" not in path.parts
        }
        assert sources <= names
    for folder in ("edge_runtime/photos", "engines/bundles", "exporters/weights"):
        data = {str(p.relative_to(ROOT)) for p in (ROOT / folder).rglob("*") if p.is_file()}
        assert {name for name in data if "__pycache__" not in name} <= names
    assert "edge_runtime/photos/coins.png" in names
    assert "engines/bundles/tiny-fp32/manifest.json" in names
    assert "engines/bundles/tiny-fp16/manifest.json" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "edge-runtime = edge_runtime.cli:main" in scripts
    assert "cloud-node = cloud_node.cli:main" in scripts
    needed = re.findall(r"^Requires-Dist: ([\w.-]+)(.*)$", metadata, re.MULTILINE)
    always = {name.lower() for name, rest in needed if "extra ==" not in rest}
    assert always == {*RUNTIME, "tomli"}


@pytest.mark.process
def test_the_installed_wheel_segments_a_photo(wheel: Path, tmp_path: Path) -> None:
    """Run outside of the checkout, with the installed files alone."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = (
        "import sys, edge_runtime, engines\n"
        "assert edge_runtime.__file__.startswith(sys.argv[1]), edge_runtime.__file__\n"
        "assert engines.__file__.startswith(sys.argv[1]), engines.__file__\n"
        "from edge_runtime.cli import main\n"
        "sys.exit(main(sys.argv[2:]))\n"
    )
    photo = tmp_path / "site" / "edge_runtime" / "photos" / "coins.png"
    command = [sys.executable, "-c", script, str(tmp_path / "site")]
    command += ["segment", str(photo), "--point", "335,43", "--local", "--json"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["objects"][0]["masks"][0]["area"] > 0
    assert (tmp_path / "out" / "coins.png" / "overlay.png").is_file()


@pytest.mark.parametrize("kind", LOCKS)
def test_lock_files_name_no_index_and_no_address(kind: str) -> None:
    text = (ROOT / "requirements" / f"{kind}.txt").read_text()
    assert not re.search(r"://|index-url|find-links|@ ", text)
    assert locked(kind)


def test_the_cpu_lock_holds_the_runtime_only() -> None:
    names = set(locked("cpu"))
    assert RUNTIME | {"tomli"} <= names
    assert names.isdisjoint({"torch", "torchvision", "onnx", "matplotlib", "scipy"})
    assert len(names) < 25


def test_the_gpu_lock_replaces_onnxruntime_by_its_gpu_build() -> None:
    names = set(locked("gpu"))
    assert "onnxruntime-gpu" in names
    assert "onnxruntime" not in names
    assert RUNTIME - {"onnxruntime"} <= names


def test_the_jetson_lock_keeps_the_last_onnxruntime_for_its_python() -> None:
    found = locked("jetson")
    assert RUNTIME | {"tomli"} <= set(found)
    (version,) = found["onnxruntime"]
    assert tuple(map(int, version.split(".")[:2])) <= (1, 23)
    assert all(marker == "" for versions in found.values() for marker in versions.values())
    assert all(len(versions) == 1 for versions in found.values())


def test_tests_use_the_releases_that_users_get() -> None:
    cpu, dev = locked("cpu"), locked("dev")
    for name, versions in cpu.items():
        assert set(versions) <= set(dev[name]), f"{name}: {versions} for users, {dev[name]} here"
    assert dev["torch"] == {"2.14.1": ""}
    assert dev["torchvision"] == {"0.29.1": ""}


def test_this_environment_matches_the_lock() -> None:
    """Checks only packages that influence the runtime's results."""
    from importlib.metadata import version

    for name in ("numpy", "onnxruntime", "pillow", "pyzmq", "msgspec"):
        assert version(name) in locked("dev")[name]


def make(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *words], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.process
def test_make_without_a_target_lists_the_targets() -> None:
    done = make()
    assert done.returncode == 0
    for target in ("demo", "test", "lint", "lock", "check-locks"):
        assert re.search(rf"^{target} +\S", done.stdout, re.MULTILINE)


@pytest.mark.process
def test_make_demo_installs_only_the_runtime() -> None:
    done = make("--dry-run", "DEMO_VENV=.venv-none", "demo")
    assert done.returncode == 0, done.stderr
    assert "-r requirements/cpu.txt" in done.stdout
    assert "--no-deps" in done.stdout
    assert "edge-runtime demo --out out/demo" in done.stdout
    assert "dev.txt" not in done.stdout


@pytest.mark.process
def test_an_unsupported_python_is_named() -> None:
    done = make("PYTHON=false", "DEMO_VENV=.venv-none", ".venv-none/.ready")
    assert done.returncode != 0
    assert "false is not Python 3.10 to 3.14" in done.stderr


@pytest.mark.process
@pytest.mark.parametrize("outcome", ["true", "false"])
def test_ci_runs_make_test_and_reports_its_failure(tmp_path: Path, outcome: str) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    (tmp_path / "Makefile").write_text(f"test:\n\t@echo tested && {outcome}\n")
    done = subprocess.run(
        [tmp_path / ".ci" / "run"], cwd="/", capture_output=True, text=True, check=False
    )
    assert "tested" in done.stdout
    assert (done.returncode == 0) == (outcome == "true")


def test_the_lock_writer_s_markers_select_the_right_lines() -> None:
    pytest.importorskip("tomllib")
    sys.path.insert(0, str(ROOT / "requirements"))
    try:
        import lock
    finally:
        sys.path.pop(0)
    pythons = ("3.10", "3.11", "3.12")
    assert lock.marker(["3.10", "3.11", "3.12"], pythons) == ""
    assert lock.marker(["3.10"], pythons) == "python_version < '3.11'"
    assert lock.marker(["3.11"], pythons) == (
        "python_version >= '3.11' and python_version < '3.12'"
    )
    line = "numpy==2.4.6 ; python_version >= '3.11' and python_version < '3.12'"
    assert [lock.applies(line, python) for python in pythons] == [False, True, False]
    assert all(lock.applies("rich==1.0", python) for python in pythons)
