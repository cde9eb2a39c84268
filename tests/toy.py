"""A bundle of real ONNX graphs with the contract's shapes and arithmetic that numpy can repeat
(:class:`Toy`), for tests that do not depend on the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from engines.bundle import (
    Bundle,
    Manifest,
    Stage,
    TensorSpec,
    hash_file,
    stage_digest,
    write_manifest,
)
from engines.geometry import Geometry


class Toy:
    """The toy model's weights, and its stages in numpy."""

    geometry = Geometry(image_size=40, patch_size=4, window_size=4, embed_dim=8, out_chans=4)

    def __init__(self) -> None:
        rng = np.random.default_rng(7)
        g = self.geometry
        t, c, d = g.tokens_per_window, g.embed_dim, g.out_chans
        self.patch = (rng.standard_normal((3 * g.patch_size**2, c)) / 255).astype(np.float32)
        self.position = rng.standard_normal((g.windows, t, c)).astype(np.float32)
        self.absent = rng.standard_normal((g.windows, t, c)).astype(np.float32)
        self.neck = rng.standard_normal((c, d)).astype(np.float32)

    def head(self, pixels: np.ndarray, extent: np.ndarray) -> np.ndarray:
        s, p = self.geometry.window_size, self.geometry.patch_size
        patches = pixels.astype(np.float32).reshape(-1, s, p, s, p, 3).swapaxes(2, 3)
        share = extent.sum(1).astype(np.float32)[:, None, None]
        return patches.reshape(len(pixels), s * s, -1) @ self.patch + share

    def stack(self, pixels: np.ndarray, extent: np.ndarray, window: np.ndarray) -> np.ndarray:
        return self.head(pixels, extent) + self.position[window]

    def tail(self, tokens: np.ndarray, present: np.ndarray) -> np.ndarray:
        geometry = self.geometry
        n, s, g = geometry.windows_per_side, geometry.window_size, geometry.grid
        full = np.where(present[:, None, None], tokens, self.absent).reshape(n, n, s, s, -1)
        square = full.swapaxes(1, 2).reshape(n * s, n * s, -1)[:g, :g]
        return (square @ self.neck).transpose(2, 0, 1)[None]

    def decode(
        self,
        embedding: np.ndarray,
        coords: np.ndarray,
        labels: np.ndarray,
        mask: np.ndarray,
        has_mask: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        big = embedding.repeat(4, axis=2).repeat(4, axis=3)
        moved = big + coords.sum((1, 2))[:, None, None, None]
        logits = moved + mask * has_mask[:, None, None, None]
        return logits, np.broadcast_to(labels.sum(1)[:, None], (len(labels), 4))


def _toy_graphs(toy: Toy, head: bool, stock: bool) -> dict[str, tuple[list, list, list, list]]:
    """Stage -> nodes, initializers, inputs, outputs of its ONNX graph."""
    from onnx import TensorProto as T
    from onnx import helper as h
    from onnx import numpy_helper

    g = toy.geometry
    s, p, t, c, d = g.window_size, g.patch_size, g.tokens_per_window, g.embed_dim, g.out_chans
    side, w, low = g.windows_per_side, g.window_pixels, g.low_res

    def const(name: str, value: object) -> object:
        return numpy_helper.from_array(np.asarray(value), name)

    def info(name: str, dtype: int, *shape: int | str) -> object:
        return h.make_tensor_value_info(name, dtype, list(shape))

    n: int | str = g.windows if stock else "n"
    pixels = [info("pixels", T.UINT8, n, w, w, 3), info("extent", T.INT64, n, 2)]
    window = info("window", T.INT64, n)
    embed_nodes = [
        h.make_node("Cast", ["pixels"], ["float"], to=T.FLOAT),
        h.make_node("Reshape", ["float", "split"], ["patched"]),
        h.make_node("Transpose", ["patched"], ["swapped"], perm=[0, 1, 3, 2, 4, 5]),
        h.make_node("Reshape", ["swapped", "flat"], ["patches"]),
        h.make_node("MatMul", ["patches", "patch"], ["embedded"]),
        h.make_node("ReduceSum", ["extent", "one"], ["sides"], keepdims=1),
        h.make_node("Cast", ["sides"], ["sides_float"], to=T.FLOAT),
        h.make_node("Unsqueeze", ["sides_float", "one"], ["share"]),
        h.make_node("Add", ["embedded", "share"], ["hidden"]),
    ]
    embed_consts = [
        const("split", np.array([-1, s, p, s, p, 3])),
        const("flat", np.array([-1, t, 3 * p * p])),
        const("patch", toy.patch),
        const("one", np.array([1])),
    ]
    block_nodes = [
        h.make_node("Gather", ["position", "window"], ["places"]),
        h.make_node("Add", ["hidden", "places"], ["tokens"]),
    ]
    tail_nodes = [
        h.make_node("Reshape", ["present", "column"], ["present3"]),
        h.make_node("Where", ["present3", "tokens", "absent"], ["filled"]),
        h.make_node("Reshape", ["filled", "by_window"], ["grouped"]),
        h.make_node("Transpose", ["grouped"], ["by_row"], perm=[0, 2, 1, 3, 4]),
        h.make_node("Reshape", ["by_row", "square"], ["padded"]),
        h.make_node("Slice", ["padded", "start", "stop", "axes"], ["cropped"]),
        h.make_node("MatMul", ["cropped", "neck"], ["necked"]),
        h.make_node("Transpose", ["necked"], ["chw"], perm=[2, 0, 1]),
        h.make_node("Unsqueeze", ["chw", "start0"], ["embedding"]),
    ]
    tail_consts = [
        const("column", np.array([g.windows, 1, 1])),
        const("absent", toy.absent),
        const("by_window", np.array([side, side, s, s, c])),
        const("square", np.array([side * s, side * s, c])),
        const("start", np.array([0, 0])),
        const("stop", np.array([g.grid, g.grid])),
        const("axes", np.array([0, 1])),
        const("start0", np.array([0])),
        const("neck", toy.neck),
    ]
    embedding = info("embedding", T.FLOAT, 1, d, g.grid, g.grid)
    decoder = (
        [
            h.make_node(
                "Resize",
                ["embedding", "", "", "sizes"],
                ["big"],
                mode="nearest",
                nearest_mode="floor",
                coordinate_transformation_mode="asymmetric",
            ),
            h.make_node("ReduceSum", ["point_coords", "inner"], ["shift"], keepdims=1),
            h.make_node("Unsqueeze", ["shift", "third"], ["shift4"]),
            h.make_node("Add", ["big", "shift4"], ["moved"]),
            h.make_node("Reshape", ["has_mask_input", "fourfold"], ["has4"]),
            h.make_node("Mul", ["mask_input", "has4"], ["hint"]),
            h.make_node("Add", ["moved", "hint"], ["low_res_logits"]),
            h.make_node("ReduceSum", ["point_labels", "second"], ["score"], keepdims=1),
            h.make_node("Tile", ["score", "four"], ["iou"]),
        ],
        [
            const("sizes", np.array([1, d, low, low])),
            const("inner", np.array([1, 2])),
            const("third", np.array([3])),
            const("fourfold", np.array([-1, 1, 1, 1])),
            const("second", np.array([1])),
            const("four", np.array([1, 4])),
        ],
        [
            embedding,
            info("point_coords", T.FLOAT, "p", "k", 2),
            info("point_labels", T.FLOAT, "p", "k"),
            info("mask_input", T.FLOAT, "p", 1, low, low),
            info("has_mask_input", T.FLOAT, "p"),
        ],
        [info("low_res_logits", T.FLOAT, "p", 4, low, low), info("iou", T.FLOAT, "p", 4)],
    )
    position = const("position", toy.position)
    if stock:
        whole = [
            *embed_nodes,
            *block_nodes,
            h.make_node("Greater", ["sides", "nothing"], ["present"]),
            *tail_nodes,
        ]
        consts = [
            *embed_consts,
            position,
            const("window", np.arange(g.windows)),
            const("nothing", np.array([[0]])),
            *tail_consts,
        ]
        return {"encoder": (whole, consts, pixels, [embedding]), "decoder": decoder}
    hidden = info("hidden", T.FLOAT, "n", t, c)
    tokens = info("tokens", T.FLOAT, "n", t, c)
    tail_inputs = [info("tokens", T.FLOAT, g.windows, t, c), info("present", T.BOOL, g.windows)]
    graphs: dict[str, tuple[list, list, list, list]] = {}
    if head:
        # The head has no window index of its own here, but the contract feeds it one.
        index = h.make_node("Identity", ["window"], ["unused"])
        graphs["head"] = ([index, *embed_nodes], embed_consts, [*pixels, window], [hidden])
        graphs["stack"] = (block_nodes, [position], [hidden, window], [tokens])
    else:
        graphs["stack"] = (
            [*embed_nodes, *block_nodes],
            [*embed_consts, position],
            [*pixels, window],
            [tokens],
        )
    graphs["tail"] = (tail_nodes, tail_consts, tail_inputs, [embedding])
    graphs["decoder"] = decoder
    return graphs


def write_toy_bundle(directory: Path, *, head: bool = False, stock: bool = False) -> Path:
    """Write a toy bundle. As in a real one, every file differs with ``head`` and ``stock``."""
    import onnx
    from onnx import helper as h

    toy = Toy()
    directory.mkdir(parents=True)
    (directory / "golden").mkdir()
    stages = {}
    for name, (nodes, consts, inputs, outputs) in _toy_graphs(toy, head, stock).items():
        graph = h.make_graph(nodes, name, inputs, outputs, consts)
        model = h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(
            model,
            directory / f"{name}.onnx",
            save_as_external_data=True,
            location=f"{name}.onnx.data",
            size_threshold=1024,
        )
        present = [f"{name}.onnx", f"{name}.onnx.data"]
        files = {f: hash_file(directory / f) for f in present if (directory / f).exists()}
        sides = (tuple(map(_spec, inputs)), tuple(map(_spec, outputs)))
        stages[name] = Stage(f"{name}.onnx", files, stage_digest(files), *sides)
    arrays: dict[str, Any] = {
        f"{name}.{spec.name}": np.arange(3) for name in stages for spec in stages[name].outputs
    }
    np.savez(directory / "golden" / "0.npz", **arrays)
    manifest = Manifest(
        model="toy",
        geometry=toy.geometry,
        order="stock" if stock else "reordered",
        adapted=False,
        precision="fp32",
        head_blocks=0 if head else None,
        weights_sha256="0" * 64,
        stages=stages,
        golden={"golden/0.npz": hash_file(directory / "golden" / "0.npz")},
        made={"command": "tests"},
    )
    write_manifest(directory, manifest)
    return directory


def poisoned(bundle: Path, copy: Path, stage: str) -> Bundle:
    """A copy in which the weights of one stage are NaN, with updated hashes in the manifest."""
    shutil.copytree(bundle, copy)
    weights = copy / f"{stage}.onnx.data"
    weights.write_bytes(np.full(weights.stat().st_size // 4, np.nan, np.float32).tobytes())
    return _vouched(copy, stage, weights)


def _spec(value: Any) -> TensorSpec:
    from onnx import TensorProto

    tensor = value.type.tensor_type
    names: dict[int, Any] = {
        TensorProto.FLOAT: "float32",
        TensorProto.UINT8: "uint8",
        TensorProto.INT64: "int64",
        TensorProto.BOOL: "bool",
    }
    shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    return TensorSpec(value.name, names[tensor.elem_type], shape)


def slow(bundle: Path, copy: Path, stage: str) -> Bundle:
    """A copy in which one stage takes hours, all in one run of its engine."""
    import onnx
    from onnx import TensorProto
    from onnx import helper as h

    shutil.copytree(bundle, copy)
    path = copy / f"{stage}.onnx"
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    body = h.make_graph(
        [
            h.make_node("Identity", ["on"], ["go"]),
            h.make_node("Add", ["sum", "sum"], ["more"]),
        ],
        "again",
        [
            h.make_tensor_value_info("turn", TensorProto.INT64, []),
            h.make_tensor_value_info("on", TensorProto.BOOL, []),
            h.make_tensor_value_info("sum", TensorProto.FLOAT, [1]),
        ],
        [
            h.make_tensor_value_info("go", TensorProto.BOOL, []),
            h.make_tensor_value_info("more", TensorProto.FLOAT, [1]),
        ],
    )
    name = graph.output[0].name
    for node in graph.node:
        node.output[:] = ["quick" if output == name else output for output in node.output]
    graph.initializer.extend(
        [
            h.make_tensor("turns", TensorProto.INT64, [], [1 << 40]),
            h.make_tensor("yes", TensorProto.BOOL, [], [True]),
            h.make_tensor("zero", TensorProto.FLOAT, [1], [0.0]),
        ]
    )
    graph.node.append(h.make_node("Loop", ["turns", "yes", "zero"], ["nought"], body=body))
    graph.node.append(h.make_node("Add", ["quick", "nought"], [name]))
    onnx.save(model, path)
    return _vouched(copy, stage, path)


def _vouched(copy: Path, stage: str, changed: Path) -> Bundle:
    """The bundle with the new hash of a changed file in its manifest."""
    manifest = json.loads((copy / "manifest.json").read_text())
    entry = manifest["stages"][stage]
    entry["files"][changed.name] = hash_file(changed)
    entry["sha256"] = stage_digest(entry["files"])
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return Bundle.load(copy)
