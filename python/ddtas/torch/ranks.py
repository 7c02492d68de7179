"""The collectives of a process group: all-gathers of rows, numbers and errors, in the order of ranks.

Every process takes part in the same all-gathers, even after an error: it reports the error in the next one, and all raise.
"""

from __future__ import annotations

import math
import os
from typing import Any, Callable, Literal, Sequence, Tuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Scale = Literal["mean", "sum"]

HEADER_BYTES = 528
"""Size of a handshake's header: number of rows (int64), kind of error or 0 (int64), `Fingerprint` (two float64), and a description or
the error's message."""
_TEXT = slice(32, HEADER_BYTES)
Fingerprint = Tuple[float, float]
"""A number that depends on the references, and how much it may differ by rounding."""
_KINDS: list[type[Exception]] = [ValueError, TypeError, RuntimeError]


Called = TypeVar("Called", bound=Callable[..., Any])
COLLECTIVES = "the collectives of a process group run outside compiled graphs"


def uncompiled(function: Called, reason: str = COLLECTIVES) -> Called:
    """The function, excluded from torch.compile: a graph break."""
    disable: Any = getattr(torch.compiler, "disable")
    excluded: Called = disable(function, reason=reason)
    return excluded


NOT_IN_GROUP = "this process is not in the group"


def check_group(group: Any, gradient: Scale) -> None:
    """Checks the arguments of a loss that name its processes."""
    if group is None:
        raise ValueError(
            'group is None, as torch.distributed.group.WORLD is before init_process_group: say "world" for all processes, or leave '
            "the argument out for this process alone"
        )
    named = group is False or group == "world"
    if not named and group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(NOT_IN_GROUP)
    if not named and not isinstance(group, dist.ProcessGroup):
        got = repr(group) if isinstance(group, (str, bool)) else type(group).__name__
        raise TypeError(
            f'group must be "world", which is all processes, or a torch.distributed.ProcessGroup, not {got}: '
            "get_group() of a DeviceMesh is its own"
        )
    if gradient not in ("mean", "sum"):
        raise ValueError(f'gradient must be "mean" or "sum", not {gradient!r}')


def initialized() -> bool:
    """Whether torch.distributed is initialised."""
    return dist.is_available() and dist.is_initialized()


def world_exists() -> bool:
    """The same; raises RuntimeError if it is not, in a process that was started as one of several."""
    if initialized():
        return True
    if os.environ.get("WORLD_SIZE", "").strip() not in ("", "0", "1"):
        raise RuntimeError('group="world" of one of several processes: call torch.distributed.init_process_group before the loss')
    return False


class Ranks:
    """A process group, with the settings `uneven` and `gradient` of the loss."""

    def __init__(self, group: Any, uneven: bool, gradient: Scale) -> None:
        self.group, self.uneven, self.gradient = group, uneven, gradient
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError(NOT_IN_GROUP)
        # The backend config is "cuda:nccl", or "cpu:gloo,cuda:nccl".
        self.devices = [part.partition(":")[0] for part in dist.get_backend_config(group).split(",")]
        self.gathered_bytes = 0

    @property
    def scale(self) -> float:
        """The factor of each row's gradient: with "mean" the number of processes, by which DistributedDataParallel divides."""
        return float(self.size) if self.gradient == "mean" else 1.0

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("a loss with a process group cannot be pickled: save its state_dict")

    def check_device(self, rows: Tensor) -> None:
        """Checks that the group has a backend for the rows' device: NCCL has none for the CPU."""
        if rows.device.type not in self.devices:
            raise ValueError(f"the rows are on {rows.device}, and the group carries those of {' and '.join(self.devices)} alone")

    def handshake(
        self,
        rows: Tensor,
        about: str,
        error: Exception | None = None,
        references: Fingerprint = (0.0, 0.0),
        counted: str = "rows",
    ) -> BatchExchange:
        """Gathers each process's number of rows, its description `about` of the call, and its error if it has one.

        Raises in all processes if one has an error, or if descriptions, references or (unless uneven) numbers of rows differ.
        """
        kind = 0 if error is None else 1 + next((i for i, known in enumerate(_KINDS) if isinstance(error, known)), 2)
        most = _TEXT.stop - _TEXT.start
        text = (about if error is None else str(error)).encode()[:most].ljust(most, b"\0")
        count = rows.shape[0] if error is None else 0
        numbers = [torch.tensor([count, kind]), torch.tensor(references, dtype=torch.float64)]
        header = torch.cat([*(part.view(torch.uint8) for part in numbers), torch.frombuffer(bytearray(text), dtype=torch.uint8)])
        # A device that depends on the group alone: the rows of one process may be elsewhere, which is an error to report.
        device = torch.device("cpu") if "cpu" in self.devices else torch.device(self.devices[0], torch.cuda.current_device())
        headers = self._all_gather(header.to(device)).cpu()
        counts, kinds = headers[:, :16].contiguous().view(torch.int64).T.tolist()
        fingerprints = headers[:, 16:32].contiguous().view(torch.float64).tolist()
        texts = [text.tobytes().rstrip(b"\0").decode(errors="replace") for text in headers[:, _TEXT].numpy()]
        for rank, kind in enumerate(kinds):
            if kind:
                raise _KINDS[kind - 1](f"rank {rank}: {texts[rank]}") from error
        for rank, described in enumerate(texts):
            if described != texts[0]:
                other, first = _differing(described, texts[0])
                raise ValueError(f"rank {rank} has {other}, and rank 0 {first}: they must be the same")
            (number, rounding), (first_number, _) = fingerprints[rank], fingerprints[0]
            if abs(number - first_number) > rounding:
                raise ValueError(
                    f"rank {rank} has other references than rank 0: they must be the same everywhere, "
                    "or say gather_references=True for those of each process"
                )
            if counts[rank] != counts[0] and not self.uneven:
                both = f"rank {rank} has {counts[rank]} {counted}, and rank 0 {counts[0]}"
                raise ValueError(f"{both}: say uneven=True, or leave out the last batch")
        return BatchExchange(self, counts, rows.device)

    def fail(self, error: Exception) -> None:
        """Reports an error to the other processes by a handshake, which raises in all of them."""
        self.handshake(torch.empty(0), "", error)

    def _all_gather(self, tensor: Tensor) -> Tensor:
        """`[W, ...]` from `[...]`: bytes, of the same shape in all W processes."""
        gathered = tensor.new_empty((self.size, *tensor.shape))
        dist.all_gather_into_tensor(gathered.view(-1), tensor.view(-1), group=self.group)
        self.gathered_bytes += gathered.numel()
        return gathered


