"""What test_emulated.py and test_gpu.py ask of both devices."""

from __future__ import annotations

import copy
from typing import Callable

import numpy as np
import pytest
import torch
from formula import close, unit_rows
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.functional import normalize

from ddtas.torch import CrossBatchMemory, SoftContrastiveLoss, evaluate, recall_at_k

DIM = 40


def batch(count: int, seed: int) -> tuple[Tensor, Tensor]:
    rows, labels = unit_rows(count, DIM, seed, classes=12)
    return torch.tensor(3 * rows, dtype=torch.float32), torch.tensor(labels)


def searches(move: Callable[[Tensor], Tensor] = lambda given: given):
    """Every form of `evaluate`, and `recall_at_k`, of tensors that `move` has sent to a device."""
    (rows, labels), (others, other_labels) = (map(move, batch(*given)) for given in ((90, 1), (130, 2)))
    mixed, mixed_labels = torch.cat([rows, others]), torch.cat([labels, other_labels])
    some = move(torch.where(torch.arange(90) % 3 == 0, -1, torch.arange(90)))
    evaluations = [
        evaluate(rows, labels, nmi=True),
        evaluate(rows, labels, others, other_labels, ks=[1, 5]),
        evaluate(rows, labels, mixed, mixed_labels, identity=0),
        evaluate(rows, labels, mixed, mixed_labels, identity=some),
    ]
    return evaluations, recall_at_k(rows, labels)


def same_searches(found, wanted) -> None:
    for got, want in zip(found[0], wanted[0], strict=True):
        assert (got.recall.queries, got.recall.without_match) == (want.recall.queries, want.recall.without_match)
        assert got.recall == pytest.approx(want.recall, abs=1e-6) and got.nmi == pytest.approx(want.nmi, abs=1e-6)
        figures = [(given.r_precision, given.map_at_r) for given in (got, want)]
        assert figures[0] == pytest.approx(figures[1], abs=1e-6) and 0.05 < want.map_at_r < 0.95
        assert list(got.per_class.recall) == list(want.per_class.recall)
        for mine, its in zip(got.per_class._arrays(), want.per_class._arrays(), strict=True):
            np.testing.assert_allclose(mine, its, atol=1e-6)
    assert found[1] == pytest.approx(wanted[1], abs=1e-6) and 0 < wanted[1][1] < 1


def compiled_steps_are_those_of_eager(**options) -> None:
    """Normalisation, a loss with a learned threshold, alone and with a memory, and the backward pass, in one graph."""
    torch._dynamo.reset()
    counters.clear()
    loss = SoftContrastiveLoss(lambda_pos=torch.nn.Parameter(torch.tensor([0.6])), lambda_neg=0.65)
    for module in (loss, CrossBatchMemory(loss, DIM, 100)):
        eager, again = copy.deepcopy(module), copy.deepcopy(module)
        compiled = torch.compile(lambda rows, labels: 2 * again(normalize(rows, dim=1), labels), fullgraph=True, dynamic=False, **options)
        for seed in range(5):
            rows, labels = batch(40, seed)
            torch.compiler.cudagraph_mark_step_begin()
            wanted = 2 * eager(normalize(rows.requires_grad_(), dim=1), labels)
            wanted.backward()
            others = rows.detach().clone().requires_grad_()
            value = compiled(others, labels)
            value.backward()
            assert value.item() == pytest.approx(wanted.item(), rel=1e-5) and wanted > 0
            close(others.grad.cpu(), rows.grad.cpu(), 2e-5)
            thresholds = [getattr(side, "loss", side).lambda_pos for side in (again, eager)]
            close(thresholds[0].grad.cpu(), thresholds[1].grad.cpu(), 1e-4)
            assert thresholds[1].grad
            for threshold in thresholds:
                threshold.grad = None
            assert again.statistics == pytest.approx(eager.statistics, rel=1e-4, abs=1e-6)
            assert again.statistics["active"] > 0
        if module is not loss:
            close(again.embedding_memory.cpu(), eager.embedding_memory.cpu(), 1e-5)
            assert torch.equal(again.label_memory, eager.label_memory) and again.filled == 100
    assert counters["stats"]["unique_graphs"] == 2
