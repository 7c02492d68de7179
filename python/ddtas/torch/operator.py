"""The loss as a registered operator, `torch.ops.ddtas.loss`, for torch.compile, torch.export and torch.func, and its backward.

The operator returns four tensors: the loss, dL/d(rows), dL/d(references) (empty unless requested) and the statistics, which
contain dL/dlambda. The operator itself has no derivative; `loss_of` has one.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .. import _ddtas
from .engine import Engine, check_pair, count_labels, engine_of, laid_out, normalize_backward, normalize_rows

STATISTICS = (
    "loss", "dloss_dlambda_pos", "dloss_dlambda_neg", "mean_pos", "mean_neg", "gamma_pos", "gamma_neg",
    "probe_neg", "total_pos", "total_neg", "active", "positives", "negatives", "ignored", "not_finite",
)  # fmt: skip
"""Names of the statistics on the CPU, in float64. On a GPU the tensor has the words of a `LossScalars` (kernels/params.h) instead, as
many: int64, since only some of them are float64, and others would be NaN as such."""

_DLOSS_DLAMBDA_POS = STATISTICS.index("dloss_dlambda_pos")
DLOSS_DLAMBDA = slice(_DLOSS_DLAMBDA_POS, _DLOSS_DLAMBDA_POS + 2)
"""Places of the derivatives by lambda_pos and lambda_neg."""

UNCHECKED, CHECKED, CHECK_AND_WAIT = 0, 1, 2
"""Values of `check`: whether rows are checked, and whether a call on a GPU waits for the result of the check."""

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}

# torch has no type annotations for it, and mypy --strict refuses untyped calls.
_library: Any = getattr(torch.library, "Library")("ddtas", "DEF")
_library.define(
    "loss(Tensor rows, Tensor labels, Tensor? references, Tensor? reference_labels, Tensor? identity,"
    " Tensor? lambda_pos, Tensor? lambda_neg, str mining, float[] numbers, bool normalize, bool reference_gradient,"
    " int check, int engine) -> (Tensor loss, Tensor gradient, Tensor reference_gradient, Tensor statistics)",
    # An engine keeps statistics and labels after the call, which torch refuses of memory that belongs to a graph of its own
    # (mode="reduce-overhead"): it runs the loss between two graphs. Captures of the caller's are not affected.
    tags=(torch.Tag.cudagraph_unsafe,),
)
_operator = torch.ops.ddtas.loss.default


class Call(NamedTuple):
    """The operator's arguments, in the order of its schema."""

    rows: Tensor
    labels: Tensor
    references: Tensor | None
    reference_labels: Tensor | None
    identity: Tensor | None
    lambda_pos: Tensor | None
    lambda_neg: Tensor | None
    mining: str
    numbers: Sequence[float]
    normalize: bool
    reference_gradient: bool
    check: int
    engine: int


Outputs = Tuple[Tensor, Tensor, Tensor, Tensor]
EagerOutputs = Tuple[Tensor, Tensor, Optional[Tensor], Tensor]
"""The same, with None for a gradient of the references that was not requested: making an empty tensor takes a microsecond."""


def _wide(rows: Tensor) -> torch.dtype:
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def _type_of_statistics(rows: Tensor) -> torch.dtype:
    return torch.int64 if rows.is_cuda else torch.float64


def derivatives_in(statistics: Tensor) -> Tensor:
    """A view of dL/dlambda_pos and dL/dlambda_neg, which are float64 at the same places on the CPU and on a GPU."""
    numbers = statistics if statistics.dtype == torch.float64 else statistics.view(torch.float64)
    return numbers[DLOSS_DLAMBDA]


def _empty_outputs(rows: Tensor, references: Tensor | None, reference_gradient: bool) -> EagerOutputs:
    """Uninitialised tensors for the outputs."""
    wide, device = _wide(rows), rows.device
    shape = references.shape if references is not None and reference_gradient else None
    return (
        torch.empty((), dtype=wide, device=device),
        torch.empty(rows.shape, dtype=wide, device=device),
        None if shape is None else torch.empty(shape, dtype=wide, device=device),
        torch.empty(len(STATISTICS), dtype=_type_of_statistics(rows), device=device),
    )


