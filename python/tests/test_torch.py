"""`ddtas.torch.SoftContrastiveLoss`: compared with the dense loss by autograd, and as a module in others."""

import copy
import io
import pickle
import struct
import sys
import warnings
from pathlib import Path
from unittest import mock

import formula
import numpy as np
import pytest
from formula import close, unit_rows

torch = pytest.importorskip("torch", reason="torch is not installed: its tests do not run")

import ddtas  # noqa: E402
from ddtas import _ddtas  # noqa: E402
from ddtas.torch import SoftContrastiveLoss, evaluate, recall_at_k  # noqa: E402
from ddtas.torch.engine import Engine  # noqa: E402
from torch.autograd.gradcheck import GradcheckError  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2] / "benches/device"))
import dense  # noqa: E402


def batch(count=40, dim=9, seed=0, dtype=torch.float32, length=3.0):
    """Rows that are not of unit length, and labels."""
    rows, labels = unit_rows(count, dim, seed)
    return torch.tensor(length * rows, dtype=dtype), torch.tensor(labels)


def dense_loss(embeddings, labels):
    return dense.loss(torch.nn.functional.normalize(embeddings, dim=1), labels)


@pytest.mark.parametrize("shape", [(2, 3), (40, 9), (257, 130)], ids=str)
def test_loss_and_gradient_are_those_of_dense_torch(shape):
    embeddings, labels = batch(*shape)
    mine, theirs = embeddings.clone().requires_grad_(), embeddings.double().requires_grad_()
    loss = SoftContrastiveLoss()(mine, labels)
    want = dense_loss(theirs, labels)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5, abs=1e-7)
    (3 * loss).backward()
    (3 * want).backward()
    close(mine.grad, theirs.grad, 1e-5)


def test_gradients_pass_gradcheck_in_float64():
    embeddings, labels = batch(14, 4, dtype=torch.float64)
    references, reference_labels = batch(11, 4, seed=1, dtype=torch.float64)
    lambdas = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.6, 0.5)]
    given = [embeddings.requires_grad_(), references.requires_grad_(), *lambdas]

    def square(rows, lambda_pos, lambda_neg):
        loss = SoftContrastiveLoss(lambda_pos=lambda_pos, lambda_neg=lambda_neg)
        value = loss(rows, labels)
        assert loss.statistics["active"] > 5
        return value

    def rectangular(rows, others, lambda_pos, lambda_neg):
        loss = SoftContrastiveLoss(lambda_pos=lambda_pos, lambda_neg=lambda_neg)
        return loss(rows, labels, ref_emb=others, ref_labels=reference_labels)

    assert torch.autograd.gradcheck(square, (given[0], *lambdas))
    assert torch.autograd.gradcheck(rectangular, given)


