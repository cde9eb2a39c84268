"""`edge-runtime keys`: make key files, and authorise an edge on a node.

`docs/enrolment.md` describes the whole enrolment.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

DESCRIPTION = """\
Make the keys by which nodes and edges recognise each other, and authorise edges on a node.

Every node has one key pair. An edge has one key pair per node, so that nodes cannot find out that
they serve the same edge. Send only .pub files to others. The .key and .secret files are readable by
you alone (0600) and stay where they are. Existing keys are never overwritten. Keys that another
user of this machine could replace are refused."""

EPILOG = """\
on the node:
  edge-runtime keys node --dir keys
on the edge:
  edge-runtime keys edge --dir keys --node alpha --node beta
on the node, with the .pub file that the edge's owner sent:
  edge-runtime keys authorize --dir keys alpha.pub --as kitchen

`edge-runtime keys COMMAND --help` explains each. To revoke an edge, remove its file from the node's
keys/authorized. No restart is needed: a running node disconnects it within a second.
"""

_NODE_EXAMPLES = """examples:
  edge-runtime keys node                    # keys/node.key, keys/node.pub, keys/authorized/
  edge-runtime keys node --dir nodes/alpha  # for a second node on this machine
"""
_EDGE_EXAMPLES = """examples:
  edge-runtime keys edge --node alpha --node beta --node gamma
  edge-runtime keys edge --node delta       # for one more node, later
"""
_AUTHORIZE_EXAMPLES = """examples:
  edge-runtime keys authorize kitchen.pub
  edge-runtime keys authorize kitchen.pub --as kitchen-at-home --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    actions = parser.add_subparsers(dest="action", metavar="COMMAND", required=True)

    raw = argparse.RawDescriptionHelpFormatter
    node = actions.add_parser(
        "node",
        epilog=_NODE_EXAMPLES,
        formatter_class=raw,
        help="make a node's key pair and its folder of authorised edges",
        description="Make DIR/node.key (secret), DIR/node.pub and the folder DIR/authorized.",
    )
    edge = actions.add_parser(
        "edge",
        epilog=_EDGE_EXAMPLES,
        formatter_class=raw,
        help="make an edge's key pairs, one per node",
        description="Make DIR/NODE.key (secret) and DIR/NODE.pub for every node named,\n"
        "and DIR/edge.secret, which keys the placement of windows, unless it is there.",
    )
    edge.add_argument(
        "--node",
        action="append",
        required=True,
        metavar="NODE",
        help="your name for a node, as in edge.toml; repeat for several nodes",
    )
    authorize = actions.add_parser(
        "authorize",
        epilog=_AUTHORIZE_EXAMPLES,
        formatter_class=raw,
        help="let an edge use this node",
        description="Copy an edge's public key into DIR/authorized. A running node lets the edge\n"
        "in at its next attempt, without a restart.",
    )
    authorize.add_argument("file", type=Path, metavar="FILE.pub", help="the edge's public key")
    authorize.add_argument(
        "--as",
        dest="name",
        metavar="NAME",
        help="name for the edge in this node's log (default: the file's name)",
    )
    for action in (node, edge, authorize):
        action.add_argument(
            "--dir",
            type=Path,
            default=Path("keys"),
            metavar="DIR",
            help="folder of keys (default: %(default)s)",
        )
        action.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Run one of the three actions and print its report."""
    action = {"node": _node, "edge": _edge, "authorize": _authorize}[args.action]
    report, text = action(args)
    print(json.dumps(report, indent=2) if args.json else text)
    return 0


def _node(args: argparse.Namespace) -> tuple[dict[str, object], str]:
    from transport.keys import AUTHORIZED, generate, make_directory

    folder: Path = args.dir
    pair = generate(folder, "node")
    authorized = make_directory(folder / AUTHORIZED)
    quoted = shlex.quote(str(folder))
    report: dict[str, object] = {
        "public_key": pair.public,
        "secret_file": str(folder / "node.key"),
        "public_file": str(folder / "node.pub"),
        "authorized": str(authorized),
    }
    return (
        report,
        f"""\
Made {folder}/node.key (secret: it stays here), {folder}/node.pub and {authorized}/.
Public key: '{pair.public}'

Next:
  1. Send {folder}/node.pub to the owner of each edge that may use this node.
  2. Each sends back a .pub file. Let that edge in:
       edge-runtime keys authorize --dir {quoted} FILE.pub
  3. cloud-node serve --bundle BUNDLE --bind tcp://0.0.0.0:5555 --keys {quoted}""",
    )


def _edge(args: argparse.Namespace) -> tuple[dict[str, object], str]:
    from edge_common.errors import KeyFileError
    from transport.keys import check_new, generate, generate_secret

    folder: Path = args.dir
    names: list[str] = args.node
    for name in names:
        if name in ("node", "edge") or names.count(name) > 1:
            raise KeyFileError(
                f"{name!r} cannot name a node here", mend="use one distinct name per node"
            )
        check_new(folder, name)  # all of them before making the first
    pairs = [generate(folder, name) for name in names]
    secret = folder / "edge.secret"
    if not secret.exists():
        generate_secret(secret)
    report: dict[str, object] = {
        "keys": [
            {
                "node": pair.name,
                "public_key": pair.public,
                "secret_file": str(folder / f"{pair.name}.key"),
                "public_file": str(folder / f"{pair.name}.pub"),
            }
            for pair in pairs
        ],
        "placement_secret": str(secret),
    }
    sends = "\n".join(f"       {folder}/{n}.pub  to the operator of {n}" for n in names)
    nodes = " ".join(
        "--node " + shlex.quote(f"{n}=tcp://HOST:5555,{folder}/{n}-node.pub") for n in names
    )
    saves = "\n".join(f"       {folder}/{n}-node.pub" for n in names)
    return (
        report,
        f"""\
Made a key pair for each of: {", ".join(names)}.
The .key files and {secret} are secret and stay here.

Next:
  1. Send each node's operator the key made for that node, and no other:
{sends}
  2. Each operator sends you a node.pub. Save it as:
{saves}
  3. edge-runtime init {nodes}
  4. edge-runtime nodes""",
    )


def _authorize(args: argparse.Namespace) -> tuple[dict[str, object], str]:
    from edge_common.errors import KeyFileError
    from transport.allow_list import AllowList
    from transport.keys import AUTHORIZED, check_name, read_public, write_public

    folder: Path = args.dir
    public = read_public(args.file)
    own = folder / "node.pub"
    if own.exists() and read_public(own) == public:
        raise KeyFileError(
            f"{args.file} is this node's own key",
            mend="send it to the edge's owner, who sends you one made by `edge-runtime keys edge`",
        )
    name = check_name(args.name or args.file.name.removesuffix(".pub"))
    authorized = folder / AUTHORIZED
    path = authorized / f"{name}.pub"
    # The node may run as the folder's owner, and this as root.
    owner = authorized.stat().st_uid if authorized.exists() else None
    known = AllowList(authorized, owner=owner).name_of(public)
    if known is None:
        if path.exists():
            raise KeyFileError(
                f"{path} holds another edge's key", mend="choose another name with --as"
            )
        write_public(path, public, name)
    name = known or name
    report: dict[str, object] = {"name": name, "public_key": public, "already": known is not None}
    if known:
        return report, f"This key is authorised already, as {name}."
    return (
        report,
        f"""\
Authorised {name} ({path}). A running node lets it in at its next attempt.
Its key, to compare with the one that the edge's owner sees: '{public}'""",
    )
