"""`ddtas.torch.CrossBatchMemory` against a queue written out in NumPy."""

import copy
import math
import pickle
import warnings

import formula
import numpy as np
import pytest
from formula import close, unit_rows

torch = pytest.importorskip("torch", reason="torch is not installed: its tests do not run")

from ddtas.torch import CrossBatchMemory, SoftContrastiveLoss  # noqa: E402

DIM = 8


class PlainQueue:
    """A first-in, first-out queue that keeps every row and uses the last `size`."""

    def __init__(self, size):
        self.size, self.rows, self.labels = size, np.zeros((0, DIM)), np.zeros(0, int)

    def loss(self, rows, labels, enqueue=None):
        """Queues the rows, then compares: a row's pair with itself, known by its place in the queue, does not count."""
        queued = np.ones(len(rows), bool) if enqueue is None else enqueue
        first = len(self.rows)
        self.rows = np.concatenate([self.rows, rows[queued]])
        self.labels = np.concatenate([self.labels, labels[queued]])
        start = max(0, len(self.rows) - self.size)
        anchors, own = (rows, True) if enqueue is None else (rows[~enqueue], False)
        anchor_labels = labels if enqueue is None else labels[~enqueue]
        places = np.arange(start, len(self.rows))
        itself = own & (places[None, :] - first == np.arange(len(anchors))[:, None])
        return formula.expected(anchors, anchor_labels, self.rows[start:], self.labels[start:], own=itself)


def batches(count, size, seed=0):
    for i in range(count):
        rows, labels = unit_rows(size, DIM, seed=100 * seed + i, classes=5, noise=1.5)
        yield torch.tensor(2 * rows, dtype=torch.float32), torch.tensor(labels)


def unit(rows):
    return torch.nn.functional.normalize(rows, dim=1).detach().double().numpy()


@pytest.mark.parametrize("memory_size", [16, 47, 50, 64, 1000])
def test_losses_are_those_of_a_plain_queue(memory_size):
    memory, plain = CrossBatchMemory(SoftContrastiveLoss(), DIM, memory_size), PlainQueue(memory_size)
    for rows, labels in batches(9, 16):
        rows.requires_grad_()
        loss = memory(rows, labels)
        want = plain.loss(unit(rows), labels.numpy())
        assert loss.item() == pytest.approx(want.loss, rel=1e-5, abs=1e-7)
        assert memory.loss.statistics["active"] == ((want.count_pos > 0) & (want.count_neg > 0)).sum()
        loss.backward()
        # The gradient through the normalisation, by hand.
        rows_of, length = unit(rows), rows.detach().norm(dim=1, keepdim=True).numpy()
        inward = (want.gradient * rows_of).sum(1, keepdims=True) * rows_of
        close(rows.grad, (want.gradient - inward) / length, 2e-5)
    assert not memory.embedding_memory.requires_grad


def test_masked_rows_are_queued_and_the_others_compared():
    memory, plain = CrossBatchMemory(SoftContrastiveLoss(), DIM, 30), PlainQueue(30)
    for rows, labels in batches(6, 20, seed=1):
        mask = torch.arange(20) % 3 == 0
        want = plain.loss(unit(rows), labels.numpy(), mask.numpy())
        assert memory(rows, labels, enqueue_mask=mask).item() == pytest.approx(want.loss, rel=1e-5, abs=1e-7)


def test_a_queue_is_taken_up_from_its_state_dict():
    memory = CrossBatchMemory(SoftContrastiveLoss(), DIM, 40)
    given = list(batches(6, 16, seed=2))
    for rows, labels in given[:4]:
        memory(rows, labels)
    again = CrossBatchMemory(SoftContrastiveLoss(), DIM, 40)
    again.load_state_dict(memory.state_dict())
    copied = copy.deepcopy(memory)
    for rows, labels in given[4:]:
        want = memory(rows, labels)
        assert again(rows, labels) == want and copied(rows, labels) == want
    memory.reset_queue()
    # A GPU checks the rows of an empty queue, too.
    assert bool((memory.embedding_memory.norm(dim=1) == 1).all())
    memory(*given[0])
    assert memory.queue_idx == 16 and not memory.has_been_filled


