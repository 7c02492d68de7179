"""`ddtas.torch.CrossBatchMemory` against a queue written out in NumPy."""

import copy

import formula
import numpy as np
import pytest
from formula import close, unit_rows

torch = pytest.importorskip("torch", reason="torch is not installed: its tests do not run")

from ddtas.torch import CrossBatchMemory, SoftContrastiveLoss  # noqa: E402

DIM = 8


class PlainQueue:
    """First in, first out; keeps every row it ever got and looks at the last `size`."""

    def __init__(self, size):
        self.size, self.rows, self.labels = size, np.zeros((0, DIM)), np.zeros(0, int)

    def loss(self, rows, labels, enqueue=None):
        """Queues, and compares: a row is no pair of itself, known by its place in the queue."""
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


@pytest.mark.parametrize("memory_size", [16, 50, 64, 1000])
def test_losses_are_those_of_a_plain_queue(memory_size):
    memory, plain = CrossBatchMemory(SoftContrastiveLoss(), DIM, memory_size), PlainQueue(memory_size)
    for rows, labels in batches(9, 16):
        rows.requires_grad_()
        loss = memory(rows, labels)
        want = plain.loss(unit(rows), labels.numpy())
        assert loss.item() == pytest.approx(want.loss, rel=1e-5, abs=1e-7)
        assert memory.loss.statistics["active"] == ((want.count_pos > 0) & (want.count_neg > 0)).sum()
        loss.backward()
        # Back through the normalisation, by hand.
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
    memory(*given[0])
    assert memory.queue_idx == 16 and not memory.has_been_filled


def test_gradients_pass_gradcheck_in_float64():
    filled = CrossBatchMemory(SoftContrastiveLoss(), DIM, 30, dtype=torch.float64)
    for rows, labels in batches(2, 12, seed=3):
        filled(rows, labels)
    (rows, labels), *_ = batches(1, 8, seed=4)
    # The batch's own rows in the queue are constants, so a difference would move them: they are left out.
    mask = torch.zeros(8, dtype=torch.bool)
    step = lambda moved: copy.deepcopy(filled)(moved, labels, enqueue_mask=mask)  # noqa: E731
    assert torch.autograd.gradcheck(step, (rows.double().requires_grad_(),))


def test_bfloat16_rows_are_recognised_as_themselves():
    memory = CrossBatchMemory(SoftContrastiveLoss(), DIM, 64)
    (rows, labels), *_ = batches(1, 16, seed=5)
    narrow = rows.bfloat16()
    want = PlainQueue(64).loss(unit(narrow.float()), labels.numpy())
    assert memory(narrow, labels).item() == pytest.approx(want.loss, rel=1e-5)
    with pytest.raises(ValueError, match="the memory must be float32 or float64, not torch.bfloat16"):
        memory.bfloat16()(narrow, labels)


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
        (lambda: memory(0 * rows, labels), "row 0 of the embeddings .* has no unit length"),
        (lambda: memory(torch.cat([rows, rows]), torch.cat([labels, labels])), "32 rows do not fit a memory of 20"),
        (lambda: memory(rows[:, :3], labels), r"embeddings must be \[B, 8\]"),
        (lambda: memory(rows, labels[:3]), r"labels must be \[16\]"),
        (lambda: memory(rows, labels, (labels,) * 4), "take the miner out"),
        (lambda: CrossBatchMemory(SoftContrastiveLoss(), DIM, 0), "at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert torch.equal(memory.embedding_memory, before) and memory.queue_idx == 16
    memory(rows, labels)
