"""`ddtas.torch.ThresholdGenerator`: compared with automatic differentiation through the virtual step, in float64."""

import copy
import io
import sys
from pathlib import Path

import pytest
from formula import unit_rows

torch = pytest.importorskip("torch", reason="torch is not installed: its tests do not run")

from ddtas.torch import CrossBatchMemory, SoftContrastiveLoss, ThresholdGenerator  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2] / "benches/device"))
import dense  # noqa: E402

WIDTH, DIM = 12, 6


def batch(count, seed=0, dtype=torch.float32):
    """Inputs of a network, and labels."""
    rows, labels = unit_rows(count, WIDTH, seed)
    return torch.tensor(3 * rows, dtype=dtype), torch.tensor(labels)


def head():
    torch.manual_seed(0)
    return nn.Linear(WIDTH, DIM)


def network():
    """A convolution and BatchNorm before the head, in training mode."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Unflatten(1, (1, WIDTH)), nn.Conv1d(1, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * WIDTH, DIM)
    )


def generator_of(module, start=0.5, loss=None, **settings):
    return ThresholdGenerator(loss or SoftContrastiveLoss(lambda_pos=start, lambda_neg=start), module, **settings)


def thresholds(generator):
    return generator.loss.settings.lambda_pos, generator.loss.settings.lambda_neg


def expected(module, data, meta, start, virtual_step, rate, reference):
    """dL^m/dlambda by autograd through the gradient of the virtual step."""
    module = copy.deepcopy(module).double()
    both = torch.tensor([start, start], dtype=torch.float64, requires_grad=True)

    def loss(weights, data, pos, neg):
        rows = nn.functional.normalize(torch.func.functional_call(module, weights, (data[0].double(),)), dim=1)
        return dense.loss(rows, data[1], dense.SETTINGS | {"lam_pos": pos, "lam_neg": neg})

    weights = dict(module.named_parameters())
    gradient = torch.autograd.grad(loss(weights, data, *both), list(weights.values()), create_graph=True)
    length = torch.sqrt(sum((g * g).sum() for g in gradient)) if virtual_step == "unit" else 1
    moved = {name: weight - rate / length * g for (name, weight), g in zip(weights.items(), gradient)}
    return torch.autograd.grad(loss(moved, meta, reference, reference), both)[0].tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("module", [head, network])
@pytest.mark.parametrize("virtual_step, rate, reference", [("unit", 1.0, 0.7), ("unit", 0.1, 0.6), ("plain", 0.5, 0.7)])
def test_the_hypergradient_is_that_of_autograd(module, virtual_step, rate, reference, dtype):
    module, data, meta = module().to(dtype), batch(40, dtype=dtype), batch(30, 5, dtype)
    want = expected(module, data, meta, 0.5, virtual_step, rate, reference)
    generator = generator_of(module, virtual_step=virtual_step, virtual_rate=rate, lambda_reference=reference)
    generator.step(*data, meta)
    assert generator.hypergradient == pytest.approx(want, rel=1e-4)
    assert min(map(abs, want)) > 1e-4


def test_a_step_changes_the_thresholds_alone():
    module, data = network(), [batch(40, seed) for seed in range(3)]
    loss = SoftContrastiveLoss()
    loss(module(data[0][0]).detach(), data[0][1])
    before, statistics, random = copy.deepcopy(module.state_dict()), loss.statistics, torch.get_rng_state()
    generator = generator_of(module, loss=loss)
    for rows, labels in data:
        generator.step(rows.requires_grad_(), labels)
        assert rows.grad is None
    assert not any(inputs.requires_grad for inputs, _ in generator.state_dict()["recent"]), "no graph is kept"
    assert thresholds(generator) != (0.7, 0.7)
    assert all(torch.equal(now, before[name]) for name, now in module.state_dict().items())
    assert all(weight.grad is None and weight.requires_grad for weight in module.parameters())
    assert loss.statistics == statistics and torch.equal(torch.get_rng_state(), random)


def test_thresholds_follow_adam_within_their_range():
    for pair in (False, True):
        generator = generator_of(head(), lambda_pair=pair, lambda_rate=0.006, lambda_min=0.47, lambda_max=0.53)
        twin = torch.tensor([0.5, 0.5], dtype=torch.float64, requires_grad=True)
        adam = torch.optim.Adam([twin], lr=0.006, betas=(0.95, 0.999), eps=1e-12)
        seen, apart = set(), False
        for seed in range(12):
            generator.step(*batch(40, seed), batch(40, seed + 50))
            gradient = torch.tensor(generator.hypergradient, dtype=torch.float64)
            twin.grad = gradient if pair else gradient.sum().repeat(2)
            adam.step()
            with torch.no_grad():
                twin.clamp_(0.47, 0.53)
            assert thresholds(generator) == pytest.approx(twin.tolist(), abs=1e-12)
            seen.update(twin.tolist())
            apart |= thresholds(generator)[0] != thresholds(generator)[1]
        assert apart == pair
        assert seen & {0.47, 0.53} and len(seen) > 3


def test_the_meta_batch_is_the_last_batches_unless_given():
    module, data = head(), [batch(20 + seed, seed) for seed in range(4)]
    generator = generator_of(module, meta_recent=2)
    generator.step(*data[0])
    assert thresholds(generator) == (0.5, 0.5) and generator.hypergradient is None
    for rows, labels in data[1:]:
        generator.step(rows, labels)
    again = generator_of(module, start=0.5)
    again.step(*data[1], data[0])
    again.step(*data[2], tuple(map(torch.cat, zip(*data[:2]))))
    again.step(*data[3], tuple(map(torch.cat, zip(*data[1:3]))))
    assert generator.hypergradient == again.hypergradient and thresholds(generator) == thresholds(again)
    # Batches that came with a meta batch are not kept.
    again.step(*data[0])
    assert again.hypergradient is None and len(again.state_dict()["recent"]) == 1


def test_a_restored_state_goes_on_bit_for_bit():
    module, data = head(), [batch(30, seed) for seed in range(6)]
    generator = generator_of(module)
    for given in data[:3]:
        generator.step(*given)
    saved = io.BytesIO()
    torch.save(generator.state_dict(), saved)
    saved.seek(0)
    restored = generator_of(module, start=0.7)
    restored.load_state_dict(torch.load(saved, weights_only=True))
    for given in data[3:]:
        generator.step(*given)
        restored.step(*given)
        assert thresholds(generator) == thresholds(restored) and generator.hypergradient == restored.hypergradient
    with pytest.raises(ValueError, match="lambda_pos = .* is not from lambda_min = 0.9 to lambda_max = 1.0"):
        generator_of(module, start=0.95, lambda_min=0.9).load_state_dict(generator.state_dict())


@pytest.mark.parametrize("spoil", ["one class", "no positives", "nan", "empty"])
def test_a_batch_that_says_nothing_changes_nothing(spoil):
    rows, labels = batch(20)
    bad = {
        "one class": (rows, torch.zeros_like(labels)),
        "no positives": (rows, torch.arange(20)),
        "nan": (rows.index_fill(0, torch.tensor([3]), torch.nan), labels),
        "empty": (rows[:0], labels[:0]),
    }[spoil]
    generator = generator_of(head())
    for data, meta in ((bad, (rows, labels)), ((rows, labels), bad)):
        generator.step(*data, meta)
        assert thresholds(generator) == (0.5, 0.5) and generator.hypergradient is None
    generator.step(rows, labels, batch(20, 1))
    assert thresholds(generator)[0] in (pytest.approx(0.51), pytest.approx(0.49)) and generator.hypergradient is not None
    generator.step(*bad, (rows, labels))
    assert generator.hypergradient is None


def test_a_threshold_that_was_a_tensor_stays_that_tensor():
    pos, neg = torch.tensor(0.5), torch.tensor([0.5])
    loss = SoftContrastiveLoss(lambda_pos=pos, lambda_neg=neg)
    generator = generator_of(head(), loss=loss)
    generator.step(*batch(40), batch(40, 1))
    assert loss.lambda_pos is pos and loss.lambda_neg is neg and pos == neg != 0.5
    # A threshold that the caller sets is where the next step starts.
    loss.lambda_pos = loss.lambda_neg = 0.6
    generator.step(*batch(40, 2), batch(40, 1))
    assert abs(thresholds(generator)[0] - 0.6) < 0.02


def test_a_compiled_step_is_not_compiled_again():
    module, loss = head(), SoftContrastiveLoss()
    generator = generator_of(module, loss=loss)
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    step = torch.compile(lambda rows, labels: loss(module(rows), labels), fullgraph=True, backend=backend)
    values = []
    for seed in range(12):
        generator.step(*batch(40, seed))
        values.append(step(*batch(40, 50)).item())
    assert len(compiled) == 1 and len(set(values)) > 9
    assert values[-1] == pytest.approx(loss(module(batch(40, 50)[0]), batch(40, 50)[1]).item(), rel=1e-6)


def test_under_autocast_the_network_runs_in_half_precision():
    module, data, meta = head(), batch(40), batch(40, 1)
    want = expected(module, data, meta, 0.5, "unit", 0.1, 0.7)
    generator = generator_of(module)
    with torch.autocast("cpu", torch.bfloat16):
        generator.step(*data, meta)
    assert generator.hypergradient == pytest.approx(want, rel=0.2) and generator.hypergradient != pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("start", [0.5, 0.9])
def test_training_moves_a_bad_threshold_towards_the_reference(start):
    module, generated = head(), []
    loss = SoftContrastiveLoss(lambda_pos=start, lambda_neg=start)
    generator = generator_of(module, loss=loss)
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    for step in range(60):
        rows, labels = batch(60, step)
        generator.step(rows, labels)
        generated.append(thresholds(generator)[0])
        optimizer.zero_grad()
        loss(module(rows), labels).backward()
        optimizer.step()
    assert abs(sum(generated[-10:]) / 10 - 0.7) < 0.5 * abs(start - 0.7)


class Checkpointed(nn.Module):
    """Computes the activations again in the backward pass."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, inputs):
        return checkpoint(self.inner, inputs, use_reentrant=False)


