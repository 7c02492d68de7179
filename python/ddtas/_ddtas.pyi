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
    "_refuse_anchor",
    "_normalize_at",
    "address_of",
    "check_settings",
    "has_cuda",
]

_Place: TypeAlias = tuple[int, int, int, int, int]

__version__: str
has_cuda: bool
"""Whether this build serves tensors in the GPU's memory."""

@final
class Context:
    """A workspace on the processor, and the threads that compute in it.

    Calls on one context take turns; two contexts compute side by side. `threads=None` shares the process's pool, as
    many threads as cores. `budget` is the most bytes that are kept between the passes of a loss, 6 KiB for each row of either side if left out;
    what does not fit is computed again. The result depends on neither. A forked process computes in a workspace
    and with threads of its own.
    """

    def __new__(cls, threads: int | None = None, budget: int | None = None) -> Context: ...
    @property
    def threads(self) -> int:
        """Threads that compute."""
    @property
    def workspace_bytes(self) -> int:
        """Bytes the workspace holds now."""
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
    def judge(
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
        """dL/d(references), `[N, D]`, if it was asked for and there are references."""
    @property
    def gamma_pos(self) -> float:
        """Tolerance of positives in force, after adaptation; inf without mining."""
    @property
    def gamma_neg(self) -> float:
        """Tolerance of negatives in force, after adaptation; inf without mining."""
    @property
    def probe_neg(self) -> int:
        """Negatives that passed the probe, over all anchors."""
    @property
    def total_pos(self) -> int:
        """Ordered positive pairs of the batch."""
    @property
    def total_neg(self) -> int:
        """Ordered negative pairs of the batch."""
    @property
    def min_pos(self) -> npt.NDArray[np.floating]:
        """Smallest similarity to a positive, an entry per anchor; inf without one."""
    @property
    def max_neg(self) -> npt.NDArray[np.floating]:
        """Largest similarity to a negative, an entry per anchor; -inf without one."""
    @property
    def count_pos(self) -> npt.NDArray[np.uint32]:
        """Mined positives of every anchor, inactive ones included (0 there without mining)."""
    @property
    def count_neg(self) -> npt.NDArray[np.uint32]:
        """Mined negatives of every anchor, inactive ones included (0 there without mining)."""
    @property
    def active(self) -> int:
        """Anchors with mined pairs of both kinds: those that enter the loss."""
    @property
    def mined(self) -> tuple[int, int]:
        """Positive and negative pairs of active anchors."""
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
    """The address that rows are read from: the array's own, since nothing is copied."""

def _initial_tolerances(mining: str, numbers: Sequence[float]) -> tuple[float, float]:
    """Tolerances of positives and negatives before a batch adapts them."""

def _norm_tolerance(dtype: int) -> float:
    """How far the norm of a row of that type may be from 1."""

def _refuse_anchor(row: int, square_sum: float) -> None:
    """Raises what a row that is not finite or not of unit length is refused with."""

def _read_scalars(written: bytes) -> list[float]:
    """The numbers that a GPU has written of a loss. Raises ValueError for a bad row."""

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
