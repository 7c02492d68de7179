"""`ThresholdGenerator`: learns the loss thresholds during training (docs/method.md, section 5)."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import deque
from typing import Any, Dict, Literal, SupportsFloat, SupportsIndex, Tuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call, jvp

from ..settings import Settings
from .engine import check_labels, check_tensor, normalize_rows
from .loss import SoftContrastiveLoss
from .operator import UNCHECKED, loss_of
from .ranks import RaiseOnAllRanks
from .search import threshold_gradient

VirtualStep = Literal["unit", "plain"]
Batch = Tuple[Tensor, Tensor]
"""Inputs of the network and their labels."""
Weights = Dict[str, Tensor]

DECAYS = (0.95, 0.999)
"""Adam's decay rates of mean and square. That of the mean is above the usual 0.9: a gradient's noise is many times its mean."""
EPSILON = 1e-12


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
    weights and buffers are never changed. All its operations need forward-mode derivatives; dropout should be off. Give
    DistributedDataParallel's `module`, not the wrapper, and call `step` under the autocast that the network runs in.

    Args:
        loss: the loss whose thresholds are learned. Its thresholds become tensors, which `step` changes in place, so that a
            compiled step is not compiled again. For a `CrossBatchMemory` give its `loss`: the queue takes no part here. With a
            process group the virtual step is that of all processes' rows, and each process must call `step`.
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
        for name in ("lambda_pos", "lambda_neg"):
            value = getattr(loss, name)
            if isinstance(value, Tensor) and value.requires_grad:
                raise TypeError(f"{name} requires a gradient: give a number, the generator learns it by another rule")
        self._set_thresholds(self._thresholds())
        self._mean, self._square, self._updates = [0.0, 0.0], [0.0, 0.0], 0
        self._recent: deque[Batch] = deque(maxlen=meta_recent.__index__())
        self.hypergradient = None
        # A workspace of its own: that of the loss keeps the statistics of its last call.
        self._engine = copy.copy(loss._engine)

    def step(self, inputs: Tensor, labels: Tensor, meta: Batch | None = None) -> None:
        """Changes the thresholds by the virtual step of a batch: `inputs` of the network and labels `[B]`.

        `meta` is the meta batch, inputs and labels; by default the last `meta_recent` batches given to `step`, so that the first
        call only keeps its batch. Nothing changes if the batch or the meta batch mines no pair, or has a row that is not finite.
        Waits for a GPU.

        Raises TypeError and ValueError for arguments of wrong types and shapes.
        """
        ranks = self.loss.ranks
        with RaiseOnAllRanks(ranks):
            batch = _checked("batch", inputs, labels)
            if ranks is not None:
                ranks.check_device(batch[0])
            meta = None if meta is None else _checked("meta batch", *meta)
        if ranks is not None:
            batch, meta = self._of_all_ranks(batch), None if meta is None else self._of_all_ranks(meta)
        recent, self.hypergradient = meta is None, None
        if recent and self._recent:
            meta = cast(Batch, tuple(map(torch.cat, zip(*self._recent))))
        if meta is not None:
            self._learn(batch, meta)
        if recent:
            self._recent.append(batch)

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
        if not weights:
            raise ValueError("the network of the generator has no parameter that requires a gradient")
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
        with torch.no_grad():
            both = jvp(lambda weights: self._embed(weights, inputs), (weights,), (direction,))
        rows, tangent = cast(Tuple[Tensor, Tensor], both)
        if not tangent.isfinite().all():
            return 0.0, 0.0
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        sums = threshold_gradient(rows, labels, tangent.to(wide), settings=settings, check=False)
        return -rate * sums.pos, -rate * sums.neg

    def _gradient(self, weights: Weights, batch: Batch, settings: Settings) -> Weights:
        """The gradient of a batch's loss by the weights."""
        inputs, labels = batch
        weights = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        with torch.enable_grad():
            rows = self._embed(weights, inputs)
            mining, *numbers = dataclasses.astuple(settings)
            given = (labels.to(rows.device), None, None, mining, numbers, False, UNCHECKED, self._engine.key)
            loss = loss_of(rows, None, None, None, *given)
            found = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
        return dict(zip(weights, found))

    def _embed(self, weights: Weights, inputs: Tensor) -> Tensor:
        """Embeddings of the network with these weights, as the loss compares them, in float32 or float64."""
        # Copies, so that BatchNorm does not change the running statistics.
        buffers = {name: buffer.clone() for name, buffer in self.network.named_buffers()}
        rows: Tensor = functional_call(self.network, {**weights, **buffers}, (inputs,))
        if self.loss.normalize_embeddings:
            return normalize_rows(rows)[0]
        return rows if rows.dtype == torch.float64 else rows.float()

    def _of_all_ranks(self, batch: Batch) -> Batch:
        inputs, labels = batch
        ranks = self.loss.ranks
        assert ranks is not None
        exchange = ranks.handshake(inputs, f"inputs {list(inputs.shape[1:])} {inputs.dtype} of a threshold generator")
        return exchange.gather_rows(inputs), exchange.gather_rows(labels.to(inputs.device))

    def _update(self, gradient: tuple[float, float]) -> None:
        """One step of Adam, within the range."""
        self._updates += 1
        thresholds = self._thresholds()
        for place, g in enumerate(gradient):
            mean = self._mean[place] = DECAYS[0] * self._mean[place] + (1 - DECAYS[0]) * g
            square = self._square[place] = DECAYS[1] * self._square[place] + (1 - DECAYS[1]) * g * g
            mean, square = mean / (1 - DECAYS[0] ** self._updates), square / (1 - DECAYS[1] ** self._updates)
            moved = thresholds[place] - self.lambda_rate * mean / (square**0.5 + EPSILON)
            thresholds[place] = min(max(moved, self.lambda_min), self.lambda_max)
        self._set_thresholds(thresholds)

    def _thresholds(self) -> list[float]:
        settings = self.loss.settings
        return [settings.lambda_pos, settings.lambda_neg]

    @torch.no_grad()
    def _set_thresholds(self, both: list[float]) -> None:
        """Writes the loss's thresholds, in place if they are tensors."""
        if not self.lambda_pair and both[0] != both[1]:
            raise ValueError(f"lambda_pos = {both[0]} and lambda_neg = {both[1]} differ: give the same, or lambda_pair=True")
        for name, value in zip(("lambda_pos", "lambda_neg"), both):
            if not self.lambda_min <= value <= self.lambda_max:
                raise ValueError(f"{name} = {value} is not from lambda_min = {self.lambda_min} to lambda_max = {self.lambda_max}")
        for name, value in zip(("lambda_pos", "lambda_neg"), both):
            present = getattr(self.loss, name)
            if isinstance(present, Tensor):
                present.fill_(value)
            else:
                setattr(self.loss, name, torch.tensor(value, dtype=torch.float64))

    def state_dict(self) -> dict[str, Any]:
        """What the next steps depend on: thresholds, Adam's moments, the last batches."""
        moments = {"mean": list(self._mean), "square": list(self._square), "updates": self._updates}
        return {"lambda": self._thresholds(), **moments, "recent": list(self._recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, thresholds of the loss included."""
        self._set_thresholds(state["lambda"])
        self._mean, self._square, self._updates = list(state["mean"]), list(state["square"]), state["updates"]
        self._recent = deque(state["recent"], self._recent.maxlen)


def _dot(a: Weights, b: Weights) -> Tensor:
    return torch.stack([(a[name].double() * b[name].double()).sum() for name in a]).sum()


def _checked(name: str, inputs: Any, labels: Any) -> Batch:
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
