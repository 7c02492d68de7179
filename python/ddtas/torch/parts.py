"""The loss of a batch whose rows are spread over the processes of a group.

On the CPU it is computed in four steps, with an all-gather after each (docs/parts.md, "Four steps"). Each process computes the
gradient of its own rows only, and no gradient is sent. On a GPU each process computes the loss of all gathered rows, and keeps
the gradient of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .. import _ddtas
from ..part import Part
from ..settings import Mining, Settings
from .engine import Engine, count_labels, engine_of, laid_out, normalize_rows
from .operator import DLOSS_DLAMBDA, STATISTICS, TYPES, UNCHECKED, Call, Outputs
from .operator import check_call, loss_without_pairs, which_are_unit, with_lambdas
from .ranks import BatchExchange, Ranks

_FIRST_COUNT = STATISTICS.index("probe_neg")
"""Index of the first statistic that is a count, as are all after it."""


def loss_of_ranks(ranks: Ranks, call: Call) -> Outputs:
    """The operator's outputs for the batch of all processes, with the gradient of this process's rows only."""
    engine, rows = engine_of(call.engine), call.rows
    numbers = with_lambdas(call.numbers, call.lambda_pos, call.lambda_neg)
    settings = Settings(cast(Mining, call.mining), *numbers)
    unit, error = rows, None
    try:
        ranks.check_device(rows)
        check_call(call)
        unit = _unit_rows(engine, call)
    except (TypeError, ValueError, RuntimeError) as refused:
        error = refused
    about = ""
    if error is None:
        against = "each other" if call.references is None else f"{call.references.shape[0]} references"
        about = f"rows of {rows.shape[1]} {rows.dtype} on {rows.device.type} against {against}, {settings}, {ranks.gradient}"
    exchange = ranks.handshake(rows, about, error)
    references = call.references
    if exchange.total == 0 or (references is not None and references.shape[0] == 0):
        return loss_without_pairs(engine, call, numbers)
    if rows.device.type != "cpu":
        return loss_of_gathered_rows(ranks, exchange, call)
    batch = _batch_of(call, exchange, unit)
    steps = _CpuSteps(engine, batch, settings)
    min_pos, _ = exchange.gather_step(steps.same_class, 1, 0)
    max_neg, totals = exchange.gather_step(lambda: steps.sweep(min_pos), 1, 2)
    pos, neg, _ = exchange.gather_step(lambda: steps.select(max_neg, totals.sum(0)), 2, 0)
    (shares,) = exchange.gather_step(lambda: steps.gradient(pos, neg), 0, len(STATISTICS))
    gradient = steps.own_gradient.mul_(ranks.scale) if ranks.scale != 1 else steps.own_gradient
    statistics = _combined(shares)
    engine.last = statistics.tolist()
    if ranks.gradient == "sum":
        # Each process gets its share of dL/dlambda, so that the sum over the processes is the whole.
        statistics[DLOSS_DLAMBDA] = shares[ranks.rank, DLOSS_DLAMBDA]
    return torch.tensor(engine.last[0], dtype=torch.float32), gradient, torch.empty(0), statistics


def _unit_rows(engine: Engine, call: Call) -> Tensor:
    """This process's rows at unit length, bit for bit as the loss without a group normalises them."""
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
        _ddtas._normalize_at(engine.host, (rows.data_ptr(), 0, *rows.shape, TYPES[rows.dtype]), unit.data_ptr())
    if call.check != UNCHECKED:
        good = which_are_unit(unit)
        if not good.all():
            row = int((~good).nonzero()[0])
            _ddtas._refuse_anchor(row, float(unit[row].double().square().sum()))
    return unit


def loss_of_gathered_rows(ranks: Ranks, exchange: BatchExchange, call: Call) -> Outputs:
    """The loss of all rows, computed in every process. Each has checked its own rows already."""
    rows, labels = exchange.gather_rows(call.rows.detach()), exchange.gather_rows(call.labels)
    identity = None if call.identity is None else exchange.gather_rows(call.identity)
    whole = call._replace(rows=rows, labels=labels, identity=identity, check=UNCHECKED, reference_gradient=False)
    loss, gradient, empty, statistics = torch.ops.ddtas.loss.default(*whole)
    if ranks.gradient == "sum":
        # A copy, since `Engine.read_statistics` reads the original later.
        statistics = statistics.clone()
        statistics[DLOSS_DLAMBDA] /= ranks.size
    return loss, gradient[exchange.own] * ranks.scale, empty, statistics


