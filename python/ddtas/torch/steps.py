"""The four steps of the loss for this process's rows of a batch (docs/parts.md), on the CPU and on a GPU.

Each step returns what `BatchExchange.gather_step` gathers: tensors with a number for each row, and a tensor of numbers of 8 bytes.
"""

from __future__ import annotations

import math
from dataclasses import astuple
from typing import Any, NamedTuple, Union

import numpy as np
import torch
from torch import Tensor

from .. import _ddtas
from ..part import Part
from ..settings import Settings
from .engine import Engine, count_labels
from .operator import STATISTICS, UNCHECKED, Call, gradient_of_rows, target_of
from .ranks import BatchExchange

Found = tuple[list[Tensor], Tensor]
NUMBERS_WITHOUT_PAIRS = ((math.inf, "float32"), (-math.inf, "float32"), (0, "int32"))
"""m+, m- and both counts of a row that mines no pairs, and their types."""


class OwnReferences(NamedTuple):
    """This process's references, whose gradient is wanted, and the anchors of all processes; rows as the steps take them."""

    rows: Tensor
    labels: Tensor
    anchors: Tensor
    anchor_labels: Tensor


class PartOfBatch(NamedTuple):
    """This process's rows of a batch, and what all rows are compared with."""

    call: Call
    """The operator's arguments, of this process's rows."""
    settings: Settings
    exchange: BatchExchange
    rows: Tensor
    """This process's rows as its steps take them: of unit length on the CPU, as given on a GPU."""
    references: Tensor
    """All rows of the batch in the order of ranks, or the references of the call or of all processes; likewise."""
    reference_labels: Tensor
    own_references: OwnReferences | None = None

    @property
    def square(self) -> bool:
        """Whether the references are the batch itself."""
        return self.call.references is None

    @property
    def first(self) -> int:
        """The index of this process's first row among all rows; 0 without rows, since it may be beyond the last one then."""
        return self.exchange.first if self.rows.shape[0] else 0


class CpuSteps:
    """The steps by `ddtas.Part`."""

    takes_unit_rows = True
    """Whether rows must have unit length. If not, the steps normalise them if the call says so."""
    waits = True
    """Whether an error of another process is known after each step."""
    own_gradient: Tensor
    """dL/d(rows) of this process's rows, once `gradient` has run."""
    reference_gradient: Tensor
    """Likewise of its references, `[0]` unless it is wanted. It is that of a part in which the references take the anchors' place and
    mine no pairs (docs/parts.md, "The gradient of references")."""

    def __init__(self, engine: Engine, batch: PartOfBatch) -> None:
        self.engine, self.batch = engine, batch
        self.part = Part(
            batch.rows,
            batch.call.labels,
            batch.references,
            batch.reference_labels,
            total=batch.exchange.total,
            identity=batch.first if batch.square else batch.call.identity,
            settings=batch.settings,
            check=False,
            context=engine.host,
        )

    def same_class(self) -> Found:
        self.same = self.part.same_class()
        return [torch.from_numpy(self.same.min_pos)], torch.empty(0, dtype=torch.int64)

    def sweep(self, min_pos: Tensor) -> Found:
        self.min_pos = min_pos.numpy()
        self.swept = self.part.sweep(*self._numbers(min_pos))
        return [torch.from_numpy(self.swept.max_neg)], torch.tensor([self.swept.probe_neg, self.same.total_pos])

    def select(self, max_neg: Tensor, totals: Tensor) -> Found:
        self.max_neg, (self.probe_neg, self.total_pos) = max_neg.numpy(), totals.tolist()
        self.selected = self.part.select(*self._numbers(max_neg), probe_neg=self.probe_neg, total_pos=self.total_pos)
        counts = [torch.from_numpy(self.selected.count_pos), torch.from_numpy(self.selected.count_neg)]
        return counts, torch.empty(0, dtype=torch.int64)

    def gradient(self, count_pos: Tensor, count_neg: Tensor) -> Found:
        (pos, all_pos), (neg, all_neg) = self._numbers(count_pos), self._numbers(count_neg)
        loss = self.part.gradient(pos, neg, all_pos, all_neg)
        call, own = self.batch.call, self.batch.own_references
        self.own_gradient = self._of_rows_as_given(loss.gradient, call.rows)
        if own is None or call.references is None:
            self.reference_gradient = torch.empty(0)
        else:
            turned = self._gradient_of_references(own, count_pos.numpy(), count_neg.numpy())
            self.reference_gradient = self._of_rows_as_given(turned, call.references)
        active = (pos > 0) & (neg > 0)
        ignored, not_finite = count_labels(call.labels)
        statistics = {
            "loss": loss.loss,
            "dloss_dlambda_pos": loss.dloss_dlambda_pos,
            "dloss_dlambda_neg": loss.dloss_dlambda_neg,
            "mean_pos": self.same.mean_pos,
            "mean_neg": self.same.mean_neg,
            "gamma_pos": self.selected.gamma_pos,
            "gamma_neg": self.selected.gamma_neg,
            "probe_neg": self.swept.probe_neg,
            "total_pos": self.same.total_pos,
            "total_neg": self.same.total_neg,
            "active": loss.active,
            "positives": int(pos[active].sum()),
            "negatives": int(neg[active].sum()),
            "ignored": ignored,
            "not_finite": not_finite,
        }
        return [], torch.tensor([float(statistics[name]) for name in STATISTICS], dtype=torch.float64)

    def _gradient_of_references(self, own: OwnReferences, count_pos: Any, count_neg: Any) -> Any:
        settings, total = self.batch.settings, self.batch.exchange.total
        part = Part(
            own.rows,
            own.labels,
            own.anchors,
            own.anchor_labels,
            total=total,
            settings=settings,
            check=False,
            context=self.engine.host,
        )
        low, high, none = (np.full(own.rows.shape[0], value, kind) for value, kind in NUMBERS_WITHOUT_PAIRS)
        part.same_class()
        part.sweep(low, self.min_pos)
        part.select(high, self.max_neg, probe_neg=self.probe_neg, total_pos=self.total_pos)
        return part.gradient(none, none, count_pos, count_neg).gradient

    def _of_rows_as_given(self, gradient: Any, given: Tensor) -> Tensor:
        """The gradient of rows of unit length as that of the rows as they were given."""
        found = torch.from_numpy(gradient)
        if self.batch.call.normalize and found.numel():
            return gradient_of_rows(given.detach(), found, self.engine.key)
        return found

    def combined(self, shares: Tensor) -> tuple[list[float], Tensor]:
        """The statistics of the batch from what all processes' `gradient` has found, for `Engine.last` and as a tensor."""
        whole = shares.sum(0)
        whole[MEANS] = _means(shares[:, MEANS], shares[:, TOTALS])
        whole[TOLERANCES] = shares[0, TOLERANCES]
        return whole.tolist(), whole

    def _numbers(self, all_rows: Tensor) -> tuple[Any, Any]:
        """The numbers of this process's rows, and those of all rows if the references are the batch, else None."""
        numbers = all_rows.numpy()
        return numbers[self.batch.exchange.own], numbers if self.batch.square else None


