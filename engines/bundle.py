"""The bundle: one directory with everything a deployment needs, and its manifest.

``edge-runtime export`` makes bundles; everything else reads them through :class:`Bundle`. A
manifest may come from anywhere and is not trusted.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np

from edge_common.errors import BundleError
from edge_common.files import (
    explain_write_errors,
    move_folder,
    refuse_existing,
    scratch_folder,
    write_atomically,
)
from edge_common.json_file import json_bytes, read_json
from edge_common.text import UNPRINTABLE
from engines.geometry import Geometry

SCHEMA = 1
MANIFEST = "manifest.json"
EXPORT_AGAIN = "export the bundle again with `edge-runtime export`"
COPY_AGAIN = "copy the bundle again, or export it again"
_MAX_MANIFEST_BYTES = 1 << 20
_CHUNK = 1 << 20

Dtype = Literal[
    "bool", "uint8", "int8", "uint16", "int16", "int32", "int64", "float16", "float32", "bfloat16"
]
FLOAT_TYPES: dict[str, Dtype] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""The type of tokens and matrices, by precision."""
# Text of a manifest is printed on terminals and in logs.
_PRINTABLE = rf"\A[^{UNPRINTABLE}]*\Z"
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=200, pattern=_PRINTABLE)]
Line = Annotated[str, msgspec.Meta(max_length=4096, pattern=_PRINTABLE)]
Dim = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)] | Name
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$", max_length=64)]


class TensorSpec(msgspec.Struct, frozen=True):
    """Name, type and shape of one tensor of a stage.

    ``dtype`` is numpy's name, or ``bfloat16``: numpy lacks it, so its bits are stored as uint16. A
    string in ``shape`` is a dynamic dimension.
    """

    name: Name
    dtype: Dtype
    shape: Annotated[tuple[Dim, ...], msgspec.Meta(max_length=8)]

    @property
    def numpy_dtype(self) -> np.dtype:
        """The type of the arrays that hold this tensor."""
        return np.dtype("uint16" if self.dtype == "bfloat16" else self.dtype)


Tensors = Annotated[tuple[TensorSpec, ...], msgspec.Meta(min_length=1, max_length=16)]


class PlainForm(msgspec.Struct, frozen=True):
    """A second graph of a stage, in operators that older TensorRT parsers know (10.3 on JetPack 6).

    ``file`` holds no weights: its graph reads them from the stage's other files. ``sha256`` is the
    file's.
    """

    file: Name
    sha256: Sha256


