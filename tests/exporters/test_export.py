"""Exports through the library and the command: the files, and that failures leave none behind."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from edge_common.errors import CheckpointError, ExportError
from edge_runtime.cli import main
from engines.bundle import Bundle, hash_file, shipped_bundle
from engines.ort import OrtEngine
from engines.pipeline import Pipeline
from engines.windows import cut
from exporters import export as export_module
from exporters import plain_form, verify
from exporters.export import GOLDEN, UNADAPTED, Watcher, export
from exporters.golden import synthetic_image
from exporters.models import Checkpoint, load_checkpoint, reorder, save_checkpoint, weights_hash
from exporters.verify import TOLERANCES, Tolerance

OPERATORS = {  # TensorRT's parser supports these; it lacks OneHot, Tile, If, Loop and NonZero
    *("Add", "And", "Attention", "Cast", "Concat", "Conv", "Cos", "Div", "Equal", "Expand"),
    *("Gather", "Gelu", "Gemm", "Greater", "LayerNormalization", "Less", "MatMul", "Mul", "Pad"),
    *("Relu", "Reshape", "Shape", "Sin", "Slice", "Softmax", "Squeeze", "Sub", "Transpose"),
    *("Unsqueeze", "Where"),
}


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Path]:
    """A directory that must be empty after a failed export."""
    room = tmp_path / "room"
    room.mkdir()
    yield room
    assert list(room.iterdir()) == []


@pytest.fixture(scope="module")
def adapted(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint marked as reordered and adapted."""
    sam = reorder(load_checkpoint(random_checkpoint))
    sam.adapted = True
    path = tmp_path_factory.mktemp("adapted") / "adapted.pt"
    save_checkpoint(sam, path)
    return path


# The written files


@pytest.mark.slow
def test_manifest_content(random_bundle: Path, random_checkpoint: Path) -> None:
    bundle = Bundle.load(random_bundle)
    bundle.verify_hashes()
    manifest = bundle.manifest
    assert (manifest.model, manifest.order, manifest.precision) == ("tiny", "reordered", "fp32")
    assert manifest.head_blocks is None
    assert not manifest.adapted
    assert list(manifest.stages) == ["stack", "tail", "decoder"]
    assert manifest.weights_sha256 == weights_hash(reorder(load_checkpoint(random_checkpoint)))
    assert manifest.made["command"].startswith("edge-runtime export --model tiny --checkpoint tiny")
    assert oct(random_bundle.stat().st_mode & 0o777) == oct(0o777 & ~_umask())


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_nothing_identifies_the_machine(random_bundle: Path) -> None:
    places = [str(Path.cwd()), str(Path.home()), str(random_bundle.parent), "site-packages"]
    for file in random_bundle.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert [p for p in places if p.encode() in content] == [], file


def test_graphs_use_only_supported_operators(random_bundle: Path) -> None:
    bundle = Bundle.load(random_bundle)
    for name in bundle.manifest.stages:
        model = ir.load(bundle.stage_path(name))
        assert dict(model.opset_imports) == {"": 23}
        assert {n.op_type for n in model.graph.all_nodes()} <= OPERATORS, name
        if name != "decoder":
            fused = [n for n in model.graph if n.op_type == "Attention"]
            assert len(fused) == 4
            for node in fused:
                shapes = {tuple(v.shape or ())[-1] for v in node.inputs}
                assert len(shapes) == 1, "q, k and v have the same width"
                assert shapes.pop() % 8 == 0


def test_pixels_go_into_a_cast_and_nothing_else(random_bundle: Path) -> None:
    """TensorRT accepts uint8 nowhere else, and Jetsons will try the shipped bundles first."""
    for bundle in (random_bundle, shipped_bundle("fp32"), shipped_bundle("fp16")):
        for file in ("stack.onnx", "stack.plain.onnx"):
            graph = ir.load(bundle / file).graph
            pixels = next(value for value in graph.inputs if value.name == "pixels")
            assert [node.op_type for node, _ in pixels.uses()] == ["Cast"], file


