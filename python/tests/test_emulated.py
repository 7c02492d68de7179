"""The way of rows on a GPU, by the kernels on the emulated device; skipped in a package built without the feature `emulated`."""

import pytest
from formula import close, unit_rows

torch = pytest.importorskip("torch", reason="torch is not installed: its tests do not run")

from contextlib import nullcontext  # noqa: E402

from ddtas import _ddtas  # noqa: E402
from ddtas.torch import CrossBatchMemory, SoftContrastiveLoss, ThresholdGenerator  # noqa: E402
from ddtas.torch import recall_at_k, threshold_gradient  # noqa: E402
from device_cases import compiled_steps_are_those_of_eager, same_searches, searches  # noqa: E402
from emulated import built, emulated_gpu  # noqa: E402

pytestmark = pytest.mark.skipif(not built, reason="this build has no emulated device")

DIM = 40
COUNTED = ("active", "positives", "negatives", "ignored")


def batch(count=90, seed=0, dtype=torch.float32):
    rows, labels = unit_rows(count, DIM, seed)
    return torch.tensor(3 * rows, dtype=dtype), torch.tensor(labels)


def with_gaps(rows, labels):
    """The same, transposed in memory and in a column of a table."""
    return rows.T.contiguous().T, torch.stack([labels, -labels], 1)[:, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["square", "references", "learned", "memory"])
def test_the_kernels_give_the_answers_of_the_processor(form, dtype):
    found = []
    for device in (nullcontext(), emulated_gpu()):
        threshold = torch.nn.Parameter(torch.tensor([0.6]))
        loss = SoftContrastiveLoss(lambda_neg=threshold if form == "learned" else 0.6)
        rows, labels = with_gaps(*batch(dtype=dtype))
        others, other_labels = with_gaps(*batch(33, 1, dtype))
        more = {"ref_emb": others.requires_grad_(), "ref_labels": other_labels} if form in ("references", "learned") else {}
        module = CrossBatchMemory(loss, DIM, 110) if form == "memory" else loss
        with device:
            for _ in range(2 if form == "memory" else 1):
                value = module(rows.requires_grad_(), labels, **more)
        (2 * value).backward()
        found.append((value.item(), rows.grad, others.grad, threshold.grad, loss.statistics))
    assert type(loss._engine.gpu) is _ddtas.CudaContext
    (value, *gradients, statistics), (got, *got_gradients, got_statistics) = found
    assert value > 0 and got == pytest.approx(value, rel=1e-5)
    for mine, want in zip(got_gradients, gradients):
        assert (mine is None) == (want is None)
        if want is not None:
            assert want.any()
            close(mine.float(), want.float(), 2e-5 if dtype == torch.float32 else 1e-2)
    assert got_statistics == pytest.approx(statistics, rel=1e-4)
    assert [got_statistics[name] for name in COUNTED] == [statistics[name] for name in COUNTED] and statistics["ignored"] > 0


def test_a_bad_row_makes_the_loss_nan_and_is_named_when_it_is_asked_for():
    rows, labels = batch()
    rows[5, 3] = torch.inf
    loss = SoftContrastiveLoss()
    with emulated_gpu():
        value = loss(rows.requires_grad_(), labels)
        value.backward()
        assert value.isnan() and rows.grad.isnan().all()
        with pytest.raises(ValueError, match="row 5 of the anchors holds a value that is not finite"):
            loss.check()
        with pytest.raises(ValueError, match="row 5 of the anchors"):
            SoftContrastiveLoss(check="wait")(rows, labels)
        unchecked = SoftContrastiveLoss(check=False)
        unchecked(rows, labels)
        unchecked.check()


