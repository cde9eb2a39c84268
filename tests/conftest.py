"""Bundles for tests.

``toy_bundle`` is a whole bundle of toy graphs (see :mod:`toy`) for tests that do not depend on the
model. ``random_bundle`` is the ``tiny`` SAM with random weights, exported once per session, for
those that do.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import hypothesis
import pytest
from toy import Toy, write_toy_bundle

# No test judges times. In CI the examples are the same in every run. Other runs try new ones.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


# `make check` leaves out the tests marked `process`. There, a test that starts a process fails, so
# the marks stay correct.
_STARTING = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn"}
_started: list[str] = []
_starting_fixtures: set[pytest.FixtureDef[object]] = set()
# Libraries look around with these when they are imported, in whichever test comes first.
_LOOKING_AROUND = {"uname", "ldconfig", "gcc", "cc", "ld", "objdump"}


def _note_start(event: str, args: tuple[object, ...]) -> None:
    if event in _STARTING and Path(str(args[0]) if args else "").name not in _LOOKING_AROUND:
        _started.append(event)


sys.addaudithook(_note_start)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> Generator[None, object, object]:
    before = len(_started)
    try:
        return (yield)
    finally:
        if len(_started) > before:
            _starting_fixtures.add(fixturedef)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    _started.clear()
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    yield
    if "not process" not in item.config.option.markexpr:
        return
    used = getattr(item, "_fixtureinfo").name2fixturedefs.values()  # noqa: B009
    if _started or any(one in _starting_fixtures for every in used for one in every):
        pytest.fail("this test starts a process: mark it with @pytest.mark.process", pytrace=False)


@pytest.fixture(autouse=True, scope="session")
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the verdicts on shipped bundles in a cache folder of the test session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def logging_stays_as_it_was() -> Iterator[None]:
    """Restore logging: commands that run in this process configure the log of a whole process."""
    loggers = (logging.getLogger(), logging.getLogger("asyncio"))
    levels, handlers = [logger.level for logger in loggers], loggers[0].handlers[:]
    disabled = logging.root.manager.disable
    yield
    logging.disable(disabled)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    for handler in loggers[0].handlers[:]:
        if handler not in handlers and not type(handler).__module__.startswith("_pytest"):
            loggers[0].removeHandler(handler)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture(scope="session")
def toy() -> Toy:
    return Toy()


@pytest.fixture(scope="session")
def toy_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full toy bundle that sends pixels to nodes. Copy it before you change it."""
    return write_toy_bundle(tmp_path_factory.mktemp("toy") / "bundle")


@pytest.fixture
def make_toy_bundle() -> Callable[..., Path]:
    """The function :func:`write_toy_bundle`."""
    return write_toy_bundle


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``tiny`` SAM in stock order with random weights.

    SAM starts with relative-position tables and position embeddings of zero, and with norms and
    biases that change nothing. Such values would hide mistakes in their use.
    """
    torch = pytest.importorskip("torch")
    from exporters.measure import randomise
    from exporters.models import build_sam, save_checkpoint

    torch.manual_seed(7)
    sam = randomise(build_sam("tiny").eval(), seed=7)
    path = tmp_path_factory.mktemp("random") / "tiny-random.pt"
    save_checkpoint(sam, path)
    return path


@pytest.fixture(scope="session")
def random_bundle(random_checkpoint: Path) -> Path:
    """The reordered ``random_checkpoint``, exported in fp32. It sends pixels to nodes."""
    from exporters.export import export

    out = random_checkpoint.parent / "bundle"
    export(random_checkpoint, out, model="tiny")
    return out
