"""torch's compiler, export and transforms see the loss as an operator: no break in the graph, no second compilation."""

import copy
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from formula import unit_rows

torch = pytest.importorskip("torch", reason="torch is not installed: its tests do not run")

import ddtas  # noqa: E402
import torch._dynamo.testing  # noqa: E402
from ddtas.torch import CrossBatchMemory, SoftContrastiveLoss  # noqa: E402
from ddtas.torch.engine import SHARED  # noqa: E402
from emulated import built, emulated_gpu  # noqa: E402
from torch.nn.functional import normalize  # noqa: E402

DIM = 12
NUMBERS = (0.1, 0.1, 0.1, 0.5, 40.0, 2.0, 0.7, 0.7)


def batch(count=40, seed=0, dtype=torch.float32):
    rows, labels = unit_rows(count, DIM, seed)
    return torch.tensor(3 * rows, dtype=dtype), torch.tensor(labels)


def type_of(device):
    return "cuda" if device == "cuda" else "cpu"


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def marked(name, there, reason):
    return pytest.param(name, marks=pytest.mark.skipif(not there, reason=reason))


on_device = {"cpu": nullcontext, "emulated": emulated_gpu, "cuda": lambda: torch.device("cuda")}
has_gpu = ddtas.has_cuda and torch.cuda.is_available()


@pytest.fixture(
    params=[
        "cpu",
        marked("emulated", built, "this build has no emulated device"),
        marked("cuda", has_gpu, "there is no GPU, or this build serves the CPU only"),
    ]
)
def device(request):
    """Where a test runs; new tensors and modules are there."""
    with on_device[request.param]():
        yield request.param


def arguments(dtype, references, normalized):
    rows, labels = batch(dtype=dtype)
    others, other_labels = batch(23, seed=1, dtype=dtype)
    if not normalized:
        rows, others = normalize(rows, dim=1), normalize(others, dim=1)
    given = (rows, labels, others, other_labels, None) if references else (rows, labels, None, None, None)
    half = torch.tensor(0.5)
    return (*given, half if references else None, half, "at-asms", NUMBERS, normalized, references, 1, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("references", [False, True], ids=["square", "rectangular"])
def test_the_operator_passes_opcheck(dtype, references, device):
    if device != "cpu" and dtype == torch.float64:
        pytest.skip("float64 is for the CPU")
    for normalized in (False, True):
        given = arguments(dtype, references, normalized)
        loss, gradient, back, statistics = torch.ops.ddtas.loss.default(*given)
        assert loss > 0 and gradient.any() and back.any() == references and statistics.isfinite().all()
        torch.library.opcheck(torch.ops.ddtas.loss.default, given)
    nothing = (given[0][:0], given[1][:0], *given[2:])
    # Without pairs the means are NaN, which opcheck's fourth test compares as unequal.
    torch.library.opcheck(torch.ops.ddtas.loss.default, nothing, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(torch.ops.ddtas.good_rows.default, (normalize(given[0], dim=1),))
    if device == "cpu" and dtype != torch.float64:
        transposed = given[0].t().contiguous().t()
        torch.library.opcheck(torch.ops.ddtas.unit_rows.default, (transposed, 0))
        for gradient in (transposed.float(), transposed.float().contiguous()):
            torch.library.opcheck(torch.ops.ddtas.gradient_of_rows.default, (transposed, gradient, 0))


def test_a_dispatch_mode_sees_the_operator():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen, wanted = [], []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            seen.append(str(operator))
            if seen[-1] == "ddtas.loss.default":
                wanted.append(args[10])
            return operator(*args, **(kwargs or {}))

    rows, labels = (torch.tensor(side) for side in unit_rows(20, 8, seed=1, classes=4))
    rows = rows.float().requires_grad_()
    for module in (SoftContrastiveLoss(), CrossBatchMemory(SoftContrastiveLoss(), 8, 50)):
        want = copy.deepcopy(module)(rows, labels)
        with Mode():
            assert module(rows, labels) == want
    for name in ("loss", "unit_rows", "gradient_of_rows", "good_rows"):
        assert f"ddtas.{name}.default" in seen
    assert wanted == [False, False], "no gradient is computed of references that are constants"


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_whole_step_compiles_in_one_graph_with_the_bits_of_eager(backend, device):
    threshold = torch.nn.Parameter(torch.tensor([0.6]))
    loss = SoftContrastiveLoss(lambda_pos=threshold, lambda_neg=0.65)

    def step(rows, labels):
        return 2 * loss(normalize(rows, dim=1), labels)

    count = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(step, fullgraph=True, backend=count, dynamic=False)
    for seed in range(3):
        results = []
        for run in (step, compiled):
            rows, labels = batch(seed=seed)
            threshold.grad = None
            value = run(rows.requires_grad_(), labels)
            value.backward()
            results.append((value.detach(), rows.grad, threshold.grad, loss.statistics))
        # A mean near 0 may be off by more than a millionth of itself there.
        off = None if device == "cpu" else 1e-7
        assert results[0][3] == pytest.approx(results[1][3], abs=off) and results[0][3]["active"] > 0
        for got, want in zip(results[1][:3], results[0][:3]):
            torch.testing.assert_close(got, want, rtol=0 if backend == "aot_eager" else 1e-5, atol=0 if backend == "aot_eager" else 1e-7)
        with torch.no_grad():
            threshold.add_(0.01)
    assert count.frame_count == 1


def test_batches_of_any_size_compile_once_more(device):
    loss = SoftContrastiveLoss()
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=count)
    for rows in (40, 23, 31, 60, 11):
        embeddings, labels = batch(rows)
        assert compiled(embeddings, labels) == loss(embeddings, labels)
    assert count.frame_count == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fifty_steps_of_a_memory_compile_once(dtype, device):
    memory = CrossBatchMemory(SoftContrastiveLoss(), DIM, 100, dtype=dtype)
    eager = copy.deepcopy(memory)
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(memory, fullgraph=True, backend=count, dynamic=False)
    for step in range(50):
        grads = []
        for run in (compiled, eager):
            rows, labels = batch(16, seed=step)
            value = run(rows.requires_grad_(), labels)
            value.backward()
            grads.append((value.detach(), rows.grad))
        assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])
    assert count.frame_count == 1 and grads[0][0] > 0
    assert torch.equal(memory.embedding_memory, eager.embedding_memory) and memory.filled == 100
    before, bad = memory.embedding_memory.clone(), rows.detach().clone()
    bad[3] = torch.nan
    if device == "cuda":
        assert compiled(bad.requires_grad_(), labels).isnan() and memory.embedding_memory.isfinite().all()
        return
    with pytest.raises(ValueError, match="row 3 of the embeddings"):
        compiled(bad.requires_grad_(), labels)
    assert torch.equal(memory.embedding_memory, before)


