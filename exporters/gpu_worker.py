"""A child process of the GPU benchmark: probe, check, reference, export, or one engine's rows.

:mod:`exporters.gpu` starts it as ``python -m exporters.gpu_worker``, with a JSON request on
standard input, and reads events as JSON lines from standard output. Every process makes the same
random weights from one seed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from edge_common.errors import EdgeRuntimeError
from engines import parity
from engines.geometry import Geometry
from engines.windows import cut

from . import stages, upstream
from .golden import synthetic_image
from .gpu_cases import (
    POINTS,
    Absent,
    Case,
    Loaded,
    Tensors,
    Worker,
    chosen,
    expected,
    geometry_of,
    line,
    operations,
    timed,
)
from .gpu_engines import ENGINES, ON_CPU, Kind, folded
from .precision import TORCH_DTYPES

MATMUL_SIZES = {"cuda": (4096, 8192, 16384), "cpu": (256, 512)}
PYTORCH_MEMORY = (
    "torch.cuda.max_memory_allocated over runs after loading: the stage's weights, inputs, outputs "
    "and activations"
)
FREE_MEMORY = (
    "least cudaMemGetInfo free memory while loading, warming up and running, against before; "
    "sampled every 2 ms, and of the whole device, so that other processes count"
)


def probe(worker: Worker) -> None:
    """Emit facts about the machine: the GPU and all versions; no host name."""
    machine: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu_cores": os.cpu_count(),
        "torch": str(torch.__version__),
    }
    for package in ("numpy", "onnx", "onnxscript", "onnx_ir", "triton", "segment_anything"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            machine[package] = importlib.metadata.version(package)
    if not worker.on_gpu:
        worker.emit("machine", machine={"gpu": None, **machine})
        return
    if not torch.cuda.is_available():
        why = "PyTorch sees no GPU"
        try:
            torch.cuda.init()
        except Exception as error:
            why = line(error)
        worker.emit("no gpu", why=why)
        return
    from engines.cuda import facts

    properties = torch.cuda.get_device_properties(0)
    driver = None
    with contextlib.suppress(EdgeRuntimeError):
        driver = facts().driver
    worker.emit(
        "machine",
        machine={
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "integrated": bool(getattr(properties, "is_integrated", False)),
            "driver": driver,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            **machine,
        },
    )


def check(worker: Worker) -> None:
    """Emit the version of the request's engine, or raise Absent."""
    worker.emit("engine", version=ENGINES[worker.request["engine"]].version(worker))


def rates(worker: Worker) -> None:
    """Emit the rate of dense square matrix products of random values."""
    for precision in worker.request["precisions"]:
        dtype = TORCH_DTYPES[precision]
        for size in MATMUL_SIZES[worker.device.type]:
            try:
                a, b = (torch.randn(size, size, device=worker.device, dtype=dtype) for _ in "ab")
                out = torch.empty_like(a)
                times = timed(worker, Loaded(partial(torch.mm, a, b, out=out), dict), 0.5)[0]
            except torch.OutOfMemoryError:
                continue
            finally:
                a = b = out = None  # type: ignore[assignment]
                worker.tidy()
            median = statistics.median(times)
            worker.emit(
                "rate",
                rate={
                    "precision": precision,
                    "size": size,
                    "runs": len(times),
                    "median_ms": median,
                    "tflops": 2 * size**3 / median / 1e9,
                },
            )


