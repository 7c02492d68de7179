"""Evaluation and the threshold gradient of torch tensors."""

from __future__ import annotations

from typing import Any, Iterable

import torch
from torch import Tensor

from .. import evaluation, functional
from ..settings import Settings
from .engine import SHARED, check_labels, check_pair, check_tensor, laid_out, normalize_rows
from .operator import check_one_device, check_sides, target_of, which_are_unit


def _unit(name: str, rows: Tensor) -> Tensor:
    """The rows at unit length, in float32 if they are float64; others themselves if all norms are 1 to the precision of their type."""
    check_tensor(f"the {name}", rows)
    rows = rows.detach()
    if rows.ndim != 2 or not rows.numel() or not rows.is_floating_point():
        return rows.float() if rows.dtype == torch.float64 else rows
    if rows.dtype == torch.float64:
        return normalize_rows(rows)[0].float()
    if bool(which_are_unit(rows, max(torch.finfo(rows.dtype).eps, 1e-6)).all()):
        return rows
    return normalize_rows(rows)[0].to(rows.dtype)


def _constant(name: str, rows: Tensor) -> Tensor:
    check_tensor(f"the {name}", rows)
    return laid_out(rows.detach())


def recall_at_k(embeddings: Tensor, labels: Tensor, ks: Iterable[int] = (1, 2, 4, 8)) -> functional.Recall:
    """`ddtas.recall_at_k` for tensors, on the CPU or a GPU. Rows are normalised; they may have any length but 0."""
    rows = laid_out(_unit("queries", embeddings))
    check_labels("labels of the queries", labels)
    labels = laid_out(labels.to(rows.device, torch.int64))
    if not SHARED.uses_gpu(rows):
        return functional.recall_at_k(rows, labels, ks)
    check_sides(rows, labels, name="queries")
    gpu, place = SHARED.on_gpu(rows)
    return functional.recall_of(gpu.recall_at_k(place, target_of(rows, labels), functional.depths_of(ks)))


def evaluate(
    embeddings: Tensor,
    labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    ks: Iterable[int] = (1, 2, 4, 8),
    *,
    identity: int | Tensor | None = None,
    nmi: bool = False,
    seed: int = 0,
) -> evaluation.Evaluation:
    """`ddtas.evaluate` for tensors. Rows are normalised; they may have any length but 0.

    Tensors on a GPU are copied to the host, and searched on that GPU in blocks.
    """
    rows = _unit("queries", embeddings)
    others = None if gallery is None else laid_out(_unit("references", gallery).cpu())
    check_labels("labels of the queries", labels)
    if gallery_labels is not None:
        check_labels("labels of the references", gallery_labels)
    other_labels = None if gallery_labels is None else laid_out(gallery_labels.cpu())
    if isinstance(identity, Tensor):
        check_labels("identity", identity)
        if identity.shape != rows.shape[:1]:
            raise ValueError(f"the identity must be [{rows.shape[0]}], not {list(identity.shape)}")
        identity = identity.cpu()
    queries, labels, depths = laid_out(rows.cpu()), laid_out(labels.cpu()), functional.depths_of(ks)
    given: Any = (queries, labels, others, other_labels, identity, depths)
    context = functional.context_of(None)
    if SHARED.uses_gpu(rows):
        gpu, place = SHARED.on_gpu(rows)
        found = gpu.query_metrics(place, *given)
    else:
        found = context.query_metrics(*given)
    if nmi and queries.dtype != torch.float32:
        # K-means takes float32 alone, and these are of unit length only to the precision of their type.
        queries = laid_out(_unit("queries", queries.float()))
    information = context.nmi(queries, labels, seed) if nmi else None
    return evaluation.evaluation_of(found, depths, information)


def threshold_gradient(
    embeddings: Tensor,
    labels: Tensor,
    tangent: Tensor,
    references: Tensor | None = None,
    reference_labels: Tensor | None = None,
    reference_tangent: Tensor | None = None,
    *,
    identity: int | Tensor | None = None,
    settings: Settings = functional.DEFAULTS,
    check: bool = True,
) -> functional.ThresholdGradient:
    """`ddtas.threshold_gradient` for tensors of unit rows, on the CPU or a GPU. On a GPU `identity` must be None."""
    check_pair(references, reference_labels)
    check_labels("labels", labels)
    labels = laid_out(labels)
    rows, tangent = _constant("anchors", embeddings), _constant("tangent", tangent)
    others = None if references is None else _constant("references", references)
    if reference_tangent is not None:
        reference_tangent = _constant("tangent of the references", reference_tangent)
    if reference_labels is not None:
        check_labels("labels of the references", reference_labels)
        reference_labels = laid_out(reference_labels)
    if not SHARED.uses_gpu(rows):
        return functional.threshold_gradient(
            rows, labels, tangent, others, reference_labels, reference_tangent, identity=identity, settings=settings, check=check
        )
    if identity is not None:
        raise ValueError("identity must be None on a GPU: rows are known by their value there")
    labels = labels.to(rows.device, torch.int64)
    if reference_labels is not None:
        reference_labels = reference_labels.to(rows.device, torch.int64)
    check_sides(rows, labels, others, reference_labels)
    _check_tangent("tangent", tangent, rows)
    # The loss that is computed first writes its gradient here.
    gradient = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    sides = [target_of(rows, labels, gradient)]
    if others is not None and reference_labels is not None:
        sides.append(target_of(others, reference_labels))
        if reference_tangent is not None:
            _check_tangent("tangent of the references", reference_tangent, others)
    else:
        reference_tangent = None
    tangents = tangent.data_ptr(), 0 if reference_tangent is None else reference_tangent.data_ptr()
    gpu, place = SHARED.on_gpu(rows)
    return functional.ThresholdGradient(*gpu.threshold_gradient(place, sides, tangents, settings, check))


def _check_tangent(name: str, tangent: Tensor, rows: Tensor) -> None:
    if tangent.dtype != torch.float32:
        raise TypeError(f"the {name} must be float32, not {str(tangent.dtype).removeprefix('torch.')}")
    if tangent.shape != rows.shape:
        raise ValueError(f"the {name} must be {list(rows.shape)}, not {list(tangent.shape)}")
    check_one_device(rows, name, tangent)
