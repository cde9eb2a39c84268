"""Finds out which attentions of a built plan are fused, and which kernels it runs.

TensorRT may fuse an attention (two matrix products with a softmax between) into one kernel that
never stores the logits, and does not report whether it did. An attention counts as fused only if a
known attention kernel names all of its nodes, as not fused only if every kernel that names them is
known to be another kind, and as unknown (None) otherwise.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from edge_common.text import one_line
from engines.libraries import Library
from engines.plan import AttentionReport, LayerReport

Attentions = Mapping[str, Sequence[frozenset[str]]]
"""The name of each attention → for each of its blocks of queries, the ONNX nodes at its core: one
``Attention``, or the first matrix product, the softmax and the second matrix product."""

Reports = tuple[tuple[AttentionReport, ...], tuple[LayerReport, ...]]

_NODE = "[ONNX Layer: "
# Layers allowed between a matrix product and the softmax of an attention: change of type or shape,
# scale, bias, mask.
_BEFORE_SOFTMAX = frozenset({"CAST", "IDENTITY", "SHUFFLE", "ELEMENTWISE", "UNARY", "SELECT"})
_AFTER_SOFTMAX = frozenset({"CAST", "IDENTITY", "SHUFFLE"})
_REACH = 8  # most layers between them
_BLOCK = re.compile(r"(?P<attention>.+)/block\.\d+/[^/]+")

# Names of kernels in Myelin, the compiler inside both libraries.
_ATTENTION_KERNEL = re.compile(r"(?:^|_)f?mha(?:_|$)")
_SOFTMAX_KERNEL = re.compile(r"^(?!.*Fc).*MaxrSubExp|softmax", re.IGNORECASE)  # Fc: a product
_GENERATED_KERNEL = re.compile(r"__myl_")  # element-wise, transpose, reduction, softmax
# Kinds of instructions in a plan's text, and of layers in the inspector's answer, in lower case.
_ORDINARY_KINDS = frozenset(
    {
        *("fully_connected", "runtime_fusion", "corrltn"),
        *("gemm", "matrixmultiply", "softmax", "reformat", "shuffle"),
    }
)
_PRECISIONS = {
    "half": "fp16",
    "float": "fp32",
    "bfloat16": "bf16",
    **{name: name for name in ("fp32", "fp16", "bf16", "fp8", "int8", "uint8", "int32", "int64")},
    "bool": "bool",
}
_MOST_TEXT = 200


@dataclass(frozen=True)
class _Call:
    """One kernel or layer; ``nodes`` are the names of the ONNX nodes that it computes."""

    kind: str
    kernel: str
    name: str
    nodes: frozenset[str]
    precision: str

    @property
    def is_attention(self) -> bool:
        return bool(_ATTENTION_KERNEL.search(self.kernel))

    @property
    def is_ordinary(self) -> bool:
        """True if it is known to be no attention; False if unknown."""
        known = self.kind.lower() in _ORDINARY_KINDS or _GENERATED_KERNEL.match(self.kernel)
        return bool(known) and not self.is_attention


def expected_attentions(library: Library, network: Any) -> Attentions:
    """The attentions of a parsed ``INetworkDefinition``, in its order.

    A softmax counts only between two matrix products. Blocks of queries, whose nodes are named
    ``NAME/block.INDEX/STEP``, are grouped under ``NAME``.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    kinds = [str(layer.type).rpartition(".")[2] for layer in layers]
    maker: dict[str, int] = {}
    users: dict[str, list[int]] = defaultdict(list)
    for index, layer in enumerate(layers):
        for tensor in _tensors(layer.num_outputs, layer.get_output):
            maker[tensor] = index
        for tensor in _tensors(layer.num_inputs, layer.get_input):
            users[tensor].append(index)

    def before(index: int) -> Iterable[int]:
        layer = layers[index]
        inputs = _tensors(layer.num_inputs, layer.get_input)
        return [maker[tensor] for tensor in inputs if tensor in maker]

    def after(index: int) -> Iterable[int]:
        layer = layers[index]
        outputs = _tensors(layer.num_outputs, layer.get_output)
        return [user for tensor in outputs for user in users[tensor]]

    def matmul(start: int, step: Any, through: frozenset[str]) -> int | None:
        edge = [start]
        for _ in range(_REACH):
            edge = [following for index in edge for following in step(index)]
            for index in edge:
                if kinds[index] == "MATRIX_MULTIPLY":
                    return index
            edge = [index for index in edge if kinds[index] in through]
        return None

    found: dict[str, list[frozenset[str]]] = defaultdict(list)
    for index, kind in enumerate(kinds):
        if kind in ("ATTENTION_OUTPUT", "ATTENTION"):
            name = _node(layers[index])
            found[name].append(frozenset({name}))
        elif kind == "SOFTMAX":
            first = matmul(index, before, _BEFORE_SOFTMAX)
            second = matmul(index, after, _AFTER_SOFTMAX)
            if first is None or second is None:
                continue
            name = _node(layers[index])
            block = _BLOCK.fullmatch(name)
            core = frozenset({_node(layers[first]), name, _node(layers[second])})
            found[block["attention"] if block else name].append(core)
    return {name: tuple(cores) for name, cores in found.items()}


