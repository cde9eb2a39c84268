"""Measures exports and builds: ``python -m exporters.measure --out docs/results/export.json``.

It exports random weights with ``edge-runtime export``, builds plans with ``edge-runtime build`` if
a TensorRT library is installed, and adds time, memory, size and parity to a JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from edge_common.files import write_atomically
from engines.libraries import installed

from .models import MODELS, build_sam


def randomise(sam: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every weight that SAM initialises to a constant a random value, in place.

    Initial relative positions, position embeddings, norms and biases are zeros and ones, which
    would hide mistakes in how they are used. Values differ between kinds of devices.
    """
    device = next(sam.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, weight in sam.named_parameters():
            noise = torch.randn(weight.shape, generator=generator, device=device)
            if "rel_pos" in name or "pos_embed" in name:
                weight.copy_(0.3 * noise)
            elif "norm" in name or name.endswith("bias"):
                weight.add_(0.1 * noise)
    return sam


def random_checkpoint(model: str, path: Path) -> None:
    """Write random weights of ``model`` as a stock ``segment_anything`` checkpoint."""
    torch.manual_seed(0)
    torch.save(randomise(build_sam(model)).state_dict(), path)


def measure(model: str, precision: str, directory: Path, machine: str) -> dict[str, Any]:
    """Export random weights of ``model`` and return the measurements."""
    checkpoint, bundle = directory / f"{model}-random.pth", directory / f"{model}-{precision}"
    if not checkpoint.exists():
        making = [sys.executable, "-m", __spec__.name, "--checkpoint", str(checkpoint)]
        subprocess.run([*making, "--models", model], check=True)
    command = ["edge-runtime", "export", "--model", model, "--checkpoint", checkpoint.name]
    command += ["--out", bundle.name, "--precision", precision, "--json"]
    facts, _ = _run(command, directory)
    result = {
        "command": " ".join(command),
        "weights": "random, stock segment_anything format",
        "commit": _commit(),
        "machine": machine,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "checkpoint_bytes": checkpoint.stat().st_size,
        "bundle_bytes": sum(f.stat().st_size for f in bundle.rglob("*") if f.is_file()),
        **{k: v for k, v in facts.items() if k not in ("bundle", "next")},
    }
    if precision != "bf16":  # which ONNX Runtime does not compute on CPUs
        asking = [sys.executable, "-m", __spec__.name, "--embed", str(bundle)]
        result["embed_cpu_seconds"] = json.loads(subprocess.check_output(asking))
    if installed():
        result["build"] = measure_build(bundle, directory)
    return result


def embed(bundle: Path, rounds: int = 3) -> dict[str, float]:
    """CPU seconds of stack and tail for a square image on the CPU, the least of all rounds."""
    from engines.bundle import Bundle
    from engines.pipeline import Pipeline
    from engines.samples import synthetic_image
    from engines.windows import cut

    opened = Bundle.load(bundle)
    side = opened.geometry.image_size
    windows = cut(synthetic_image(side, side, seed=0), opened.geometry)
    found: dict[str, list[float]] = {"stack": [], "tail": []}
    with Pipeline(opened, device="cpu") as pipeline:
        for _ in range(rounds + 1):  # the first opens the engines
            began = time.process_time()
            tokens = pipeline.stack(pipeline.stack_inputs(windows))
            between = time.process_time()
            pipeline.tail(tokens, windows)
            found["stack"].append(between - began)
            found["tail"].append(time.process_time() - between)
    return {stage: round(min(seconds[1:]), 2) for stage, seconds in found.items()}


def measure_build(bundle: Path, directory: Path) -> dict[str, Any]:
    """Build every plan of ``bundle`` and return the measurements."""
    command = ["edge-runtime", "build", bundle.name, "--json"]
    facts, peak_rss = _run(command, directory)
    plans = {
        record["stage"]: {
            "form": record["form"],
            "seconds": record["build_seconds"],
            "plan_bytes": record["plan_bytes"],
            "attentions": len(record["attention"]),
            "attentions_fused": sum(a["fused"] is True for a in record["attention"]),
            "read_from": record["read_from"],
        }
        for record in facts["plans"]
    }
    some = facts["plans"][0]
    return {
        "command": " ".join(command),
        "library": f"{some['flavour']} {some['version']}",
        "gpu": some["gpu"],
        "compute_capabilities": some["compute_capabilities"],
        "peak_rss_mib": peak_rss,
        "plans": plans,
    }


def _run(command: list[str], directory: Path) -> tuple[dict[str, Any], int]:
    """Run an ``edge-runtime`` command; return the JSON it prints and its peak memory in MiB."""
    process = subprocess.Popen(
        [sys.executable, "-m", "edge_runtime.cli", *command[1:]],
        stdout=subprocess.PIPE,
        cwd=directory,
    )
    assert process.stdout
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)  # of its children too
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return json.loads(output), usage.ru_maxrss // 1024


def _commit() -> str:
    asking = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(asking, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip()


def main() -> None:
    """Measure every model and precision asked for; results are added to the file one by one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--models", nargs="+", choices=tuple(MODELS), default=["vit_b", "vit_h"])
    add("--precisions", nargs="+", choices=("fp32", "fp16", "bf16"), default=["fp32", "fp16"])
    add("--machine", default="unnamed machine", help="name of the machine in the results")
    add("--out", type=Path, help="JSON file to add to")
    add("--embed", type=Path, metavar="BUNDLE", help="only print what its encoder takes on the CPU")
    add("--checkpoint", type=Path, help="only write a random checkpoint of the model here")
    args = parser.parse_args()
    if args.checkpoint:
        random_checkpoint(args.models[0], args.checkpoint)
        return
    if args.embed:
        print(json.dumps(embed(args.embed)))
        return
    if not args.out:
        parser.error("--out, --embed or --checkpoint is needed")
    for model in args.models:
        with tempfile.TemporaryDirectory(prefix="edge-runtime-measure-") as directory:
            for precision in args.precisions:
                result = measure(model, precision, Path(directory), args.machine)
                known = json.loads(args.out.read_text()) if args.out.exists() else {}
                known[f"{model}-{precision}"] = result
                write_atomically(args.out, json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
