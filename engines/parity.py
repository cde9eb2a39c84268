"""The parity gate: checks that every engine of this machine computes what the model computes.

Engines run on the bundle's golden samples, compared with the original PyTorch model, and on random
inputs, compared with ONNX Runtime on the CPU where it can run the bundle.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import partial
from typing import Literal

import numpy as np

from edge_common.errors import BundleError, EngineError
from edge_common.text import one_line
from engines import cuda, libraries, selection
from engines import plan as plans
from engines.bundle import Bundle, Stage
from engines.dtypes import to_float32
from engines.engine import Engine, check_feeds
from engines.plan import Machine, Parity, Plan, Row
from engines.samples import Arrays, Sample, golden_samples, linked, order, random_sample

Pair = tuple[np.ndarray, np.ndarray]

END_TO_END = "end to end"
_ITSELF = "itself in other batches"
_LOGITS = "low_res_logits"


# The limits for close enough ----------------------------------------------------------------------


@dataclass(frozen=True)
class Tolerance:
    """The limits of a comparison.

    Attributes:
        cosine: least cosine similarity, of each window's tokens, of the embedding, or of each
            prompt's logits.
        error: largest absolute difference, as a share of the reference's largest absolute value.
        mask_iou: least intersection over union, both of all masks together and on average.
    """

    cosine: float
    error: float
    mask_iou: float

    @property
    def mask_iou_min(self) -> float:
        """Least intersection over union of a single mask: it may miss three times as much."""
        return 1 - 3 * (1 - self.mask_iou)


TOLERANCES: dict[str, Tolerance] = {
    "fp32": Tolerance(cosine=0.99999, error=3e-4, mask_iou=0.999),
    "fp16": Tolerance(cosine=0.999, error=0.03, mask_iou=0.97),
    "bf16": Tolerance(cosine=0.995, error=0.1, mask_iou=0.93),
}
"""By the bundle's precision."""


@dataclass(frozen=True)
class Comparison:
    """How arrays differ from a reference: the worst of all arrays, and masks if there were any.

    Attributes:
        cosine, error: as in :class:`Tolerance`.
        max_abs: largest absolute difference.
        finite: False if any value is NaN or infinite.
        mask_iou: intersection over union of all masks together.
        mask_iou_min, mask_iou_mean: over single masks; a mask that differs in at most eight pixels
            counts as equal.
    """

    cosine: float
    max_abs: float
    error: float
    finite: bool
    mask_iou: float | None = None
    mask_iou_min: float | None = None
    mask_iou_mean: float | None = None

    def misses(self, tolerance: Tolerance) -> list[str]:
        """The limits that are not kept, each in a few words; empty if all are."""
        if not self.finite:
            return ["NaN or infinity in the outputs"]
        needs = (
            ("cosine", self.cosine, ">=", tolerance.cosine),
            ("relative error", self.error, "<=", tolerance.error),
            ("mask IoU", self.mask_iou, ">=", tolerance.mask_iou),
            ("mean mask IoU", self.mask_iou_mean, ">=", tolerance.mask_iou),
            ("least mask IoU", self.mask_iou_min, ">=", tolerance.mask_iou_min),
        )
        return [
            f"{what} {value:.6g} (needed: {relation} {limit:g})"
            for what, value, relation, limit in needs
            if value is not None  # a NaN fails both comparisons
            and not (value >= limit if relation == ">=" else value <= limit)
        ]


_FEW_PIXELS = 8
"""In a low-resolution mask, rounding moves logits near the threshold to either side, and in a small
mask a pixel or two would decide the IoU. Larger errors show in the logits themselves."""


def compare(
    pairs: Sequence[Pair], masks: Sequence[Pair] = (), mask_threshold: float = 0.0
) -> Comparison:
    """Compare arrays with references.

    Args:
        pairs: (found, wanted), floats of equal shapes; the first axis counts windows or prompts.
        masks: (found, wanted), logits ``[p, 4, h, w]``.
        mask_threshold: logits above it belong to the mask.
    """
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity are expected here
        differences = [float(np.abs(got - wanted).max()) for got, wanted in pairs]
        peaks = [max(float(np.abs(wanted).max()), 1e-12) for _, wanted in pairs]
        result = Comparison(
            cosine=_least(_cosine(got, wanted) for got, wanted in pairs),
            max_abs=-_least(-difference for difference in differences),
            error=-_least(-d / peak for d, peak in zip(differences, peaks, strict=True)),
            finite=all(bool(np.isfinite(got).all()) for got, _ in pairs),
        )
    if not masks:
        return result
    counts = [_overlap(got, wanted, mask_threshold) for got, wanted in masks]
    both, either = (np.concatenate([count[i] for count in counts]) for i in (0, 1))
    each = np.where(either - both <= _FEW_PIXELS, 1.0, both / np.maximum(either, 1))
    return replace(
        result,
        mask_iou=float(both.sum() / either.sum()) if either.any() else 1.0,
        mask_iou_min=float(each.min()),
        mask_iou_mean=float(each.mean()),
    )


