"""The cross-batch memory as a module of PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .engine import NO_INDICES, check_labels
from .loss import SoftContrastiveLoss


def _refuse_bad_rows(rows: Tensor) -> None:
    """A bad row in the queue would fail every later call, so none gets there."""
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 1e-2}.get(rows.dtype, 1e-3)
    wide = rows if rows.dtype == torch.float64 else rows.float()
    good = (torch.linalg.vector_norm(wide, dim=1) - 1).abs() <= tolerance
    if not good.all():
        row = int((~good).nonzero()[0])
        raise ValueError(f"row {row} of the embeddings is not finite or has no unit length: nothing was queued")


def _check_memory_type(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise ValueError(f"the memory must be float32, float16, bfloat16 or float64, not {dtype}")


def _check_mask(mask: Tensor, count: int) -> None:
    """Integers would pick rows by number, and name none of the others."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"enqueue_mask must be a tensor of booleans, not {got}")
    if mask.shape != (count,):
        raise ValueError(f"enqueue_mask must be [{count}], not {list(mask.shape)}")


class CrossBatchMemory(nn.Module):
    """Compares a batch with the last `memory_size` rows, its own among them (Wang et al., CVPR 2020).

    Called as pytorch-metric-learning's: rows go into the queue, first in, first out, and the batch is then compared with
    all of it; a row is no pair of itself, known by its place in the queue. Rows in the queue are constants. They are part of the state_dict.

    `loss` is a `SoftContrastiveLoss`. The memory is held, and rows are compared, in `dtype`: float32, float16 or bfloat16 for
    half the memory, or float64 for `gradcheck`. A call that raises leaves the queue as it was.
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
        if not isinstance(loss, SoftContrastiveLoss):
            raise TypeError(
                f"CrossBatchMemory takes a ddtas.torch.SoftContrastiveLoss, not {type(loss).__name__}: "
                "another loss has a memory of its own library"
            )
        _check_memory_type(dtype)
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

        With `enqueue_mask`, `[B]` of booleans, the rows it names are queued, and the loss is that of the others: 0 if
        there is none.

        Raises what the loss does, and ValueError for more rows than the queue holds or of another width. Nothing is
        queued then.
        """
        if indices_tuple is not None:
            raise ValueError(NO_INDICES)
        if embeddings.ndim != 2 or embeddings.shape[1] != self.embedding_size:
            raise ValueError(f"embeddings must be [B, {self.embedding_size}], not {list(embeddings.shape)}")
        check_labels("labels", labels)
        if labels.shape != embeddings.shape[:1]:
            raise ValueError(f"labels must be [{len(embeddings)}], not {list(labels.shape)}")
        _check_memory_type(self.embedding_memory.dtype)
        if enqueue_mask is not None:
            _check_mask(enqueue_mask, len(embeddings))
            enqueue_mask = enqueue_mask.to(embeddings.device)
        self.embedding_memory = self.embedding_memory.to(embeddings.device)
        self.label_memory = self.label_memory.to(embeddings.device)
        labels = labels.to(embeddings.device)
        memory_type = self.embedding_memory.dtype
        # Normalised in the wider of both types.
        wide = embeddings.to(torch.promote_types(embeddings.dtype, memory_type))
        rows = self.loss.unit_rows(wide).to(memory_type)
        if self.loss.check:
            _refuse_bad_rows(rows.detach())
        queued, queued_labels = rows, labels
        if enqueue_mask is not None:
            queued, queued_labels = rows[enqueue_mask], labels[enqueue_mask]
            rows, labels = rows[~enqueue_mask], labels[~enqueue_mask]
        if len(queued) > self.memory_size:
            raise ValueError(f"{len(queued)} rows do not fit a memory of {self.memory_size}")
        places = torch.arange(self.queue_idx, self.queue_idx + len(queued), device=rows.device) % self.memory_size
        before = self.embedding_memory[places], self.label_memory[places], self.queue_idx, self.has_been_filled
        try:
            self._enqueue(places, queued, queued_labels)
            count = self.memory_size if self.has_been_filled else self.queue_idx
            # Rows that were queued are compared as well, unless a mask parts them.
            known = places if enqueue_mask is None else None
            return self.loss.evaluate(rows, labels, self.embedding_memory[:count], self.label_memory[:count], known)
        except BaseException:
            self.embedding_memory[places], self.label_memory[places], self.queue_idx, self.has_been_filled = before
            raise

    @torch.no_grad()
    def _enqueue(self, places: Tensor, rows: Tensor, labels: Tensor) -> None:
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
