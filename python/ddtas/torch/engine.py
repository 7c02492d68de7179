"""`Engine`, the CPU and GPU contexts of a module, and the checks of its arguments."""

from __future__ import annotations

import itertools
import weakref
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from .. import _ddtas

NO_INDICES = (
    "indices_tuple must be None: this loss mines its own pairs, take the miner out "
    "(TwoStreamMetricLoss makes pairs without one: see docs/python.md)"
)
_NO_CUDA = (
    "this build of ddtas serves the CPU only: install it with "
    "`pip install . --config-settings=build-args='--features cuda'`, or move the embeddings to the CPU"
)

_keys = itertools.count()
_engines: weakref.WeakValueDictionary[int, Engine] = weakref.WeakValueDictionary()


class Engine:
    """The contexts that a module's calls compute in, freed with the module. A copy or a pickle starts with empty workspaces."""

    def __init__(self, threads: int | None = None, budget: int | None = None, allow_tf32: bool = False) -> None:
        self.threads, self.budget, self.allow_tf32 = threads, budget, allow_tf32
        if budget is not None and not isinstance(budget, SupportsIndex):
            raise TypeError(f"workspace_budget = {budget!r} must be an integer")
        if budget is not None and not 0 <= budget < 2**64:
            raise ValueError(f"workspace_budget = {budget} is out of range: bytes, 0 to 2^64 - 1")
        self.host = _ddtas.Context(threads, budget)
        # A CudaContext, created for the first tensor on a GPU. Only a build with the feature `cuda` has the type.
        self.gpu: Any = None
        # Statistics of the last loss: numbers, or on a GPU the tensor that they are written to and the anchors' labels.
        # In a group also a tensor that is 1 for each rank that has failed.
        self.last: list[float] | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor] | None = None
        # The operator's arguments are numbers and tensors: this number stands for the engine.
        self.key = next(_keys)
        _engines[self.key] = self

    def on_gpu(self, rows: Tensor) -> tuple[Any, tuple[int, int]]:
        """The context for rows on a GPU, and that GPU's number and torch's current stream there."""
        if not _ddtas.has_cuda:
            raise RuntimeError(_NO_CUDA)
        if self.gpu is None:
            self.gpu = getattr(_ddtas, "CudaContext")(self.budget, self.allow_tf32)
        # The raw stream, as torch's compiled programs get it: no Stream object is created.
        device = rows.get_device()
        return self.gpu, (device, getattr(torch._C, "_cuda_getCurrentRawStream")(device))

    def uses_gpu(self, rows: Tensor) -> bool:
        """Whether rows are computed by `on_gpu`'s context."""
        return rows.is_cuda

    def read_statistics(self) -> list[float] | None:
        """The statistics of the last loss; None before the first. Waits for a GPU, and then raises ValueError for a bad row, and
        RuntimeError if another process of the group has failed."""
        if not isinstance(self.last, tuple):
            return self.last
        written, labels, *failures = self.last
        for rank in failures[0].nonzero().flatten().tolist() if failures else ():
            raise RuntimeError(f"rank {rank} failed in the last loss")
        return [*_ddtas._read_scalars(written.cpu().numpy().tobytes()), *count_labels(labels)]

    def __reduce__(self) -> tuple[Any, ...]:
        return Engine, (self.threads, self.budget, self.allow_tf32)


SHARED = Engine()
"""The engine of calls without a module, and of exported programs, which do not keep their module. The first one: its key is the
same in every process."""


def engine_of(key: int) -> Engine:
    """The engine with that key; the shared one if its module was freed."""
    return _engines.get(key, SHARED)


