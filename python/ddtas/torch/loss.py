"""The loss as a module of PyTorch, where pytorch-metric-learning's loss and miner stand."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from functools import partial
from typing import Any, Literal, SupportsFloat, SupportsIndex

import torch
from torch import Tensor, nn

from ..settings import Mining, Settings
from .engine import NO_INDICES, Engine, check_labels, check_pair, check_side, normalize_rows, refuse_arguments
from .operator import CHECKED, STATISTICS, UNCHECKED, WAITED_FOR, check_one_device, loss_of
from .parts import loss_of_ranks
from .ranks import Ranks, Scale, Telling, between_graphs

Check = bool | Literal["wait"]
_POS, _NEG = STATISTICS.index("total_pos"), STATISTICS.index("total_neg")


def _setting(name: str) -> Any:
    """An attribute of the loss that reads one of its settings, and changes it for the calls to come."""

    def change(loss: SoftContrastiveLoss, value: Any) -> None:
        _refuse_learned(**{name: value})
        loss.settings = dataclasses.replace(loss.settings, **{name: value})

    return property(lambda loss: getattr(loss.settings, name), change, doc=f"`{name}` of the settings.")


class SoftContrastiveLoss(nn.Module):
    """AT-ASMS mining and the soft contrastive loss, in one pass that stores no B x B matrix. The formulas are in docs/method.md.

    Stands where `MultiSimilarityLoss()` and its miner stand. Called as `loss(embeddings, labels)` it returns a scalar
    tensor: float32, or float64 for float64 embeddings, which the scalar reference serves (for `gradcheck`).

    alpha and beta have the opposite roles in pytorch-metric-learning's `MultiSimilarityLoss`: its `beta` is for negatives.

    Args:
        alpha: sharpness of the loss on negatives, above 0, at most 10,000. Default 40.
        beta: sharpness of the loss on positives, above 0, at most 10,000. Default 2.
        lambda_pos: loss threshold of positives, a cosine similarity, -2 to 2. Default 0.7. A number, or a tensor of one
            element: one that requires a gradient gets dL/dlambda. Descent on it alone lowers the loss without a better
            embedding; `ddtas.torch.threshold_gradient` is the method's own way.
        lambda_neg: loss threshold of negatives, the same otherwise. Default 0.7.
        gamma: tolerance of mining, a cosine similarity, 0 to 2. Default 0.1.
        mining: "none" keeps every pair of an anchor with pairs of both kinds; "symmetric" has one tolerance for both kinds,
            "asms" a smaller one for negatives, "at-asms" (default) adapts both to the batch.
        negative_ratio: tolerance of negatives over gamma, 0 to 10; for "asms" and "at-asms". Default 0.1.
        probe_ratio: tolerance over gamma of the probe that counts hard negatives, 0 to 10; for "at-asms". Default 0.1; the
            authors' released code has 1.
        tolerance: factor k, how far "at-asms" moves the tolerances, 0 to 1. Default 0.5.
        normalize_embeddings: False is for rows that have unit length already. Default True.
        check: whether a NaN, an infinity or a row without a direction raises ValueError. Default True. False raises for none,
            as a gradient scaler expects: the gradient of such a row is NaN, the loss need not be. On a GPU nobody waits for
            the check: a bad row makes loss and gradient NaN, and `check()` or reading `statistics` raises; "wait" raises at
            once.
        threads: how many compute on the processor, 1 to 1,024. Default None: as many as cores. The result does not depend
            on it.
        workspace_budget: the most bytes that a loss keeps between its passes. Default None: 6 KiB for each row on the
            processor, a quarter of the free memory on a GPU. What does not fit is computed again, with the same result.
        allow_tf32: True lets a GPU multiply float32 rows to TF32's precision, for a third of the work: every entry is
            rounded to 11 bits (float16; below 6e-5 to an absolute 3e-8), and products are summed in float32. Default False;
            the processor always computes in float32.
        group: a `torch.distributed.ProcessGroup`, whose processes' rows become one batch: each process calls the loss with
            its own rows, and gets the loss of the whole batch. What is wrong in one process raises in all of them. Default
            None; a group of one is no group.
        uneven: True allows each process of the group another number of rows, perhaps none. Default False.
        gradient: "mean" (default) multiplies the gradient of a process's rows by the number of processes, so that the mean
            that DistributedDataParallel takes is one process's gradient; "sum" is the gradient itself.

    A batch without rows, or without references, has a loss of 0 and a gradient of zeros.

    `statistics` holds what the last call mined: active anchors, pairs, tolerances, mean similarities, how many anchors had a
    negative label (`ignored`), how many a `CrossBatchMemory` left out since they were not finite (`not_finite`), and 1 minus
    the smaller mean similarity (`spread`): below 1e-4 all rows are nearly equal, and the method gives a loss of 0 whether or
    not anything was learned. The first batch with one of the last three is warned of; where a call is compiled, or computes on
    a GPU, when `statistics` is read. Where a call is neither, the first batch without two rows of one class, or with rows of
    one class alone, is warned of as well.

    Settings can be changed between calls: `loss.alpha = 20`, and so on for `mining`, the tolerances and both thresholds.
    """

    mining, gamma, negative_ratio, probe_ratio, tolerance, alpha, beta = map(
        _setting, ("mining", "gamma", "negative_ratio", "probe_ratio", "tolerance", "alpha", "beta")
    )

    def __init__(
        self,
        alpha: float = 40.0,
        beta: float = 2.0,
        lambda_pos: float | Tensor = 0.7,
        lambda_neg: float | Tensor = 0.7,
        gamma: float = 0.1,
        *,
        mining: Mining = "at-asms",
        negative_ratio: float = 0.1,
        probe_ratio: float = 0.1,
        tolerance: float = 0.5,
        normalize_embeddings: bool = True,
        check: Check = True,
        threads: int | None = None,
        workspace_budget: int | None = None,
        allow_tf32: bool = False,
        group: Any = None,
        uneven: bool = False,
        gradient: Scale = "mean",
        **others: Any,
    ) -> None:
        super().__init__()
        refuse_arguments("SoftContrastiveLoss", others)
        if not isinstance(check, bool) and check != "wait":
            raise ValueError(f'check must be True, False or "wait", not {check!r}')
        if not isinstance(normalize_embeddings, bool):
            raise TypeError(f"normalize_embeddings must be True or False, not {normalize_embeddings!r}")
        _refuse_learned(
            gamma=gamma, negative_ratio=negative_ratio, probe_ratio=probe_ratio, tolerance=tolerance, alpha=alpha, beta=beta
        )
        self.settings = Settings(
            mining, gamma, negative_ratio, probe_ratio, tolerance, alpha, beta, _number(lambda_pos), _number(lambda_neg)
        )
        # A parameter registers itself here.
        self.lambda_pos = lambda_pos
        self.lambda_neg = lambda_neg
        self.normalize_embeddings = normalize_embeddings
        self._check = WAITED_FOR if check == "wait" else CHECKED if check else UNCHECKED
        ranks = None if group is None else Ranks(group, uneven, gradient)
        self.ranks = ranks if ranks and ranks.size > 1 else None
        self._warned: set[str] = set()
        self._engine = Engine(threads, workspace_budget, allow_tf32)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of `embeddings` `[B, D]` among each other, or against `ref_emb` `[N, D]` with `ref_labels`.

        Labels are integers; a negative one takes its row out of every pair. An image that is on both sides is
        recognised by a similarity of 1 and left out. References that require a gradient get one.

        Raises TypeError for what is no tensor, ValueError for shapes and rows that do not fit, RuntimeError for a GPU's tensor
        in a build for the CPU.
        """
        if ref_emb is embeddings and ref_labels is labels:
            ref_emb = ref_labels = None
        with Telling(self.ranks):
            if indices_tuple is not None:
                raise ValueError(NO_INDICES)
            check_side("anchors", embeddings, labels, "labels")
            check_pair(ref_emb, ref_labels, "ref_emb and ref_labels")
            if ref_emb is not None and ref_labels is not None:
                check_side("references", ref_emb, ref_labels, "labels of the references")
                check_one_device(embeddings, "references", ref_emb)
                if ref_emb.dtype != embeddings.dtype:
                    wide = torch.promote_types(embeddings.dtype, ref_emb.dtype)
                    embeddings, ref_emb = embeddings.to(wide), ref_emb.to(wide)
        return self._loss(embeddings, labels, ref_emb, ref_labels, None, self.normalize_embeddings, self._check)

    @property
    def checks(self) -> bool:
        """Whether rows are checked, on a GPU perhaps without waiting for the answer."""
        return self._check != UNCHECKED

    def unit_rows(self, embeddings: Tensor) -> Tensor:
        """The rows as the loss compares them: of unit length, unless they are said to be already."""
        if not self.normalize_embeddings or embeddings.numel() == 0:
            return embeddings
        return normalize_rows(embeddings)[0].to(embeddings.dtype)

    def loss_of_unit_rows(
        self,
        rows: Tensor,
        labels: Tensor,
        references: Tensor | None = None,
        reference_labels: Tensor | None = None,
        identity: Tensor | None = None,
        check: bool = True,
    ) -> Tensor:
        """`forward` on rows that have unit length, and arguments that fit.

        Rows are compared in the references' type, and their gradient is in their own. `identity`, `[B]`, numbers the references
        that are the rows themselves. `check=False` is for rows that were checked.
        """
        with Telling(self.ranks):
            check_labels("labels", labels)
            if references is not None:
                check_one_device(rows, "references", references)
            if reference_labels is not None:
                check_labels("labels of the references", reference_labels)
            if identity is not None:
                check_labels("identity", identity)
                identity = identity.to(rows.device, torch.int64)
        return self._loss(rows, labels, references, reference_labels, identity, False, self._check if check else UNCHECKED)

    def _loss(
        self,
        rows: Tensor,
        labels: Tensor,
        references: Tensor | None,
        reference_labels: Tensor | None,
        identity: Tensor | None,
        normalize: bool,
        check: int,
    ) -> Tensor:
        if reference_labels is not None:
            reference_labels = reference_labels.to(rows.device, torch.int64)
        settings, pos, neg = self.settings, self.lambda_pos, self.lambda_neg
        numbers = (
            settings.gamma,
            settings.negative_ratio,
            settings.probe_ratio,
            settings.tolerance,
            settings.alpha,
            settings.beta,
            settings.lambda_pos if isinstance(pos, Tensor) else float(pos),
            settings.lambda_neg if isinstance(neg, Tensor) else float(neg),
        )
        compute = loss_of if self.ranks is None else _loss_of_ranks
        loss = compute(
            rows,
            references,
            pos if isinstance(pos, Tensor) else None,
            neg if isinstance(neg, Tensor) else None,
            labels.to(rows.device, torch.int64),
            reference_labels,
            identity,
            settings.mining,
            numbers,
            normalize,
            check,
            self._engine.key,
            None if self.ranks is None else partial(loss_of_ranks, self.ranks),
        )
        if not torch.compiler.is_compiling():
            last = self._engine.last
            # Cheaper than `_warn`, and true of most batches.
            if isinstance(last, list) and (last[-1] or last[-2] or not (last[3] < NEARLY_ONE or last[4] < NEARLY_ONE)):
                self._warn(last)
            # Against references none of a kind may be right: a memory has few rows at first.
            if references is None and isinstance(last, list) and bool(last[_POS]) != bool(last[_NEG]):
                self._warn_of_one_kind(last)
        return loss

    @property
    def statistics(self) -> dict[str, float]:
        """What the last call found; on a GPU this waits for it, and raises for a bad row."""
        last = self._engine.found()
        if last is None:
            return {}
        self._warn(last)
        found = dict(zip(STATISTICS, last))
        whole = {name: found[name] for name in ("active", "positives", "negatives", "ignored", "not_finite")}
        # Of a graph that was replayed nobody knows the pairs.
        whole = {name: int(value) if value == value else value for name, value in whole.items()}
        real = {name: found[name] for name in ("gamma_pos", "gamma_neg", "mean_pos", "mean_neg")}
        return whole | real | {"spread": _spread(last)}

    def check(self) -> None:
        """Waits for a GPU, and raises ValueError if a row of its last call was bad; on the processor the call has raised."""
        self._engine.found()

    def _warn(self, last: list[float]) -> None:
        """Says once what makes a loss of 0 that nobody asked for."""
        ignored, not_finite, spread = last[-2], last[-1], _spread(last)
        if ignored and "ignored" not in self._warned:
            self._warned.add("ignored")
            _warn(f"rows with a negative label: {ignored:.0f}; they take part in no pair")
        if not_finite and "not_finite" not in self._warned:
            self._warned.add("not_finite")
            _warn(f"rows that are not finite: {not_finite:.0f}; the memory leaves them out of every pair and queues none")
        if spread < COLLAPSED and "collapse" not in self._warned:
            self._warned.add("collapse")
            _warn(
                f"the embeddings have collapsed: all rows are nearly equal (spread {spread:.1e}), so that little or nothing "
                "is mined; lower the learning rate or start from other weights"
            )

    def _warn_of_one_kind(self, last: list[float]) -> None:
        # Rows that have collapsed count as copies of each other, and of that `_warn` tells.
        if "pairs" not in self._warned and not _spread(last) < COLLAPSED:
            self._warned.add("pairs")
            _warn(
                "all rows of the batch are of one class, so its loss is 0: shuffle, or draw rows of several classes"
                if last[_POS]
                else "the batch has no two different rows of one class, so its loss is 0: draw several rows of each class "
                "(pytorch-metric-learning's MPerClassSampler does)"
            )

    def extra_repr(self) -> str:
        """Settings as `print(model)` shows them."""
        now = {"lambda_pos": _number(self.lambda_pos), "lambda_neg": _number(self.lambda_neg)}
        values = dataclasses.asdict(self.settings) | now | {"normalize_embeddings": self.normalize_embeddings}
        return ", ".join(f"{name}={value}" for name, value in values.items())


_loss_of_ranks = between_graphs(loss_of)

COLLAPSED = 1e-4
"""A spread below this is a collapse."""
NEARLY_ONE = 1 - COLLAPSED


def _refuse_learned(**settings: Any) -> None:
    for name, value in settings.items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise TypeError(f"{name} must be a number: it gets no gradient, which lambda_pos and lambda_neg alone do")


def _number(value: float | Tensor) -> float:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"lambda_pos and lambda_neg must have one element, not the shape {list(value.shape)}")
        return float(value.detach())
    if not isinstance(value, (SupportsFloat, SupportsIndex)):
        raise TypeError(f"lambda_pos and lambda_neg must be numbers or tensors, not {type(value).__name__}")
    return float(value)


def _spread(last: list[float]) -> float:
    # min() would keep a NaN that comes first: a batch may have positives or negatives alone.
    return 1 - min((mean for mean in last[3:5] if mean == mean), default=float("nan"))


def _warn(message: str) -> None:
    """Warns of the first caller outside torch and this package."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "ddtas"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