class GpuSteps:
    """The steps issued on torch's current stream, without waiting. A process without rows does nothing in them."""

    takes_unit_rows = False
    waits = False
    own_gradient: Tensor
    reference_gradient: Tensor

    def __init__(self, engine: Engine, batch: PartOfBatch) -> None:
        self.engine, self.batch = engine, batch
        self.part: Any = None
        if batch.square:
            self.all_labels = batch.reference_labels
        elif batch.own_references is not None:
            self.all_labels = batch.own_references.anchor_labels
        else:
            self.all_labels = batch.exchange.gather_rows(batch.call.labels)

    def same_class(self) -> Found:
        (min_pos,), rows = self._row_numbers(torch.float32, 1), self.batch.rows
        self.own_gradient = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
        if self._has_rows:
            self.part = self._part_of_rows()
            self.part.same_class(min_pos.data_ptr())
        return [min_pos], self._sums(torch.int64, 0)

    def sweep(self, min_pos: Tensor) -> Found:
        self.min_pos = min_pos
        (max_neg,), totals = self._row_numbers(torch.float32, 1), self._sums(torch.int64, 2)
        if self._has_rows:
            self.part.sweep(self._given(min_pos), max_neg.data_ptr(), totals.data_ptr())
        return [max_neg], totals

    def select(self, max_neg: Tensor, totals: Tensor) -> Found:
        self.max_neg, self.totals = max_neg, totals
        counts = self._row_numbers(torch.int32, 2)
        if self._has_rows:
            self.part.select(self._given(max_neg), totals.data_ptr(), [count.data_ptr() for count in counts])
        return counts, self._sums(torch.int64, 0)

    def gradient(self, count_pos: Tensor, count_neg: Tensor) -> Found:
        scalars, own = self._sums(torch.float64, len(STATISTICS)), self.batch.own_references
        if self._has_rows:
            self.part.gradient([self._given(count_pos), self._given(count_neg)], scalars.data_ptr())
        self.reference_gradient = self._sums(torch.float32, 0) if own is None else self._gradient_of_references(own, count_pos, count_neg)
        return [], scalars

    def _gradient_of_references(self, own: OwnReferences, count_pos: Tensor, count_neg: Tensor) -> Tensor:
        gradient = torch.empty(own.rows.shape, dtype=torch.float32, device=own.rows.device)
        if own.rows.shape[0]:
            # Every part has checked all references.
            part = self._part(own.rows, own.labels, own.anchors, own.anchor_labels, gradient, (None, 0), False)
            low, high, none = (
                torch.full(own.labels.shape, value, dtype=getattr(torch, kind), device=own.rows.device)
                for value, kind in NUMBERS_WITHOUT_PAIRS
            )
            unused, unused_too = torch.empty_like(low), torch.empty_like(low)
            totals, scalars = self._sums(torch.int64, 2), self._sums(torch.float64, len(STATISTICS))

            def given(value: Tensor, of_anchors: Tensor) -> tuple[int, int, int]:
                return value.data_ptr(), of_anchors.data_ptr(), of_anchors.shape[0]

            part.same_class(unused.data_ptr())
            part.sweep(given(low, self.min_pos), unused.data_ptr(), totals.data_ptr())
            part.select(given(high, self.max_neg), self.totals.data_ptr(), [unused.data_ptr(), unused_too.data_ptr()])
            part.gradient([given(none, count_pos), given(none, count_neg)], scalars.data_ptr())
        return gradient

    def combined(self, shares: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """As on the CPU, of `LossScalars` (kernels/params.h), whose counts are integers. If a process has failed, the loss becomes
        NaN, and so do its derivatives in `shares` and `own_gradient`."""
        failures = self.batch.exchange.failures
        nan_or_zero = torch.where(failures.sum() > 0, torch.nan, 0.0)
        shares[:, :SUMS_END] += nan_or_zero
        self.own_gradient += nan_or_zero
        if self.reference_gradient.numel():
            # Its part has not seen all rows.
            self.reference_gradient += torch.where(shares[:, 0].sum().isnan(), torch.nan, 0.0)
        # Each process has checked its own rows, and every part checks all references: the words that name a bad one are any part's.
        first = next(rank for rank, count in enumerate(self.batch.exchange.counts) if count)
        counts = shares.view(torch.int64)
        whole = shares[first].clone()
        whole[:SUMS_END] = shares[:, :SUMS_END].sum(0)
        whole[MEANS] = _means(shares[:, MEANS], counts[:, TOTALS].double())
        for place in (COUNTS, MINED):
            whole.view(torch.int64)[place] = counts[:, place].sum(0)
        return (whole, self.all_labels, failures), whole

    @property
    def _has_rows(self) -> bool:
        return self.batch.rows.shape[0] > 0

    def _part_of_rows(self) -> Any:
        batch, call = self.batch, self.batch.call
        identity: tuple[int | None, int] = (batch.first if batch.square else None, 0)
        if call.identity is not None:
            self.identity = call.identity.to(torch.int32).contiguous()
            identity = None, self.identity.data_ptr()
        check = call.check != UNCHECKED
        return self._part(batch.rows, call.labels, batch.references, batch.reference_labels, self.own_gradient, identity, check)

    def _part(
        self,
        rows: Tensor,
        labels: Tensor,
        references: Tensor,
        reference_labels: Tensor,
        gradient: Tensor,
        identity: tuple[int | None, int],
        check: bool,
    ) -> Any:
        """A part of these rows, which `batch` holds until the steps have been issued."""
        gpu, place = self.engine.on_gpu(rows)
        sides = [target_of(rows, labels, gradient), target_of(references, reference_labels)]
        mining, *numbers = astuple(self.batch.settings)
        make = getattr(_ddtas, "CudaPart")
        return make(gpu, place, sides, identity, self.batch.exchange.total, mining, numbers, check, self.batch.call.normalize)

    def _row_numbers(self, dtype: torch.dtype, lists: int) -> list[Tensor]:
        rows = self.batch.rows
        return [torch.empty(rows.shape[0], dtype=dtype, device=rows.device) for _ in range(lists)]

    def _sums(self, dtype: torch.dtype, count: int) -> Tensor:
        return torch.zeros(count, dtype=dtype, device=self.batch.rows.device)

    def _given(self, all_rows: Tensor) -> tuple[int, int, int]:
        """Addresses of the numbers of this process's rows and of all rows, and how many the latter are: none for other references."""
        own = all_rows[self.batch.exchange.own].data_ptr()
        return (own, all_rows.data_ptr(), all_rows.shape[0]) if self.batch.square else (own, 0, 0)


Steps = Union[CpuSteps, GpuSteps]


def _places(first: str, last: str) -> slice:
    return slice(STATISTICS.index(first), STATISTICS.index(last) + 1)


MEANS = _places("mean_pos", "mean_neg")
TOTALS = _places("total_pos", "total_neg")
TOLERANCES = _places("gamma_pos", "gamma_neg")
COUNTS = _places("probe_neg", "active")
"""The first counts, which are at the same places in `LossScalars`."""
SUMS_END = MEANS.start
MINED = slice(13, 15)
"""The numbers of mined pairs in `LossScalars`."""


def _means(means: Tensor, weights: Tensor) -> Tensor:
    """The mean similarities of the batch, `[2]`, from those of its parts and their numbers of pairs, `[W, 2]` each."""
    # The mean of a part without such a pair is NaN, and its weight 0.
    whole: Tensor = torch.where(weights > 0, means * weights, 0).sum(0) / weights.sum(0)
    return whole