def from_plan(plan: Any, attentions: Attentions) -> Reports:
    """Reports from the undocumented text in a plan of TensorRT-RTX; needs no GPU.

    The plan must be built with detailed verbosity.

    Args:
        plan: its bytes, or any object with the buffer interface.
        attentions: from :func:`expected_attentions`.
    """
    programs = [list(_instructions(text)) for text in _programs(memoryview(plan))]
    # Each runtime fusion has its own listing of what it fused, which must not be counted twice.
    fusions = [call for calls in programs for call in calls if call.kind == "runtime_fusion"]
    outer = [calls for calls in programs if not _is_part(calls, fusions)]
    return _reports([call for calls in outer for call in calls], attentions)


def from_inspector(text: str, attentions: Attentions) -> Reports:
    """Reports from the JSON of ``EngineInspector.get_engine_information``, which needs a GPU.

    Args:
        text: of an engine built with detailed verbosity; with anything else all is unknown.
        attentions: from :func:`expected_attentions`.
    """
    try:
        answer = msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError):
        answer = None
    layers = answer.get("Layers") if isinstance(answer, dict) else None
    calls = [_layer(layer) for layer in layers] if isinstance(layers, list) else []
    return _reports(calls, attentions)


def _is_part(calls: Sequence[_Call], fusions: Sequence[_Call]) -> bool:
    nodes = frozenset().union(*(call.nodes for call in calls))
    return any(nodes <= fusion.nodes for fusion in fusions if fusion not in calls)


def _reports(calls: Sequence[_Call], attentions: Attentions) -> Reports:
    users: dict[str, list[_Call]] = defaultdict(list)
    for call in calls:
        for node in call.nodes:
            users[node].append(call)
    reports = []
    for name, cores in attentions.items():
        verdicts = [_verdict(core, users) for core in cores]
        states = {fused for fused, _ in verdicts}
        fused = False if False in states else None if None in states or not states else True
        kernels = dict.fromkeys(kernel for state, kernel in verdicts if state is fused)
        reports.append(AttentionReport(_text(name), fused, _text("; ".join(kernels))))
    layers = (
        LayerReport(_text(call.name), _text(call.kernel or call.kind), _text(call.precision))
        for call in calls
    )
    return tuple(reports), tuple(layers)