def test_a_state_dict_is_tensors_alone_for_libraries_that_save_nothing_else():
    memory, again = (CrossBatchMemory(SoftContrastiveLoss(), DIM, 40, start_after=1) for _ in range(2))
    given = list(batches(4, 16, seed=14))
    for rows, labels in given[:3]:
        memory(rows, labels)
    again.load_state_dict({name: torch.from_numpy(value.numpy().copy()) for name, value in memory.state_dict().items()})
    assert again.filled == 32 and again.started
    assert again(*given[3]) == memory(*given[3])
    assert again.statistics == memory.statistics != {}


def test_gradients_pass_gradcheck_in_float64():
    filled = CrossBatchMemory(SoftContrastiveLoss(), DIM, 30, dtype=torch.float64)
    for rows, labels in batches(2, 12, seed=3):
        filled(rows, labels)
    (rows, labels), *_ = batches(1, 8, seed=4)
    # Queued copies of the batch are constants to autograd, but finite differences would move them: they are left out.
    mask = torch.zeros(8, dtype=torch.bool)
    step = lambda moved: copy.deepcopy(filled)(moved, labels, enqueue_mask=mask)  # noqa: E731
    assert torch.autograd.gradcheck(step, (rows.double().requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_rows_are_recognised_as_themselves(dtype):
    for memory_type in (torch.float32, dtype):
        memory = CrossBatchMemory(SoftContrastiveLoss(), DIM, 64, dtype=memory_type)
        (rows, labels), *_ = batches(1, 16, seed=5)
        narrow = rows.to(dtype)
        compared = torch.nn.functional.normalize(narrow.float(), dim=1).to(memory_type)
        want = PlainQueue(64).loss(compared.double().numpy(), labels.numpy())
        assert memory(narrow, labels).item() == pytest.approx(want.loss, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [8, 130, 512])
def test_singletons_in_batch_and_memory_are_no_positives_of_themselves(dtype, dim):
    rows, labels = torch.randn(64, dim, generator=torch.Generator().manual_seed(1)), torch.arange(64)
    memory = CrossBatchMemory(SoftContrastiveLoss(), dim, 128, dtype=dtype)
    memory(rows.to(dtype), labels)
    assert memory.loss.statistics["positives"] == memory.loss.statistics["active"] == 0
    # No positive was seen, whether mined or not.
    assert math.isnan(memory.loss.statistics["mean_pos"])


class Coarse(CrossBatchMemory):
    """Queues rows in bfloat16, so that they are no exact duplicates of the batch."""

    def _enqueue(self, places, rows, labels):
        super()._enqueue(places, rows.bfloat16().to(rows.dtype), labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_that_changed_on_the_way_into_the_queue_are_known_by_their_place(dtype):
    memory = Coarse(SoftContrastiveLoss(check=False), 64, 40, dtype=dtype)
    for step in range(4):  # The third batch wraps around the queue's end.
        rows = torch.randn(16, 64, generator=torch.Generator().manual_seed(step)).to(dtype)
        memory(rows, torch.arange(16 * step, 16 * step + 16))
        # Every row is alone in its class: its only possible positive is itself.
        assert math.isnan(memory.loss.statistics["mean_pos"])
    # By value such rows are not recognised.
    memory.loss(rows, torch.arange(16), ref_emb=rows.bfloat16().to(dtype), ref_labels=torch.arange(16))
    assert not math.isnan(memory.loss.statistics["mean_pos"])


def test_a_memory_of_integers_is_refused():
    with pytest.raises(ValueError, match="the memory must be float32, float16, bfloat16 or float64, not torch.int32"):
        CrossBatchMemory(SoftContrastiveLoss(), DIM, 8, dtype=torch.int32)
    with pytest.raises(ValueError, match="not torch.float8_e4m3fn"):
        CrossBatchMemory(SoftContrastiveLoss(), DIM, 20).to(torch.float8_e4m3fn)(*next(batches(1, 16)))


def test_a_memory_takes_the_loss_that_knows_it():
    with pytest.raises(TypeError, match="takes a ddtas.torch.SoftContrastiveLoss, not CrossEntropyLoss"):
        CrossBatchMemory(torch.nn.CrossEntropyLoss(), DIM)

    class Doubled(SoftContrastiveLoss):
        def forward(self, *given):
            return 2 * super().forward(*given)

    with pytest.raises(TypeError, match="does not call Doubled.forward"):
        CrossBatchMemory(Doubled(), DIM)


def test_a_mask_that_leaves_nothing_to_compare_gives_zero_and_a_gradient():
    memory = CrossBatchMemory(SoftContrastiveLoss(), DIM, 40)
    (rows, labels), (more, more_labels), *_ = batches(2, 16, seed=8)
    rows.requires_grad_()
    none, every = torch.zeros(16, dtype=torch.bool), torch.ones(16, dtype=torch.bool)
    for mask, queued in [(none, 0), (every, 16)]:
        rows.grad = None
        value = memory(rows, labels, enqueue_mask=mask)
        assert value == 0 and memory.queue_idx == queued
        value.backward()
        assert not rows.grad.any()
    empty = memory(rows[:0], labels[:0])
    empty.backward()
    assert empty == 0 and memory.queue_idx == 16
    # The next batch is compared with rows that were only queued.
    assert memory(more, more_labels, enqueue_mask=none) > 0


def test_losses_of_several_batches_go_back_together():
    memory, again = (CrossBatchMemory(SoftContrastiveLoss(), DIM, 24) for _ in range(2))
    given = [(rows.requires_grad_(), labels) for rows, labels in batches(4, 16, seed=9)]
    sum(memory(rows, labels) for rows, labels in given).backward()
    for rows, labels in given:
        (want,) = torch.autograd.grad(again(rows, labels), rows)
        assert torch.equal(rows.grad, want)


def failing(memory):
    """The same memory with a loss that fails after the batch was queued."""

    def fail(*_, **others):
        raise RuntimeError("while it computes")

    broken = copy.copy(memory)
    broken.__dict__["_modules"] = {"loss": copy.copy(memory.loss)}
    broken.loss.loss_of_unit_rows = fail
    return lambda *given: broken(*given)


def test_a_bad_batch_is_refused_and_not_queued():
    memory = CrossBatchMemory(SoftContrastiveLoss(), DIM, 20)
    given = list(batches(2, 16, seed=6))
    memory(*given[0])
    before = memory.embedding_memory.clone()
    rows, labels = given[1]
    bad = rows.clone()
    bad[7] = torch.nan
    for call, message in [
        (lambda: memory(bad, labels), "row 7 of the embeddings is not finite"),
        (lambda: memory(0 * rows, labels), "row 0 of the embeddings is all zeros"),
        (lambda: memory(torch.cat([rows, rows]), torch.cat([labels, labels])), "32 rows do not fit a memory of 20"),
        (lambda: memory(rows[:, :3], labels), r"embeddings must be \[B, 8\]"),
        (lambda: memory(rows, labels[:3]), r"labels must be \[16\]"),
        (lambda: memory(rows, labels, (labels,) * 4), "take the miner out"),
        (lambda: CrossBatchMemory(SoftContrastiveLoss(), DIM, 0), "at least 1"),
        (lambda: memory(rows, labels.float()), "the labels must be integers, not float32: convert"),
        (lambda: memory(rows, labels > 1), "the labels must be integers, not bool: convert"),
        (lambda: memory(rows, labels, enqueue_mask=torch.arange(16) % 2), "booleans, not torch.int64"),
        (lambda: memory(rows, labels, enqueue_mask=[True] * 16), "booleans, not list"),
        (lambda: memory(rows, labels, enqueue_mask=torch.ones(15, dtype=torch.bool)), r"enqueue_mask must be \[16\]"),
        (lambda: failing(memory)(rows, labels), "while it computes"),
        (lambda: CrossBatchMemory(SoftContrastiveLoss(check="wait"), DIM)(bad, labels), "row 7 of the embeddings is not finite"),
    ]:
        with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
            call()
    roomy = CrossBatchMemory(SoftContrastiveLoss(), DIM, 40)
    roomy(*given[0])
    state = copy.deepcopy(roomy.state_dict())
    with pytest.raises(RuntimeError, match="while it computes"):
        failing(roomy)(rows, labels)
    assert all(torch.equal(value, state[name]) for name, value in roomy.state_dict().items())
    assert torch.equal(memory.embedding_memory, before) and memory.queue_idx == 16
    assert memory.label_memory.tolist() == [*given[0][1].tolist(), -1, -1, -1, -1] and not memory.has_been_filled
    memory(rows, labels)


def test_a_row_that_nobody_raises_for_is_an_ignored_one_in_the_queue():
    memory, plain = (CrossBatchMemory(SoftContrastiveLoss(check=check), DIM, 48) for check in (False, True))
    given = list(batches(3, 16, seed=7))
    for step, (rows, labels) in enumerate(given):
        spoilt, known = rows.clone(), labels.clone()
        if step == 1:
            spoilt[3, 2], spoilt[9, 0], known[3], known[9] = torch.nan, torch.inf, -1, -1
        spoilt.requires_grad_()
        loss, wanted = memory(spoilt, labels), plain(rows, known)
        loss.backward()
        assert bool(spoilt.grad[9].isnan().any()) == (step == 1), "as a gradient scaler expects"
        assert loss == wanted
    assert memory.embedding_memory.isfinite().all()
    assert memory.label_memory.clamp_min(-1).tolist() == plain.label_memory.tolist()
    # A memory that checks its rows takes up the queue.
    plain.load_state_dict(memory.state_dict())


def test_labels_of_every_width_are_queued_beside_a_row_that_is_not_finite():
    (rows, labels), *_ = batches(1, 16, seed=7)
    rows[3], labels = torch.nan, labels.abs()
    found = []
    for dtype in (torch.int64, torch.int32, torch.uint8):
        memory = CrossBatchMemory(SoftContrastiveLoss(check=False), DIM, 20)
        memory(rows, labels.to(dtype))
        found.append((memory.label_memory.tolist(), memory.statistics["not_finite"]))
    assert found[0] == found[1] == found[2] and found[0][1] == 1


def test_rows_that_are_not_finite_are_counted_and_warned_of_as_what_they_are():
    memory = CrossBatchMemory(SoftContrastiveLoss(check=False), DIM, 48)
    rows, labels = next(batches(1, 16, seed=7))
    rows[3], rows[5], labels = torch.nan, torch.inf, labels.abs()
    with pytest.warns(UserWarning) as warned:
        for _ in range(2):
            memory(rows, labels)
    (only,) = [str(warning.message) for warning in warned]
    text = "rows that are not finite: 2; the memory leaves them out of every pair and queues an ignored row in the place of each"
    assert only == text
    assert memory.loss.statistics["ignored"] == 0 and memory.loss.statistics["not_finite"] == 2
    labels[3] = labels[4] = -1
    with pytest.warns(UserWarning, match="^rows with a negative label: 1; they take part in no pair$"):
        memory(rows, labels)
    assert memory.loss.statistics["ignored"] == 1 and memory.loss.statistics["not_finite"] == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrow_memory_does_not_round_the_gradient(dtype):
    rows, labels = unit_rows(64, DIM, seed=3, classes=8, noise=1.5)

    def gradient(scale, memory_type):
        leaf = torch.tensor(rows, dtype=torch.float32, requires_grad=True)
        memory = CrossBatchMemory(SoftContrastiveLoss(mining="none"), DIM, 64, dtype=memory_type)
        (memory(leaf, torch.tensor(labels)) * scale).backward()
        return leaf.grad / scale

    plain = gradient(1, dtype)
    assert plain.norm() > 0
    for scale in (1e-8, 2.0**40):
        assert (gradient(scale, dtype) - plain).norm() < 1e-6 * plain.norm()
    difference = (plain - gradient(1, torch.float32)).norm() / plain.norm()
    assert difference < 20 * torch.finfo(dtype).eps, "only the rows are rounded"


def test_a_call_that_raises_does_not_count_before_the_start():
    memory = CrossBatchMemory(SoftContrastiveLoss(), DIM, 40, start_after=1)
    rows, labels = next(batches(1, 16, seed=8))
    with pytest.raises(ValueError, match="row 0 of the anchors"):
        memory(rows * torch.nan, labels)
    assert not memory.started
    with pytest.raises(TypeError, match="booleans"):
        memory(rows, labels, enqueue_mask=torch.arange(16))
    mask = torch.arange(16) < 4
    assert memory(rows, labels, enqueue_mask=mask) == memory.loss(rows[~mask], labels[~mask]) and memory.filled == 0
    assert memory.started


def test_a_memory_starts_later_and_can_be_filled_first():
    memory = CrossBatchMemory(SoftContrastiveLoss(), DIM, 40, start_after=2)
    given = list(batches(5, 16, seed=11))
    for rows, labels in given[:2]:
        assert not memory.started
        assert memory(rows, labels) == memory.loss(rows, labels) and memory.filled == 0
    assert memory.started
    filled = CrossBatchMemory(SoftContrastiveLoss(), DIM, 40)
    for rows, labels in given[2:4]:
        memory(rows, labels)
        assert filled.fill(rows, labels) is None
    assert memory.filled == filled.filled == 32 and not filled.has_been_filled
    assert memory(*given[4]) == filled(*given[4]) > 0
    assert filled.filled == 40 and filled.has_been_filled
    resumed = CrossBatchMemory(SoftContrastiveLoss(), DIM, 40, start_after=2)
    resumed.load_state_dict(memory.state_dict())
    assert resumed.started and resumed(*given[0]) == memory(*given[0])
    bad = given[0][0] * torch.nan
    with pytest.raises(ValueError, match="row 0 of the embeddings"):
        filled.fill(bad, given[0][1])
    with pytest.raises(ValueError, match="start_after = -1 must be at least 0"):
        CrossBatchMemory(SoftContrastiveLoss(), DIM, 40, start_after=-1)


def test_a_state_dict_of_the_first_version_is_taken_up():
    memory = CrossBatchMemory(SoftContrastiveLoss(), DIM, 40)
    given = list(batches(2, 16, seed=12))
    memory(*given[0])
    old = dict(memory.state_dict())
    # The old format kept zeros or old rows behind the rows of a queue that is not full.
    old["embedding_memory"] = torch.cat([old["embedding_memory"][:16], torch.zeros(24, DIM)])
    old["label_memory"] = torch.cat([old["label_memory"][:16], torch.arange(24) % 5])
    old["_extra_state"] = {"queue_idx": 16, "has_been_filled": 0}
    again = CrossBatchMemory(SoftContrastiveLoss(), DIM, 40)
    again.load_state_dict(old)
    assert again.filled == 16 and again(*given[1]) == memory(*given[1])
    # It has no number of calls: the memory's own stays.
    later = CrossBatchMemory(SoftContrastiveLoss(), DIM, 40, start_after=2)
    later.start()
    later.load_state_dict(old)
    assert later.started


def test_the_start_can_be_moved_and_old_pickles_have_one():
    memory = CrossBatchMemory(SoftContrastiveLoss(), DIM, 40, start_after=100)
    rows, labels = next(batches(1, 16, seed=8))
    memory(rows, labels)
    memory.start_after = 0
    memory(rows, labels)
    assert memory.started and memory.filled == 16
    memory.start_after = 3
    assert not memory.started
    started = copy.deepcopy(memory)
    started.start()
    assert started.started
    del memory.__dict__["started"]
    assert not pickle.loads(pickle.dumps(memory)).started


def test_a_memory_made_on_the_meta_device_is_empty_or_loaded():
    rows, labels = next(batches(1, 16, seed=3))
    want = CrossBatchMemory(SoftContrastiveLoss(lambda_pos=torch.tensor(0.6)), DIM, 40)
    first = want(rows, labels)
    state = want.state_dict()

    def on_meta():
        with torch.device("meta"):
            return CrossBatchMemory(SoftContrastiveLoss(lambda_pos=torch.tensor(0.2)), DIM, 40)

    assert on_meta().state_dict().keys() == state.keys() and "nan" in repr(on_meta())
    empty, loaded = on_meta().to_empty(device="cpu"), on_meta()
    empty.loss.lambda_pos = 0.6
    assert empty.filled == 0 and empty(rows, labels) == first and empty.filled == 16
    loaded.load_state_dict(state, assign=True)
    assert loaded.filled == 16 and loaded(rows, labels) == want(rows, labels)
    empty.queue_idx.fill_(10**12)
    with pytest.raises(RuntimeError, match="call reset_queue"):
        empty(rows, labels)
    empty.reset_parameters()
    assert empty(rows, labels) == first


def test_what_the_other_library_s_arguments_are_replaced_by_is_said():
    for argument, instead in [
        ("reducer", "the loss is the mean over the anchors"),
        ("distance", "cosine"),
        ("miner", "take the miner out"),
        ("margin", "lambda_pos and lambda_neg"),
        ("weight_regularizer", "no weights"),
        ("temperature", "sharpness"),
        ("other", "no argument other$"),
    ]:
        for make in (lambda **others: CrossBatchMemory(SoftContrastiveLoss(), DIM, **others), SoftContrastiveLoss):
            with pytest.raises(TypeError, match=f"has no argument {argument}.*" if argument != "other" else "other$") as told:
                make(**{argument: None})
            assert argument == "other" or instead in str(told.value)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_call_that_a_backward_pass_repeats_is_refused(use_reentrant):
    embeddings, labels = next(batches(1, 20))
    memory = CrossBatchMemory(SoftContrastiveLoss(), DIM, 100)
    checkpoint = torch.utils.checkpoint.checkpoint
    loss = checkpoint(lambda rows: memory(rows, labels), embeddings.requires_grad_(), use_reentrant=use_reentrant)
    refused = "was called in a backward pass, as activation checkpointing does"
    with pytest.raises(RuntimeError, match=refused):
        loss.backward()
    assert memory.filled == 20, "it would be queued twice, and differentiated against the second time"
    later = CrossBatchMemory(SoftContrastiveLoss(), DIM, 100, start_after=3)

    def fill(rows):
        memory.fill(rows, labels)
        return rows.square().sum()

    for work in (lambda rows: later(rows, labels), fill):
        loss = checkpoint(work, embeddings, use_reentrant=use_reentrant)
        with pytest.raises(RuntimeError, match=refused):
            loss.backward()
    assert memory.filled == 40 and later.calls == 1


def test_tensors_put_in_the_place_of_the_index_keep_its_value():
    embeddings, labels = next(batches(1, 20))
    memory = CrossBatchMemory(SoftContrastiveLoss(), DIM, 100)
    memory(embeddings, labels)
    with torch.device("meta"):
        again = CrossBatchMemory(SoftContrastiveLoss(), DIM, 100)
    # The order in which transformers fills a module: the state first, last what is in no state_dict, by any values.
    again.set_extra_state(memory.get_extra_state())
    again.embedding_memory, again.label_memory = memory.embedding_memory.clone(), memory.label_memory.clone()
    again.queue_idx, again._count = torch.tensor(7), torch.tensor(9)
    assert again.filled == 20 and again(embeddings, labels) == memory(embeddings, labels)


def test_a_memory_that_was_loaded_on_the_meta_device_alone_is_empty():
    memory = CrossBatchMemory(SoftContrastiveLoss(), DIM, 100)
    memory(*next(batches(1, 20)))
    state = memory.state_dict()
    for assign, left_out in [(False, ""), (True, "embedding_memory")]:
        with torch.device("meta"):
            empty = CrossBatchMemory(SoftContrastiveLoss(), DIM, 100)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's, of values that go nowhere
            empty.load_state_dict({name: value for name, value in state.items() if name != left_out}, strict=False, assign=assign)
        assert empty.to_empty(device="cpu").filled == 0 and bool((empty.label_memory == -1).all())
