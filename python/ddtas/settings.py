"""Settings of mining and loss; the defaults are the paper's."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, SupportsFloat, SupportsIndex

from . import _ddtas

Mining = Literal["none", "symmetric", "asms", "at-asms"]


@dataclass(frozen=True)
class Settings:
    """Which pairs enter the loss, and how much each of them weighs. The formulas are in docs/method.md.

    Args:
        mining: "none" keeps every pair of an anchor with pairs of both kinds; "symmetric" has one tolerance for both kinds,
            "asms" a smaller one for negatives, "at-asms" (default) adapts both to the batch.
        gamma: tolerance of mining, a cosine similarity, 0 to 2. Default 0.1.
        negative_ratio: tolerance of negatives over gamma, 0 to 10; for "asms" and "at-asms". Default 0.1.
        probe_ratio: tolerance over gamma of the probe that counts hard negatives, 0 to 10; for "at-asms". Default 0.1; the
            authors' released code has 1.
        tolerance: factor k, how far "at-asms" moves the tolerances, 0 to 1. Default 0.5.
        alpha: sharpness of the loss on negatives, above 0, at most 10,000. Default 40. pytorch-metric-learning's `beta`.
        beta: sharpness of the loss on positives, above 0, at most 10,000. Default 2. pytorch-metric-learning's `alpha`.
        lambda_pos: loss threshold of positives, a cosine similarity, -2 to 2. Default 0.7.
        lambda_neg: loss threshold of negatives, -2 to 2. Default 0.7.

    A value out of range raises ValueError, one of another type TypeError. `dataclasses.replace` makes a changed copy.
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
            # A string has no __float__, though float() takes it.
            elif not isinstance(value, (SupportsFloat, SupportsIndex)):
                raise TypeError(f"{field.name} must be a number, not {type(value).__name__}")
        _ddtas.check_settings(self)