def test_gradcheck_catches_a_wrong_gradient():
    embeddings, labels = batch(14, 4, dtype=torch.float64)
    loss = SoftContrastiveLoss()

    def wrong(rows):
        value = loss(rows, labels)
        return value + 1e-2 * value.detach() * rows.sum().detach()

    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(wrong, (embeddings.requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_embeddings_get_a_gradient_of_their_type(dtype):
    embeddings, labels = batch(60, 32, dtype=dtype)
    narrow, wide = embeddings.clone().requires_grad_(), embeddings.double().requires_grad_()
    # The rows rounded to the type, since rounding decides which pairs near a threshold are mined.
    rounded = torch.nn.functional.normalize(embeddings.float(), dim=1).to(dtype)
    loss = SoftContrastiveLoss()(narrow, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(dense.loss(rounded.double(), labels).item(), rel=1e-4)
    loss.backward()
    assert narrow.grad.dtype == dtype
    dense_loss(wide, labels).backward()
    cosine = torch.nn.functional.cosine_similarity(narrow.grad.double().flatten(), wide.grad.flatten(), dim=0)
    assert cosine > 0.98


def test_references_get_a_gradient_when_they_ask_for_one():
    (embeddings, labels), (references, reference_labels) = batch(20, 6), batch(33, 6, seed=1)
    rows, others = (torch.nn.functional.normalize(tensor, dim=1) for tensor in (embeddings, references))
    rows.requires_grad_()
    loss = SoftContrastiveLoss(normalize_embeddings=False)
    loss(rows, labels, ref_emb=others, ref_labels=reference_labels).backward()
    want = formula.expected(*[tensor.detach().numpy() for tensor in (rows, labels, others, reference_labels)])
    close(rows.grad, want.gradient, 1e-5)
    assert others.grad is None
    others.requires_grad_()
    loss(rows, labels, ref_emb=others, ref_labels=reference_labels).backward()
    close(others.grad, want.reference_gradient, 1e-5)


def test_a_batch_that_is_its_own_reference_is_the_square_form():
    embeddings, labels = batch()
    loss = SoftContrastiveLoss()
    assert loss(embeddings, labels, ref_emb=embeddings, ref_labels=labels) == loss(embeddings, labels)


def test_references_may_have_other_labels_and_types_than_the_anchors():
    (embeddings, labels), (references, reference_labels) = batch(), batch(33, seed=1)
    loss = SoftContrastiveLoss()
    others = labels.roll(1)
    want = loss(embeddings, labels, ref_emb=embeddings.clone(), ref_labels=others)
    assert loss(embeddings, labels, ref_emb=embeddings, ref_labels=others) == want != loss(embeddings, labels)
    want = loss(embeddings, labels, ref_emb=references, ref_labels=reference_labels)
    assert loss(embeddings, labels.int(), ref_emb=references, ref_labels=reference_labels.to(torch.int8)) == want
    narrow = embeddings.bfloat16().requires_grad_()
    value = loss(narrow, labels, ref_emb=references, ref_labels=reference_labels)
    value.backward()
    assert value == loss(narrow.float(), labels, ref_emb=references, ref_labels=reference_labels) > 0
    assert narrow.grad.dtype == torch.bfloat16 and narrow.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_tensors_are_read_where_they_lie(dtype):
    embeddings, _ = batch(dtype=dtype)
    assert _ddtas.address_of(embeddings) == embeddings.data_ptr()
    assert _ddtas.address_of(embeddings[5:]) == embeddings[5:].data_ptr()


def test_the_gradient_is_handed_over_without_a_copy():
    embeddings, labels = batch(length=1.0)
    rows = embeddings.numpy()
    output = ddtas.loss(rows, labels)
    assert torch.from_numpy(output.gradient).data_ptr() == output.gradient.ctypes.data


def test_functional_calls_take_tensors():
    embeddings, labels = batch(length=1.0)
    want = ddtas.loss(embeddings.numpy(), labels.numpy())
    got = ddtas.loss(embeddings, labels.int())
    assert got.loss == want.loss
    np.testing.assert_array_equal(got.gradient, want.gradient)


def test_tensors_with_gaps_are_served():
    embeddings, labels = batch()
    loss = SoftContrastiveLoss()
    want = loss(embeddings, labels)
    assert loss(embeddings.T.contiguous().T, labels) == want
    assert loss(torch.repeat_interleave(embeddings, 2, dim=0)[::2], torch.repeat_interleave(labels, 2)[::2]) == want


def test_a_threshold_that_is_a_parameter_learns():
    embeddings, labels = batch(noise_free := 60, 9)
    threshold = torch.nn.Parameter(torch.tensor(0.5))
    loss = SoftContrastiveLoss(lambda_pos=threshold, lambda_neg=threshold)
    assert len(list(loss.parameters())) == 1 and len(labels) == noise_free
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.01)
    loss(embeddings, labels).backward()
    rows = torch.nn.functional.normalize(embeddings, dim=1).numpy()
    half = ddtas.Settings(lambda_pos=0.5, lambda_neg=0.5)
    want = formula.expected(rows, labels.numpy(), settings=half)
    assert threshold.grad.item() == pytest.approx(want.dloss_dlambda_pos + want.dloss_dlambda_neg, rel=1e-4)
    optimizer.step()
    assert loss(embeddings, labels).item() != pytest.approx(want.loss, rel=1e-5)
    with torch.no_grad():
        threshold.fill_(5.0)
    with pytest.raises(ValueError, match="lambda_pos = 5 is out of range"):
        loss(embeddings, labels)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_a_threshold_of_one_element_may_have_any_shape(shape):
    embeddings, labels = batch()
    grads = []
    for lambdas in [torch.nn.Parameter(torch.full(shape, 0.6)), torch.nn.Parameter(torch.tensor(0.6))]:
        SoftContrastiveLoss(lambda_pos=lambdas, lambda_neg=lambdas)(embeddings, labels).backward()
        grads.append(lambdas.grad)
    assert grads[0].shape == shape and grads[0].item() == grads[1].item() != 0


@pytest.mark.parametrize("scale, dtype", [
    (1e30, torch.float32), (1e-30, torch.float32), (1e37, torch.float32), (3e4, torch.float16), (1e-6, torch.float16),
    (1e30, torch.bfloat16), (1e200, torch.float64), (1e-200, torch.float64),
], ids=str)
def test_rows_of_any_length_are_normalised(scale, dtype):
    embeddings, labels = batch(60, 32, length=1.0, dtype=torch.float64)
    embeddings = (scale * embeddings).to(dtype).requires_grad_()
    value = SoftContrastiveLoss()(embeddings, labels)
    value.backward()
    # The same rows in float64, of a length whose square does not overflow; the gradient is inversely proportional to the length.
    plain = (embeddings.detach().double() / scale).requires_grad_()
    want = dense_loss(plain, labels)
    want.backward()
    narrow = dtype in (torch.float16, torch.bfloat16)
    assert value.item() == pytest.approx(want.item(), rel=2e-2 if narrow else 1e-5)
    got = embeddings.grad.double() * scale
    if dtype == torch.float16:
        return  # its gradient would be beyond the type's range
    cosine = torch.nn.functional.cosine_similarity(got.flatten(), plain.grad.flatten(), dim=0)
    assert cosine > (0.98 if narrow else 0.9999999)
    if not narrow:
        close(got, plain.grad, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_loss_of_nothing_is_zero_and_has_a_gradient(dtype):
    embeddings, labels = batch(dtype=dtype)
    threshold = torch.nn.Parameter(torch.tensor([0.6]))
    loss = SoftContrastiveLoss(lambda_pos=threshold)
    for rows, references in [(0, None), (0, 40), (40, 0)]:
        embeddings.grad = threshold.grad = None
        given = [embeddings.requires_grad_()[:rows], labels[:rows]]
        if references is not None:
            given += [None, embeddings[:references].clone(), labels[:references]]
        value = loss(*given)
        assert value.shape == () and value == 0
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        value.backward()
        assert embeddings.grad.shape == embeddings.shape and not embeddings.grad.any()
        assert threshold.grad.shape == (1,) and not threshold.grad.any()
        assert loss.statistics["active"] == loss.statistics["positives"] == 0
        assert loss.statistics["ignored"] == (labels[:rows] < 0).sum()


@pytest.mark.parametrize(
    "mining, want", [("none", (np.inf, np.inf)), ("symmetric", (0.2, 0.2)), ("asms", (0.2, 0.1)), ("at-asms", (0.2, 0.1))]
)
def test_a_loss_of_nothing_has_the_tolerances_of_its_mining(mining, want):
    embeddings, labels = batch()
    loss = SoftContrastiveLoss(gamma=0.2, negative_ratio=0.5, mining=mining)
    loss(embeddings[:0], labels[:0])
    assert (loss.statistics["gamma_pos"], loss.statistics["gamma_neg"]) == pytest.approx(want)


def test_ignored_rows_and_collapse_are_counted_and_warned_of_once():
    embeddings, labels = batch()
    loss = SoftContrastiveLoss()
    with pytest.warns(UserWarning, match="rows with a negative label: 4;") as warned:
        loss(embeddings, labels)
        loss(embeddings, labels)
    assert len(warned) == 1 and warned[0].filename == __file__
    assert loss.statistics["ignored"] == 4 and 1e-4 < loss.statistics["spread"] <= 2
    labels = torch.arange(40) % 8
    collapsed = torch.ones(40, 9) + 1e-4 * embeddings
    with pytest.warns(UserWarning, match="collapsed: all rows are nearly equal") as warned:
        assert SoftContrastiveLoss(mining="none")(torch.ones(40, 9), labels) == 0
        loss(collapsed, labels)
        loss(collapsed, labels)
    assert len(warned) == 2, "once for each module"
    assert loss.statistics["ignored"] == 0 and abs(loss.statistics["spread"]) < 1e-4


def test_a_compiled_call_warns_when_its_statistics_are_read():
    embeddings, labels = batch()
    loss = SoftContrastiveLoss()
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(embeddings, labels)
    with pytest.warns(UserWarning, match="rows with a negative label: 4;"):
        loss.statistics


def test_a_batch_of_one_kind_of_pairs_is_warned_of_once():
    embeddings, labels = batch()
    for one_kind, message in [(torch.arange(40), "no two different rows of one class"), (labels * 0, "all rows of the batch")]:
        loss = SoftContrastiveLoss()
        with pytest.warns(UserWarning, match=message) as warned:
            assert loss(embeddings, one_kind) == loss(embeddings, one_kind) == 0
        assert len(warned) == 1 and warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # One row, no rows, and a memory without rows of the classes in the batch.
        SoftContrastiveLoss()(embeddings[:1], torch.arange(1))
        SoftContrastiveLoss()(embeddings[:0], labels[:0])
        unit = torch.nn.functional.normalize(embeddings)
        SoftContrastiveLoss().loss_of_unit_rows(unit[:3], torch.arange(3), unit[3:6], torch.arange(3, 6))
    for labels_of_three, message in [((3, 4, 5), "^no anchor has a pair with a reference of its class"), ((0, 0, 0), "^all references are")]:
        with pytest.warns(UserWarning, match=message):
            SoftContrastiveLoss()(
                embeddings[:3], torch.zeros(3).long(), ref_emb=embeddings[3:6], ref_labels=torch.tensor(labels_of_three)
            )


def test_ignored_references_are_warned_of_once():
    embeddings, labels = batch()
    others, other_labels = batch(seed=1)
    loss = SoftContrastiveLoss()
    with pytest.warns(UserWarning) as warned:
        for _ in range(2):
            loss(embeddings, labels.abs(), ref_emb=others, ref_labels=other_labels.abs().index_fill(0, torch.arange(3), -1))
    assert [str(warning.message) for warning in warned] == ["references with a negative label: 3; they are in no pair"]


def test_unchecked_rows_that_are_not_finite_are_not_taken_for_a_bad_sampler():
    embeddings, labels = batch()
    loss = SoftContrastiveLoss(check=False)
    with pytest.warns(UserWarning, match="^rows that are not finite: 40; they are in no pair, and their gradient is NaN$"):
        loss(embeddings * torch.inf, labels.abs())
    with pytest.warns(UserWarning, match="no two different rows of one class"):
        loss(embeddings, torch.arange(40))


def test_arguments_of_the_constructor_alone_cannot_be_set_later():
    loss = SoftContrastiveLoss()
    for name in ("check", "threads", "workspace_budget", "allow_tf32", "group", "uneven", "gradient", "gather_references"):
        with pytest.raises(AttributeError, match=f"{name} is an argument of SoftContrastiveLoss and cannot be changed later"):
            setattr(loss, name, True)
    loss.check()

    class Grouped(SoftContrastiveLoss):
        """Has attributes of these names for something else."""

    grouped = Grouped()
    grouped.group = "birds"
    with pytest.raises(AttributeError, match="check is an argument"):
        grouped.check = False
    grouped.check()


def test_thresholds_that_are_tensors_are_saved_and_loaded():
    tensor, parameter = torch.tensor(0.4, dtype=torch.float64), torch.nn.Parameter(torch.tensor(0.3))
    saved = SoftContrastiveLoss(lambda_pos=tensor, lambda_neg=parameter)
    tensor.fill_(0.65)
    state = saved.state_dict()
    assert state.keys() == {"lambda_pos", "lambda_neg"} and not SoftContrastiveLoss().state_dict()
    own = torch.tensor(0.1)
    again = SoftContrastiveLoss(lambda_pos=own, lambda_neg=torch.nn.Parameter(torch.tensor(0.2)))
    again.load_state_dict(state)
    assert again.lambda_pos is own and own == torch.tensor(0.65) and again.lambda_neg == torch.tensor(0.3)
    plain = SoftContrastiveLoss(lambda_pos=0.5)
    plain.load_state_dict({"lambda_pos": state["lambda_pos"]})
    assert plain.lambda_pos == plain.settings.lambda_pos == 0.65
    with pytest.raises(RuntimeError, match='Missing key.*"lambda_pos"'):
        again.load_state_dict({"lambda_neg": state["lambda_neg"]})
    with pytest.raises(ValueError, match="lambda_pos = 3 is out of range"):
        plain.load_state_dict({"lambda_pos": torch.tensor(3.0)})
    both = SoftContrastiveLoss(lambda_pos=torch.tensor(0.4), lambda_neg=torch.tensor(0.4))
    with pytest.raises(ValueError, match="lambda_neg = 3 is out of range"):
        both.load_state_dict({"lambda_pos": torch.tensor(0.5), "lambda_neg": torch.tensor(3.0)})
    assert both.lambda_pos == torch.tensor(0.4), "nothing was changed"
    transient = SoftContrastiveLoss(lambda_pos=torch.nn.Buffer(torch.tensor(0.4), persistent=False))
    assert not transient.state_dict() and list(transient.buffers())
    computed = SoftContrastiveLoss(lambda_pos=torch.sigmoid(torch.tensor(0.1, requires_grad=True)))
    assert not computed.state_dict(), "what it is computed from is saved elsewhere"


def test_thresholds_that_are_tensors_are_buffers():
    shared = torch.tensor(0.4, dtype=torch.float64)
    loss = SoftContrastiveLoss(lambda_pos=shared, lambda_neg=shared)
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), loss).to(torch.float16)
    # The averaged copy is kept in step, and from_pretrained of transformers trains what is no buffer.
    averaged = torch.optim.swa_utils.AveragedModel(module)
    assert loss.lambda_pos is loss.lambda_neg is shared and shared.dtype == torch.float64, "others change this tensor"
    shared.fill_(0.6)
    averaged.update_parameters(module)
    assert averaged.module[1].settings.lambda_pos == averaged.module[1].settings.lambda_neg == 0.6
    loss.lambda_pos = 0.5
    assert list(loss.state_dict()) == ["lambda_neg"] and loss.settings.lambda_pos == 0.5
    loss.lambda_pos, loss.lambda_neg = torch.nn.Parameter(torch.tensor(0.3)), torch.ones(()).requires_grad_() * 0.2
    assert list(loss.state_dict()) == ["lambda_pos"] and not list(loss.buffers())
    kept, to = SoftContrastiveLoss(lambda_pos=shared), torch.Tensor.to

    def without_float64(tensor, *given):
        if tensor.dtype == torch.float64 and torch.float32 not in given:
            raise TypeError("as on MPS")
        return to(tensor, *given)

    with mock.patch.object(torch.Tensor, "to", without_float64):
        assert kept.to("cpu").lambda_pos is kept.to(torch.float32).lambda_pos is shared
    moved = SoftContrastiveLoss(lambda_pos=torch.tensor(0.4)).to("meta").to_empty(device="cpu")
    moved.load_state_dict({"lambda_pos": torch.tensor([0.7])})
    on_meta = SoftContrastiveLoss(lambda_pos=torch.empty((), device="meta", requires_grad=True))
    on_meta.load_state_dict({"lambda_pos": torch.tensor([0.75], dtype=torch.float16)})
    assert moved.lambda_pos == torch.tensor(0.7) and on_meta.lambda_pos == 0.75
    assert on_meta.lambda_pos.dtype == torch.float32 and on_meta.to("meta").to_empty(device="cpu").lambda_pos.requires_grad
    other = copy.copy(moved)
    other.lambda_pos = 0.5
    assert moved.lambda_pos == torch.tensor(0.7)
    # As an earlier version pickled it.
    older = SoftContrastiveLoss()
    older.__dict__["lambda_pos"] = torch.tensor(0.4)
    assert list(copy.deepcopy(older).state_dict()) == ["lambda_pos"]


def test_warnings_ask_no_traced_labels():
    embeddings, labels = batch()
    loss = SoftContrastiveLoss()
    given = (embeddings, labels.abs(), embeddings + 1, labels.abs())
    want = loss(embeddings, labels.abs(), ref_emb=embeddings + 1, ref_labels=labels.abs())
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda a, b, c, d: loss(a, b, ref_emb=c, ref_labels=d))(*given)
    assert traced(*given) == want
    each = torch.func.vmap(lambda a, b: loss(a, b, ref_emb=given[2], ref_labels=b))
    assert torch.equal(each(torch.stack([embeddings] * 2), torch.stack([given[1]] * 2)), torch.stack([want] * 2))


