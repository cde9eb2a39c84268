"""The README's commands, run as a reader would type them. The commands of all documents are
checked.

Shell commands are lines of ``sh`` and ``console`` blocks (in the latter after ``$``) and of
indented blocks. They run in order in a folder that holds ``photo.jpg``, the sources, and an
``edge.toml`` with three running nodes. So do ``python`` blocks, which know ``np`` and ``image``. A
block after a line ``<!-- not run: REASON -->`` is only checked, like the programs of
``CHECKED_ONLY``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PROGRAMS = ("edge-runtime", "cloud-node", "make", "pip", "python", "torchrun")
CHECKED_ONLY = ("make", "pip", "git", "cloud-node")  # other tests run these; nodes run already
PRELUDE = """\
import numpy as np
from edge_runtime.imaging.images import load_image
image = load_image("photo.jpg")
"""
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "jetson").glob("*.md"))]
BINARIES = Path(sys.executable).parent


@dataclass(frozen=True)
class Snippet:
    """A command or a Python block of a document."""

    line: int
    language: str
    text: str
    run: bool


def snippets(text: str) -> list[Snippet]:
    found: list[Snippet] = []
    lines = text.splitlines()
    skip, i = False, 0
    while i < len(lines):
        line = lines[i]
        if line.startswith("<!-- not run:"):
            skip = True
        elif fence := re.match(r"```(\w*)", line):
            end = next(j for j in range(i + 1, len(lines)) if lines[j].startswith("```"))
            body = lines[i + 1 : end]
            if fence[1] == "python":
                found.append(Snippet(i + 1, "python", "\n".join(body), not skip))
            elif fence[1] in ("sh", "bash", "console"):
                found += commands(body, i + 2, not skip, prompt=fence[1] == "console")
            i, skip = end, False
        elif line.startswith("    ") and (not i or not lines[i - 1].strip()):
            end = next(
                (j for j in range(i, len(lines)) if lines[j] and not lines[j].startswith("    ")),
                len(lines),
            )
            body = [part[4:] for part in lines[i:end]]
            if any(part.removeprefix("$ ").split(" ")[0] in PROGRAMS for part in body):
                prompt = any(part.startswith("$ ") for part in body)
                found += commands(body, i + 1, not skip, prompt)
            i, skip = end - 1, False
        elif line.strip():
            skip = False
        i += 1
    return found


def commands(body: list[str], first: int, run: bool, prompt: bool) -> Iterator[Snippet]:
    joined, start = "", 0
    for number, line in enumerate(body, first):
        if prompt and not joined:
            if not line.startswith("$ "):
                continue
            line = line[2:]
        if not joined:
            start = number
        joined += line.rstrip("\\")
        if line.endswith("\\"):
            continue
        words = shlex.split(joined, comments=True)
        if words:
            yield Snippet(start, "sh", joined.strip(), run)
        joined = ""


def every_command() -> list[tuple[str, str]]:
    return [
        (f"{path.relative_to(ROOT)}:{snippet.line}", snippet.text)
        for path in DOCUMENTS
        for snippet in snippets(path.read_text(encoding="utf-8"))
        if snippet.language == "sh"
    ]


def test_the_extractor_finds_the_commands_a_reader_would_type() -> None:
    text = """\
Prose with `edge-runtime help`.

    edge-runtime demo   # indented
    not a command of ours

