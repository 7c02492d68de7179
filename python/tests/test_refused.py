"""Tensors that the operator, the loss and the memory refuse, so that none is read beyond its memory or as another type."""

import ddtas
import numpy as np
import pytest
from formula import unit_rows

torch = pytest.importorskip("torch", reason="torch is not installed: its tests do not run")

import torch.autograd.forward_ad as forward_ad  # noqa: E402
from ddtas.torch import CrossBatchMemory, SoftContrastiveLoss, evaluate, recall_at_k  # noqa: E402
from ddtas.torch import operator, parts  # noqa: E402

DIM = 8
NUMBERS = [0.1, 0.1, 0.1, 0.5, 40.0, 2.0, 0.7, 0.7]
BEYOND = torch.tensor([0, 0, 2**63 + 1], dtype=torch.uint64)


def batch(count=12, seed=0):
    rows, labels = unit_rows(count, DIM, seed)
    return torch.tensor(rows, dtype=torch.float32), torch.tensor(labels)


def call(rows, labels, references=None, reference_labels=None, identity=None):
    given = (rows, labels, references, reference_labels, identity, None, None)
    return torch.ops.ddtas.loss(*given, "at-asms", NUMBERS, True, references is not None, 1, 0)


ROWS, LABELS = batch()
OTHERS, OTHER_LABELS = batch(23, seed=1)
NOBODY = torch.full((12,), -1)
REFUSED = {
    "labels missing": ((ROWS, LABELS[:0]), ValueError, r"the labels must be \[12\], not \[0\]"),
    "labels short": ((ROWS, LABELS[:3]), ValueError, r"the labels must be \[12\], not \[3\]"),
    "labels 2-d": ((ROWS, LABELS[:, None]), ValueError, r"the labels must be \[12\], not \[12, 1\]"),
    "labels int8": ((ROWS, LABELS.to(torch.int8)), TypeError, "the labels must be int64, not int8"),
    "labels float": ((ROWS, LABELS.float()), TypeError, "the labels must be int64, not float32"),
    "rows int": ((LABELS[:, None], LABELS), TypeError, "the anchors must be float32, .* not int64"),
    "rows 1-d": ((ROWS[:, 0], LABELS), ValueError, "the anchors must have 2 dimensions"),
    "references alone": ((ROWS, LABELS, OTHERS), ValueError, "belong together"),
    "reference labels alone": ((ROWS, LABELS, None, OTHER_LABELS), ValueError, "belong together"),
    "references double": ((ROWS, LABELS, OTHERS.double(), OTHER_LABELS), TypeError, "the references must be float32, .* not float64"),
    "references single": ((ROWS.double(), LABELS, OTHERS, OTHER_LABELS), TypeError, "the references must be float64, .* not float32"),
    "references 3-d": ((ROWS, LABELS, OTHERS[None], OTHER_LABELS), ValueError, "the references must have 2 dimensions"),
    "references narrow": ((ROWS, LABELS, OTHERS[:, :5], OTHER_LABELS), ValueError, "5"),
    "reference labels short": (
        (ROWS, LABELS, OTHERS, OTHER_LABELS[:5]), ValueError, r"the labels of the references must be \[23\], not \[5\]",
    ),
    "reference labels int32": (
        (ROWS, LABELS, OTHERS, OTHER_LABELS.int()), TypeError, "the labels of the references must be int64, not int32",
    ),
    "identity short": ((ROWS, LABELS, OTHERS, OTHER_LABELS, NOBODY[:1]), ValueError, r"the identity must be \[12\], not \[1\]"),
    "identity int32": ((ROWS, LABELS, OTHERS, OTHER_LABELS, NOBODY.int()), TypeError, "the identity must be int64, not int32"),
    "identity of nothing": ((ROWS, LABELS, None, None, NOBODY), ValueError, "there are no references"),
    "labels elsewhere": ((ROWS, LABELS.to("meta")), ValueError, "the labels are on meta, and the anchors on cpu"),
    "references elsewhere": (
        (ROWS, LABELS, OTHERS.to("meta"), OTHER_LABELS), ValueError, "the references are on meta, and the anchors on cpu",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_the_operator_refuses(name):
    given, error, message = REFUSED[name]
    with pytest.raises(error, match=message) as raised:
        call(*given)
    assert "\n" not in str(raised.value)
    if "elsewhere" not in name and name != "references narrow":
        # The operator for GPUs makes the same checks first.
        whole = operator.Call(*given, *[None] * (7 - len(given)), "at-asms", NUMBERS, True, False, 1, 0)
        with pytest.raises(error, match=message):
            operator._on_gpu(whole)


class Wrapped(torch.Tensor):
    """A tensor that wraps another one, without memory of its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        plain = [given.inner if isinstance(given, cls) else given for given in args]
        return operator(*plain, **(kwargs or {}))


def test_no_address_is_read_that_is_not_the_tensor_s_own():
    loss = SoftContrastiveLoss()
    want = loss(ROWS, LABELS, ref_emb=OTHERS, ref_labels=OTHER_LABELS)
    for place in range(4):
        given = [ROWS, LABELS, OTHERS, OTHER_LABELS]
        given[place] = Wrapped(given[place])
        assert loss(given[0], given[1], None, *given[2:]) == want
        given[place] = given[place].inner.clone()
        given[place].untyped_storage().resize_(0)
        with pytest.raises(ValueError, match="has no memory"):
            loss(given[0], given[1], None, *given[2:])
    memory, again = (CrossBatchMemory(SoftContrastiveLoss(), DIM, 200) for _ in range(2))
    assert memory(Wrapped(ROWS), LABELS) == again(ROWS, LABELS) > 0
    assert torch.equal(memory.embedding_memory, again.embedding_memory)
    gone = ROWS.clone()
    gone.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="has no memory"):
        memory(gone, LABELS)


def test_a_view_whose_sign_is_pending_is_read_with_it():
    rows, negated = (torch.randn(12, DIM, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    negated = torch._neg_view(-rows)
    given = rows.requires_grad_(), negated.requires_grad_()
    assert given[1].is_neg() and torch.equal(*given)
    losses = [SoftContrastiveLoss()(side, LABELS, ref_emb=OTHERS, ref_labels=OTHER_LABELS) for side in given]
    assert losses[0] == losses[1] > 0
    sum(losses).backward()
    assert torch.equal(given[0].grad, given[1].grad)


def test_tensors_that_are_not_dense_are_named():
    loss, memory = SoftContrastiveLoss(), CrossBatchMemory(SoftContrastiveLoss(), DIM, 20)
    for rows, kind in (
        (ROWS.to_sparse(), "torch.sparse_coo"),
        (ROWS.to_sparse_csr(), "torch.sparse_csr"),
        (ROWS.to_mkldnn(), "torch._mkldnn"),
        (torch.nested.nested_tensor([ROWS[0], ROWS[1]]), "a nested one"),
    ):
        for call in (loss, memory, evaluate, recall_at_k):
            with pytest.raises(TypeError, match=f"must be a dense tensor, not {kind}$"):
                call(rows, LABELS)
    with pytest.raises(TypeError, match="the labels must be a dense tensor"):
        loss(ROWS, LABELS.to_sparse())


class OnlyRank:
    gradient = "mean"

    def check_device(self, rows):
        pass

    def handshake(self, rows, about, error, references):
        raise error


def test_a_group_asks_the_same_before_it_meets():
    for given in ((ROWS, LABELS[:3]), (ROWS[:, 0], LABELS), (ROWS, LABELS.int())):
        whole = operator.Call(*given, *[None] * 5, "at-asms", NUMBERS, True, False, 1, 0)
        with pytest.raises((TypeError, ValueError), match="the (labels|anchors) must"):
            parts.loss_of_ranks(OnlyRank(), whole, kind_of_references="compared")


def moved(tensor):
    """The same values at an odd address."""
    memory = bytearray(tensor.numel() * tensor.element_size() + 1)
    memory[1:] = tensor.numpy().tobytes()
    view = torch.frombuffer(memory, dtype=tensor.dtype, offset=1).view(tensor.shape)
    if not view.data_ptr() % 2:
        view = torch.frombuffer(bytearray(1) + memory, dtype=tensor.dtype, offset=2).view(tensor.shape)
    assert view.data_ptr() % 2 and torch.equal(view, tensor)
    return view


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_tensors_at_odd_addresses_have_the_same_loss(dtype):
    given = (ROWS.to(dtype), LABELS, OTHERS.to(dtype), OTHER_LABELS, NOBODY)
    for want, got in zip(call(*given), call(*map(moved, given))):
        assert torch.equal(want, got)


def test_a_loss_of_unit_rows_reads_no_more_than_there_is():
    loss = SoftContrastiveLoss()
    with pytest.raises(ValueError, match=r"the labels must be \[12\], not \[3\]"):
        loss.loss_of_unit_rows(ROWS, LABELS[:3])
    with pytest.raises(ValueError, match=r"the identity must be \[12\], not \[1\]"):
        loss.loss_of_unit_rows(ROWS, LABELS, OTHERS, OTHER_LABELS, NOBODY[:1])
    with pytest.raises(ValueError, match=r"the labels of the references must be \[23\], not \[2\]"):
        loss.loss_of_unit_rows(ROWS, LABELS, OTHERS, OTHER_LABELS[:2])
    for marks in (LABELS.float(), LABELS.bool()):
        with pytest.raises(TypeError, match="the labels must be integers"):
            loss.loss_of_unit_rows(ROWS, marks)
    known = torch.arange(12)
    want = loss.loss_of_unit_rows(ROWS, LABELS, ROWS, LABELS, known)
    assert loss.loss_of_unit_rows(ROWS, LABELS.to(torch.int8), ROWS, LABELS.int(), known.int()) == want
    apart = torch.stack([known, known], 1)[:, 0]
    assert loss.loss_of_unit_rows(ROWS, LABELS, ROWS, LABELS, apart) == want
    with pytest.raises(ValueError, match="row 0 of the anchors has L2 norm 2"):
        loss.loss_of_unit_rows(2 * ROWS, LABELS)
    loss.loss_of_unit_rows(2 * ROWS, LABELS, check=False)


def test_a_search_reads_no_more_than_there_is():
    for search in (evaluate, recall_at_k):
        with pytest.raises(ValueError, match="labels of the queries: expected 12, got 3"):
            search(ROWS, LABELS[:3])
    with pytest.raises(ValueError, match=r"the identity must be \[12\], not \[1\]"):
        evaluate(ROWS, LABELS, OTHERS, OTHER_LABELS, identity=NOBODY[:1])
    with pytest.raises(ValueError, match="labels of the references: expected 23, got 3"):
        evaluate(ROWS, LABELS, OTHERS, OTHER_LABELS[:3])
    with pytest.raises(TypeError, match="identity must be integers"):
        evaluate(ROWS, LABELS, OTHERS, OTHER_LABELS, identity=NOBODY.float())
    with pytest.raises(ValueError, match="seed = -1 is out of range"):
        evaluate(ROWS, LABELS, nmi=True, seed=-1)


def test_references_elsewhere_are_refused():
    loss = SoftContrastiveLoss()
    message = "the references are on meta, and the anchors on cpu"
    with pytest.raises(ValueError, match=message):
        loss(ROWS, LABELS, ref_emb=OTHERS.to("meta"), ref_labels=OTHER_LABELS)
    with pytest.raises(ValueError, match=message):
        loss.loss_of_unit_rows(ROWS, LABELS, OTHERS.to("meta"), OTHER_LABELS)


def test_labels_beyond_int64_are_refused():
    loss = SoftContrastiveLoss()
    rows, beyond = ROWS[:3], f"label {2**63 + 1} of the labels.* is beyond int64"
    for refused in (
        lambda: loss(rows, BEYOND),
        lambda: loss.loss_of_unit_rows(rows, BEYOND),
        lambda: loss(rows, LABELS[:3], ref_emb=rows, ref_labels=BEYOND),
        lambda: CrossBatchMemory(loss, DIM, 20)(rows, BEYOND),
        lambda: recall_at_k(rows, BEYOND),
        lambda: evaluate(rows, BEYOND),
    ):
        with pytest.raises(ValueError, match=beyond):
            refused()
    small = LABELS.abs()
    assert loss(ROWS, small.to(torch.uint64)) == loss(ROWS, small)


def test_a_forward_mode_derivative_is_refused_and_not_zero():
    loss = SoftContrastiveLoss()
    tangent = torch.ones_like(ROWS)

    def of(rows):
        return loss(rows, LABELS)

    def dual():
        with forward_ad.dual_level():
            return of(forward_ad.make_dual(ROWS, tangent))

    def compiled(rows, tangent):
        return torch.func.jvp(of, (rows,), (tangent,))[1]

    for refused in (
        lambda: torch.func.jvp(of, (ROWS,), (tangent,)),
        lambda: torch.func.jacfwd(of)(ROWS),
        lambda: torch.func.jvp(torch.func.grad(of), (ROWS,), (tangent,)),
        lambda: torch.func.jvp(torch.func.vmap(of), (ROWS[None],), (tangent[None],)),
        lambda: torch.compile(compiled, backend="aot_eager")(ROWS, tangent),
        dual,
    ):
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            refused()
    assert torch.func.grad(of)(ROWS).any()


def test_a_trace_of_torchscript_is_refused():
    with pytest.raises(NotImplementedError, match="cannot be traced by torch.jit.trace"):
        torch.jit.trace(SoftContrastiveLoss(), (ROWS, LABELS))


def saved():
    memory = CrossBatchMemory(SoftContrastiveLoss(), DIM, 20)
    memory(ROWS, LABELS)
    return memory, memory.state_dict()


def test_a_spoilt_memory_is_not_loaded():
    memory, good = saved()
    rows = good["embedding_memory"]
    nan = torch.where(torch.arange(20)[:, None] == 4, torch.nan, rows)
    index, full, calls = good["_extra_state"].tolist()
    for name, spoilt, error, message in (
        ("_extra_state", torch.tensor([-5, full, calls]), ValueError, "queue_idx = -5 of the saved memory"),
        ("_extra_state", torch.tensor([20, full, calls]), ValueError, "queue_idx = 20 of the saved memory"),
        ("_extra_state", torch.tensor([1.5, full, calls]), ValueError, "queue_idx = 1.5 of the saved memory"),
        ("_extra_state", torch.tensor([index, full, -1]), ValueError, "calls = -1 of the saved memory"),
        ("_extra_state", torch.tensor(index), ValueError, "_extra_state of the saved memory must be a tensor of 3 integers"),
        ("_extra_state", {"queue_idx": 20, "has_been_filled": 0}, ValueError, "queue_idx = 20 of the saved memory"),
        ("embedding_memory", nan, ValueError, "row 4 of the saved memory"),
        ("embedding_memory", rows * 1e20, ValueError, "row 0 of the saved memory"),
        ("embedding_memory", rows.long(), TypeError, "the rows of the saved memory"),
        ("label_memory", good["label_memory"].float(), TypeError, "the labels of the saved memory"),
    ):
        other = CrossBatchMemory(SoftContrastiveLoss(), DIM, 20)
        with pytest.raises(error, match=message) as raised:
            other.load_state_dict(good | {name: spoilt})
        assert "\n" not in str(raised.value) and other.filled == 0 and not (other.label_memory >= 0).any()
    without = {name: value for name, value in good.items() if name != "_extra_state"}
    with pytest.raises(ValueError, match="has no _extra_state: it is none of a ddtas.torch.CrossBatchMemory$"):
        CrossBatchMemory(SoftContrastiveLoss(), DIM, 20).load_state_dict(without, strict=False)
    # Memory behind the rows of a queue that is not full is not checked.
    rest = torch.where(torch.arange(20)[:, None] >= 12, torch.nan, rows)
    other = CrossBatchMemory(SoftContrastiveLoss(), DIM, 20)
    other.load_state_dict(good | {"embedding_memory": rest})
    assert other(ROWS, LABELS) == memory(ROWS, LABELS) and other.filled == 20
    memory(ROWS, LABELS)
    full = memory.state_dict()
    with pytest.raises(ValueError, match="row 19 of the saved memory"):
        other.load_state_dict(full | {"embedding_memory": full["embedding_memory"].index_fill(0, torch.tensor([19]), torch.nan)})
    # A loss that does not check takes any row.
    CrossBatchMemory(SoftContrastiveLoss(check=False), DIM, 20).load_state_dict(good | {"embedding_memory": nan})


def test_numbers_out_of_range_are_named():
    for refused, message in (
        (lambda: SoftContrastiveLoss(workspace_budget=-1), "workspace_budget = -1 is out of range"),
        (lambda: SoftContrastiveLoss(workspace_budget=2**64), "workspace_budget = 18446744073709551616 is out of range"),
        (lambda: SoftContrastiveLoss(threads=-1), "threads = -1 is out of range: 1 to 1024"),
        (lambda: ddtas.Context(-1), "threads = -1 is out of range: 1 to 1024"),
        (lambda: ddtas.Context(None, -1), "budget = -1 is out of range"),
        (lambda: ddtas.evaluate(ROWS.numpy(), LABELS.numpy(), nmi=True, seed=-1), "seed = -1 is out of range"),
        (lambda: ddtas.evaluate(ROWS.numpy(), LABELS.numpy(), nmi=True, seed=2**64), "seed = .* is out of range"),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    loss = SoftContrastiveLoss()
    for refused, message in (
        (lambda: SoftContrastiveLoss(workspace_budget="1GB"), "workspace_budget = '1GB' must be an integer"),
        (lambda: SoftContrastiveLoss(normalize_embeddings="no"), "normalize_embeddings must be True or False, not 'no'"),
        (lambda: ddtas.loss(ROWS.numpy(), LABELS.numpy(), context=2), "context must be a ddtas.Context, not int"),
        (lambda: ddtas.evaluate(ROWS.numpy(), LABELS.numpy(), context="cpu"), "context must be a ddtas.Context, not str"),
        (lambda: CrossBatchMemory(loss, 8.0), "embedding_size = 8.0 must be an integer"),
        (lambda: CrossBatchMemory(loss, 8, "40"), "memory_size = '40' must be an integer"),
        (lambda: CrossBatchMemory(loss, 8, start_after=1.5), "start_after = 1.5 must be an integer"),
        (lambda: recall_at_k(ROWS, LABELS, 1), r"ks must be numbers such as \(1, 2, 4\), not 1"),
        (lambda: ddtas.evaluate(ROWS.numpy(), LABELS.numpy(), ks=5), r"ks must be numbers such as \(1, 2, 4\), not 5"),
    ):
        with pytest.raises(TypeError, match=f"^{message}$"):
            refused()
    for name, value, kind, message in (
        ("lambda_pos", "0.6", TypeError, "must be numbers or tensors, not str"),
        ("lambda_neg", 9, ValueError, "lambda_neg = 9.* is out of range"),
        ("lambda_neg", float("nan"), ValueError, "lambda_neg = NaN is out of range"),
        ("normalize_embeddings", "no", TypeError, "must be True or False, not 'no'"),
        ("alpha", "40", TypeError, "alpha"),
    ):
        before = getattr(loss, name)
        with pytest.raises(kind, match=message):
            setattr(loss, name, value)
        assert getattr(loss, name) == before and loss(ROWS, LABELS) > 0
    assert CrossBatchMemory(loss, np.int64(8), np.int32(40))(ROWS, LABELS) > 0
    assert SoftContrastiveLoss(workspace_budget=np.int64(1))(ROWS, LABELS) > 0
    with pytest.raises(TypeError, match="threads = 'two' must be an integer"):
        ddtas.Context("two")
    assert ddtas.Context(np.int64(2), 1000).threads == 2