def test_the_world_is_this_process_without_others(monkeypatch):
    embeddings, labels = batch()
    loss, alone = SoftContrastiveLoss(group="world"), SoftContrastiveLoss()
    assert loss(embeddings, labels) == alone(embeddings, labels) > 0 and loss.ranks is None
    assert "group=world" in repr(loss) and "group" not in repr(alone)
    torch._dynamo.reset()
    compiled = torch.compile(pickle.loads(pickle.dumps(loss)), backend="aot_eager")
    assert compiled(embeddings, labels) == alone(embeddings, labels)
    with pytest.raises(Exception, match="make the loss after init_process_group"):
        torch.compile(SoftContrastiveLoss(group="world"), fullgraph=True)(embeddings, labels)
    for alone_too in ("", "0", "1", " 1 "):
        monkeypatch.setenv("WORLD_SIZE", alone_too)
        assert loss(embeddings, labels) == alone(embeddings, labels)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match='group="world" of one of several processes: call torch.distributed.init_process_group'):
        loss(embeddings, labels)


def test_settings_change_between_calls():
    embeddings, labels = batch(200, 16)
    for name, value in [
        ("mining", "symmetric"), ("gamma", 0.3), ("negative_ratio", 2.0), ("probe_ratio", 5.0), ("tolerance", 0.1),
        ("alpha", 5.0), ("beta", 5.0), ("lambda_pos", 0.3), ("lambda_neg", 0.3),
    ]:  # fmt: skip
        loss, want = SoftContrastiveLoss(), SoftContrastiveLoss(**{name: value})
        before = loss(embeddings, labels)
        setattr(loss, name, value)
        assert getattr(loss, name) == value and repr(loss) == repr(want) and loss.settings == want.settings
        assert loss(embeddings, labels) == want(embeddings, labels) != before
    with pytest.raises(ValueError, match="alpha = 0 is out of range"):
        loss.alpha = 0
    learned = torch.tensor(20.0, requires_grad=True)
    for name in ("alpha", "beta", "gamma", "negative_ratio", "probe_ratio", "tolerance"):
        for refused in (lambda: SoftContrastiveLoss(**{name: learned}), lambda: setattr(loss, name, learned)):
            with pytest.raises(TypeError, match=f"{name} must be a number: it gets no gradient"):
                refused()
    assert loss.alpha == 40


