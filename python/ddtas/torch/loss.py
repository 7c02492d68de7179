"""The loss as a module of PyTorch, where pytorch-metric-learning's loss and miner stand."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, SupportsFloat, SupportsIndex

import torch
from torch import Tensor, nn

from .. import _ddtas
from ..settings import Mining, Settings
from .engine import NO_INDICES, Engine, check_side


@dataclasses.dataclass
class _Call:
    """What a call needs beside the tensors that are differentiated; filled with what it found."""

    engine: Engine
    labels: Tensor
    reference_labels: Tensor | None
    settings: Settings
    check: bool
    identity: Tensor | None = None
    output: _ddtas.LossOutput | None = None

    def run(
        self, rows: Tensor, references: Tensor | None, reference_gradient: bool
    ) -> tuple[_ddtas.LossOutput, Tensor, Tensor | None]:
        """The output, and the gradients where the rows are."""
        if rows.is_cuda:
            return self._run_on_gpu(rows, references, reference_gradient)
        sides = (rows, self.labels, references, self.reference_labels)
        output = self.output = self.engine.host.loss(
            *sides, self.identity, self.settings, reference_gradient, self.check
        )
        back = output.reference_gradient
        return output, torch.from_numpy(output.gradient), None if back is None else torch.from_numpy(back)

    def _run_on_gpu(
        self, rows: Tensor, references: Tensor | None, reference_gradient: bool
    ) -> tuple[_ddtas.LossOutput, Tensor, Tensor | None]:
        gpu, stream = self.engine.on_gpu(rows)
        if (references is None) != (self.reference_labels is None):
            raise ValueError("references and reference_labels belong together: give both or neither")
        gradient, back = torch.empty_like(rows, dtype=torch.float32), None
        sides: list[tuple[Tensor, Tensor, Tensor | None]] = [(rows, self.labels.long(), gradient)]
        if references is not None and self.reference_labels is not None:
            back = torch.empty_like(references, dtype=torch.float32) if reference_gradient else None
            sides.append((references, self.reference_labels.long(), back))
        output = self.output = gpu.loss(sides, self.settings, self.check, stream)
        return output, gradient, back


class _Once(torch.autograd.Function):
    """A gradient that depends on the inputs, and cannot be differentiated with respect to them."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError("the loss of ddtas can be differentiated once, not twice")


