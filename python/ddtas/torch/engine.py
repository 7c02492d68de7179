"""Where tensors are computed with, and what is asked of them first."""

from __future__ import annotations

import threading
from typing import Any, Iterable

import torch
from torch import Tensor

from .. import _ddtas, functional

NO_INDICES = "indices_tuple must be None: this loss mines its own pairs, take the miner out"
_NO_CUDA = (
    "this build of ddtas serves the CPU only: install it with "
    "`pip install . --config-settings=build-args='--features cuda'`, or move the embeddings to the CPU"
)


class Engine:
    """Where calls compute. A copy or a pickle starts with an empty workspace."""

    def __init__(self, threads: int | None) -> None:
        self.threads = threads
        self.host = _ddtas.Context(threads)
        # Made for the first tensor in a GPU's memory; only a build with the feature `cuda` has the type.
        self.gpu: Any = None

    def on_gpu(self, rows: Tensor) -> tuple[Any, int]:
        """Where rows in a GPU's memory are computed with, and torch's stream there."""
        if not _ddtas.has_cuda:
            raise RuntimeError(_NO_CUDA)
        if self.gpu is None:
            self.gpu = getattr(_ddtas, "CudaContext")()
        return self.gpu, torch.cuda.current_stream(rows.device).cuda_stream

    def __reduce__(self) -> tuple[Any, ...]:
        return Engine, (self.threads,)


_of_thread = threading.local()


def recall_at_k(embeddings: Tensor, labels: Tensor, ks: Iterable[int] = (1, 2, 4, 8)) -> functional.Recall:
    """`ddtas.recall_at_k` of rows of unit length, which on a GPU are searched where they lie."""
    rows = embeddings.detach()
    check_labels("labels of the queries", labels)
    if not rows.is_cuda:
        return functional.recall_at_k(rows, labels, ks)
    if getattr(_of_thread, "engine", None) is None:
        _of_thread.engine = Engine(None)
    gpu, stream = _of_thread.engine.on_gpu(rows)
    return functional.recall_of(gpu.recall_at_k((rows, labels.long(), None), list(ks), stream))


def check_labels(name: str, labels: Tensor) -> None:
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise TypeError(f"the {name} must be integers, not {str(labels.dtype).removeprefix('torch.')}")


def check_side(name: str, embeddings: Tensor, labels: Tensor, labels_name: str) -> None:
    """Refuses what would be read otherwise than it was meant, or not at all."""
    if embeddings.ndim != 2:
        raise ValueError(f"the {name} must have 2 dimensions, rows and entries, not {embeddings.ndim}")
    check_labels(labels_name, labels)
    if labels.ndim != 1:
        raise ValueError(f"the {labels_name} must have 1 dimension, not {labels.ndim}")
    if len(labels) != len(embeddings):
        raise ValueError(f"labels of the {name}: expected {len(embeddings)}, got {len(labels)}")