def _as_outputs(outputs: EagerOutputs) -> Outputs:
    loss, gradient, reference_grad, statistics = outputs
    return loss, gradient, gradient.new_empty(0) if reference_grad is None else reference_grad, statistics


def check_sides(
    rows: Tensor,
    labels: Tensor,
    references: Tensor | None = None,
    reference_labels: Tensor | None = None,
    identity: Tensor | None = None,
    name: str = "anchors",
) -> None:
    """Checks types, shapes and devices: the compiled module gets addresses only, and would read beyond a tensor's memory."""
    if rows.dtype not in TYPES:
        raise TypeError(f"the {name} must be float32, float16, bfloat16 or float64, not {_name(rows.dtype)}")
    if rows.ndim != 2:
        raise ValueError(f"the {name} must have 2 dimensions, rows and entries, not {rows.ndim}")
    _check_integers("labels", labels, rows, rows)
    check_pair(references, reference_labels)
    if references is None or reference_labels is None:
        if identity is not None:
            raise ValueError("identity says which references are anchors, and there are no references")
        return
    if references.dtype != rows.dtype:
        raise TypeError(f"the references must be {_name(rows.dtype)}, as the anchors are, not {_name(references.dtype)}")
    if references.ndim != 2:
        raise ValueError(f"the references must have 2 dimensions, rows and entries, not {references.ndim}")
    check_one_device(rows, "references", references)
    _check_integers("labels of the references", reference_labels, references, rows)
    if identity is not None:
        _check_integers("identity", identity, rows, rows)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_integers(name: str, given: Tensor, side: Tensor, rows: Tensor) -> None:
    """Checks that `given` is int64, has an entry for each row of `side`, and is on the device of the anchors, `rows`."""
    if given.dtype != torch.int64:
        raise TypeError(f"the {name} must be int64, not {_name(given.dtype)}")
    if given.shape != side.shape[:1]:
        raise ValueError(f"the {name} must be [{side.shape[0]}], not {list(given.shape)}")
    check_one_device(rows, name, given)


def check_one_device(rows: Tensor, name: str, given: Tensor) -> None:
    if given.device != rows.device:
        raise ValueError(f"the {name} are on {given.device}, and the anchors on {rows.device}: move them there")


def _fake(call: Call) -> Outputs:
    for name, given in zip(Call._fields[1:5], call[1:5]):
        if given is not None:
            check_one_device(call.rows, name, given)
    return _as_outputs(_empty_outputs(call.rows, call.references, call.reference_gradient))


def _on_cpu(call: Call) -> EagerOutputs:
    check_sides(*call[:5])
    rows, labels, references, reference_labels, identity, lambda_pos, lambda_neg = call[:7]
    mining, numbers, normalize, reference_gradient, check, key = call[7:]
    engine = engine_of(key)
    if lambda_pos is not None or lambda_neg is not None:
        numbers = with_lambdas(numbers, lambda_pos, lambda_neg)
    code = TYPES[rows.dtype]
    if rows.shape[0] == 0 or (references is not None and references.shape[0] == 0):
        return loss_without_pairs(engine, call, numbers)
    unit: list[tuple[Tensor, Tensor, Tensor]] = []
    if code == 3 and normalize and rows.shape[1]:
        # float64 is computed by the scalar reference, which takes unit rows only.
        unit = [normalize_rows(side) for side in (rows, references) if side is not None]
        rows, references, normalize = unit[0][0], unit[-1][0] if len(unit) > 1 else None, False
    rows, labels = laid_out(rows), laid_out(labels)
    anchors = (rows.data_ptr(), labels.data_ptr(), *rows.shape, code)
    others, identity_address = None, 0
    if references is not None and reference_labels is not None:
        references, reference_labels = laid_out(references), laid_out(reference_labels)
        others = (references.data_ptr(), reference_labels.data_ptr(), *references.shape, TYPES[references.dtype])
        if identity is not None:
            identity = laid_out(identity)
            identity_address = identity.data_ptr()
    flags = (normalize, reference_gradient, check != UNCHECKED)
    loss, own, other, statistics, engine.last = _ddtas._loss_at(
        engine.host, anchors, others, identity_address, mining, numbers, flags
    )
    gradient, reference_grad = torch.from_numpy(own), None if other is None else torch.from_numpy(other)
    if unit:
        gradient = normalize_backward(gradient, *unit[0])
        reference_grad = None if reference_grad is None else normalize_backward(reference_grad, *unit[1])
    return torch.from_numpy(loss), gradient, reference_grad, torch.from_numpy(statistics)


