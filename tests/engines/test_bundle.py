from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_common.errors import BundleError, EngineError
from engines import bundle as bundle_module
from engines.bundle import (
    Bundle,
    Manifest,
    hash_file,
    node_bundle,
    stage_digest,
    write_manifest,
)
from engines.ort import OrtEngine
from engines.pipeline import Pipeline


@pytest.fixture
def bundle(toy_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(toy_bundle, tmp_path / "bundle")


def add_plain(bundle: Path, stage: str = "stack", name: str = "stack.plain.onnx") -> Path:
    """Add a plain form to a stage: a copy of its graph with the same weights."""
    shutil.copyfile(bundle / f"{stage}.onnx", bundle / f"{stage}.plain.onnx")
    form = {"file": name, "sha256": hash_file(bundle / f"{stage}.plain.onnx")}
    edit(bundle, lambda m: m["stages"][stage].update(plain=form))
    return bundle


def edit(bundle: Path, change: Callable[[Any], object]) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def refused(bundle: Path, reason: str) -> None:
    """Check that loading fails for ``reason``, in one printable line that names the bundle."""
    with pytest.raises(BundleError, match=reason) as caught:
        Bundle.load(bundle)
    assert str(caught.value).isprintable()
    assert str(bundle) in str(caught.value)


def test_a_valid_bundle_loads(toy_bundle: Path) -> None:
    loaded = Bundle.load(toy_bundle)
    assert loaded.manifest.kind == "full"
    assert loaded.geometry.windows == 9
    assert loaded.stage_path("tail") == toy_bundle / "tail.onnx"
    assert loaded.has("stack")
    assert not loaded.has("head")
    loaded.verify_hashes()


def test_a_manifest_survives_writing_and_reading(toy_bundle: Path, tmp_path: Path) -> None:
    manifest = Bundle.load(toy_bundle).manifest
    write_manifest(tmp_path, manifest)
    assert msgspec.json.decode((tmp_path / "manifest.json").read_bytes(), type=Manifest) == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    ("flags", "kind"), [({"head": True}, "full"), ({"stock": True}, "stock"), ({}, "full")]
)
def test_other_kinds_of_bundle_load(
    make_toy_bundle: Callable[..., Path], tmp_path: Path, flags: dict[str, bool], kind: str
) -> None:
    loaded = Bundle.load(make_toy_bundle(tmp_path / "b", **flags))
    assert loaded.manifest.kind == kind
    assert loaded.has("head") == bool(flags.get("head"))


def test_a_missing_stage_gives_a_remedy(toy_bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"has no encoder.*--order stock"):
        Bundle.load(toy_bundle).stage_path("encoder")


# Defects of a manifest -------------------------------------------------------------------------


def test_a_missing_directory_or_manifest_is_refused(tmp_path: Path) -> None:
    # Some commands that raise this have no option --bundle.
    refused(tmp_path / "absent", "does not exist.*made by `edge-runtime export`$")
    refused(tmp_path, "no manifest.json")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "not a directory")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"schema": "1"}',
        b'{"schema": 1}',
        b'{"schema": 1, "x":' + b"[" * 100_000,
        b'{"schema": 1e400}',
    ],
)
def test_a_garbage_manifest_is_refused(bundle: Path, text: bytes) -> None:
    (bundle / "manifest.json").write_bytes(text)
    refused(bundle, "damaged")


def test_a_huge_manifest_is_not_read(bundle: Path) -> None:
    (bundle / "manifest.json").write_bytes(b" " * (2 << 20))
    refused(bundle, "larger than")


@pytest.mark.parametrize(
    ("schema", "mend"), [(2, "a newer version of edge-runtime"), (0, "an older version .* export")]
)
def test_another_schema_gives_the_remedy(bundle: Path, schema: int, mend: str) -> None:
    # A future manifest may differ from ours in every other respect.
    (bundle / "manifest.json").write_text(json.dumps({"schema": schema, "stages": []}))
    refused(bundle, f"schema {schema}, expected 1.*{mend}")


