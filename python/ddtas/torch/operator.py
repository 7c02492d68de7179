"""`torch.ops.ddtas.loss`: the loss as an operator that torch's compiler, export and transforms know, and its derivative.

The operator answers tensors alone: the loss, dL/d(rows), dL/d(references) (without an entry unless it was asked for) and the
statistics, which hold dL/dlambda. It is not differentiable itself: `loss_of` is.
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
"""What the statistics are on the processor. On a GPU `LossScalars` of kernels/params.h has their place, and as many bytes."""

UNCHECKED, CHECKED, WAITED_FOR = 0, 1, 2
"""Whether rows are checked; a GPU's are waited for in the last case alone."""

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}

# torch has no types for it.
_library: Any = getattr(torch.library, "Library")("ddtas", "DEF")
_library.define(
    "loss(Tensor rows, Tensor labels, Tensor? references, Tensor? reference_labels, Tensor? identity,"
    " Tensor? lambda_pos, Tensor? lambda_neg, str mining, float[] numbers, bool normalize, bool reference_gradient,"
    " int check, int engine) -> (Tensor loss, Tensor gradient, Tensor reference_gradient, Tensor statistics)"
)
_operator = torch.ops.ddtas.loss.default


class Call(NamedTuple):
    """What the operator is called with, in the order of its schema."""

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


Answers = Tuple[Tensor, Tensor, Tensor, Tensor]
Found = Tuple[Tensor, Tensor, Optional[Tensor], Tensor]
"""The answers, and `None` for a gradient of the references that nobody asked for: a tensor without an entry takes a microsecond."""


def _wide(rows: Tensor) -> torch.dtype:
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def _room(rows: Tensor, references: Tensor | None, reference_gradient: bool) -> Found:
    """Room for the answers."""
    wide, device = _wide(rows), rows.device
    back = references.shape if references is not None and reference_gradient else None
    return (
        torch.empty((), dtype=wide, device=device),
        torch.empty(rows.shape, dtype=wide, device=device),
        None if back is None else torch.empty(back, dtype=wide, device=device),
        torch.empty(len(STATISTICS), dtype=torch.float64, device=device),
    )


def _answers(found: Found) -> Answers:
    loss, gradient, back, statistics = found
    return loss, gradient, gradient.new_empty(0) if back is None else back, statistics


def check_call(call: Call) -> None:
    """Refuses what would be read beyond its memory, or as another type than it has: addresses alone go on."""
    rows, labels, references, reference_labels, identity = call[:5]
    if rows.dtype not in TYPES:
        raise TypeError(f"the anchors must be float32, float16, bfloat16 or float64, not {_name(rows.dtype)}")
    if rows.ndim != 2:
        raise ValueError(f"the anchors must have 2 dimensions, rows and entries, not {rows.ndim}")
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
    """One for each row of `side`, where the anchors are."""
    if given.dtype != torch.int64:
        raise TypeError(f"the {name} must be int64, not {_name(given.dtype)}")
    if given.shape != side.shape[:1]:
        raise ValueError(f"the {name} must be [{side.shape[0]}], not {list(given.shape)}")
    check_one_device(rows, name, given)


def check_one_device(rows: Tensor, name: str, given: Tensor) -> None:
    if given.device != rows.device:
        raise ValueError(f"the {name} are on {given.device}, and the anchors on {rows.device}: move them there")


def _fake(call: Call) -> Answers:
    for name, given in zip(Call._fields[1:5], call[1:5]):
        if given is not None:
            check_one_device(call.rows, name, given)
    return _answers(_room(call.rows, call.references, call.reference_gradient))


