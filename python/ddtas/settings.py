"""Settings of mining and loss, by default those of the paper."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, SupportsFloat, SupportsIndex

from . import _ddtas

Mining = Literal["none", "symmetric", "asms", "at-asms"]


@dataclass(frozen=True)
class Settings:
    """Settings of mining and of the soft contrastive loss. The formulas are in docs/method.md.

    Args:
        mining: "none" keeps all pairs of an anchor that has positives and negatives; "symmetric" mines with one tolerance
            for both, "asms" with a smaller one for negatives, "at-asms" (default) with both adapted to the batch.
        gamma: tolerance of mining, a cosine similarity, 0 to 2. Default 0.1.
        negative_ratio: tolerance of negatives divided by gamma, 0 to 10; for "asms" and "at-asms". Default 0.1.
        probe_ratio: tolerance, divided by gamma, of the probe that counts hard negatives, 0 to 10; for "at-asms". Default
            0.1; the authors' released code has 1.
        tolerance: factor k, how far "at-asms" moves the tolerances, 0 to 1. Default 0.5.
        alpha: sharpness of the loss on negatives, above 0, at most 10,000. Default 40. `beta` in pytorch-metric-learning.
        beta: sharpness of the loss on positives, above 0, at most 10,000. Default 2. `alpha` in pytorch-metric-learning.
        lambda_pos: loss threshold of positives, a cosine similarity, -2 to 2. Default 0.7.
        lambda_neg: loss threshold of negatives, -2 to 2. Default 0.7.

    Raises ValueError for a value out of range, TypeError for one of the wrong type. `dataclasses.replace` makes a changed copy.
    """

    mining: Mining = "at-asms"
    gamma: float = 0.1
    negative_ratio: float = 0.1
    probe_ratio: float = 0.1
    tolerance: float = 0.5
    alpha: float = 40.0
    beta: float = 2.0
    lambda_pos: float = 0.7
    lambda_neg: float = 0.7

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "mining":
                if not isinstance(value, str):
                    raise TypeError(f"mining must be a string, not {type(value).__name__}")
            # Refuses strings, which float() would accept: they have no __float__.
            elif not isinstance(value, (SupportsFloat, SupportsIndex)):
                raise TypeError(f"{field.name} must be a number, not {type(value).__name__}")
        _ddtas.check_settings(self)
