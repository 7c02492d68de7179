"""The way of rows on a GPU, by the kernels on the emulated device; skipped in a package built without the feature `emulated`."""

import ddtas
import pytest
from formula import close, unit_rows

torch = pytest.importorskip("torch", reason="torch is not installed: its tests do not run")

from contextlib import nullcontext  # noqa: E402

from ddtas import _ddtas  # noqa: E402
from ddtas.torch import CrossBatchMemory, SoftContrastiveLoss  # noqa: E402
from emulated import built, emulated_gpu  # noqa: E402

pytestmark = pytest.mark.skipif(not built, reason="this build has no emulated device")

DIM = 40
COUNTED = ("active", "positives", "negatives", "ignored")


def batch(count=90, seed=0, dtype=torch.float32):
    rows, labels = unit_rows(count, DIM, seed)
    return torch.tensor(3 * rows, dtype=dtype), torch.tensor(labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["square", "references", "learned", "memory"])
def test_the_kernels_give_the_answers_of_the_processor(form, dtype):
    found = []
    for device in (nullcontext(), emulated_gpu()):
        threshold = torch.nn.Parameter(torch.tensor([0.6]))
        loss = SoftContrastiveLoss(lambda_neg=threshold if form == "learned" else 0.6)
        rows, labels = batch(dtype=dtype)
        others, other_labels = batch(33, 1, dtype)
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


def test_a_search_in_blocks_gives_the_processor_s_metrics():
    rows, labels = unit_rows(60, DIM, 2)
    rows = rows.astype("float32")
    metrics = [
        context.query_metrics(*place, rows, labels, None, None, None, [1, 4])
        for context, place in ((ddtas.Context(), ()), (_ddtas.CudaContext(), ((0, 0),)))
    ]
    for mine, want in zip(*metrics):
        assert str(mine) == str(want)


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
