"""`ddtas.Part`: a batch in parts has the bits of the whole batch, and the numbers of the formula."""

import threading

import ddtas
import formula
import numpy as np
import pytest
from formula import close, unit_rows


def in_threads(parts, tangent, ranges):
    """Runs each part in its own thread; their results are exchanged through `shared`, in the order of the parts."""
    shared, answers, failed = [{} for _ in parts], [None] * len(parts), []
    barrier = threading.Barrier(len(parts))

    def gathered(name):
        barrier.wait()
        return [getattr(shared[p][name.split(".")[0]], name.split(".")[1]) for p in range(len(parts))]

    def work(p):
        part, found = parts[p], shared[p]
        own = slice(*ranges[p])
        try:
            found["same"] = part.same_class()
            min_pos = np.concatenate(gathered("same.min_pos"))
            total_pos = sum(gathered("same.total_pos"))
            found["sweep"] = part.sweep(min_pos[own], min_pos)
            max_neg, probe_neg = np.concatenate(gathered("sweep.max_neg")), sum(gathered("sweep.probe_neg"))
            found["chosen"] = part.select(max_neg[own], max_neg, probe_neg=probe_neg, total_pos=total_pos)
            pos, neg = (np.concatenate(gathered(f"chosen.{name}")) for name in ("count_pos", "count_neg"))
            found["loss"] = part.gradient(pos[own], neg[own], pos, neg)
            hyper = part.threshold_gradient(tangent[own])
            answers[p] = (min_pos, max_neg, pos, neg, found["loss"], found["chosen"], hyper)
        except BaseException as error:
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(p,)) for p in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    return answers


def cut(lengths):
    ends = np.cumsum(lengths)
    return list(zip(ends - lengths, ends))


