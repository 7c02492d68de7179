"""What embeddings are worth: searches of tensors where they lie."""

from __future__ import annotations

from typing import Iterable

from torch import Tensor

from .. import functional
from .engine import SHARED, check_labels


def recall_at_k(embeddings: Tensor, labels: Tensor, ks: Iterable[int] = (1, 2, 4, 8)) -> functional.Recall:
    """`ddtas.recall_at_k` of rows of unit length, which on a GPU are searched where they lie."""
    rows = embeddings.detach()
    check_labels("labels of the queries", labels)
    if not rows.is_cuda:
        return functional.recall_at_k(rows, labels, ks)
    gpu, stream = SHARED.on_gpu(rows)
    return functional.recall_of(gpu.recall_at_k((rows, labels.long(), None), list(ks), stream))
