"""Settings of mining and loss; the defaults are the paper's."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, SupportsFloat, SupportsIndex

from . import _ddtas

Mining = Literal["none", "symmetric", "asms", "at-asms"]


@dataclass(frozen=True)
class Settings:
    """Which pairs enter the loss, and how much each of them weighs.

    Out of range values raise ValueError, other types TypeError. `dataclasses.replace` makes a changed copy.
    """

    mining: Mining = "at-asms"
    """`none` keeps every pair, `symmetric` has one tolerance, `asms` two, `at-asms` adapts both to the batch."""
    gamma: float = 0.1
    """Tolerance of mining, in units of cosine similarity, 0 to 2."""
    negative_ratio: float = 0.1
    """Tolerance of negatives over gamma, under `asms` and `at-asms`, 0 to 10."""
    probe_ratio: float = 0.1
    """Tolerance of the probe over gamma, 0 to 10; the authors' released code has 1."""
    tolerance: float = 0.5
    """Factor k of the adaptation, 0 to 1."""
    alpha: float = 40.0
    """Sharpness of the negative term, above 0."""
    beta: float = 2.0
    """Sharpness of the positive term, above 0."""
    lambda_pos: float = 0.7
    """Loss threshold of the positive term, a cosine similarity, -2 to 2."""
    lambda_neg: float = 0.7
    """Loss threshold of the negative term, -2 to 2."""

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