def normalize_rows(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows at unit length, in float32 or float64, and two factors `[B, 1]` whose product is each row's norm."""
    wide = rows if rows.dtype == torch.float64 else rows.float()
    # Divided by the largest entry first, so that squares neither overflow nor underflow. The result does not depend on that
    # factor, so it needs no gradient. A row of zeros, or one that is not finite, stays so for the check to name.
    largest = wide.detach().abs().amax(dim=1, keepdim=True)
    largest = torch.where(torch.isfinite(largest) & (largest > 0), largest, 1)
    scaled = wide / largest
    length = torch.linalg.vector_norm(scaled, dim=1, keepdim=True).clamp_min(1e-12)
    return scaled / length, length, largest


def normalize_backward(gradient: Tensor, unit: Tensor, length: Tensor, largest: Tensor) -> Tensor:
    """dL/d(rows) from the gradient g with respect to the unit rows u: (g - (g . u) u) / |x|."""
    return (gradient - (gradient * unit).sum(1, keepdim=True) * unit) / length / largest


_NO_WEIGHTS = "this loss has no weights: take it out"
_THRESHOLDS = "the thresholds of this loss are lambda_pos and lambda_neg"
_INSTEAD = {
    "reducer": "the loss is the mean over the anchors; for another weight of rows leave some out by a negative label",
    "distance": "rows are compared by the cosine of their angle alone: take the distance out",
    "collector": "take it out: statistics are in the attribute `statistics`",
    "embedding_regularizer": "add the regularizer's loss to this one yourself",
    "embedding_reg_weight": "add the regularizer's loss to this one yourself",
    "miner": "this loss mines its own pairs, take the miner out",
    "weight_regularizer": _NO_WEIGHTS,
    "weight_reg_weight": _NO_WEIGHTS,
    "num_classes": _NO_WEIGHTS,
    "embedding_size": _NO_WEIGHTS,
    "temperature": "alpha is the sharpness on negatives, beta that on positives; start from their defaults",
    "triplets_per_anchor": "this loss mines its own pairs, take it out",
    "base": _THRESHOLDS,
    "margin": _THRESHOLDS,
    "pos_margin": "lambda_pos is the threshold of positives",
    "neg_margin": "lambda_neg is the threshold of negatives",
    "epsilon": "gamma is the tolerance of mining",
}


def refuse_arguments(name: str, others: dict[str, Any]) -> None:
    """Raises TypeError for an unknown argument; for one of pytorch-metric-learning's it names the replacement."""
    for argument in others:
        instead = _INSTEAD.get(argument)
        raise TypeError(f"{name} has no argument {argument}" + (f": {instead}" if instead else ""))


def check_tensor(name: str, given: Any) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(given).__name__}")
    if hasattr(given, "full_tensor"):
        raise TypeError(f"{name} must not be a DTensor: give its full_tensor(), or with group= its to_local()")
    if given.layout != torch.strided or given.is_nested:
        got = "a nested one" if given.is_nested else str(given.layout)
        raise TypeError(f"{name} must be a dense tensor, not {got}")


def check_labels(name: str, labels: Tensor) -> None:
    check_tensor(f"the {name}", labels)
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise TypeError(f"the {name} must be integers, not {str(labels.dtype).removeprefix('torch.')}: convert them by long()")
    if labels.dtype == torch.uint64 and labels.device.type != "meta" and not torch.compiler.is_compiling():
        # torch cannot compare uint64; viewed as int64, labels beyond int64 are negative.
        wrapped = labels.view(torch.int64)
        beyond = wrapped[wrapped < 0].tolist()
        if beyond:
            raise ValueError(f"label {beyond[0] + 2**64} of the {name} is beyond int64")


NOT_FINITE = torch.iinfo(torch.int64).min + 1
"""The label that a memory gives a row that is not finite. Not the smallest int64, which a NaN converts to."""


def count_labels(labels: Tensor) -> tuple[float, float]:
    """Number of rows with a negative label other than `NOT_FINITE`, and number of rows with `NOT_FINITE`."""
    negative, not_finite = int((labels < 0).sum()), int((labels == NOT_FINITE).sum())
    return float(negative - not_finite), float(not_finite)


def laid_out(tensor: Tensor) -> Tensor:
    """The tensor, or a copy: contiguous, aligned to its element size, without a pending negation."""
    tensor = tensor.contiguous()
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def check_pair(rows: Any, labels: Any, names: str = "references and reference_labels") -> None:
    """Checks that either both are given or neither."""
    if (rows is None) != (labels is None):
        raise ValueError(f"{names} belong together: give both or neither")


def check_side(name: str, embeddings: Tensor, labels: Tensor, labels_name: str) -> None:
    """Checks types and shapes of the rows and labels of one side."""
    check_tensor(f"the {name}", embeddings)
    if embeddings.ndim != 2:
        raise ValueError(f"the {name} must have 2 dimensions, rows and entries, not {embeddings.ndim}")
    check_labels(labels_name, labels)
    if labels.ndim != 1:
        raise ValueError(f"the {labels_name} must have 1 dimension, not {labels.ndim}")
    if labels.shape[0] != embeddings.shape[0]:
        raise ValueError(f"labels of the {name}: expected {embeddings.shape[0]}, got {labels.shape[0]}")
