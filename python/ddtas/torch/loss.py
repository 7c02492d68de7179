"""`SoftContrastiveLoss`: mining and loss as a PyTorch module, in place of pytorch-metric-learning's loss and miner."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any, Literal, SupportsFloat, SupportsIndex

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..functional import warn
from ..settings import Mining, Settings
from .engine import NO_INDICES, SHARED, Engine, check_labels, check_pair, check_side, normalize_rows, refuse_arguments
from .operator import CHECK_AND_WAIT, CHECKED, STATISTICS, UNCHECKED, check_one_device, loss_of, unit_rows
from .parts import References, loss_of_ranks
from .ranks import RaiseOnAllRanks, Ranks, Scale, check_group, initialized, uncompiled, world_exists

Check = bool | Literal["wait"]
_MEAN_POS, _MEAN_NEG, _TOTAL_POS, _TOTAL_NEG, _IGNORED, _NOT_FINITE = map(
    STATISTICS.index, ("mean_pos", "mean_neg", "total_pos", "total_neg", "ignored", "not_finite")
)


_warning = partial(uncompiled, reason="warnings are given outside compiled graphs")


def _setting(name: str) -> Any:
    """A property of the loss for one of its settings. Setting it affects later calls."""

    def change(loss: SoftContrastiveLoss, value: Any) -> None:
        _refuse_learned(**{name: value})
        loss._settings = dataclasses.replace(loss._settings, **{name: value})

    return property(lambda loss: getattr(loss._settings, name), change, doc=f"`{name}` of the settings.")


class SoftContrastiveLoss(nn.Module):
    """AT-ASMS mining and the soft contrastive loss in one call, without a B x B matrix. The formulas are in docs/method.md.

    Replaces pytorch-metric-learning's `MultiSimilarityLoss()` together with its miner. `loss(embeddings, labels)` returns a
    scalar tensor in float32. For float64 embeddings it is float64, computed by a slow scalar reference (for `gradcheck`).

    alpha and beta have the opposite roles in `MultiSimilarityLoss`: there `beta` is for negatives.

    Args:
        alpha: sharpness of the loss on negatives, above 0, at most 10,000. Default 40.
        beta: sharpness of the loss on positives, above 0, at most 10,000. Default 2.
        lambda_pos: loss threshold of positives, a cosine similarity, -2 to 2. Default 0.7. A number, or a tensor of one
            element, which gets dL/dlambda if it requires a gradient. Descent along dL/dlambda lowers the loss without
            improving the embedding; `ThresholdGenerator` learns thresholds by the method's own rule.
        lambda_neg: loss threshold of negatives, as `lambda_pos`. Default 0.7.
        gamma: tolerance of mining, a cosine similarity, 0 to 2. Default 0.1.
        mining: "none" keeps all pairs of an anchor that has positives and negatives; "symmetric" mines with one tolerance
            for both, "asms" with a smaller one for negatives, "at-asms" (default) with both adapted to the batch.
        negative_ratio: tolerance of negatives divided by gamma, 0 to 10; for "asms" and "at-asms". Default 0.1.
        probe_ratio: tolerance, divided by gamma, of the probe that counts hard negatives, 0 to 10; for "at-asms". Default
            0.1; the authors' released code has 1.
        tolerance: factor k, how far "at-asms" moves the tolerances, 0 to 1. Default 0.5.
        normalize_embeddings: whether rows are normalised. Default True. With False they must have unit length.
        check: whether a row with a NaN or an infinity, or of zeros, raises ValueError. Default True. With False nothing is
            raised, as a gradient scaler expects; the gradient of such a row is NaN, and the loss may be finite. On a GPU True
            does not wait for the check: a bad row makes loss and gradient NaN, and `check()` or reading `statistics` raises.
            "wait" waits and raises in the call.
        threads: number of threads on the CPU, 1 to 1,024. Default None: `RAYON_NUM_THREADS`, else `OMP_NUM_THREADS`, else as
            many as cores. The result does not depend on it.
        workspace_budget: upper limit in bytes for pairs kept between the passes of a loss; pairs that do not fit are computed
            again, with the same result. Default None: 6 KiB for each row on the CPU, a quarter of the free memory on a GPU.
        allow_tf32: True lets a GPU multiply float32 rows to TF32's precision, for a third of the work: every entry is
            rounded to 11 bits (float16; below 6e-5 to an absolute 3e-8), and products are summed in float32. Default False.
            The CPU always computes in float32.
        group: "world" or a `torch.distributed.ProcessGroup`; the rows of all its processes form one batch. Each process calls the
            loss with its own rows, and gets the loss of the whole batch. An error in one process raises in all of them
            (docs/python.md for GPUs); bad rows raise in the call. "world" is all processes, which may be initialised after this
            constructor, before the first call; without torch.distributed it is this process. Default False: this process.
        uneven: True allows a different number of rows in each process of the group, zero included. Default False.
        gradient: "mean" (default) multiplies the gradient of a process's rows by the number of processes, so that the
            average over processes by DistributedDataParallel is the gradient of the whole batch. "sum" leaves out the factor.
        gather_references: True gathers `ref_emb` over the group, as the rows are, and gives each process the gradient of its own:
            for two networks that both learn. Default False: `ref_emb` is the same in all processes, and constant.

    A batch without rows, or without references, has a loss of 0 and a gradient of zeros.

    `statistics` describes the last call: active anchors, pairs, tolerances, mean similarities, the number of anchors with a
    negative label (`ignored`), the number that a `CrossBatchMemory` left out because they are not finite (`not_finite`), and
    `spread`, 1 minus the smaller mean similarity. A spread below 1e-4 is a collapse: all rows are nearly equal, and the loss is
    small or 0. The first batch with `ignored` rows, `not_finite` rows or a collapse gives a warning; a compiled call, or one on
    a GPU, gives it when `statistics` is read. Other calls also warn of the first batch without two rows of one class, or with
    rows of one class only.

    Settings can be changed between calls: `loss.alpha = 20`, and likewise `mining`, the tolerances and both thresholds.
    """

    mining, gamma, negative_ratio, probe_ratio, tolerance, alpha, beta = map(
        _setting, ("mining", "gamma", "negative_ratio", "probe_ratio", "tolerance", "alpha", "beta")
    )

    # For modules that were pickled by an earlier version.
    _world = False
    _ranks: Ranks | None = None
    _references: References = "compared"

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
        group: Any = False,
        uneven: bool = False,
        gradient: Scale = "mean",
        gather_references: bool = False,
        **others: Any,
    ) -> None:
        super().__init__()
        refuse_arguments("SoftContrastiveLoss", others)
        if not isinstance(check, bool) and check != "wait":
            raise ValueError(f'check must be True, False or "wait", not {check!r}')
        _refuse_learned(
            gamma=gamma, negative_ratio=negative_ratio, probe_ratio=probe_ratio, tolerance=tolerance, alpha=alpha, beta=beta
        )
        # Its thresholds are those of the beginning.
        known = [0.0 if math.isnan(number) else number for number in map(_number, (lambda_pos, lambda_neg))]
        self._settings = Settings(mining, gamma, negative_ratio, probe_ratio, tolerance, alpha, beta, *known)
        # Parameters and other tensors are registered, see `__setattr__`.
        self.lambda_pos = lambda_pos
        self.lambda_neg = lambda_neg
        self.normalize_embeddings = normalize_embeddings
        self._check = CHECK_AND_WAIT if check == "wait" else CHECKED if check else UNCHECKED
        check_group(group, gradient)
        self._world = group == "world"
        self._ranks_of = partial(Ranks, uneven=uneven, gradient=gradient)
        if group and not self._world:
            self._ranks = self._ranks_of(group)
        elif self._world and initialized():
            self._find_world()
        self._references = "gathered" if gather_references else "compared"
        self._warned: set[str] = set()
        self._engine = Engine(threads, workspace_budget, allow_tf32)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIXED and (name == "check" or type(self) is SoftContrastiveLoss):
            raise AttributeError(f"{name} is an argument of SoftContrastiveLoss and cannot be changed later: make a new loss")
        if name in THRESHOLDS and not isinstance(value, Tensor):
            threshold: dict[str, Any] = {name: _number(value)}
            dataclasses.replace(self._settings, **threshold)  # raises if it is out of range
        if name in THRESHOLDS and name not in self._parameters and not isinstance(value, nn.Parameter):
            # A tensor is a buffer, unless it is computed from others; a number is neither.
            persistent = name not in self._non_persistent_buffers_set
            self.__dict__.pop(name, None)
            self._buffers.pop(name, None)
            if isinstance(value, Tensor) and value.is_leaf:
                self.register_buffer(name, value, persistent=getattr(value, "persistent", persistent))
                return
        if name == "normalize_embeddings" and not isinstance(value, bool):
            raise TypeError(f"normalize_embeddings must be True or False, not {value!r}")
        super().__setattr__(name, value)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of `embeddings` `[B, D]` compared with each other, or with `ref_emb` `[N, D]`, labelled `ref_labels` `[N]`.

        Labels are integers; a negative one takes its row out of every pair. An exact duplicate of an anchor among the
        references, with the same label, makes no pair with it. References that require a gradient get one.

        Raises TypeError for arguments that are not dense tensors or have wrong types, ValueError for wrong shapes and bad rows,
        RuntimeError for tensors on a GPU in a build for the CPU only.
        """
        if ref_emb is embeddings and ref_labels is labels:
            ref_emb = ref_labels = None
        ranks = self.ranks
        with RaiseOnAllRanks(ranks):
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
                ref_labels = ref_labels.to(embeddings.device, torch.int64)
            labels = labels.to(embeddings.device, torch.int64)
        given = embeddings, labels, ref_emb, ref_labels, None
        return self._loss(*given, self.normalize_embeddings, self._check, ranks, queue=False)

    @property
    def ranks(self) -> Ranks | None:
        """The processes of the group; None if it is this process alone."""
        if self._world and (self._ranks is None or not torch.compiler.is_compiling()):
            self._find_world()
        return self._ranks if self._ranks is not None and self._ranks.size > 1 else None

    @partial(uncompiled, reason='group="world" is looked up outside compiled graphs: make the loss after init_process_group')
    def _find_world(self) -> None:
        """Looks up all processes, which may be others than before, or not exist yet."""
        world = dist.group.WORLD if world_exists() else None
        if self._ranks is None or self._ranks.group is not world:
            self._ranks = None if world is None else self._ranks_of(world)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: all processes are looked up again, any other group cannot be pickled."""
        found = self._ranks is not None and (self._world or self._ranks.size == 1)
        return self.__dict__ | {"_ranks": None} if found else self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        untyped: Any = super().__setstate__
        untyped(state)
        # Those of a copy are set apart from the original's.
        self._buffers = dict(self._buffers)
        # Tensors are no buffers in modules that were pickled by an earlier version; one that was computed comes back as a leaf.
        for name in THRESHOLDS:
            if isinstance(value := self.__dict__.get(name), Tensor):
                setattr(self, name, value)

    @property
    def checks(self) -> bool:
        """Whether rows are checked: False for `check=False` only."""
        return self._check != UNCHECKED

    @property
    def _engine_key(self) -> int:
        """That of the module's engine. A program that is exported and loaded in another process must not compute in the engine that
        has this number there."""
        # What torch.compiler.is_exporting() returns, which in graphs of torch 2.11 is always True.
        return SHARED.key if torch.compiler._is_exporting_flag else self._engine.key

    def unit_rows(self, embeddings: Tensor) -> tuple[Tensor, Tensor | None]:
        """The rows as the loss compares them: normalised, in their own type; unchanged for `normalize_embeddings=False`. And the
        `given` of `loss_of_unit_rows`: on the CPU the former are constants, made in one call."""
        if not self.normalize_embeddings or embeddings.numel() == 0:
            return embeddings, None
        if self._engine.uses_gpu(embeddings) or embeddings.dtype == torch.float64:
            return normalize_rows(embeddings)[0].to(embeddings.dtype), None
        return unit_rows(embeddings, self._engine_key), embeddings

    def loss_of_unit_rows(
        self,
        rows: Tensor,
        labels: Tensor,
        references: Tensor | None = None,
        reference_labels: Tensor | None = None,
        identity: Tensor | None = None,
        check: bool = True,
        given: Tensor | None = None,
    ) -> Tensor:
        """`forward` for rows of unit length, with fewer checks of the arguments.

        Rows are compared in the references' type, and their gradient has their own. `identity` `[B]` holds for each row the
        index of the reference that is the row itself, or -1. `check=False` is for rows that were checked before. `given` are the
        rows that `unit_rows` has made them of, which then get the gradient.
        """
        ranks = self.ranks
        with RaiseOnAllRanks(ranks):
            check_labels("labels", labels)
            labels = labels.to(rows.device, torch.int64)
            if references is not None:
                check_one_device(rows, "references", references)
            if reference_labels is not None:
                check_labels("labels of the references", reference_labels)
                reference_labels = reference_labels.to(rows.device, torch.int64)
            if identity is not None:
                check_labels("identity", identity)
                identity = identity.to(rows.device, torch.int64)
        check_rows = self._check if check else UNCHECKED
        own, unit = (rows, None) if given is None else (given, rows)
        return self._loss(own, labels, references, reference_labels, identity, False, check_rows, ranks, queue=True, unit=unit)

    def _loss(
        self,
        rows: Tensor,
        labels: Tensor,
        references: Tensor | None,
        reference_labels: Tensor | None,
        identity: Tensor | None,
        normalize: bool,
        check: int,
        ranks: Ranks | None,
        queue: bool,
        unit: Tensor | None = None,
    ) -> Tensor:
        """`queue`: the references are those of a memory, which has few rows at first and is the same in all processes."""
        settings, pos, neg = self._settings, self.lambda_pos, self.lambda_neg
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
        of_references = "trusted" if queue else self._references
        compute = loss_of if ranks is None else _loss_of_ranks
        loss = compute(
            rows,
            references,
            pos if isinstance(pos, Tensor) else None,
            neg if isinstance(neg, Tensor) else None,
            labels,
            reference_labels,
            identity,
            settings.mining,
            numbers,
            normalize,
            check,
            self._engine_key,
            None if ranks is None else partial(loss_of_ranks, ranks, kind_of_references=of_references),
            unit,
        )
        if not torch.compiler.is_compiling() and not _traced():
            last = self._engine.last
            if isinstance(last, list):
                # Skips `_warn` for most batches, by cheaper conditions.
                if last[_IGNORED] or last[_NOT_FINITE] or not (last[_MEAN_POS] < NEARLY_ONE or last[_MEAN_NEG] < NEARLY_ONE):
                    self._warn(last)
                if not queue and bool(last[_TOTAL_POS]) != bool(last[_TOTAL_NEG]):
                    self._warn_of_one_kind(last, rows, references)
                if not queue and reference_labels is not None:
                    self._warn_of_ignored_references(reference_labels)
        return loss

    @property
    def settings(self) -> Settings:
        """The settings of the next call, for `ddtas.torch.threshold_gradient`, for example; each is an attribute, too."""
        return dataclasses.replace(
            self._settings, lambda_pos=_number(self.lambda_pos), lambda_neg=_number(self.lambda_neg)
        )

    @property
    def statistics(self) -> dict[str, float]:
        """Statistics of the last call; empty before the first. Waits for a GPU, and then raises ValueError for a bad row."""
        last = self._engine.read_statistics()
        if last is None:
            return {}
        self._warn(last)
        found = dict(zip(STATISTICS, last))
        counts = {name: int(found[name]) for name in ("active", "positives", "negatives", "ignored", "not_finite")}
        real = {name: found[name] for name in ("gamma_pos", "gamma_neg", "mean_pos", "mean_neg")}
        return counts | real | {"spread": _spread(last)}

    def _apply(self, fn: Any, recurse: bool = True) -> SoftContrastiveLoss:
        """Moves thresholds that are buffers to another device, but keeps their type, and the tensors themselves: others change them."""
        present = {name: buffer for name in THRESHOLDS if (buffer := self._buffers.get(name)) is not None}
        self._buffers.update(dict.fromkeys(present))
        untyped: Any = super()._apply
        try:
            untyped(fn, recurse)
        finally:
            self._buffers.update(present)
        for name, own in present.items():
            try:
                moved = fn(own)
                if moved is own:
                    continue
                if own.is_meta or moved.is_meta:
                    self._buffers[name] = moved.detach().to(own.dtype).requires_grad_(own.requires_grad)
                else:
                    own.data = own.detach().to(moved.device)
            except TypeError:
                pass  # MPS has no float64. The loss is computed on the CPU there.
        return self

    @torch.no_grad()
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Loads a saved tensor of one element of any shape, and in place of a number as that number."""
        saved = {name: state_dict[prefix + name] for name in THRESHOLDS if prefix + name in state_dict}
        values: Any = {name: _number(value) for name, value in saved.items()}
        dataclasses.replace(self._settings, **values)  # raises if one is out of range
        for name, value in saved.items():
            own = getattr(self, name)
            if name not in self._parameters and name not in self._buffers:
                setattr(self, name, values[name])
                del state_dict[prefix + name]
                continue
            value = torch.as_tensor(value).detach().to(own.dtype, copy=True).reshape(own.shape).requires_grad_(own.requires_grad)
            if own.is_meta and name in self._buffers and name not in self._non_persistent_buffers_set:
                setattr(self, name, value)
            state_dict[prefix + name] = value
        super()._load_from_state_dict(state_dict, prefix, *others)

    def check(self) -> None:
        """Waits for a GPU, and raises ValueError if a row of the last call was bad. On the CPU the call itself has raised."""
        self._engine.read_statistics()

    @_warning
    def _warn(self, last: list[float]) -> None:
        """Warns once each of ignored rows, rows that are not finite, and a collapse."""
        ignored, not_finite, spread = last[_IGNORED], last[_NOT_FINITE], _spread(last)
        if ignored:
            self._warn_once("ignored", f"rows with a negative label: {ignored:.0f}; they take part in no pair")
        if not_finite:
            self._warn_once(
                "not_finite",
                f"rows that are not finite: {not_finite:.0f}; the memory leaves them out of every pair and queues an ignored row "
                "in the place of each",
            )
        if spread < COLLAPSED:
            self._warn_once(
                "collapse",
                f"the embeddings have collapsed: all rows are nearly equal (spread {spread:.1e}), so that little or nothing "
                "is mined; lower the learning rate or start from other weights",
            )

    @_warning
    def _warn_of_one_kind(self, last: list[float], rows: Tensor, references: Tensor | None) -> None:
        # Collapsed rows count as duplicates of each other, which make no pairs; `_warn` warns of the collapse.
        if _spread(last) < COLLAPSED:
            return
        sides = [rows] if references is None else [rows, references]
        bad = 0 if self.checks else sum(int((~side.isfinite().all(1)).sum()) for side in sides)
        if bad:
            self._warn_once("not_finite", f"rows that are not finite: {bad}; they are in no pair, and their gradient is NaN")
        elif references is not None:
            self._warn_once(
                "pairs",
                "all references are of the anchors' class, so the loss is 0"
                if last[_TOTAL_POS]
                else "no anchor has a pair with a reference of its class, so the loss is 0",
            )
        else:
            self._warn_once(
                "pairs",
                "all rows of the batch are of one class, so its loss is 0: shuffle, or draw rows of several classes"
                if last[_TOTAL_POS]
                else "the batch has no two different rows of one class, so its loss is 0: draw several rows of each class "
                "(pytorch-metric-learning's MPerClassSampler does)",
            )

    @_warning
    def _warn_of_ignored_references(self, labels: Tensor) -> None:
        if "ignored_references" in self._warned or not labels.is_cpu or type(labels) is not Tensor:
            return
        if number := int((labels < 0).sum()):
            self._warn_once("ignored_references", f"references with a negative label: {number}; they are in no pair")

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warn(message)

    def extra_repr(self) -> str:
        """The settings, for `print(model)`."""
        now = {"lambda_pos": _number(self.lambda_pos), "lambda_neg": _number(self.lambda_neg)}
        values = dataclasses.asdict(self._settings) | now | {"normalize_embeddings": self.normalize_embeddings}
        if self._ranks is not None and self._ranks.size > 1:
            values["group"] = f"{self._ranks.size} processes"
        elif self._world:
            values["group"] = "world"
        return ", ".join(f"{name}={value}" for name, value in values.items())


