"""The loss of a batch in parts that exchange intermediate results: rows spread over processes, or references in blocks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ._ddtas import Context
from .functional import DEFAULTS, Identity, Labels, Matrix, ThresholdGradient, _check_settings
from .settings import Settings

Similarities = npt.NDArray[np.float32]
Counts = npt.NDArray[np.integer]


class SameClass(NamedTuple):
    """Result of `Part.same_class`."""

    min_pos: npt.NDArray[np.float32]
    """m+, `[b]`: smallest similarity of each anchor to a positive; inf without one."""
    total_pos: int
    """Number of ordered positive pairs."""
    total_neg: int
    """Number of ordered negative pairs."""
    mean_pos: float
    """Mean similarity of the positive pairs; NaN if there is none."""
    mean_neg: float
    """Mean similarity of the negative pairs; NaN if there is none."""


class Sweep(NamedTuple):
    """Result of `Part.sweep`."""

    max_neg: npt.NDArray[np.float32]
    """m-, `[b]`: largest similarity of each anchor to a negative; -inf without one."""
    probe_neg: int
    """Number of negatives that passed the probe."""


class Selection(NamedTuple):
    """Result of `Part.select`."""

    count_pos: npt.NDArray[np.uint32]
    """`[b]`: number of mined positives of each anchor."""
    count_neg: npt.NDArray[np.uint32]
    """`[b]`: number of mined negatives of each anchor."""
    gamma_pos: float
    """Tolerance of positives, adapted to the whole batch."""
    gamma_neg: float
    """Tolerance of negatives, adapted to the whole batch."""


class PartLoss(NamedTuple):
    """Result of `Part.gradient`."""

    loss: float
    """The part's share of the loss: the loss of the batch is the sum over its parts."""
    gradient: npt.NDArray[np.float32]
    """`[b, D]`: dL/d(embeddings) of the part's anchors, with L the loss of the whole batch."""
    active: int
    """Number of the part's anchors that enter the loss."""
    dloss_dlambda_pos: float
    """The part's share of dL/d(lambda_pos)."""
    dloss_dlambda_neg: float
    """The part's share of dL/d(lambda_neg)."""


class Part:
    """Some of a batch's `total` anchors, and the four steps of their loss: `same_class`, `sweep`, `select`, `gradient`.

    `embeddings` `[b, D]` (b may be 0) are compared with `references` `[N, D]` of the same type: float32, float16 or bfloat16. The
    references are all anchors of the batch, in the same order for every part, followed by rows that are not anchors, if there
    are any. `identity` says which references the part's anchors are, as in `ddtas.loss`. For the gradient of references that are no
    anchors, both sides change places (docs/parts.md, "The gradient of references").

    Between the steps the caller exchanges results between the parts (docs/parts.md). A step takes them as two arrays: `[b]` for
    the part's own anchors, combined over all their pairs, and `reference_...` `[n]` for the first n references, the anchors of
    all parts. References after the first n do not mine pairs themselves; None is for n = 0.

    A part computes in a context of its own, or in the given one. Any other computation in that context between the first step
    and the last makes the next step raise RuntimeError. Every method raises what `ddtas.loss` does. On the CPU the values and
    the gradient of each row are bit for bit those of the whole batch, however it is split.
    """

    def __init__(
        self,
        embeddings: Matrix,
        labels: Labels,
        references: Matrix,
        reference_labels: Labels,
        *,
        total: int,
        identity: Identity | None = None,
        settings: Settings = DEFAULTS,
        check: bool = True,
        context: Context | None = None,
    ) -> None:
        _check_settings(settings)
        self.embeddings, self.labels = embeddings, labels
        self.references, self.reference_labels = references, reference_labels
        self.total, self.identity, self.settings, self.check = total, identity, settings, check
        self.context = context or Context()

    def same_class(self) -> SameClass:
        """First step: m+ of the anchors, and the numbers and mean similarities of pairs."""
        return SameClass(*self.context.same_class(self))

    def sweep(self, min_pos: Similarities, reference_min_pos: Similarities | None = None) -> Sweep:
        """Second step, from m+ of anchors and references: m- of the anchors, and the probe's count."""
        return Sweep(*self.context.sweep(self, min_pos, reference_min_pos))

    def select(
        self, max_neg: Similarities, reference_max_neg: Similarities | None = None, *, probe_neg: int, total_pos: int
    ) -> Selection:
        """Third step, from m- of anchors and references, and the sums of `probe_neg` and `total_pos` over all parts: the numbers
        of mined pairs."""
        return Selection(*self.context.select(self, max_neg, reference_max_neg, probe_neg, total_pos))

    def gradient(
        self,
        count_pos: Counts,
        count_neg: Counts,
        reference_count_pos: Counts | None = None,
        reference_count_neg: Counts | None = None,
    ) -> PartLoss:
        """Last step, from the numbers of mined pairs of anchors and references: the part's share of the loss, and the gradient of
        its anchors."""
        return PartLoss(*self.context.gradient(self, count_pos, count_neg, reference_count_pos, reference_count_neg))

    def threshold_gradient(self, tangent: Matrix, reference_tangent: Matrix | None = None) -> ThresholdGradient:
        """After the last step: the part's share of `ddtas.threshold_gradient`. `tangent` `[b, D]` is that of the part's anchors,
        `reference_tangent` `[N, D]` that of references that are not anchors; its rows for anchors must be zeros, since each
        anchor counts in its own part."""
        return ThresholdGradient(*self.context.part_threshold_gradient(self, tangent, reference_tangent))
