"""The loss as modules of PyTorch, where pytorch-metric-learning's loss, miner and memory stand.

`SoftContrastiveLoss` mines by itself, so the miner goes. `CrossBatchMemory` compares a batch with the rows of earlier
ones. Tensors are read where they lie, and gradients handed over without a copy, on the processor and, in a build with
the feature `cuda`, on the GPU.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import Any, Iterable

import torch
from torch import Tensor, nn

from . import _ddtas, functional
from .settings import Mining, Settings

__all__ = ["CrossBatchMemory", "SoftContrastiveLoss", "recall_at_k"]

_NO_INDICES = "indices_tuple must be None: this loss mines its own pairs, take the miner out"
_NO_CUDA = (
    "this build of ddtas serves the CPU only: install it with "
    "`pip install . --config-settings=build-args='--features cuda'`, or move the embeddings to the CPU"
)


class _Engine:
    """Where calls compute. A copy or a pickle starts with an empty workspace."""

    def __init__(self, threads: int | None) -> None:
        self.threads = threads
        self.host = _ddtas.Context(threads)
        # Made for the first tensor in a GPU's memory; only a build with the feature `cuda` has the type.
        self.gpu: Any = None

    def on_gpu(self, rows: Tensor) -> tuple[Any, int]:
        """Where rows in a GPU's memory are computed with, and torch's stream there."""
        if not _ddtas.has_cuda:
            raise RuntimeError(_NO_CUDA)
        if self.gpu is None:
            self.gpu = getattr(_ddtas, "CudaContext")()
        return self.gpu, torch.cuda.current_stream(rows.device).cuda_stream

    def __reduce__(self) -> tuple[Any, ...]:
        return _Engine, (self.threads,)


_of_thread = threading.local()


def recall_at_k(embeddings: Tensor, labels: Tensor, ks: Iterable[int] = (1, 2, 4, 8)) -> dict[int, float]:
    """`ddtas.recall_at_k` of rows of unit length, which on a GPU are searched where they lie."""
    rows = embeddings.detach()
    if not rows.is_cuda:
        return functional.recall_at_k(rows, labels, ks)
    if getattr(_of_thread, "engine", None) is None:
        _of_thread.engine = _Engine(None)
    gpu, stream = _of_thread.engine.on_gpu(rows)
    return dict(gpu.recall_at_k((rows, labels.long(), None), list(ks), stream))


@dataclasses.dataclass
class _Call:
    """What a call needs beside the tensors that are differentiated; filled with what it found."""

    engine: _Engine
    labels: Tensor
    reference_labels: Tensor | None
    settings: Settings
    check: bool
    output: _ddtas.LossOutput | None = None

    def run(
        self, rows: Tensor, references: Tensor | None, reference_gradient: bool
    ) -> tuple[_ddtas.LossOutput, Tensor, Tensor | None]:
        """The output, and the gradients where the rows are."""
        if rows.is_cuda:
            return self._run_on_gpu(rows, references, reference_gradient)
        sides = (rows, self.labels, references, self.reference_labels)
        output = self.output = self.engine.host.loss(*sides, self.settings, reference_gradient, self.check)
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
        ctx.save_for_backward(rows, references, lambda_pos, lambda_neg, gradient, back)
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
            answer = (gradient * upstream).to(dtype=given.dtype, device=given.device)
            # Under create_graph: a second derivative would otherwise be wrong and not an error.
            answers.append(_Once.apply(answer, *inputs) if torch.is_grad_enabled() else answer)
        return (*answers, None)


class SoftContrastiveLoss(nn.Module):
    """AT-ASMS mining and the soft contrastive loss, in one pass that stores no B x B matrix.

    Stands where `MultiSimilarityLoss()` and its miner stand: called as `loss(embeddings, labels)`, it answers a scalar
    tensor, float32 (float64 for float64 embeddings, which the scalar reference serves: for `gradcheck`).

    `lambda_pos` and `lambda_neg` are numbers, or scalar tensors on the CPU: one that requires a gradient gets dL/dlambda.
    Descent on it alone lowers the loss without a better embedding; `ddtas.threshold_gradient` is the method's own way.

    `normalize_embeddings=False` is for rows that have unit length already. `check=False` skips the check for NaN and
    unit length: under a gradient scaler, which expects NaN to pass through, rather than a ValueError.

    `statistics` holds what the last call mined: active anchors, pairs, tolerances, mean similarities.
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
        self._engine = _Engine(threads)

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
            raise ValueError(_NO_INDICES)
        if ref_emb is embeddings and ref_labels is labels:
            ref_emb = ref_labels = None
        references = None if ref_emb is None else self.unit_rows(ref_emb)
        return self.evaluate(self.unit_rows(embeddings), labels, references, ref_labels)

    def unit_rows(self, embeddings: Tensor) -> Tensor:
        """The rows as the loss compares them: of unit length, unless they are said to be already."""
        return nn.functional.normalize(embeddings, dim=-1) if self.normalize_embeddings else embeddings

    def evaluate(
        self, rows: Tensor, labels: Tensor, references: Tensor | None = None, reference_labels: Tensor | None = None
    ) -> Tensor:
        """`forward` on rows that have unit length."""
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
        call = _Call(self._engine, labels.to(rows.device).contiguous(), reference_labels, settings, self.check)
        if references is not None:
            references = references.contiguous()
        loss: Tensor = _Loss.apply(rows.contiguous(), references, *lambdas, call)
        if call.output is not None:
            self.statistics = _statistics(call.output)
        return loss

    def extra_repr(self) -> str:
        """Settings as `print(model)` shows them."""
        values = dataclasses.asdict(self.settings) | {"normalize_embeddings": self.normalize_embeddings}
        return ", ".join(f"{name}={value}" for name, value in values.items())


