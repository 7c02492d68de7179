"""What a test set is worth: Recall@K, R-precision, MAP@R and NMI, of all queries and of each class."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Iterable, NamedTuple

import numpy as np
import numpy.typing as npt

from ._ddtas import Context
from .functional import Identity, Labels, Matrix, Recall, context_of, depths_of

Figures = npt.NDArray[np.float64]


class PerClass(NamedTuple):
    """The figures of each class; a class without a query that can be answered is not there."""

    labels: npt.NDArray[np.int64]
    """The classes, ascending."""
    queries: npt.NDArray[np.int64]
    """Queries that were counted."""
    recall: dict[int, Figures]
    """Recall@K by K, an entry for each class."""
    r_precision: Figures
    """R-precision."""
    map_at_r: Figures
    """Mean average precision at R."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Figures from 0 to 1, means over the queries counted."""

    recall: Recall
    """Recall@K by K, how many queries were counted, and how many had nothing to find."""
    r_precision: float
    """R-precision (Musgrave et al., ECCV 2020)."""
    map_at_r: float
    """Mean average precision at R."""
    nmi: float | None
    """Normalized mutual information of classes and clusters, if it was asked for."""
    per_class: PerClass = dataclasses.field(repr=False)
    """The same of each class; their means are the averages of averages."""


def evaluate(
    embeddings: Matrix,
    labels: Labels,
    gallery: Matrix | None = None,
    gallery_labels: Labels | None = None,
    ks: Iterable[int] = (1, 2, 4, 8),
    *,
    identity: Identity | None = None,
    nmi: bool = False,
    seed: int = 0,
    context: Context | None = None,
) -> Evaluation:
    """Searches every row of `embeddings` among the others, or in a gallery, and judges what it finds.

    Rows have unit length: float32, float16 or bfloat16. `identity` says which rows of the gallery are the queries
    themselves, by numbers as in `loss`: a query is left out of its own list. Without it a query that is in the gallery
    finds itself, since none is recognised by its value. Equally similar rows are ranked by their place. Rows with a
    negative label are neither queries nor answers, and a query without an answer is not counted. `nmi` clusters all queries
    without a negative label, into as many clusters as they have classes, by at most 20 steps of k-means from `seed`, and is
    1 for one class; float32 only. Memory beside the rows grows with the number of queries alone.

    Raises what `loss` does.
    """
    context = context_of(context)
    depths = depths_of(ks)
    found = context.judge(embeddings, labels, gallery, gallery_labels, identity, depths)
    information = context.nmi(embeddings, labels, seed) if nmi else None
    return evaluation_of(found, sorted({int(depth) for depth in depths}), information)


def evaluation_of(
    found: tuple[Figures, Figures, Figures, npt.NDArray[np.int64]], depths: list[int], nmi: float | None
) -> Evaluation:
    """The means of what was found of each query."""
    first, r_precision, average_precision, labels = found
    counted = np.flatnonzero(~np.isnan(first))
    if not len(counted):
        warnings.warn(f"none of {len(first)} queries has an answer: Recall@K and the others are 0 of nothing", stacklevel=3)
    first, r_precision, average_precision = (values[counted] for values in (first, r_precision, average_precision))
    hits = {k: (first >= 0) & (first < k) for k in depths}
    classes, place, sizes = np.unique(labels[counted], return_inverse=True, return_counts=True)

    def by_class(values: npt.NDArray[np.generic]) -> Figures:
        sums: Figures = np.bincount(place, weights=values, minlength=len(classes)) / sizes
        return sums

    def mean(values: npt.NDArray[np.generic]) -> float:
        return float(np.sum(values) / max(len(counted), 1))

    per_class = PerClass(
        classes, sizes, {k: by_class(hit) for k, hit in hits.items()}, by_class(r_precision), by_class(average_precision)
    )
    shares = [(k, mean(hit)) for k, hit in hits.items()]
    recall = Recall(shares, len(counted), len(labels) - len(counted))
    return Evaluation(recall, mean(r_precision), mean(average_precision), nmi, per_class)