def _on_gpu(call: Call) -> EagerOutputs:
    """Enqueues the loss on torch's current stream. Waits for the result only if `check` says so."""
    check_sides(*call[:5])
    rows, labels, references, reference_labels, identity, lambda_pos, lambda_neg = call[:7]
    mining, numbers, normalize, reference_gradient, check, key = call[7:]
    engine = engine_of(key)
    gpu, place = engine.on_gpu(rows)
    if rows.shape[0] == 0 or (references is not None and references.shape[0] == 0):
        return loss_without_pairs(engine, call, numbers)
    # Copies must live until the kernels are enqueued; torch reuses freed memory only for later work on the same stream.
    sides = [laid_out(side) for side in (rows, references) if side is not None]
    side_labels = [laid_out(given) for given in (labels, reference_labels) if given is not None]
    loss, gradient, reference_grad, statistics = _empty_outputs(rows, references, reference_gradient)
    thresholds = None
    if lambda_pos is not None or lambda_neg is not None:
        thresholds = _on_device(rows, numbers, lambda_pos, lambda_neg)
        if thresholds is None:
            numbers = with_lambdas(numbers, lambda_pos, lambda_neg)
    indices = None if identity is None else identity.to(torch.int32).contiguous()
    targets = [target_of(*side) for side in zip(sides, side_labels, (gradient, reference_grad))]
    gpu.enqueue_loss(
        place,
        targets,
        0 if indices is None else indices.data_ptr(),
        0 if thresholds is None else thresholds.data_ptr(),
        mining,
        numbers,
        check != UNCHECKED,
        (statistics.data_ptr(), loss.data_ptr()),
        normalize,
    )
    engine.last = (statistics, labels)
    if check == CHECK_AND_WAIT:
        engine.read_statistics()
    return loss, gradient, reference_grad, statistics


def target_of(rows: Tensor, labels: Tensor, gradient: Tensor | None = None) -> tuple[int, ...]:
    """Rows, labels and the gradient to be written on a GPU, as the compiled module takes them (`Target` in resident.rs)."""
    return rows.data_ptr(), labels.data_ptr(), *rows.shape, TYPES[rows.dtype], 0 if gradient is None else gradient.data_ptr()


def _on_device(
    rows: Tensor, numbers: Sequence[float], lambda_pos: Tensor | None, lambda_neg: Tensor | None
) -> Tensor | None:
    """Both thresholds as one tensor on the GPU if one of them is there, since reading it on the host would wait; else None."""
    given = [lambda_pos, lambda_neg]
    if not any(value is not None and value.device == rows.device for value in given):
        return None
    both = [
        torch.full((1,), number, dtype=torch.float64, device=rows.device)
        if value is None
        else value.detach().reshape(1).to(rows.device, torch.float64)
        for value, number in zip(given, numbers[6:])
    ]
    return torch.cat(both)


def loss_without_pairs(engine: Engine, call: Call, numbers: Sequence[float]) -> Outputs:
    """The outputs of a call without rows or without references: a loss of 0, and gradients of zeros."""
    loss, gradient, reference_grad, statistics = _as_outputs(
        _empty_outputs(call.rows, call.references, call.reference_gradient)
    )
    for output in (loss, gradient, reference_grad):
        output.zero_()
    nan = float("nan")
    gamma_pos, gamma_neg = _ddtas._initial_tolerances(call.mining, numbers)
    known = {"mean_pos": nan, "mean_neg": nan, "gamma_pos": gamma_pos, "gamma_neg": gamma_neg}
    engine.last = [*(known.get(name, 0.0) for name in STATISTICS[:-2]), *count_labels(call.labels)]
    statistics.copy_(torch.tensor(engine.last, dtype=torch.float64).view(statistics.dtype))
    return loss, gradient, reference_grad, statistics