def _number(value: float | Tensor) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def _statistics(output: _ddtas.LossOutput) -> dict[str, float]:
    names = ("active", "gamma_pos", "gamma_neg", "mean_pos", "mean_neg")
    positives, negatives = output.mined
    return {"positives": positives, "negatives": negatives} | {name: getattr(output, name) for name in names}


def _refuse_bad_rows(rows: Tensor) -> None:
    """A bad row in the queue would fail every later call, so none gets there."""
    good = (torch.linalg.vector_norm(rows, dim=1) - 1).abs() <= 1e-3
    if not good.all():
        row = int((~good).nonzero()[0])
        raise ValueError(f"row {row} of the embeddings is not finite or has no unit length: nothing was queued")


class CrossBatchMemory(nn.Module):
    """Compares a batch with the last `memory_size` rows, its own among them (Wang et al., CVPR 2020).

    Called as pytorch-metric-learning's: rows go into the queue, first in, first out, and the batch is then compared with
    all of it; a row is no pair of itself. Rows in the queue are constants. They are part of the state_dict.

    `loss` is a `SoftContrastiveLoss`. The memory is held in `dtype`: float32, or float64 for `gradcheck`. Narrower rows
    would not be recognised as themselves, since they have no similarity of 1.
    """

    embedding_memory: Tensor
    label_memory: Tensor

    def __init__(
        self,
        loss: SoftContrastiveLoss,
        embedding_size: int,
        memory_size: int = 1024,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if memory_size < 1 or embedding_size < 1:
            raise ValueError(f"memory_size = {memory_size} and embedding_size = {embedding_size} must be at least 1")
        self.loss = loss
        self.embedding_size = embedding_size
        self.memory_size = memory_size
        self.register_buffer("embedding_memory", torch.zeros(memory_size, embedding_size, dtype=dtype))
        self.register_buffer("label_memory", torch.full((memory_size,), -1))
        self.reset_queue()

    def reset_queue(self) -> None:
        """Forgets every row."""
        self.queue_idx = 0
        self.has_been_filled = False

    def forward(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: None = None, enqueue_mask: Tensor | None = None
    ) -> Tensor:
        """Queues the rows and answers the loss of the batch against the queue.

        With `enqueue_mask`, `[B]` of booleans, the rows it names are queued, and the loss is that of the others.

        Raises what the loss does, and ValueError for more rows than the queue holds or of another width.
        """
        if indices_tuple is not None:
            raise ValueError(_NO_INDICES)
        if embeddings.ndim != 2 or embeddings.shape[1] != self.embedding_size:
            raise ValueError(f"embeddings must be [B, {self.embedding_size}], not {list(embeddings.shape)}")
        if labels.shape != embeddings.shape[:1]:
            raise ValueError(f"labels must be [{len(embeddings)}], not {list(labels.shape)}")
        if self.embedding_memory.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the memory must be float32 or float64, not {self.embedding_memory.dtype}")
        self.embedding_memory = self.embedding_memory.to(embeddings.device)
        self.label_memory = self.label_memory.to(embeddings.device)
        labels = labels.to(embeddings.device)
        rows = self.loss.unit_rows(embeddings.to(self.embedding_memory.dtype))
        if self.loss.check:
            _refuse_bad_rows(rows.detach())
        if enqueue_mask is None:
            self._enqueue(rows, labels)
        else:
            enqueue_mask = enqueue_mask.to(embeddings.device)
            self._enqueue(rows[enqueue_mask], labels[enqueue_mask])
            rows, labels = rows[~enqueue_mask], labels[~enqueue_mask]
        count = self.memory_size if self.has_been_filled else self.queue_idx
        return self.loss.evaluate(rows, labels, self.embedding_memory[:count], self.label_memory[:count])

    @torch.no_grad()
    def _enqueue(self, rows: Tensor, labels: Tensor) -> None:
        if len(rows) > self.memory_size:
            raise ValueError(f"{len(rows)} rows do not fit a memory of {self.memory_size}")
        places = torch.arange(self.queue_idx, self.queue_idx + len(rows), device=rows.device) % self.memory_size
        self.embedding_memory[places] = rows
        self.label_memory[places] = labels.long()
        self.has_been_filled |= self.queue_idx + len(rows) >= self.memory_size
        self.queue_idx = (self.queue_idx + len(rows)) % self.memory_size

    def get_extra_state(self) -> dict[str, int]:
        """How far the queue is filled, for the state_dict."""
        return {"queue_idx": self.queue_idx, "has_been_filled": int(self.has_been_filled)}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Takes the queue up where the state_dict left it."""
        self.queue_idx = state["queue_idx"]
        self.has_been_filled = bool(state["has_been_filled"])

    def extra_repr(self) -> str:
        """Sizes as `print(model)` shows them."""
        return f"embedding_size={self.embedding_size}, memory_size={self.memory_size}"