def test_a_compiled_memory_counts_its_first_calls_and_starts():
    memory, other = (CrossBatchMemory(SoftContrastiveLoss(), DIM, 100, start_after=12) for _ in range(2))
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(memory, backend=count, dynamic=False)
    rows, labels = batch(16)
    for _ in range(12):
        assert not memory.started
        assert compiled(rows, labels) == memory.loss(rows, labels)
    assert memory.started
    before = count.frame_count
    for _ in range(3):
        compiled(rows, labels)
    assert count.frame_count == before + 1 and memory.filled == 48
    with pytest.raises(Exception, match=r"call the memory's loss until start\(\)"):
        torch.compile(other, fullgraph=True, backend="aot_eager")(rows, labels)


def test_functional_gradients_are_those_of_backward(device):
    loss = SoftContrastiveLoss()
    rows, labels = batch()
    others, other_labels = batch(23, seed=1)
    want = rows.clone().requires_grad_(), others.clone().requires_grad_()
    loss(want[0], labels, ref_emb=want[1], ref_labels=other_labels).backward()
    against = lambda a, b: loss(a, labels, ref_emb=b, ref_labels=other_labels)  # noqa: E731
    got = torch.func.grad(against, argnums=(0, 1))(rows, others)
    assert torch.equal(got[0], want[0].grad) and torch.equal(got[1], want[1].grad)
    gradient, value = torch.func.grad_and_value(lambda rows: loss(rows, labels))(rows)
    assert value == loss(rows, labels) and gradient.any()
    with pytest.raises(RuntimeError, match="once, not twice"):
        torch.func.grad(lambda rows: torch.func.grad(lambda rows: loss(rows, labels))(rows).sum())(rows)