def test_unknown_fields_within_the_schema_are_ignored(bundle: Path) -> None:
    edit(bundle, lambda m: m.update(comment="from a newer exporter"))
    Bundle.load(bundle)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(order="shuffled"),
        lambda m: m.update(precision="int4"),
        lambda m: m.update(adapted="yes"),
        lambda m: m.update(head_blocks=-1),
        lambda m: m.update(weights_sha256="0" * 63 + "\n"),
        lambda m: m.update(weights_sha256="0" * 64 + "\n"),
        lambda m: m.update(stages={}),
        lambda m: m.update(model=""),
        lambda m: m.update(model="tiny\x1b]0;title\x07"),
        lambda m: m.update(model="tiny\u202egnp"),
        lambda m: m["made"].update(command="export \u2066x"),
        lambda m: m.update(made={"command": "two\nlines"}),
        lambda m: m["stages"].update({"\x9b31m": m["stages"]["stack"]}),
        lambda m: m["stages"]["stack"]["outputs"][0].update(shape=["n\n", 16, 8]),
        lambda m: m["geometry"].update(image_size=0),
        lambda m: m["geometry"].update(image_size=1 << 40),
        lambda m: m["geometry"].update(image_size=41),
        lambda m: m["geometry"].update(window_size=11),
        lambda m: m["geometry"].update(image_size=8192, window_size=4),
        lambda m: m["geometry"].pop("patch_size"),
        lambda m: m["stages"].pop("decoder"),
        lambda m: m["stages"].update(extra=m["stages"]["stack"]),
        lambda m: m.update(order="stock"),
        lambda m: m.update(head_blocks=2),
        lambda m: m["stages"]["tail"].update(sha256="0" * 64),
        lambda m: m["stages"]["tail"].update(file="stack.onnx"),
        lambda m: m["stages"]["tail"]["files"].update({"tail.onnx": "0" * 64}),
        lambda m: m["stages"]["stack"]["inputs"].pop(),
        lambda m: m["stages"]["stack"]["inputs"].append(m["stages"]["stack"]["inputs"][0]),
        lambda m: m["stages"]["stack"]["inputs"][0].update(dtype="object"),
        lambda m: m["stages"]["stack"]["inputs"][0].update(dtype="float32"),
        lambda m: m["stages"]["stack"]["inputs"][0].update(shape=["n", 16, 17, 3]),
        lambda m: m["stages"]["stack"]["inputs"][0].update(shape=[5, 16, 16, 3]),
        lambda m: m["stages"]["stack"]["outputs"][0].update(shape=["n", 16]),
        lambda m: m["stages"]["stack"]["outputs"][0].update(shape=["n", 16, -8]),
        lambda m: m["stages"]["stack"]["outputs"][0].update(dtype="float16"),
        lambda m: m["stages"]["decoder"]["inputs"].append(
            {"name": "prompt", "dtype": "float32", "shape": []}
        ),
    ],
)
def test_each_defect_of_a_manifest_is_refused(bundle: Path, change: Callable[[Any], None]) -> None:
    edit(bundle, change)
    refused(bundle, "is damaged")


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "/etc/passwd",
        "golden/../../secret",
        "a\\b",
        "",
        ".",
        "..",
        "./stack.onnx",
        ".hidden",
        "a//b",
        "a/",
        "C:x",
        "a b",
    ],
)
@pytest.mark.parametrize("place", ["stage", "plain form", "golden"])
def test_paths_cannot_leave_the_bundle(bundle: Path, name: str, place: str) -> None:
    (bundle.parent / "secret").write_text("x")

    def change(manifest: Any) -> None:
        if place == "golden":
            manifest["golden"] = {name: "0" * 64}
            return
        if place == "plain form":
            manifest["stages"]["tail"]["plain"] = {"file": name, "sha256": "0" * 64}
            return
        stage = manifest["stages"]["stack"]
        stage["files"][name] = "0" * 64
        stage["sha256"] = stage_digest(stage["files"])

    edit(bundle, change)
    refused(bundle, "damaged" if name == "" else "plain path inside the bundle")


def test_a_link_out_of_the_bundle_is_refused(bundle: Path) -> None:
    outside = bundle.parent / "outside.onnx"
    (bundle / "stack.onnx").rename(outside)
    (bundle / "stack.onnx").symlink_to(outside)
    refused(bundle, "outside the bundle")


def test_a_bundle_may_be_reached_through_a_link(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle)
    Bundle.load(tmp_path / "link").verify_hashes()