def reference(worker: Worker) -> None:
    """Store the outputs of upstream's modules for one image and some prompts, in float32."""
    sam = worker.sam()
    geometry = stages.geometry_of(sam)
    image = synthetic_image(geometry.image_size, geometry.image_size, seed=0)
    windows = cut(image, geometry)
    most = max(count for stage, count in worker.request["cases"] if stage == "decoder")
    generator = torch.Generator().manual_seed(1)
    coords = torch.rand(most, POINTS, 2, generator=generator) * geometry.image_size
    coords[:, -1] = 0
    labels = torch.tensor([1.0] * (POINTS - 1) + [-1.0]).expand(most, -1).contiguous()
    with torch.no_grad(), worker.device:
        square = torch.from_numpy(image).permute(2, 0, 1)[None].contiguous()
        grid = upstream.UpstreamStack(sam)(square.to(worker.device))
        embedding = upstream.UpstreamTail(sam)(grid)
        # In parts, because upstream's decoder repeats the image for every prompt.
        decode = upstream.UpstreamDecoder(sam)
        answers = [
            decode(embedding, c.to(worker.device), label.to(worker.device))
            for c, label in zip(coords.split(4), labels.split(4), strict=True)
        ]
    content = {
        "image": square,
        "pixels": torch.from_numpy(windows.pixels),
        "extent": torch.from_numpy(windows.extent),
        "window": torch.from_numpy(windows.window),
        "tokens": stages.to_windows(grid[0], geometry),
        "embedding": embedding,
        "coords": coords,
        "labels": labels,
        "low_res_logits": torch.cat([logits for logits, _ in answers]),
        "iou": torch.cat([iou for _, iou in answers]),
    }
    if not all(bool(torch.isfinite(t).all()) for t in content.values()):
        raise RuntimeError("upstream's modules give NaN or Inf in float32")
    content = {name: tensor.contiguous().cpu() for name, tensor in content.items()}
    torch.save(content, worker.directory / f"{worker.model}-reference.pt")


def export(worker: Worker) -> None:
    """Write the bundle (stack, tail and decoder, both forms). It is not verified: every row is."""
    from engines.bundle import Bundle, Manifest, write_manifest

    from .models import weights_hash
    from .onnx_export import stage_specs, write_stage
    from .plain_form import write_plain

    geometry, written, digest = None, {}, ""
    work = worker.bundle.with_name(worker.bundle.name + ".partial")
    work.mkdir()
    for name in ("stack", "tail", "decoder"):
        sam = worker.sam()
        geometry = stages.geometry_of(sam)
        digest = digest or weights_hash(sam)
        del sam
        module = folded(worker, Case(name, 1)).cpu()
        worker.tidy()
        inputs, made = stage_specs(name, geometry, worker.precision)  # type: ignore[arg-type]
        stage = write_stage(name, module, inputs, made, work)
        written[name] = write_plain(stage, work, geometry.windows)
    assert geometry is not None
    manifest = Manifest(
        model=worker.model,
        geometry=geometry,
        order="reordered",
        adapted=False,
        precision=worker.precision,  # type: ignore[arg-type]
        weights_sha256=digest,
        stages=written,
        made={
            "command": "python -m exporters.gpu (random weights)",
            "torch": str(torch.__version__),
        },
    )
    write_manifest(work, manifest)
    Bundle.load(work)
    work.rename(worker.bundle)


