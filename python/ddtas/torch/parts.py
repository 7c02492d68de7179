"""The loss of a batch whose rows are in several processes: four steps, and between them what each has found of its own rows
(docs/parts.md, "Four steps"). Only the own rows' gradient is computed, and no gradient travels.

On a GPU each process computes the loss of all gathered rows, and keeps the gradient of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .. import _ddtas
from ..part import Part
from ..settings import Mining, Settings
from .engine import Engine, count_labels, engine_of, laid_out, normalize_rows
from .operator import STATISTICS, TYPES, UNCHECKED, Answers, Call
from .operator import check_call, of_nothing, which_are_unit, with_lambdas
from .ranks import Meeting, Ranks

_SUMS = STATISTICS.index("probe_neg")
"""From here on the statistics are counts."""


def loss_of_ranks(ranks: Ranks, call: Call) -> Answers:
    """What the operator answers for the whole batch, but for the gradient, which is that of this process's rows."""
    where, rows = engine_of(call.engine), call.rows
    numbers = with_lambdas(call.numbers, call.lambda_pos, call.lambda_neg)
    settings = Settings(cast(Mining, call.mining), *numbers)
    unit, error = rows, None
    try:
        ranks.check_device(rows)
        check_call(call)
        unit = _unit_rows(where, call)
    except (TypeError, ValueError, RuntimeError) as refused:
        error = refused
    about = ""
    if error is None:
        against = "each other" if call.references is None else f"{call.references.shape[0]} references"
        about = f"rows of {rows.shape[1]} {rows.dtype} on {rows.device.type} against {against}, {settings}, {ranks.gradient}"
    meeting = ranks.meet(rows, about, error)
    references = call.references
    if meeting.total == 0 or (references is not None and references.shape[0] == 0):
        return of_nothing(where, call, numbers)
    if rows.device.type != "cpu":
        return whole_in_each(ranks, meeting, call)
    batch = _batch_of(call, meeting, unit)
    steps = _HostSteps(where, batch, settings)
    min_pos, _ = meeting.tell(steps.same_class, 1, 0, unit)
    max_neg, totals = meeting.tell(lambda: steps.sweep(min_pos), 1, 2, unit)
    pos, neg, _ = meeting.tell(lambda: steps.select(max_neg, totals.sum(0)), 2, 0, unit)
    (found,) = meeting.tell(lambda: steps.gradient(pos, neg), 0, len(STATISTICS), unit)
    gradient = steps.found.mul_(ranks.scale) if ranks.scale != 1 else steps.found
    statistics = _whole(found)
    where.last = statistics.tolist()
    if ranks.gradient == "sum":
        # So that the sum over the processes is the derivative by a threshold.
        statistics[1:3] = found[ranks.rank, 1:3]
    return torch.tensor(where.last[0], dtype=torch.float32), gradient, torch.empty(0), statistics


def _unit_rows(where: Engine, call: Call) -> Tensor:
    """This process's rows at unit length, with the bits of one process."""
    rows = call.rows
    if rows.dtype not in TYPES or rows.dtype == torch.float64:
        got = str(rows.dtype).removeprefix("torch.")
        raise TypeError(f"with a process group the anchors must be float32, float16 or bfloat16, not {got}")
    if call.references is not None and call.references.requires_grad:
        raise ValueError("references must not require a gradient with a process group: they are constants, the same everywhere")
    rows = laid_out(rows.detach())
    if rows.numel() == 0:
        return rows
    unit = rows
    if call.normalize and rows.device.type != "cpu":
        unit = normalize_rows(rows)[0].to(rows.dtype)
    elif call.normalize:
        unit = torch.empty_like(rows)
        _ddtas._normalize_at(where.host, (rows.data_ptr(), 0, *rows.shape, TYPES[rows.dtype]), unit.data_ptr())
    if call.check != UNCHECKED:
        good = which_are_unit(unit)
        if not good.all():
            row = int((~good).nonzero()[0])
            _ddtas._refuse_anchor(row, float(unit[row].double().square().sum()))
    return unit


def whole_in_each(ranks: Ranks, meeting: Meeting, call: Call) -> Answers:
    """The loss of all rows in every process, whose rows were checked."""
    rows, labels = meeting.rows(call.rows.detach()), meeting.rows(call.labels)
    identity = None if call.identity is None else meeting.rows(call.identity)
    whole = call._replace(rows=rows, labels=labels, identity=identity, check=UNCHECKED, reference_gradient=False)
    loss, gradient, back, statistics = torch.ops.ddtas.loss.default(*whole)
    if ranks.gradient == "sum":
        # The last statistics are read from this tensor later.
        statistics = statistics.clone()
        statistics[1:3] /= ranks.size
    return loss, gradient[meeting.own] * ranks.scale, back, statistics