@pytest.mark.parametrize("name", ["stack.onnx", "tail.onnx.data", "golden/0.npz"])
def test_a_missing_file_is_named(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    refused(bundle, f"{name} is missing")
    (bundle / name).mkdir()
    refused(bundle, f"{name} is missing")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_value_in_a_manifest_loads_or_gives_one_clear_line(toy_bundle: Path, data: Any) -> None:
    manifest = json.loads((toy_bundle / "manifest.json").read_text())
    node: Any = manifest
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(node[key], dict | list) or not node[key] or data.draw(st.booleans()):
            break
        node = node[key]
    node[key] = data.draw(JSON)
    text = json.dumps(manifest).encode()
    refusal: Exception | None = None
    try:
        # Same as Bundle.load, but without writing a file for each of hundreds of examples.
        decoded = msgspec.json.decode(text, type=Manifest)
        bundle_module._check_pipeline(toy_bundle, decoded)
        for name in [*bundle_module._stage_files(decoded), *decoded.golden]:
            bundle_module._check_file(toy_bundle, name)
    except (msgspec.MsgspecError, BundleError) as error:
        refusal = error
    assert "\n" not in str(refusal)


# Weights beside a graph ------------------------------------------------------------------------


def vouch(bundle: Path, stage: str, *files: str) -> None:
    """Record the current hashes of a stage's files in the manifest."""

    def change(manifest: Any) -> None:
        entry = manifest["stages"][stage]
        entry["files"].update({file: hash_file(bundle / file) for file in files})
        entry["sha256"] = stage_digest(entry["files"])

    edit(bundle, change)


def point_elsewhere(bundle: Path, graph: str, location: str) -> None:
    """Make a graph read its weights from another file."""
    model = onnx.load(bundle / graph, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (bundle / graph).write_bytes(model.SerializeToString())


@pytest.mark.parametrize("location", ["other.data", "tail.onnx.data", "./stack.onnx.data"])
def test_weights_outside_the_stage_s_files_are_refused(bundle: Path, location: str) -> None:
    shutil.copyfile(bundle / "stack.onnx.data", bundle / "other.data")
    point_elsewhere(bundle, "stack.onnx", location)
    vouch(bundle, "stack", "stack.onnx")
    reason = rf"stack\.onnx reads weights from '{location}'.*not among.*edge-runtime export"
    with pytest.raises(BundleError, match=reason):
        Bundle.load(bundle).verify_hashes(["stack"])
    with Pipeline(Bundle.load(bundle)) as pipeline, pytest.raises(BundleError, match=reason):
        pipeline.engine("stack")
    if location == "other.data":  # the manifest may list it, under any name
        vouch(bundle, "stack", location)
        Bundle.load(bundle).verify_hashes(["stack"])


def test_weights_of_a_plain_form_must_be_in_the_stage_s_files_too(bundle: Path) -> None:
    add_plain(bundle)
    shutil.copyfile(bundle / "stack.onnx.data", bundle / "other.data")
    point_elsewhere(bundle, "stack.plain.onnx", "other.data")
    form = {"file": "stack.plain.onnx", "sha256": hash_file(bundle / "stack.plain.onnx")}
    edit(bundle, lambda m: m["stages"]["stack"].update(plain=form))
    with pytest.raises(BundleError, match=r"stack\.plain\.onnx reads weights from 'other\.data'"):
        Bundle.load(bundle).verify_hashes(["stack"])


def test_weights_inside_a_node_s_subgraph_are_checked_too(bundle: Path) -> None:
    model = onnx.load(bundle / "stack.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    for entry in tensor.external_data:
        if entry.key == "location":
            entry.value = "other.data"
    model.graph.initializer.remove(tensor)
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], [tensor.name], value=tensor))
    (bundle / "stack.onnx").write_bytes(model.SerializeToString())
    vouch(bundle, "stack", "stack.onnx")
    with pytest.raises(BundleError, match=r"reads weights from 'other\.data'"):
        Bundle.load(bundle).verify_hashes()


def test_weights_named_in_an_unusual_way_are_refused(bundle: Path) -> None:
    """Protobuf allows fields in any order. Exporters write the key first."""
    usual = b"\x0a\x08location\x12\x0fstack.onnx.data"
    graph = (bundle / "stack.onnx").read_bytes()
    assert graph.count(usual) == 2
    turned = graph.replace(usual, b"\x12\x0fstack.onnx.data\x0a\x08location", 1)
    (bundle / "stack.onnx").write_bytes(turned)
    assert onnx.load(bundle / "stack.onnx").graph.initializer
    vouch(bundle, "stack", "stack.onnx")
    with pytest.raises(BundleError, match="reads weights from '', which is not among"):
        Bundle.load(bundle).verify_hashes(["stack"])