class Stage(msgspec.Struct, frozen=True):
    """One graph of a bundle.

    ``file`` is the graph that an engine opens. ``files`` maps every file of the stage, its weights
    included, to its sha256; paths are relative to the bundle. ``sha256`` is their
    :func:`stage_digest`. Edge and node identify the stage by it, whichever form they run.
    """

    file: Name
    files: Annotated[dict[Name, Sha256], msgspec.Meta(min_length=1, max_length=1024)]
    sha256: Sha256
    inputs: Tensors
    outputs: Tensors
    plain: PlainForm | None = None


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The content of ``manifest.json``.

    ``head_blocks`` is None when nodes receive pixels. ``golden`` maps the files of the golden
    samples to their sha256.
    """

    schema: int = SCHEMA
    model: Name
    geometry: Geometry
    order: Literal["reordered", "stock"]
    adapted: bool
    precision: Literal["fp32", "fp16", "bf16"]
    codec: Name = "lossless"
    head_blocks: Annotated[int, msgspec.Meta(ge=0, le=1024)] | None = None
    weights_sha256: Sha256
    stages: Annotated[dict[Name, Stage], msgspec.Meta(min_length=1, max_length=8)]
    golden: Annotated[dict[Name, Sha256], msgspec.Meta(max_length=256)] = {}
    made: dict[Name, Line] = {}
    mask_threshold: float = 0.0

    @property
    def kind(self) -> Literal["full", "stock", "node"]:
        """``full``: a reordered pipeline; ``stock``: one encoder; ``node``: the stack alone."""
        if self.order == "stock":
            return "stock"
        return "node" if self.stages.keys() == {"stack"} else "full"


class Bundle:
    """A validated bundle on disk. Make one with :meth:`load`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Bundle:
        """Read and validate the bundle in directory ``path``, without opening or hashing graphs.

        The manifest names only files that exist inside the directory, its sizes are bounded, and
        its stages form a pipeline whose tensors fit the geometry.

        Raises:
            BundleError: it is missing, damaged, hostile or of another schema.
        """
        root = Path(path)
        manifest = _read_manifest(root)
        _check_pipeline(root, manifest)
        for name in [*_stage_files(manifest), *manifest.golden]:
            _check_file(root, name)
        return cls(root, manifest)

    @property
    def geometry(self) -> Geometry:
        return self.manifest.geometry

    def has(self, stage: str) -> bool:
        """True if the bundle holds ``stage``."""
        return stage in self.manifest.stages

    def stage(self, name: str) -> Stage:
        """The stage of that name.

        Raises:
            BundleError: this bundle has none; the text says which kind of bundle has it.
        """
        stage = self.manifest.stages.get(name)
        if stage is None:
            raise BundleError(
                f"{self.path} is a {self.manifest.kind} bundle and has no {name} "
                f"(it holds {', '.join(self.manifest.stages)})",
                mend=_where_to_find(name),
            )
        return stage

    def size(self, name: str) -> int:
        """Bytes of all files of stage ``name``, not counting its plain form."""
        return sum((self.path / file).stat().st_size for file in self.stage(name).files)

    def stage_path(self, name: str) -> Path:
        """The file an engine opens for stage ``name``."""
        return self.path / self.stage(name).file

    def plain_path(self, name: str) -> Path:
        """The plain form of stage ``name``, see :class:`PlainForm`.

        Raises:
            BundleError: there is no such stage, or it has no plain form.
        """
        plain = self.stage(name).plain
        if plain is None:
            raise BundleError(
                f"{self.path} holds no plain form of {name}, which older TensorRT and fp32 build "
                "from",
                mend=EXPORT_AGAIN,
            )
        return self.path / plain.file

    def verify_hashes(self, stages: Iterable[str] | None = None) -> None:
        """Check that files have the hashes of the manifest, and graphs read weights only from them.

        Files are read in pieces, so this takes little memory.

        Args:
            stages: names of stages, checked with their plain forms; None checks all stages and
                the golden samples.

        Raises:
            BundleError: naming the first file that differs, cannot be read, or reads another file.
        """
        for name in self.manifest.stages if stages is None else stages:
            stage = self.stage(name)
            for file, expected in _files_of(stage).items():
                self._verify(file, expected)
            for graph in [stage.file] if stage.plain is None else [stage.file, stage.plain.file]:
                _check_weights(self.path, graph, stage)
        if stages is None:
            self.verify_golden()

    def verify_golden(self) -> list[Path]:
        """The files of the golden samples, after comparing their hashes with the manifest.

        Raises:
            BundleError: one differs or cannot be read.
        """
        for file, expected in self.manifest.golden.items():
            self._verify(file, expected)
        return [self.path / file for file in self.manifest.golden]

    def _verify(self, file: str, expected: str) -> None:
        try:
            found = hash_file(self.path / file)
        except OSError as error:
            raise BundleError(f"{self.path / file} cannot be read: {error.strerror}") from error
        if found != expected:
            raise BundleError(
                f"{self.path / file} is damaged: its sha256 is {found}, the manifest says "
                f"{expected}",
                mend=COPY_AGAIN,
                code="damaged",
            )


