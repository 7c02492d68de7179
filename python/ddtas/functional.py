"""The calls that compute, on NumPy arrays and tensors in the host's memory."""

from __future__ import annotations

import threading
import warnings
from typing import Dict, Iterable, NamedTuple, Protocol, Tuple, Union

import numpy as np
import numpy.typing as npt

from ._ddtas import Context, LossOutput
from .settings import Settings


class SupportsDlpack(Protocol):
    """A tensor of torch, JAX, CuPy, ..."""

    def __dlpack__(self) -> object: ...


Matrix = Union[npt.NDArray[np.floating], SupportsDlpack]
"""`[rows, dim]` in float32, float16, bfloat16 or float64, row-major without gaps."""
Labels = Union[npt.NDArray[np.integer], SupportsDlpack]
"""`[rows]`, integers; a negative label takes its row out of every pair."""

Identity = Union[int, npt.NDArray[np.integer], SupportsDlpack]
"""Which references are the anchors themselves: the number of the one that is anchor 0, if the others follow it; or `[B]`
numbers, -1 for an anchor that is not among the references."""


class ThresholdGradient(NamedTuple):
    """d/dlambda of <dL/dE, tangent>, the mined pairs held fixed."""

    pos: float
    """Through lambda_pos."""
    neg: float
    """Through lambda_neg."""


class Recall(Dict[int, float]):
    """Recall@K by K, and what it is the mean of. A plain dict otherwise."""

    queries: int
    """Rows that were counted."""
    without_match: int
    """Rows that had nothing to find: alone in their class, or with a negative label. They are not counted."""

    def __init__(self, at: Iterable[Tuple[int, float]] = (), queries: int = 0, without_match: int = 0) -> None:
        super().__init__(at)
        self.queries = queries
        self.without_match = without_match


def recall_of(found: tuple[list[tuple[int, float]], int, int]) -> Recall:
    """What the compiled module found; a figure over no query at all is said to be one."""
    recall = Recall(*found)
    if recall.queries == 0:
        warnings.warn(
            f"none of {recall.without_match} rows has another of its class: Recall@K is 0 of nothing", stacklevel=3
        )
    return recall


DEFAULTS: Settings = Settings()
_of_thread = threading.local()


def context_of(given: Context | None) -> Context:
    """The one that was given, or the calling thread's own, made on its first call."""
    if given is not None:
        # Another has the way of one that searches on a GPU.
        if not hasattr(given, "judge"):
            raise TypeError(f"context must be a ddtas.Context, not {type(given).__name__}")
        return given
    context: Context | None = getattr(_of_thread, "context", None)
    if context is None:
        context = _of_thread.context = Context()
    return context


def _check_settings(settings: Settings) -> None:
    if not isinstance(settings, Settings):
        raise TypeError(f"settings must be a ddtas.Settings, not {type(settings).__name__}")


def depths_of(ks: Iterable[int]) -> list[int]:
    if not isinstance(ks, Iterable):
        raise TypeError(f"ks must be numbers such as (1, 2, 4), not {ks!r}")
    return list(ks)


def loss(
    embeddings: Matrix,
    labels: Labels,
    references: Matrix | None = None,
    reference_labels: Labels | None = None,
    *,
    identity: Identity | None = None,
    settings: Settings = DEFAULTS,
    reference_gradient: bool = False,
    check: bool = True,
    context: Context | None = None,
) -> LossOutput:
    """Mines the batch, and evaluates the soft contrastive loss and its gradient.

    `embeddings` `[B, D]`, rows of unit length, are compared with each other, or with `references` `[N, D]` of the same type
    (a memory bank). `identity` says which references are anchors themselves, and so no pairs of themselves: the number of
    the reference that is anchor 0, if the others follow it, or `[B]` numbers with -1 for none. Without it they are known by
    their value, which serves where both sides hold the same bits. The output's `gradient` is `[B, D]` float32;
    `reference_gradient=True` also gives `[N, D]` where there are references. float64 rows are served in float64 by the
    scalar reference, which stores B x N matrices: for gradient checks. Lengths may be off 1 by 0.001, by 0.002 in float16
    and by 0.01 in bfloat16. `check=False` skips the check for NaN and unit length; other rows then give a meaningless loss.

    Raises ValueError for shapes, labels or rows that do not fit, TypeError for other types than those named.
    """
    _check_settings(settings)
    context = context_of(context)
    return context.loss(
        embeddings, labels, references, reference_labels, identity, settings, reference_gradient, check
    )


def threshold_gradient(
    embeddings: Matrix,
    labels: Labels,
    tangent: Matrix,
    references: Matrix | None = None,
    reference_labels: Labels | None = None,
    reference_tangent: Matrix | None = None,
    *,
    identity: Identity | None = None,
    settings: Settings = DEFAULTS,
    check: bool = True,
    context: Context | None = None,
) -> ThresholdGradient:
    """How <dL/dE, tangent> changes with the two loss thresholds: what the threshold generator descends along.

    `tangent` is `[B, D]`, float32 (float64 beside float64 rows); `reference_tangent`, `[N, D]`, is zero if left out,
    and unused in the square form.

    Raises what `loss` does.
    """
    _check_settings(settings)
    context = context_of(context)
    return ThresholdGradient(
        *context.threshold_gradient(
            embeddings, labels, tangent, references, reference_labels, reference_tangent, identity, settings, check
        )
    )


def recall_at_k(
    embeddings: Matrix, labels: Labels, ks: Iterable[int] = (1, 2, 4, 8), *, context: Context | None = None
) -> Recall:
    """Share of rows whose K nearest others hold one of their class, for every K, without the B x B matrix.

    Rows without another row of their class, and those with a negative label, are not counted: the answer's
    `without_match` says how many, and `queries` how many were. A K beyond the other rows is answered by all of them.

    Raises what `loss` does; float64 rows are a TypeError.
    """
    context = context_of(context)
    return recall_of(context.recall_at_k(embeddings, labels, depths_of(ks)))