def test_an_empty_graph_is_left_to_the_engine(bundle: Path) -> None:
    (bundle / "stack.onnx").write_bytes(b"")
    vouch(bundle, "stack", "stack.onnx")
    with Pipeline(Bundle.load(bundle)) as pipeline, pytest.raises(EngineError, match="be opened"):
        pipeline.engine("stack")


# Golden samples --------------------------------------------------------------------------------


def test_golden_samples_are_hashed_like_other_files(bundle: Path) -> None:
    loaded = Bundle.load(bundle)
    assert loaded.manifest.golden == {"golden/0.npz": hash_file(bundle / "golden" / "0.npz")}
    with (bundle / "golden" / "0.npz").open("ab") as file:
        file.write(b"x")
    loaded.verify_hashes(["stack", "tail", "decoder"])
    with pytest.raises(BundleError, match=r"0\.npz is damaged: its sha256 is"):
        loaded.verify_hashes()


def test_a_bundle_without_hashes_of_its_samples_is_refused(bundle: Path) -> None:
    """Early exports wrote such bundles."""
    edit(bundle, lambda m: m.update(golden=["golden/0.npz"]))
    refused(bundle, r"damaged: Expected `object`, got `array` - at `\$\.golden`: export the bundle")


# The plain form --------------------------------------------------------------------------------


def test_a_plain_form_is_found_and_does_not_change_the_digest(bundle: Path) -> None:
    before = Bundle.load(bundle)
    with pytest.raises(BundleError, match=r"no plain form of stack.*edge-runtime export"):
        before.plain_path("stack")
    loaded = Bundle.load(add_plain(bundle))
    assert loaded.plain_path("stack") == bundle / "stack.plain.onnx"
    assert loaded.stage("stack").sha256 == before.stage("stack").sha256
    loaded.verify_hashes()
    with pytest.raises(BundleError, match="has no encoder"):
        loaded.plain_path("encoder")


def test_damage_to_a_plain_form_is_found(bundle: Path) -> None:
    loaded = Bundle.load(add_plain(bundle))
    with (bundle / "stack.plain.onnx").open("ab") as file:
        file.write(b"x")
    loaded.verify_hashes(["tail", "decoder"])
    with pytest.raises(BundleError, match=r"stack.plain.onnx is damaged"):
        loaded.verify_hashes(["stack"])


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ({"file": "stack.onnx", "sha256": "0" * 64}, "for both its forms"),
        ({"file": "stack.plain.onnx", "sha256": "0" * 63}, "damaged"),
        ({"file": "stack.plain.onnx"}, "damaged"),
        ({"file": "stack\x1b[2J", "sha256": "0" * 64}, "damaged"),
        ("stack.plain.onnx", "damaged"),
        ({"file": "absent.onnx", "sha256": "0" * 64}, "absent.onnx is missing"),
        ({"file": "golden", "sha256": "0" * 64}, "golden is missing"),
    ],
)
def test_a_bad_plain_form_is_refused(bundle: Path, form: object, reason: str) -> None:
    edit(add_plain(bundle), lambda m: m["stages"]["stack"].update(plain=form))
    refused(bundle, reason)


def test_a_plain_form_that_links_outside_is_refused(bundle: Path) -> None:
    outside = add_plain(bundle).parent / "outside.onnx"
    (bundle / "stack.plain.onnx").rename(outside)
    (bundle / "stack.plain.onnx").symlink_to(outside)
    refused(bundle, "outside the bundle")


def test_a_node_bundle_includes_the_plain_form(bundle: Path, tmp_path: Path) -> None:
    full = Bundle.load(add_plain(add_plain(bundle), "tail", "tail.plain.onnx"))
    node = node_bundle(full, tmp_path / "node")
    node.verify_hashes()
    assert node.stage("stack") == full.stage("stack")
    assert not (node.path / "tail.plain.onnx").exists()
    shutil.rmtree(bundle)
    with OrtEngine(node.plain_path("stack"), device="cpu") as engine:  # it finds its weights
        assert engine.outputs == node.stage("stack").outputs