```console
$ make test
output
$ edge-runtime nodes \\
    --json
```
<!-- not run: hardware -->
```sh
cloud-node serve  # far away
```
```python
print(1)
```
```toml
a = 1
```
"""
    found = [(s.language, s.text, s.run) for s in snippets(text)]
    assert found == [
        ("sh", "edge-runtime demo   # indented", True),
        ("sh", "not a command of ours", True),
        ("sh", "make test", True),
        ("sh", "edge-runtime nodes     --json", True),
        ("sh", "cloud-node serve  # far away", False),
        ("python", "print(1)", True),
    ]


@pytest.mark.parametrize(("where", "text"), every_command())
def test_every_documented_command_exists_with_its_options(where: str, text: str) -> None:
    words = shlex.split(text, comments=True)
    while words and re.match(r"\w+=", words[0]):
        words = words[1:]
    if words[0] == "torchrun":
        words = words[words.index("edge-runtime") :] if "edge-runtime" in words else ["pip"]
    if words[0] == "edge-runtime":
        parse_edge_runtime(words[1:], where)
    elif words[0] == "cloud-node":
        from cloud_node.cli import build_parser

        must_parse(build_parser(), words[1:], where)
    elif words[0] == "make":
        for target in (word for word in words[1:] if "=" not in word and word[0] != "-"):
            listed = (ROOT / "Makefile").read_text()
            assert re.search(rf"^{re.escape(target)}:", listed, re.MULTILINE), where
    elif words[0] == "pip" and "-r" in words:
        assert (ROOT / words[words.index("-r") + 1]).is_file(), where
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]), where


def parse_edge_runtime(words: list[str], where: str) -> None:
    from edge_runtime.cli import COMMANDS

    if words[0].startswith("-"):
        return
    assert words[0] in COMMANDS, where
    module = importlib.import_module(COMMANDS[words[0]].module)
    parser = argparse.ArgumentParser(allow_abbrev=False)
    module.add_arguments(parser)
    must_parse(parser, words[1:], where)


def must_parse(parser: argparse.ArgumentParser, words: list[str], where: str) -> None:
    try:
        parser.parse_args([word for word in words if word not in ("...", "|", "--help")])
    except SystemExit as stop:
        if stop.code:
            pytest.fail(f"{where}: the command line does not take {shlex.join(words)}")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a photo and an edge.toml with three running nodes and the shipped model."""
    from transport.keys import generate, generate_secret, make_directory, write_public

    folder = tmp_path_factory.mktemp("reader")
    with Image.open(ROOT / "edge_runtime" / "photos" / "coins.png") as coins:
        coins.convert("RGB").save(folder / "photo.jpg", quality=95)
    (folder / "edge_runtime").symlink_to(ROOT / "edge_runtime")
    generate_secret(folder / "keys" / "edge.secret")
    tables = []
    with contextlib.ExitStack() as stack:
        for name in ("alpha", "beta", "gamma"):
            keys = make_directory(folder / f".{name}")
            node, mine = generate(keys, "node"), generate(folder / "keys", name)
            write_public(folder / "keys" / f"{name}-node.pub", node.public, name)
            write_public(make_directory(keys / "authorized") / "edge.pub", mine.public, "edge")
            ready = keys / "ready.json"
            command = [sys.executable, "-m", "cloud_node.cli", "serve", "--keys", str(keys)]
            command += ["--bind", "tcp://127.0.0.1:0", "--threads", "1"]
            process = subprocess.Popen(
                [*command, "--ready-file", str(ready)], stderr=subprocess.DEVNULL
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            give_up = time.monotonic() + 60
            while not ready.exists():
                assert process.poll() is None
                assert time.monotonic() < give_up
                time.sleep(0.02)
            endpoint = json.loads(ready.read_text())["endpoint"]
            key = f"keys/{name}-node.pub"
            tables.append(
                f'[[nodes]]\nname = "{name}"\nendpoint = "{endpoint}"\nserver_key = "{key}"\n'
            )
        (folder / "edge.toml").write_text("deadline_s = 60\n" + "".join(tables))
        yield folder


@pytest.mark.process
def test_the_readme_runs(reader: Path) -> None:
    """The snippets run in order, as a reader runs them."""
    environment = {**os.environ, "PATH": f"{BINARIES}{os.pathsep}{os.environ['PATH']}"}
    ran = 0
    for snippet in snippets(README.read_text(encoding="utf-8")):
        if not snippet.run or snippet.text.split(" ")[0] in CHECKED_ONLY:
            continue
        command = (
            [sys.executable, "-c", PRELUDE + snippet.text]
            if snippet.language == "python"
            else ["bash", "-euo", "pipefail", "-c", snippet.text]
        )
        done = subprocess.run(
            command,
            cwd=reader,
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, f"README.md:{snippet.line}: {snippet.text}\n{done.stderr}"
        ran += 1
    assert ran >= 2


def test_the_readme_starts_with_the_two_commands() -> None:
    texts = [snippet.text for snippet in snippets(README.read_text(encoding="utf-8"))]
    makes = [text.split("#")[0].strip() for text in texts if text.startswith("make ")]
    assert makes[:2] == ["make demo", "make test"]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r"src=\"([^\"]+)\"", text)
    missing = [
        target for target in targets if "://" not in target and not (path.parent / target).exists()
    ]
    assert not missing, f"{path.relative_to(ROOT)} links to {missing}"


def test_the_table_of_what_offloading_can_gain_is_as_measured() -> None:
    measured = json.loads((ROOT / "docs/results/split.json").read_text())
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for row in measured["rows"]:
        seconds = row["seconds"]
        gain = (seconds["stack"] + seconds["tail"]) / seconds["tail"]
        name = f"ViT-{row['model'][-1].upper()}"
        cells = [name, f"{row['edge_share']:.0%}".replace("%", " %")]
        cells += [f"{seconds['stack']:.1f}", f"{seconds['tail']:.1f}", f"{seconds['decoder']:.2f}"]
        assert "| " + " | ".join([*cells, f"{gain:.1f} times faster"]) + " |" in text
    assert len(measured["rows"]) == 3
