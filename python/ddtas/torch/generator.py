"""`ThresholdGenerator`: learns the loss thresholds during training (docs/method.md, section 5)."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections import deque
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Callable, Dict, Iterator, Literal, SupportsFloat, SupportsIndex, Tuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call, jvp

from ..functional import threshold_gradient
from ..settings import Settings
from . import search
from .engine import check_labels, check_tensor, laid_out, normalize_rows
from .loss import THRESHOLDS, SoftContrastiveLoss
from .operator import UNCHECKED, loss_of
from .ranks import RaiseOnAllRanks, Ranks

VirtualStep = Literal["unit", "plain"]
Batch = Tuple[Tensor, Tensor]
"""Inputs of the network and their labels."""
Weights = Dict[str, Tensor]
Result = TypeVar("Result")

DECAYS = (0.95, 0.999)
"""Adam's decay rates of mean and square. That of the mean is above the usual 0.9: a gradient's noise is many times its mean."""
EPSILON = 1e-12
ROUNDING = 1e-6
"""A threshold that is a float32 tensor may be beyond its range, or differ from the other one, by its rounding."""


@cache
def _prepare_forward_mode() -> None:
    """torch's first derivative in forward mode compiles its formulas by a function that it calls deprecated. Once, since each
    `catch_warnings` makes Python give the warnings again that it gave before."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script.* is deprecated")
        jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))


