"""The `cloud-node` command."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

_DESCRIPTION = """\
Lend this machine to edges: run the window-attention layers of a Segment Anything Model on single
windows of their images. A node never gets a whole image, a prompt or a mask."""

_SERVE = """\
Serve one bundle over ZeroMQ with CURVE encryption. Only edges whose public keys lie in
DIR/authorized get in; edges know this node by the public key in DIR/node.pub."""

_EXAMPLES = """\
first time on this machine:
  edge-runtime keys node --dir keys            makes keys/node.key, keys/node.pub, keys/authorized/
  (send keys/node.pub to the edge's owner, who sends back a .pub file)
  edge-runtime keys authorize --dir keys kitchen.pub
then:
  cloud-node serve --bundle BUNDLE --bind tcp://0.0.0.0:5555 --keys keys

A bundle is a directory made by `edge-runtime export`; `--for node` leaves out what a node needs
not. Windows are kept in memory only and appear in no log. Ctrl-C or SIGTERM stops the node once
what it has admitted is answered, within 10 s; again, it stops at once. A key added to or taken from
DIR/authorized counts within a second.
"""


def build_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "cloud-node", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=raw
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="answer window requests",
        description=_SERVE,
        epilog=_EXAMPLES,
        formatter_class=raw,
    )
    serve.add_argument(
        "--bundle",
        type=Path,
        metavar="BUNDLE",
        help="full or node-only bundle to serve; edges must use the same one (default: the small "
        "one that comes with the package)",
    )
    serve.add_argument(
        "--bind",
        default="tcp://0.0.0.0:5555",
        metavar="ENDPOINT",
        help="address to listen on (default %(default)s); port 0 takes any free one",
    )
    serve.add_argument(
        "--keys",
        type=Path,
        default=Path("keys"),
        metavar="DIR",
        help="folder with node.key and authorized/*.pub (default %(default)s)",
    )
    serve.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads of the engine (default: all cores). Several nodes on one machine must "
        "share its cores: give each its part, or they slow one another down",
    )
    serve.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda", "tensorrt"),
        default="auto",
        help="what computes: tensorrt: a plan made by `edge-runtime build`; cuda, cpu: ONNX "
        "Runtime; auto: the first of these that may serve here (default %(default)s)",
    )
    serve.add_argument(
        "--ready-file",
        type=Path,
        metavar="PATH",
        help="once serving, write endpoint and public key here as JSON; removed at the end",
    )
    serve.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="least severity to log, on stderr (default %(default)s)",
    )
    serve.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.version:
        from cloud_node.server import software

        print(software())
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    return _serve(args)


def _serve(args: argparse.Namespace) -> int:
    from engines.errors import EdgeRuntimeError
    from transport.process import disable_core_dumps

    disable_core_dumps()
    handler = logging.StreamHandler(sys.stderr)
    formatter = logging.Formatter(
        "%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S"
    )
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    logging.basicConfig(level=args.log_level.upper(), handlers=[handler])
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)  # until the server can stop in order
    try:
        return _run(args)
    except EdgeRuntimeError as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _leave(*_: object) -> NoReturn:
    raise SystemExit(0)


def _run(args: argparse.Namespace) -> int:
    from cloud_node.config import NodeConfig, prepare
    from cloud_node.pool import LocalPool
    from cloud_node.server import Server
    from engines.bundle import shipped_bundle

    config = NodeConfig(
        bundle=args.bundle or shipped_bundle(),
        bind=args.bind,
        keys=args.keys,
        threads=args.threads,
        device=args.device,
        ready_file=args.ready_file,
    )
    prepared = prepare(config)
    pool = LocalPool(
        prepared.bundle,
        devices=(config.device,),
        threads=config.threads,
        max_batch=config.max_batch,
    )
    if config.threads is None and config.device in ("auto", "cpu"):
        logging.getLogger(__name__).info(
            "on the CPU this node takes all cores; if several nodes share this machine, give each "
            "its part with --threads"
        )

    async def serve() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def begin_stop() -> None:
            stop.set()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)  # a second signal ends the process at once

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, begin_stop)
        await Server(prepared, pool).run(stop)

    asyncio.run(serve())
    logging.getLogger(__name__).info("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