def test_a_batch_of_batches_and_of_upstreams_have_the_gradients_of_each(device):
    loss = SoftContrastiveLoss()
    rows, labels = batch()
    several = torch.stack([rows, rows.flip(0)])
    of = lambda rows: loss(rows, labels)  # noqa: E731
    want = torch.stack([torch.func.grad(of)(one) for one in several])
    assert want.any(2).any(1).all()
    assert torch.equal(torch.func.vmap(torch.func.grad(of))(several), want)
    assert torch.equal(torch.func.jacrev(of)(rows), want[0])
    assert torch.equal(torch.autograd.functional.jacobian(of, rows, vectorize=True), want[0])
    value = of(rows.requires_grad_())
    scales = torch.tensor([1.0, 2.0, 0.0])
    (got,) = torch.autograd.grad(value, rows, scales, is_grads_batched=True)
    assert torch.equal(got, scales[:, None, None] * want[0])
    narrow = rows.detach().bfloat16().requires_grad_()
    (got,) = torch.autograd.grad(of(narrow), narrow, scales, is_grads_batched=True)
    (want,) = torch.autograd.grad(of(narrow), narrow)
    assert got.dtype == torch.bfloat16 and torch.equal(got, scales[:, None, None].bfloat16() * want) and want.any()


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.loss = torch.nn.Linear(DIM, 8), SoftContrastiveLoss()

    def forward(self, rows, labels):
        return self.loss(self.layer(rows), labels)


def test_a_memory_of_transposed_rows_compiles():
    loss = SoftContrastiveLoss()
    memories = [CrossBatchMemory(loss, DIM, 100) for _ in range(2)]
    rows, labels = batch()
    turned = rows.t().contiguous()
    compiled = torch.compile(lambda turned, labels: memories[0]((2 * turned).t(), labels), fullgraph=True)
    found = compiled(turned, labels)
    assert found > 0 and found.item() == pytest.approx(memories[1](rows, labels).item(), rel=1e-6)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_computes_the_same_wherever_it_is_loaded(strict, device, tmp_path):
    torch.manual_seed(0)
    network, given = Network(), batch()
    program = torch.export.export(network, given, strict=strict)
    torch.export.save(program, tmp_path / "program.pt2")
    again = torch.export.load(tmp_path / "program.pt2").module()
    want = network(*given)
    del network
    assert want > 0 and again(*given) == want


def test_an_exported_program_leaves_the_modules_of_another_process_alone(device, tmp_path):
    torch.manual_seed(0)
    network, given = Network(), batch()
    for strict in (False, True):
        torch.export.save(torch.export.export(network, given, strict=strict), tmp_path / f"{strict}.pt2")
    memory = torch.export.export(CrossBatchMemory(SoftContrastiveLoss(), DIM, 100), given, strict=False)
    calls = [node.args for node in memory.graph.nodes if str(node.target) in ("ddtas.loss.default", "ddtas.unit_rows.default")]
    assert calls and {args[-1] for args in calls} == {SHARED.key}
    torch.save((given, network(*given).item(), network.loss._engine.key), tmp_path / "given.pt")
    subprocess.run([sys.executable, __file__, device, tmp_path], check=True, timeout=120)


def compute_beside_live_modules(folder):
    """The programs of the test above, in a process with a module whose engine has the number that theirs had."""
    given, want, key = torch.load(folder / "given.pt")
    loss = SoftContrastiveLoss()
    while loss._engine.key != key:
        loss = SoftContrastiveLoss()
    loss(*batch(11, seed=5))
    before = loss.statistics
    assert before["active"] > 0
    for program in folder.glob("*.pt2"):
        assert torch.export.load(program).module()(*given).item() == want
        assert loss.statistics == before


@pytest.mark.parametrize("compiled", [False, True])
def test_mixed_precision_and_a_gradient_scaler_train(compiled, device):
    torch.manual_seed(0)
    network = Network()
    step = torch.compile(network, fullgraph=True, backend="aot_eager") if compiled else network
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler(type_of(device), init_scale=2.0**10)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast(type_of(device), dtype=torch.bfloat16):
            loss = step(*batch(60))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        assert scaler.get_scale() == 2.0**10, "no step is left out"
    assert loss.dtype == torch.float32 and losses[-1] < 0.8 * losses[0]


def test_engines_go_with_their_modules():
    import gc

    from ddtas.torch.engine import _engines

    gc.collect()
    before = len(_engines)
    losses = [SoftContrastiveLoss() for _ in range(5)]
    assert len(_engines) == before + 5
    losses[0](*batch())
    del losses
    gc.collect()
    assert len(_engines) == before


def test_other_tensors_of_the_process_default_do_not_matter():
    rows, labels = batch()
    modules = SoftContrastiveLoss(), CrossBatchMemory(SoftContrastiveLoss(), DIM, 100)
    want = [copy.deepcopy(module)(rows, labels) for module in modules]
    with torch.device("meta"):
        assert [module(rows, labels) for module in modules] == want
    assert ddtas.__version__


if __name__ == "__main__":
    with on_device[sys.argv[1]]():
        compute_beside_live_modules(Path(sys.argv[2]))
