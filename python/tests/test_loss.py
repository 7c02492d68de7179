"""The functional calls on NumPy arrays: the same numbers as the formula and the reference cases."""

import dataclasses
import json
import struct
from pathlib import Path

import ddtas
import formula
import numpy as np
import pytest
from formula import close, unit_rows

GOLDEN = Path(__file__).parents[2] / "tests/golden"
TYPES = {"F32": np.float32, "F64": np.float64, "I64": np.int64}
# (rows, dimensions): odd, smaller and larger than a tile.
SHAPES = [(2, 1), (30, 7), (257, 130)]


def golden_cases() -> list[Path]:
    cases = sorted(GOLDEN.glob("*.safetensors"))
    assert len(cases) >= 12
    return cases


def read(path: Path):
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] in TYPES:
            start, end = (8 + length + at for at in entry["data_offsets"])
            tensors[name] = np.frombuffer(data[start:end], TYPES[entry["dtype"]]).reshape(entry["shape"])
    adaptive = metadata["adaptive"] == "true"
    return tensors, ddtas.Settings(
        mining="at-asms" if adaptive else "asms",
        gamma=float(metadata["gamma"]),
        negative_ratio=float(metadata["neg_ratio"]),
        probe_ratio=float(metadata["probe_neg_ratio"]),
        tolerance=float(metadata["tolerance"]),
        alpha=float(metadata["alpha"]),
        beta=float(metadata["beta"]),
        lambda_pos=float(metadata["lam_pos"]),
        lambda_neg=float(metadata["lam_neg"]),
    )


@pytest.mark.parametrize("path", golden_cases(), ids=lambda path: path.stem)
def test_reference_cases_come_out_as_stated(path):
    case, settings = read(path)
    embeddings, labels, tangent = case["embeddings"], case["labels"], case["tangent"]
    output = ddtas.loss(embeddings, labels, settings=settings)
    np.testing.assert_array_equal(output.count_pos, case["expected.count_pos"])
    np.testing.assert_array_equal(output.count_neg, case["expected.count_neg"])
    assert output.active == case["expected.active"]
    assert output.loss == pytest.approx(float(case["expected.loss"]), rel=1e-5, abs=1e-7)
    close(output.gradient, case["expected.grad"], 1e-5)
    sums = ddtas.threshold_gradient(embeddings, labels, tangent, settings=settings)
    scale = abs(float(case["expected.hyper_pos"])) + abs(float(case["expected.hyper_neg"]))
    assert sums.pos == pytest.approx(float(case["expected.hyper_pos"]), abs=1e-5 * scale + 1e-9)
    assert sums.neg == pytest.approx(float(case["expected.hyper_neg"]), abs=1e-5 * scale + 1e-9)


def test_defaults_are_the_paper_s():
    _, settings = read(GOLDEN / "paper_batch80.safetensors")
    assert ddtas.Settings() == settings