def _verdict(core: frozenset[str], users: Mapping[str, Sequence[_Call]]) -> tuple[bool | None, str]:
    """Check that one attention kernel runs all nodes of ``core``. Also returns the kernels that run
    them."""
    touching = [call for node in sorted(core) for call in users.get(node, ())]
    for call in touching:
        if call.is_attention and core <= call.nodes:
            return True, call.kernel
    kernels = " + ".join(dict.fromkeys(call.kernel or call.kind for call in touching))
    if len(core) == 1:
        known = any(_SOFTMAX_KERNEL.search(f"{call.kernel} {call.kind}") for call in touching)
    else:
        # One kernel for all three nodes may be an attention kernel with an unknown name.
        whole = any(core <= call.nodes for call in touching)
        known = not whole and all(users.get(node) for node in core)
    if known and all(call.is_ordinary for call in touching):
        return False, kernels
    return None, kernels


# A plan of TensorRT-RTX holds a listing of every part that Myelin compiled: the tensors with their
# types and, after ``main {``, one instruction per kernel:
#
#   tensor={ ... name="val.1" ... region="devmem_topdown_2" ... type=half }
#   main {
#    label bb83654:
#     function={ name=_gemm_mha_v2 fqn=... input_args={ "a" "b" } ... output_args={ "c" } ...
#       layers="[ONNX Layer: node_attention]" ... }
#     runtime_fusion={ name=__myl_FcAdd ... layers="[ONNX Layer: node_MatMul]
#   [ONNX Layer: node_linear]" backbone=gemm }
#     fully_connected={ name="node_matmul" output={"d" } input={"c" } ... layers="..." }
#
# (seen in 1.7.1). The listing ends in a zero byte.
_MAIN = re.compile(rb"\nmain \{\n")
_WINDOW = 1 << 16
_INSTRUCTION = re.compile(r"^  (?P<kind>\w+)=\{ (?P<body>.*?) \}$", re.MULTILINE | re.DOTALL)
_TENSOR = re.compile(
    r'^  (?:sub_)?tensor=\{ .* name="(?P<name>[^"]*)".* type=(?P<type>\w+) \}$', re.M
)
_SINGLE = " dims={ 1 } "  # shapes on the host, and factors such as alpha and beta of a product
_KERNEL = re.compile(r'name="?(?P<name>[^"\s]+)')
_LAYERS = re.compile(r'layers="(?P<layers>[^"]*)"')
_INPUTS = re.compile(r"\binput(?:_args)?=\{(?P<names>[^}]*)\}")
_OUTPUTS = re.compile(r"\boutput(?:_args)?=\{(?P<names>[^}]*)\}")
_QUOTED = re.compile(r'"([^"]*)"')


def _programs(plan: memoryview) -> Iterator[str]:
    """The listings in a plan. The plan may be gigabytes large and is not copied."""
    for match in _MAIN.finditer(plan):
        start, end = match.start(), match.end()
        while start > 0:
            window = max(0, start - _WINDOW)
            zero = bytes(plan[window:start]).rfind(b"\0")
            start = window if zero < 0 else window + zero + 1
            if zero >= 0:
                break
        while end < len(plan):
            zero = bytes(plan[end : end + _WINDOW]).find(b"\0")
            end = min(end + _WINDOW, len(plan)) if zero < 0 else end + zero
            if zero >= 0:
                break
        yield bytes(plan[start:end]).decode("utf-8", errors="replace")


def _instructions(program: str) -> Iterator[_Call]:
    """The kernels of one listing. Instructions that compute shapes or wait name no ONNX node."""
    head, _, main = program.partition("\nmain {\n")
    types = {
        match["name"]: match["type"] for match in _TENSOR.finditer(head) if _SINGLE not in match[0]
    }
    for match in _INSTRUCTION.finditer(main):
        body = match["body"]
        layers, kernel = _LAYERS.search(body), _KERNEL.search(body)
        nodes = _nodes(layers["layers"]) if layers else []
        if not nodes and match["kind"] not in ("function", *_ORDINARY_KINDS):
            continue
        name = kernel["name"] if kernel else ""
        # Matrix products are named after a node, not after their kernel.
        generated = match["kind"] in ("function", "runtime_fusion")
        yield _Call(
            kind=match["kind"],
            kernel=name if generated else match["kind"],
            name=_title(nodes) or name,
            nodes=frozenset(nodes),
            precision=_precision(
                [types.get(one, "") for one in _named(_INPUTS, body)],
                [types.get(one, "") for one in _named(_OUTPUTS, body)],
            ),
        )