class _Loss(torch.autograd.Function):
    """The library's loss: its gradient is computed with it, and only scaled on the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        references: Tensor | None,
        lambda_pos: Tensor | None,
        lambda_neg: Tensor | None,
        call: _Call,
    ) -> Tensor:
        others = None if references is None else references.detach()
        output, gradient, back = call.run(rows.detach(), others, ctx.needs_input_grad[1])
        # References that are constants may change before the way back: the queue of a memory does.
        kept = references if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(rows, kept, lambda_pos, lambda_neg, gradient, back)
        ctx.of_lambdas = (output.dloss_dlambda_pos, output.dloss_dlambda_neg)
        wide = rows.dtype if rows.dtype == torch.float64 else torch.float32
        return torch.tensor(output.loss, dtype=wide, device=rows.device)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs, gradients = ctx.saved_tensors[:4], (*ctx.saved_tensors[4:], *ctx.of_lambdas)
        answers: list[Tensor | None] = []
        for given, gradient, needed in zip(inputs, gradients, ctx.needs_input_grad):
            if not needed:
                answers.append(None)
                continue
            # A threshold's derivative is a number, and the threshold any tensor of one element.
            answer = (gradient * upstream).to(dtype=given.dtype, device=given.device).reshape(given.shape)
            # Under create_graph: a second derivative would otherwise be wrong and not an error.
            answers.append(_Once.apply(answer, *inputs) if torch.is_grad_enabled() else answer)
        return (*answers, None)


class SoftContrastiveLoss(nn.Module):
    """AT-ASMS mining and the soft contrastive loss, in one pass that stores no B x B matrix.

    Stands where `MultiSimilarityLoss()` and its miner stand: called as `loss(embeddings, labels)`, it answers a scalar
    tensor, float32 (float64 for float64 embeddings, which the scalar reference serves: for `gradcheck`).

    `lambda_pos` and `lambda_neg` are numbers, or tensors of one element: one that requires a gradient gets dL/dlambda.
    Descent on it alone lowers the loss without a better embedding; `ddtas.threshold_gradient` is the method's own way.

    `normalize_embeddings=False` is for rows that have unit length already. `check=False` skips the check for NaN and
    unit length: under a gradient scaler, which expects NaN to pass through, rather than a ValueError.

    A batch without rows, or without references, has a loss of 0 and a gradient of zeros.

    `statistics` holds what the last call mined: active anchors, pairs, tolerances, mean similarities, how many rows had a
    negative label (`ignored`), and 1 minus the smaller mean similarity (`spread`): below 1e-4 all rows are nearly equal, and the
    method gives a loss of 0 whether or not anything was learned. The first batch with either is warned of.
    """

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
        check: bool = True,
        threads: int | None = None,
    ) -> None:
        super().__init__()
        self.settings = Settings(
            mining, gamma, negative_ratio, probe_ratio, tolerance, alpha, beta, _number(lambda_pos), _number(lambda_neg)
        )
        # A parameter registers itself here.
        self.lambda_pos = lambda_pos
        self.lambda_neg = lambda_neg
        self.normalize_embeddings = normalize_embeddings
        self.check = check
        self.statistics: dict[str, float] = {}
        self._warned: set[str] = set()
        self._engine = Engine(threads)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of `embeddings` `[B, D]` among each other, or against `ref_emb` `[N, D]` with `ref_labels`.

        Labels are integers; a negative one takes its row out of every pair. An image that stands on both sides is
        recognised by a similarity of 1 and left out. References that require a gradient get one.

        Raises ValueError for shapes and rows that do not fit, RuntimeError for a GPU's tensor in a build for the CPU.
        """
        if indices_tuple is not None:
            raise ValueError(NO_INDICES)
        if ref_emb is embeddings and ref_labels is labels:
            ref_emb = ref_labels = None
        check_side("anchors", embeddings, labels, "labels")
        if (ref_emb is None) != (ref_labels is None):
            raise ValueError("references and reference_labels belong together: give both or neither")
        if ref_emb is not None and ref_labels is not None:
            check_side("references", ref_emb, ref_labels, "labels of the references")
        references = None if ref_emb is None else self.unit_rows(ref_emb)
        return self.evaluate(self.unit_rows(embeddings), labels, references, ref_labels)

    def unit_rows(self, embeddings: Tensor) -> Tensor:
        """The rows as the loss compares them: of unit length, unless they are said to be already."""
        if not self.normalize_embeddings or embeddings.numel() == 0:
            return embeddings
        # Squares of large, small or half-precision entries would overflow or vanish: by the largest entry first, a constant
        # that the result does not depend on. A row of zeros or with a NaN stays one, for the check to name.
        rows = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
        largest = rows.detach().abs().amax(dim=1, keepdim=True)
        rows = rows / torch.where(torch.isfinite(largest) & (largest > 0), largest, 1)
        return nn.functional.normalize(rows, dim=1).to(embeddings.dtype)

    def evaluate(
        self,
        rows: Tensor,
        labels: Tensor,
        references: Tensor | None = None,
        reference_labels: Tensor | None = None,
        identity: Tensor | None = None,
    ) -> Tensor:
        """`forward` on rows that have unit length, and arguments that fit.

        `identity`, `[B]`, numbers the references that are the rows themselves. A GPU's rows and those of float64 are known by
        their value, as they are without it.
        """
        if references is not None and references.dtype != rows.dtype:
            wide = torch.promote_types(rows.dtype, references.dtype)
            rows, references = rows.to(wide), references.to(wide)
        if reference_labels is not None:
            reference_labels = reference_labels.to(rows.device).contiguous()
        settings = self.settings
        lambdas = [value if isinstance(value, Tensor) else None for value in (self.lambda_pos, self.lambda_neg)]
        pos, neg = _number(self.lambda_pos), _number(self.lambda_neg)
        if (pos, neg) != (settings.lambda_pos, settings.lambda_neg):
            settings = self.settings = dataclasses.replace(settings, lambda_pos=pos, lambda_neg=neg)
        if rows.shape[0] == 0 or (references is not None and references.shape[0] == 0):
            self.statistics = self._of_nothing(labels)
            return _nothing(rows, references, *lambdas)
        if rows.dtype == torch.float64:
            identity = None
        call = _Call(self._engine, labels.to(rows.device).contiguous(), reference_labels, settings, self.check, identity)
        if references is not None:
            references = references.contiguous()
        loss: Tensor = _Loss.apply(rows.contiguous(), references, *lambdas, call)
        if call.output is not None:
            self.statistics = _statistics(call.output, labels)
            self._warn()
        return loss

    def _of_nothing(self, labels: Tensor) -> dict[str, float]:
        ignored, nan = int((labels < 0).sum()), float("nan")
        gammas = {"gamma_pos": self.settings.gamma, "gamma_neg": self.settings.gamma * self.settings.negative_ratio}
        mined: dict[str, float] = {"positives": 0, "negatives": 0, "active": 0}
        return mined | gammas | {"mean_pos": nan, "mean_neg": nan, "ignored": ignored, "spread": nan}

    def _warn(self) -> None:
        """Says once what makes a loss of 0 that nobody asked for."""
        ignored, spread = self.statistics["ignored"], self.statistics["spread"]
        if ignored and "ignored" not in self._warned:
            self._warned.add("ignored")
            warnings.warn(f"rows with a negative label: {ignored}; they take part in no pair", stacklevel=6)
        if spread < COLLAPSED and "collapse" not in self._warned:
            self._warned.add("collapse")
            warnings.warn(
                f"the embeddings have collapsed: all rows are nearly equal (spread {spread:.1e}), so that little or nothing "
                "is mined; lower the learning rate or start from other weights",
                stacklevel=6,
            )

    def extra_repr(self) -> str:
        """Settings as `print(model)` shows them."""
        values = dataclasses.asdict(self.settings) | {"normalize_embeddings": self.normalize_embeddings}
        return ", ".join(f"{name}={value}" for name, value in values.items())