def test_golden_sample_can_be_replayed(random_bundle: Path) -> None:
    bundle = Bundle.load(random_bundle)
    assert bundle.manifest.golden == {GOLDEN: hash_file(bundle.path / GOLDEN)}
    with np.load(random_bundle / GOLDEN, allow_pickle=False) as stored:
        assert "decoder.embedding" not in stored
        golden = {**stored, "decoder.embedding": stored["tail.embedding"]}
        for name, stage in bundle.manifest.stages.items():
            with OrtEngine(bundle.stage_path(name), threads=1, device="cpu") as engine:
                found = engine.run({s.name: golden[f"{name}.{s.name}"] for s in stage.inputs})
            for output in stage.outputs:
                wanted = golden[f"{name}.{output.name}"]
                assert float(np.abs(wanted).max()) > 0.01
                np.testing.assert_allclose(found[output.name], wanted, atol=3e-5)


def test_tokens_do_not_depend_on_batch_or_threads(random_bundle: Path) -> None:
    """Bit for bit: this makes an offloaded result equal to a local one."""
    bundle = Bundle.load(random_bundle)
    windows = cut(synthetic_image(192, 192, seed=8), bundle.geometry)
    assert len(windows) == 25
    results = []
    for threads in (1, 2):
        with Pipeline(bundle, threads=threads, device="cpu") as pipeline:
            feeds = pipeline.stack_inputs(windows)
            results += [pipeline.stack(feeds, batch)["tokens"] for batch in (None, 9, 8, 1)]
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])
    assert len(np.unique(results[0])) > 1000


@pytest.mark.parametrize(("p", "k"), [(1, 0), (1, 1), (4, 0), (5, 7)])
def test_the_decoder_accepts_any_number_of_prompts(random_bundle: Path, p: int, k: int) -> None:
    bundle = Bundle.load(random_bundle)
    g, rng = bundle.geometry, np.random.default_rng(p + k)
    with Pipeline(bundle, threads=1, device="cpu") as pipeline:
        logits, iou = pipeline.decode(
            rng.normal(size=(1, g.out_chans, g.grid, g.grid)).astype(np.float32),
            (rng.random((p, k, 2)) * g.image_size).astype(np.float32),
            rng.integers(-1, 4, (p, k)).astype(np.float32),
            np.zeros((p, 1, g.low_res, g.low_res), np.float32),
            np.zeros(p, np.float32),
        )
    assert logits.shape == (p, 4, g.low_res, g.low_res)
    assert iou.shape == (p, 4)
    assert np.isfinite(logits).all()


@pytest.mark.slow
def test_stock_order_computes_the_original_function(
    random_checkpoint: Path, tmp_path: Path
) -> None:
    result = export(random_checkpoint, tmp_path / "stock", order="stock")
    assert list(result.bundle.manifest.stages) == ["encoder", "decoder"]
    rows = ["encoder", "decoder", "encoder (plain)", "decoder (plain)", "end to end"]
    assert [row.stage for row in result.rows] == rows
    assert result.notes == ()
    image = synthetic_image(101, 192, seed=4)
    sam = load_checkpoint(random_checkpoint)
    with torch.no_grad():
        square = sam.preprocess(torch.from_numpy(image).permute(2, 0, 1)[None].float())
        wanted = sam.image_encoder(square).numpy()
    with Pipeline(result.bundle, threads=1, device="cpu") as pipeline:
        found = pipeline.embed(cut(image, result.bundle.geometry))
    np.testing.assert_allclose(found, wanted, atol=3e-5)


@pytest.mark.slow
def test_node_bundle_has_the_same_stack(
    random_checkpoint: Path,
    random_bundle: Path,
    tmp_path: Path,
    known_exports: dict[str, bytes],
) -> None:
    """Two exports give the same stack byte for byte, so edge and node agree on its hash."""
    known_exports.clear()
    node = export(random_checkpoint, tmp_path / "node", node_only=True).bundle
    assert list(node.manifest.stages) == ["stack"]
    assert node.manifest.stages["stack"] == Bundle.load(random_bundle).manifest.stages["stack"]
    with np.load(node.path / GOLDEN) as golden:
        assert {name.split(".")[0] for name in golden.files} == {"stack"}