def test_activations_that_are_computed_again_are_those_of_the_virtual_step():
    plain, data, meta = network(), batch(40), batch(30, 5)
    module = Checkpointed(copy.deepcopy(plain))
    before = copy.deepcopy(module.state_dict())
    found = []
    for one in (plain, module):
        generator = generator_of(one, virtual_rate=1.0)
        generator.step(*data, meta)
        found.append(generator.hypergradient)
    assert found[0] == found[1]
    assert all(torch.equal(now, before[name]) for name, now in module.state_dict().items())


def test_a_network_may_change_its_inputs_in_place():
    torch.manual_seed(2)
    module = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(WIDTH, DIM))
    data, meta = batch(40), batch(30, 5)
    given = data[0].clone()
    generator = generator_of(module)
    generator.step(*data, meta)
    assert generator.hypergradient == pytest.approx(expected(module, data, meta, 0.5, "unit", 0.1, 0.7), rel=1e-4)
    assert torch.equal(data[0], given)


def test_dropout_is_off_during_a_step():
    plain, dropping = head(), nn.Sequential(nn.Dropout(0.5), head())
    random, found = torch.get_rng_state(), []
    for module in (plain, dropping):
        generator = generator_of(module)
        generator.step(*batch(40), batch(30, 5))
        found.append(generator.hypergradient)
    assert found[0] == found[1] and torch.equal(torch.get_rng_state(), random) and dropping[0].training