COLLAPSED = 1e-4
"""A spread below this is a collapse."""


def _number(value: float | Tensor) -> float:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"lambda_pos and lambda_neg must have one element, not the shape {list(value.shape)}")
        return float(value.detach())
    if not isinstance(value, (SupportsFloat, SupportsIndex)):
        raise TypeError(f"lambda_pos and lambda_neg must be numbers or tensors, not {type(value).__name__}")
    return float(value)


def _nothing(*inputs: Tensor | None) -> Tensor:
    """The loss without a pair: 0, with a gradient of zeros for whatever requires one."""
    given = [value for value in inputs if value is not None]
    wide = torch.float64 if given[0].dtype == torch.float64 else torch.float32
    total = torch.zeros((), dtype=wide, device=given[0].device)
    for value in given:
        # Of no entry: no NaN gets in.
        total = total + value.reshape(-1)[:0].sum(dtype=wide).to(total.device)
    return total


def _statistics(output: _ddtas.LossOutput, labels: Tensor) -> dict[str, float]:
    names = ("active", "gamma_pos", "gamma_neg", "mean_pos", "mean_neg")
    positives, negatives = output.mined
    # min() would keep a NaN that comes first: a batch may have positives or negatives alone.
    means = [mean for mean in (output.mean_pos, output.mean_neg) if mean == mean]
    found = {"positives": positives, "negatives": negatives, "ignored": int((labels < 0).sum())}
    return found | {name: getattr(output, name) for name in names} | {"spread": 1 - min(means, default=float("nan"))}
