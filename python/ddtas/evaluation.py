"""Evaluation of embeddings: Recall@K, R-precision, MAP@R and NMI, over all queries and by class."""

from __future__ import annotations

import dataclasses
from typing import Iterable, NamedTuple

import numpy as np
import numpy.typing as npt

from ._ddtas import Context
from .functional import Identity, Labels, Matrix, Recall, context_of, depths_of, single, warn

Figures = npt.NDArray[np.float64]


class PerClass(NamedTuple):
    """Metrics of each class, as arrays with an entry for each class; classes without a counted query are left out."""

    labels: npt.NDArray[np.int64]
    """Labels of the classes, ascending."""
    queries: npt.NDArray[np.int64]
    """Number of queries counted in each class."""
    recall: dict[int, Figures]
    """Recall@K by K."""
    r_precision: Figures
    """R-precision."""
    map_at_r: Figures
    """Mean average precision at R."""

    def __eq__(self, other: object) -> bool:
        """Whether all figures are the same. Tuples of arrays cannot be compared otherwise."""
        if not isinstance(other, PerClass) or list(self.recall) != list(other.recall):
            return False
        return all(np.array_equal(mine, its) for mine, its in zip(self._arrays(), other._arrays()))

    def __ne__(self, other: object) -> bool:
        return not self == other

    def _arrays(self) -> list[npt.NDArray[np.generic]]:
        return [self.labels, self.queries, self.r_precision, self.map_at_r, *self.recall.values()]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Metrics from 0 to 1. All but `nmi` are means over the counted queries."""

    recall: Recall
    """Recall@K by K, with the numbers of queries counted (`queries`) and not counted (`without_match`)."""
    r_precision: float
    """R-precision (Musgrave et al., ECCV 2020)."""
    map_at_r: float
    """Mean average precision at R."""
    nmi: float | None
    """Normalized mutual information of classes and clusters; None unless requested."""
    per_class: PerClass = dataclasses.field(repr=False)
    """The same metrics by class; their means over the classes are the "average of averages" of pytorch-metric-learning."""


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
    """Searches for each row of `embeddings` among the other rows, or in a gallery, and returns the retrieval metrics.

    Rows must have unit length, in float32, float16 or bfloat16; float64 arrays are compared in float32. `identity` says which
    gallery rows are the queries themselves, as in `loss`; a query is left out of its own list. Without it a query that is in the
    gallery finds itself: duplicates are not recognised. Equally similar rows are ranked by their index. Rows with a negative label
    are neither queries nor answers, and queries without an answer are not counted. With `nmi=True` all queries without a negative
    label are clustered by k-means, with as many clusters as they have classes, at most 20 iterations, and centres drawn with
    `seed`; float32 only. NMI is 1 if there is one class. Besides the rows, memory grows with the number of queries only.

    Raises what `loss` does.
    """
    context = context_of(context)
    depths = depths_of(ks)
    embeddings, gallery = single(embeddings), None if gallery is None else single(gallery)
    found = context.query_metrics(embeddings, labels, gallery, gallery_labels, identity, depths)
    information = context.nmi(embeddings, labels, seed) if nmi else None
    return evaluation_of(found, depths, information)


def evaluation_of(
    found: tuple[Figures, Figures, Figures, npt.NDArray[np.int64]], depths: list[int], nmi: float | None
) -> Evaluation:
    """The `Evaluation` from the metrics of each query. Warns if no query was counted."""
    first, r_precision, average_precision, labels = found
    counted = np.flatnonzero(~np.isnan(first))
    if not len(counted):
        warn(f"none of {len(first)} queries has an answer: Recall@K and the other metrics are undefined, and given as 0")
    first, r_precision, average_precision = (values[counted] for values in (first, r_precision, average_precision))
    hits = {k: (first >= 0) & (first < k) for k in sorted({int(depth) for depth in depths})}
    classes, class_of, sizes = np.unique(labels[counted], return_inverse=True, return_counts=True)

    def by_class(values: npt.NDArray[np.generic]) -> Figures:
        sums: Figures = np.bincount(class_of, weights=values, minlength=len(classes)) / sizes
        return sums

    def mean(values: npt.NDArray[np.generic]) -> float:
        return float(np.sum(values) / max(len(counted), 1))

    per_class = PerClass(
        classes, sizes, {k: by_class(hit) for k, hit in hits.items()}, by_class(r_precision), by_class(average_precision)
    )
    shares = [(k, mean(hit)) for k, hit in hits.items()]
    recall = Recall(shares, len(counted), len(labels) - len(counted))
    return Evaluation(recall, mean(r_precision), mean(average_precision), nmi, per_class)