def test_a_step_takes_labels_of_every_width_and_needs_no_gradient_mode():
    data, found = [batch(40, seed) for seed in range(2)], []
    for dtype, mode in ((torch.int64, torch.enable_grad), (torch.int16, torch.no_grad)):
        generator = generator_of(head())
        with mode():
            for rows, labels in data:
                generator.step(rows, labels.to(dtype))
        found.append(generator.hypergradient)
    assert found[0] == found[1] and found[0] is not None


def test_recent_batches_are_kept_as_they_were():
    module, buffer, labels = head(), torch.empty(30, WIDTH), torch.empty(30, dtype=torch.int64)
    reused, fresh = generator_of(module), generator_of(module)
    for seed in range(4):
        rows, own = batch(30, seed)
        buffer.copy_(rows)
        labels.copy_(own)
        reused.step(buffer, labels)
        fresh.step(rows, own)
        assert thresholds(reused) == thresholds(fresh)
    # Inputs of another shape, and such with a NaN, are no part of later meta batches.
    wide = generator_of(nn.Sequential(nn.AdaptiveAvgPool1d(WIDTH), head()))
    wide.step(*batch(30))
    wide.step(torch.cat([batch(30, 1)[0]] * 2, 1), batch(30, 1)[1])
    assert wide.hypergradient is None
    wide.step(torch.full((30, WIDTH), torch.nan), batch(30)[1])
    wide.step(*batch(30, 2))
    assert wide.hypergradient is not None


def test_a_step_may_come_between_a_loss_and_its_backward_pass():
    module = head()
    loss = SoftContrastiveLoss(lambda_pos=0.5, lambda_neg=0.5)
    generator = generator_of(module, loss=loss)
    want = torch.zeros_like(module.weight)
    total = 0
    for seed in range(3):
        rows, labels = batch(40, seed)
        generator.step(rows, labels)
        total = total + loss(module(rows), labels)
        want += torch.autograd.grad(loss(module(rows), labels), module.weight)[0]
    total.backward()
    assert torch.allclose(module.weight.grad, want, rtol=1e-5)


def test_a_float32_threshold_may_be_at_the_end_of_its_range():
    for end in (0.7, 0.8):
        loss = SoftContrastiveLoss(lambda_pos=torch.tensor(end), lambda_neg=end)
        generator = generator_of(head(), loss=loss, lambda_max=end, lambda_rate=0.2)
        for seed in range(5):
            generator.step(*batch(40, seed))
        assert end in (thresholds(generator)[1], pytest.approx(thresholds(generator)[0], abs=1e-7))
        generator.load_state_dict(generator.state_dict())