def test_weights_lie_beside_the_graph(random_bundle: Path) -> None:
    bundle = Bundle.load(random_bundle)
    for name, stage in bundle.manifest.stages.items():
        assert sorted(stage.files) == [f"{name}.onnx", f"{name}.onnx.data"]
        assert bundle.stage_path(name).stat().st_size < 1 << 20
        values = ir.load(bundle.plain_path(name)).graph.initializers.values()
        shared = [v.const_value for v in values if isinstance(v.const_value, ir.ExternalTensor)]
        assert {tensor.location for tensor in shared} == {f"{name}.onnx.data"}
    bundle.verify_hashes()


def test_a_plain_form_outside_its_tolerance_fails(
    random_checkpoint: Path, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: Any) -> list[ir.Node]:
        nodes = right(*_)
        nodes[-1].inputs[1].const_value = ir.tensor(0.49, dtype=ir.DataType.FLOAT)
        return nodes

    right = plain_form._gelu
    monkeypatch.setattr(plain_form, "_gelu", wrong)
    with pytest.raises(ExportError, match=r"stack \(plain\) differs from the original in fp32"):
        export(random_checkpoint, room / "b", node_only=True)


@pytest.mark.slow
def test_bf16_with_a_head_is_exported(adapted: Path, tmp_path: Path) -> None:
    steps: list[str] = []
    shares: list[float] = []

    class Recorder(Watcher):
        def begin(self, steps_to_come: int, total: float) -> None:
            steps.append(str(steps_to_come))
            shares.append(total)

        def step(self, text: str, share: float) -> None:
            steps.append(text)
            shares.append(share)

    result = export(adapted, tmp_path / "b", precision="bf16", head_blocks=1, watcher=Recorder())
    manifest = result.bundle.manifest
    assert manifest.adapted
    assert manifest.head_blocks == 1
    assert list(manifest.stages) == ["head", "stack", "tail", "decoder"]
    hidden = manifest.stages["stack"].inputs[0]
    assert (hidden.name, hidden.dtype) == ("hidden", "bfloat16")
    result.bundle.verify_hashes()
    assert [row.stage for row in result.rows][-1] == "end to end"
    assert result.rows[1].max_abs > 1e-4, "the effect of rounded weights must be visible"
    assert any("float32 graphs" in note for note in result.notes)
    assert UNADAPTED not in result.notes
    assert len(steps) - 1 == int(steps[0])
    assert sum(shares[1:]) == shares[0]
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    with np.load(result.bundle.path / GOLDEN) as golden:
        assert golden["stack.hidden"].dtype == np.uint16
        assert golden["stack.tokens"].dtype == np.float32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "finished"),
    [({}, 1), ({"node_only": True}, 3), ({"order": "stock"}, 0), ({"head_blocks": 1}, 2)],
)
def test_everything_is_verified_and_nothing_large_twice(
    random_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    finished: int,
) -> None:
    """Every graph and both forms run on every sample once. PyTorch's own part takes longest."""
    runs: collections.Counter[str] = collections.Counter()
    answers: set[tuple[str, bytes]] = set()
    finishes: list[int] = []
    real_run, real_finish = OrtEngine.run, verify.finish

    def run(self: OrtEngine, feeds: Any) -> Any:
        runs[self._path.name] += 1
        key = repr(sorted((k, v.tobytes()) for k, v in feeds.items())).encode()
        answers.add((self._path.name, hashlib.sha256(key).digest()))
        return real_run(self, feeds)

    def finish(sam: Any, tokens: Any, done: int) -> Any:
        finishes.append(done)
        return real_finish(sam, tokens, done)

    monkeypatch.setattr(OrtEngine, "run", run)
    monkeypatch.setattr(verify, "finish", finish)
    result = export(random_checkpoint, tmp_path / "b", **options)
    names = list(result.bundle.manifest.stages)
    large = {"tail", "encoder"}
    for name in names:
        assert len({a for a in answers if a[0] == f"{name}.onnx"}) >= 2
        assert runs[f"{name}.plain.onnx"] == 1
        if name in large:
            assert runs[f"{name}.onnx"] == 2
    assert len(finishes) == finished
    assert all(row.passed for row in result.rows)