def _on_cpu(call: Call) -> Found:
    check_call(call)
    rows, labels, references, reference_labels, identity, lambda_pos, lambda_neg = call[:7]
    mining, numbers, normalize, reference_gradient, check, engine = call[7:]
    where = engine_of(engine)
    if lambda_pos is not None or lambda_neg is not None:
        numbers = with_lambdas(numbers, lambda_pos, lambda_neg)
    kind = TYPES[rows.dtype]
    if rows.shape[0] == 0 or (references is not None and references.shape[0] == 0):
        return of_nothing(where, call, numbers)
    unit: list[tuple[Tensor, Tensor, Tensor]] = []
    if kind == 3 and normalize and rows.shape[1]:
        # The scalar reference takes unit rows.
        unit = [normalize_rows(side) for side in (rows, references) if side is not None]
        rows, references, normalize = unit[0][0], unit[-1][0] if len(unit) > 1 else None, False
    rows, labels = laid_out(rows), laid_out(labels)
    anchors = (rows.data_ptr(), labels.data_ptr(), *rows.shape, kind)
    others, named = None, 0
    if references is not None and reference_labels is not None:
        references, reference_labels = laid_out(references), laid_out(reference_labels)
        others = (references.data_ptr(), reference_labels.data_ptr(), *references.shape, TYPES[references.dtype])
        if identity is not None:
            identity = laid_out(identity)
            named = identity.data_ptr()
    flags = (normalize, reference_gradient, check != UNCHECKED)
    loss, own, other, statistics, where.last = _ddtas._loss_at(where.host, anchors, others, named, mining, numbers, flags)
    gradient, back = torch.from_numpy(own), None if other is None else torch.from_numpy(other)
    if unit:
        gradient = normalize_backward(gradient, *unit[0])
        back = None if back is None else normalize_backward(back, *unit[1])
    return torch.from_numpy(loss), gradient, back, torch.from_numpy(statistics)


def _on_gpu(call: Call) -> Found:
    """Issues the loss, and waits for nothing."""
    check_call(call)
    rows, labels, references, reference_labels, identity, lambda_pos, lambda_neg = call[:7]
    mining, numbers, normalize, reference_gradient, check, engine = call[7:]
    where = engine_of(engine)
    gpu, stream = where.on_gpu(rows)
    if rows.shape[0] == 0 or (references is not None and references.shape[0] == 0):
        return of_nothing(where, call, numbers)
    # Held until everything is issued: torch gives memory away in the order of the stream.
    held = [laid_out(side) for side in (rows, references) if side is not None]
    marks = [laid_out(mark) for mark in (labels, reference_labels) if mark is not None]
    loss, gradient, back, statistics = _room(rows, references, reference_gradient)
    thresholds = None
    if lambda_pos is not None or lambda_neg is not None:
        thresholds = _on_device(rows, numbers, lambda_pos, lambda_neg)
        if thresholds is None:
            numbers = with_lambdas(numbers, lambda_pos, lambda_neg)
    named = None if identity is None else identity.to(torch.int32).contiguous()
    places = [
        (side.data_ptr(), mark.data_ptr(), *side.shape, TYPES[side.dtype], 0 if out is None else out.data_ptr())
        for side, mark, out in zip(held, marks, (gradient, back))
    ]
    gpu.enqueue_loss(
        (rows.get_device(), stream),
        places,
        0 if named is None else named.data_ptr(),
        0 if thresholds is None else thresholds.data_ptr(),
        mining,
        numbers,
        check != UNCHECKED,
        (statistics.data_ptr(), loss.data_ptr()),
        normalize,
    )
    where.last = (statistics, labels)
    if check == WAITED_FOR:
        where.found()
    return loss, gradient, back, statistics


def _on_device(
    rows: Tensor, numbers: Sequence[float], lambda_pos: Tensor | None, lambda_neg: Tensor | None
) -> Tensor | None:
    """Both thresholds where the rows are, if one is there already: nobody waits for it."""
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


def of_nothing(where: Engine, call: Call, numbers: Sequence[float]) -> Answers:
    """The loss without a pair: 0, and gradients of zeros."""
    loss, gradient, back, statistics = _answers(_room(call.rows, call.references, call.reference_gradient))
    for answer in (loss, gradient, back):
        answer.zero_()
    nan = float("nan")
    gamma_pos, gamma_neg = _ddtas._initial_tolerances(call.mining, numbers)
    known = {"mean_pos": nan, "mean_neg": nan, "gamma_pos": gamma_pos, "gamma_neg": gamma_neg}
    where.last = [*(known.get(name, 0.0) for name in STATISTICS[:-2]), *count_labels(call.labels)]
    statistics.copy_(torch.tensor(where.last, dtype=torch.float64))
    return loss, gradient, back, statistics