def test_a_damaged_state_is_refused_before_anything_changes():
    generator = generator_of(head())
    for seed in range(3):
        generator.step(*batch(30, seed))
    good = generator.state_dict()
    mean, square, updates = good["moments"]
    damaged = [{name: value for name, value in good.items() if name != missing} for missing in good]
    moments = [(mean, square), ([0.0], square, updates), (mean, [-1.0, 0.0], updates), ([float("nan"), 0.0], square, updates), (mean, square, -1)]
    damaged += [good | {"moments": wrong} for wrong in moments]
    damaged += [good | {"lambda": wrong} for wrong in ([0.1], [0.1, 0.2], ["low", 0.1], [3.0, 3.0])]
    damaged += [good | {"recent": wrong} for wrong in ([3], [(batch(9)[0], batch(8)[1])], [(1, 2)])]
    for state in damaged:
        with pytest.raises(ValueError):
            generator.load_state_dict(state | ({"lambda": [0.1, 0.1]} if "lambda" in state and state["lambda"] == good["lambda"] else {}))
        assert generator.state_dict()["lambda"] == good["lambda"] and generator.state_dict()["moments"] == good["moments"]


REFUSED = [
    (lambda: ThresholdGenerator(nn.CrossEntropyLoss(), head()), TypeError, "loss must be a SoftContrastiveLoss, not CrossEntropyLoss"),
    (lambda: generator_of(head(), loss=CrossBatchMemory(SoftContrastiveLoss(), DIM)), TypeError, "of a CrossBatchMemory give its loss"),
    (lambda: generator_of(torch.relu), TypeError, "network must be a torch.nn.Module"),
    (lambda: generator_of(head(), virtual_step="long"), ValueError, 'virtual_step must be "unit" or "plain"'),
    (lambda: generator_of(head(), virtual_rate=0), ValueError, "virtual_rate = 0.0 must be above 0"),
    (lambda: generator_of(head(), lambda_rate=float("inf")), ValueError, "lambda_rate = inf must be above 0"),
    (lambda: generator_of(head(), lambda_rate="fast"), TypeError, "lambda_rate must be a number, not str"),
    (lambda: generator_of(head(), lambda_reference=3), ValueError, "lambda_reference = 3.0 is out of range: -2 to 2"),
    (lambda: generator_of(head(), lambda_min=0.6, lambda_max=0.6), ValueError, "lambda_max = 0.6 must be above lambda_min = 0.6"),
    (lambda: generator_of(head(), lambda_min=0.6), ValueError, "lambda_pos = 0.5 is not from lambda_min = 0.6 to lambda_max = 1.0"),
    (lambda: generator_of(head(), meta_recent=0), ValueError, "meta_recent = 0 must be an integer of at least 1"),
    (lambda: generator_of(head(), loss=SoftContrastiveLoss(lambda_neg=0.6)), ValueError, "differ: give the same, or lambda_pair=True"),
    (
        lambda: generator_of(head(), loss=SoftContrastiveLoss(lambda_pos=nn.Parameter(torch.tensor(0.5)))),
        TypeError,
        "lambda_pos requires a gradient",
    ),
    (lambda: generator_of(head()).step(batch(9)[0], batch(8)[1]), ValueError, r"labels of the batch must be \[9\], not \[8\]"),
    (lambda: generator_of(head()).step(*batch(9), (batch(9)[0], 3)), TypeError, "labels of the meta batch must be a torch.Tensor"),
    (lambda: generator_of(head()).step([1.0], torch.zeros(1)), TypeError, "inputs of the batch must be a torch.Tensor, not list"),
    (
        lambda: generator_of(head().requires_grad_(False)).step(*batch(9), batch(9)),
        ValueError,
        "no parameter of the generator's network that requires a gradient has a part in its embeddings",
    ),
    (lambda: generator_of(head(), start=torch.tensor(1)), TypeError, "lambda_pos must be a float32 or float64 tensor, or a number, not"),
    (lambda: generator_of(head(), start=torch.tensor(0.5), lambda_pair=True), ValueError, "are the same tensor"),
    (lambda: generator_of(head()).step(*batch(9), batch(9)[0]), TypeError, "meta batch must be a pair of inputs and labels, not Tensor"),
    (lambda: generator_of(nn.GRU(WIDTH, DIM)).step(*batch(9), batch(9)), TypeError, r"must return embeddings \[B, D\], not tuple"),
    (lambda: generator_of(nn.Flatten(0)).step(*batch(9), batch(9)), TypeError, r"must return embeddings \[B, D\], not \[108\]"),
    (lambda: torch.inference_mode()(generator_of(head()).step)(*batch(9), batch(9)), RuntimeError, "outside of torch.inference_mode"),
]


@pytest.mark.parametrize("make, kind, message", REFUSED, ids=range(len(REFUSED)))
def test_wrong_arguments_are_refused(make, kind, message):
    with pytest.raises(kind, match=message):
        make()