def _least(values: Iterator[float]) -> float:
    """The smallest, or NaN if there is one; :func:`min` may ignore a NaN."""
    return float(np.min(np.fromiter(values, np.float64)))


def _cosine(got: np.ndarray, wanted: np.ndarray) -> float:
    """Least cosine similarity over the first axis; 1 where both are zero."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (got, wanted))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    zero = lengths == 0
    dots = (a * b).sum(1) / np.where(zero, 1, lengths)
    return float(np.where(zero, (a == b).all(1), dots).min())


def _overlap(got: np.ndarray, wanted: np.ndarray, threshold: float) -> Pair:
    """Pixels in both and in either of two masks, a number for each mask."""
    a, b = (x.reshape(-1, *x.shape[-2:]) > threshold for x in (got, wanted))
    return (a & b).sum((1, 2)), (a | b).sum((1, 2))


# The gate -----------------------------------------------------------------------------------------

Status = Literal["ok", "failed", "not run"]
Kind = Literal["cpu", "cuda", "tensorrt"]
Inputs = Literal["golden", "random"]


@dataclass(frozen=True)
class Verdict:
    """The verdict on one engine and one stage, or on an engine from end to end.

    Attributes:
        engine: ONNX Runtime and its device, or the folder of the plans; for display.
        stage: its name, or ``end to end``.
        why: which limits were missed, or why it was not run. For ``end to end``, also which stages
            ran on the engine itself, if not all. Otherwise empty.
        rows: the measurements.
    """

    engine: str
    stage: str
    status: Status
    why: str = ""
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Report:
    """All verdicts, their tolerance, and the seed that draws the same inputs again."""

    verdicts: tuple[Verdict, ...]
    tolerance: Tolerance
    seed: int
    unrecorded: tuple[str, ...]
    """Why verdicts could not be written to disk, where serving would find them."""

    @property
    def passed(self) -> bool:
        """True if nothing failed."""
        return all(verdict.status != "failed" for verdict in self.verdicts)


class Watcher:
    """Callbacks of the gate; override those you need."""

    def step(self, text: str) -> None:
        """A step that may take long begins."""

    def verdict(self, verdict: Verdict) -> None:
        """An engine was measured."""


def gate(
    bundle: Bundle,
    stages: Collection[str] | None = None,
    *,
    kinds: Collection[Kind] = ("cpu", "cuda", "tensorrt"),
    random: int = 1,
    seed: int | None = None,
    threads: int | None = None,
    ordinal: int = 0,
    watcher: Watcher | None = None,
) -> Report:
    """Measure the engines of this machine and keep the verdicts beside the bundle.

    Each stage gets the reference's inputs, so that its rows measure this stage alone. Then the
    stages that passed are chained, and the masks at the end are compared. A NaN, an infinity, a
    missed limit and any exception of an engine are failures. A failure is written at once, in place
    of an older pass, so that :mod:`engines.selection` no longer uses that engine.

    Args:
        stages: which; None measures every stage of the bundle.
        kinds: which engines. ONNX Runtime on the CPU always runs, because the others are compared
            with it.
        random: number of random samples, besides the golden ones. At least 1: a pass on known
            inputs must not clear a failure on random ones.
        seed: below 2**64; None draws one. The same seed draws the same inputs.
        threads: CPU threads of ONNX Runtime.
        ordinal: which GPU TensorRT uses.
        watcher: receives progress.

    Raises:
        BundleError: the bundle lacks a stage, or a file of it is damaged.
        ValueError: fewer than one random sample was asked for.
    """
    if random < 1:
        raise ValueError(f"random is {random}, expected at least 1")
    for name in stages or ():
        bundle.stage(name)
    selected = [name for name in order(bundle) if stages is None or name in stages]
    seed = secrets.randbits(64) if seed is None else seed
    samples = golden_samples(bundle)
    for number in range(random):
        samples.append(random_sample(bundle, samples[0], np.random.default_rng([seed, number])))
    run = _Run(bundle, selected, samples, threads, watcher or Watcher())
    run.measure(_onnx(bundle, selected, "cpu", threads))
    if "cuda" in kinds and _cuda_offered():
        run.measure(_onnx(bundle, selected, "cuda", threads))
    if "tensorrt" in kinds:
        for contender in _tensorrt(bundle, selected, run.tolerance, ordinal):
            run.measure(contender)
    return Report(tuple(run.verdicts), run.tolerance, seed, tuple(run.unrecorded))


@dataclass(frozen=True)
class _Contender:
    """Engines of one kind: how to open each stage, and where to keep its verdict.

    ``may_be_absent``: an engine that cannot be opened is missing here; it did not fail.
    """

    name: str
    kind: Kind
    openers: Mapping[str, Callable[[], Engine]]
    keep: Callable[[str, bool, tuple[Row, ...]], None]
    not_run: tuple[Verdict, ...] = ()
    may_be_absent: bool = False


class _Run:
    """One pass of the gate: the samples, and the verdicts so far.

    ``stand_in``: the device of the ONNX Runtime that computes a stage for a contender without an
    engine for it, by stage.
    """

    def __init__(
        self,
        bundle: Bundle,
        selected: Sequence[str],
        samples: list[Sample],
        threads: int | None,
        watcher: Watcher,
    ) -> None:
        self.bundle = bundle
        self.samples = samples
        self.threads = threads
        self.watcher = watcher
        self.tolerance = TOLERANCES[bundle.manifest.precision]
        self.stand_in: dict[str, selection.OrtKind] = {
            name: "cpu" for name in order(bundle) if name not in selected
        }
        self.verdicts: list[Verdict] = []
        self.unrecorded: list[str] = []

    def measure(self, contender: _Contender) -> None:
        """Measure every stage of one kind of engine, then the chain of those that passed."""
        for verdict in contender.not_run:
            self._report(verdict)
        found: dict[str, Verdict] = {}
        chain = _Chain(self, contender)
        for name in order(self.bundle):
            opener = contender.openers.get(name)
            if opener is not None:
                found[name] = self._stage(contender, name, opener, chain)
                if found[name].status == "failed":  # now, before anything else can go wrong
                    self._keep(contender, name, found[name].rows)
            if name not in found or found[name].status != "ok":
                chain.fill(name)
        try:
            end = chain.verdict()
        except Exception as error:
            rows = (_no_answer(END_TO_END),)
            end = Verdict(contender.name, END_TO_END, "failed", _said(error), rows)
        if end is not None:
            self._report(end)
        for name, verdict in found.items():
            if verdict.status == "ok":
                self._keep(contender, name, verdict.rows + (end.rows if end is not None else ()))

    def _keep(self, contender: _Contender, name: str, rows: tuple[Row, ...]) -> None:
        try:
            contender.keep(name, all(row.passed for row in rows), rows)
        except Exception as error:  # the other verdicts must still be kept
            self.unrecorded.append(_said(error))

    def compared(
        self,
        stage: str,
        inputs: Inputs,
        reference: str,
        pairs: Sequence[Pair],
        masks: Sequence[Pair] = (),
    ) -> tuple[Row, list[str]]:
        """A row for the record, and the limits it misses."""
        found = compare(pairs, masks, self.bundle.manifest.mask_threshold)
        missed = found.misses(self.tolerance)
        return _row(stage, inputs, reference, found, not missed), [
            f"{inputs} inputs against {reference}: {what}" for what in missed
        ]

    def _report(self, verdict: Verdict) -> Verdict:
        self.verdicts.append(verdict)
        self.watcher.verdict(verdict)
        return verdict

    def _stage(
        self, contender: _Contender, name: str, opener: Callable[[], Engine], chain: _Chain
    ) -> Verdict:
        self.watcher.step(f"{contender.name}: {name}")
        rows: list[Row] = []
        missed: list[str] = []
        opened = False
        try:
            with opener() as engine:
                opened = True
                self._run(contender, name, engine, chain, rows, missed)
        except BundleError:
            raise  # the engine is not at fault
        except Exception as error:  # libraries may raise anything
            if not opened and contender.may_be_absent and isinstance(error, EngineError):
                return self._report(Verdict(contender.name, name, "not run", str(error)))
            missed.append(_said(error))
            rows.append(_no_answer(name))
        status: Status = "failed" if missed else "ok"
        return self._report(Verdict(contender.name, name, status, "; ".join(missed), tuple(rows)))

    def _run(
        self,
        contender: _Contender,
        name: str,
        engine: Engine,
        chain: _Chain,
        rows: list[Row],
        missed: list[str],
    ) -> None:
        """Run one opened stage on all samples; if it passes, give its outputs to the chain."""
        stage = self.bundle.stage(name)
        answers = [_ask(engine, sample.feeds(name, stage), stage) for sample in self.samples]

        def add(inputs: Inputs, reference: str, pairs: list[Pair], masks: list[Pair]) -> None:
            row, why = self.compared(name, inputs, reference, pairs, masks)
            rows.append(row)
            missed.extend(why)

        kinds: tuple[Inputs, ...] = ("golden", "random")
        for kind in kinds:
            pairs: list[Pair] = []
            masks: list[Pair] = []
            for sample, answer in zip(self.samples, answers, strict=True):
                wanted = sample.expected(name, stage)
                if sample.inputs == kind and wanted is not None:
                    reference = sample.reference[name]
                    got = _floats(answer, stage)
                    pairs += [(got[key], wanted[key]) for key in wanted]
                    if name == "decoder":
                        masks.append((got[_LOGITS], wanted[_LOGITS]))
            if pairs:
                add(kind, reference, pairs, masks)
        # Repeating golden samples on the CPU would take time and show nothing new.
        chosen = [
            (sample, answer)
            for sample, answer in zip(self.samples, answers, strict=True)
            if sample.inputs == "random" or contender.kind == "tensorrt"
        ]
        feeds = [sample.feeds(name, stage) for sample, _ in chosen]
        repeats = _repeats(engine, feeds, contender.kind, stage)
        for kind in kinds:
            pairs = []
            for (sample, answer), again in zip(chosen, repeats, strict=True):
                if sample.inputs == kind:
                    once = _floats(answer, stage)
                    # Without a repetition this only checks that outputs are finite.
                    for more in [answer, *again]:
                        pairs += [(_floats(more, stage)[key], once[key]) for key in once]
            if pairs:
                add(kind, _ITSELF, pairs, [])
        if missed:
            return
        if contender.kind != "tensorrt":
            self.stand_in.setdefault(name, contender.kind)
        chain.run(name, engine, answers)
        for sample, answer in zip(self.samples, answers, strict=True):
            if name not in sample.reference and contender.kind != "tensorrt":
                self._adopt(contender, name, sample, answer)

    def _adopt(self, contender: _Contender, name: str, sample: Sample, answer: Arrays) -> None:
        """Make the outputs of ``contender`` the reference of a random sample."""
        sample.reference[name] = contender.name
        for key, array in _floats(answer, self.bundle.stage(name)).items():
            sample.arrays[f"{name}.{key}"] = array
        following = order(self.bundle)[order(self.bundle).index(name) + 1 :][:1]
        for after in following:
            for key, array in linked(self.bundle, after, sample, answer).items():
                sample.arrays[f"{after}.{key}"] = array


class _Chain:
    """Samples on their way through the stages of one contender.

    ONNX Runtime computes stages that the contender lacks. A sample starts at the contender's first
    own stage, with the reference's inputs.
    """

    def __init__(self, run: _Run, contender: _Contender) -> None:
        self._run = run
        self._contender = contender
        self._outputs: dict[int, Arrays] = {}
        self._embeddings: dict[int, np.ndarray] = {}
        self._own: list[str] = []
        self._stopped = ""

    def run(self, name: str, engine: Engine, answers: Sequence[Arrays]) -> None:
        """Compute a stage with the contender's own engine.

        Args:
            answers: its outputs for every sample's own inputs.
        """
        done: dict[int, Arrays] = {}
        for index, sample in enumerate(self._run.samples):
            if index in self._outputs:
                feeds = linked(self._run.bundle, name, sample, self._outputs[index])
                done[index] = _ask(engine, feeds, self._run.bundle.stage(name))
            elif self._counts(sample):
                done[index] = answers[index]
        self._own.append(name)
        self._advance(name, done)

    def fill(self, name: str) -> None:
        """Compute a stage with ONNX Runtime, where the contender has no engine that passed."""
        if not self._outputs:
            return
        kind = self._run.stand_in.get(name)
        if kind is None:
            self._stop(f"no engine that passed can stand in for the {name}")
            return
        self._run.watcher.step(f"{self._contender.name}: {name}, by ONNX Runtime in its stead")
        try:
            with selection.open_onnx(
                self._run.bundle, name, device=kind, threads=self._run.threads
            ) as engine:
                done = {
                    index: _ask(
                        engine,
                        linked(self._run.bundle, name, self._run.samples[index], outputs),
                        self._run.bundle.stage(name),
                    )
                    for index, outputs in self._outputs.items()
                }
        except Exception as error:
            self._stop(_said(error))
        else:
            self._advance(name, done)

    def verdict(self) -> Verdict | None:
        """The verdict on the chain; None if no stage ran on the contender's own engines."""
        name = self._contender.name
        if self._stopped:
            return Verdict(name, END_TO_END, "not run", self._stopped)
        if not self._outputs or not self._run.bundle.has("decoder"):
            return None
        stage = self._run.bundle.stage("decoder")
        rows, missed = [], []
        kinds: tuple[Inputs, ...] = ("golden", "random")
        for kind in kinds:
            pairs: list[Pair] = []
            masks: list[Pair] = []
            for index, outputs in self._outputs.items():
                sample = self._run.samples[index]
                wanted = sample.expected("decoder", stage)
                if sample.inputs == kind and wanted is not None:
                    reference = sample.reference["decoder"]
                    got = _floats(outputs, stage)
                    pairs += [(got[key], wanted[key]) for key in wanted]
                    masks.append((got[_LOGITS], wanted[_LOGITS]))
                    if index in self._embeddings:
                        embedding = sample.arrays["decoder.embedding"]
                        pairs.append((self._embeddings[index], embedding.astype(np.float32)))
            if pairs:
                row, why = self._run.compared(END_TO_END, kind, reference, pairs, masks)
                rows.append(row)
                missed += why
        status: Status = "failed" if missed else "ok"
        if len(self._own) < len(order(self._run.bundle)):
            missed.append(f"own engines ran {' and '.join(self._own)}")
        return Verdict(name, END_TO_END, status, "; ".join(missed), tuple(rows))

    def _counts(self, sample: Sample) -> bool:
        """True if all references of this sample come from others than the contender."""
        known = [sample.reference.get(name) for name in order(self._run.bundle)]
        return None not in known and self._contender.name not in known

    def _advance(self, name: str, outputs: dict[int, Arrays]) -> None:
        self._outputs = outputs
        if name in ("tail", "encoder"):
            stage = self._run.bundle.stage(name)
            self._embeddings = {i: _floats(o, stage)["embedding"] for i, o in outputs.items()}

    def _stop(self, why: str) -> None:
        self._outputs = {}
        self._stopped = why