def engine(worker: Worker) -> None:
    """Emit a row for each case, then its mask IoU, which needs other stages' weights."""
    kind = ENGINES[worker.request["engine"]]
    version = kind.version(worker)
    known = worker.reference()
    geometry = geometry_of(worker.model)
    got: dict[Case, Tensors] = {}
    for case in (Case(*case) for case in worker.request["cases"]):
        row: dict[str, Any] = {"stage": case.stage, **case.size, "engine_version": version}
        if time.monotonic() > worker.deadline:
            worker.emit("row", row={**row, "status": "not run: the time was up; --resume goes on"})
            continue
        worker.emit("begin", row=row)
        try:
            kind.prepare(worker, case)
            with _least_free(worker) as least:
                got[case] = _measure(worker, kind, case, known, geometry, row, least)
        except Absent as absent:
            row["status"] = f"absent: {absent}"
        except Exception as error:
            traceback.print_exc()
            row["status"] = f"failed: {line(error)}"
        row["time"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        worker.emit("row", row=row)
        worker.tidy()
    _mask_ious(worker, got, known, geometry)


def _measure(
    worker: Worker,
    kind: Kind,
    case: Case,
    known: Tensors,
    geometry: Geometry,
    row: dict[str, Any],
    least: Callable[[], int | None],
) -> Tensors:
    loaded = kind.open(worker, case, known, geometry)
    try:
        of_pytorch = not kind.graphs
        worker.wait()
        if worker.on_gpu and of_pytorch:
            torch.cuda.reset_peak_memory_stats()
        loaded.run()
        worker.wait()
        row["peak_bytes"], row["peak_method"] = None, ON_CPU
        if worker.on_gpu and of_pytorch:
            row["peak_bytes"] = torch.cuda.max_memory_allocated()
            row["peak_method"] = PYTORCH_MEMORY
            row["weights_bytes"] = loaded.weights_bytes
        if worker.on_gpu and kind.capture:
            capture(worker, loaded)
        times, warm_ups = timed(worker, loaded, worker.request["row_seconds"])
        if worker.on_gpu and not of_pytorch:
            row["peak_bytes"], row["peak_method"] = least(), FREE_MEMORY
        loaded.run()  # compare what was timed, even a captured graph
        worker.wait()
        result = {name: t.float().cpu() for name, t in loaded.read().items()}
    finally:
        loaded.close()
    count = operations(worker, case, geometry)
    median = statistics.median(times)
    row.update(
        status="ok",
        timing="CUDA events" if worker.on_gpu else "wall clock (rehearsal)",
        runs=len(times),
        warm_ups=warm_ups,
        median_ms=median,
        p95_ms=float(np.percentile(times, 95)),
        tflop=count / 1e12,
        tflops=count / median / 1e9,
        parity={
            "reference": "segment_anything's modules, float32, same device",
            **compare(result, expected(case, known, geometry)),
            "tolerance": asdict(parity.TOLERANCES[worker.precision]),
        },
        notes=loaded.notes,
    )
    return result


def capture(worker: Worker, loaded: Loaded) -> None:
    """Replay ``loaded`` as one CUDA graph from now on, or note why not."""
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loaded.run()
        worker.wait()
    except Exception as error:
        loaded.notes["cuda_graph"] = f"no: {line(error)}"
        torch.cuda.synchronize()
    else:
        loaded.run = graph.replay
        loaded.notes["cuda_graph"] = "yes"


def compare(got: Tensors, wanted: Tensors) -> dict[str, Any]:
    """How ``got`` differs from the reference, as :func:`engines.parity.compare` measures it."""
    found = parity.compare([(got[name].numpy(), array.numpy()) for name, array in wanted.items()])
    if not found.finite:
        return {"finite": False}
    return {name: getattr(found, name) for name in ("finite", "cosine", "max_abs", "error")}


@torch.no_grad()
def _mask_ious(
    worker: Worker, got: Mapping[Case, Tensors], known: Tensors, geometry: Geometry
) -> None:
    """Emit the mask IoU of each case: upstream's modules continue from its outputs in float32."""
    tail: nn.Module | None = None
    decode: nn.Module | None = None
    for case, result in got.items():
        if case.stage == "decoder":
            logits = result["low_res_logits"]
        else:
            if tail is None or decode is None:
                sam = worker.sam()
                tail, decode = upstream.UpstreamTail(sam), upstream.UpstreamDecoder(sam)
                del sam
                worker.tidy()
            embedding = result.get("embedding")
            if embedding is None:
                tokens = known["tokens"].clone()
                tokens[chosen(geometry, case.count)] = result["tokens"]
                grid = stages.from_windows(tokens, geometry)[None]
                embedding = tail(grid.to(worker.device))
            parts = zip(known["coords"].split(4), known["labels"].split(4), strict=True)
            logits = torch.cat(
                [
                    decode(*(t.to(worker.device) for t in (embedding, *part)))[0].cpu()
                    for part in parts
                ]
            )
        a, b = logits > 0, known["low_res_logits"][: len(logits)] > 0
        either = int((a | b).sum())
        iou = int((a & b).sum()) / either if either else None
        worker.emit("masks", stage=case.stage, **case.size, mask_iou=iou)


@contextlib.contextmanager
def _least_free(worker: Worker) -> Iterator[Callable[[], int | None]]:
    """Watch the device's free memory; the function returns by how much it fell at most."""
    if not worker.on_gpu:
        yield lambda: None
        return
    worker.tidy()
    start = torch.cuda.mem_get_info()[0]
    least, over = [start], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            least[0] = min(least[0], torch.cuda.mem_get_info()[0])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: start - least[0]
    finally:
        over.set()
        thread.join()


TASKS: dict[str, Callable[[Worker], None]] = {
    "probe": probe,
    "check": check,
    "rates": rates,
    "reference": reference,
    "export": export,
    "engine": engine,
}


def main() -> int:
    """Run the task of the request on standard input; other output goes to standard error."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    worker = Worker(json.load(sys.stdin), out)
    try:
        TASKS[worker.request["task"]](worker)
    except Absent as absent:
        worker.emit("absent", why=str(absent))
    except Exception as error:
        traceback.print_exc()
        worker.emit("failed", why=line(error))
        return 1
    worker.emit("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