def test_a_loss_asks_torch_for_room_alone():
    loss = SoftContrastiveLoss()
    rows, labels = batch()
    with emulated_gpu():
        loss(rows.requires_grad_(), labels)
        with torch.autograd.profiler.profile() as profile:
            value = loss(rows, labels)
    assert [event.name for event in profile.function_events] == ["aten::to", "_Eager", *["aten::empty"] * 3]
    upstream = torch.tensor(2.0)
    with torch.autograd.profiler.profile() as profile:
        torch.autograd.grad(value, rows, upstream)
    # The upstream gradient is read on the CPU only, not on a GPU.
    read = ["aten::item", "aten::_local_scalar_dense"]
    assert [event.name for event in profile.function_events if event.name.startswith("aten")] == [*read, "aten::mul"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_searches_threshold_gradients_and_the_generator_give_the_processor_s_numbers(dtype):
    rows, labels = batch(dtype=dtype)
    others, other_labels = batch(33, 1, dtype)
    unit, others = (torch.nn.functional.normalize(side.float(), dim=1).to(dtype) for side in (rows, others))
    tangents = [torch.randn(side.shape, generator=torch.Generator().manual_seed(3)) for side in (unit, others)]
    (unit, labels), (others, other_labels) = with_gaps(unit, labels), with_gaps(others, other_labels)
    rows, *tangents = (side.T.contiguous().T for side in (rows, *tangents))
    torch.manual_seed(0)
    network, found = torch.nn.Linear(DIM, 12), []
    for device in (nullcontext(), emulated_gpu()):
        generator = ThresholdGenerator(SoftContrastiveLoss(lambda_pos=0.6, lambda_neg=0.6), network)
        with device:
            found.append((
                recall_at_k(rows, labels),
                threshold_gradient(unit, labels, tangents[0]),
                threshold_gradient(unit, labels.to(torch.int32), tangents[0], others, other_labels.int(), tangents[1], check=False),
            ))  # fmt: skip
            generator.step(rows.float(), labels, batch(60, 4))
        found[-1] += (generator.hypergradient,)
    (recall, *want), (got_recall, *got) = found
    assert got_recall == recall and all(any(sums) for sums in want)
    for mine, sums in zip(got, want):
        assert mine == pytest.approx(sums, rel=1e-4)


def test_arguments_of_another_shape_type_or_place_are_refused():
    rows, labels = unit_rows(20, DIM, 0)
    rows, labels = torch.tensor(rows, dtype=torch.float32), torch.tensor(labels)
    with emulated_gpu():
        for given, kind, message in (
            ((rows.double(), labels, rows), TypeError, "float32, float16 or bfloat16"),
            ((rows, labels[:3], rows), ValueError, r"labels must be \[20\], not \[3\]"),
            ((rows, labels, rows[:3]), ValueError, r"tangent must be \[20, 40\], not \[3, 40\]"),
            ((rows, labels, rows.double()), TypeError, "tangent must be float32, not float64"),
            ((rows, labels, rows.to("meta")), ValueError, "tangent are on meta"),
            ((rows, labels, rows, rows[:5, :7], labels[:5]), TypeError, "one type and one dimension"),
            ((rows, labels, rows, rows[:5], labels[:5], rows), ValueError, r"tangent of the references must be \[5, 40\]"),
        ):
            with pytest.raises(kind, match=message):
                threshold_gradient(*given)
        with pytest.raises(ValueError, match="identity must be None on a GPU"):
            threshold_gradient(rows, labels, rows, rows, labels, identity=0)
        with pytest.raises(ValueError, match=r"row \d+ of the anchors has L2 norm 2"):
            threshold_gradient(2 * rows, labels, rows)
        threshold_gradient(2 * rows, labels, rows, check=False)
        for given, kind, message in (
            ((rows[0], labels), ValueError, "queries must have 2 dimensions"),
            ((rows, labels[:3]), ValueError, r"labels must be \[20\], not \[3\]"),
            ((rows, labels, [0]), ValueError, "0"),
            ((rows.int(), labels), TypeError, "must be float32, float16"),
        ):
            with pytest.raises(kind, match=message):
                recall_at_k(*given)


def test_every_form_of_a_search_gives_the_processor_s_metrics():
    wanted = searches()
    with emulated_gpu():
        found = searches()
    same_searches(found, wanted)
    # The figures depend on ranks alone.
    assert found == wanted


def test_compiled_steps_are_those_of_eager():
    with emulated_gpu():
        compiled_steps_are_those_of_eager()


def test_a_part_of_another_shape_or_out_of_order_is_refused():
    rows, labels = batch(20)
    gradient = torch.zeros(20, DIM)
    own = (rows.data_ptr(), labels.data_ptr(), 20, DIM, 0, gradient.data_ptr())
    numbers = (0.1, 0.1, 0.1, 0.5, 40.0, 2.0, 0.7, 0.7)
    make = lambda *sides, total=20: _ddtas.CudaPart(  # noqa: E731
        _ddtas.CudaContext(), (0, 0), list(sides), (0, 0), total, "asms", numbers, True, True
    )
    with pytest.raises(RuntimeError, match="the sweep needs the same-class step before it"):
        make(own, own).sweep((gradient.data_ptr(),) * 2 + (20,), gradient.data_ptr(), gradient.data_ptr())
    with pytest.raises(ValueError, match="total"):
        make(own, own, total=0).same_class(gradient.data_ptr())
    with pytest.raises(TypeError, match="one type and one dimension"):
        make(own, (*own[:3], DIM + 1, *own[4:]))
