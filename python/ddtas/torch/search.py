"""What embeddings are worth: searches of tensors where they lie."""

from __future__ import annotations

from typing import Any, Iterable

import torch
from torch import Tensor

from .. import evaluation, functional
from ..settings import Settings
from .engine import SHARED, check_labels


def recall_at_k(embeddings: Tensor, labels: Tensor, ks: Iterable[int] = (1, 2, 4, 8)) -> functional.Recall:
    """`ddtas.recall_at_k` of rows of unit length, which on a GPU are searched where they lie."""
    rows = embeddings.detach()
    check_labels("labels of the queries", labels)
    if not rows.is_cuda:
        return functional.recall_at_k(rows, labels, ks)
    gpu, stream = SHARED.on_gpu(rows)
    return functional.recall_of(gpu.recall_at_k((rows, labels.long(), None), list(ks), stream))


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
    """`ddtas.evaluate` of tensors of unit length. Those in a GPU's memory go to the host, and back in turns to be searched."""
    check_labels("labels of the queries", labels)
    if gallery_labels is not None:
        check_labels("labels of the references", gallery_labels)
    context: Any = SHARED.searcher(embeddings) if embeddings.is_cuda else None
    rows, marks, others, other_marks = (
        None if tensor is None else tensor.detach().cpu() for tensor in (embeddings, labels, gallery, gallery_labels)
    )
    if isinstance(identity, Tensor):
        identity = identity.cpu()
    assert rows is not None and marks is not None
    return evaluation.evaluate(
        rows, marks, others, other_marks, ks, identity=identity, nmi=nmi, seed=seed, context=context
    )


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
    """`ddtas.threshold_gradient` of tensors of unit length, which on a GPU are read where they lie; `identity` is for the CPU."""
    given = (embeddings, tangent, references, reference_tangent)
    rows, moved, others, other_moved = (None if tensor is None else tensor.detach() for tensor in given)
    assert rows is not None and moved is not None
    if not rows.is_cuda:
        return functional.threshold_gradient(
            rows, labels, moved, others, reference_labels, other_moved, identity=identity, settings=settings, check=check
        )
    if identity is not None:
        raise ValueError("identity must be None on a GPU: rows are known by their value there")
    check_labels("labels", labels)
    if (others is None) != (reference_labels is None):
        raise ValueError("references and reference_labels belong together: give both or neither")
    gpu, stream = SHARED.on_gpu(rows)
    room = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    sides: list[tuple[Tensor, Tensor, Tensor | None]] = [(rows, labels.to(rows.device, torch.int64), room)]
    if others is not None and reference_labels is not None:
        sides.append((others, reference_labels.to(rows.device, torch.int64), None))
    sums = gpu.threshold_gradient(sides, (moved, other_moved), settings, check, stream)
    return functional.ThresholdGradient(*sums)
