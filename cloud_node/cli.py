"""The `cloud-node` command: serve, check a configuration, write one."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from cloud_node.settings import BY_NAME, GROUPS, SETTINGS, Setting
from edge_common import signals
from edge_common.options import Invalid, Parser
from edge_common.text import printable

if TYPE_CHECKING:
    from cloud_node.config import Loaded, Prepared
    from cloud_node.notify import Notifier
    from cloud_node.pool import Pool

_DESCRIPTION = """\
Lend this machine to edges: run the window-attention layers of a Segment Anything Model on single
windows of their images. A node never gets a whole image, a prompt or a mask."""

_SERVE = """\
Serve one bundle over ZeroMQ with CURVE encryption. Only edges whose public keys lie in
DIR/authorized get in; edges know this node by the public key in DIR/node.pub.

Every setting is an option here and a key in the file that --config names (with _ for -); options
win. `cloud-node init` writes such a file with all of them explained."""

_CHECK = """\
Check everything that `cloud-node serve` would be told with the same words: settings, keys, the
hashes of the bundle, addresses. Prints the settings that hold and where each comes from. Starts
nothing: whether the engine opens is only seen by serving, or by `edge-runtime doctor`."""

_INIT = """\
Write a node.toml with every setting explained in it. Settings given as options are set in it, the
others stand there as comments, with their defaults. Overwrites nothing."""

_EXAMPLES = """\
first time on this machine:
  edge-runtime keys node --dir keys            makes keys/node.key, keys/node.pub, keys/authorized/
  (send keys/node.pub to the edge's owner, who sends back a .pub file)
  edge-runtime keys authorize --dir keys kitchen.pub
then:
  cloud-node serve --bundle BUNDLE --bind tcp://0.0.0.0:5555 --keys keys
or, to keep it running:
  cloud-node init --bundle BUNDLE --metrics 127.0.0.1:9464
  cloud-node check --config node.toml
  cloud-node serve --config node.toml

A bundle is a directory made by `edge-runtime export`; `--for node` leaves out what a node needs
not. Windows are kept in memory only and appear in no log. Ctrl-C, SIGTERM or SIGHUP stops the node
once what it has admitted is answered, or drain_s is over; a second Ctrl-C or SIGTERM stops it at
once. A key added to or taken from DIR/authorized counts within a second. docs/node.md has the rest.
"""


def build_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("cloud-node", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=raw)
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, summary: str, description: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=summary, description=description, epilog=_EXAMPLES, formatter_class=raw
        )
        for group in GROUPS:
            section = command.add_argument_group(group)
            for setting in SETTINGS:
                if setting.group == group:
                    section.add_argument(
                        setting.option,
                        type=_reader(setting),
                        default=argparse.SUPPRESS,
                        metavar=setting.placeholder,
                        help=_help(setting),
                    )
        command.add_argument("--debug", action="store_true", help="show tracebacks of errors")
        return command

    for command in (
        add("serve", "answer window requests", _SERVE),
        check := add("check", "check a configuration and show what holds", _CHECK),
    ):
        command.add_argument(
            "--config", type=Path, metavar="FILE", help="settings in TOML (default: none)"
        )
    check.add_argument("--json", action="store_true", help="print the result as JSON")
    init = add("init", "write a commented node.toml", _INIT)
    init.add_argument(
        "--out",
        type=Path,
        default=Path("node.toml"),
        metavar="FILE",
        help="where to write (default: %(default)s)",
    )
    return parser


def _reader(setting: Setting) -> Any:
    def read(text: str) -> Any:
        try:
            return setting.parse(text)
        except Invalid as error:
            raise Invalid(f"{error}, not {text!r}") from None

    return read


def _help(setting: Setting) -> str:
    default = setting.unset or setting.show(setting.default).strip('"')
    return f"{setting.help} Default: {default}.".replace("%", "%%")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    Args:
        argv: without the program's name. None means ``sys.argv``, and that this process is for the
            command alone.
    """
    if argv is None:
        return signals.run_as_process(lambda: _main(None))
    return _main(argv)


def _main(argv: list[str] | None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.version:
        from cloud_node.server import software

        print(software())
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    from edge_common.errors import EdgeRuntimeError

    options = {name: value for name, value in vars(args).items() if name in BY_NAME}
    try:
        if args.command == "init":
            return _init(args.out, options)
        if args.command == "check":
            return _check(args.config, options, args.json)
        return _serve(args.config, options)
    except MemoryError:
        if args.debug:
            raise
        text = "error: there is not enough memory to start: free some, or raise limits on it"
        print(text, file=sys.stderr)
        return 1
    except EdgeRuntimeError as error:
        if args.debug:
            raise
        print(f"error: {printable(error)}", file=sys.stderr)
        return error.exit_code


def _serve(file: Path | None, options: Mapping[str, Any]) -> int:
    from edge_common.process import disable_core_dumps

    disable_core_dumps()  # until then, other processes of this user can look into this one
    for number in _stop_signals():
        signal.signal(number, _leave)  # until the server can stop in order

    from cloud_node.memory import check_room

    check_room()
    # Neither here nor in workers does NumPy multiply matrices, for which it would take memory in
    # as many threads as there are cores.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    import asyncio
    import logging

    from cloud_node.config import load, prepare
    from cloud_node.logs import setup
    from cloud_node.notify import Notifier
    from edge_common.errors import EdgeRuntimeError
    from edge_common.process import keep_freed_memory

    keep_freed_memory()
    config = load(file, options).config
    setup(config.log_level, config.log_format)
    log = logging.getLogger(__name__)
    prepared = prepare(config)
    notifier = Notifier.from_environment()  # before workers inherit it
    pool = _pool(prepared)
    if config.threads is None and config.workers == "local" and {*config.device} <= {"auto", "cpu"}:
        log.info(
            "on the CPU this node takes all cores; if several nodes share this machine, give each "
            "its part with --threads"
        )
    try:
        asyncio.run(_run(prepared, pool, notifier))
    except (EdgeRuntimeError, MemoryError):
        raise
    except Exception:
        log.exception("stopped because of a defect")
        return 1
    log.info("stopped")
    return 0


def _stop_signals() -> list[signal.Signals]:
    """What tells a node to stop. SIGHUP comes when its terminal is closed. nohup has that ignored,
    and so it stays."""
    hangup = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *[signal.SIGHUP] * hangup]


def _leave(*_: object) -> NoReturn:
    raise SystemExit(0)


def _pool(prepared: Prepared) -> Pool:
    from cloud_node.pool import LocalPool, parse_device

    config = prepared.config
    if config.workers == "ray":
        from cloud_node.ray_pool import RayPool

        return RayPool(
            prepared.bundle,
            address=config.ray_address,
            device=parse_device(config.device[0])[0],
            replicas=config.ray_replicas,
            threads=config.threads,
            max_batch=config.max_batch,
        )
    return LocalPool(
        prepared.bundle,
        devices=config.device,
        threads=config.threads,
        max_batch=config.max_batch,
    )


def _end_now(number: int, _: object) -> None:
    os._exit(128 + number)


async def _run(prepared: Prepared, pool: Pool, notifier: Notifier) -> None:
    import asyncio

    from cloud_node.server import Server, version

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def begin_stop() -> None:
        stop.set()
        # A second SIGHUP changes nothing: when a terminal is closed, the shell and the system each
        # send one.
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            # A second signal ends the process at once. Python's own answer to Ctrl-C, an exception
            # wherever it happens to be, would not: Ray for one then waits for ever. Nor would the
            # default where this is a container's first process, which the kernel spares.
            first = os.getpid() == 1
            signal.signal(number, _end_now if first else signal.SIG_DFL)

    for number in _stop_signals():
        loop.add_signal_handler(number, begin_stop)
    server = Server(prepared, pool)
    async with contextlib.AsyncExitStack() as stack:
        if prepared.config.metrics:
            from cloud_node.health import Endpoint

            endpoint = Endpoint(server.metrics, version())
            await endpoint.open(prepared.config.metrics)
            stack.push_async_callback(endpoint.close)
        await stack.enter_async_context(notifier.following(server.metrics))
        await server.run(stop)


def _check(file: Path | None, options: Mapping[str, Any], as_json: bool) -> int:
    from cloud_node.config import examine, load, prepare

    loaded = load(file, options)
    prepared = prepare(loaded.config)
    _pool(prepared)
    notes = examine(prepared)
    if as_json:
        settings = {
            setting.name: {"value": _plain(value), "source": loaded.sources[setting.name]}
            for setting in SETTINGS
            for value in [getattr(loaded.config, setting.name)]
        }
        told = {
            "settings": settings,
            "notes": notes,
            "bundle": prepared.label,
            "public_key": prepared.keypair.public,
            "authorised_keys": len(prepared.allowed),
        }
        print(json.dumps(told, indent=2))
        return 0
    print("\n".join(_table(loaded)))
    print(
        f"\nBundle: {prepared.label}, stack {prepared.stage.sha256[:12]}, hashes as they should be"
    )
    print(f"Public key: '{prepared.keypair.public}'")
    print(f"Edges authorised: {len(prepared.allowed)}")
    for note in notes:
        print(f"Note: {note}")
    return 0


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value  # tuples become arrays


def _table(loaded: Loaded) -> list[str]:
    rows = [("SETTING", "FROM", "VALUE")]  # which may be long
    for setting in SETTINGS:
        value = getattr(loaded.config, setting.name)
        shown = f"({setting.unset})" if value is None else setting.show(value).strip('"')
        rows.append((setting.name, loaded.sources[setting.name], shown))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return [f"{name:{widths[0]}}  {source:{widths[1]}}  {value}" for name, source, value in rows]


def _init(out: Path, options: Mapping[str, Any]) -> int:
    from cloud_node.config import load
    from edge_common.errors import ConfigError
    from edge_common.files import refuse_existing, write_atomically

    refuse_existing(out, ConfigError, "name another file with --out")
    config = load(None, options).config
    write_atomically(
        out,
        _toml(options, out.parent),
        mode=0o644,  # under a loose umask, others could write to it
        replace=False,
        error=ConfigError,
        instead="name another file with --out",
    )
    print(f"Wrote {out}.\n\nNext:")
    if not config.key_file.exists():
        print(f"  edge-runtime keys node --dir {config.keys}")
    print(f"  cloud-node check --config {out}\n  cloud-node serve --config {out}")
    return 0


def _toml(options: Mapping[str, Any], base: Path) -> str:
    """A node.toml with these settings set, for the folder `base`."""
    import textwrap

    parts = [
        "# Settings of this node, read by `cloud-node serve --config`. Relative paths are relative "
        "to\n# this file. Lines that are comments show the default, or an example.\n"
    ]
    for setting in SETTINGS:
        text = setting.help if not setting.unset else f"{setting.help} Default: {setting.unset}."
        parts.append("\n" + textwrap.fill(text, 98, initial_indent="# ", subsequent_indent="# "))
        if setting.name in options:
            value = options[setting.name]
            if setting.is_path:
                value = os.path.relpath(value, base)
            parts.append(f"\n{setting.name} = {setting.show(value)}\n")
        else:
            value = setting.example if setting.default is None else setting.default
            parts.append(f"\n# {setting.name} = {setting.show(value)}\n")
    return "".join(parts)


if __name__ == "__main__":
    sys.exit(main())
