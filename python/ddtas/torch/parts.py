"""The loss of a batch whose rows are spread over the processes of a group.

It is computed in four steps, with an all-gather after each (docs/parts.md, "Four steps"). Each process computes the gradient of its
own rows and references only, and no gradient is sent. On GPUs, a batch that is too small for that to pay is computed whole in
every process.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor

from .. import _ddtas
from ..functional import DEFAULTS
from ..settings import Mining, Settings
from .engine import Engine, engine_of, laid_out, normalize_rows
from .operator import CHECK_AND_WAIT, CHECKED, DLOSS_DLAMBDA, STATISTICS, TYPES, UNCHECKED, Call, Outputs
from .operator import check_sides, derivatives_in, loss_without_pairs, unit_rows, which_are_unit, with_lambdas
from .ranks import BatchExchange, Fingerprint, Ranks
from .steps import CpuSteps, GpuSteps, OwnReferences, PartOfBatch, Steps

_NO_REFERENCE_GRADIENT = (
    "references must not require a gradient with a process group: they are constants, the same everywhere; "
    "say gather_references=True if each process has its own"
)

_CHECKS = {UNCHECKED: "False", CHECKED: "True", CHECK_AND_WAIT: '"wait"'}
FINGERPRINT_ROWS = 1024
"""References are compared between processes by at most about this many rows."""
STEPS_FROM = 2**36
"""Multiply-adds that the steps must spare a process on a GPU, so that they pay for their all-gathers: 0.3 ms of an H200. An
estimate: no group of GPUs has been measured."""

whole_loss = torch.ops.ddtas.loss.default
"""The loss of a batch without a group."""


def steps_for(rows: Tensor) -> type[Steps]:
    return CpuSteps if rows.device.type == "cpu" else GpuSteps


References = Literal["gathered", "compared", "trusted"]
"""Of a batch of several processes: each has its own, which are gathered; all have the same, and others are an error; the same."""


def loss_of_ranks(ranks: Ranks, call: Call, kind_of_references: References) -> Outputs:
    """The operator's outputs for the batch of all processes, with the gradient of this process's rows only."""
    engine, rows = engine_of(call.engine), call.rows
    kind, error, about, fingerprint = steps_for(rows), None, "", (0.0, 0.0)
    gathers = call.references is not None and kind_of_references == "gathered"
    own, references, numbers, settings = rows, call.references, list(call.numbers), DEFAULTS
    try:
        numbers = with_lambdas(call.numbers, call.lambda_pos, call.lambda_neg)
        settings = Settings(cast(Mining, call.mining), *numbers)
        ranks.check_device(rows)
        check_sides(*call[:5])
        if kind is GpuSteps:
            engine.on_gpu(rows)
        reference_labels = None if call.reference_labels is None else laid_out(call.reference_labels)
        call = call._replace(labels=laid_out(call.labels), reference_labels=reference_labels)
        own = _ready(engine, call, rows, kind, False)
        against = "each other"
        if references is not None:
            if references.requires_grad and not gathers:
                raise ValueError(_NO_REFERENCE_GRADIENT)
            references = _ready(engine, call, references, kind, True)
            against = "own references" if gathers else f"{references.shape[0]} references"
            if references.shape[1] != rows.shape[1]:
                raise ValueError(f"the references have {references.shape[1]} dimensions, and the anchors {rows.shape[1]}")
            if kind_of_references == "compared" and references.numel():
                fingerprint = _fingerprint(references, call.reference_labels)
        of = "any length" if call.normalize else "unit length"
        about = f"rows of {rows.shape[1]} {rows.dtype} of {of} on {rows.device.type} against {against}, {settings}, {ranks.gradient}"
        about += f", check={_CHECKS[call.check]}"
    except (TypeError, ValueError, RuntimeError) as refused:
        error = refused
    exchange = ranks.handshake(rows, about, error, fingerprint)
    of_references = _handshake_of_references(ranks, call) if gathers else None
    columns = exchange.total
    if references is not None:
        columns = references.shape[0] if of_references is None else of_references.total
    if exchange.total == 0 or columns == 0:
        return loss_without_pairs(engine, call._replace(labels=exchange.gather_rows(call.labels)), numbers)
    if kind is GpuSteps and _spared(exchange, of_references, rows.shape[1], columns, call) < STEPS_FROM:
        return loss_of_gathered_rows(ranks, exchange, call, of_references)
    exchange.waits = kind.waits
    steps = kind(engine, _part_of(call, settings, exchange, own, references, of_references))
    min_pos, _ = exchange.gather_step(steps.same_class, 1, 0)
    max_neg, totals = exchange.gather_step(lambda: steps.sweep(min_pos), 1, 2)
    pos, neg, _ = exchange.gather_step(lambda: steps.select(max_neg, totals.sum(0)), 2, 0)
    (shares,) = exchange.gather_step(lambda: steps.gradient(pos, neg), 0, len(STATISTICS))
    exchange.raise_own_error()
    engine.last, statistics = steps.combined(shares)
    gradient, reference_gradient = steps.own_gradient, steps.reference_gradient
    if ranks.scale != 1:
        gradient.mul_(ranks.scale)
        reference_gradient.mul_(ranks.scale)
    if ranks.gradient == "sum":
        # Each process gets its share of dL/dlambda, so that the sum over the processes is the whole. A copy, since
        # `Engine.read_statistics` may read the original later.
        statistics = statistics.clone()
        derivatives_in(statistics)[:] = shares[ranks.rank, DLOSS_DLAMBDA]
    if call.check == CHECK_AND_WAIT:
        engine.read_statistics()
    return statistics[0].float(), gradient, reference_gradient, statistics


def _handshake_of_references(ranks: Ranks, call: Call) -> BatchExchange:
    assert call.references is not None
    about = f"references that require {'a' if call.reference_gradient else 'no'} gradient"
    return ranks.handshake(call.references, about, counted="references")


def _fingerprint(rows: Tensor, labels: Tensor | None) -> Fingerprint:
    """A sum over a sample of the rows and labels, with a weight for each row and column. Waits for a GPU."""
    sample = slice(None, None, -(-rows.shape[0] // FINGERPRINT_ROWS))
    chosen = rows[sample].double()
    of_rows, of_columns = (torch.arange(1.0, 1 + size, dtype=torch.float64, device=rows.device) for size in chosen.shape)
    sums = chosen @ of_columns.cos()
    if labels is not None:
        sums = sums + (labels[sample] % 1009).double()
    number, length = torch.stack([sums @ of_rows.sin(), chosen.norm()]).tolist()
    return number, 1e-3 * length


def _spared(exchange: BatchExchange, of_references: BatchExchange | None, dim: int, columns: int, call: Call) -> float:
    """Multiply-adds that a process is spared by computing its own rows only: of the similarities, and of the gradients."""
    product = float(exchange.total * columns * dim)
    # The whole batch against itself has two equal similarities for each pair, and computes one.
    whole = 1.5 if call.references is None else 2
    share = exchange.largest / exchange.total
    if of_references is not None and call.reference_gradient:
        whole, share = 3, share + of_references.largest / of_references.total
    return (whole - 2 * share) * product


def _ready(engine: Engine, call: Call, given: Tensor, kind: type[Steps], of_references: bool) -> Tensor:
    """The rows of one side as the steps take them, and checked, except a GPU's references, which the kernels check. Unit rows are
    bit for bit those of the loss without a group."""
    if given.dtype not in TYPES or given.dtype == torch.float64:
        got = str(given.dtype).removeprefix("torch.")
        raise TypeError(f"with a process group the anchors must be float32, float16 or bfloat16, not {got}")
    rows = laid_out(given.detach())
    if rows.numel() == 0 or (of_references and not kind.takes_unit_rows):
        return rows
    unit = rows
    if call.normalize and kind.takes_unit_rows:
        unit = unit_rows(rows, engine.key)
    elif call.normalize and call.check != UNCHECKED:
        unit = normalize_rows(rows)[0].to(rows.dtype)
    if call.check != UNCHECKED:
        good = which_are_unit(unit)
        if not good.all():
            row = int((~good).nonzero()[0])
            _ddtas._refuse_row(of_references, row, float(unit[row].double().square().sum()))
    return unit if kind.takes_unit_rows else rows


def loss_of_gathered_rows(
    ranks: Ranks, exchange: BatchExchange, call: Call, of_references: BatchExchange | None = None
) -> Outputs:
    """The loss of all rows, computed in every process, and of all processes' references with `of_references`. Each has checked its
    own rows already, the kernels check the references."""
    rows, labels = exchange.gather_rows(call.rows.detach()), exchange.gather_rows(call.labels)
    identity = None if call.identity is None else exchange.gather_rows(call.identity)
    whole = call._replace(rows=rows, labels=labels, identity=identity, reference_gradient=False)
    if of_references is not None and call.references is not None and call.reference_labels is not None:
        references = of_references.gather_rows(call.references.detach())
        reference_labels = of_references.gather_rows(call.reference_labels)
        whole = whole._replace(
            references=references, reference_labels=reference_labels, reference_gradient=call.reference_gradient
        )
    loss, gradient, reference_grad, statistics = whole_loss(*whole)
    if of_references is not None and call.reference_gradient:
        reference_grad = reference_grad[of_references.own] * ranks.scale
    if ranks.gradient == "sum":
        # A copy, since `Engine.read_statistics` reads the original later.
        statistics = statistics.clone()
        derivatives_in(statistics).div_(ranks.size)
    return loss, gradient[exchange.own] * ranks.scale, reference_grad, statistics


def _part_of(
    call: Call,
    settings: Settings,
    exchange: BatchExchange,
    rows: Tensor,
    references: Tensor | None,
    of_references: BatchExchange | None,
) -> PartOfBatch:
    reference_labels, own = call.reference_labels, None
    if references is None or reference_labels is None:
        references, reference_labels = exchange.gather_rows(rows), exchange.gather_rows(call.labels)
    elif of_references is not None:
        if call.reference_gradient:
            anchors = exchange.gather_rows(rows), exchange.gather_rows(call.labels)
            own = OwnReferences(references, reference_labels, *anchors)
        references, reference_labels = of_references.gather_rows(references), of_references.gather_rows(reference_labels)
    return PartOfBatch(call, settings, exchange, rows, references, reference_labels, own)