def test_statistics_tell_what_was_mined():
    embeddings, labels = batch(length=1.0)
    loss = SoftContrastiveLoss()
    assert loss.statistics == {}
    loss(embeddings, labels)
    output = ddtas.loss(embeddings / embeddings.norm(dim=1, keepdim=True), labels)
    assert loss.statistics["active"] == output.active > 0
    assert (loss.statistics["positives"], loss.statistics["negatives"]) == output.mined
    means = loss.statistics["mean_pos"], loss.statistics["mean_neg"]
    assert loss.statistics["spread"] == 1 - min(means) and means[0] != means[1]


def test_what_does_not_fit_is_refused():
    embeddings, labels = batch()
    loss = SoftContrastiveLoss()
    for call, kind, message in [
        (lambda: loss(embeddings, labels, (labels,) * 4), ValueError, "take the miner out"),
        (lambda: loss(embeddings, labels[:3]), ValueError, "labels of the anchors: expected 40, got 3"),
        (lambda: loss(embeddings, labels.float()), TypeError, "the labels must be integers"),
        (lambda: loss(embeddings[0], labels[:1]), ValueError, "2 dimensions"),
        (lambda: loss(embeddings[:, :0], labels), ValueError, "the anchors are empty"),
        (lambda: loss(embeddings, labels.bool()), TypeError, r"the labels must be integers, not bool: convert them by long\(\)$"),
        (lambda: loss(embeddings, labels, ref_emb=embeddings.clone(), ref_labels=labels.float()), TypeError, "not float32: convert"),
        (lambda: loss(embeddings, labels[:, None]), ValueError, "the labels must have 1 dimension, not 2"),
        (lambda: recall_at_k(embeddings, labels > 1), TypeError, "the labels of the queries must be integers, not bool: convert"),
        (lambda: SoftContrastiveLoss(lambda_pos=torch.zeros(2)), ValueError, r"must have one element, not the shape \[2\]"),
        (lambda: SoftContrastiveLoss(lambda_pos="0.7"), TypeError, "must be numbers or tensors, not str"),
        (lambda: SoftContrastiveLoss(gamma="0.1"), TypeError, "^gamma must be a number, not str$"),
        (lambda: loss(embeddings, labels, ref_emb=embeddings.clone()), ValueError, "belong together"),
        (lambda: loss(embeddings, labels, ref_labels=labels), ValueError, "belong together"),
        (lambda: loss(embeddings * torch.nan, labels), ValueError, "row 0 of the anchors holds a value that is not"),
        (lambda: loss(embeddings * 0, labels), ValueError, "^row 0 of the anchors is all zeros: it has no direction$"),
        (lambda: loss(embeddings.double() * 0, labels), ValueError, "^row 0 of the anchors is all zeros: it has no direction$"),
        (lambda: loss(embeddings.detach().numpy(), labels), TypeError, "^the anchors must be a torch.Tensor, not ndarray$"),
        (lambda: loss(embeddings, labels.tolist()), TypeError, "^the labels must be a torch.Tensor, not list$"),
        (lambda: evaluate(embeddings, labels.tolist()), TypeError, "^the labels of the queries must be a torch.Tensor, not list$"),
        (lambda: evaluate(embeddings.detach().numpy(), labels), TypeError, "^the queries must be a torch.Tensor, not ndarray$"),
        (lambda: evaluate(embeddings * 0, labels), ValueError, r"^row \d+ of the queries is all zeros: it has no direction$"),
        (lambda: evaluate(embeddings * torch.nan, labels), ValueError, r"^row \d+ of the queries holds a value that is not"),
        (lambda: evaluate(embeddings.int(), labels), TypeError, "must be float32, float16, bfloat16 or float64, not int32$"),
        (lambda: SoftContrastiveLoss(normalize_embeddings=False)(embeddings, labels), ValueError, "normalise"),
        (lambda: SoftContrastiveLoss(gamma=9.0), ValueError, "gamma = 9"),
        (lambda: SoftContrastiveLoss(threads=0), ValueError, "threads = 0"),
    ]:
        with pytest.raises(kind, match=message):
            call()


