"""Fused deep metric learning: mining, loss and gradient in passes that never store a B x B matrix.

`loss`, `threshold_gradient` and `recall_at_k` take NumPy arrays, and tensors by DLPack, without a copy; `ddtas.torch`
has the loss as a module of PyTorch. Rows must have unit length here; the module normalises.
"""

from __future__ import annotations

from ._ddtas import Context, LossOutput, __version__, has_cuda
from .functional import ThresholdGradient, loss, recall_at_k, threshold_gradient
from .settings import Settings

__all__ = [
    "Context",
    "LossOutput",
    "Settings",
    "ThresholdGradient",
    "__version__",
    "has_cuda",
    "loss",
    "recall_at_k",
    "threshold_gradient",
]