def hash_file(path: str | os.PathLike[str]) -> str:
    """Hex sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def stage_digest(files: Mapping[str, str]) -> str:
    """Hex digest of a stage: sha256 over the sorted lines ``name NUL hash LF`` of its files."""
    lines = "".join(f"{name}\0{files[name]}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def write_manifest(directory: str | os.PathLike[str], manifest: Manifest) -> None:
    """Write ``manifest.json`` into ``directory``, whole or not at all."""
    write_atomically(
        Path(directory) / MANIFEST,
        json_bytes(manifest),
        error=BundleError,
        instead="use another folder",
    )


def shipped_bundle(precision: str = "fp32") -> Path:
    """Directory of the ``tiny`` bundle that comes with the package, in ``fp32`` or ``fp16``.

    Raises:
        BundleError: this installation has no such bundle.
    """
    path = Path(__file__).parent / "bundles" / f"tiny-{precision}"
    if not (path / MANIFEST).is_file():
        raise BundleError(
            f"no {precision} bundle comes with this installation (looked for {path})",
            mend="name one with --bundle, or make one with `edge-runtime export`",
            code="missing",
        )
    return path


def node_bundle(bundle: Bundle, out: str | os.PathLike[str]) -> Bundle:
    """Make the bundle that a node needs from a full one: the stack without the other stages.

    The stack keeps its files, both forms and its digest. The golden samples keep only the stack's
    arrays. ``out`` appears whole or not at all.

    Raises:
        BundleError: ``out`` exists, the bundle has no stack, its files are damaged, or the disk
            refuses.
    """
    target = Path(out)
    stack = bundle.stage("stack")
    refuse_existing(target, BundleError, "name another directory with --out")
    bundle.verify_hashes(["stack"])
    samples = bundle.verify_golden()
    golden: dict[str, str] = {}
    manifest = msgspec.structs.replace(bundle.manifest, stages={"stack": stack}, golden=golden)
    instead = "name another folder"
    with (
        scratch_folder(target, error=BundleError, instead=instead) as temporary,
        explain_write_errors(target, BundleError, instead),
    ):
        for name in _files_of(stack):
            _make_parent(temporary, name)
            shutil.copyfile(bundle.path / name, temporary / name)
        for name, sample in zip(bundle.manifest.golden, samples, strict=True):
            _make_parent(temporary, name)
            _cut_golden(sample, temporary / name)
            golden[name] = hash_file(temporary / name)
        write_manifest(temporary, manifest)
        cut = Bundle.load(temporary)
        cut.verify_hashes()
        move_folder(temporary, target)
    return Bundle(target, manifest)


def _make_parent(root: Path, name: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)


UNREADABLE = (
    *(ValueError, EOFError, KeyError, OSError, MemoryError, SyntaxError),
    *(zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError),
)
"""Exceptions that reading a damaged ``.npz`` may raise."""


def _cut_golden(source: Path, target: Path) -> None:
    try:
        with np.load(source, allow_pickle=False) as golden:
            arrays = {name: golden[name] for name in golden.files if name.startswith("stack.")}
    except UNREADABLE as error:
        raise BundleError(f"{source} is damaged: {error}") from error
    np.savez_compressed(target, **arrays)


def _read_manifest(root: Path) -> Manifest:
    path = root / MANIFEST
    if not root.is_dir():
        what = "is not a directory" if root.exists() else "does not exist"
        raise BundleError(
            f"bundle {root} {what}",
            mend="name a directory made by `edge-runtime export`",
            code="missing",
        )
    try:
        return read_json(
            path,
            Manifest,
            max_bytes=_MAX_MANIFEST_BYTES,
            error=BundleError,
            remedy=EXPORT_AGAIN,
            schema=SCHEMA,
        )
    except FileNotFoundError:
        raise BundleError(
            f"{root} holds no {MANIFEST}, so it is no bundle",
            mend="make one with `edge-runtime export`",
            code="missing",
        ) from None


def _files_of(stage: Stage) -> dict[str, str]:
    """Every file of a stage with its sha256, the plain form included."""
    plain = {} if stage.plain is None else {stage.plain.file: stage.plain.sha256}
    return {**plain, **stage.files}


def _stage_files(manifest: Manifest) -> list[str]:
    return [name for stage in manifest.stages.values() for name in _files_of(stage)]


_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*(/[A-Za-z0-9_][A-Za-z0-9._+-]*)*")


def _check_file(root: Path, name: str) -> None:
    if not _SAFE_NAME.fullmatch(name):
        raise BundleError(
            f"{root / MANIFEST} names the file {name!r}, expected a plain path inside the bundle",
            mend="do not use this bundle unless you know where it comes from",
        )
    path = root / name
    if not path.is_file():
        raise BundleError(
            f"{path} is missing: the bundle is incomplete", mend=COPY_AGAIN, code="damaged"
        )
    if not path.resolve().is_relative_to(root.resolve()):
        raise BundleError(
            f"{path} links to {path.resolve()}, outside the bundle",
            mend="copy the file itself into it",
        )


# A graph that names a file of weights holds a StringStringEntryProto, key before value. So these
# bytes are searched for: an engine would read a file that no hash covers, and the runtime has no
# ONNX parser to find it with.
_LOCATION = re.compile(rb"\x08location(?:\x12([\x00-\x7f]))?", re.DOTALL)


def _check_weights(root: Path, graph: str, stage: Stage) -> None:
    """Refuse a graph that reads weights from a file that is not among its stage's files."""
    path = root / graph
    if not path.stat().st_size:
        return  # mmap refuses an empty file, and so does every engine
    allowed = {os.path.relpath(known, Path(graph).parent) for known in stage.files}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for found in _LOCATION.finditer(data):
            length = found[1][0] if found[1] else 0
            name = data[found.end() : found.end() + length].decode(errors="replace")
            if name not in allowed:
                raise BundleError(
                    f"{path} reads weights from {name!r}, which is not among the files of its "
                    "stage in the manifest",
                    mend=EXPORT_AGAIN,
                )


Side = dict[str, tuple[Dtype | None, tuple[int | str, ...]]]
"""Inputs or outputs of a stage: name to dtype and shape."""