def with_lambdas(numbers: Sequence[float], lambda_pos: Tensor | None, lambda_neg: Tensor | None) -> list[float]:
    pos, neg = numbers[6:]
    return [
        *numbers[:6],
        pos if lambda_pos is None else float(lambda_pos),
        neg if lambda_neg is None else float(lambda_neg),
    ]


_register_fake: Any = getattr(torch.library, "register_fake")
_register_fake("ddtas::loss", lambda *given: _fake(Call(*given)), lib=_library)
_library.impl("loss", lambda *given: _answers(_on_cpu(Call(*given))), "CPU")
_library.impl("loss", lambda *given: _answers(_on_gpu(Call(*given))), "CUDA")


_library.define("good_rows(Tensor rows) -> Tensor")
good_rows = torch.ops.ddtas.good_rows.default
"""Which rows are of unit length, `[B]` of booleans; on the processor one that is not raises ValueError."""


_TOLERANCES = {dtype: _ddtas._norm_tolerance(code) for dtype, code in TYPES.items()}


def which_are_unit(rows: Tensor, tolerance: float | None = None) -> Tensor:
    """By default to the tolerance that the library checks rows of their type by."""
    if tolerance is None:
        tolerance = _TOLERANCES.get(rows.dtype, _TOLERANCES[torch.float32])
    wide = rows if rows.dtype == torch.float64 else rows.float()
    distance: Tensor = (torch.linalg.vector_norm(wide, dim=1) - 1).abs()
    return distance <= tolerance


def _refuse_bad_rows(rows: Tensor) -> Tensor:
    good = which_are_unit(rows)
    if not good.all():
        row = int((~good).nonzero()[0])
        raise ValueError(f"row {row} of the embeddings is not finite or has no unit length: nothing was queued")
    return good


_register_fake("ddtas::good_rows", which_are_unit, lib=_library)
_library.impl("good_rows", _refuse_bad_rows, "CPU")
_library.impl("good_rows", which_are_unit, "CUDA")


class _Once(torch.autograd.Function):
    """A gradient that depends on the inputs, and cannot be differentiated with respect to them."""

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
    """The gradient was computed with the loss, and is only scaled: of rows, references and both thresholds."""
    needed = ctx.needs_input_grad
    answers: list[Tensor | None] = [None] * len(needed)
    if upstream is None:
        return answers
    rows, references, lambda_pos, lambda_neg, gradient, back, statistics = ctx.saved_tensors
    inputs = (rows, references, lambda_pos, lambda_neg)
    # Under create_graph: a second derivative would otherwise be wrong and not an error.
    once = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    # `loss.backward()` scales by 1. Nobody waits for a GPU to say so.
    try:
        one = eager and upstream.is_cpu and upstream.item() == 1
    except RuntimeError:
        # Several upstreams at once (`is_grads_batched`) are no number.
        one = eager = False
    for place, given in enumerate(inputs):
        if not needed[place]:
            continue
        if place < 2:
            answer = back if place else gradient
            if not one:
                # Eager in the rows' type at once: one kernel on a GPU, not two.
                at_once = eager and not once and answer.dtype != given.dtype
                room = torch.empty_like(answer, dtype=given.dtype) if at_once else None
                answer = torch.mul(answer, upstream, out=room)
            if answer.dtype != given.dtype:
                answer = answer.to(given.dtype)
        else:
            # A threshold's derivative is a number, and the threshold any tensor of one element.
            answer = (statistics[place - 1] * upstream).to(dtype=given.dtype, device=given.device).reshape(given.shape)
        answers[place] = _Once.apply(answer, *inputs) if once else answer
    return answers


