"""The `cloud-node` command: serve, check a configuration, write one."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloud_node.settings import SETTINGS
from edge_common import signals
from edge_common.options import Parser
from edge_common.settings import add_arguments, settings_file, split_address

if TYPE_CHECKING:
    from cloud_node.config import Loaded, Prepared
    from cloud_node.pool import Pool
    from edge_common.service_manager import ServiceManager

_DESCRIPTION = """\
Lend this machine to edges: run the window-attention layers of a Segment Anything Model on single
windows of their images. A node never gets a whole image, a prompt or a mask."""

_SERVE = """\
Serve one bundle over ZeroMQ with CURVE encryption. Only edges with a public key in DIR/authorized
can connect. Edges identify this node by the public key in DIR/node.pub.

Every setting is an option here and a key (with _ for -) in the file given with --config; options
win. `cloud-node init` writes such a file and explains every setting in it."""

_CHECK = """\
Check everything that `cloud-node serve` reads with the same options: settings, keys, the hashes of
the bundle, addresses. Prints each setting and where it comes from. Opens no engine;
`edge-runtime doctor` does."""

_INIT = """\
Write a node.toml that explains every setting. Options given here are set in it; all others are
comments with their defaults. Never overwrites a file."""

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

A bundle is a directory made by `edge-runtime export`; with `--for node` it contains only what a
node needs. Windows are kept in memory only and appear in no log. Ctrl-C, SIGTERM or SIGHUP stops
the node as soon as all admitted requests are answered, at the latest after drain_s; a second Ctrl-C
or SIGTERM stops it at once. Changes to DIR/authorized take effect within a second. The rest is in
docs/node.md.
"""


_HEADER = """\
# Settings of this node, read by `cloud-node serve --config`. Relative paths are relative to this
# file. Lines that are comments show the default, or an example.
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
        add_arguments(command, SETTINGS)
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

    options = {name: value for name, value in vars(args).items() if name in SETTINGS}
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
        print(error.shown(), file=sys.stderr)
        return error.exit_code


def _serve(file: Path | None, options: Mapping[str, Any]) -> int:
    from edge_common.process import disable_core_dumps, exit_on_stop_signals

    disable_core_dumps()  # until then, other processes of this user can look into this one
    exit_on_stop_signals()

    from cloud_node.memory import check_room

    check_room()
    # NumPy multiplies no matrices here or in workers, but would take memory for a thread per core.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    import asyncio
    import logging

    from cloud_node.config import ALL_CORES, load, prepare, takes_all_cores
    from edge_common.errors import EdgeRuntimeError
    from edge_common.logs import setup
    from edge_common.process import keep_freed_memory
    from edge_common.service_manager import ServiceManager

    keep_freed_memory()
    config = load(file, options).config
    setup(config.log_level, config.log_format)
    log = logging.getLogger(__name__)
    prepared = prepare(config)
    service_manager = ServiceManager.from_environment()  # before workers inherit it
    pool = _pool(prepared)
    if takes_all_cores(config):
        log.info(ALL_CORES)
    try:
        asyncio.run(_run(prepared, pool, service_manager))
    except (EdgeRuntimeError, MemoryError):
        raise
    except Exception:
        log.exception("stopped because of a defect")
        return 1
    log.info("stopped")
    return 0


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


async def _run(prepared: Prepared, pool: Pool, service_manager: ServiceManager) -> None:
    import asyncio

    from cloud_node.server import Server
    from edge_common.process import set_on_stop_signals

    stop = asyncio.Event()
    set_on_stop_signals(stop)
    server = Server(prepared, pool)
    async with contextlib.AsyncExitStack() as stack:
        if prepared.config.metrics:
            from edge_common.health import Endpoint

            endpoint = Endpoint(server.metrics, server.metrics.registry)
            await endpoint.open(*split_address(prepared.config.metrics))
            stack.push_async_callback(endpoint.close)
        await stack.enter_async_context(service_manager.following(server.metrics))
        await server.run(stop)


def _check(file: Path | None, options: Mapping[str, Any], as_json: bool) -> int:
    from cloud_node.config import examine, load, prepare

    loaded = load(file, options)
    prepared = prepare(loaded.config)
    _pool(prepared)
    notes = examine(prepared)
    if as_json:
        report = {
            "settings": {
                name: {"value": getattr(loaded.config, name), "source": source}
                for name, source in loaded.sources.items()
            },
            "notes": notes,
            "bundle": prepared.label,
            "public_key": prepared.keypair.public,
            "authorised_keys": len(prepared.allowed),
        }
        print(json.dumps(report, indent=2, default=str))
        return 0
    print("\n".join(_table(loaded)))
    print(f"\nBundle: {prepared.label}, stack {prepared.stage.sha256[:12]}, hashes are correct")
    print(f"Public key: '{prepared.keypair.public}'")
    print(f"Edges authorised: {len(prepared.allowed)}")
    for note in notes:
        print(f"Note: {note}")
    return 0


def _table(loaded: Loaded) -> list[str]:
    rows = [("SETTING", "FROM", "VALUE")]
    for name, setting in SETTINGS.items():
        value = getattr(loaded.config, name)
        shown = f"({setting.about.unset})" if value is None else setting.show(value).strip('"')
        rows.append((name, loaded.sources[name], shown))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return [f"{name:{widths[0]}}  {source:{widths[1]}}  {value}" for name, source, value in rows]


def _init(out: Path, options: Mapping[str, Any]) -> int:
    from cloud_node.config import load
    from edge_common.errors import ConfigError
    from edge_common.files import write_atomically

    config = load(None, options).config
    write_atomically(
        out,
        _HEADER + settings_file(SETTINGS, options, out.parent),
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


if __name__ == "__main__":
    sys.exit(main())
