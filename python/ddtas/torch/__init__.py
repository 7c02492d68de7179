"""PyTorch modules that replace pytorch-metric-learning's loss, miner and memory.

`SoftContrastiveLoss` mines its own pairs, and needs no miner. `CrossBatchMemory` compares a batch with rows of earlier
batches. `ThresholdGenerator` learns the loss thresholds during training. Tensors and gradients are not copied, on the CPU and,
in a build with the feature `cuda`, on a GPU.
"""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError(
        "ddtas.torch needs PyTorch 2.11 or newer: run `pip install torch`, or `pip install '.[torch]'` in the clone"
    ) from None

from .generator import ThresholdGenerator
from .loss import SoftContrastiveLoss
from .memory import CrossBatchMemory
from .search import evaluate, recall_at_k, threshold_gradient

__all__ = ["CrossBatchMemory", "SoftContrastiveLoss", "ThresholdGenerator", "evaluate", "recall_at_k", "threshold_gradient"]
