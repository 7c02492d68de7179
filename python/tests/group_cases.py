"""Cases for a loss with a process group, run in each of four processes by many_group.py, one process per rank.

    python group_cases.py RANK FILE REPORT

Every case runs in the groups of the first 1, 2, 3 and 4 processes. Its failures are written to REPORT.
"""

import copy
import datetime
import json
import pickle
import sys
import traceback
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from ddtas.torch import CrossBatchMemory, SoftContrastiveLoss, ThresholdGenerator
from ddtas.torch.steps import CpuSteps, GpuSteps
from emulated import emulated_gpu, patched
from formula import unit_rows
from test_memory import Coarse
from torch.nn.parallel import DistributedDataParallel

SIZE, DIM = 4, 12
STATISTICS = ("active", "positives", "negatives", "ignored", "not_finite", "gamma_pos", "gamma_neg", "mean_pos", "mean_neg", "spread")


def batch(count, seed=0, dtype=torch.float32):
    rows, labels = unit_rows(count, DIM, seed)
    return torch.tensor(3 * rows, dtype=dtype), torch.tensor(labels)


class World:
    """A process group, and this process's rank in it."""

    def __init__(self, group, size, rank):
        self.group, self.size, self.rank = group, size, rank

    def own(self, counts):
        first = sum(counts[: self.rank])
        return slice(first, first + counts[self.rank])

    def even(self, count=15):
        return [count] * self.size

    def uneven(self):
        return [7, 0, 19, 24][-self.size :]

    def total(self, tensor):
        """The sum over the processes."""
        whole = tensor.detach().clone().double()
        dist.all_reduce(whole, group=self.group)
        return whole

    def same(self, tensor):
        """Whether all processes have the same bits."""
        everyone = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(everyone, tensor.detach(), group=self.group)
        return all(torch.equal(one, tensor) for one in everyone)


@contextmanager
def raises(kind, text):
    try:
        yield
    except kind as error:
        assert text in str(error), f"{error!r} does not say {text!r}"
    else:
        raise AssertionError(f"no {kind.__name__}: {text}")


def close(got, want, factor=1e-6):
    got, want = torch.as_tensor(got).double(), torch.as_tensor(want).double()
    assert (got - want).abs().max() <= factor * want.abs().max(), f"got {got}, want {want}"


def compare(world, counts, dtype=torch.float32, seed=0, labels=None, mined=True, **settings):
    """Compares loss, statistics and the own rows' gradient with one process; returns the loss module."""
    rows, drawn = batch(sum(counts), seed, dtype)
    labels, own = drawn if labels is None else labels, world.own(counts)
    whole, one = rows.clone().requires_grad_(), SoftContrastiveLoss(**settings)
    want = one(whole, labels)
    want.backward()
    assert (want > 0 and whole.grad.any()) == mined
    for gradient, scale in (("sum", 1), ("mean", world.size)):
        loss = SoftContrastiveLoss(group=world.group, uneven=len(set(counts)) > 1, gradient=gradient, **settings)
        mine = rows[own].clone().requires_grad_()
        value = loss(mine, labels[own])
        value.backward()
        assert value.dtype == torch.float32 and world.same(value)
        close(value, want.detach())
        # In half precision the gradient is scaled before it is rounded.
        if scale == 1 or dtype == torch.float32:
            assert torch.equal(mine.grad, whole.grad[own] * scale), (mine.grad, whole.grad[own] * scale)
        elif mine.numel():
            close(mine.grad, whole.grad[own] * scale, 1e-2)
        for name in STATISTICS:
            got, expected = loss.statistics[name], one.statistics[name]
            assert got == expected or abs(got - expected) <= 1e-6 or got != got and expected != expected, (name, got, expected)
    return loss


def rows_have_the_bits_of_one_process(world):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        compare(world, world.even(), dtype)
    compare(world, world.even(40), seed=2, mining="asms", gamma=0.2, threads=2, workspace_budget=0)
    # Some anchors mine negatives alone.
    compare(world, world.even(40), seed=2, mining="asms", negative_ratio=4.0)