def with_lambdas(numbers: Sequence[float], lambda_pos: Tensor | None, lambda_neg: Tensor | None) -> list[float]:
    """The settings with both thresholds replaced by the values of the tensors, where one is given."""
    pos, neg = numbers[6:]
    return [
        *numbers[:6],
        pos if lambda_pos is None else float(lambda_pos),
        neg if lambda_neg is None else float(lambda_neg),
    ]


_register_fake: Any = getattr(torch.library, "register_fake")
_register_fake("ddtas::loss", lambda *given: _fake(Call(*given)), lib=_library)
_library.impl("loss", lambda *given: _as_outputs(_on_cpu(Call(*given))), "CPU")
_library.impl("loss", lambda *given: _as_outputs(_on_gpu(Call(*given))), "CUDA")


_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


def _is_plain(*given: Tensor | None) -> bool:
    """Whether torch's dispatcher may be skipped for tensors of a known device, a sixth of the overhead. It may not in a graph or a
    dispatch mode, nor for a subclass, which may have no memory of its own."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack()
    return not traced and _PLAIN.issuperset(map(type, given))


# For a memory on the CPU, which queues the rows at unit length before it compares them.
_library.define("unit_rows(Tensor rows, int engine) -> Tensor")
_library.define("gradient_of_rows(Tensor rows, Tensor gradient, int engine) -> Tensor")


def _place_of(rows: Tensor) -> tuple[int, int, int, int, int]:
    return rows.data_ptr(), 0, *rows.shape, TYPES[rows.dtype]


def _unit_rows(rows: Tensor, engine: int) -> Tensor:
    rows = laid_out(rows)
    unit = torch.empty_like(rows)
    if rows.numel():
        _ddtas._normalize_at(engine_of(engine).host, _place_of(rows), unit.data_ptr())
    return unit


def _turn_gradient(rows: Tensor, gradient: Tensor, engine: int) -> Tensor:
    """Turns dL/d(unit rows), float32 without gaps, in place into dL/d(rows)."""
    rows = laid_out(rows)
    _ddtas._normalize_backward_at(engine_of(engine).host, _place_of(rows), gradient.data_ptr())
    return gradient


def _without_gaps(rows: Tensor) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


_register_fake("ddtas::unit_rows", lambda rows, engine: _without_gaps(rows), lib=_library)
_register_fake("ddtas::gradient_of_rows", lambda rows, gradient, engine: _without_gaps(gradient), lib=_library)
_library.impl("unit_rows", _unit_rows, "CPU")
_library.impl("gradient_of_rows", lambda rows, gradient, engine: _turn_gradient(rows, laid_out(gradient).clone(), engine), "CPU")


def unit_rows(rows: Tensor, engine: int) -> Tensor:
    """The rows at unit length, as the loss of float32, float16 or bfloat16 on the CPU normalises them; a constant."""
    rows = rows.detach()
    direct = rows.is_cpu and _is_plain(rows)
    unit: Tensor = _unit_rows(rows, engine) if direct else torch.ops.ddtas.unit_rows.default(rows, engine)
    return unit


def gradient_of_rows(rows: Tensor, gradient: Tensor, engine: int) -> Tensor:
    """dL/d(rows) from dL/d(unit rows), which it may overwrite."""
    direct = rows.is_cpu and _is_plain(rows, gradient)
    turned: Tensor = (_turn_gradient if direct else torch.ops.ddtas.gradient_of_rows.default)(rows, gradient, engine)
    return turned


_library.define("good_rows(Tensor rows) -> Tensor")


def good_rows(rows: Tensor) -> Tensor:
    """Whether each row has unit length, `[B]` booleans; on the CPU a row that has not raises ValueError."""
    good: Tensor = _refuse_bad_rows(rows) if rows.is_cpu and _is_plain(rows) else torch.ops.ddtas.good_rows.default(rows)
    return good


_TOLERANCES = {dtype: _ddtas._norm_tolerance(code) for dtype, code in TYPES.items()}


def which_are_unit(rows: Tensor, tolerance: float | None = None) -> Tensor:
    """Whether each row's norm is 1 to within `tolerance`. Default: the tolerance of the loss for rows of that type."""
    if tolerance is None:
        tolerance = _TOLERANCES.get(rows.dtype, _TOLERANCES[torch.float32])
    wide = rows if rows.dtype == torch.float64 else rows.float()
    distance: Tensor = torch.linalg.vector_norm(wide, dim=1).sub_(1).abs_()
    return distance <= tolerance


