"""What computes a tensor's loss, and the checks before it."""

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
    """Where calls compute, freed with the module that has it. A copy or a pickle starts with an empty workspace."""

    def __init__(self, threads: int | None = None, budget: int | None = None, allow_tf32: bool = False) -> None:
        self.threads, self.budget, self.allow_tf32 = threads, budget, allow_tf32
        if budget is not None and not isinstance(budget, SupportsIndex):
            raise TypeError(f"workspace_budget = {budget!r} must be an integer")
        if budget is not None and not 0 <= budget < 2**64:
            raise ValueError(f"workspace_budget = {budget} is out of range: bytes, 0 to 2^64 - 1")
        self.host = _ddtas.Context(threads, budget)
        # Made for the first tensor in a GPU's memory; only a build with the feature `cuda` has the type.
        self.gpu: Any = None
        # What the last loss found: numbers, or where a GPU writes them, and the labels of the anchors.
        self.last: list[float] | tuple[Tensor, Tensor] | None = None
        # An operator takes numbers and tensors: this stands for the engine.
        self.key = next(_keys)
        _engines[self.key] = self

    def on_gpu(self, rows: Tensor) -> tuple[Any, int]:
        """Where rows in a GPU's memory are computed with, and torch's stream there."""
        if not _ddtas.has_cuda:
            raise RuntimeError(_NO_CUDA)
        if self.gpu is None:
            self.gpu = getattr(_ddtas, "CudaContext")(self.budget, self.allow_tf32)
        # What torch's compiled programs call: no object is made of the stream.
        stream: int = getattr(torch._C, "_cuda_getCurrentRawStream")(rows.get_device())
        return self.gpu, stream

    def found(self) -> list[float] | None:
        """The statistics of the last loss; `None` before the first.

        Raises ValueError for a bad row, which on a GPU nobody has waited for.
        """
        if not isinstance(self.last, tuple):
            return self.last
        written, labels = self.last
        return [*_ddtas._read_scalars(written.cpu().numpy().tobytes()), *count_labels(labels)]

    def searcher(self, rows: Tensor) -> Any:
        """What stands where a `Context` does in an evaluation, and searches on the GPU of the rows."""
        return _Searcher(self, rows)

    def __reduce__(self) -> tuple[Any, ...]:
        return Engine, (self.threads, self.budget, self.allow_tf32)


class _Searcher:
    def __init__(self, engine: Engine, rows: Tensor) -> None:
        self.gpu, stream = engine.on_gpu(rows)
        self.place, self.nmi = (rows.device.index, stream), engine.host.nmi

    def judge(self, *given: Any) -> Any:
        return self.gpu.judge(self.place, *given)


SHARED = Engine()
"""For calls without a module, and for exported programs, whose module is gone."""


def engine_of(key: int) -> Engine:
    """The engine with that number, if its module still lives."""
    return _engines.get(key, SHARED)


def normalize_rows(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows at unit length in float32 at least, and the two factors of their lengths, `[B, 1]`."""
    wide = rows if rows.dtype == torch.float64 else rows.float()
    # Squares of large or small entries would overflow or vanish: by the largest entry first, a constant that the
    # result does not depend on. A row of zeros or with a NaN stays one, for the check to name.
    largest = wide.detach().abs().amax(dim=1, keepdim=True)
    largest = torch.where(torch.isfinite(largest) & (largest > 0), largest, 1)
    scaled = wide / largest
    length = torch.linalg.vector_norm(scaled, dim=1, keepdim=True).clamp_min(1e-12)
    return scaled / length, length, largest


def normalize_backward(gradient: Tensor, unit: Tensor, length: Tensor, largest: Tensor) -> Tensor:
    """dL/d(rows) from the gradient by the rows at unit length: (g - (g . u) u) / |x|."""
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
    """Refuses pytorch-metric-learning's arguments and names the replacement."""
    for argument in others:
        instead = _INSTEAD.get(argument)
        raise TypeError(f"{name} has no argument {argument}" + (f": {instead}" if instead else ""))


def check_tensor(name: str, given: Any) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(given).__name__}")
    if given.layout != torch.strided or given.is_nested:
        got = "a nested one" if given.is_nested else str(given.layout)
        raise TypeError(f"{name} must be a dense tensor, not {got}")


def check_labels(name: str, labels: Tensor) -> None:
    check_tensor(f"the {name}", labels)
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise TypeError(f"the {name} must be integers, not {str(labels.dtype).removeprefix('torch.')}")
    if labels.dtype == torch.uint64 and labels.device.type != "meta" and not torch.compiler.is_compiling():
        # torch orders no uint64, and as int64 they wrap.
        wrapped = labels.view(torch.int64)
        beyond = wrapped[wrapped < 0].tolist()
        if beyond:
            raise ValueError(f"label {beyond[0] + 2**64} of the {name} is beyond int64")


NOT_FINITE = torch.iinfo(torch.int64).min + 1
"""The label that a memory gives a row which is not finite; the smallest is what a NaN becomes as an integer."""


def count_labels(labels: Tensor) -> tuple[float, float]:
    """How many rows have a negative label, and how many a memory found not to be finite."""
    negative, not_finite = int((labels < 0).sum()), int((labels == NOT_FINITE).sum())
    return float(negative - not_finite), float(not_finite)


def laid_out(tensor: Tensor) -> Tensor:
    """The tensor row-major without gaps, at an address that its type can be read from."""
    tensor = tensor.contiguous()
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def check_pair(rows: Any, labels: Any, names: str = "references and reference_labels") -> None:
    """Both or neither."""
    if (rows is None) != (labels is None):
        raise ValueError(f"{names} belong together: give both or neither")


def check_side(name: str, embeddings: Tensor, labels: Tensor, labels_name: str) -> None:
    """Refuses what would be read otherwise than it was meant, or not at all."""
    check_tensor(f"the {name}", embeddings)
    if embeddings.ndim != 2:
        raise ValueError(f"the {name} must have 2 dimensions, rows and entries, not {embeddings.ndim}")
    check_labels(labels_name, labels)
    if labels.ndim != 1:
        raise ValueError(f"the {labels_name} must have 1 dimension, not {labels.ndim}")
    if labels.shape[0] != embeddings.shape[0]:
        raise ValueError(f"labels of the {name}: expected {embeddings.shape[0]}, got {labels.shape[0]}")