def batches_may_be_uneven(world):
    compare(world, world.uneven())
    compare(world, world.uneven()[::-1], torch.bfloat16, seed=1)
    compare(world, [0] * (world.size - 1) + [30], seed=2)
    nothing = SoftContrastiveLoss(group=world.group)
    rows = torch.empty(0, DIM, requires_grad=True)
    value = nothing(rows, torch.empty(0, dtype=torch.int64))
    value.backward()
    assert value == 0 and rows.grad.shape == (0, DIM)


def a_rank_may_mine_nothing(world):
    counts = world.even(20)
    labels = batch(sum(counts))[1]
    labels[world.size * 20 - 20 :] = -1
    compare(world, counts, labels=labels, mined=world.size > 1)
    compare(world, counts, labels=torch.zeros_like(labels), mined=False)
    compare(world, counts, labels=torch.arange(len(labels)), mined=False)


def a_group_may_be_some_processes_of_the_world(world):
    if world.size < SIZE:
        return
    group = dist.new_group([1, 3])
    if world.rank in (1, 3):
        pair, counts = World(group, 2, world.rank // 2), [9, 14]
        compare(pair, counts)
        generator = ThresholdGenerator(SoftContrastiveLoss(group=group, uneven=True), torch.nn.Linear(DIM, 5))
        rows, labels = (side[pair.own(counts)] for side in batch(23))
        generator.step(rows, labels, (rows, labels))
        assert generator.hypergradient and pair.same(generator.loss.lambda_pos)


def thresholds_get_their_derivative(world):
    counts = world.even()
    rows, labels = batch(sum(counts))
    own = world.own(counts)
    found = {}
    for group, gradient in ((False, "mean"), (world.group, "mean"), (world.group, "sum")):
        pos, neg = (torch.nn.Parameter(torch.tensor([start])) for start in (0.6, 0.65))
        loss = SoftContrastiveLoss(lambda_pos=pos, lambda_neg=neg, group=group, gradient=gradient)
        loss(rows[own] if group else rows, labels[own] if group else labels).backward()
        found[bool(group), gradient] = torch.cat([pos.grad, neg.grad])
    want = found[False, "mean"]
    assert want.all()
    close(found[True, "mean"], want)
    close(world.total(found[True, "sum"]), want)


def one_process_s_error_is_everybody_s(world):
    if world.size == 1:
        return
    rows, labels = batch(8, seed=world.rank)
    loss, bad, last = SoftContrastiveLoss(group=world.group), rows.clone(), world.rank == world.size - 1
    bad[3, 2] = torch.nan
    name = f"rank {world.size - 1}"
    with raises(ValueError, f"{name}: row 3 of the anchors holds a value that is not finite"):
        loss(bad if last else rows, labels)
    with raises(ValueError, f"{name}: row 5 of the anchors is all zeros"):
        loss(rows * (torch.arange(8) != 5)[:, None] if last else rows, labels)
    with raises(TypeError, f"{name}: the labels must be integers"):
        loss(rows, labels.float() if last else labels)
    with raises(ValueError, f"{name}: indices_tuple must be None"):
        loss(rows, labels, (labels,) * 4 if last else None)
    with raises(ValueError, f"{name} has 5 rows, and rank 0 8: say uneven=True"):
        loss(rows[:5] if last else rows, labels[:5] if last else labels)
    with raises(ValueError, f"{name} has rows of 6"):
        loss(rows[:, :6] if last else rows, labels)
    with raises(TypeError, "rank 0: with a process group the anchors must be float32"):
        loss(rows.double(), labels)
    # Like CPU rows in a group over NCCL: gloo carries no tensors on torch's device meta.
    memory = CrossBatchMemory(copy.deepcopy(loss), DIM, 70)
    for module in (loss, memory):
        with raises(ValueError, f"{name}: the rows are on meta, and the group carries those of cpu"):
            module(rows.to("meta") if last else rows, labels)
    other = SoftContrastiveLoss(gamma=0.2, group=world.group)
    with raises(ValueError, f"{name} has gamma=0.2, and rank 0 gamma=0.1: they must be the same"):
        (other if last else loss)(rows, labels)
    other = SoftContrastiveLoss(gradient="sum", group=world.group)
    with raises(ValueError, f"{name} has sum, and rank 0 mean: they must be the same"):
        (other if last else loss)(rows, labels)
    with raises(ValueError, f"{name} has rows of 12 torch.bfloat16"):
        loss(rows.bfloat16() if last else rows, labels)
    with raises(ValueError, "against 8 references, and rank 0"):
        loss(rows, labels, **({"ref_emb": rows + 1, "ref_labels": labels} if last else {}))
    with raises(ValueError, f"{name}: a long story, a long story"):
        loss.ranks.fail(ValueError("a long story, " * 100)) if last else loss(rows, labels)
    with raises(ValueError, "rank 0: references must not require a gradient"):
        loss(rows, labels, ref_emb=rows.clone().requires_grad_(), ref_labels=labels)
    # After the errors all ranks are in step.
    assert world.same(loss(rows, labels))


def unchecked_rows_raise_nowhere(world):
    rows, labels = batch(8, seed=world.rank)
    rows[3, 2] = torch.nan
    for device in (nullcontext(), emulated_gpu(0), emulated_gpu(2**62)):
        with device:
            loss = SoftContrastiveLoss(group=world.group, check=False)
            loss(rows, labels)
            loss.check()


def failing(world, right):
    """A step that fails in rank 1."""

    def step(*given):
        if world.rank == 1:
            raise MemoryError("no more")
        return right(*given)

    return step


def an_error_between_the_steps_is_everybody_s(world):
    if world.size == 1:
        return
    loss = SoftContrastiveLoss(group=world.group)
    with patched(CpuSteps, select=failing(world, CpuSteps.select)), raises(RuntimeError, "rank 1 failed"):
        loss(*batch(8, seed=world.rank))
    assert world.same(loss(*batch(8, seed=world.rank)))


def a_threshold_out_of_range_in_one_process_is_everybody_s_error(world):
    if world.size == 1:
        return
    loss = SoftContrastiveLoss(lambda_pos=torch.tensor(0.7), group=world.group)
    if world.rank == 1:
        loss.lambda_pos.fill_(torch.nan)
    with raises(ValueError, "rank 1: lambda_pos = NaN"):
        loss(*batch(8, seed=world.rank))
    loss = SoftContrastiveLoss(group=world.group, normalize_embeddings=world.rank != 1, check=False)
    with raises(ValueError, "of unit length"):
        loss(*batch(8, seed=world.rank))


def references_are_the_same_everywhere(world):
    counts = world.uneven()
    (rows, labels), (others, other_labels), own = batch(sum(counts)), batch(33, seed=1), world.own(counts)
    whole, mine = rows.clone().requires_grad_(), rows[own].clone().requires_grad_()
    want = SoftContrastiveLoss(normalize_embeddings=False)(
        torch.nn.functional.normalize(whole, dim=1), labels, ref_emb=others / 3, ref_labels=other_labels
    )
    loss = SoftContrastiveLoss(normalize_embeddings=False, group=world.group, uneven=True, gradient="sum")
    value = loss(torch.nn.functional.normalize(mine, dim=1), labels[own], ref_emb=others / 3, ref_labels=other_labels)
    want.backward(), value.backward()
    close(value.detach(), want.detach())
    assert want > 0 and torch.equal(mine.grad, whole.grad[own])
    # References of any length are normalised as the rows are, and checked.
    loss = SoftContrastiveLoss(group=world.group, uneven=True)
    close(loss(rows[own], labels[own], ref_emb=others, ref_labels=other_labels), want.detach())
    if world.size > 1:
        last = world.rank == world.size - 1
        for changed in ((others.flip(0), other_labels), (others.flip(1), other_labels), (others, other_labels.flip(0))):
            with raises(ValueError, f"rank {world.size - 1} has other references than rank 0"):
                given = changed if last else (others, other_labels)
                loss(rows[own], labels[own], ref_emb=given[0], ref_labels=given[1])
    others[4, 1] = torch.nan
    with raises(ValueError, "row 4 of the references holds a value that is not finite"):
        loss(rows[own], labels[own], ref_emb=others, ref_labels=other_labels)


def own_references_are_gathered_and_get_their_gradient(world):
    for counts, other_counts, dtype, normalize in (
        (world.even(), world.even(11), torch.float32, True), (world.uneven(), world.uneven()[::-1], torch.bfloat16, True),
        (world.even(), world.even(0), torch.float32, True), (world.even(4), world.even(40), torch.float16, True),
        ([0] * (world.size - 1) + [20], [25] + [0] * (world.size - 1), torch.float32, False),
    ):  # fmt: skip
        (rows, labels), (others, other_labels) = batch(sum(counts), dtype=dtype), batch(sum(other_counts), seed=1, dtype=dtype)
        if not normalize:
            rows, others = rows / rows.norm(dim=1, keepdim=True), others / others.norm(dim=1, keepdim=True)
        own, own_others = world.own(counts), world.own(other_counts)

        def found(group, gradient="sum"):
            loss = SoftContrastiveLoss(
                group=group, uneven=True, gradient=gradient, gather_references=True, normalize_embeddings=normalize
            )
            given = [rows, labels, others, other_labels]
            if group:
                given = [rows[own], labels[own], others[own_others], other_labels[own_others]]
            given[0], given[2] = (side.clone().requires_grad_() for side in given[::2])
            value = loss(given[0], given[1], ref_emb=given[2], ref_labels=given[3])
            value.backward()
            constant = loss(given[0], given[1], ref_emb=given[2].detach(), ref_labels=given[3])
            assert constant == value
            return value.detach(), given[0].grad, given[2].grad

        want, of_rows, of_others = found(False)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        for device, gradient in (
            (nullcontext(), "sum"), (nullcontext(), "mean"), (emulated_gpu(0), "sum"), (emulated_gpu(2**62), "mean")
        ):  # fmt: skip
            on_cpu, scale = isinstance(device, nullcontext), world.size if gradient == "mean" else 1
            if world.size == 1 and not on_cpu:
                continue
            with device:
                got, *of_own = found(world.group, gradient)
            close(got, want, 1e-6 if on_cpu else 1e-5)
            assert bool(want > 0) == (len(others) > 0) and world.same(got)
            if on_cpu and (scale == 1 or dtype == torch.float32):
                assert torch.equal(of_own[0], of_rows[own] * scale)
            for mine, whole in zip(of_own, (of_rows[own], of_others[own_others])):
                if mine.numel():
                    close(mine, whole * scale, tolerance)
    if world.size > 1:
        with raises(ValueError, f"rank {world.size - 1} has 7 references, and rank 0 8"):
            last = world.rank == world.size - 1
            rows, labels = batch(8)
            strict = SoftContrastiveLoss(group=world.group, gather_references=True)
            strict(rows, labels, ref_emb=rows[: 8 - last] + 1, ref_labels=labels[: 8 - last])
        with raises(ValueError, f"rank {world.size - 1}: the references have 7 dimensions, and the anchors 12"):
            strict(rows, labels, ref_emb=rows[:, : 7 if last else DIM], ref_labels=labels)
        with raises(ValueError, f"rank {world.size - 1} has references that require no gradient, and rank 0"):
            strict(rows, labels, ref_emb=(rows + 1).requires_grad_(not last), ref_labels=labels)
        lax = SoftContrastiveLoss(group=world.group, gather_references=True, check=not last)
        with raises(ValueError, f"rank {world.size - 1} has check=False, and rank 0 check=True"):
            lax(rows, labels, ref_emb=rows + 1, ref_labels=labels)
        with raises(RuntimeError, f"rank {world.size - 1}: Cannot copy out of meta tensor"):
            strict(rows, labels, ref_emb=rows + 1, ref_labels=labels.to("meta") if last else labels)
        # Labels in a column of a table.
        apart = torch.stack([labels, labels], 1)[:, 0]
        for devices in (nullcontext(), emulated_gpu()):
            with devices:
                values = [strict(rows, its, ref_emb=(rows + 1).requires_grad_(), ref_labels=its) for its in (labels, apart)]
                assert strict.statistics["ignored"] == world.size
                assert values[0] == values[1] == strict(rows, apart, ref_emb=rows + 1, ref_labels=labels) > 0
        none = rows[:0].requires_grad_()
        strict(rows, labels - (torch.arange(8) <= world.rank) * 100, ref_emb=none, ref_labels=labels[:0])
        assert strict.statistics["ignored"] == sum(range(1, world.size + 1))
        bad = rows + 1
        if last:
            bad[3, 2] = torch.inf
        with raises(ValueError, f"rank {world.size - 1}: row 3 of the references holds a value that is not finite"):
            strict(rows, labels, ref_emb=bad, ref_labels=labels)
        with emulated_gpu():
            leaf = bad.clone().requires_grad_()
            value = strict(rows, labels, ref_emb=leaf, ref_labels=labels)
            value.backward()
            assert value.isnan() and leaf.grad.isnan().all()
            with raises(ValueError, f"row {8 * world.size - 5} of the references holds a value that is not finite"):
                strict.check()


def memories_are_alike(world):
    for dtype, masked in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True)):
        one = CrossBatchMemory(SoftContrastiveLoss(), DIM, 70, dtype=dtype, start_after=1)
        # The queue is the same everywhere, and not gathered.
        loss = SoftContrastiveLoss(group=world.group, uneven=True, gradient="sum", gather_references=masked)
        memory = CrossBatchMemory(loss, DIM, 70, dtype=dtype, start_after=1)
        counts = world.uneven()
        own = world.own(counts)
        for step in range(5):
            rows, labels = batch(sum(counts), seed=step)
            mask = torch.arange(sum(counts)) % 3 == 0 if masked else None
            whole, mine = rows.clone().requires_grad_(), rows[own].clone().requires_grad_()
            want = one(whole, labels, enqueue_mask=mask)
            value = memory(mine, labels[own], enqueue_mask=None if mask is None else mask[own])
            want.backward(), value.backward()
            close(value.detach(), want.detach())
            assert torch.equal(mine.grad, whole.grad[own])
            if step == 2:
                more, more_labels = batch(3 * world.size, seed=9)
                one.fill(more, more_labels)
                memory.fill(more[world.own(world.even(3))], more_labels[world.own(world.even(3))])
        assert torch.equal(memory.embedding_memory, one.embedding_memory) and memory.filled == one.filled > 0
        assert torch.equal(memory.label_memory, one.label_memory) and memory.queue_idx == one.queue_idx
        before = memory.embedding_memory.clone()
        if world.size > 1:
            bad = rows[own].clone()
            if world.rank == 0 and len(bad):
                bad[2] = torch.inf
            if counts[0] > 2:
                with raises(ValueError, "rank 0: row 2 of the embeddings is not finite"):
                    memory(bad, labels[own])
            assert torch.equal(memory.embedding_memory, before)


