"""The loss of a batch in parts, which tell each other what they found: processes with some rows each, references in blocks."""

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
    """What `Part.same_class` finds."""

    min_pos: npt.NDArray[np.float32]
    """`[b]`: smallest similarity of each anchor to a positive; inf without one."""
    total_pos: int
    """Ordered positive pairs."""
    total_neg: int
    """Ordered negative pairs."""
    mean_pos: float
    """Mean similarity of the positive pairs; NaN if there is none."""
    mean_neg: float
    """Mean similarity of the negative pairs; NaN if there is none."""


class Sweep(NamedTuple):
    """What `Part.sweep` finds."""

    max_neg: npt.NDArray[np.float32]
    """`[b]`: largest similarity of each anchor to a negative; -inf without one."""
    probe_neg: int
    """Negatives that passed the probe."""


class Selection(NamedTuple):
    """What `Part.select` finds."""

    count_pos: npt.NDArray[np.uint32]
    """`[b]`: mined positives of each anchor."""
    count_neg: npt.NDArray[np.uint32]
    """`[b]`: mined negatives of each anchor."""
    gamma_pos: float
    """Tolerance of positives in force, that of the whole batch."""
    gamma_neg: float
    """Tolerance of negatives in force, that of the whole batch."""


class PartLoss(NamedTuple):
    """What `Part.gradient` finds."""

    loss: float
    """The part's share: the loss of the batch is the sum over its parts."""
    gradient: npt.NDArray[np.float32]
    """`[b, D]`: the whole gradient of the part's anchors."""
    active: int
    """Anchors of the part that enter the loss."""
    dloss_dlambda_pos: float
    """The part's share of dL/d(lambda_pos)."""
    dloss_dlambda_neg: float
    """The part's share of dL/d(lambda_neg)."""


class Part:
    """Some anchors of a batch of `total`, and the four steps of their loss, to be made in this order.

    `embeddings` `[b, D]`, perhaps no rows, are compared with `references` `[N, D]` of the same type: all anchors of the
    batch, in one order for every part, and behind them rows that are anchors of no part, if there are any. `identity` says
    which references the part's anchors are, as in `ddtas.loss`. float32, float16 or bfloat16.

    Between the steps the parts tell each other what they found; the caller carries it. Where a step takes numbers `of the
    anchors` they are `[b]`, those of this part's anchors, all of their pairs taken into account; those `of the references` are `[n]`, of
    the first n references, which are the anchors of all parts. References behind them select nothing; None is for no number at all.

    A part computes on a context of its own, or on the one that is given. Nothing else may compute there from the first step
    to the last: the next step would be a RuntimeError. Every method raises what `ddtas.loss` does. On the processor each row's numbers and
    gradient are the bits of the whole batch's, however it is split.
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
        """First step: m+ of the anchors, and the positive pairs."""
        return SameClass(*self.context.same_class(self))

    def sweep(self, min_pos: Similarities, reference_min_pos: Similarities | None = None) -> Sweep:
        """Second step: m- of the anchors, and the probe, from m+ of the anchors and of the references."""
        return Sweep(*self.context.sweep(self, min_pos, reference_min_pos))

    def select(
        self, max_neg: Similarities, reference_max_neg: Similarities | None = None, *, probe_neg: int, total_pos: int
    ) -> Selection:
        """Third step: the sizes of the mined sets, from m- of the anchors and of the references, and the sums of `probe_neg` and
        `total_pos` over all parts."""
        return Selection(*self.context.select(self, max_neg, reference_max_neg, probe_neg, total_pos))

    def gradient(
        self,
        count_pos: Counts,
        count_neg: Counts,
        reference_count_pos: Counts | None = None,
        reference_count_neg: Counts | None = None,
    ) -> PartLoss:
        """Last step: the part's share of the loss and the whole gradient of its anchors, from the sizes of the sets of the
        anchors and of the references."""
        return PartLoss(*self.context.gradient(self, count_pos, count_neg, reference_count_pos, reference_count_neg))

    def threshold_gradient(self, tangent: Matrix, reference_tangent: Matrix | None = None) -> ThresholdGradient:
        """After the last step: the part's share of `ddtas.threshold_gradient`, along the `tangent` `[b, D]` of its anchors,
        and `[N, D]` of references that are no anchors: its rows of others are zeros, as those count by their own part."""
        return ThresholdGradient(*self.context.part_threshold_gradient(self, tangent, reference_tangent))
