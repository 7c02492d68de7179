from collections.abc import Sequence
from typing import TypeAlias, final

import numpy as np
import numpy.typing as npt

from .functional import Identity, Labels, Matrix
from .part import Counts, Part, Similarities
from .settings import Settings

__all__ = [
    "Context",
    "LossOutput",
    "__version__",
    "_initial_tolerances",
    "_normalize_backward_at",
    "_loss_at",
    "_norm_tolerance",
    "_read_scalars",
    "_refuse_row",
    "_normalize_at",
    "address_of",
    "check_settings",
    "has_cuda",
]

_Place: TypeAlias = tuple[int, int, int, int, int]
"""Addresses of rows and of int64 labels, number of rows, dimensions, and the type's code."""

__version__: str
has_cuda: bool
"""Whether this build supports tensors on a GPU."""

@final
class Context:
    """A workspace on the CPU, and the threads that compute in it.

    Calls on one context are serialized; two contexts compute concurrently. `threads=None` shares the process's pool, of
    `RAYON_NUM_THREADS` threads, else `OMP_NUM_THREADS`, else as many as cores. `budget` is an upper limit in bytes for pairs
    kept between the passes of a loss, by default 6 KiB for each row of either side; pairs that do not fit are computed again. The
    result depends on neither. A forked process gets a workspace and threads of its own.
    """

    def __new__(cls, threads: int | None = None, budget: int | None = None) -> Context: ...
    @property
    def threads(self) -> int:
        """Number of threads."""
    @property
    def workspace_bytes(self) -> int:
        """Size of the workspace in bytes, now."""
    def loss(
        self,
        embeddings: Matrix,
        labels: Labels,
        references: Matrix | None,
        reference_labels: Labels | None,
        identity: Identity | None,
        settings: Settings,
        reference_gradient: bool,
        check: bool,
    ) -> LossOutput: ...
    def query_metrics(
        self,
        queries: Matrix,
        labels: Labels,
        gallery: Matrix | None,
        gallery_labels: Labels | None,
        identity: Identity | None,
        ks: list[int],
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.int64]]: ...
    def nmi(self, rows: Matrix, labels: Labels, seed: int) -> float: ...
    def threshold_gradient(
        self,
        embeddings: Matrix,
        labels: Labels,
        tangent: Matrix,
        references: Matrix | None,
        reference_labels: Labels | None,
        reference_tangent: Matrix | None,
        identity: Identity | None,
        settings: Settings,
        check: bool,
    ) -> tuple[float, float]: ...
    def same_class(self, part: Part) -> tuple[npt.NDArray[np.float32], int, int, float, float]: ...
    def sweep(
        self, part: Part, min_pos: Similarities, reference_min_pos: Similarities | None
    ) -> tuple[npt.NDArray[np.float32], int]: ...
    def select(
        self,
        part: Part,
        max_neg: Similarities,
        reference_max_neg: Similarities | None,
        probe_neg: int,
        total_pos: int,
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32], float, float]: ...
    def gradient(
        self,
        part: Part,
        count_pos: Counts,
        count_neg: Counts,
        reference_count_pos: Counts | None,
        reference_count_neg: Counts | None,
    ) -> tuple[float, npt.NDArray[np.float32], int, float, float]: ...
    def part_threshold_gradient(
        self, part: Part, tangent: Matrix, reference_tangent: Matrix | None
    ) -> tuple[float, float]: ...
    def recall_at_k(
        self, embeddings: Matrix, labels: Labels, ks: list[int]
    ) -> tuple[list[tuple[int, float]], int, int]: ...

@final
class LossOutput:
    """Result of one loss evaluation."""

    @property
    def loss(self) -> float:
        """The loss, averaged over all B anchors."""
    @property
    def gradient(self) -> npt.NDArray[np.floating]:
        """dL/d(embeddings), `[B, D]`, float32; float64 for float64 rows."""
    @property
    def reference_gradient(self) -> npt.NDArray[np.floating] | None:
        """dL/d(references), `[N, D]`, if requested and there are references."""
    @property
    def gamma_pos(self) -> float:
        """Tolerance of positives, adapted to the batch; inf without mining."""
    @property
    def gamma_neg(self) -> float:
        """Tolerance of negatives, adapted to the batch; inf without mining."""
    @property
    def probe_neg(self) -> int:
        """Number of negatives that passed the probe, over all anchors."""
    @property
    def total_pos(self) -> int:
        """Number of ordered positive pairs in the batch."""
    @property
    def total_neg(self) -> int:
        """Number of ordered negative pairs in the batch."""
    @property
    def min_pos(self) -> npt.NDArray[np.floating]:
        """m+, `[B]`: smallest similarity of each anchor to a positive; inf without one."""
    @property
    def max_neg(self) -> npt.NDArray[np.floating]:
        """m-, `[B]`: largest similarity of each anchor to a negative; -inf without one."""
    @property
    def count_pos(self) -> npt.NDArray[np.uint32]:
        """`[B]`: number of mined positives of each anchor, inactive ones included (0 for those without mining)."""
    @property
    def count_neg(self) -> npt.NDArray[np.uint32]:
        """`[B]`: number of mined negatives of each anchor, inactive ones included (0 for those without mining)."""
    @property
    def active(self) -> int:
        """Number of anchors with mined positives and negatives: those that enter the loss."""
    @property
    def mined(self) -> tuple[int, int]:
        """Numbers of positive and negative pairs of active anchors."""
    @property
    def dloss_dlambda_pos(self) -> float:
        """dL/d(lambda_pos)."""
    @property
    def dloss_dlambda_neg(self) -> float:
        """dL/d(lambda_neg)."""
    @property
    def mean_pos(self) -> float:
        """Mean similarity of all positive pairs; NaN if there is none."""
    @property
    def mean_neg(self) -> float:
        """Mean similarity of all negative pairs; NaN if there is none."""

def check_settings(settings: Settings) -> None: ...
def address_of(embeddings: Matrix) -> int:
    """The address that rows are read from: that of the array itself, since nothing is copied."""

def _initial_tolerances(mining: str, numbers: Sequence[float]) -> tuple[float, float]:
    """Tolerances of positives and negatives before a batch adapts them."""

def _norm_tolerance(dtype: int) -> float:
    """How far the norm of a row of that type may be from 1."""

def _refuse_row(of_references: bool, row: int, square_sum: float) -> None:
    """Raises the error for a row that is not finite or not of unit length, by the sum of its squares."""

def _read_scalars(written: bytes) -> list[float]:
    """The statistics in a GPU's `LossScalars`, 120 bytes. Raises ValueError for a bad row."""

def _loss_at(
    context: Context,
    rows: _Place,
    references: _Place | None,
    identity: int,
    mining: str,
    numbers: Sequence[float],
    flags: tuple[bool, bool, bool],
) -> tuple[
    npt.NDArray[np.floating],
    npt.NDArray[np.floating],
    npt.NDArray[np.floating] | None,
    npt.NDArray[np.float64],
    list[float],
]: ...
def _normalize_at(context: Context, rows: _Place, unit: int) -> None: ...
def _normalize_backward_at(context: Context, rows: _Place, gradient: int) -> None: ...