def gpus_have_the_answers_of_the_processor(world):
    if world.size == 1:
        return
    for least in (0, 2**62):
        for number, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16)):
            for counts in (world.even(20), world.uneven(), [0] * (world.size - 1) + [30]):
                rows, labels = batch(sum(counts), number, dtype)
                labels[sum(counts) // 2] = -1
                others, other_labels = batch(33, 7, dtype)
                own = world.own(counts)
                for gradient, references in (("mean", False), ("sum", True)):
                    found = []
                    for device in (nullcontext(), emulated_gpu(least)):
                        threshold = torch.nn.Parameter(torch.tensor(0.6))
                        loss = SoftContrastiveLoss(lambda_pos=threshold, group=world.group, uneven=True, gradient=gradient)
                        mine = rows[own].clone().requires_grad_()
                        more = {"ref_emb": others, "ref_labels": other_labels} if references else {}
                        with device:
                            value = loss(mine, labels[own], **more)
                        assert world.same(value)
                        value.backward()
                        derivative = world.total(threshold.grad) if gradient == "sum" else threshold.grad
                        found.append((value.detach(), mine.grad, derivative, loss.statistics))
                    (value, gradient_, derivative, statistics), on_gpu = found
                    assert value > 0 and type(loss._engine.last) is tuple
                    close(on_gpu[0], value, 1e-5)
                    close(on_gpu[2], derivative, 1e-4)
                    if gradient_.numel():
                        close(on_gpu[1], gradient_, 1e-5 if dtype == torch.float32 else 1e-2)
                    for name in STATISTICS:
                        close(on_gpu[3][name], statistics[name], 1e-5)


def memories_on_gpus_are_the_processor_s(world):
    if world.size == 1:
        return
    counts = world.uneven()
    own = world.own(counts)
    # Of the coarse one, rows are known by their place in the queue alone.
    for least, kind in ((0, CrossBatchMemory), (2**62, Coarse)):
        memories = [kind(SoftContrastiveLoss(group=world.group, uneven=True, check=kind is not Coarse), DIM, 70) for _ in range(2)]
        for step in range(4):
            rows, labels = batch(sum(counts), seed=step)
            found = []
            for memory, device in zip(memories, (nullcontext(), emulated_gpu(least))):
                mine = rows[own].clone().requires_grad_()
                with device:
                    value = memory(mine, labels[own])
                value.backward()
                found.append((value.detach(), mine.grad))
            close(found[1][0], found[0][0], 1e-5)
            if found[0][1].numel():
                close(found[1][1], found[0][1], 1e-5)
        # The rows are normalised by other code, which differs in the last bits.
        close(memories[1].embedding_memory, memories[0].embedding_memory, 1e-6 if kind is not Coarse else 1e-2)
        assert torch.equal(memories[1].label_memory, memories[0].label_memory) and memories[0].filled == 70


def an_error_on_one_gpu_makes_the_others_losses_nan(world):
    if world.size == 1:
        return

    loss = SoftContrastiveLoss(group=world.group)
    memory = CrossBatchMemory(SoftContrastiveLoss(group=world.group), DIM, 70, start_after=1)
    rows, labels = given = batch(8, seed=world.rank)
    with emulated_gpu():
        for name in ("same_class", "sweep", "select", "gradient"):
            for module in (loss, memory):
                with patched(GpuSteps, **{name: failing(world, getattr(GpuSteps, name))}):
                    leaf = rows.clone().requires_grad_()
                    if world.rank == 1:
                        with raises(RuntimeError, "rank 1 failed: no more"):
                            module(leaf, labels)
                        continue
                    value = module(leaf, labels)
                    value.backward()
                    assert value.isnan() and leaf.grad.isnan().all()
                    with raises(RuntimeError, "rank 1 failed in the last loss"):
                        module.check()
        for module in (loss, memory):
            value = module(*given)
            assert world.same(value) and value > 0
        assert world.same(memory.embedding_memory) and world.same(memory.queue_idx.float())
        bad = given[0].clone()
        bad[3, 2] = torch.nan
        with raises(ValueError, "rank 1: row 3 of the anchors holds a value that is not finite"):
            loss(bad if world.rank == 1 else given[0], given[1])
        # References are checked by the kernels, in all processes.
        others = batch(9, seed=7)[0]
        others[4, 1] = torch.inf
        assert loss(*given, ref_emb=others, ref_labels=torch.arange(9)).isnan()
        with raises(ValueError, "row 4 of the references holds a value that is not finite"):
            loss.check()
        with raises(ValueError, "row 4 of the references holds a value that is not finite"):
            SoftContrastiveLoss(group=world.group, check="wait")(*given, ref_emb=others, ref_labels=torch.arange(9))


def a_generator_learns_as_in_one_process(world):
    torch.manual_seed(4)
    head = torch.nn.Linear(DIM, 5)
    for counts in (world.even(), world.uneven()):
        one = ThresholdGenerator(SoftContrastiveLoss(), head)
        many = ThresholdGenerator(SoftContrastiveLoss(group=world.group, uneven=True), head)
        own, learned = world.own(counts), []
        for seed in range(3):
            rows, labels = batch(sum(counts), seed)
            one.step(rows, labels)
            many.step(rows[own], labels[own])
            pos = many.loss.lambda_pos
            assert world.same(pos)
            close(pos, one.loss.lambda_pos, 1e-9)
            learned.append(pos.item())
        meta, meta_labels = batch(sum(counts), 9)
        many.step(rows[own], labels[own], (meta[own], meta_labels[own]))
        one.step(rows, labels, (meta, meta_labels))
        close(many.hypergradient, one.hypergradient, 1e-6)
        assert learned[0] == 0.7 and learned[2] != learned[1] != 0.7
    # Where the processes' sums round differently, all take those of the first.
    with patched(ThresholdGenerator, _hypergradient=lambda *_: (1.0 + world.rank, -3.0)):
        many.step(rows[own], labels[own], (meta[own], meta_labels[own]))
    assert many.hypergradient == (1.0, -3.0)
    wrong = head if world.rank else torch.nn.Linear(DIM + 1, 5)
    generator = ThresholdGenerator(SoftContrastiveLoss(group=world.group), wrong)
    with raises(ValueError, "of a threshold generator") if world.size > 1 else nullcontext():
        generator.step(torch.zeros(6, wrong.in_features), torch.arange(6))
    if world.size > 1:
        generator = ThresholdGenerator(SoftContrastiveLoss(group=world.group), head)
        rows, labels = batch(6)
        with raises(ValueError, "without a meta batch"):
            generator.step(rows, labels, *([] if world.rank else [(rows, labels)]))
    with raises(ValueError, "labels of the batch"):
        generator.step(torch.zeros(6, DIM), torch.arange(6 - (world.rank == 0)))


def half_precision_travels_as_it_is(world):
    counts = world.even(30)
    rows, labels = batch(sum(counts))
    own, bytes_of = world.own(counts), {}
    torch.manual_seed(0)
    layer = torch.nn.Linear(DIM, 64)
    for dtype in (torch.float32, torch.bfloat16):
        found = []
        for group in (False, world.group):
            loss, net = SoftContrastiveLoss(group=group, gradient="sum"), copy.deepcopy(layer)
            mine = own if group else slice(None)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                value = loss(net(rows[mine]), labels[mine])
            value.backward()
            found.append((value.detach(), world.total(net.weight.grad) if group else net.weight.grad))
            if loss.ranks:
                bytes_of[dtype] = loss.ranks.gathered_bytes
        close(found[1][0], found[0][0])
        close(found[1][1], found[0][1], 1e-5 if dtype == torch.float32 else 2e-2)
    if world.size > 1:
        assert bytes_of[torch.float32] - bytes_of[torch.bfloat16] == 2 * 64 * sum(counts)


def distributed_data_parallel_trains_as_one_process(world):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(DIM, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    counts = world.uneven()
    own = world.own(counts)
    many = DistributedDataParallel(copy.deepcopy(net), process_group=world.group)
    losses = SoftContrastiveLoss(), SoftContrastiveLoss(group=world.group, uneven=True)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.3) for model in (net, many)]
    for step in range(6):
        rows, labels = batch(sum(counts), seed=step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        values = losses[0](net(rows), labels), losses[1](many(rows[own]), labels[own])
        for value, optimizer in zip(values, optimizers):
            value.backward()
            optimizer.step()
        close(values[1].detach(), values[0].detach(), 1e-5)
        for got, want in zip(many.module.parameters(), net.parameters()):
            close(got.detach(), want.detach(), 1e-5)
    assert values[0] > 0


def a_group_may_be_named_before_it_exists(world):
    if world.size < SIZE:
        return
    rows, labels = batch(8, seed=world.rank)
    want = SoftContrastiveLoss(group=world.group)(rows, labels)
    with patched(dist, is_initialized=lambda: False):
        named = SoftContrastiveLoss(group="world")
        assert "group=world" in repr(named)
        compiled = torch.compile(copy.deepcopy(named), backend="eager")
        close(compiled(rows, labels), SoftContrastiveLoss()(rows, labels))
    assert compiled(rows, labels) == want == pickle.loads(pickle.dumps(named))(rows, labels)
    assert named(rows, labels) == want and f"group={SIZE} processes" in repr(named)
    assert pickle.loads(pickle.dumps(named))(rows, labels) == copy.deepcopy(named)(rows, labels) == want
    with raises(ValueError, 'group is None, as torch.distributed.group.WORLD is before init_process_group: say "world"'):
        SoftContrastiveLoss(group=None)


def sharded_tensors_are_refused(world):
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    mesh = DeviceMesh.from_group(world.group, "cpu")
    rows, labels = batch(8)
    sharded = distribute_tensor(rows, mesh, [Shard(0)])
    with raises(TypeError, "the anchors must not be a DTensor: give its full_tensor(), or with group= its to_local()"):
        SoftContrastiveLoss()(sharded, labels)
    generator = ThresholdGenerator(SoftContrastiveLoss(), distribute_module(torch.nn.Linear(DIM, 5), mesh))
    with raises(TypeError, "the network of the generator has sharded parameters"):
        generator.step(rows, labels, (rows, labels))


def synchronised_batch_norm_is_torch_s_own(world):
    """torch has no SyncBatchNorm for the CPU, which this asserts, so that the case fails once it has one."""
    if world.size == 1:
        return
    norm = torch.nn.SyncBatchNorm(DIM, process_group=world.group)
    with raises(ValueError, "SyncBatchNorm expected input tensor to be on"):
        norm(batch(8)[0])


def compiled_networks_have_a_break_before_the_loss(world):
    if world.size != 2:
        return
    torch.manual_seed(0)
    layer, loss = torch.nn.Linear(DIM, 8), SoftContrastiveLoss(group=world.group, gradient="sum")
    memory = CrossBatchMemory(loss, 8, 90)
    counts = world.even()
    rows, labels = batch(sum(counts))
    own = world.own(counts)
    for module in (loss, memory):
        def step(rows, labels):
            return module(layer(rows), labels)

        again = copy.deepcopy(memory) if module is memory else module
        want = again(layer(rows[own]), labels[own])
        torch._dynamo.reset()
        with raises(torch._dynamo.exc.Unsupported, "outside compiled graphs"):
            torch.compile(step, backend="eager", fullgraph=True)(rows[own], labels[own])
        got = torch.compile(step, backend="eager")(rows[own], labels[own])
        got.backward()
        assert torch.equal(got, want) and layer.weight.grad.any()


def a_module_with_a_group_can_be_copied_but_not_pickled(world):
    loss = SoftContrastiveLoss(group=world.group)
    assert copy.deepcopy(loss).ranks is loss.ranks and (loss.ranks is None) == (world.size == 1)
    if world.size > 1:
        with raises(TypeError, "save its state_dict"):
            pickle.dumps(loss)
    with raises(TypeError, 'group must be "world", which is all processes, or a torch.distributed.ProcessGroup, not \'all\''):
        SoftContrastiveLoss(group="all")
    with raises(ValueError, "this process is not in the group"):
        SoftContrastiveLoss(group=dist.GroupMember.NON_GROUP_MEMBER)
    with raises(ValueError, 'gradient must be "mean" or "sum"'):
        SoftContrastiveLoss(group=world.group, gradient="max")


CASES = [
    rows_have_the_bits_of_one_process,
    batches_may_be_uneven,
    a_group_may_be_some_processes_of_the_world,
    a_rank_may_mine_nothing,
    thresholds_get_their_derivative,
    one_process_s_error_is_everybody_s,
    unchecked_rows_raise_nowhere,
    an_error_between_the_steps_is_everybody_s,
    a_threshold_out_of_range_in_one_process_is_everybody_s_error,
    references_are_the_same_everywhere,
    own_references_are_gathered_and_get_their_gradient,
    memories_are_alike,
    gpus_have_the_answers_of_the_processor,
    memories_on_gpus_are_the_processor_s,
    an_error_on_one_gpu_makes_the_others_losses_nan,
    a_generator_learns_as_in_one_process,
    half_precision_travels_as_it_is,
    distributed_data_parallel_trains_as_one_process,
    a_group_may_be_named_before_it_exists,
    sharded_tensors_are_refused,
    synchronised_batch_norm_is_torch_s_own,
    compiled_networks_have_a_break_before_the_loss,
    a_module_with_a_group_can_be_copied_but_not_pickled,
]


def main() -> None:
    rank, file, report = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    timeout = datetime.timedelta(seconds=100)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=SIZE, timeout=timeout)
    groups = [dist.new_group(list(range(size))) for size in range(1, SIZE + 1)]
    found = {}
    for case in CASES:
        for size, group in enumerate(groups, 1):
            if rank < size:
                try:
                    case(World(group, size, rank))
                except BaseException:
                    found[f"{case.__name__}, {size} processes, rank {rank}"] = traceback.format_exc()
                    report.write_text(json.dumps(found))
    report.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
