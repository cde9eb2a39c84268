"""`edge-runtime init`: write a commented edge.toml, and the keys that are still missing.

It overwrites nothing, and writes nothing if an argument is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_runtime.config import EdgeConfig, NodeConfig

DESCRIPTION = """\
Write an edge.toml for your nodes that explains every setting. Also make this edge's secret and its
key for each node, unless they exist. Nothing is overwritten."""

EPILOG = """\
KEY is the node's public key: the node.pub file that its operator sent you, or the 40 characters in
it. Put those in single quotes, because they may contain $, & or *. With fewer than three nodes, one
of them sees more than half of a picture.

examples:
  edge-runtime init --node alpha=tcp://alpha.example.org:5555,keys/alpha-node.pub \\
                    --node beta=tcp://10.0.0.7:5555,keys/beta-node.pub \\
                    --node gamma=tcp://[2001:db8::7]:5555,keys/gamma-node.pub
  edge-runtime nodes                                       (checks them)
  edge-runtime segment photo.jpg --point 120,80 --config edge.toml
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from edge_common.options import SHARE
    from edge_runtime.exposure.placement import DEFAULT_MAX_EXPOSURE

    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.add_argument(
        "--node",
        action="append",
        required=True,
        metavar="NAME=ENDPOINT,KEY",
        help="a node: your name for it, tcp://HOST:PORT and its public key; once for each",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("edge.toml"),
        metavar="FILE",
        help="where to write (default: %(default)s)",
    )
    parser.add_argument(
        "--keys",
        type=Path,
        default=Path("keys"),
        metavar="DIR",
        help="folder of this edge's keys (default: %(default)s)",
    )
    parser.add_argument(
        "--bundle",
        type=Path,
        metavar="DIR",
        help="full bundle this edge uses (default: the one that comes with the package)",
    )
    parser.add_argument(
        "--max-exposure",
        type=SHARE,
        default=DEFAULT_MAX_EXPOSURE,
        metavar="SHARE",
        help="largest share of a picture's area one node may see, such as 0.37 or 37%% (default: "
        "%(default)g)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Check everything, then write. Raises ConfigError or KeyFileError before it writes."""
    from edge_common.errors import ConfigError, KeyFileError
    from edge_common.files import refuse_existing, write_atomically
    from edge_common.permissions import why_untrusted
    from edge_runtime.config import (
        EdgeConfig,
        NodeConfig,
        load_nodes,
        refuse_own_keys,
        refuse_shared_keys,
    )
    from engines.bundle import Bundle
    from transport.keys import check_new, generate, generate_secret, load_secret
    from transport.sockets import check_endpoint

    out: Path = args.out
    refuse_existing(out, ConfigError, "name another file with --out")
    if not out.parent.is_dir():
        raise ConfigError(f"the folder {out.parent} does not exist")
    if danger := why_untrusted(out.parent, owner=out.parent.stat().st_uid):
        raise danger.error(ConfigError)
    if args.bundle is not None:
        Bundle.load(args.bundle)
    nodes = []
    server_keys = {}
    for text in args.node:
        name, endpoint, key = _split(text)
        try:
            check_endpoint(endpoint)
            server_keys[name] = _public(key)
        except (ConfigError, KeyFileError) as error:
            raise error.within(f"--node {text!r}") from None
        nodes.append(
            NodeConfig(
                name=name,
                endpoint=endpoint,
                server_key=key,
                client_key=str(args.keys / f"{name}.key"),
            )
        )
    config = EdgeConfig(
        nodes=tuple(nodes),
        bundle=None if args.bundle is None else str(args.bundle),
        secret=str(args.keys / "edge.secret"),
        max_exposure=args.max_exposure,
    )

    missing = [node.name for node in nodes if not os.path.lexists(node.client_key)]
    own = {n.name: load_secret(n.client_key).public for n in nodes if n.name not in missing}
    refuse_own_keys(server_keys, set(own.values()))
    refuse_shared_keys("server", server_keys)
    refuse_shared_keys("client", own)
    for name in missing:
        check_new(args.keys, name)
    for name in missing:
        generate(args.keys, name)
    if not os.path.lexists(config.secret):
        generate_secret(config.secret)
    load_nodes(config)  # others must not be able to replace the new keys either
    write_atomically(
        out,
        _toml(config, out.parent),
        mode=0o644,  # under a loose umask, others could write to it
        replace=False,
        error=ConfigError,
        instead="name another file with --out",
    )

    warning = _warning(config)
    if args.json:
        made = [str(args.keys / f"{name}.pub") for name in missing]
        print(json.dumps({"config": str(out), "made_keys": made, "warning": warning}, indent=2))
        return 0
    print(f"Wrote {out}: {len(nodes)} {'node' if len(nodes) == 1 else 'nodes'}.")
    if warning:
        print(f"\nNote: {warning}")
    if missing:
        print("\nMade this edge's keys. Send each node's operator the one made for that node:")
        print("\n".join(f"  {args.keys / name}.pub  to the operator of {name}" for name in missing))
    where = "" if out == Path("edge.toml") else f" --config {shlex.quote(str(out))}"
    print(f"\nNext: edge-runtime nodes{where}")
    return 0


def _split(text: str) -> tuple[str, str, str]:
    from edge_common.errors import ConfigError

    name, equals, rest = text.partition("=")
    endpoint, comma, key = rest.partition(",")
    if not (name and equals and endpoint and comma and key):
        raise ConfigError(
            f"--node {text!r}: expected NAME=ENDPOINT,KEY such as "
            "alpha=tcp://alpha.example.org:5555,keys/alpha-node.pub"
        )
    return name, endpoint, key


def _public(key: str) -> str:
    """The public key in the KEY part of `--node`."""
    from edge_common.errors import KeyFileError
    from edge_runtime.config import is_key
    from transport.keys import check_public, load_public

    if is_key(key):
        return check_public(key)
    try:
        return load_public(key)
    except KeyFileError as error:
        if not os.path.lexists(key):
            error.found += "; a key itself goes in single quotes"
        raise


def _warning(config: EdgeConfig) -> str | None:
    """A warning if this number of nodes cannot meet the budget, else None."""
    import math

    from edge_common.errors import BundleError
    from edge_runtime.exposure.placement import best_share
    from engines.bundle import Bundle, shipped_bundle

    try:
        geometry = Bundle.load(config.bundle or shipped_bundle()).geometry
    except BundleError:
        return None
    side = geometry.windows_per_side
    rects = [geometry.window_rect(i) for i in range(geometry.windows)]
    areas = [(y1 - y0) * (x1 - x0) for y0, x0, y1, x1 in rects]
    share = best_share(areas, range(geometry.windows), side, len(config.nodes))
    if share is None or share <= config.max_exposure:
        return None
    count = len(config.nodes)
    return (
        f"with {count} {'node' if count == 1 else 'nodes'}, one of them sees at least "
        f"{math.ceil(share * 100)} % of a square picture, and max_exposure "
        f"{config.max_exposure:g} forbids that: pictures will be refused. Add nodes, raise "
        'max_exposure, or set fallback = "local"'
    )


def _toml(config: EdgeConfig, base: Path) -> str:
    from edge_runtime.config import DEFAULT_EXPOSURE, is_key

    def quoted(text: str) -> str:
        return json.dumps(text)

    def provider(node: NodeConfig) -> str:
        return ("" if node.provider else "# ") + f"provider = {quoted(node.party)}"

    def path(text: str) -> str:
        return quoted(os.path.relpath(text, base))

    bundle = f"bundle = {path(config.bundle)}" if config.bundle else '# bundle = "path/to/bundle"'
    head = f"""\
# Settings of this edge, read by `edge-runtime --config`. Relative paths are relative to this file.

# The full bundle this edge uses. Nodes must serve a stack cut from the same one.
# Without this line: the small model that comes with the package.
{bundle}

# The choice of windows depends on this file, so that nodes can't predict it. Keep it: with another
# secret, nodes that get the same picture again see more of it.
secret = {path(config.secret)}

# Largest share of a picture's area, and of a scene's in a video, that any one party may see. A
# party is all nodes with the same provider, see below. If your nodes can't keep it for a
# picture, the picture is refused, and the error says what would suffice. With three nodes, 0.5 is
# always possible and 0.37 for most photos.
max_exposure = {config.max_exposure:g}

# Seconds until all results of a picture must be back. With fallback = "local", nodes get half of
# them; in the other half this machine computes what they did not.
deadline_s = {config.deadline_s:g}

# What to do if a node fails, or if the budget lets no node take a window: "error" stops with a
# message; with "local" this machine computes those windows (slowly).
fallback = {quoted(config.fallback)}

# The engine on this machine: "tensorrt" (plans made by `edge-runtime build`), "cuda" or "cpu" (ONNX
# Runtime). Without this line: the first of these that works here.
# device = "auto"

# Most windows in one message. Without this line it depends on the measured times.
# windows_per_request = 4

# "offload" uses the nodes, "local" this machine alone, "auto" whichever has been faster.
# mode = "auto"

# Regions of every picture that never leave this machine: x0, y0, x1, y1 in its pixels.
# keep_local = [[0, 0, 200, 100]]

# In a video, windows that did not change are not sent again, so nodes can tell where something
# moves. This sends all windows of every frame instead.
# constant_rate = true

# Folder of the record of what each party may have seen, so that a restart does not forget it.
exposure = {path(config.exposure) if config.exposure else quoted(DEFAULT_EXPOSURE)}
"""
    tables = [
        f"""
[[nodes]]
name = {quoted(node.name)}
endpoint = {quoted(node.endpoint)}
# The node's public key, from its operator: a file, or the key itself.
server_key = {quoted(node.server_key) if is_key(node.server_key) else path(node.server_key)}
# This edge's secret key for this node alone. The node's operator must authorise its .pub file.
client_key = {path(node.client_key)}
# Who runs it. What nodes of one provider see counts together, because they may share it.
{provider(node)}
"""
        for node in config.nodes
    ]
    return head + "".join(tables)