@pytest.mark.parametrize("mining", ["none", "symmetric", "asms", "at-asms"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_square_form_is_the_formula(shape, mining, dtype):
    rows, labels = unit_rows(*shape, seed=3)
    rows, settings = rows.astype(dtype), ddtas.Settings(mining=mining, lambda_pos=0.6)
    check_against_formula(ddtas.loss(rows, labels, settings=settings), formula.expected(rows, labels, settings=settings))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("count", [1, 97, 300])
def test_rectangular_form_is_the_formula(count, dtype):
    rows, labels = unit_rows(31, 19, seed=4)
    references, reference_labels = unit_rows(count, 19, seed=5)
    given = [rows.astype(dtype), labels, references.astype(dtype), reference_labels]
    output = ddtas.loss(*given, reference_gradient=True)
    want = formula.expected(*given)
    check_against_formula(output, want)
    close(output.reference_gradient, want.reference_gradient, factor(dtype))


@pytest.mark.parametrize("width", [np.int64, np.uint8])
def test_identity_by_index_leaves_out_what_the_value_does_not_tell(width):
    rows, labels = unit_rows(60, 32, seed=13)
    rows = rows.astype(np.float32)
    # The same rows in half precision are close to the anchors, but no duplicates of them.
    references = np.concatenate([rows[:7], rows.astype(np.float16).astype(np.float32)])
    reference_labels = np.concatenate([labels[:7], labels])
    own = np.arange(67)[None, :] == 7 + np.arange(60)[:, None]
    given = [rows, labels, references, reference_labels]
    want = formula.expected(*given, own=own)
    for identity in (7, np.int64(7), np.arange(7, 67).astype(width)):
        output = ddtas.loss(*given, identity=identity, check=False)
        check_against_formula(output, want)
    by_value = ddtas.loss(*given, check=False)
    assert by_value.total_pos - output.total_pos == (labels >= 0).sum()
    # Every second anchor is not among the references.
    some = np.where(np.arange(60) % 2, np.arange(7, 67), -1)
    output = ddtas.loss(*given, identity=some, check=False)
    check_against_formula(output, formula.expected(*given, own=own & (some >= 0)[:, None]))
    tangent = np.random.default_rng(14).normal(size=rows.shape).astype(np.float32)
    every = ddtas.Settings(mining="none")
    check_against_formula(ddtas.loss(*given, identity=7, settings=every, check=False), formula.expected(*given, own=own, settings=every))
    sums = [
        ddtas.threshold_gradient(rows, labels, tangent, *given[2:], identity=identity, settings=every, check=False)
        for identity in (7, some, None)
    ]
    assert len(set(sums)) == 3


def factor(dtype) -> float:
    return 1e-12 if dtype == np.float64 else 1e-5


def check_against_formula(output, want):
    bound = factor(output.gradient.dtype)
    np.testing.assert_array_equal(output.count_pos, want.count_pos)
    np.testing.assert_array_equal(output.count_neg, want.count_neg)
    close(output.gradient, want.gradient, bound)
    for name in ("loss", "gamma_pos", "gamma_neg", "dloss_dlambda_pos", "dloss_dlambda_neg"):
        assert getattr(output, name) == pytest.approx(getattr(want, name), rel=max(bound, 1e-9), abs=1e-9), name


def test_the_comparer_catches_a_wrong_entry():
    want = np.ones((3, 2))
    got = want.copy()
    got[1, 1] += 1e-4
    with pytest.raises(AssertionError, match=r"worst at \(.*1.*1.*\)"):
        close(got, want, 1e-5)


def test_float16_is_the_formula_on_the_rounded_rows():
    rows, labels = unit_rows(64, 32, seed=6)
    rows = rows.astype(np.float16)
    output = ddtas.loss(rows, labels)
    assert output.gradient.dtype == np.float32
    close(output.gradient, formula.expected(rows, labels).gradient, 1e-4)


def test_bfloat16_is_the_formula_on_the_rounded_rows():
    bfloat16 = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed: NumPy has no bfloat16").bfloat16
    rows, labels = unit_rows(64, 32, seed=6)
    rows = rows.astype(bfloat16)
    output = ddtas.loss(rows, labels)
    close(output.gradient, formula.expected(rows.astype(np.float64), labels).gradient, 1e-4)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.uint32, np.uint64, ">i8"])
def test_labels_of_every_width_give_the_same_bits(dtype):
    rows, labels = unit_rows(40, 8, seed=7)
    labels = np.abs(labels)
    rows = rows.astype(np.float32)
    want = ddtas.loss(rows, labels)
    got = ddtas.loss(rows, labels.astype(dtype))
    assert got.loss == want.loss
    np.testing.assert_array_equal(got.gradient, want.gradient)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_threshold_gradient_is_a_central_difference(dtype):
    rows, labels = unit_rows(60, 12, seed=8)
    references, reference_labels = unit_rows(45, 12, seed=9)
    random = np.random.default_rng(10)
    tangent, reference_tangent = random.normal(size=rows.shape), random.normal(size=references.shape)

    def product(step: float, name: str) -> float:
        moved = dataclasses.replace(ddtas.Settings(), **{name: 0.7 + step})
        output = ddtas.loss(rows, labels, references, reference_labels, settings=moved, reference_gradient=True)
        return (output.gradient * tangent).sum() + (output.reference_gradient * reference_tangent).sum()

    step = 1e-5
    want = [(product(step, name) - product(-step, name)) / (2 * step) for name in ("lambda_pos", "lambda_neg")]
    narrow = [array.astype(dtype) for array in (rows, tangent, references, reference_tangent)]
    got = ddtas.threshold_gradient(narrow[0], labels, narrow[1], narrow[2], reference_labels, narrow[3])
    assert got == pytest.approx(want, rel=1e-4 if dtype == np.float32 else 1e-7)


def test_recall_is_that_of_a_full_sort():
    rows, labels = unit_rows(150, 6, seed=11, noise=2.0)
    similarity = rows.astype(np.float32) @ rows.astype(np.float32).T
    np.fill_diagonal(similarity, -np.inf)
    similarity[:, labels < 0] = -np.inf  # ignored rows are no neighbours
    order = np.argsort(-similarity, axis=1)
    sizes = {label: (labels == label).sum() for label in labels}
    queries = [i for i in range(len(rows)) if labels[i] >= 0 and sizes[labels[i]] > 1]
    want = {k: np.mean([labels[i] in labels[order[i, :k]] for i in queries]) for k in (1, 3, 10)}
    got = ddtas.recall_at_k(rows.astype(np.float32), labels, (1, 3, 10))
    assert got == pytest.approx(want)
    assert 0 < got[1] < got[10] < 1


def test_a_batch_that_mines_nothing_gives_zero():
    rows = np.eye(4, dtype=np.float32)
    output = ddtas.loss(rows, np.arange(4))
    assert output.loss == 0 and output.active == 0 and output.mined == (0, 0)
    assert not output.gradient.any()