class _Batch(NamedTuple):
    """This process's rows as they are and at unit length, and what they are compared with."""

    call: Call
    meeting: Meeting
    unit: Tensor
    references: Tensor
    reference_labels: Tensor
    identity: Any
    square: bool


def _batch_of(call: Call, meeting: Meeting, unit: Tensor) -> _Batch:
    if call.references is None or call.reference_labels is None:
        # An anchor that is not there is no reference.
        first = meeting.first if unit.shape[0] else 0
        return _Batch(call, meeting, unit, meeting.rows(unit), meeting.rows(call.labels), first, True)
    return _Batch(call, meeting, unit, call.references.detach(), call.reference_labels, call.identity, False)


class _HostSteps:
    """The four steps on the processor."""

    found: Tensor
    """The gradient of the own rows."""

    def __init__(self, where: Engine, batch: _Batch, settings: Settings) -> None:
        self.where, self.batch = where, batch
        self.part = Part(
            batch.unit,
            batch.call.labels,
            batch.references,
            batch.reference_labels,
            total=batch.meeting.total,
            identity=batch.identity,
            settings=settings,
            check=False,
            context=where.host,
        )

    def same_class(self) -> tuple[list[Tensor], Tensor]:
        self.same = self.part.same_class()
        return [torch.from_numpy(self.same.min_pos)], torch.empty(0, dtype=torch.int64)

    def sweep(self, min_pos: Tensor) -> tuple[list[Tensor], Tensor]:
        self.swept = self.part.sweep(*self._numbers(min_pos))
        return [torch.from_numpy(self.swept.max_neg)], torch.tensor([self.swept.probe_neg, self.same.total_pos])

    def select(self, max_neg: Tensor, totals: Tensor) -> tuple[list[Tensor], Tensor]:
        probe_neg, total_pos = totals.tolist()
        self.chosen = self.part.select(*self._numbers(max_neg), probe_neg=probe_neg, total_pos=total_pos)
        counts = [torch.from_numpy(self.chosen.count_pos), torch.from_numpy(self.chosen.count_neg)]
        return counts, torch.empty(0, dtype=torch.int64)

    def gradient(self, count_pos: Tensor, count_neg: Tensor) -> tuple[list[Tensor], Tensor]:
        (pos, all_pos), (neg, all_neg) = self._numbers(count_pos), self._numbers(count_neg)
        loss = self.part.gradient(pos, neg, all_pos, all_neg)
        self.found = torch.from_numpy(loss.gradient)
        active = (pos > 0) & (neg > 0)
        call = self.batch.call
        ignored, not_finite = count_labels(call.labels)
        if call.normalize and self.found.numel():
            rows = laid_out(call.rows.detach())
            place = (rows.data_ptr(), 0, *rows.shape, TYPES[rows.dtype])
            _ddtas._normalize_backward_at(self.where.host, place, self.found.data_ptr())
        statistics = {
            "loss": loss.loss,
            "dloss_dlambda_pos": loss.dloss_dlambda_pos,
            "dloss_dlambda_neg": loss.dloss_dlambda_neg,
            "mean_pos": self.same.mean_pos,
            "mean_neg": self.same.mean_neg,
            "gamma_pos": self.chosen.gamma_pos,
            "gamma_neg": self.chosen.gamma_neg,
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

    def _numbers(self, all_rows: Tensor) -> tuple[Any, Any]:
        """Those of the own rows, and those of the references, which select nothing unless they are the batch."""
        numbers = all_rows.numpy()
        return numbers[self.batch.meeting.own], numbers if self.batch.square else None


def _whole(found: Tensor) -> Tensor:
    """The statistics of the batch from those of its parts."""
    whole = found.sum(0)
    for mean, total in (("mean_pos", "total_pos"), ("mean_neg", "total_neg")):
        weights = found[:, STATISTICS.index(total)]
        place = STATISTICS.index(mean)
        # A part without such a pair has no mean.
        whole[place] = (found[:, place].nan_to_num() * weights).sum() / weights.sum()
    tolerances = slice(STATISTICS.index("gamma_pos"), _SUMS)
    whole[tolerances] = found[0, tolerances]
    return whole