# The command


@pytest.mark.slow
def test_the_command_prints_parity_and_the_next_step(
    random_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fp16"
    arguments = ["--model", "tiny", "--checkpoint", str(random_checkpoint), "--out", str(out)]
    assert main(["export", *arguments, "--precision", "fp16"]) == 0
    said = capsys.readouterr()
    for word in ("stack", "tail (plain)", "decoder", "end to end", "cosine", "max abs", "mask IoU"):
        assert word in said.out
    assert "run `edge-runtime adapt`" in said.out
    assert f"next: edge-runtime build {out}" in said.out
    assert "[3/7] writing and verifying stack" in said.err
    bundle = Bundle.load(out)
    assert bundle.manifest.stages["stack"].outputs[0].dtype == "float16"
    assert main(["export", *arguments]) == 1
    said = (
        f"error: {out} exists and is never overwritten\n  -> move it away, or choose another --out"
    )
    assert capsys.readouterr().err.strip().endswith(said)


def test_the_command_with_json(
    adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "node"
    arguments = ["--checkpoint", str(adapted), "--out", str(out), "--for", "node", "--json"]
    assert main(["export", *arguments]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["adapted"] is True
    assert facts["stages"]["stack"]["sha256"] == Bundle.load(out).stage("stack").sha256
    assert [row["stage"] for row in facts["verification"]] == ["stack", "stack (plain)"]
    assert facts["stages"]["stack"]["plain"]["file"] == "stack.plain.onnx"
    assert 0 < facts["stages"]["stack"]["plain"]["bytes"] < facts["stages"]["stack"]["bytes"]
    assert facts["verification"][0]["passed"] is True
    assert facts["next"].startswith(f"cloud-node serve --bundle {out}")
    assert facts["peak_rss_mib"] > 100


@pytest.mark.process
def test_help_has_an_example_and_needs_no_torch() -> None:
    code = (
        "import sys; from edge_runtime.cli import main; main(['export', '--help']); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "edge-runtime export --model vit_b --checkpoint" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


# Refusals: one clear line and no files


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "stock", "head_blocks": 1}, "--head-blocks splits reordered bundles"),
        ({"order": "stock", "node_only": True}, "--for node needs a stack"),
        ({"head_blocks": 4}, "tiny has 4 window blocks.*give 0 to 3"),
        ({"head_blocks": -1}, "give 0 to 3"),
    ],
)
def test_contradictory_requests_are_refused(
    random_checkpoint: Path, room: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        export(random_checkpoint, room / "b", **options)


def test_adapted_weights_in_stock_order_are_refused(adapted: Path, room: Path) -> None:
    with pytest.raises(ExportError, match="reordered blocks; they make no sense in stock order"):
        export(adapted, room / "b", order="stock")


def test_a_wrong_model_or_truncated_checkpoint_is_refused(
    random_checkpoint: Path, room: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="looks like tiny, not vit_b: use --model tiny"):
        export(random_checkpoint, room / "b", model="vit_b")
    cropped = tmp_path / "cropped.pt"
    cropped.write_bytes(random_checkpoint.read_bytes()[:300_000])
    with pytest.raises(CheckpointError, match="truncated"):
        export(cropped, room / "b")
    with pytest.raises(CheckpointError, match="does not exist"):
        export(tmp_path / "none.pt", room / "b")


@pytest.mark.parametrize("kind", ["directory", "file", "dangling link"])
def test_an_existing_output_is_kept(random_checkpoint: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "b"
    if kind == "directory":
        out.mkdir()
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ExportError, match=r"exists and is never .* choose another --out"):
        export(random_checkpoint, out)
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    assert kind != "file" or out.read_text() == "mine"


def test_a_missing_parent_directory_is_refused(random_checkpoint: Path, tmp_path: Path) -> None:
    export(random_checkpoint, tmp_path / "new" / "folder" / "b", node_only=True)
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == ["b"]


def test_an_unwritable_folder_is_refused(random_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"cannot write /proc/none/b: .*choose another --out"):
        export(random_checkpoint, Path("/proc/none/b"), node_only=True)


@pytest.mark.process
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--out": "taken"}, "taken exists and is never overwritten"),
        ({"--out": "taken/b"}, "cannot write taken/b: .*taken is not a folder"),
        ({"--checkpoint": "none.pt"}, "checkpoint none.pt does not exist"),
        ({"--checkpoint": "."}, "checkpoint . is a directory"),
        ({"--checkpoint": "empty.pt"}, "checkpoint empty.pt is empty"),
    ],
)
def test_paths_are_checked_before_pytorch_is_loaded(
    tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "some.pt").write_text("x")
    options = {"--out": "b", "--checkpoint": "some.pt", **changes}
    done = without_torch(
        "export", *(word for pair in options.items() for word in pair), at=tmp_path
    )
    assert done.returncode == 1
    assert re.search(message, done.stderr), done.stderr


