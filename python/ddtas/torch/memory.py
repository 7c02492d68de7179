"""`CrossBatchMemory`: the cross-batch memory as a PyTorch module."""

from __future__ import annotations

from functools import partial
from typing import Any, SupportsIndex, Union

import torch
from torch import Tensor, nn

from .engine import NO_INDICES, NOT_FINITE, check_labels, check_side, check_tensor, refuse_arguments
from .loss import SoftContrastiveLoss
from .operator import good_rows, which_are_unit
from .ranks import FailedAlone, RaiseOnAllRanks, Ranks, uncompiled


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
    """The mask on the device of the rows. Integers are refused: they would index rows instead of masking them."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"enqueue_mask must be a tensor of booleans, not {got}")
    if mask.shape != rows.shape[:1]:
        raise ValueError(f"enqueue_mask must be [{rows.shape[0]}], not {list(mask.shape)}")
    return mask.to(rows.device)


Places = Union[slice, Tensor]
"""Places in the queue: a slice where it is known that they follow each other, which is copied faster than by indices."""


def _indices(places: Places) -> Tensor:
    return torch.arange(places.start, places.stop, device="cpu") if isinstance(places, slice) else places


def _rows_at(buffer: Tensor, places: Places) -> Tensor:
    """A copy of the rows there."""
    return buffer[places].clone() if isinstance(places, slice) else buffer.index_select(0, places)


def _refuse_backward_pass() -> None:
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "a memory queues a batch at each call, and was called in a backward pass, as activation checkpointing does to "
            "compute again: call it outside of the checkpointed function"
        )


def _extra_state(saved: Any) -> dict[str, Any]:
    """The saved extra state by name. Old checkpoints hold a dict, newer ones a tensor."""
    if isinstance(saved, dict):
        return saved
    if not isinstance(saved, Tensor) or saved.shape != (3,):
        raise ValueError("_extra_state of the saved memory must be a tensor of 3 integers")
    return dict(zip(("queue_idx", "has_been_filled", "calls"), saved.tolist()))


class CrossBatchMemory(nn.Module):
    """Compares a batch with a queue of the last `memory_size` rows, its own among them (Wang et al., CVPR 2020).

    Called as pytorch-metric-learning's: the rows of a batch are queued, first in, first out, and then compared with the whole
    queue. A row makes no pair with itself, which is recognised by its place in the queue. Queued rows are constants: they get no
    gradient. The queue is part of the state_dict.

    Args:
        loss: a `SoftContrastiveLoss`.
        embedding_size: dimensions of a row.
        memory_size: number of rows that the queue holds. Default 1,024.
        dtype: type of the queue, in which rows are compared. Default float32; float16 or bfloat16 halve the memory, float64 is
            for `gradcheck`.
        start_after: number of first calls that return the loss of the batch alone and queue nothing, since embeddings change
            fast at first, and queued rows would be outdated. Default 0. `start()` ends this at once. A compiled module has a
            graph break until then.

    `fill(embeddings, labels)` queues rows without a loss; `filled` is the number of queued rows. A call that raises leaves the
    queue as it was, and does not count for `start_after`. A row that is not finite is never queued: if nothing is raised for it
    (`check=False` of the loss, or a GPU without `check="wait"`), an ignored row is queued in its place, and `statistics` counts
    it as `not_finite`.

    If the loss has a process group, the rows of all processes are queued in the order of ranks, and all queues are equal.
    """

    embedding_memory: Tensor
    label_memory: Tensor
    queue_idx: Tensor
    """Index in the queue of the next row."""
    _count: Tensor
    calls = start_after = 0
    started: bool
    """Whether batches are compared with the queue. An attribute, so that a compiled graph depends on it and not on `calls`."""

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
                "for another loss use the memory of its own library"
            )
        if type(loss).forward is not SoftContrastiveLoss.forward:
            name = type(loss).__name__
            raise TypeError(f"CrossBatchMemory does not call {name}.forward: override the memory's forward instead")
        _check_memory_type(dtype)
        self.loss = loss
        self.embedding_size = _checked_count("embedding_size", embedding_size, 1)
        self.memory_size = memory_size = _checked_count("memory_size", memory_size, 1)
        self.start_after = _checked_count("start_after", start_after, 0)
        self.calls = 0
        self.register_buffer("embedding_memory", torch.zeros(memory_size, self.embedding_size, dtype=dtype))
        self.register_buffer("label_memory", torch.full((memory_size,), -1))
        # Not persistent: the state_dict holds both in the extra state.
        self.register_buffer("queue_idx", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("_count", torch.zeros((), dtype=torch.int64), persistent=False)
        self.reset_queue()

    @torch.no_grad()
    def reset_queue(self) -> None:
        """Empties the queue."""
        self.queue_idx.zero_()
        self._count.zero_()
        self._forget(0)

    def _forget(self, first: int) -> None:
        """Makes the rows from `first` on ignored. They get unit length, since a GPU checks ignored rows too."""
        self.label_memory[first:] = -1
        self.embedding_memory[first:] = 0
        self.embedding_memory[first:, 0] = 1

    @property
    def filled(self) -> int:
        """Number of rows in the queue."""
        return int(self._count)

    @property
    def has_been_filled(self) -> bool:
        """Whether the queue is full."""
        return self.filled == self.memory_size

    def start(self) -> None:
        """Ends `start_after`: the next batch is compared with the queue."""
        self.calls = max(self.calls, self.start_after)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("queue_idx", "_count") and isinstance(value, Tensor):
            # `from_pretrained` of transformers puts new tensors of any value in the place of what is not persistent; others
            # call `reset_queue`.
            present = self._buffers.get(name)
            if present is not None and not present.is_meta and not value.is_meta:
                value = present.to(value.device, copy=True)
        super().__setattr__(name, value)
        if name in ("calls", "start_after"):
            self.__dict__["started"] = self.calls >= self.start_after

    def __setstate__(self, state: dict[str, Any]) -> None:
        untyped: Any = super().__setstate__
        untyped(state)
        # Modules that were pickled by an earlier version have no `started`.
        self.calls = self.calls

    @property
    def statistics(self) -> dict[str, float]:
        """The `statistics` of the loss."""
        return self.loss.statistics

    def check(self) -> None:
        """Calls `check()` of the loss."""
        self.loss.check()

    def forward(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: None = None, enqueue_mask: Tensor | None = None
    ) -> Tensor:
        """Queues the rows, and returns the loss of the batch compared with the queue.

        With `enqueue_mask`, `[B]` booleans, the rows where it is True are queued, and the loss is that of the other rows: 0 if
        there are none. Before `start_after` calls nothing is queued, and the rows of the loss are compared with each other.

        Raises what the loss does, and ValueError for more rows than the queue holds or for rows of another dimension. The queue
        is then unchanged.
        """
        ranks = self.loss.ranks
        with RaiseOnAllRanks(ranks):
            _refuse_backward_pass()
        if not self.started:
            before_start: Tensor = self._before_start(embeddings, labels, indices_tuple, enqueue_mask)
            return before_start
        with RaiseOnAllRanks(ranks):
            if indices_tuple is not None:
                raise ValueError(NO_INDICES)
            rows, given, queued, labels = self._prepared(embeddings, labels)
            queued_labels = labels
            if enqueue_mask is not None:
                enqueue_mask = _checked_mask(enqueue_mask, rows)
                queued, queued_labels = queued[enqueue_mask], labels[enqueue_mask]
                rows, labels = rows[~enqueue_mask], labels[~enqueue_mask]
                given = None if given is None else given[~enqueue_mask]
        own = slice(0, queued.shape[0])
        if ranks is not None:
            queued, queued_labels, own = self._of_all_ranks(ranks, queued, queued_labels, enqueue_mask is not None)
        places = self._places(queued.shape[0])
        # Without a mask the compared rows are in the queue themselves.
        identity = _indices(places)[own] if enqueue_mask is None else None
        if torch.compiler.is_compiling():
            self._enqueue(places, queued, queued_labels)
            return self._loss_against_queue(rows, labels, identity, given)
        before = _rows_at(self.embedding_memory, places), _rows_at(self.label_memory, places), self.queue_idx.clone(), self._count.clone()
        try:
            self._enqueue(places, queued, queued_labels)
            return self._loss_against_queue(rows, labels, identity, given)
        except FailedAlone:
            # The other processes keep the rows.
            raise
        except BaseException:
            self.embedding_memory[places], self.label_memory[places] = before[:2]
            self.queue_idx.copy_(before[2])
            self._count.copy_(before[3])
            raise

    @partial(uncompiled, reason="calls are counted for start_after outside compiled graphs: call the memory's loss until start()")
    def _before_start(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: None, enqueue_mask: Tensor | None
    ) -> Tensor:
        if enqueue_mask is not None:
            with RaiseOnAllRanks(self.loss.ranks):
                check_side("anchors", embeddings, labels, "labels")
                enqueue_mask = _checked_mask(enqueue_mask, embeddings)
            embeddings, labels = embeddings[~enqueue_mask], labels[~enqueue_mask.to(labels.device)]
        try:
            loss: Tensor = self.loss(embeddings, labels, indices_tuple)
        except FailedAlone:
            self.calls += 1  # as in the other processes
            raise
        self.calls += 1
        return loss

    def fill(self, embeddings: Tensor, labels: Tensor) -> None:
        """Queues rows without computing a loss. Raises what a call does."""
        ranks = self.loss.ranks
        with torch.no_grad():
            with RaiseOnAllRanks(ranks):
                _refuse_backward_pass()
                _, _, rows, labels = self._prepared(embeddings, labels)
            if ranks is not None:
                rows, labels, _ = self._of_all_ranks(ranks, rows, labels, False)
            self._enqueue(self._places(rows.shape[0]), rows, labels)

    def _prepared(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """What `unit_rows` of the loss returns for the rows in the wider of their type and the queue's; unit rows in the queue's type;
        and the labels."""
        check_tensor("embeddings", embeddings)
        if embeddings.is_complex():
            raise TypeError(f"embeddings must be real numbers, not {embeddings.dtype}")
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
        rows, given = self.loss.unit_rows(embeddings.to(torch.promote_types(embeddings.dtype, memory_type)))
        labels = labels.to(rows.device, torch.int64)
        queued = rows.detach().to(memory_type)
        # A bad row for which nothing is raised is ignored, and replaced in the queue, where it would spoil later losses.
        good = good_rows(queued) if self.loss.checks else torch.isfinite(queued).all(1)
        raises = self.loss.checks and rows.device.type == "cpu"
        if not raises or torch.compiler.is_compiling():
            # In a compiled graph the check is computed for its result alone.
            labels = torch.where(good, labels, NOT_FINITE)
        if not raises:
            axis = torch.zeros_like(queued[:1])
            axis[:, 0] = 1
            queued = torch.where(good[:, None], queued, axis)
        return rows, given, queued, labels

    @uncompiled
    @torch.no_grad()
    def _of_all_ranks(self, ranks: Ranks, rows: Tensor, labels: Tensor, masked: bool) -> tuple[Tensor, Tensor, slice]:
        """The rows and labels of all processes in the order of ranks, and the slice of this process's rows."""
        about = f"a memory of {list(self.embedding_memory.shape)} {rows.dtype}, masked: {masked}"
        exchange = ranks.handshake(rows, about)
        return exchange.gather_rows(rows.detach()), exchange.gather_rows(labels), exchange.own

    def _places(self, count: int) -> Places:
        """The places of the next `count` rows."""
        if count > self.memory_size:
            raise ValueError(f"{count} rows do not fit a memory of {self.memory_size}")
        if self.queue_idx.is_cpu and not torch.compiler.is_compiling():
            first = int(self.queue_idx)
            if not 0 <= first < self.memory_size:
                raise RuntimeError("the memory was made on the meta device and never filled or emptied: call reset_queue()")
            if first + count <= self.memory_size:
                return slice(first, first + count)
        return (self.queue_idx + torch.arange(count, device=self.queue_idx.device)) % self.memory_size

    def _loss_against_queue(self, rows: Tensor, labels: Tensor, identity: Tensor | None, given: Tensor | None) -> Tensor:
        # On the CPU `good_rows` has checked the rows already; queued rows were checked when they were queued. `rows` may have a
        # wider type than the queue, so that the gradient is not rounded to the queue's.
        return self.loss.loss_of_unit_rows(
            rows, labels, self.embedding_memory, self.label_memory, identity, rows.device.type != "cpu", given
        )

    @torch.no_grad()
    def _enqueue(self, places: Places, rows: Tensor, labels: Tensor) -> None:
        self.embedding_memory[places] = rows
        self.label_memory[places] = labels
        self._count.add_(rows.shape[0]).clamp_max_(self.memory_size)
        self.queue_idx.add_(rows.shape[0]).remainder_(self.memory_size)

    def _apply(self, fn: Any, recurse: bool = True) -> CrossBatchMemory:
        was_meta = any(buffer.is_meta for buffer in self.buffers(recurse=False))
        untyped: Any = super()._apply
        untyped(fn, recurse)
        if was_meta and not any(buffer.is_meta for buffer in self.buffers(recurse=False)):
            # `to_empty` gives the buffers any values.
            self.reset_queue()
        return self

    def reset_parameters(self) -> None:
        """Empties the queue: what code that makes modules on the meta device calls."""
        self.reset_queue()

    def get_extra_state(self) -> Tensor:
        """The queue's index, whether it is full, and the number of calls: a tensor, since safetensors saves nothing else."""
        if self.queue_idx.is_meta:
            return torch.empty(3, dtype=torch.int64, device="meta")
        return torch.tensor([int(self.queue_idx), int(self.has_been_filled), self.calls])

    @torch.no_grad()
    def set_extra_state(self, saved: Tensor | dict[str, int]) -> None:
        """Restores what `get_extra_state` returned."""
        state = _extra_state(saved)
        index, full = state["queue_idx"], bool(state["has_been_filled"])
        if self.queue_idx.is_meta:
            # Libraries that load tensor by tensor have not loaded the labels yet.
            near = "cpu" if self.label_memory.is_meta else self.label_memory.device
            self.queue_idx, self._count = (torch.zeros((), dtype=torch.int64, device=near) for _ in range(2))
        self.queue_idx.fill_(index)
        self._count.fill_(self.memory_size if full else index)
        # Old checkpoints have no `calls`.
        self.calls = state.get("calls", self.calls)
        if not full:
            # Old checkpoints hold any values there.
            self._forget(index)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Raises for a queue that later calls would fail on, or compute wrong losses with, before any of it is loaded."""
        self._check_state(*(state_dict.get(prefix + name) for name in ("embedding_memory", "label_memory", "_extra_state")))
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _check_state(self, rows: Any, labels: Any, state: Any) -> None:
        """Checks the values of a saved queue. torch itself refuses missing tensors and wrong shapes."""
        if state is None:
            # As in a state_dict of pytorch-metric-learning's memory, whose rows may have any length.
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
        """The sizes, for `print(model)`."""
        sizes = f"embedding_size={self.embedding_size}, memory_size={self.memory_size}"
        return sizes + (f", start_after={self.start_after}" if self.start_after else "")