def _refuse_bad_rows(rows: Tensor) -> Tensor:
    good = which_are_unit(rows)
    if not good.all():
        row = int((~good).nonzero()[0])
        wrong = "has no unit length" if rows[row].any() else "is all zeros"
        wrong = wrong if rows[row].isfinite().all() else "is not finite"
        raise ValueError(f"row {row} of the embeddings {wrong}: nothing was queued")
    return good


_register_fake("ddtas::good_rows", which_are_unit, lib=_library)
_library.impl("good_rows", _refuse_bad_rows, "CPU")
_library.impl("good_rows", which_are_unit, "CUDA")


class _OnceDifferentiable(torch.autograd.Function):
    """Makes a gradient depend on the inputs in the autograd graph, so that differentiating it raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, *inputs: Tensor | None) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError("the loss of ddtas can be differentiated once, not twice")


def _backward(ctx: Any, upstream: Tensor | None, eager: bool) -> list[Tensor | None]:
    """Scales the gradients of rows, references and both thresholds, which were computed together with the loss."""
    needed = ctx.needs_input_grad
    gradients: list[Tensor | None] = [None] * len(needed)
    if upstream is None:
        return gradients
    rows, references, lambda_pos, lambda_neg, gradient, reference_grad, statistics = ctx.saved_tensors
    inputs = (rows, references, lambda_pos, lambda_neg)
    # With create_graph=True: without `_OnceDifferentiable` a second derivative would be wrong instead of an error.
    create_graph = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    # `loss.backward()` has an upstream of 1, which needs no product. On a GPU, reading it would wait.
    try:
        unscaled = eager and upstream.is_cpu and upstream.item() == 1
    except RuntimeError:
        # With `is_grads_batched` the upstream is a batch of numbers, and has no item().
        unscaled = eager = False
    for place, given in enumerate(inputs):
        if not needed[place]:
            continue
        if place < 2:
            result = reference_grad if place else gradient
            if not unscaled:
                # In eager mode written in the input's type directly: one kernel on a GPU instead of two.
                convert = eager and not create_graph and result.dtype != given.dtype
                out = torch.empty_like(result, dtype=given.dtype) if convert else None
                result = torch.mul(result, upstream, out=out)
            if result.dtype != given.dtype:
                result = result.to(given.dtype)
        else:
            # dL/dlambda is a scalar; the threshold may have any shape of one element.
            derivative = derivatives_in(statistics)[place - 2] * upstream
            result = derivative.to(dtype=given.dtype, device=given.device).reshape(given.shape)
        gradients[place] = _OnceDifferentiable.apply(result, *inputs) if create_graph else result
    return gradients


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: EagerOutputs) -> None:
    rows, references, lambda_pos, lambda_neg = inputs[:4]
    _, gradient, reference_grad, statistics = outputs
    _, of_references, *of_thresholds = ctx.needs_input_grad[:4]
    # Constants may change before backward, as a memory's queue and a generator's thresholds do; torch refuses saved tensors that
    # have.
    if not of_references:
        references = reference_grad = None
    lambda_pos, lambda_neg = (value if needed else None for value, needed in zip((lambda_pos, lambda_neg), of_thresholds))
    derivatives = statistics if any(of_thresholds) else None
    ctx.save_for_backward(rows, references, lambda_pos, lambda_neg, gradient, reference_grad, derivatives)


_NO_FORWARD_MODE = "the loss of ddtas has no forward-mode derivative (jvp, jacfwd): use backward or torch.func.grad"


def _compared(rows: Tensor, unit: Tensor | None, references: Tensor | None) -> Tensor:
    """The rows that are compared: in the references' type, converted inside the autograd function, so that the gradient keeps the
    rows' own type; those of `unit` if there are any."""
    rows = rows if unit is None else unit
    return rows if references is None else rows.to(references.dtype)