def test_tensors_without_memory_give_one_without_memory():
    embeddings, labels = batch()
    loss = SoftContrastiveLoss()(embeddings.to("meta").requires_grad_(), labels.to("meta"))
    assert loss.is_meta and loss.shape == () and loss.dtype == torch.float32


@pytest.mark.skipif(ddtas.has_cuda, reason="this build serves the GPU")
def test_a_build_for_the_cpu_says_how_to_get_the_gpu():
    from ddtas.torch import operator

    embeddings, labels = batch()
    numbers = (0.1, 0.1, 0.1, 0.5, 40.0, 2.0, 0.7, 0.7)
    with pytest.raises(RuntimeError, match="serves the CPU only: install it with"):
        # torch calls this for GPU tensors.
        operator._on_gpu(operator.Call(embeddings, labels, *[None] * 5, "at-asms", numbers, True, False, 1, 0))


def test_unchecked_rows_pass_through():
    embeddings, labels = batch()
    embeddings[3] = torch.nan
    SoftContrastiveLoss(check=False)(embeddings.requires_grad_(), labels).backward()
    assert embeddings.grad.shape == embeddings.shape


def test_a_module_can_be_copied_pickled_and_saved():
    embeddings, labels = batch()
    loss = SoftContrastiveLoss(gamma=0.2, lambda_pos=torch.nn.Parameter(torch.tensor(0.6)), threads=3)
    want = loss(embeddings, labels)
    for again in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert again(embeddings, labels) == want and again._engine.host.threads == 3
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    other = SoftContrastiveLoss(gamma=0.2, lambda_pos=torch.nn.Parameter(torch.tensor(0.1)))
    other.load_state_dict(torch.load(file))
    assert other(embeddings, labels) == want
    assert "gamma=0.2" in repr(loss)
    with torch.no_grad():
        loss.lambda_pos.fill_(0.5)
    loss.lambda_neg = 0.3
    assert "lambda_pos=0.5, lambda_neg=0.3" in repr(loss)