def _ask(engine: Engine, feeds: Arrays, stage: Stage) -> Arrays:
    """Run an engine and check its outputs' names, types and shapes against the manifest.

    Otherwise an output with one row would be broadcast wherever outputs are compared.
    """
    answer = engine.run(feeds)
    dims = check_feeds(stage.inputs, feeds)
    for spec in stage.outputs:
        array = answer.get(spec.name)
        shape = tuple(dims.get(dim, dim) if isinstance(dim, str) else dim for dim in spec.shape)
        found = "nothing" if array is None else f"{array.dtype} {array.shape}"
        if found != (expected := f"{spec.numpy_dtype} {shape}"):
            raise EngineError(f"it returned {found} for {spec.name}, expected {expected}")
    return answer


def _said(error: Exception) -> str:
    """One printable line for an exception, with its class unless it is an EngineError."""
    text = one_line(error)
    if isinstance(error, EngineError):
        return text
    return f"{type(error).__name__}{f': {text}' if text else ''}"


def _no_answer(name: str) -> Row:
    nothing = Comparison(np.nan, np.nan, np.nan, finite=True)
    return _row(name, "golden", "no answer at all", nothing, passed=False)


def _floats(answer: Arrays, stage: Stage) -> Arrays:
    return {spec.name: to_float32(answer[spec.name], spec.dtype) for spec in stage.outputs}


