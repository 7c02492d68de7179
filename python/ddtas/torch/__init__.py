"""The loss as modules of PyTorch, where pytorch-metric-learning's loss, miner and memory stand.

`SoftContrastiveLoss` mines by itself, so the miner goes. `CrossBatchMemory` compares a batch with the rows of earlier
ones. Tensors are read where they lie, and gradients handed over without a copy, on the processor and, in a build with
the feature `cuda`, on the GPU.
"""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError(
        "ddtas.torch needs PyTorch 2.11 or newer: run `pip install torch`, or `pip install '.[torch]'` in the clone"
    ) from None

from .loss import SoftContrastiveLoss
from .memory import CrossBatchMemory
from .search import evaluate, recall_at_k, threshold_gradient

__all__ = ["CrossBatchMemory", "SoftContrastiveLoss", "evaluate", "recall_at_k", "threshold_gradient"]
