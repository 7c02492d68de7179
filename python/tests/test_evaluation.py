"""`ddtas.evaluate` against the definitions, and against pytorch-metric-learning's AccuracyCalculator."""

import ddtas
import numpy as np
import pytest
from formula import unit_rows


def drawn(count, seed, classes=12):
    rows, labels = unit_rows(count, 16, seed, classes=classes, noise=1.2)
    return rows.astype(np.float32), np.abs(labels)


KS = (1, 2, 5, 40)


def plain(queries, labels, gallery, gallery_labels, own):
    """Per query: hits by K, R-precision, average precision at R; None without a match. `own[i]`: row i's reference, or -1."""
    answers = []
    for i, label in enumerate(labels):
        order = [j for j in np.argsort(-(gallery @ queries[i]), kind="stable") if j != own[i] and gallery_labels[j] >= 0]
        right = gallery_labels[order] == label
        r = right.sum()
        if label < 0 or r == 0:
            answers.append(None)
            continue
        precision = np.cumsum(right[:r]) / np.arange(1, r + 1)
        answers.append(([right[:k].any() for k in KS], right[:r].mean(), (precision * right[:r]).mean()))
    return answers


def test_figures_are_those_of_the_definitions():
    (rows, labels), (gallery, gallery_labels) = drawn(90, 1), drawn(130, 2, classes=15)
    labels[::9], gallery_labels[::7] = -1, -2
    some = np.where(np.arange(90) % 3 == 0, -1, np.arange(90))
    mixed, mixed_labels = np.concatenate([rows, gallery]), np.concatenate([labels, gallery_labels])
    for given, own in [
        ((rows, labels, None, None, None), np.arange(90)),
        ((rows, labels, gallery, gallery_labels, None), np.full(90, -1)),
        ((rows, labels, mixed, mixed_labels, 0), np.arange(90)),
        ((rows, labels, mixed, mixed_labels, some), some),
    ]:
        found = ddtas.evaluate(*given[:4], KS[::-1], identity=given[4])
        searched = (rows, labels) if given[2] is None else given[2:4]
        want = plain(rows.astype(float), labels, searched[0].astype(float), searched[1], own)
        counted = [answer for answer in want if answer is not None]
        assert found.recall.queries == len(counted) and found.recall.without_match == 90 - len(counted)
        assert found.recall == pytest.approx(dict(zip(KS, np.mean([hits for hits, *_ in counted], axis=0))))
        assert found.r_precision == pytest.approx(np.mean([r for _, r, _ in counted]))
        assert found.map_at_r == pytest.approx(np.mean([a for *_, a in counted])) and 0.05 < found.map_at_r < 0.95
        per_class = found.per_class
        assert tuple(found.recall) == tuple(per_class.recall) == KS
        for place, label in enumerate(per_class.labels):
            own_class = [answer for answer, other in zip(want, labels) if other == label and answer is not None]
            assert per_class.queries[place] == len(own_class)
            assert per_class.r_precision[place] == pytest.approx(np.mean([r for _, r, _ in own_class]))
            assert per_class.map_at_r[place] == pytest.approx(np.mean([a for *_, a in own_class]))
            assert per_class.recall[5][place] == pytest.approx(np.mean([hits[2] for hits, *_ in own_class]))
        assert found.nmi is None and set(per_class.labels) == {l for l, a in zip(labels, want) if a is not None}


def test_nmi_is_that_of_clusters_that_are_the_classes():
    random = np.random.default_rng(3)
    labels = np.arange(120) % 6
    rows = (np.eye(6)[labels] + 0.05 * random.normal(size=(120, 6))).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert ddtas.evaluate(rows, labels, nmi=True).nmi == ddtas.evaluate(rows.astype(float), labels, nmi=True).nmi == pytest.approx(1)
    assert ddtas.evaluate(rows, random.permutation(labels), nmi=True).nmi < 0.3
    with pytest.raises(TypeError, match="must be float32"):
        ddtas.evaluate(rows.astype(np.float16), labels, nmi=True)