def test_the_graph_can_be_walked_twice_and_not_differentiated_twice():
    embeddings, labels = batch()
    loss = SoftContrastiveLoss()(embeddings.requires_grad_(), labels)
    loss.backward(retain_graph=True)
    once = embeddings.grad.clone()
    loss.backward()
    torch.testing.assert_close(embeddings.grad, 2 * once)
    (gradient,) = torch.autograd.grad(SoftContrastiveLoss()(embeddings, labels), embeddings, create_graph=True)
    with pytest.raises(RuntimeError, match="once, not twice"):
        gradient.sum().backward()
    # Nor with respect to a threshold, of rows that are constants.
    threshold = torch.tensor(0.6, requires_grad=True)
    value = SoftContrastiveLoss(lambda_neg=threshold)(embeddings.detach(), labels)
    (gradient,) = torch.autograd.grad(value, threshold, create_graph=True)
    with pytest.raises(RuntimeError, match="once, not twice"):
        gradient.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_of_the_gradient_takes_a_loss_that_a_parameter_weighs(dtype):
    embeddings, labels = batch(dtype=dtype)
    weight = torch.tensor(2.0, requires_grad=True)
    loss = weight * SoftContrastiveLoss()(embeddings.requires_grad_(), labels)
    (plain,) = torch.autograd.grad(loss, embeddings, retain_graph=True)
    (gradient,) = torch.autograd.grad(loss, embeddings, create_graph=True)
    assert gradient.dtype == dtype and gradient.any()
    assert torch.equal(gradient, plain)


