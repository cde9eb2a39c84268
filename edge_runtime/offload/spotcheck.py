"""Finds nodes that return plausible but false tokens: recomputes random windows at home.

Recomputing shows nobody anything, so it costs no exposure. ``docs/privacy.md`` says what a lie can
do to a mask before it is found.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import OrderedDict
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from edge_common.errors import ConfigError, ProtocolError
from engines.bundle import TensorSpec
from engines.dtypes import to_float32
from engines.pipeline import Arrays, Pipeline

DEFAULT_RATE = 0.04
"""Share of the windows returned by nodes that are recomputed."""
_FRAMES = 1000
"""Frames remembered per node. A node that forges 4 % of 8 windows a frame stays unfound for longer
in about 3 of a million cases."""


# How far apart two answers are --------------------------------------------------------------------


def difference(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], specs: Sequence[TensorSpec]
) -> float:
    """How far two answers for the same windows are apart: 0 is equal, 1 is as large as the tokens.

    For every token, the Euclidean length of the difference as a share of the token's own length,
    or of a tenth of the window's root mean square length if that is more. The worst token of the
    worst tensor counts, so that a lie about one token is not averaged away. Tensors that a codec
    adds count alike, by their stored values.

    Args:
        ours, theirs: the stack's outputs, each ``[n, ...]``, of equal shapes.
        specs: the stage's outputs.

    Returns:
        infinity if a number is not finite.
    """
    return max(_difference(ours[spec.name], theirs[spec.name], spec.dtype) for spec in specs)


def _difference(ours: np.ndarray, theirs: np.ndarray, dtype: str) -> float:
    a, b = (_by_token(to_float32(array, dtype)) for array in (ours, theirs))
    with np.errstate(invalid="ignore", over="ignore"):
        apart, length = (np.sqrt(np.einsum("ntc,ntc->nt", x, x)) for x in (b - a, a))
        typical = np.sqrt(np.mean(length**2, axis=1, keepdims=True))
        worst = apart / np.maximum(np.maximum(length, typical / 10), 1e-30)
    return float(worst.max()) if np.isfinite(worst).all() else math.inf


def _by_token(array: np.ndarray) -> np.ndarray:
    """``[n, t, c]``; the axes that a codec's tensor lacks have length 1."""
    if array.ndim < 3:
        return array.reshape(len(array), -1, 1)
    return array.reshape(*array.shape[:2], -1)


# How far honest answers may be apart -------------------------------------------------------------


@dataclass(frozen=True)
class Bounds:
    """The limits of a tolerance.

    Attributes:
        floor: the least, for a node that computes as the edge does, bit for bit.
        cap: the most. A node can answer the golden windows with noise of its own making, but it
            gains no more than this.
    """

    floor: float
    cap: float


BOUNDS: dict[str, Bounds] = {
    "fp32": Bounds(floor=1e-5, cap=3e-4),
    "fp16": Bounds(floor=6e-3, cap=0.02),
    "bf16": Bounds(floor=0.045, cap=0.08),
}
"""By the bundle's precision. The noisiest honest windows were 8e-7, 0.0027 and 0.019 apart
(``docs/results/forgery.json``). A floor is more than twice that, for engines that are equal on the
golden windows and not on others. A cap is at most the parity gate's limit on the error."""

_HEADROOM = 6
"""Golden windows are few. Among 10,000 others the noisiest was three times as noisy."""


class Tolerance:
    """Says which :func:`difference` is honest noise between the edge and one node.

    Args:
        specs: the stack's outputs.
        precision: of the bundle.
    """

    def __init__(self, specs: Sequence[TensorSpec], precision: str) -> None:
        self._specs = specs
        self.bounds = BOUNDS[precision]

    def calibrate(
        self, golden_reply: Mapping[str, np.ndarray], golden_ours: Mapping[str, np.ndarray]
    ) -> float:
        """The tolerance for a node, from its answer to windows that are nobody's secret.

        Such windows are those of the golden samples, or drawn for the purpose: a node cannot
        recognise the latter.

        Args:
            golden_reply: the node's, checked for structure.
            golden_ours: the edge's own for the same windows.

        Raises:
            ProtocolError: they are farther apart than noise can be.
        """
        noise = difference(golden_ours, golden_reply, self._specs)
        if not noise <= self.bounds.cap:
            raise ProtocolError(
                f"its tokens for known windows differ by {noise:.3g} from this machine's; at most "
                f"{self.bounds.cap:g} is rounding",
                mend="`edge-runtime verify` on the node and here shows which engine is wrong",
            )
        return min(max(self.bounds.floor, _HEADROOM * noise), self.bounds.cap)


# Which windows are recomputed, and the verdict ---------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What recomputing a window showed.

    Attributes:
        source: the node that returned it.
        window: its index in the square.
        ok: the difference is within the tolerance.
        difference: see :func:`difference`.
    """

    source: str
    window: int
    ok: bool
    difference: float
    tolerance: float

    def __str__(self) -> str:
        """The reason for a quarantine, or that there is none."""
        relation = "within" if self.ok else "above"
        return (
            f"{self.source}: the tokens of window {self.window} differ by {self.difference:.3g} "
            f"from those computed here, {relation} the tolerance of {self.tolerance:.3g}"
        )


class Rechecked(NamedTuple):
    """A row that was recomputed: the verdict, and this machine's tokens ``[1, ...]`` for it."""

    row: int
    verdict: Verdict
    ours: Arrays