def without_torch(*words: str, at: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a process that can't import PyTorch."""
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:];"
        "from edge_runtime.cli import main; sys.exit(main(sys.argv))"
    )
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=at, check=False)


def test_a_checkpoint_of_the_wrong_kind_is_refused_unread(
    adapted: Path, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a large one would take minutes."""
    monkeypatch.setattr(Checkpoint, "load", lambda _: pytest.fail("the weights were read"))
    for options in ({"order": "stock"}, {"head_blocks": 9}, {"model": "vit_b"}):
        with pytest.raises((ExportError, CheckpointError)):
            export(adapted, room / "b", **options)  # type: ignore[arg-type]


def test_a_stage_outside_its_tolerance_fails(
    random_checkpoint: Path, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TOLERANCES, "fp32", Tolerance(cosine=0.9, error=1e-12, mask_iou=0.9))
    seen: list[verify.Row] = []

    class Recorder(Watcher):
        def row(self, row: verify.Row) -> None:
            seen.append(row)

    with pytest.raises(ExportError, match=r"stack differs from the original in fp32: relative err"):
        export(random_checkpoint, room / "b", watcher=Recorder())
    assert [(row.stage, row.passed) for row in seen] == [("stack", False)]


@pytest.mark.slow
def test_an_fp16_overflow_fails(random_checkpoint: Path, room: Path, tmp_path: Path) -> None:
    sam = load_checkpoint(random_checkpoint)
    with torch.no_grad():
        sam.image_encoder.blocks[2].mlp.lin2.bias.fill_(1e5)
    save_checkpoint(sam, tmp_path / "huge.pt")
    with pytest.raises(ExportError, match=r"stack gives NaN or Inf in fp16: .* --precision bf16"):
        export(tmp_path / "huge.pt", room / "b", precision="fp16", node_only=True)


def test_a_disk_too_small_is_reported_first(
    random_checkpoint: Path, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "_bytes_needed", lambda *_: 1 << 60)
    with pytest.raises(ExportError, match=r"b needs about 1,152,921,504,606.8 MB and .* choose"):
        export(random_checkpoint, room / "b")


def test_a_disk_that_fills_up_leaves_nothing(random_checkpoint: Path, room: Path) -> None:
    """A file size limit acts like a full disk: both fail in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(ExportError, match=r"cannot write .*b: .*: .*choose another --out"):
            export(random_checkpoint, room / "b", node_only=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.process
@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_export_leaves_nothing(
    random_checkpoint: Path, room: Path, stop: int, code: int
) -> None:
    command = [sys.executable, "-m", "edge_runtime.cli", "export"]
    command += ["--checkpoint", str(random_checkpoint), "--out", str(room / "b")]
    # A background test run passes on SIGINT as ignored.
    heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    assert process.stderr is not None
    for line in process.stderr:
        if "writing and verifying tail" in line:  # the stack has been written
            break
    assert list(room.glob(".b.*/bundle/stack.onnx")), (
        "there was nothing to clean up, so the test proves nothing"
    )
    process.send_signal(stop)
    time.sleep(0.2)
    process.send_signal(stop)  # a second signal must not break the clean-up
    _, rest = process.communicate(timeout=200)
    # -stop: the second signal came when all was done
    assert process.returncode in (code, -stop), rest
    assert "Traceback" not in rest