class _Within(nn.Module):
    """Runs work on a network within `functional_call`, so that what runs later, as a recomputation of activations in a backward
    pass does, sees the same weights."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, work: Callable[[nn.Module], Result]) -> Result:
        return work(self.network)


class ThresholdGenerator:
    """Learns `lambda_pos` and `lambda_neg` of a loss during training, by one step of meta-learning for each batch.

    A virtual step changes the network's weights along the gradient of the batch's loss. Another batch, the meta batch, is judged
    there by the loss at a fixed threshold `lambda_reference`. Its derivative with respect to the thresholds says whether others
    would have been better, and the thresholds descend along it. The formulas are in docs/method.md, section 5; what this is
    worth is in docs/threshold-study.md. `ddtas-train --generator` does the same; its `--virtual-rate` is 1 for a head by default.

        generator = ThresholdGenerator(loss_fn, model.head)

        features = model.backbone(images)
        generator.step(features, labels)              # changes the thresholds of loss_fn
        loss = loss_fn(model.head(features), labels)

    `network` is usually the embedding head, which costs little. It can be the whole network, with pictures as inputs. Its
    weights and buffers are never changed, and its dropout layers are off during a step. All its operations need forward-mode
    derivatives: attention in one kernel, `EmbeddingBag` and reentrant checkpointing have none. Give DistributedDataParallel's
    `module`, not the wrapper. Sharded parameters (DTensor) are refused. Call `step` under the autocast that the network runs in,
    but outside of it for a convolutional network, whose forward mode torch does not have there.

    Args:
        loss: the loss whose thresholds are learned. Its thresholds become tensors (buffers), which `step` changes in place, so
            that a compiled step is not compiled again; copies of the model, such as an `AveragedModel`, are made after that.
            For a `CrossBatchMemory` give its `loss`: the queue takes no part here. With a process group the virtual step is
            that of all processes' rows, and each process must call `step`. Thresholds that are tensors already must be float32
            or float64.
        network: maps inputs to embeddings `[B, D]`, which are normalised as by the loss. Has parameters that learn.
        lambda_rate: learning rate of the thresholds, above 0. Default 0.01. The optimizer is Adam.
        lambda_reference: threshold of the meta loss, -2 to 2. Default 0.7. The thresholds move towards it.
        lambda_min: smallest threshold, -2 to 2. Default 0.
        lambda_max: largest threshold, -2 to 2. Default 1.
        lambda_pair: whether the two thresholds are learned apart. Default False: they are equal, and stay so.
        virtual_step: "unit" (default) divides the gradient of the virtual step by its length; "plain" does not.
        virtual_rate: the length of a unit step, or the factor of a plain one; above 0. Default 0.1. A step of length 1 ruins a
            pretrained network, and on a head it lets thresholds run away from the reference.
        meta_recent: the meta batch is this many of the last batches if none is given to `step`; at least 1. Default 4.

    Raises TypeError or ValueError for settings of wrong types or out of range, and for thresholds that require a gradient.
    """

    hypergradient: tuple[float, float] | None
    """The derivatives of the meta loss by `lambda_pos` and `lambda_neg` in the last step; None if none was taken."""

    def __init__(
        self,
        loss: SoftContrastiveLoss,
        network: nn.Module,
        *,
        lambda_rate: float = 0.01,
        lambda_reference: float = 0.7,
        lambda_min: float = 0.0,
        lambda_max: float = 1.0,
        lambda_pair: bool = False,
        virtual_step: VirtualStep = "unit",
        virtual_rate: float = 0.1,
        meta_recent: int = 4,
    ) -> None:
        if not isinstance(loss, SoftContrastiveLoss):
            raise TypeError(f"loss must be a SoftContrastiveLoss, not {type(loss).__name__}; of a CrossBatchMemory give its loss")
        if not isinstance(network, nn.Module):
            raise TypeError(f"network must be a torch.nn.Module, not {type(network).__name__}")
        if virtual_step not in ("unit", "plain"):
            raise ValueError(f'virtual_step must be "unit" or "plain", not {virtual_step!r}')
        if not isinstance(meta_recent, SupportsIndex) or meta_recent.__index__() < 1:
            raise ValueError(f"meta_recent = {meta_recent!r} must be an integer of at least 1")
        self.loss, self.network, self.virtual_step, self.lambda_pair = loss, network, virtual_step, bool(lambda_pair)
        self.lambda_rate, self.virtual_rate = _above_0("lambda_rate", lambda_rate), _above_0("virtual_rate", virtual_rate)
        self.lambda_reference = _threshold("lambda_reference", lambda_reference)
        self.lambda_min, self.lambda_max = _threshold("lambda_min", lambda_min), _threshold("lambda_max", lambda_max)
        if not self.lambda_min < self.lambda_max:
            raise ValueError(f"lambda_max = {self.lambda_max} must be above lambda_min = {self.lambda_min}")
        self._check_tensors()
        self._set_thresholds(self._thresholds())
        self._moments = Moments()
        self._recent: deque[Batch] = deque(maxlen=meta_recent.__index__())
        self.hypergradient = None
        # A workspace of its own: that of the loss keeps the statistics of its last call.
        self._engine = copy.copy(loss._engine)

    def step(self, inputs: Tensor, labels: Tensor, meta: Batch | None = None) -> None:
        """Changes the thresholds by the virtual step of a batch: `inputs` of the network and labels `[B]`.

        `meta` is the meta batch, inputs and labels; by default those of the last `meta_recent` batches given to `step` without one
        that have inputs of the same shape, so that the first call only keeps its batch. Nothing changes if the batch or the meta
        batch mines no pair, or has a row that is not finite. Waits for a GPU.

        Raises TypeError and ValueError for arguments of wrong types and shapes, RuntimeError in `torch.inference_mode`.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError("the generator's step takes derivatives: call it outside of torch.inference_mode")
        ranks = self.loss.ranks
        with RaiseOnAllRanks(ranks):
            batch = _checked("batch", (inputs, labels))
            meta = None if meta is None else _checked("meta batch", meta)
            self._check_tensors()
            if ranks is not None:
                ranks.check_device(batch[0])
        recent = meta is None
        if ranks is not None:
            about = f"a step of a threshold generator {'without' if recent else 'with'} a meta batch"
            batch, meta = _of_all_ranks(ranks, batch, about), None if meta is None else _of_all_ranks(ranks, meta, about)
        if meta is None:
            same = [kept for kept in self._recent if kept[0].shape[1:] == batch[0].shape[1:]]
            # A state that was loaded may be on another device.
            near = [[tensor.to(batch[0].device) for tensor in tensors] for tensors in zip(*same)]
            meta = (torch.cat(near[0]), torch.cat(near[1])) if near else None
        self.hypergradient = None
        if meta is not None:
            with _without_dropout(self.network):
                self._learn(batch, meta)
        if recent and batch[0].isfinite().all():
            # Copies: the caller may fill the same tensors again.
            self._recent.append((batch[0].clone(), batch[1].clone()))

    def _learn(self, batch: Batch, meta: Batch) -> None:
        found = self._hypergradient(batch, meta)
        if self.loss.ranks is not None:
            # Sums may round differently on different devices, and thresholds must be the same everywhere.
            both = torch.tensor(found, dtype=torch.float64, device=batch[0].device)
            dist.broadcast(both, group=self.loss.ranks.group, group_src=0)
            found = both[0].item(), both[1].item()
        if not all(map(math.isfinite, found)) or not any(found):
            return
        self.hypergradient = found
        self._update(found if self.lambda_pair else (sum(found), sum(found)))

    def _hypergradient(self, batch: Batch, meta: Batch) -> tuple[float, float]:
        """dL^m/dlambda; zeros if nothing was mined or a row is not finite."""
        (inputs, labels), settings = batch, self.loss.settings
        reference = dataclasses.replace(settings, lambda_pos=self.lambda_reference, lambda_neg=self.lambda_reference)
        weights = {name: weight.detach() for name, weight in self.network.named_parameters() if weight.requires_grad}
        if any(hasattr(weight, "full_tensor") for weight in weights.values()):
            raise TypeError("the network of the generator has sharded parameters: give a module that has whole ones")
        gradient = self._gradient(weights, batch, settings)
        squared = _dot(gradient, gradient)
        if not float(squared) > 0:
            return 0.0, 0.0
        unit = self.virtual_step == "unit"
        rate = self.virtual_rate / float(squared) ** 0.5 if unit else self.virtual_rate
        moved = {name: weight - rate * gradient[name] for name, weight in weights.items()}
        direction = self._gradient(moved, meta, reference)
        if unit:
            # The step's length is fixed, so that lambda changes its direction only.
            along = _dot(direction, gradient) / squared
            direction = {name: d - along * gradient[name] for name, d in direction.items()}
        _prepare_forward_mode()
        with torch.no_grad():
            embed = partial(self._within, work=lambda network: self._embed(network, inputs))
            both = jvp(embed, (weights,), (direction,))
        rows, tangent = cast(Tuple[Tensor, Tensor], both)
        if not tangent.isfinite().all():
            return 0.0, 0.0
        tangent = tangent if tangent.dtype == torch.float64 else tangent.float()
        if self._engine.uses_gpu(rows):
            sums = search.threshold_gradient(rows, labels, tangent, settings=settings, check=False)
        else:
            given = [laid_out(tensor) for tensor in (rows, labels, tangent)]
            sums = threshold_gradient(*given, settings=settings, check=False, context=self._engine.host)
        return -rate * sums.pos, -rate * sums.neg

    def _gradient(self, weights: Weights, batch: Batch, settings: Settings) -> Weights:
        """The gradient of a batch's loss by the weights."""
        inputs, labels = batch
        weights = {name: weight.detach().requires_grad_() for name, weight in weights.items()}

        def derive(network: nn.Module) -> tuple[Tensor | None, ...]:
            rows = self._embed(network, inputs)
            mining, *numbers = dataclasses.astuple(settings)
            given = (labels.to(rows.device), None, None, mining, numbers, False, UNCHECKED, self._engine.key)
            if not rows.requires_grad:
                raise ValueError("no parameter of the generator's network that requires a gradient has a part in its embeddings")
            return torch.autograd.grad(loss_of(rows, None, None, None, *given), list(weights.values()), allow_unused=True)

        with torch.enable_grad():
            found = self._within(weights, derive)
        return {name: torch.zeros_like(weight) if g is None else g for (name, weight), g in zip(weights.items(), found)}

    def _within(self, weights: Weights, work: Callable[[nn.Module], Result]) -> Result:
        """`work` on the network with these weights."""
        # Copies of the buffers, so that BatchNorm does not change the running statistics.
        tensors = {name: buffer.clone() for name, buffer in self.network.named_buffers()} | weights
        named = {f"network.{name}": tensor for name, tensor in tensors.items()}
        result: Result = functional_call(_Within(self.network), named, (work,))
        return result

    def _embed(self, network: nn.Module, inputs: Tensor) -> Tensor:
        """Embeddings as the loss compares them, in float32 or float64."""
        # A copy, which operations in place may change.
        rows = network(inputs.clone())
        if not isinstance(rows, Tensor) or rows.ndim != 2:
            got = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise TypeError(f"the network of the generator must return embeddings [B, D], not {got}")
        if self.loss.normalize_embeddings:
            return normalize_rows(rows)[0]
        return rows if rows.dtype == torch.float64 else rows.float()

    def _update(self, gradient: tuple[float, float]) -> None:
        """One step of Adam, within the range."""
        directions = self._moments.update(gradient)
        moved = [value - self.lambda_rate * direction for value, direction in zip(self._thresholds(), directions)]
        self._set_thresholds([min(max(value, self.lambda_min), self.lambda_max) for value in moved])

    def _thresholds(self) -> list[float]:
        settings = self.loss.settings
        return [settings.lambda_pos, settings.lambda_neg if self.lambda_pair else settings.lambda_pos]

    def _check_tensors(self) -> None:
        """Checks that `fill_` can write any threshold to the loss's, where they are tensors."""
        pos, neg = self.loss.lambda_pos, self.loss.lambda_neg
        for name, value in (("lambda_pos", pos), ("lambda_neg", neg)):
            if not isinstance(value, Tensor):
                continue
            if value.requires_grad:
                raise TypeError(f"{name} requires a gradient: give a number, the generator learns it by another rule")
            if value.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"{name} must be a float32 or float64 tensor, or a number, not {value.dtype}")
        if self.lambda_pair and isinstance(pos, Tensor) and pos is neg:
            raise ValueError("lambda_pos and lambda_neg are the same tensor, so they cannot be learned apart")
        settings = self.loss.settings
        if not self.lambda_pair and abs(settings.lambda_pos - settings.lambda_neg) > ROUNDING:
            differ = f"lambda_pos = {settings.lambda_pos} and lambda_neg = {settings.lambda_neg} differ"
            raise ValueError(f"{differ}: give the same, or lambda_pair=True")

    @torch.no_grad()
    def _set_thresholds(self, both: list[float]) -> None:
        """Writes the loss's thresholds, in place if they are tensors."""
        for name, value in zip(THRESHOLDS, both):
            if not self.lambda_min - ROUNDING <= value <= self.lambda_max + ROUNDING:
                raise ValueError(f"{name} = {value} is not from lambda_min = {self.lambda_min} to lambda_max = {self.lambda_max}")
        for name, value in zip(THRESHOLDS, both):
            present = getattr(self.loss, name)
            if isinstance(present, Tensor):
                present.fill_(value)
            else:
                near = next((weight.device for weight in self.network.parameters() if weight.is_cuda), None)
                setattr(self.loss, name, torch.tensor(value, dtype=torch.float64, device=near))

    def state_dict(self) -> dict[str, Any]:
        """What the next steps depend on: thresholds, Adam's moments, the last batches."""
        return {"lambda": self._thresholds(), "moments": self._moments.state(), "recent": list(self._recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, thresholds of the loss included.

        Raises ValueError for anything else, and for thresholds out of range; nothing is changed then.
        """
        try:
            (pos, neg), moments = map(float, state["lambda"]), Moments.of(state["moments"])
            recent = [_checked("recent batch", kept) for kept in state["recent"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the state is none of a ThresholdGenerator: {error!r}") from error
        if not self.lambda_pair and abs(pos - neg) > ROUNDING:
            raise ValueError("the state has two thresholds that were learned apart: give lambda_pair=True")
        self._set_thresholds([pos, neg])
        self._moments, self._recent = moments, deque(recent, self._recent.maxlen)


class Moments:
    """Adam's running means of the two derivatives and of their squares."""

    def __init__(self) -> None:
        self.mean, self.square, self.updates = [0.0, 0.0], [0.0, 0.0], 0

    @staticmethod
    def of(state: Any) -> Moments:
        """Those that `state` returned."""
        moments = Moments()
        mean, square, moments.updates = state
        moments.mean, moments.square = [float(value) for value in mean], [float(value) for value in square]
        sound = len(mean) == len(square) == 2 and all(map(math.isfinite, [*moments.mean, *moments.square]))
        if not sound or min(moments.square) < 0 or not isinstance(moments.updates, int) or moments.updates < 0:
            raise ValueError("impossible moments")
        return moments

    def state(self) -> tuple[list[float], list[float], int]:
        return list(self.mean), list(self.square), self.updates

    def update(self, gradient: tuple[float, float]) -> list[float]:
        """Takes in a gradient; returns the direction of the step."""
        self.updates += 1
        self.mean = [DECAYS[0] * mean + (1 - DECAYS[0]) * g for mean, g in zip(self.mean, gradient)]
        self.square = [DECAYS[1] * square + (1 - DECAYS[1]) * g * g for square, g in zip(self.square, gradient)]
        mean_scale, square_scale = (1 - decay**self.updates for decay in DECAYS)
        return [mean / mean_scale / ((square / square_scale) ** 0.5 + EPSILON) for mean, square in zip(self.mean, self.square)]


@contextmanager
def _without_dropout(network: nn.Module) -> Iterator[None]:
    """Switches the dropout layers off."""
    active = [layer for layer in network.modules() if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.training]
    try:
        for layer in active:
            layer.training = False
        yield
    finally:
        for layer in active:
            layer.training = True


def _of_all_ranks(ranks: Ranks, batch: Batch, about: str) -> Batch:
    """The inputs and labels of all processes."""
    inputs, labels = batch
    exchange = ranks.handshake(inputs, f"inputs {list(inputs.shape[1:])} {inputs.dtype} in {about}")
    return exchange.gather_rows(inputs), exchange.gather_rows(labels.to(inputs.device))


def _dot(a: Weights, b: Weights) -> Tensor:
    return torch.stack([(a[name].double() * b[name].double()).sum() for name in a]).sum()


def _checked(name: str, batch: Any) -> Batch:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(f"the {name} must be a pair of inputs and labels, not {type(batch).__name__}")
    inputs, labels = batch
    check_tensor(f"the inputs of the {name}", inputs)
    check_labels(f"labels of the {name}", labels)
    if labels.ndim != 1 or inputs.ndim < 1 or labels.shape[0] != inputs.shape[0]:
        raise ValueError(f"labels of the {name} must be [{inputs.shape[0] if inputs.ndim else 0}], not {list(labels.shape)}")
    return inputs.detach(), labels.to(torch.int64)


def _number(name: str, value: Any) -> float:
    if not isinstance(value, (SupportsFloat, SupportsIndex)):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    return float(value)


def _above_0(name: str, value: Any) -> float:
    number = _number(name, value)
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{name} = {number} must be above 0")
    return number


def _threshold(name: str, value: Any) -> float:
    number = _number(name, value)
    if not -2 <= number <= 2:
        raise ValueError(f"{name} = {number} is out of range: -2 to 2")
    return number