def _save(ctx: Any, inputs: tuple[Any, ...], output: Found) -> None:
    rows, references, lambda_pos, lambda_neg = inputs[:4]
    _, gradient, back, statistics = output
    _, of_references, *of_thresholds = ctx.needs_input_grad[:4]
    if not of_references:
        # Constants may change before the way back: the queue of a memory does.
        references = back = None
    derivatives = statistics if any(of_thresholds) else None
    ctx.save_for_backward(rows, references, lambda_pos, lambda_neg, gradient, back, derivatives)


_NO_FORWARD_MODE = "the loss of ddtas has no forward-mode derivative (jvp, jacfwd): use backward or torch.func.grad"


def _in_type_of(references: Tensor | None, rows: Tensor) -> Tensor:
    """Rows as they are compared, in the type of the references: behind the derivative, which stays in the rows' own."""
    return rows if references is None else rows.to(references.dtype)


class _Traced(torch.autograd.Function):
    """The loss for torch's compiler and transforms, which must see all that is saved as an output. The compiler takes none with
    a `jvp`: `_forward_mode` refuses it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        rows: Tensor, references: Tensor | None, lambda_pos: Tensor | None, lambda_neg: Tensor | None, *given: Any
    ) -> Answers:
        labels, reference_labels, identity, *rest = given
        answers: Answers = _operator(
            _in_type_of(references, rows), labels, references, reference_labels, identity, lambda_pos, lambda_neg, *rest
        )
        return answers

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Answers) -> None:
        _save(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(_backward(ctx, upstream, False))


_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


def _eagerly(call: Call) -> Found:
    """The operator's answers, without torch's dispatcher (a sixth of the overhead) where no mode and no type of tensor must see
    it. A type of its own may have no memory."""
    if _PLAIN.issuperset(map(type, call[:7])) and not torch._C._len_torch_dispatch_stack():
        if call.rows.is_cpu:
            return _on_cpu(call)
        if call.rows.is_cuda:
            return _on_gpu(call)
    found: Found = _operator(*call)
    return found


class _Eager(torch.autograd.Function):
    """The same with one output, which spares eager calls a third of their overhead."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        references: Tensor | None,
        lambda_pos: Tensor | None,
        lambda_neg: Tensor | None,
        given: tuple[Any, ...],
        compute: Callable[[Call], Found],
    ) -> Tensor:
        labels, reference_labels, identity, *rest = given
        call = Call(_in_type_of(references, rows), labels, references, reference_labels, identity, lambda_pos, lambda_neg, *rest)
        found = compute(call)
        _save(ctx, (rows, references, lambda_pos, lambda_neg), found)
        return found[0]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(_backward(ctx, upstream, True))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_NO_FORWARD_MODE)


def _forward_mode() -> bool:
    """Whether a transform asks for the derivative along a tangent, which the operator would silently leave out."""
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
    compute: Callable[[Call], Found] | None = None,
) -> Tensor:
    """The loss, differentiable by the first four; `compute` stands for the operator, which a compiler does not see then."""
    reference_gradient = references is not None and references.requires_grad
    given = (labels, reference_labels, identity, mining, numbers, normalize, reference_gradient, check, engine)
    transformed = torch._C._are_functorch_transforms_active()
    if transformed and _forward_mode():
        raise NotImplementedError(_NO_FORWARD_MODE)
    if compute is None and (torch.compiler.is_compiling() or transformed):
        if not any(side is not None and side.requires_grad for side in (rows, references, lambda_pos, lambda_neg)):
            # torch 2.11 cannot trace a function whose inputs require no gradient.
            sides = (_in_type_of(references, rows), labels, references, reference_labels, identity)
            loss: Tensor = _operator(*sides, lambda_pos, lambda_neg, *given[3:])[0]
            return loss
        answers: tuple[Tensor, ...] = _Traced.apply(rows, references, lambda_pos, lambda_neg, *given)
        return answers[0]
    if torch._C._is_tracing():
        raise NotImplementedError("the loss of ddtas cannot be traced by torch.jit.trace: use torch.export or torch.compile")
    loss = _Eager.apply(rows, references, lambda_pos, lambda_neg, given, compute or _eagerly)
    return loss