class _Batch(NamedTuple):
    """This process's rows, as given in `call` and at unit length, and the references. `square`: these are the batch itself."""

    call: Call
    exchange: BatchExchange
    unit: Tensor
    references: Tensor
    reference_labels: Tensor
    identity: Any
    square: bool


def _batch_of(call: Call, exchange: BatchExchange, unit: Tensor) -> _Batch:
    if call.references is None or call.reference_labels is None:
        # Without own rows `exchange.first` may be beyond the last reference.
        first = exchange.first if unit.shape[0] else 0
        return _Batch(call, exchange, unit, exchange.gather_rows(unit), exchange.gather_rows(call.labels), first, True)
    return _Batch(call, exchange, unit, call.references.detach(), call.reference_labels, call.identity, False)


class _CpuSteps:
    """The four steps for this process's rows, on the CPU. Each returns what `BatchExchange.gather_step` gathers."""

    own_gradient: Tensor
    """dL/d(rows) of this process's rows, once `gradient` has run."""

    def __init__(self, engine: Engine, batch: _Batch, settings: Settings) -> None:
        self.engine, self.batch = engine, batch
        self.part = Part(
            batch.unit,
            batch.call.labels,
            batch.references,
            batch.reference_labels,
            total=batch.exchange.total,
            identity=batch.identity,
            settings=settings,
            check=False,
            context=engine.host,
        )

    def same_class(self) -> tuple[list[Tensor], Tensor]:
        self.same = self.part.same_class()
        return [torch.from_numpy(self.same.min_pos)], torch.empty(0, dtype=torch.int64)

    def sweep(self, min_pos: Tensor) -> tuple[list[Tensor], Tensor]:
        self.swept = self.part.sweep(*self._numbers(min_pos))
        return [torch.from_numpy(self.swept.max_neg)], torch.tensor([self.swept.probe_neg, self.same.total_pos])

    def select(self, max_neg: Tensor, totals: Tensor) -> tuple[list[Tensor], Tensor]:
        probe_neg, total_pos = totals.tolist()
        self.selected = self.part.select(*self._numbers(max_neg), probe_neg=probe_neg, total_pos=total_pos)
        counts = [torch.from_numpy(self.selected.count_pos), torch.from_numpy(self.selected.count_neg)]
        return counts, torch.empty(0, dtype=torch.int64)

    def gradient(self, count_pos: Tensor, count_neg: Tensor) -> tuple[list[Tensor], Tensor]:
        (pos, all_pos), (neg, all_neg) = self._numbers(count_pos), self._numbers(count_neg)
        loss = self.part.gradient(pos, neg, all_pos, all_neg)
        self.own_gradient = torch.from_numpy(loss.gradient)
        active = (pos > 0) & (neg > 0)
        call = self.batch.call
        ignored, not_finite = count_labels(call.labels)
        if call.normalize and self.own_gradient.numel():
            rows = laid_out(call.rows.detach())
            place = (rows.data_ptr(), 0, *rows.shape, TYPES[rows.dtype])
            _ddtas._normalize_backward_at(self.engine.host, place, self.own_gradient.data_ptr())
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

    def _numbers(self, all_rows: Tensor) -> tuple[Any, Any]:
        """The numbers of this process's rows, and those of all rows if the references are the batch, else None."""
        numbers = all_rows.numpy()
        return numbers[self.batch.exchange.own], numbers if self.batch.square else None


def _combined(shares: Tensor) -> Tensor:
    """The statistics of the batch from `[W, statistics]` of its parts."""
    whole = shares.sum(0)
    for mean, total in (("mean_pos", "total_pos"), ("mean_neg", "total_neg")):
        weights = shares[:, STATISTICS.index(total)]
        place = STATISTICS.index(mean)
        # The mean of a part without such a pair is NaN, and its weight 0.
        whole[place] = (shares[:, place].nan_to_num() * weights).sum() / weights.sum()
    tolerances = slice(STATISTICS.index("gamma_pos"), _FIRST_COUNT)
    whole[tolerances] = shares[0, tolerances]
    return whole
