"""`ddtas.torch` on a GPU; every test is skipped, and counted, without one or in a build for the CPU."""

import copy
import ctypes
import gc

import ddtas
import numpy as np
import pytest
from formula import close, unit_rows

torch = pytest.importorskip("torch", reason="torch is not installed: its tests do not run")

from types import SimpleNamespace  # noqa: E402

from ddtas import Settings  # noqa: E402
from ddtas.torch import CrossBatchMemory, SoftContrastiveLoss, threshold_gradient  # noqa: E402
from ddtas.torch.engine import Engine  # noqa: E402
from ddtas.torch.operator import Call  # noqa: E402
from ddtas.torch.steps import GpuSteps, OwnReferences, PartOfBatch  # noqa: E402
from device_cases import compiled_steps_are_those_of_eager, same_searches, searches  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not ddtas.has_cuda, reason="this build serves the CPU only"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


def batch(count=200, dim=64, seed=0, device="cuda"):
    rows, labels = unit_rows(count, dim, seed, classes=20)
    return torch.tensor(3 * rows, dtype=torch.float32, device=device), torch.tensor(labels, device=device)


@pytest.mark.parametrize("references", [False, True])
def test_loss_gradients_and_statistics_are_the_processor_s(references):
    found = []
    for device in ("cpu", "cuda"):
        rows, labels = batch(device=device)
        others, other_labels = batch(90, seed=1, device=device)
        threshold = torch.nn.Parameter(torch.tensor(0.6, device=device))
        loss = SoftContrastiveLoss(lambda_pos=threshold)
        more = {"ref_emb": others.requires_grad_(), "ref_labels": other_labels} if references else {}
        value = loss(rows.requires_grad_(), labels, **more)
        (2 * value).backward()
        found.append((value.item(), rows.grad, others.grad, threshold.grad.item(), loss.statistics))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5) and found[1][3] == pytest.approx(found[0][3], rel=1e-4)
    assert found[1][4] == pytest.approx(found[0][4], rel=1e-4)
    for mine, want in zip(found[1][1:3], found[0][1:3]):
        if want is not None:
            close(mine.cpu(), want, 2e-5)


def test_float32_rows_may_be_rounded():
    found = []
    for allow_tf32 in (False, True):
        rows, labels = batch()
        value = SoftContrastiveLoss(allow_tf32=allow_tf32)(rows.requires_grad_(), labels)
        value.backward()
        found.append((value.item(), rows.grad))
    (exact, want), (fast, got) = found
    assert fast != exact and fast == pytest.approx(exact, rel=1e-2)
    # A pair near a threshold may be mined in one and not in the other.
    assert 0 < torch.linalg.norm(got - want) <= 0.05 * torch.linalg.norm(want)


def test_nobody_waits_until_statistics_are_read():
    rows, labels = batch()
    loss = SoftContrastiveLoss()
    loss(rows.requires_grad_(), labels).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(rows, labels).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.statistics["active"] > 0


def test_a_bad_row_makes_the_loss_nan_and_is_named_when_it_is_asked_for():
    rows, labels = batch()
    rows[17] = torch.nan
    loss = SoftContrastiveLoss()
    value = loss(rows.requires_grad_(), labels)
    value.backward()
    assert value.isnan() and rows.grad.isnan().all()
    for ask in (loss.check, lambda: loss.statistics):
        with pytest.raises(ValueError, match="row 17 of the anchors"):
            ask()
    with pytest.raises(ValueError, match="row 17 of the anchors"):
        SoftContrastiveLoss(check="wait")(rows, labels)


def test_a_captured_step_replays_the_bits_of_eager():
    loss = SoftContrastiveLoss()
    rows, labels = batch()
    given = rows.clone().requires_grad_()

    def step():
        value = loss(given, labels)
        (gradient,) = torch.autograd.grad(value, given)
        return value, gradient

    refused = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="call it once with this shape"), torch.cuda.graph(refused):
        step()
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        with torch.no_grad():
            given.copy_(batch(seed=seed)[0])
        want = step()
        graph.replay()
        assert torch.equal(captured[0], want[0]) and torch.equal(captured[1], want[1])