class _Traced(torch.autograd.Function):
    """The loss under torch.compile and torch.func, where each tensor saved for backward must be an output. torch.compile does not
    accept a `jvp` method; `loss_of` refuses forward mode by `_forward_mode` instead."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        rows: Tensor, references: Tensor | None, lambda_pos: Tensor | None, lambda_neg: Tensor | None, unit: Tensor | None, *given: Any
    ) -> Outputs:
        labels, reference_labels, identity, *rest = given
        loss, gradient, *others = _operator(
            _compared(rows, unit, references), labels, references, reference_labels, identity, lambda_pos, lambda_neg, *rest
        )
        if unit is not None:
            gradient = gradient_of_rows(rows, gradient, rest[-1])
        return (loss, gradient, *others)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        _save(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(_backward(ctx, upstream, False))


def _eagerly(call: Call) -> EagerOutputs:
    """The operator's outputs."""
    if _is_plain(*call[:7]):
        if call.rows.is_cpu:
            return _on_cpu(call)
        if call.rows.is_cuda:
            return _on_gpu(call)
    outputs: EagerOutputs = _operator(*call)
    return outputs


class _Eager(torch.autograd.Function):
    """The loss in eager mode: with a single output, which saves a third of the overhead."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        references: Tensor | None,
        lambda_pos: Tensor | None,
        lambda_neg: Tensor | None,
        unit: Tensor | None,
        given: tuple[Any, ...],
        compute: Callable[[Call], EagerOutputs],
    ) -> Tensor:
        labels, reference_labels, identity, *rest = given
        compared = _compared(rows, unit, references)
        call = Call(compared, labels, references, reference_labels, identity, lambda_pos, lambda_neg, *rest)
        outputs = compute(call)
        if unit is not None and ctx.needs_input_grad[0]:
            loss, gradient, reference_grad, statistics = outputs
            outputs = loss, gradient_of_rows(rows, gradient, call.engine), reference_grad, statistics
        _save(ctx, (rows, references, lambda_pos, lambda_neg), outputs)
        return outputs[0]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(_backward(ctx, upstream, True))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_NO_FORWARD_MODE)


def _forward_mode() -> bool:
    """Whether a torch.func transform in forward mode (jvp) is active, whose tangent the operator would silently drop."""
    functorch: Any = torch._C._functorch
    return any(level.key() == functorch.TransformType.Jvp for level in functorch.get_interpreter_stack() or ())


def loss_of(
    rows: Tensor,
    references: Tensor | None,
    lambda_pos: Tensor | None,
    lambda_neg: Tensor | None,
    labels: Tensor,
    reference_labels: Tensor | None,
    identity: Tensor | None,
    mining: str,
    numbers: Sequence[float],
    normalize: bool,
    check: int,
    engine: int,
    compute: Callable[[Call], EagerOutputs] | None = None,
    unit: Tensor | None = None,
) -> Tensor:
    """The loss, differentiable with respect to the first four arguments.

    `engine` is an `Engine.key`. `compute` replaces the operator; calls with it are never compiled. `unit` are the rows by
    `unit_rows`, which are then compared in their place.
    """
    reference_gradient = references is not None and references.requires_grad
    given = (labels, reference_labels, identity, mining, numbers, normalize, reference_gradient, check, engine)
    transformed = torch._C._are_functorch_transforms_active()
    if transformed and _forward_mode():
        raise NotImplementedError(_NO_FORWARD_MODE)
    if compute is None and (torch.compiler.is_compiling() or transformed):
        if not any(side is not None and side.requires_grad for side in (rows, references, lambda_pos, lambda_neg)):
            # torch 2.11 cannot trace an autograd.Function whose inputs require no gradient.
            sides = (_compared(rows, unit, references), labels, references, reference_labels, identity)
            loss: Tensor = _operator(*sides, lambda_pos, lambda_neg, *given[3:])[0]
            return loss
        outputs: tuple[Tensor, ...] = _Traced.apply(rows, references, lambda_pos, lambda_neg, unit, *given)
        return outputs[0]
    if torch._C._is_tracing():
        raise NotImplementedError("the loss of ddtas cannot be traced by torch.jit.trace: use torch.export or torch.compile")
    loss = _Eager.apply(rows, references, lambda_pos, lambda_neg, unit, given, compute or _eagerly)
    return loss