class SpotCheck:
    """Chooses windows at random, recomputes them and compares.

    Args:
        specs: the stack's outputs.
        rate: probability with which each window that a node returned is recomputed.
        strict: recompute all of them.
        rng: random numbers that no node can predict; tests may give their own.

    Raises:
        ConfigError: the rate is not between 0 and 1.
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        rate: float = DEFAULT_RATE,
        strict: bool = False,
        rng: random.Random | None = None,
    ) -> None:
        if not 0 <= rate <= 1:
            raise ConfigError(f"the spot check's rate is {rate}, expected 0 to 1")
        self.rate = 1.0 if strict else rate
        self.strict = strict
        self._specs = specs
        self._rng = rng or random.SystemRandom()

    def choose(self, rows_by_source: Mapping[str, Iterable[int]]) -> list[int]:
        """The rows to recompute, ascending. Call it only after the answers are here.

        Args:
            rows_by_source: rows of the frame that came from each node, in this frame or, if they
                are reused, in an earlier one. Leave out rows that were recomputed before.
        """
        every = {int(row) for rows in rows_by_source.values() for row in rows}
        return [row for row in sorted(every) if self._rng.random() < self.rate]

    def verdict(
        self,
        source: str,
        window: int,
        ours: Mapping[str, np.ndarray],
        theirs: Mapping[str, np.ndarray],
        tolerance: float,
    ) -> Verdict:
        """Compare one window's outputs ``[1, ...]``.

        It also compares two nodes, which may be as far apart as both tolerances together. If they
        disagree, recompute the window to learn which of them is wrong.
        """
        found = difference(ours, theirs, self._specs)
        return Verdict(source, int(window), found <= tolerance, found, tolerance)

    async def recheck(
        self,
        pipeline: Pipeline,
        feeds: Mapping[str, np.ndarray],
        outputs: Mapping[str, np.ndarray],
        rows: Iterable[int],
        sources: Mapping[int, str],
        tolerances: Mapping[str, float],
    ) -> AsyncIterator[Rechecked]:
        """Recompute rows one at a time; the event loop is free meanwhile.

        In strict mode, await all verdicts before the tail runs. Otherwise it may run beside the
        tail or later. ``ours`` can replace false tokens, and belongs in the cache in place of the
        node's.

        Args:
            pipeline: of the full bundle.
            feeds: the stack's, as :meth:`Pipeline.stack_inputs` returns them, from the pixels that
                the tokens were computed from (:attr:`edge_runtime.offload.reuse.Reused.pixels`).
            outputs: the frame's, in the order of the feeds; not to be changed meanwhile.
            sources: row -> the node it came from.
            tolerances: node -> its tolerance.

        Raises:
            EngineError: the edge cannot compute the stack.
        """
        for row in rows:
            one = slice(row, row + 1)
            part = {name: array[one] for name, array in feeds.items()}
            ours = await asyncio.wrap_future(pipeline.submit("stack", part))
            theirs = {name: array[one] for name, array in outputs.items()}
            source, window = sources[row], int(feeds["window"][row])
            # A comparison takes milliseconds.
            verdict = await asyncio.to_thread(
                self.verdict, source, window, ours, theirs, tolerances[source]
            )
            yield Rechecked(row, verdict, ours)


def windows_until_caught(rate: float, certainty: float = 0.95) -> float:
    """False windows after which a node is found with this certainty; infinite at a rate of 0.

    The probability that none of n is recomputed is ``(1 - rate)^n``.
    """
    if not 0 < rate < 1:
        return 1 if rate else math.inf
    return math.ceil(math.log(1 - certainty) / math.log(1 - rate))


# What a late discovery puts in doubt --------------------------------------------------------------


class Trust:
    """Which frames hold windows of a node that nobody has recomputed.

    A passed check proves one window and no other: a node that lies rarely passes most checks.

    Args:
        frames: remembered per node; older ones are forgotten and counted.
    """

    def __init__(self, frames: int = _FRAMES) -> None:
        self._most = frames
        # source -> frame -> {window: frame in which its tokens were computed}
        self._unproven: dict[str, OrderedDict[int, dict[int, int]]] = {}
        self._forgotten: dict[str, int] = {}

    def accept(
        self, source: str, frame: int, windows: Collection[int], computed: int | None = None
    ) -> None:
        """Note windows of a node that went into a frame's mask.

        Args:
            computed: for reused tokens, the earlier frame in which the node computed them.
        """
        if not windows:
            return
        frames = self._unproven.setdefault(source, OrderedDict())
        of_frame = frames.setdefault(frame, {})
        of_frame.update(dict.fromkeys(windows, frame if computed is None else computed))
        while len(frames) > self._most:
            frames.popitem(last=False)
            self._forgotten[source] = self._forgotten.get(source, 0) + 1

    def prove(self, source: str, window: int, computed: int) -> None:
        """Note that tokens were recomputed and right: in this frame and all that reused them."""
        frames = self._unproven.get(source, OrderedDict())
        for frame, windows in [*frames.items()]:
            if windows.get(window) == computed:
                del windows[window]
                if not windows:
                    del frames[frame]

    def unproven(self, source: str) -> int:
        """Windows of a node in the remembered frames that nobody has recomputed."""
        return sum(map(len, self._unproven.get(source, {}).values()))

    def suspects(self, source: str) -> list[int]:
        """The remembered frames, oldest first, with unproven windows of a node."""
        return [*self._unproven.get(source, ())]

    def forgotten(self, source: str) -> int:
        """Unproven frames older than the remembered ones."""
        return self._forgotten.get(source, 0)

    def clear(self, source: str) -> None:
        """Begin anew with a node, after its suspects were reported or it was released."""
        self._unproven.pop(source, None)
        self._forgotten.pop(source, None)
