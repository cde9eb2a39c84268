"""The `edge-runtime` command: finds and runs one subcommand, and reports its errors.

Each subcommand is a module with `add_arguments(parser)`, which also sets `parser.description` and
`parser.epilog`, and `run(args) -> int`. Only that module is imported, so that `--help` is quick and
no command loads an inference engine or torch without using it.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NamedTuple

from edge_common import signals
from edge_common.errors import EdgeRuntimeError
from edge_common.options import Parser

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it

_EXPORT = "run `pip install '.[export]'` in a checkout of edge-runtime"
# Top-level package -> what installs it.
_INSTALL = {
    **dict.fromkeys(
        ("torch", "torchvision", "segment_anything", "onnx", "onnxscript", "scipy"), _EXPORT
    ),
    "skimage": "run `pip install scikit-image`",
}


class Command(NamedTuple):
    module: str
    summary: str


# Group -> command -> where it lives and what it is for. The order is the order of the help text.
GROUPS: dict[str, dict[str, Command]] = {
    "Segment": {
        "segment": Command(
            "edge_runtime.commands.segment",
            "segment a photo at points or boxes, through the nodes or --local",
        ),
        "demo": Command(
            "edge_runtime.commands.demo",
            "the whole system on this machine: three nodes, one photo, masks",
        ),
    },
    "Set up nodes": {
        "keys": Command(
            "edge_runtime.commands.keys",
            "make a key pair (secret key 0600) and show its public key",
        ),
        "init": Command("edge_runtime.commands.init", "write a commented edge.toml for your nodes"),
        "nodes": Command(
            "edge_runtime.commands.nodes",
            "check every node: reachable, authorised, same bundle, round trip",
        ),
    },
    "Exposure": {
        "plan": Command(
            "edge_runtime.commands.plan",
            "how many parties a budget needs, and the room it leaves for retries",
        ),
        "exposure": Command(
            "edge_runtime.commands.exposure",
            "what each party has seen so far of scenes and photos, as a table or picture",
        ),
    },
    "Engines": {
        "doctor": Command(
            "edge_runtime.commands.doctor",
            "what this machine can run, and the command that repairs the rest",
        ),
        "build": Command(
            "edge_runtime.commands.build", "build TensorRT plans of a bundle for this machine's GPU"
        ),
        "verify": Command(
            "edge_runtime.commands.verify",
            "the parity gate: every engine of this machine against the golden samples",
        ),
    },
    "Models": {
        "info": Command("edge_runtime.commands.info", "show what a bundle is and check its files"),
        "export": Command("exporters.commands.export", "make a bundle from a SAM checkpoint *"),
        "tensors": Command(
            "exporters.commands.tensors",
            "the largest intermediate tensors of a graph: what it needs unfused *",
        ),
        "train": Command(
            "exporters.commands.train", "train the small SAM from scratch on procedural scenes *"
        ),
        "adapt": Command(
            "exporters.commands.adapt",
            "adapt SAM weights to the reordered blocks by distillation *",
        ),
        "evaluate": Command(
            "exporters.commands.evaluate", "mask quality: stock, reordered, adapted, blurred *"
        ),
    },
}
COMMANDS: dict[str, Command] = {name: c for group in GROUPS.values() for name, c in group.items()}

_OPENING = """\
usage: edge-runtime COMMAND [options]

Segment Anything with the heavy layers on nodes that each see only a few windows of the picture.

Try it here, then through your own nodes:

  edge-runtime segment photo.jpg --point 120,80 --local
  edge-runtime init --node NAME=tcp://HOST:5555,NAME.pub       (once; writes edge.toml)
  edge-runtime segment photo.jpg --point 120,80 --config edge.toml
"""
_CLOSING = """\
Options:
  -h, --help     this text; `edge-runtime COMMAND --help` explains a command
  --version      print the version
  --debug        show the traceback of an error

* needs torch: run `pip install '.[export]'` in a checkout of edge-runtime
"""


def help_text() -> str:
    """The text of ``edge-runtime --help``."""
    parts = [_OPENING]
    for group, commands in GROUPS.items():
        lines = [f"  {name:<10} {command.summary}" for name, command in commands.items()]
        parts.append("\n".join([f"{group}:", *lines, ""]))
    return "\n".join([*parts, _CLOSING])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code.

    Args:
        argv: without the program's name. None means ``sys.argv``, and that this process is for the
            command alone: a signal ends it within a second, even inside an engine.
    """
    if argv is None:
        return signals.run_as_process(lambda: _main(sys.argv[1:]))
    try:
        return _main(list(argv))
    finally:
        signals.clear_received()


def _main(arguments: list[str]) -> int:
    debug = "--debug" in arguments
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        signals.say_interrupted()
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (`| head`) has ended. Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if (number := signals.received()) is not None:
            if number == signal.SIGINT:
                signals.say_interrupted()
            return 128 + number
        if debug:
            raise
        known = _as_known(error)
        if "--json" in arguments:
            print(json.dumps(known.fields()), flush=True)
        print(known.shown(), file=sys.stderr)
        return known.exit_code


def _dispatch(arguments: list[str]) -> int:
    while arguments[:1] == ["--debug"]:
        arguments = arguments[1:]
    if not arguments:
        print(help_text(), file=sys.stderr)
        return EXIT_USAGE
    name, rest = arguments[0], arguments[1:]
    if name in ("-h", "--help", "help"):
        if rest and rest[0] in COMMANDS:
            name, rest = rest[0], ["--help"]
        else:
            print(help_text())
            return 0
    if name == "--version":
        from importlib.metadata import version

        print(f"edge-runtime {version('edge-runtime')}")
        return 0
    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        near = difflib.get_close_matches(name, [*COMMANDS, "--help", "--version", "--debug"], 1)
        hint = f"did you mean {near[0]}?" if near else "`edge-runtime --help` lists what there is"
        print(f"error: no {kind} {name!r}; {hint}", file=sys.stderr)
        return EXIT_USAGE
    return _run(name, rest)


def _run(name: str, arguments: list[str]) -> int:
    command = COMMANDS[name]
    if not command.module.startswith("exporters."):
        from edge_common.process import disable_core_dumps

        disable_core_dumps()  # this process holds pictures and keys
    module = importlib.import_module(command.module)
    parser = Parser(
        prog=f"edge-runtime {name}",
        description=command.summary.rstrip(" *"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    try:
        args = parser.parse_args(arguments)
    except SystemExit as stop:  # argparse has printed its help or the error
        return stop.code if isinstance(stop.code, int) else EXIT_USAGE
    with signals.raise_on_signals():
        return int(module.run(args) or 0)


def _as_known(error: Exception) -> EdgeRuntimeError:
    """Any error, with a code and, where one is known, a remedy."""
    if isinstance(error, EdgeRuntimeError):
        return error
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").split(".")[0]
        if package in _INSTALL:
            found = f"this command needs {package}, which is not installed"
            return EdgeRuntimeError(found, mend=_INSTALL[package], code="not_installed")
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return EdgeRuntimeError(f"{error.strerror}{where}", code="system")
    return EdgeRuntimeError(
        f"unexpected {type(error).__name__}: {error}",
        mend="this is a bug: please report it with what --debug prints",
        code="bug",
    )


if __name__ == "__main__":
    sys.exit(main())