def _repeats(
    engine: Engine, feeds: Sequence[Arrays], kind: Kind, stage: Stage
) -> list[list[Arrays]]:
    """Outputs for each of ``feeds`` again, computed in other ways.

    The runs use two unequal parts. TensorRT's engine replays a shape as a CUDA graph from its
    fourth run on. It therefore runs three more times with rotated rows, all ``feeds`` in turn, so
    that stale outputs in memory are noticed.
    """
    rows = [spec.name for spec in engine.inputs if isinstance(spec.shape[0], str)]
    results: list[list[Arrays]] = [[] for _ in feeds]

    def turned(arrays: Arrays, by: int, names: Collection[str]) -> Arrays:
        return {k: np.roll(a, by, axis=0) if k in names else a for k, a in arrays.items()}

    for index, each in enumerate(feeds):
        if rows and len(each[rows[0]]) > 1:
            parts = [
                _ask(engine, {key: a[cut] if key in rows else a for key, a in each.items()}, stage)
                for cut in (slice(0, 1), slice(1, None))
            ]
            results[index].append(
                {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
            )
    for turn in range(1, 4) if kind == "tensorrt" else ():
        for index, each in enumerate(feeds):
            answer = _ask(engine, turned(each, turn, rows), stage)
            results[index].append(turned(answer, -turn, answer.keys()) if rows else answer)
    return results


def _row(stage: str, inputs: Inputs, reference: str, found: Comparison, passed: bool) -> Row:
    return Row(
        stage=stage,
        inputs=inputs,
        reference=reference,
        cosine=found.cosine,
        max_abs=found.max_abs,
        error=found.error,
        finite=found.finite,
        mask_iou_min=found.mask_iou_min,
        mask_iou_mean=found.mask_iou_mean,
        passed=passed,
    )


# Contenders ----------------------------------------------------------------------------------


def _cuda_offered() -> bool:
    """True if ONNX Runtime has CUDA and this machine has a GPU."""
    import onnxruntime

    offered = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    return offered and cuda.device_count() > 0


def _onnx(
    bundle: Bundle, stages: Sequence[str], device: selection.OrtKind, threads: int | None
) -> _Contender:
    engine, machine = selection.onnx_identity(device)

    def keep(name: str, passed: bool, rows: tuple[Row, ...]) -> None:
        failure = None
        if not passed:
            digest = bundle.stage(name).sha256
            failure = selection.Failure(engine, machine, digest, _now(), rows)
        selection.write_failure(bundle, name, device, failure)

    return _Contender(
        name=engine,
        kind=device,
        openers={
            name: partial(selection.open_onnx, bundle, name, device=device, threads=threads)
            for name in stages
        },
        keep=keep,
        # CUDA may lack a library here; the CPU has no bfloat16.
        may_be_absent=device == "cuda" or bundle.manifest.precision == "bf16",
    )


def _tensorrt(
    bundle: Bundle, stages: Sequence[str], tolerance: Tolerance, ordinal: int
) -> list[_Contender]:
    """A contender for every folder of plans, with the plans that fit this machine."""
    folders: dict[str, list[Plan]] = {}
    for found in plans.plans(bundle, skip_damaged=True):
        if found.record.stage in stages:
            folders.setdefault(found.record.target, []).append(found)
    return [_folder(bundle, target, each, tolerance, ordinal) for target, each in folders.items()]


def _folder(
    bundle: Bundle, target: str, found: list[Plan], tolerance: Tolerance, ordinal: int
) -> _Contender:
    openers: dict[str, Callable[[], Engine]] = {}
    here: dict[str, Plan] = {}
    not_run = []
    machine: Machine | None = None
    for plan in found:
        name = plan.record.stage
        try:
            gpu = cuda.facts(ordinal)
            library = libraries.load(plan.record.flavour)
            plans.check(plan, bundle, library, gpu.compute_capability, gpu.name)
        except EngineError as error:
            not_run.append(Verdict(target, name, "not run", str(error)))
            continue
        machine = selection.this_machine(library, gpu)
        openers[name] = partial(selection.open_plan, bundle, plan, library, ordinal=ordinal)
        here[name] = plan

    def keep(name: str, passed: bool, rows: tuple[Row, ...]) -> None:
        assert machine is not None
        limits = {**asdict(tolerance), "mask_iou_min": tolerance.mask_iou_min}
        plans.write_parity(here[name], Parity(passed, machine, rows, _now(), limits))

    return _Contender(target, "tensorrt", openers, keep, not_run=tuple(not_run))


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
