"""Inputs are read in place, and invalid ones are refused with one clear line."""

import ctypes
import dataclasses
import subprocess
import sys
from pathlib import Path

import ddtas
import numpy as np
import pytest
from ddtas import _ddtas
from formula import unit_rows


def batch(count=12, dim=5, dtype=np.float32):
    rows, labels = unit_rows(count, dim, seed=2)
    return rows.astype(dtype), labels


class Dlpack:
    """A tensor of another library: NumPy's memory, available only by DLPack."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **keywords):
        return self.array.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class OldDlpack(Dlpack):
    """A tensor from before DLPack 1.0, whose `__dlpack__` takes no keywords."""

    def __dlpack__(self):
        return self.array.__dlpack__()


class GpuDlpack(Dlpack):
    """Claims to be in GPU memory, in a struct from before DLPack 1.0: it begins with the address, then the device."""

    def __dlpack__(self):
        capsule = self.array.__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        ctypes.c_int32.from_address(pointer(capsule, b"dltensor") + 8).value = 2
        return capsule

    def __dlpack_device__(self):
        return (2, 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("wrap", [lambda array: array, Dlpack, OldDlpack], ids=["numpy", "dlpack", "old-dlpack"])
def test_rows_are_read_where_they_lie(dtype, wrap):
    rows, labels = batch(dtype=dtype)
    assert _ddtas.address_of(wrap(rows)) == rows.ctypes.data
    part = rows[3:9]
    assert _ddtas.address_of(wrap(part)) == part.ctypes.data
    output, want = ddtas.loss(wrap(rows), wrap(labels)), ddtas.loss(rows, labels)
    assert output.loss == want.loss
    np.testing.assert_array_equal(output.gradient, want.gradient)


def test_bfloat16_rows_are_read_where_they_lie():
    bfloat16 = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed: NumPy has no bfloat16").bfloat16
    rows, _ = batch(dtype=bfloat16)
    assert _ddtas.address_of(rows) == rows.ctypes.data


def test_read_only_rows_are_served():
    rows, labels = batch()
    rows.flags.writeable = labels.flags.writeable = False
    assert _ddtas.address_of(rows) == rows.ctypes.data
    assert ddtas.loss(rows, labels).loss > 0


def test_the_gradient_owns_its_memory_and_outlives_the_output():
    rows, labels = batch()
    gradient = ddtas.loss(rows, labels).gradient
    want = gradient.copy()
    for _ in range(3):
        ddtas.loss(rows[::-1].copy(), labels)
    np.testing.assert_array_equal(gradient, want)
    assert gradient.flags.writeable


def test_inputs_are_released_after_the_call():
    rows, labels = batch()
    before = sys.getrefcount(rows)
    for wrap in (lambda array: array, Dlpack):
        ddtas.loss(wrap(rows), labels)
        with pytest.raises(ValueError):
            ddtas.loss(wrap(rows), labels[:-1])
    assert sys.getrefcount(rows) == before


MEMORY = """
import resource, sys
import numpy as np
import ddtas

peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = np.random.default_rng(0).normal(size=({count}, {dim})).astype(np.float32)
rows /= np.linalg.norm(rows, axis=1, keepdims=True)
labels = np.arange({count}) // 5
ddtas.loss(rows[:200], labels[:200])
before = peak()
{call}
print(peak() - before)
"""


def growth(count: int, dim: int, call: str) -> int:
    """Bytes by which a call raises the peak memory of a new process."""
    code = MEMORY.format(count=count, dim=dim, call=call)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_a_memory_bank_is_not_copied():
    # 131 MB of references: the library copies neither these nor stores the 80 x N similarities.
    assert growth(128_000, 256, "ddtas.loss(rows[:80].copy(), labels[:80], rows, labels)") < 100e6


def test_memory_grows_with_the_batch_not_with_its_square():
    # The similarities S alone would be 256 MB.
    assert growth(8_000, 32, "ddtas.loss(rows, labels)") < 100e6


def test_recall_holds_no_list_of_all_rows_for_each():
    # All neighbour lists at once would be 512 MB, for any K beyond the number of rows.
    assert growth(8_000, 8, "ddtas.recall_at_k(rows, labels, (10**12,))") < 300e6


def nan(rows):
    rows[3, 1] = np.nan
    return rows


HOSTILE = {
    "nan": (nan, ValueError, "row 3 of the anchors holds a value that is not finite"),
    "infinity": (lambda r: np.where(np.arange(12)[:, None] == 5, np.inf, r).astype("f4"), ValueError, "row 5 of the anchors"),
    "not unit": (lambda r: 2 * r, ValueError, "row 0 of the anchors has L2 norm 2.000000, not 1"),
    "zero rows": (lambda r: 0 * r, ValueError, "row 0 of the anchors is all zeros: it has no direction$"),
    "tiny rows": (lambda r: r * np.float32(1e-30), ValueError, "row 0 of the anchors has L2 norm 0.000000, not 1"),
    "one dimension": (lambda r: r[0], ValueError, "the anchors must have 2 dimensions"),
    "three dimensions": (lambda r: r[None], ValueError, "the anchors must have 2 dimensions"),
    "scalar": (lambda r: np.float32(1), TypeError, "the anchors must be a NumPy array"),
    "no rows": (lambda r: r[:0], ValueError, "the anchors are empty"),
    "no entries": (lambda r: r[:, :0], ValueError, "the anchors are empty"),
    "every other row": (lambda r: np.concatenate([r, r])[::2], ValueError, "row-major order without gaps"),
    "columns first": (np.asfortranarray, ValueError, "row-major order without gaps"),
    "backwards": (lambda r: r[::-1], ValueError, "row-major order without gaps"),
    "one row for all": (lambda r: np.broadcast_to(r[:1], r.shape), ValueError, "row-major order without gaps"),
    "integers": (lambda r: r.astype(int), TypeError, "must be float32, float16, bfloat16 or float64, not int64"),
    "complex": (lambda r: r.astype(complex), TypeError, "not complex128"),
    "big-endian": (lambda r: r.astype(">f4"), TypeError, "not >f4"),
    "objects": (lambda r: r.astype(object), TypeError, "not object"),
    "list": (lambda r: r.tolist(), TypeError, "the anchors must be a NumPy array or have __dlpack__, not list"),
    "nothing": (lambda r: None, TypeError, "not NoneType"),
    "integers by dlpack": (lambda r: Dlpack(r.astype(int)), TypeError, "must be float32, float16, bfloat16 or float64"),
    "gaps by dlpack": (lambda r: Dlpack(np.asfortranarray(r)), ValueError, "row-major order without gaps"),
    "nan by dlpack": (lambda r: Dlpack(nan(r)), ValueError, "row 3 of the anchors"),
    "a GPU's": (GpuDlpack, ValueError, "the anchors are not in the host's memory: the GPU's is served by ddtas.torch"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_bad_embeddings_are_refused(case):
    spoil, kind, message = HOSTILE[case]
    rows, labels = batch()
    with pytest.raises(kind, match=message) as raised:
        ddtas.loss(spoil(rows), labels)
    assert "\n" not in str(raised.value)


def unaligned(rows):
    raw = np.zeros(rows.nbytes + 1, np.uint8)
    view = raw[1:].view(rows.dtype).reshape(rows.shape)
    view[:] = rows
    return view


@pytest.mark.parametrize("wrap", [lambda array: array, Dlpack], ids=["numpy", "dlpack"])
def test_rows_that_are_not_aligned_are_refused(wrap):
    rows, labels = batch()
    with pytest.raises(ValueError):
        ddtas.loss(wrap(unaligned(rows)), labels)


BAD_LABELS = {
    "too few": (lambda y: y[:-1], ValueError, "labels of the anchors: expected 12, got 11"),
    "too many": (lambda y: np.concatenate([y, y]), ValueError, "expected 12, got 24"),
    "two dimensions": (lambda y: y[:, None], ValueError, "the labels must have 1 dimension, not 2"),
    "floats": (lambda y: y.astype(float), TypeError, "the labels must be integers, not float64"),
    "booleans": (lambda y: y > 2, TypeError, "the labels must be integers, not bool"),
    "text": (lambda y: y.astype(str), TypeError, "the labels must be integers"),
    "list": (lambda y: y.tolist(), TypeError, "not list"),
    "beyond int64": (lambda y: np.full(12, 2**63, np.uint64), ValueError, "label 9223372036854775808 of the labels"),
    "floats by dlpack": (lambda y: Dlpack(y.astype("f4")), TypeError, "the labels must be integers, not float32$"),
    "booleans by dlpack": (lambda y: Dlpack(y > 2), TypeError, "the labels must be integers, not bool$"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_bad_labels_are_refused(case):
    spoil, kind, message = BAD_LABELS[case]
    rows, labels = batch()
    with pytest.raises(kind, match=message):
        ddtas.loss(rows, spoil(labels))


def test_labels_with_gaps_are_converted():
    rows, labels = batch()
    wide = np.repeat(labels, 2)
    assert ddtas.loss(rows, wide[::2]).loss == ddtas.loss(rows, labels).loss


def test_references_that_do_not_fit_are_refused():
    rows, labels = batch()
    for given, message in [
        ((rows,), "references and reference_labels belong together"),
        ((None, labels), "references and reference_labels belong together"),
        ((rows[:, :3].copy(), labels), "dimension of the references: expected 5, got 3"),
        ((rows, labels[:2]), "labels of the references: expected 12, got 2"),
        ((nan(rows.copy()), labels), "row 3 of the references"),
    ]:
        with pytest.raises(ValueError, match=message):
            ddtas.loss(rows, labels, *given)
    with pytest.raises(TypeError, match="the references must be float64, as the anchors are"):
        ddtas.loss(rows.astype(float), labels, rows, labels)
    with pytest.raises(TypeError, match="the references must be float32, float16 or bfloat16, not float64"):
        ddtas.loss(rows, labels, rows.astype(float), labels)
    with pytest.raises(TypeError, match="the references must be f32, as the anchors are, not f16"):
        ddtas.loss(rows, labels, rows.astype(np.float16), labels)


def test_an_identity_that_says_nothing_is_refused():
    rows, labels = batch()
    with pytest.raises(ValueError, match="and there are no references"):
        ddtas.loss(rows, labels, identity=0)
    for rows in (rows, rows.astype(float)):
        with pytest.raises(ValueError, match="identity = reference 12 for anchor 11"):
            ddtas.loss(*[rows, np.zeros(12, int)] * 2, identity=1)
        with pytest.raises(ValueError, match="identity = reference 1 for anchor 0 is out of range"):
            ddtas.loss(*[rows, np.arange(12)] * 2, identity=1)


def test_tangents_that_do_not_fit_are_refused():
    rows, labels = batch()
    with pytest.raises(ValueError, match="tangent"):
        ddtas.threshold_gradient(rows, labels, rows[:4])
    with pytest.raises(TypeError, match="the tangent must be float32, not float64"):
        ddtas.threshold_gradient(rows, labels, rows.astype(float))


def test_recall_refuses_what_it_does_not_serve():
    rows, labels = batch()
    for ks in ((), (0, 1)):
        with pytest.raises(ValueError, match="ks = "):
            ddtas.recall_at_k(rows, labels, ks)
    for ks, kind, message in [
        ((1, -1), ValueError, "ks = -1 is out of range: 1 to"),
        ((10**30,), ValueError, "is out of range: 1 to"),
        ((1.5,), TypeError, "ks = 1.5 must be an integer"),
        (("2",), TypeError, "ks = '2' must be an integer"),
    ]:
        with pytest.raises(kind, match=message):
            ddtas.recall_at_k(rows, labels, ks)
    with pytest.raises(TypeError, match="the queries must be float32, float16, bfloat16 or float64"):
        ddtas.recall_at_k(rows.astype(int), labels)
    with pytest.raises(ValueError, match="labels of the queries"):
        ddtas.recall_at_k(rows, labels[:3])


def test_a_k_beyond_the_rows_is_answered_by_all_of_them():
    rows, labels = batch()
    got = ddtas.recall_at_k(rows, labels, (10**12, 11, np.int64(1), 2**64 - 1))
    assert list(got) == [1, 11, 10**12, 2**64 - 1]
    assert got[11] == got[10**12] == got[2**64 - 1] == 1.0 and got[1] < 1


def test_recall_says_how_many_queries_had_nothing_to_find():
    rows, labels = batch()
    labels = np.array([0, 0, 1, 1, 1, 2, 3, -1, -1, 4, 0, 5])
    got = ddtas.recall_at_k(rows, labels)
    assert (got.queries, got.without_match) == (6, 6)
    assert isinstance(got, dict) and got == dict(got)
    with pytest.warns(UserWarning, match="none of 12 rows has another row of its class"):
        got = ddtas.recall_at_k(rows, np.arange(12))
    assert (got.queries, got.without_match, got[1]) == (0, 12, 0)


BAD_SETTINGS = [
    ({"gamma": -0.1}, "gamma = -0.1 is out of range: 0 to 2"),
    ({"gamma": float("nan")}, "gamma = NaN is out of range"),
    ({"negative_ratio": 11.0}, "negative_ratio = 11"),
    ({"probe_ratio": -1.0}, "probe_ratio = -1"),
    ({"tolerance": 1.5}, "tolerance = 1.5"),
    ({"alpha": 0.0}, "alpha = 0"),
    ({"beta": float("inf")}, "beta = inf"),
    ({"lambda_pos": 3.0}, "lambda_pos = 3"),
    ({"lambda_neg": -3.0}, "lambda_neg = -3"),
    ({"mining": "hard"}, "mining = hard is out of range: none, symmetric, asms or at-asms"),
]


@pytest.mark.parametrize("changes, message", BAD_SETTINGS, ids=lambda value: str(value)[:20])
def test_settings_out_of_range_are_refused_where_they_are_made(changes, message):
    with pytest.raises(ValueError, match=message):
        ddtas.Settings(**changes)


def test_settings_of_another_type_are_refused():
    for changes, message in [
        ({"gamma": "wide"}, "^gamma must be a number, not str$"),
        ({"gamma": "0.1"}, "^gamma must be a number, not str$"),
        ({"alpha": None}, "^alpha must be a number, not NoneType$"),
        ({"mining": 3}, "^mining must be a string, not int$"),
    ]:
        with pytest.raises(TypeError, match=message):
            ddtas.Settings(**changes)
    assert ddtas.Settings(gamma=np.float32(0.25), alpha=30).gamma == 0.25
    rows, labels = batch()
    for call in (lambda: ddtas.loss(rows, labels, settings="asms"), lambda: ddtas.threshold_gradient(rows, labels, rows, settings="asms")):
        with pytest.raises(TypeError, match="^settings must be a ddtas.Settings, not str$"):
            call()


def test_the_source_folder_says_what_it_lacks():
    source = Path(__file__).parents[1]
    # Isolated, since Python would otherwise search the current folder anyway.
    code = f"import sys; sys.path.insert(0, {str(source)!r}); import ddtas"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ") and "without the compiled module: run `pip install .`" in last


def test_unchecked_rows_are_never_a_crash():
    rows, labels = batch()
    for bad in (nan(rows.copy()), 1e30 * rows, 0 * rows):
        ddtas.loss(bad, labels, check=False)
        ddtas.threshold_gradient(bad, labels, rows, check=False)


def test_what_torch_is_needed_for_says_so_in_one_line():
    code = "import sys; sys.modules['torch'] = None; import ddtas; import ddtas.torch"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: ddtas.torch needs PyTorch 2.11 or newer: run `pip install torch`")
    assert "During handling" not in done.stderr


def test_help_explains_every_field_of_an_output_and_every_setting():
    fields = [field for field in vars(ddtas.LossOutput) if not field.startswith("_")]
    assert len(fields) == 18
    for field in fields:
        assert vars(ddtas.LossOutput)[field].__doc__, field
    for field in dataclasses.fields(ddtas.Settings):
        assert f"\n        {field.name}: " in ddtas.Settings.__doc__, field.name