# Hashes ----------------------------------------------------------------------------------------


def test_one_flipped_bit_is_found_and_named(bundle: Path) -> None:
    data = bytearray((bundle / "tail.onnx.data").read_bytes())
    data[100] ^= 1
    (bundle / "tail.onnx.data").write_bytes(data)
    loaded = Bundle.load(bundle)
    loaded.verify_hashes(["stack", "decoder"])
    with pytest.raises(BundleError, match=r"tail.onnx.data is damaged"):
        loaded.verify_hashes()


def test_the_digest_ignores_order_and_separates_names() -> None:
    a, b = "a" * 64, "b" * 64
    assert stage_digest({"x": a, "y": b}) == stage_digest({"y": b, "x": a})
    assert len({stage_digest(f) for f in ({"x": a, "y": b}, {"x": b, "y": a}, {"x": a})}) == 3


def test_the_digest_equals_the_documented_one() -> None:
    import hashlib

    text = b"stack.onnx\0" + b"1" * 64 + b"\nstack.onnx.data\0" + b"2" * 64 + b"\n"
    files = {"stack.onnx.data": "2" * 64, "stack.onnx": "1" * 64}
    assert stage_digest(files) == hashlib.sha256(text).hexdigest()


# The node's bundle ------------------------------------------------------------------------------


def test_a_node_bundle_holds_the_same_stack_and_nothing_else(bundle: Path, tmp_path: Path) -> None:
    full = Bundle.load(bundle)
    node_bundle(full, tmp_path / "deep" / "node")
    node = Bundle.load(tmp_path / "deep" / "node")
    node.verify_hashes()
    assert node.manifest.kind == "node"
    assert node.stage("stack") == full.stage("stack")
    found = {str(p.relative_to(node.path)) for p in node.path.rglob("*") if p.is_file()}
    assert found == {"manifest.json", "stack.onnx", "stack.onnx.data", "golden/0.npz"}
    with np.load(node.path / "golden" / "0.npz") as golden:
        assert golden.files == ["stack.tokens"]
    with pytest.raises(BundleError, match=r"node bundle and has no tail.*full bundle"):
        node.stage("tail")
    assert os.listdir(tmp_path / "deep") == ["node"]
    umask = os.umask(0)
    os.umask(umask)
    assert node.path.stat().st_mode & 0o777 == 0o777 & ~umask


def test_an_existing_output_is_kept(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "node").mkdir()
    with pytest.raises(BundleError, match=r"node exists.*--out"):
        node_bundle(Bundle.load(bundle), tmp_path / "node")
    assert not list((tmp_path / "node").iterdir())


@pytest.mark.parametrize("damage", ["hash", "golden", "golden from the start", "disk"])
def test_a_failed_cut_leaves_nothing(bundle: Path, tmp_path: Path, damage: str) -> None:
    golden = bundle / "golden" / "0.npz"
    if damage == "hash":
        (bundle / "stack.onnx").write_bytes(b"x")
    elif damage.startswith("golden"):
        golden.write_bytes(golden.read_bytes()[:100])
        if damage != "golden":
            edit(bundle, lambda m: m.update(golden={"golden/0.npz": hash_file(golden)}))
    else:
        # A file in place of the parent directory represents any disk error.
        (tmp_path / "out").touch()
    out = tmp_path / "out" / "node"
    with pytest.raises(BundleError, match=r"damaged|is a file, not a folder") as caught:
        node_bundle(Bundle.load(bundle), out)
    assert "\n" not in str(caught.value)
    assert damage != "hash" or str(caught.value).startswith(f"{bundle}/stack.onnx is damaged")
    assert not out.exists()
    assert damage == "disk" or not (tmp_path / "out").exists() or not any(out.parent.iterdir())


def test_a_stock_bundle_has_nothing_for_nodes(
    make_toy_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    stock = Bundle.load(make_toy_bundle(tmp_path / "b", stock=True))
    with pytest.raises(BundleError, match="stock bundle and has no stack"):
        node_bundle(stock, tmp_path / "node")


def test_an_unknown_shipped_bundle_gives_a_remedy() -> None:
    with pytest.raises(BundleError, match="--bundle"):
        bundle_module.shipped_bundle("int3")