def test_autocast_and_compile_leave_the_loss_alone():
    embeddings, labels = batch(60, 32)
    network, loss = torch.nn.Linear(32, 16), SoftContrastiveLoss()
    want = loss(network(embeddings), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss(network(embeddings), labels).item() == pytest.approx(want.item(), rel=0.1)
    compiled = torch.compile(lambda rows: loss(network(rows), labels), backend="eager")
    assert compiled(embeddings).item() == pytest.approx(want.item(), rel=1e-6)


def test_recall_of_tensors_is_that_of_arrays():
    rows, labels = unit_rows(60, 7, seed=4)
    rows = rows.astype(np.float32)
    got = recall_at_k(torch.tensor(rows, requires_grad=True), torch.tensor(labels), (1, 4))
    assert got == ddtas.recall_at_k(rows, labels, (1, 4))
    assert 0 < got[1] < got[4]
    apart, marks = torch.tensor(rows).repeat(1, 2)[:, :7], torch.tensor(labels).repeat_interleave(2)[::2]
    assert not apart.is_contiguous() and not marks.is_contiguous()
    assert recall_at_k(apart, marks, (1, 4)) == got
    assert evaluate(apart, marks, apart, marks, (1, 4), identity=0).recall == got
    assert evaluate(apart.double() * 7, marks).recall == recall_at_k(apart.double() * 7, marks) == evaluate(apart, marks).recall
    assert ddtas.evaluate(rows.astype(float), labels, rows.astype(float), labels, (1, 4), identity=0).recall == got
    assert ddtas.recall_at_k(rows.astype(float), labels, (1, 4)) == got


def test_what_a_gpu_has_written_is_read_as_the_processor_s_numbers():
    from ddtas.torch.engine import NOT_FINITE
    from ddtas.torch.operator import STATISTICS

    engine = Engine()
    numbers, counts = [1.5, -0.5, 0.25, 0.6, 0.1, 0.1, 0.01], [5, 6, 7, 8]
    labels = torch.tensor([0, -1, NOT_FINITE, -(2**63)])

    def written(square_sum, anchor, reference):
        # ddtas_loss_scalars of include/ddtas.h, which the compiled module reads.
        scalars = struct.pack("7d4QdIIQQ", *numbers, *counts, square_sum, anchor, reference, 20, 30)
        # The operator allocates as many.
        assert len(scalars) == 8 * len(STATISTICS)
        return torch.frombuffer(bytearray(scalars), dtype=torch.float64), labels

    engine.last = written(1.0, 2**32 - 1, 2**32 - 1)
    assert engine.read_statistics() == [*numbers, *counts, 20, 30, 2, 1]
    for found, message in [
        ((4.0, 2**32 - 1, 17), "row 17 of the references has L2 norm 2.000000, not 1"),
        ((torch.nan, 3, 2**32 - 1), "row 3 of the anchors holds a value that is not finite"),
        ((0.0, 3, 17), "row 3 of the anchors is all zeros: it has no direction"),
    ]:
        engine.last = written(*found)
        with pytest.raises(ValueError, match=message):
            engine.read_statistics()


def test_tf32_is_asked_of_the_gpu_alone(monkeypatch):
    embeddings, labels = batch(300, 32)
    fast = SoftContrastiveLoss(allow_tf32=True)
    assert fast(embeddings, labels) == SoftContrastiveLoss()(embeddings, labels) > 0
    asked = []
    monkeypatch.setattr(_ddtas, "has_cuda", True)
    monkeypatch.setattr(_ddtas, "CudaContext", lambda *given: asked.append(given), raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    for module in (fast, pickle.loads(pickle.dumps(fast)), SoftContrastiveLoss(workspace_budget=7)):
        module._engine.on_gpu(embeddings)
    assert asked == [(None, True), (None, True), (7, False)]


def test_rows_on_a_gpu_are_computed_on_torch_s_current_stream_there(monkeypatch):
    monkeypatch.setattr(_ddtas, "has_cuda", True)
    monkeypatch.setattr(_ddtas, "CudaContext", lambda *given: object(), raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 100 + device, raising=False)
    engine = Engine()
    found = [engine.on_gpu(mock.Mock(get_device=lambda: device)) for device in (0, 3)]
    assert [place for _, place in found] == [(0, 100), (3, 103)]
    assert found[0][0] is found[1][0], "the workspaces are kept"


def test_a_budget_changes_no_bit():
    embeddings, labels = batch(300, 32)
    small = SoftContrastiveLoss(workspace_budget=0)
    assert small(embeddings, labels) == SoftContrastiveLoss()(embeddings, labels) > 0
    assert pickle.loads(pickle.dumps(small))._engine.budget == 0
    with pytest.raises(ValueError, match='check must be True, False or "wait", not 2'):
        SoftContrastiveLoss(check=2)
    bad = embeddings.clone()
    bad[7] = 0
    for check in (True, "wait"):
        with pytest.raises(ValueError, match="row 7 of the anchors"):
            SoftContrastiveLoss(check=check)(bad, labels)
    small.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_searches_normalise_rows_of_any_length(dtype):
    rows, labels = batch(150, length=1.0)
    # Scaling by powers of 2 changes only the length.
    rows = rows.to(dtype)
    longer = rows * 2.0 ** (torch.arange(150) % 8 - 3).to(dtype)[:, None]
    want = evaluate(rows, labels)
    assert 0.1 < want.map_at_r < 0.99
    for found in (evaluate(longer, labels), evaluate(longer, labels, longer, labels, identity=0)):
        assert found.map_at_r == pytest.approx(want.map_at_r, abs=0.01) and found.recall == pytest.approx(want.recall, abs=0.02)
    assert recall_at_k(longer, labels) == evaluate(longer, labels).recall