_loss_of_ranks = uncompiled(loss_of)
THRESHOLDS = ("lambda_pos", "lambda_neg")
_FIXED = {"check", "threads", "workspace_budget", "allow_tf32", "group", "uneven", "gradient", "gather_references"}
"""Arguments that are read by the constructor only."""

COLLAPSED = 1e-4
"""A `spread` below this is a collapse."""
NEARLY_ONE = 1 - COLLAPSED


def _traced() -> bool:
    """Whether tensors may have no values: in a transform of torch.func, or for make_fx."""
    return bool(torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack())


def _refuse_learned(**settings: Any) -> None:
    for name, value in settings.items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise TypeError(f"{name} must be a number: it gets no gradient, which lambda_pos and lambda_neg alone do")


def _number(value: float | Tensor) -> float:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"lambda_pos and lambda_neg must have one element, not the shape {list(value.shape)}")
        # On the meta device it has no value before a state_dict is loaded.
        return math.nan if value.is_meta else float(value.detach())
    if not isinstance(value, (SupportsFloat, SupportsIndex)):
        raise TypeError(f"lambda_pos and lambda_neg must be numbers or tensors, not {type(value).__name__}")
    return float(value)


def _spread(last: list[float]) -> float:
    # A batch may lack positives or negatives, whose mean is then NaN: min() must not get it.
    means = last[_MEAN_POS], last[_MEAN_NEG]
    return 1 - min((mean for mean in means if mean == mean), default=float("nan"))