def _differing(one: str, other: str) -> tuple[str, str]:
    """Those parts of two descriptions, separated by commas, that differ; both whole if they have not the same parts."""
    if one.count(", ") != other.count(", "):
        return one, other
    pairs = [pair for pair in zip(one.split(", "), other.split(", ")) if pair[0] != pair[1]]
    return ", ".join(pair[0] for pair in pairs), ", ".join(pair[1] for pair in pairs)


class FailedAlone(RuntimeError):
    """An error in this process that the others have not raised: they have gone on, with a loss of NaN."""


class RaiseOnAllRanks:
    """Context manager before a handshake: an error in one process raises in all. Without a group it does nothing."""

    def __init__(self, ranks: Ranks | None) -> None:
        self.ranks = ranks

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self.ranks is not None and isinstance(error, (TypeError, ValueError, RuntimeError)):
            self.ranks.fail(error)


class BatchExchange:
    """The all-gathers of one batch, after a handshake: every process knows how many rows each has."""

    failures: Tensor
    """`[W]`: 1 for each process that has failed in a step so far."""

    def __init__(self, ranks: Ranks, counts: list[int], device: torch.device) -> None:
        self.ranks, self.counts, self.device = ranks, counts, device
        self.total, self.largest = sum(counts), max(counts)
        self.first = sum(counts[: ranks.rank])
        self.own = slice(self.first, self.first + counts[ranks.rank])
        self.waits = True
        self._error: Exception | None = None

    def gather_rows(self, tensor: Tensor) -> Tensor:
        """The rows of all processes, concatenated in the order of ranks."""
        return self._concatenated(self.ranks._all_gather(self._padded(tensor)), tensor) if self.total else tensor

    def gather_step(self, work: Callable[[], tuple[Sequence[Tensor], Tensor]], rows: int, sums: int) -> Any:
        """Runs a step, and gathers its results: `rows` tensors of 4 bytes for each row, and `sums` numbers of 8 bytes.

        Returns the former concatenated over the processes, the latter as `[W, sums]`. An error in one process raises in all. If
        `waits` is False, no process waits for the others: the one with the error goes on with zeros, and raises it by
        `raise_own_error`; `failures` says so to the others.
        """
        error: Exception | None = None
        try:
            numbers, totals = work()
        except Exception as failed:
            error = failed
            numbers = [torch.zeros(self.counts[self.ranks.rank], dtype=torch.int32, device=self.device)] * rows
            totals = torch.zeros(sums, dtype=torch.float64, device=self.device)
        self._error = self._error or error
        flag = torch.full((1,), self._error is not None, dtype=torch.float64, device=self.device)
        payload = [flag.view(torch.uint8), totals.view(torch.uint8), *map(self._padded, numbers)]
        gathered = self.ranks._all_gather(torch.cat(payload))
        self.failures = gathered[:, :8].reshape(-1).view(torch.float64)
        if self.waits:
            failed_ranks = self.failures.nonzero().flatten().tolist()
            if failed_ranks:
                raise RuntimeError(f"rank {failed_ranks[0]} failed" + (f": {error}" if error else "")) from error
        # Its traceback holds this frame, which would hold it and all rows.
        del error
        start, width = 8 * (1 + sums), 4 * self.largest
        all_rows = [
            self._concatenated(gathered[:, start + place * width : start + (place + 1) * width], number)
            for place, number in enumerate(numbers)
        ]
        return (*all_rows, gathered[:, 8:start].reshape(-1).view(totals.dtype).view(self.ranks.size, sums))

    def raise_own_error(self) -> None:
        """After the last step: raises the first error of this process."""
        error, self._error = self._error, None
        if error is not None:
            raise FailedAlone(f"rank {self.ranks.rank} failed: {error}") from error

    def _padded(self, tensor: Tensor) -> Tensor:
        """The bytes of the rows, padded with zeros to as many rows as the largest process has."""
        flat = tensor.contiguous().view(-1)
        missing = (self.largest - tensor.shape[0]) * math.prod(tensor.shape[1:])
        if missing:
            flat = torch.cat([flat, flat.new_zeros(missing)])
        return flat.view(torch.uint8)

    def _concatenated(self, gathered: Tensor, like: Tensor) -> Tensor:
        """The gathered rows without the padding of `_padded`, in the type of `like`."""
        if all(count == self.largest for count in self.counts):
            flat = gathered.reshape(-1)
        else:
            row = gathered.shape[1] // self.largest
            flat = torch.cat([part[: count * row] for part, count in zip(gathered, self.counts)])
        return flat.view(like.dtype).view(self.total, *like.shape[1:])
