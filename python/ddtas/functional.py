"""Loss, threshold gradient and Recall@K of NumPy arrays and DLPack tensors in host memory."""

from __future__ import annotations

import sys
import threading
import warnings
from typing import Dict, Iterable, NamedTuple, Protocol, Tuple, Union

import numpy as np
import numpy.typing as npt

from ._ddtas import Context, LossOutput
from .settings import Settings


class SupportsDlpack(Protocol):
    """A tensor in host memory of any library with DLPack: torch, JAX, ..."""

    def __dlpack__(self) -> object: ...


Matrix = Union[npt.NDArray[np.floating], SupportsDlpack]
"""`[rows, dim]` in float32, float16, bfloat16 or float64, contiguous in row-major order."""
Labels = Union[npt.NDArray[np.integer], SupportsDlpack]
"""`[rows]`, integers. A row with a negative label is in no pair."""

Identity = Union[int, npt.NDArray[np.integer], SupportsDlpack]
"""Which references are the anchors themselves: the index of the reference that is anchor 0, if the other anchors follow it; or
an index for each anchor, `[B]`, with -1 for an anchor that is not among the references."""


class ThresholdGradient(NamedTuple):
    """d/dlambda of <dL/dE, tangent>, for fixed mined pairs."""

    pos: float
    """With respect to lambda_pos."""
    neg: float
    """With respect to lambda_neg."""


class Recall(Dict[int, float]):
    """A dict of Recall@K by K, with the number of queries that it is the mean over."""

    queries: int
    """Number of queries counted: those that have an answer."""
    without_match: int
    """Number of queries not counted: no other row has their class, or their label is negative."""

    def __init__(self, at: Iterable[Tuple[int, float]] = (), queries: int = 0, without_match: int = 0) -> None:
        super().__init__(at)
        self.queries = queries
        self.without_match = without_match


def warn(message: str) -> None:
    """Warns with the line of the first caller outside torch and this package."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "ddtas"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def recall_of(found: tuple[list[tuple[int, float]], int, int]) -> Recall:
    """`Recall` from the compiled module's tuple. Warns if no query was counted."""
    recall = Recall(*found)
    if recall.queries == 0:
        warn(f"none of {recall.without_match} rows has another row of its class: Recall@K is undefined, and given as 0")
    return recall


DEFAULTS: Settings = Settings()
_thread_local = threading.local()


def context_of(given: Context | None) -> Context:
    """The given context, or the calling thread's own, which is created in its first call."""
    if given is not None:
        if not isinstance(given, Context):
            raise TypeError(f"context must be a ddtas.Context, not {type(given).__name__}")
        return given
    context: Context | None = getattr(_thread_local, "context", None)
    if context is None:
        context = _thread_local.context = Context()
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
    """Mines the batch, and computes the soft contrastive loss and its gradient.

    `embeddings` `[B, D]` are compared with each other, or with `references` `[N, D]` of the same type (a memory bank). Rows must
    have unit length: norms may differ from 1 by 0.001, in float16 by 0.002, in bfloat16 by 0.01. `check=False` skips the check
    for that and for NaN; bad rows then give a meaningless loss. float64 rows are for gradient checks: the scalar reference
    computes them in float64, and stores B x N matrices.

    No row makes a pair with itself. `identity` says which references are the anchors themselves: the index of the reference that
    is anchor 0, if the other anchors follow it, or an index for each anchor, `[B]`, -1 for none. Without it the loss recognises
    exact duplicates, which is enough if both sides hold the same bits.

    The output's `gradient` is `[B, D]` in float32 (float64 for float64 rows). `reference_gradient=True` also computes its
    `reference_gradient`, `[N, D]`, if there are references.

    Raises ValueError for wrong shapes or labels and for bad rows, TypeError for wrong types.
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
    """Derivative of <dL/dE, tangent> by the two loss thresholds, along which the method's threshold generator descends.

    `tangent` is `[B, D]` in float32 (in float64 for float64 rows), `reference_tangent` `[N, D]`: zeros by default, and unused
    without references. The other arguments are those of `loss`.

    Raises what `loss` does.
    """
    _check_settings(settings)
    context = context_of(context)
    return ThresholdGradient(
        *context.threshold_gradient(
            embeddings, labels, tangent, references, reference_labels, reference_tangent, identity, settings, check
        )
    )


def single(rows: Matrix) -> Matrix:
    """float64 arrays in float32, in which rows are searched; anything else as it is."""
    if isinstance(rows, np.ndarray) and rows.dtype.kind == "f" and rows.dtype.itemsize == 8:
        return rows.astype(np.float32)
    return rows


def recall_at_k(
    embeddings: Matrix, labels: Labels, ks: Iterable[int] = (1, 2, 4, 8), *, context: Context | None = None
) -> Recall:
    """Recall@K: the share of rows with a row of their class among their K nearest others, for each K in `ks`.

    No B x B matrix is stored. Rows without another row of their class, and rows with a negative label, are not counted: the
    result's `without_match` is their number, `queries` that of the counted rows. A K larger than the number of other rows counts
    all of them.

    float64 arrays are compared in float32. Raises what `loss` does.
    """
    context = context_of(context)
    return recall_of(context.recall_at_k(single(embeddings), labels, depths_of(ks)))
