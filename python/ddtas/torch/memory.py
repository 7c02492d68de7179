"""The cross-batch memory as a module of PyTorch."""

from __future__ import annotations

from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from .engine import NO_INDICES, NOT_FINITE, check_labels, check_side, check_tensor, refuse_arguments
from .loss import SoftContrastiveLoss
from .operator import good_rows, which_are_unit
from .ranks import Ranks, Telling, between_graphs


def _check_memory_type(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise ValueError(f"the memory must be float32, float16, bfloat16 or float64, not {dtype!r}")


def _checked_count(name: str, value: SupportsIndex, least: int) -> int:
    if not isinstance(value, SupportsIndex):
        raise TypeError(f"{name} = {value!r} must be an integer")
    count = value.__index__()
    if count < least:
        raise ValueError(f"{name} = {count} must be at least {least}")
    return count


def _checked_mask(mask: Tensor, rows: Tensor) -> Tensor:
    """The mask where the rows are. Integers would pick rows by number, and name none of the others."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"enqueue_mask must be a tensor of booleans, not {got}")
    if mask.shape != rows.shape[:1]:
        raise ValueError(f"enqueue_mask must be [{rows.shape[0]}], not {list(mask.shape)}")
    return mask.to(rows.device)


def _extra_state(saved: Any) -> dict[str, Any]:
    """By name; a dict is from before it was a tensor."""
    if isinstance(saved, dict):
        return saved
    if not isinstance(saved, Tensor) or saved.shape != (3,):
        raise ValueError("_extra_state of the saved memory must be a tensor of 3 integers")
    return dict(zip(("queue_idx", "has_been_filled", "calls"), saved.tolist()))


class CrossBatchMemory(nn.Module):
    """Compares a batch with the last `memory_size` rows, its own among them (Wang et al., CVPR 2020).

    Called as pytorch-metric-learning's: rows go into the queue, first in, first out, and the batch is then compared with
    all of it; a row is no pair of itself, known by its place in the queue. Rows in the queue are constants. They are part of the state_dict.

    Args:
        loss: a `SoftContrastiveLoss`.
        embedding_size: dimensions of a row.
        memory_size: rows that the queue holds. Default 1,024.
        dtype: of the memory, and what rows are compared in. Default float32; float16 or bfloat16 halve the memory, float64 is
            for `gradcheck`.
        start_after: calls that return the loss of the batch alone and queue nothing, since embeddings move fast at first and
            old rows mislead then. Default 0. `start()` begins at once, which a compiled call needs, since it does not count.

    `fill(embeddings, labels)` queues rows without a loss; `filled` says how many there are. A call that raises leaves the
    queue as it was, and does not count for `start_after`. A row that is not finite never gets into the queue: where nobody
    raises for it (`check=False` of the loss, or a GPU that nobody waits for), a row without pairs takes its place, and
    `statistics` counts it as `not_finite`.

    If the loss has a process group, the rows of all processes are queued, in the order of ranks, and the queues stay alike.
    """

    embedding_memory: Tensor
    label_memory: Tensor
    queue_idx: Tensor
    """The place of the next row."""
    _count: Tensor

    def __init__(
        self,
        loss: SoftContrastiveLoss,
        embedding_size: int,
        memory_size: int = 1024,
        dtype: torch.dtype = torch.float32,
        start_after: int = 0,
        **others: Any,
    ) -> None:
        super().__init__()
        refuse_arguments("CrossBatchMemory", others)
        if not isinstance(loss, SoftContrastiveLoss):
            raise TypeError(
                f"CrossBatchMemory takes a ddtas.torch.SoftContrastiveLoss, not {type(loss).__name__}: "
                "another loss has a memory of its own library"
            )
        if type(loss).forward is not SoftContrastiveLoss.forward:
            raise TypeError(f"CrossBatchMemory does not call {type(loss).__name__}.forward: override the memory's forward instead")
        _check_memory_type(dtype)
        self.loss = loss
        self.embedding_size = _checked_count("embedding_size", embedding_size, 1)
        self.memory_size = memory_size = _checked_count("memory_size", memory_size, 1)
        self.start_after = _checked_count("start_after", start_after, 0)
        self.calls = 0
        self.register_buffer("embedding_memory", torch.zeros(memory_size, self.embedding_size, dtype=dtype))
        self.register_buffer("label_memory", torch.full((memory_size,), -1))
        # In the state_dict they are in the extra state, as they always were.
        self.register_buffer("queue_idx", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("_count", torch.zeros((), dtype=torch.int64), persistent=False)
        self.reset_queue()

    @torch.no_grad()
    def reset_queue(self) -> None:
        """Forgets every row."""
        self.queue_idx.zero_()
        self._count.zero_()
        self._forget(0)

    def _forget(self, first: int) -> None:
        """Takes rows out of every pair. They have unit length: a GPU checks those as well."""
        self.label_memory[first:] = -1
        self.embedding_memory[first:] = 0
        self.embedding_memory[first:, 0] = 1

    @property
    def filled(self) -> int:
        """Rows in the queue."""
        return int(self._count)

    @property
    def has_been_filled(self) -> bool:
        """Whether the queue is full."""
        return self.filled == self.memory_size

    @property
    def started(self) -> bool:
        """Whether batches are compared with the queue."""
        return self.calls >= self.start_after

    def start(self) -> None:
        """Compares the next batch with the queue."""
        self.calls = max(self.calls, self.start_after)

    @property
    def statistics(self) -> dict[str, float]:
        """Those of the loss: what the last call found."""
        return self.loss.statistics

    def check(self) -> None:
        """`check` of the loss."""
        self.loss.check()

    def forward(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: None = None, enqueue_mask: Tensor | None = None
    ) -> Tensor:
        """Queues the rows and returns the loss of the batch against the queue.

        With `enqueue_mask`, `[B]` of booleans, the rows it names are queued, and the loss is that of the others: 0 if
        there is none. Before the memory starts nothing is queued, and the loss is that of the others among themselves.

        Raises what the loss does, and ValueError for more rows than the queue holds or of another width. Nothing is
        queued then.
        """
        ranks = self.loss.ranks
        if not self.started:
            if enqueue_mask is not None:
                with Telling(ranks):
                    check_side("anchors", embeddings, labels, "labels")
                    enqueue_mask = _checked_mask(enqueue_mask, embeddings)
                embeddings, labels = embeddings[~enqueue_mask], labels[~enqueue_mask.to(labels.device)]
            loss: Tensor = self.loss(embeddings, labels, indices_tuple)
            if not torch.compiler.is_compiling():
                self.calls += 1
            return loss
        with Telling(ranks):
            if indices_tuple is not None:
                raise ValueError(NO_INDICES)
            rows, queued, labels = self._compared(embeddings, labels)
            queued_labels = labels
            if enqueue_mask is not None:
                enqueue_mask = _checked_mask(enqueue_mask, rows)
                queued, queued_labels = queued[enqueue_mask], labels[enqueue_mask]
                rows, labels = rows[~enqueue_mask], labels[~enqueue_mask]
        own = slice(0, queued.shape[0])
        if ranks is not None:
            queued, queued_labels, own = self._of_all_ranks(ranks, queued, queued_labels, enqueue_mask is not None)
        places = self._places(queued.shape[0])
        # Rows that were queued are compared as well, unless a mask parts them.
        known = places[own] if enqueue_mask is None else None
        if torch.compiler.is_compiling():
            self._enqueue(places, queued, queued_labels)
            return self._against_queue(rows, labels, known)
        before = self.embedding_memory[places], self.label_memory[places], self.queue_idx.clone(), self._count.clone()
        try:
            self._enqueue(places, queued, queued_labels)
            return self._against_queue(rows, labels, known)
        except BaseException:
            self.embedding_memory[places], self.label_memory[places] = before[:2]
            self.queue_idx.copy_(before[2])
            self._count.copy_(before[3])
            raise

    def fill(self, embeddings: Tensor, labels: Tensor) -> None:
        """Queues rows, for the batches to come to be compared with. Raises what a call does."""
        ranks = self.loss.ranks
        with torch.no_grad():
            with Telling(ranks):
                _, rows, labels = self._compared(embeddings, labels)
            if ranks is not None:
                rows, labels, _ = self._of_all_ranks(ranks, rows, labels, False)
            self._enqueue(self._places(rows.shape[0]), rows, labels)

    def _compared(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows at unit length, in the wider of their type and the queue's; as the queue holds them; and labels."""
        check_tensor("embeddings", embeddings)
        if self.loss.ranks is not None:
            self.loss.ranks.check_device(embeddings)
        if embeddings.ndim != 2 or embeddings.shape[1] != self.embedding_size:
            raise ValueError(f"embeddings must be [B, {self.embedding_size}], not {list(embeddings.shape)}")
        check_labels("labels", labels)
        if labels.shape != embeddings.shape[:1]:
            raise ValueError(f"labels must be [{embeddings.shape[0]}], not {list(labels.shape)}")
        memory_type = self.embedding_memory.dtype
        _check_memory_type(memory_type)
        if self.embedding_memory.device != embeddings.device:
            self.to(embeddings.device)
        rows = self.loss.unit_rows(embeddings.to(torch.promote_types(embeddings.dtype, memory_type)))
        labels = labels.to(rows.device, torch.int64)
        queued = rows.detach().to(memory_type)
        # A bad row that nobody raises for is ignored, and in the queue another stands for it, or it would spoil later calls.
        good = good_rows(queued) if self.loss.checks else torch.isfinite(queued).all(1)
        labels = torch.where(good, labels, NOT_FINITE)
        if not self.loss.checks or rows.device.type != "cpu":
            axis = torch.zeros_like(queued[:1])
            axis[:, 0] = 1
            queued = torch.where(good[:, None], queued, axis)
        return rows, queued, labels

    @between_graphs
    @torch.no_grad()
    def _of_all_ranks(self, ranks: Ranks, rows: Tensor, labels: Tensor, masked: bool) -> tuple[Tensor, Tensor, slice]:
        """The rows of all processes, which every queue takes in the same order, and which of them are this one's."""
        about = f"a memory of {list(self.embedding_memory.shape)} {rows.dtype}, masked: {masked}"
        meeting = ranks.meet(rows, about)
        return meeting.rows(rows.detach()), meeting.rows(labels), meeting.own

    def _places(self, count: int) -> Tensor:
        if count > self.memory_size:
            raise ValueError(f"{count} rows do not fit a memory of {self.memory_size}")
        return (self.queue_idx + torch.arange(count, device=self.queue_idx.device)) % self.memory_size

    def _against_queue(self, rows: Tensor, labels: Tensor, known: Tensor | None) -> Tensor:
        # The processor has checked the rows by now; what is in the queue was checked when it came there. The gradient is in
        # the rows' type, which the queue's might round away.
        return self.loss.loss_of_unit_rows(
            rows, labels, self.embedding_memory, self.label_memory, known, check=rows.device.type != "cpu"
        )

    @torch.no_grad()
    def _enqueue(self, places: Tensor, rows: Tensor, labels: Tensor) -> None:
        self.embedding_memory.index_copy_(0, places, rows)
        self.label_memory.index_copy_(0, places, labels)
        self._count.copy_((self._count + rows.shape[0]).clamp_max(self.memory_size))
        self.queue_idx.copy_((self.queue_idx + rows.shape[0]) % self.memory_size)

    def get_extra_state(self) -> Tensor:
        """How far the queue is filled, for the state_dict: a tensor, since safetensors saves nothing else."""
        return torch.tensor([int(self.queue_idx), int(self.has_been_filled), self.calls])

    @torch.no_grad()
    def set_extra_state(self, saved: Tensor | dict[str, int]) -> None:
        """Takes the queue up where the state_dict left it."""
        state = _extra_state(saved)
        index, full = state["queue_idx"], bool(state["has_been_filled"])
        self.queue_idx.fill_(index)
        self._count.fill_(self.memory_size if full else index)
        # From before 0.2, which had no calls and did not look at the rest of the queue.
        self.calls = state.get("calls", self.calls)
        if not full:
            self._forget(index)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Refuses a queue that would fail, or silently spoil, every later call; nothing of it is taken then."""
        self._check_state(*(state_dict.get(prefix + name) for name in ("embedding_memory", "label_memory", "_extra_state")))
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _check_state(self, rows: Any, labels: Any, state: Any) -> None:
        """What is missing, or of another shape, torch refuses itself."""
        if state is None:
            # Also pytorch-metric-learning's, whose rows have any length.
            if rows is not None:
                raise ValueError("the saved memory has no _extra_state: it is none of a ddtas.torch.CrossBatchMemory")
            return
        state = _extra_state(state)
        index, calls = state["queue_idx"], state.get("calls", 0)
        if not isinstance(index, int) or not 0 <= index < self.memory_size:
            raise ValueError(f"queue_idx = {index} of the saved memory must be an integer from 0 to {self.memory_size - 1}")
        if not isinstance(calls, int) or calls < 0:
            raise ValueError(f"calls = {calls} of the saved memory must be an integer of at least 0")
        filled = self.memory_size if state["has_been_filled"] else index
        if labels is not None:
            check_labels("labels of the saved memory", labels)
        if rows is None or rows.ndim != 2 or not self.loss.checks:
            return
        if not rows.is_floating_point():
            raise TypeError(f"the rows of the saved memory must be floating-point numbers, not {rows.dtype}")
        bad = (~which_are_unit(rows[:filled])).nonzero()
        if len(bad):
            raise ValueError(f"row {int(bad[0])} of the saved memory is not finite or has no unit length")

    def extra_repr(self) -> str:
        """Sizes as `print(model)` shows them."""
        sizes = f"embedding_size={self.embedding_size}, memory_size={self.memory_size}"
        return sizes + (f", start_after={self.start_after}" if self.start_after else "")