def test_nmi_is_mutual_information_over_the_mean_entropy():
    # Two points apart, which k-means finds: clusters of 6 and 4 rows. Class 0 has 4 rows in the first and 1 in the second.
    rows = np.repeat(np.eye(2, dtype=np.float32), (6, 4), axis=0)
    counts = np.array([[4, 1], [2, 3]])
    labels = np.array([0] * 4 + [1] * 2 + [0] + [1] * 3)
    p = counts / 10
    entropy = lambda q: -(q * np.log(q)).sum()  # noqa: E731
    classes, clusters = p.sum(1), p.sum(0)
    want = (entropy(classes) + entropy(clusters) - entropy(p)) / ((entropy(classes) + entropy(clusters)) / 2)
    assert 0.05 < want < 0.95
    for seed in range(3):
        assert ddtas.evaluate(rows, labels, nmi=True, seed=seed).nmi == pytest.approx(want)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_nmi_of_tensors_takes_every_type(dtype):
    torch = pytest.importorskip("torch", reason="torch is not installed: its tests do not run")
    labels = torch.arange(120) % 6
    rows = torch.eye(7)[labels] + 0.05 * torch.randn(120, 7, generator=torch.Generator().manual_seed(3))
    assert ddtas.torch.evaluate(rows.to(getattr(torch, dtype)), labels, nmi=True).nmi == pytest.approx(1)


