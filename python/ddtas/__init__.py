"""Fused deep metric learning: mining, loss and gradient in passes that never store a B x B matrix.

`loss`, `threshold_gradient`, `evaluate`, `recall_at_k` and `Part` take NumPy arrays and DLPack tensors without a copy; their
rows must have unit length. `ddtas.torch` has the loss as a PyTorch module, which normalises the rows.
"""

from __future__ import annotations

try:
    from ._ddtas import Context, LossOutput, __version__, has_cuda
except ModuleNotFoundError as error:
    if error.name != f"{__name__}._ddtas":
        raise
    raise ImportError(
        f"{__path__[0]} is ddtas's source folder, without the compiled module: run `pip install .` in the clone, "
        "then import ddtas from another folder"
    ) from None
from .evaluation import Evaluation, evaluate
from .functional import Recall, ThresholdGradient, loss, recall_at_k, threshold_gradient
from .part import Part
from .settings import Settings

__all__ = [
    "Context",
    "Evaluation",
    "LossOutput",
    "Part",
    "Recall",
    "Settings",
    "ThresholdGradient",
    "__version__",
    "evaluate",
    "has_cuda",
    "loss",
    "recall_at_k",
    "threshold_gradient",
]
