"""What the processes of a group tell each other: rows, numbers and errors, gathered in the order of ranks.

Every process enters the same exchanges, whatever happens to it: one that has an error says so in the next one, and all raise.
"""

from __future__ import annotations

import math
from typing import Any, Callable, Literal, Sequence, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Scale = Literal["mean", "sum"]

TEXT = 512
"""Bytes that introduce a process: its number of rows, whether it has an error, and a line about either."""
_KINDS: list[type[Exception]] = [ValueError, TypeError, RuntimeError]


Called = TypeVar("Called", bound=Callable[..., Any])


def between_graphs(function: Called) -> Called:
    """A function that a compiler leaves as it is."""
    disable: Any = getattr(torch.compiler, "disable")
    left: Called = disable(function, reason="the processes of a group tell each other between compiled graphs")
    return left


class Ranks:
    """A process group as a loss uses it."""

    def __init__(self, group: Any, uneven: bool, gradient: Scale) -> None:
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"group must be a torch.distributed.ProcessGroup, not {type(group).__name__}: "
                "torch.distributed.group.WORLD after init_process_group is all processes, get_group() of a DeviceMesh its own"
            )
        if gradient not in ("mean", "sum"):
            raise ValueError(f'gradient must be "mean" or "sum", not {gradient!r}')
        self.group, self.uneven, self.gradient = group, uneven, gradient
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("this process is not in the group")
        # "cuda:nccl", or "cpu:gloo,cuda:nccl".
        self.devices = [part.partition(":")[0] for part in dist.get_backend_config(group).split(",")]
        self.gathered_bytes = 0

    @property
    def scale(self) -> float:
        """What a row's gradient is multiplied by: DistributedDataParallel divides by the number of processes."""
        return float(self.size) if self.gradient == "mean" else 1.0

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("a loss with a process group cannot be pickled: save its state_dict")

    def check_device(self, rows: Tensor) -> None:
        """NCCL carries nothing of the processor's."""
        if rows.device.type not in self.devices:
            raise ValueError(f"the rows are on {rows.device}, and the group carries those of {' and '.join(self.devices)} alone")

    def meet(self, rows: Tensor, about: str, error: Exception | None = None) -> Meeting:
        """Introduces the rows of this process to the others; raises on all if one has an error or is about something else."""
        kind = 0 if error is None else 1 + next((i for i, known in enumerate(_KINDS) if isinstance(error, known)), 2)
        text = (about if error is None else str(error)).encode()[: TEXT - 16].ljust(TEXT - 16, b"\0")
        count = rows.shape[0] if error is None else 0
        card = torch.cat([torch.tensor([count, kind]).view(torch.uint8), torch.frombuffer(bytearray(text), dtype=torch.uint8)])
        # Wherever the rows of one process are, the cards of all are in the same place.
        place = torch.device("cpu") if "cpu" in self.devices else torch.device(self.devices[0], torch.cuda.current_device())
        cards = self._all(card.to(place)).cpu()
        heads = cards[:, :16].contiguous().view(torch.int64).tolist()
        lines = [line.tobytes().rstrip(b"\0").decode(errors="replace") for line in cards[:, 16:].numpy()]
        for rank, (_, kind) in enumerate(heads):
            if kind:
                raise _KINDS[kind - 1](f"rank {rank}: {lines[rank]}") from error
        counts = [count for count, _ in heads]
        for rank, line in enumerate(lines):
            if line != lines[0]:
                raise ValueError(f"rank {rank} has {line}, and rank 0 {lines[0]}: they must be the same")
            if counts[rank] != counts[0] and not self.uneven:
                raise ValueError(
                    f"rank {rank} has {counts[rank]} rows, and rank 0 {counts[0]}: say uneven=True, or leave out the last batch"
                )
        return Meeting(self, counts)

    def fail(self, error: Exception) -> None:
        """Tells the others of an error before the first exchange, and raises as they do."""
        self.meet(torch.empty(0), "", error)

    def _all(self, tensor: Tensor) -> Tensor:
        """`[W, ...]` from `[...]` of bytes, the same size everywhere."""
        everyone = tensor.new_empty((self.size, *tensor.shape))
        dist.all_gather_into_tensor(everyone.view(-1), tensor.view(-1), group=self.group)
        self.gathered_bytes += everyone.numel()
        return everyone


class Telling:
    """What is wrong before the first exchange raises in all processes, not in this one alone."""

    def __init__(self, ranks: Ranks | None) -> None:
        self.ranks = ranks

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self.ranks is not None and isinstance(error, (TypeError, ValueError, RuntimeError)):
            self.ranks.fail(error)


class Meeting:
    """The exchanges about one batch, of which every process knows how many rows each has."""

    def __init__(self, ranks: Ranks, counts: list[int]) -> None:
        self.ranks, self.counts = ranks, counts
        self.total, self.most = sum(counts), max(counts)
        self.first = sum(counts[: ranks.rank])
        self.own = slice(self.first, self.first + counts[ranks.rank])

    def rows(self, tensor: Tensor) -> Tensor:
        """The rows of all processes one behind the other."""
        return self._joined(self.ranks._all(self._padded(tensor)), tensor)

    def tell(self, work: Callable[[], tuple[Sequence[Tensor], Tensor]], rows: int, sums: int, like: Tensor) -> Any:
        """Does a step, and tells the others what it found: `rows` numbers of 4 bytes for each row, and `sums` numbers of
        8 bytes. Answers the former joined, the latter as `[W, sums]`. An error in one process is raised in all."""
        error: Exception | None = None
        try:
            numbers, totals = work()
        except Exception as failed:
            error = failed
            numbers = [like.new_zeros(self.counts[self.ranks.rank], dtype=torch.int32)] * rows
            totals = like.new_zeros(sums, dtype=torch.float64)
        flag = torch.full((1,), error is not None, dtype=torch.float64, device=like.device)
        told = [flag.view(torch.uint8), totals.view(torch.uint8), *map(self._padded, numbers)]
        everyone = self.ranks._all(torch.cat(told))
        # On a GPU nobody waits: what is issued there fails for want of memory at most, and ends the process.
        if not like.is_cuda or error is not None:
            failed_ranks = everyone[:, :8].reshape(-1).view(torch.float64).nonzero().flatten().tolist()
            if failed_ranks:
                raise RuntimeError(f"rank {failed_ranks[0]} failed" + (f": {error}" if error else "")) from error
        start, width = 8 * (1 + sums), 4 * self.most
        joined = [
            self._joined(everyone[:, start + place * width : start + (place + 1) * width], number)
            for place, number in enumerate(numbers)
        ]
        return (*joined, everyone[:, 8:start].reshape(-1).view(totals.dtype).view(self.ranks.size, sums))

    def _padded(self, tensor: Tensor) -> Tensor:
        """The bytes of the rows, as many as the longest has."""
        flat = tensor.contiguous().view(-1)
        missing = (self.most - tensor.shape[0]) * math.prod(tensor.shape[1:])
        if missing:
            flat = torch.cat([flat, flat.new_zeros(missing)])
        return flat.view(torch.uint8)

    def _joined(self, everyone: Tensor, like: Tensor) -> Tensor:
        if all(count == self.most for count in self.counts):
            flat = everyone.reshape(-1)
        else:
            row = everyone.shape[1] // self.most
            flat = torch.cat([part[: count * row] for part, count in zip(everyone, self.counts)])
        return flat.view(like.dtype).view(self.total, *like.shape[1:])