def _named(where: re.Pattern[str], body: str) -> list[str]:
    match = where.search(body)
    return _QUOTED.findall(match["names"]) if match else []


# The inspector's layers are objects such as (TensorRT 10; 11 splits "Format/Datatype")
#
#   {"Name": "_gemm_mha_v2_myl0_17", "LayerType": "kgen", "Inputs": [{"Name": "__mye1",
#    "Dimensions": [4, 40, 64], "Format/Datatype": "Half"}], "Outputs": [...],
#    "TacticName": "_gemm_mha_v2_0x957a2f...", "StreamId": 0,
#    "Metadata": "[ONNX Layer: attention/MatMul]\u001e[ONNX Layer: attention/Softmax]"}
#
# or, with less verbosity, mere names.
def _layer(layer: object) -> _Call:
    if not isinstance(layer, dict):
        return _Call("", "", str(layer), frozenset(), "")
    name, kind = str(layer.get("Name", "")), str(layer.get("LayerType", ""))
    tactic = str(layer.get("TacticName", "") or "")
    # Only Myelin names layers after their kernel; other layers are named after nodes.
    kernel = tactic or (name if kind == "kgen" else "")
    nodes = _nodes(str(layer.get("Metadata", "") or ""))
    return _Call(
        kind=kind,
        kernel=kernel,
        name=_title(nodes) or name,
        nodes=frozenset(nodes),
        precision=_precision(_types(layer.get("Inputs")), _types(layer.get("Outputs"))),
    )


def _types(tensors: object) -> list[str]:
    """Types of a layer's tensors: a word in ``Format/Datatype`` in 10.x, a field in 11.x."""
    found = []
    for tensor in tensors if isinstance(tensors, list) else []:
        if isinstance(tensor, dict):
            text = str(tensor.get("DataType") or tensor.get("Format/Datatype") or "")
            words = [word for word in re.split(r"\W+", text.lower()) if word in _PRECISIONS]
            found.append(words[0] if words else "")
    return found


def _precision(inputs: Iterable[str], outputs: Iterable[str]) -> str:
    """``fp16``, or ``fp16+fp32>fp32`` if a kernel's inputs have other types."""
    sides = []
    for types in (inputs, outputs):
        known = {_PRECISIONS.get(one.lower(), one) for one in types if one}
        sides.append("+".join(sorted(known)))
    return sides[1] if sides[0] in ("", sides[1]) else ">".join(sides)


def _tensors(count: int, get: Any) -> list[str]:
    tensors = (get(index) for index in range(count))
    return [tensor.name for tensor in tensors if tensor is not None]


def _node(layer: Any) -> str:
    """The ONNX node that a layer of the network belongs to."""
    nodes = _nodes(layer.metadata or "")
    return nodes[0] if nodes else layer.name


def _nodes(metadata: str) -> list[str]:
    """The names in ``[ONNX Layer: a][ONNX Layer: b]``; names may contain brackets."""
    parts = metadata.split(_NODE)[1:]
    return [part.rstrip("\x1e\x1f\r\n ").removesuffix("]") for part in parts]


def _title(nodes: Sequence[str]) -> str:
    if len(nodes) < 2:
        return "".join(nodes)
    return f"{nodes[0]} and {len(nodes) - 1} more"


def _text(text: str) -> str:
    """Text for a record: printable and short."""
    clean = one_line(text)
    return clean if len(clean) <= _MOST_TEXT else clean[: _MOST_TEXT - 1] + "…"