def contract(stage: str, geometry: Geometry, head_blocks: int | None) -> tuple[Side, Side]:
    """Inputs and outputs of a stage, for exporters, engines and nodes alike.

    A dtype of None depends on the bundle's precision and codec.
    """
    g = geometry
    w, t, c, low = g.window_pixels, g.tokens_per_window, g.embed_dim, g.low_res
    window: Side = {"window": ("int64", ("n",))}
    pixels: Side = {"pixels": ("uint8", ("n", w, w, 3)), "extent": ("int64", ("n", 2))}
    hidden: Side = {"hidden": (None, ("n", t, c))}
    embedding: Side = {"embedding": ("float32", (1, g.out_chans, g.grid, g.grid))}
    if stage == "head":
        return pixels | window, hidden
    if stage == "stack":
        tokens: Side = {"tokens": (None, ("n", t, c))}
        return (pixels if head_blocks is None else hidden) | window, tokens
    if stage == "tail":
        return {
            "tokens": (None, (g.windows, t, c)),
            "present": ("bool", (g.windows,)),
        }, embedding
    if stage == "encoder":
        return {
            "pixels": ("uint8", (g.windows, w, w, 3)),
            "extent": ("int64", (g.windows, 2)),
        }, embedding
    return {
        **embedding,
        "point_coords": ("float32", ("p", "k", 2)),
        "point_labels": ("float32", ("p", "k")),
        "mask_input": ("float32", ("p", 1, low, low)),
        "has_mask_input": ("float32", ("p",)),
    }, {"low_res_logits": ("float32", ("p", 4, low, low)), "iou": ("float32", ("p", 4))}


def _check_pipeline(root: Path, manifest: Manifest) -> None:
    """Refuse stages that form no pipeline, or whose tensors do not fit the geometry."""
    path = root / MANIFEST
    found = set(manifest.stages)
    full = {"stack", "tail", "decoder"} | ({"head"} if manifest.head_blocks is not None else set())
    legal = [{"encoder", "decoder"}] if manifest.order == "stock" else [full, {"stack"}]
    if found not in legal:
        wanted = " or ".join("+".join(sorted(stages)) for stages in legal)
        raise BundleError(
            f"{path} is damaged: a {manifest.order} bundle with stages {'+'.join(sorted(found))}, "
            f"expected {wanted}"
        )
    for name, stage in manifest.stages.items():
        if stage.file not in stage.files:
            raise BundleError(f"{path} is damaged: stage {name} has no hash for {stage.file!r}")
        if stage.plain is not None and stage.plain.file in stage.files:
            raise BundleError(
                f"{path} is damaged: stage {name} has {stage.plain.file!r} for both its forms"
            )
        if stage.sha256 != stage_digest(stage.files):
            raise BundleError(
                f"{path} is damaged: the digest of stage {name} does not fit its files"
            )
        for side, specs, expected in zip(
            ("input", "output"),
            (stage.inputs, stage.outputs),
            contract(name, manifest.geometry, manifest.head_blocks),
            strict=True,
        ):
            defect = _tensor_defect(specs, expected)
            if defect:
                raise BundleError(f"{path} is damaged: stage {name}, {side} {defect}")
    if manifest.kind == "full":
        sent = {
            (spec.name, spec.dtype, spec.shape[1:]) for spec in manifest.stages["stack"].outputs
        }
        read = {
            (spec.name, spec.dtype, spec.shape[1:])
            for spec in manifest.stages["tail"].inputs
            if spec.name != "present"
        }
        if sent != read:
            raise BundleError(f"{path} is damaged: the tail does not read what the stack returns")


def _tensor_defect(specs: tuple[TensorSpec, ...], expected: Side) -> str | None:
    """The defects of one side of a stage. A codec may add tensors to ``tokens``."""
    by_name = {spec.name: spec for spec in specs}
    if len(by_name) != len(specs):
        return "named twice"
    missing, extra = expected.keys() - by_name.keys(), by_name.keys() - expected.keys()
    if missing:
        return f"{min(missing)} is missing"
    if extra and "tokens" not in expected:
        return f"{min(extra)} is unknown"
    for name, spec in by_name.items():
        dtype, shape = expected.get(name, (None, expected.get("tokens", (None, ()))[1][:1]))
        if dtype is not None and spec.dtype != dtype:
            return f"{name} is {spec.dtype}, expected {dtype}"
        fits = len(spec.shape) == len(shape) if name in expected else len(spec.shape) >= 1
        if not fits or not all(map(_dim_fits, spec.shape, shape)):
            return f"{name} has shape {spec.shape}, expected {shape}"
    return None


def _dim_fits(found: int | str, expected: int | str) -> bool:
    return found == expected if isinstance(expected, int) else isinstance(found, str)


def _where_to_find(stage: str) -> str:
    if stage == "encoder":
        return "use one exported with --order stock"
    if stage == "head":
        return "use one exported with --head-blocks"
    return "use the full bundle it was cut from, or export one with `edge-runtime export`"