def test_a_captured_memory_replays_the_bits_of_eager():
    memory = CrossBatchMemory(SoftContrastiveLoss(), 64, 300).cuda()
    eager, (rows, labels) = copy.deepcopy(memory), batch()
    given = rows.clone().requires_grad_()

    def step(memory):
        value = memory(given, labels)
        return value, torch.autograd.grad(value, given)[0]

    assert torch.equal(step(memory)[0], step(eager)[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(memory)
    # Nothing was queued by the capture itself. The replays wrap around the queue's end.
    assert memory.filled == 200
    for seed in range(4):
        with torch.no_grad():
            given.copy_(batch(seed=seed)[0])
        want = step(eager)
        graph.replay()
        assert torch.equal(captured[0], want[0]) and torch.equal(captured[1], want[1]) and want[0] > 0
        for name in ("embedding_memory", "label_memory", "queue_idx"):
            assert torch.equal(getattr(memory, name), getattr(eager, name))
    assert memory.filled == 300


def test_a_stream_that_its_owner_destroys_is_survived():
    loss, cudart = SoftContrastiveLoss(), torch.cuda.cudart()
    # With more rows than before the workspace grows.
    for count in (200, 100, 800):
        rows, labels = batch(count)
        want = SoftContrastiveLoss()(rows, labels).item()
        made = ctypes.c_void_p()
        torch.cuda.check_error(int(cudart.cudaStreamCreate(ctypes.addressof(made))))
        stream = torch.cuda.ExternalStream(made.value)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            value = loss(rows, labels)
        stream.synchronize()
        assert value.item() == want and loss.statistics["active"] > 0
        del stream
        torch.cuda.check_error(int(cudart.cudaStreamDestroy(made.value)))
        assert loss(rows, labels).item() == want
    del loss
    gc.collect()
    torch.cuda.synchronize()


def test_a_stream_may_die_and_the_current_device_stays():
    loss = SoftContrastiveLoss()
    rows, labels = batch()
    want = loss(rows, labels)
    before = torch.cuda.current_device()
    for _ in range(5):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            value = loss(rows, labels)
        torch.cuda.current_stream().wait_stream(stream)
        assert value == want
        del stream
    assert torch.cuda.current_device() == before


@pytest.mark.parametrize("references", [False, True])
def test_steps_of_two_parts_give_the_loss_of_the_whole(references):
    """What two processes of a group do, one after the other; a stand-in takes the all-gathers' place."""
    rows, labels = batch()
    others, other_labels = batch(90, seed=1)
    whole = SoftContrastiveLoss()
    more = {"ref_emb": others.requires_grad_(), "ref_labels": other_labels} if references else {}
    want = whole(rows.requires_grad_(), labels, **more)
    want.backward()
    counts, numbers, settings = [70, 130], (0.1, 0.1, 0.1, 0.5, 40.0, 2.0, 0.7, 0.7), Settings()
    parts = []
    for first, count in ((0, 70), (70, 130)):
        own = slice(first, first + count)
        columns, own_references = (rows.detach(), labels), None
        of_call = [None, None]
        if references:
            columns, of_own = (others.detach(), other_labels), slice(0, 20) if first == 0 else slice(20, 90)
            of_call = [columns[0][of_own], columns[1][of_own]]
            own_references = OwnReferences(*of_call, rows.detach(), labels)
        call = Call(rows[own], labels[own], *of_call, *[None] * 3, "at-asms", numbers, True, references, 0, 0)
        exchange = SimpleNamespace(total=200, counts=counts, first=first, own=own, failures=torch.zeros(2, device=rows.device))
        part = PartOfBatch(call, settings, exchange, rows[own].detach(), *columns, own_references)
        parts.append(GpuSteps(Engine(), part))
    gathered = []
    for name in ("same_class", "sweep", "select", "gradient"):
        last = gathered[-2:] if name == "gradient" else gathered[-1:]
        if name == "select":
            last.append(totals.sum(0))  # noqa: F821
        found = [getattr(part, name)(*last) for part in parts]
        gathered += map(torch.cat, zip(*(numbers for numbers, _ in found)))
        totals = torch.stack([sums for _, sums in found])
    last, statistics = parts[0].combined(totals)
    engine = parts[0].engine
    engine.last = last
    assert statistics[0].item() == pytest.approx(want.item(), rel=1e-6) and engine.read_statistics()[1:] == pytest.approx(
        whole._engine.read_statistics()[1:], rel=1e-4
    )
    close(torch.cat([part.own_gradient for part in parts]).cpu(), rows.grad.cpu(), 2e-5)
    if references:
        close(torch.cat([part.reference_gradient for part in parts]).cpu(), others.grad.cpu(), 2e-5)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled_steps_are_those_of_eager(mode):
    with torch.device("cuda"):
        compiled_steps_are_those_of_eager(mode=mode)


def test_every_form_of_a_search_gives_the_processor_s_metrics():
    same_searches(searches(lambda given: given.cuda()), searches())


def test_threshold_gradients_are_the_processor_s():
    rows, labels = batch(length := 200)
    rows = torch.nn.functional.normalize(rows, dim=1)
    tangent = torch.randn(length, 64, device="cuda")
    got = threshold_gradient(rows, labels, tangent)
    np.testing.assert_allclose(got, threshold_gradient(rows.cpu(), labels.cpu(), tangent.cpu()), rtol=1e-3)
