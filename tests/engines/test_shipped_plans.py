"""Plans and verdicts of the shipped bundles are kept in the user's cache."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_common.errors import PlanError
from engines import plan as plans
from engines import selection
from engines.bundle import Bundle, shipped_bundle
from engines.plan_paths import FOLDER, bundle_of, plans_folder

ROOT = Path(__file__).resolve().parents[2]
_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE = 24, 1


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "edge-runtime"


def failure(bundle: Bundle) -> selection.Failure:
    engine, machine = selection.onnx_identity("cpu")
    return selection.Failure(engine, machine, bundle.stage("decoder").sha256, "2026-01-01", ())


def test_the_folder_follows_the_environment(
    cache: Path, tmp_path: Path, toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = shipped_bundle("fp16")
    found = plans_folder(shipped)
    assert found.name == FOLDER
    assert found.parent.parent == cache
    assert found.parent.name.startswith("tiny-fp16-")
    assert bundle_of(found) == shipped
    link = tmp_path / "link"
    link.symlink_to(shipped)
    assert plans_folder(link) == found
    assert plans_folder(toy_bundle) == toy_bundle / "plans"
    assert bundle_of(plans_folder(toy_bundle)) == toy_bundle
    copy = shutil.copytree(shipped, tmp_path / "tiny-fp16")
    assert plans_folder(copy) == copy / "plans"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the standard says to ignore relative paths
    monkeypatch.setenv("HOME", str(tmp_path))
    assert plans_folder(shipped).parent.parent == tmp_path / ".cache" / "edge-runtime"


def test_without_a_home_folder_they_are_kept_in_the_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user of a service may have no home. Such a process only looks for plans."""

    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert plans_folder(shipped_bundle()) == shipped_bundle() / "plans"


def test_verdicts_are_kept_there(cache: Path) -> None:
    bundle = Bundle.load(shipped_bundle())
    before = sorted(bundle.path.rglob("*"))
    selection.write_failure(bundle, "decoder", "cpu", failure(bundle))
    assert sorted(bundle.path.rglob("*")) == before
    (note,) = cache.rglob("*.json")
    assert "failed the parity gate" in str(selection.find_failure(bundle, "decoder", "cpu"))
    assert (cache.stat().st_mode & 0o777) == 0o700
    selection.write_failure(bundle, "decoder", "cpu", None)
    assert not note.exists()


def test_a_cache_writable_by_others_is_not_trusted(cache: Path) -> None:
    """Plans contain code."""
    bundle = Bundle.load(shipped_bundle("fp16"))
    assert plans.plans(bundle) == []
    plans_folder(bundle.path).mkdir(parents=True)
    cache.parent.chmod(0o777)
    with pytest.raises(PlanError, match=f"chmod go-w {cache.parent}"):
        plans.plans(bundle)


def read_only(*_: Any) -> None:
    """Prevent root from writing where the permissions forbid it."""
    ctypes.CDLL(None).prctl(_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE, 0, 0, 0)


@pytest.mark.process
@pytest.mark.parametrize("environment", [{}, {"XDG_CACHE_HOME": "{}/elsewhere"}])
def test_a_read_only_package_works(tmp_path: Path, environment: dict[str, str]) -> None:
    pytest.importorskip("tensorrt_rtx")
    package, home = tmp_path / "package", tmp_path / "home"
    home.mkdir()
    for name in ("edge_common", "engines", "transport", "edge_runtime", "cloud_node", "exporters"):
        shutil.copytree(ROOT / name, package / name, ignore=shutil.ignore_patterns("__pycache__"))
    places = [package, *package.rglob("*")]
    for path in places:
        path.chmod(0o555 if path.is_dir() else 0o444)
    given = {key: value.format(tmp_path) for key, value in environment.items()}
    known = {key: value for key, value in os.environ.items() if key != "XDG_CACHE_HOME"}
    settings = {**known, "HOME": str(home), "PYTHONPATH": str(package), **given}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-B", "-m", "edge_runtime.cli", *words],
            env=settings,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=read_only,
        )

    bundle = str(package / "engines" / "bundles" / "tiny-fp16")
    try:
        built = run("build", bundle, "--stage", "decoder", "--backend", "tensorrt-rtx")
        assert built.returncode == 0, built.stderr
        cache = Path(given.get("XDG_CACHE_HOME", home / ".cache")) / "edge-runtime"
        (plan,) = cache.rglob("decoder.plan")
        assert str(plan.parent) in built.stdout
        assert (cache.stat().st_mode & 0o777) == 0o700
        verified = run("verify", bundle, "--stage", "decoder")
        assert "not run" in verified.stdout  # the plan was found; a GPU may be missing
        assert sorted(package.rglob("*")) == sorted(places[1:])
    finally:
        for path in places:
            path.chmod(0o755)