@pytest.mark.parametrize("mining", ["none", "asms", "at-asms"])
@pytest.mark.parametrize("lengths", [[90], [40, 50], [0, 1, 60, 29]], ids=str)
def test_parts_in_threads_have_the_bits_of_one_and_the_numbers_of_the_formula(lengths, mining):
    rows, labels = unit_rows(90, 19, seed=21)
    rows, settings = rows.astype(np.float32), ddtas.Settings(mining=mining, lambda_pos=0.6)
    tangent = np.random.default_rng(22).normal(size=rows.shape).astype(np.float32)
    ranges = cut(lengths)
    parts = [
        ddtas.Part(
            rows[a:b], labels[a:b], rows, labels, identity=int(a), total=90, settings=settings, context=ddtas.Context(1 + p)
        )
        for p, (a, b) in enumerate(ranges)
    ]
    answers = in_threads(parts, tangent, ranges)
    whole = ddtas.loss(rows, labels, settings=settings)
    min_pos, max_neg, pos, neg, *_ = answers[0]
    for got, want in zip((min_pos, max_neg, pos, neg), (whole.min_pos, whole.max_neg, whole.count_pos, whole.count_neg)):
        np.testing.assert_array_equal(got, want)
    gradient = np.concatenate([answer[4].gradient for answer in answers])
    np.testing.assert_array_equal(gradient, whole.gradient)
    for answer in answers:
        assert answer[5][2:] == (whole.gamma_pos, whole.gamma_neg)
    loss = sum(answer[4].loss for answer in answers)
    assert loss == pytest.approx(whole.loss, rel=1e-6) and whole.loss > 0
    assert sum(answer[4].active for answer in answers) == whole.active
    sums = np.sum([answer[6] for answer in answers], axis=0)
    assert sums == pytest.approx(ddtas.threshold_gradient(rows, labels, tangent, settings=settings), rel=1e-6)

    want = formula.expected(rows, labels, settings=settings)
    np.testing.assert_array_equal(pos, want.count_pos)
    np.testing.assert_array_equal(neg, want.count_neg)
    close(gradient, want.gradient, 1e-5)
    assert loss == pytest.approx(want.loss, rel=1e-5)
    for name in ("dloss_dlambda_pos", "dloss_dlambda_neg"):
        assert sum(getattr(answer[4], name) for answer in answers) == pytest.approx(getattr(want, name), rel=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_references_in_blocks_are_the_references_at_once(dtype):
    rows, labels = unit_rows(40, 16, seed=23)
    others, other_labels = unit_rows(200, 16, seed=24)
    # Some anchors are also references, from 90 on.
    others[90:110], other_labels[90:110] = rows[:20], labels[:20]
    rows, others = rows.astype(dtype), others.astype(dtype)
    list_of = np.where(np.arange(40) < 20, 90 + np.arange(40), -1)
    own = list_of[:, None] == np.arange(200)[None, :]
    blocks = []
    for a, b in [(0, 95), (95, 96), (96, 200)]:
        known = np.where((list_of >= a) & (list_of < b), list_of - a, -1)
        blocks.append(ddtas.Part(rows, labels, others[a:b], other_labels[a:b], identity=known, total=40))
    same = [block.same_class() for block in blocks]
    min_pos = np.minimum.reduce([found.min_pos for found in same])
    swept = [block.sweep(min_pos) for block in blocks]
    max_neg = np.maximum.reduce([found.max_neg for found in swept])
    totals = {"probe_neg": sum(found.probe_neg for found in swept), "total_pos": sum(found.total_pos for found in same)}
    chosen = [block.select(max_neg, **totals) for block in blocks]
    pos, neg = (sum(getattr(found, name) for found in chosen) for name in ("count_pos", "count_neg"))
    found = [block.gradient(pos, neg) for block in blocks]

    want = formula.expected(rows, labels, others, other_labels, own=own)
    np.testing.assert_array_equal(pos, want.count_pos)
    np.testing.assert_array_equal(neg, want.count_neg)
    assert sum(part.loss for part in found) == pytest.approx(want.loss, rel=1e-5) and want.loss > 0
    close(sum(part.gradient for part in found), want.gradient, 1e-5 if dtype == np.float32 else 1e-4)
    whole = ddtas.loss(rows, labels, others, other_labels, identity=list_of)
    np.testing.assert_array_equal(min_pos, whole.min_pos)
    np.testing.assert_array_equal(max_neg, whole.max_neg)
    assert sum(part.total_neg for part in same) == whole.total_neg


def test_references_in_parts_get_their_gradient():
    (rows, labels), (others, other_labels) = unit_rows(30, 16, seed=26), unit_rows(70, 16, seed=27)
    rows, others = rows.astype(np.float32), others.astype(np.float32)
    anchors = ddtas.Part(rows, labels, others, other_labels, total=30)
    same = anchors.same_class()
    swept = anchors.sweep(same.min_pos)
    totals = {"probe_neg": swept.probe_neg, "total_pos": same.total_pos}
    chosen = anchors.select(swept.max_neg, **totals)
    loss = anchors.gradient(chosen.count_pos, chosen.count_neg)
    tangents = [np.random.default_rng(28).normal(size=side.shape).astype(np.float32) for side in (rows, others)]
    sums = ddtas.threshold_gradient(rows, labels, tangents[0], others, other_labels, tangents[1])
    assert anchors.threshold_gradient(*tangents) == pytest.approx(sums, rel=1e-6)
    found = []
    for a, b in [(0, 45), (45, 45), (45, 70)]:
        turned = ddtas.Part(others[a:b], other_labels[a:b], rows, labels, total=30)
        positive, negative, nothing = (np.full(b - a, x) for x in (np.float32(np.inf), np.float32(-np.inf), np.uint32(0)))
        turned.same_class()
        turned.sweep(positive, same.min_pos)
        turned.select(negative, swept.max_neg, **totals)
        answer = turned.gradient(nothing, nothing, chosen.count_pos, chosen.count_neg)
        assert (answer.loss, answer.active) == (0, 0)
        found.append(answer.gradient)
    want = formula.expected(rows, labels, others, other_labels)
    close(np.concatenate(found), want.reference_gradient, 1e-5)
    close(loss.gradient, want.gradient, 1e-5)
    assert loss.loss == pytest.approx(want.loss, rel=1e-5) and want.loss > 0


def small():
    rows, labels = unit_rows(12, 5, seed=25)
    return rows.astype(np.float32), labels


def part(**changes):
    rows, labels = small()
    given = {"embeddings": rows[4:8], "labels": labels[4:8], "references": rows, "reference_labels": labels}
    given |= {"identity": 4, "total": 12} | changes
    return ddtas.Part(*[given.pop(name) for name in ("embeddings", "labels", "references", "reference_labels")], **given)


def test_steps_out_of_order_are_refused():
    numbers, counts = np.full(12, 0.5, np.float32), np.full(12, 3, np.uint32)
    steps = [
        lambda p: p.same_class(),
        lambda p: p.sweep(numbers[:4], numbers),
        lambda p: p.select(numbers[:4], numbers, probe_neg=1, total_pos=1),
        lambda p: p.gradient(counts[:4], counts[:4], counts, counts),
        lambda p: p.threshold_gradient(small()[0][:4]),
    ]
    for at in range(1, 5):
        for done in range(at):
            fresh = part()
            for step in steps[:done]:
                step(fresh)
            with pytest.raises(RuntimeError, match="needs"):
                steps[at](fresh)
    # Another call between two steps makes the next step an error.
    context = ddtas.Context(1)
    fresh = part(context=context)
    fresh.same_class()
    ddtas.loss(*small(), context=context)
    with pytest.raises(RuntimeError, match="the sweep needs the same-class step before it"):
        steps[1](fresh)


BAD_PARTS = [
    ({"total": 0}, ValueError, "total = 0 is out of range"),
    ({"total": -1}, ValueError, "total = -1 is out of range"),
    ({"identity": 9}, ValueError, "identity = reference 9 for anchor 0"),
    ({"identity": -2}, ValueError, "identity = -2 is out of range"),
    ({"identity": np.arange(3)}, ValueError, "list of the anchors' references: expected 4, got 3"),
    ({"identity": np.array([4, 5, 6, -2])}, ValueError, "identity holds -2"),
    ({"identity": np.array([4, 5, 6, 99])}, ValueError, "identity = reference 99 for anchor 3"),
    ({"identity": np.ones(4)}, TypeError, "the identity must be integers, not float64"),
    ({"identity": "all"}, TypeError, "the identity must be a NumPy array"),
    ({"references": None}, TypeError, "the references must be a NumPy array or have __dlpack__, not NoneType"),
    ({"embeddings": small()[0][4:8].astype(float), "identity": None}, TypeError, "the anchors must be float32, float16 or bfloat16"),
    ({"labels": small()[1][:3]}, ValueError, "labels of the anchors: expected 4, got 3"),
    ({"embeddings": 2 * small()[0][4:8]}, ValueError, "row 0 of the anchors has L2 norm 2.000000, not 1"),
    ({"settings": "asms"}, TypeError, "settings must be a ddtas.Settings"),
]


@pytest.mark.parametrize("changes, kind, message", BAD_PARTS, ids=lambda value: str(value)[:30])
def test_parts_that_do_not_fit_are_refused(changes, kind, message):
    with pytest.raises(kind, match=message) as raised:
        part(**changes).same_class()
    assert "\n" not in str(raised.value)


def test_rows_of_a_part_may_go_unchecked():
    part(embeddings=np.full((4, 5), np.nan, np.float32), identity=None, check=False).same_class()


def test_numbers_that_do_not_fit_are_refused():
    numbers, counts = np.full(13, 0.5, np.float32), np.full(13, 3)
    for given, kind, message in [
        ((numbers[:3], numbers[:12]), ValueError, "numbers of the anchors: expected 4, got 3"),
        ((numbers[:4], numbers), ValueError, "numbers of the references: expected 12, got 13"),
        ((numbers[:4].astype(float), None), TypeError, "min_pos must be a NumPy array of float32 in 1 dimension, not float64"),
        ((numbers[:4], numbers[None]), TypeError, "reference_min_pos must be a NumPy array of float32 in 1 dimension"),
        (([0.5] * 4, None), TypeError, "min_pos must be a NumPy array of float32 in 1 dimension, not"),
    ]:
        fresh = part()
        fresh.same_class()
        with pytest.raises(kind, match=message):
            fresh.sweep(*given)
    for given, kind, message in [
        ((counts[:4] - 4, counts[:4]), ValueError, "count_pos holds -1"),
        ((counts[:4], counts[:4].astype(float)), TypeError, "the count_neg must be integers"),
        ((counts[:4], counts[:4], counts[:12], counts), ValueError, "numbers of the references: expected 12, got 13"),
    ]:
        fresh = part()
        fresh.same_class()
        fresh.sweep(numbers[:4])
        fresh.select(numbers[:4], probe_neg=2, total_pos=1)
        with pytest.raises(kind, match=message):
            fresh.gradient(*given)


def test_counts_that_no_machine_has_are_refused():
    numbers = np.full(4, 0.5, np.float32)
    for given, message in [
        ({"probe_neg": -1, "total_pos": 1}, "probe_neg = -1 is out of range"),
        ({"probe_neg": 1, "total_pos": 2**64}, "total_pos = .* is out of range"),
    ]:
        with pytest.raises(ValueError, match=message):
            part().select(numbers, **given)
    for total in (-1, 2**64):
        with pytest.raises(ValueError, match="total = .* is out of range: the anchors of all parts"):
            part(total=total).same_class()


def test_a_part_without_rows_finds_nothing():
    rows, labels = small()
    none, nobody = np.zeros(0, np.float32), np.zeros(0, np.uint32)
    empty = part(embeddings=rows[:0], labels=labels[:0], identity=0)
    assert empty.same_class()[1:3] == (0, 0)
    assert empty.sweep(none).probe_neg == 0
    empty.select(none, probe_neg=3, total_pos=2)
    found = empty.gradient(nobody, nobody)
    assert found.loss == 0 and found.gradient.shape == (0, 5)
    assert empty.threshold_gradient(rows[:0]) == (0, 0)