def test_what_cannot_be_judged_is_refused():
    rows, labels = drawn(30, 4)
    for call, message in [
        (lambda: ddtas.evaluate(rows, labels, ks=()), "at least one K"),
        (lambda: ddtas.evaluate(rows, labels, ks=(0, 3)), "ks = 0 is out of range"),
        (lambda: ddtas.evaluate(rows, labels, rows), "gallery and gallery_labels belong together"),
        (lambda: ddtas.evaluate(np.asfortranarray(rows), labels), "the queries must be in row-major order"),
        (lambda: ddtas.evaluate(rows, labels[:3]), "labels of the queries: expected 30, got 3"),
        (lambda: ddtas.evaluate(rows, labels, rows, labels, identity=1), "identity"),
        (lambda: ddtas.evaluate(2 * rows, labels), r"row \d+ of the queries has L2 norm 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="ks = 1.5 must be an integer"):
        ddtas.evaluate(rows, labels, ks=(1.5, 2))
    with pytest.warns(UserWarning, match="none of 30 queries has an answer"):
        assert ddtas.evaluate(rows, np.arange(30)).map_at_r == 0


def test_a_warning_names_the_line_of_the_caller():
    torch = pytest.importorskip("torch", reason="torch is not installed: its tests do not run")
    import ddtas.torch

    rows, _ = drawn(30, 4)
    tensors = torch.from_numpy(rows), torch.arange(30)
    for call in (
        lambda: ddtas.evaluate(rows, np.arange(30)),
        lambda: ddtas.recall_at_k(rows, np.arange(30)),
        lambda: ddtas.torch.evaluate(*tensors),
        lambda: ddtas.torch.recall_at_k(*tensors),
    ):
        with pytest.warns(UserWarning, match="is undefined|are undefined") as warned:
            call()
        assert [warning.filename for warning in warned] == [__file__]


def test_ignored_rows_alone_have_nothing_to_tell_apart():
    rows, labels = drawn(30, 4)
    with pytest.warns(UserWarning, match="none of 30 queries has an answer"):
        found = ddtas.evaluate(rows, np.full(30, -1), nmi=True)
    assert found.nmi == 1 and len(found.per_class.labels) == 0


def test_an_evaluation_is_printed_without_the_figures_of_every_class():
    found = ddtas.evaluate(*drawn(40, 1))
    assert "map_at_r=" in repr(found) and "per_class" not in repr(found)


def test_evaluations_of_the_same_figures_are_equal():
    rows, labels = drawn(60, 1)
    found = ddtas.evaluate(rows, labels)
    assert found == ddtas.evaluate(rows, labels) and not found != ddtas.evaluate(rows, labels)
    assert found.per_class == ddtas.evaluate(rows, labels).per_class
    # Another name of one class changes nothing but `per_class`.
    renamed = ddtas.evaluate(rows, np.where(labels == labels.max(), 99, labels))
    assert renamed.map_at_r == found.map_at_r and renamed.recall == found.recall
    for other in (renamed, ddtas.evaluate(rows, labels, ks=[1]), ddtas.evaluate(*drawn(60, 2))):
        assert found != other and found.per_class != other.per_class and not found.per_class == other.per_class
    assert found.per_class != tuple(found.per_class) and found != None  # noqa: E711


def test_labels_may_come_by_dlpack():
    rows, labels = drawn(30, 4)
    offered = type("Dlpack", (), {"__dlpack__": labels.__dlpack__, "__dlpack_device__": labels.__dlpack_device__})()
    found, want = ddtas.evaluate(rows, offered), ddtas.evaluate(rows, labels)
    assert found.recall == want.recall
    np.testing.assert_array_equal(found.per_class.labels, want.per_class.labels)


torch = pytest.importorskip("torch", reason="torch is not installed: its tests do not run")
pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is not installed: nothing to compare with")

import ddtas.torch  # noqa: E402
from pytorch_metric_learning.distances import CosineSimilarity  # noqa: E402
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator  # noqa: E402
from pytorch_metric_learning.utils.inference import CustomKNN  # noqa: E402

FIGURES = ("precision_at_1", "r_precision", "mean_average_precision_at_r")


@pytest.mark.parametrize("form", ["among themselves", "gallery", "gallery with the queries"])
@pytest.mark.parametrize("averages", ["of all", "of averages", "per class"])
def test_figures_are_those_of_the_accuracy_calculator(form, averages):
    rows, labels = (torch.from_numpy(array) for array in drawn(150, 5))
    gallery, gallery_labels = (torch.from_numpy(array) for array in drawn(170, 6))
    calculator = AccuracyCalculator(
        include=FIGURES,
        k="max_bin_count",
        avg_of_avgs=averages == "of averages",
        return_per_class=averages == "per class",
        device=torch.device("cpu"),
        knn_func=CustomKNN(CosineSimilarity()),
    )
    if form == "among themselves":
        want = calculator.get_accuracy(rows, labels)
        found = ddtas.torch.evaluate(rows, labels)
    elif form == "gallery":
        want = calculator.get_accuracy(rows, labels, gallery, gallery_labels)
        found = ddtas.torch.evaluate(rows, labels, gallery, gallery_labels)
    else:
        both, both_labels = torch.cat([rows, gallery]), torch.cat([labels, gallery_labels])
        want = calculator.get_accuracy(rows, labels, both, both_labels, ref_includes_query=True)
        found = ddtas.torch.evaluate(rows, labels, both, both_labels, identity=0)
    per_class = found.per_class
    got = {
        "of all": (found.recall[1], found.r_precision, found.map_at_r),
        "of averages": (per_class.recall[1].mean(), per_class.r_precision.mean(), per_class.map_at_r.mean()),
        "per class": (per_class.recall[1], per_class.r_precision, per_class.map_at_r),
    }[averages]
    for name, value in zip(FIGURES, got):
        assert np.asarray(value) == pytest.approx(np.asarray(want[name]), abs=1e-9), name
        assert 0.1 < np.mean(value) < 0.95


def test_the_threshold_gradient_of_tensors_is_that_of_arrays():
    rows, labels = drawn(40, 7)
    tangent = np.random.default_rng(8).normal(size=rows.shape).astype(np.float32)
    want = ddtas.threshold_gradient(rows, labels, tangent)
    got = ddtas.torch.threshold_gradient(torch.from_numpy(rows).requires_grad_(), torch.from_numpy(labels), torch.from_numpy(tangent))
    assert got == want and want.neg != 0
    (others, other_labels), settings = drawn(70, 9), ddtas.Settings(mining="none", lambda_pos=0.6)
    others[:40], other_labels[:40] = 1.01 * rows, labels
    given = [rows, labels, tangent, others, other_labels, np.random.default_rng(9).normal(size=others.shape).astype(np.float32)]
    tensors = [torch.from_numpy(array) for array in given]
    more = {"settings": settings, "check": False}
    sums = [ddtas.threshold_gradient(*given, identity=identity, **more) for identity in (None, 0, np.arange(40))]
    assert sums[0] != sums[1] == sums[2]
    for identity, want_ in zip((None, 0, torch.arange(40)), sums):
        assert ddtas.torch.threshold_gradient(*tensors, identity=identity, **more) == want_
    apart = torch.from_numpy(rows).repeat(1, 2)[:, :16]
    assert not apart.is_contiguous()
    assert ddtas.torch.threshold_gradient(apart, torch.from_numpy(labels), torch.from_numpy(tangent)) == want
    for given, message in [
        ((rows, torch.from_numpy(labels), tangent), "the anchors must be a torch.Tensor, not ndarray"),
        ((apart, labels, apart), "the labels must be a torch.Tensor, not ndarray"),
        ((apart, torch.from_numpy(labels), None), "the tangent must be a torch.Tensor, not NoneType"),
    ]:
        with pytest.raises(TypeError, match=message):
            ddtas.torch.threshold_gradient(*given)


@pytest.mark.parametrize("scale", [1, 2, 1000])
def test_rows_of_tensors_are_compared_by_their_angle(scale):
    torch = pytest.importorskip("torch", reason="torch is not installed: its tests do not run")
    from ddtas.torch import evaluate, recall_at_k

    # Row 2 has the smallest angle to row 0, but row 1, which is longer, the larger dot product.
    rows = scale * torch.tensor([[1, 0], [0.9999, 0.0447], [0.9987, 0.0316]])
    labels = torch.tensor([0, 0, 1])
    assert recall_at_k(rows, labels, [1]) == evaluate(rows, labels, ks=[1]).recall == {1: 0.0}
