"""The examples in the documentation run as they are."""

import inspect
import re
from pathlib import Path

import ddtas
import numpy as np
import pytest
from formula import unit_rows

ROOT = Path(__file__).parents[2]


def blocks(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


def test_the_functional_example_runs():
    (block,) = [block for block in blocks("docs/python.md") if block.startswith("import ddtas\n")]
    names = {}
    exec(block, names)
    assert names["output"].loss > 0


def test_documented_defaults_are_those_of_the_signatures():
    pytest.importorskip("torch", reason="torch is not installed: its tests do not run")
    from ddtas.torch import CrossBatchMemory, SoftContrastiveLoss, ThresholdGenerator

    for kind, least in ((ddtas.Settings, 9), (SoftContrastiveLoss, 18), (CrossBatchMemory, 3), (ThresholdGenerator, 8)):
        arguments = inspect.signature(kind).parameters
        # A name and its text, up to the next name or an empty line.
        described = re.findall(r"^        (\w+): (.*?)(?=^        \w+: |^$|\Z)", kind.__doc__, re.DOTALL | re.MULTILINE)
        found = 0
        for name, text in described:
            if default := re.search(r'Default\s+([\w.,]*\w)|"([\w-]+)"\s\(default\)', text):
                stated, given = (default[1] or default[2]).replace(",", ""), arguments[name].default
                assert stated == str(given).removeprefix("torch.") or float(stated) == given, (kind, name)
                found += 1
        assert found >= least, (kind, found)


def test_the_steps_of_a_part_run():
    block, of_references = blocks("docs/parts.md")
    rows, labels = unit_rows(50, 8, seed=31)
    rows = rows.astype(np.float32)
    # A single process, which has all rows.
    names = {"ddtas": ddtas, "rows": rows, "labels": labels, "own": slice(0, 50), "gather": np.copy, "total": lambda found: found}
    exec(block, names)
    whole = ddtas.loss(rows, labels)
    assert names["loss"] == pytest.approx(whole.loss, rel=1e-6) and whole.loss > 0
    np.testing.assert_array_equal(names["gradient"], whole.gradient)
    others, other_labels = unit_rows(70, 8, seed=32)
    others = others.astype(np.float32)
    anchors = ddtas.Part(rows, labels, others, other_labels, total=50)
    same = anchors.same_class()
    swept = anchors.sweep(same.min_pos)
    totals = {"probe_neg": swept.probe_neg, "total_pos": same.total_pos}
    chosen = anchors.select(swept.max_neg, **totals)
    names |= {"np": np, "references": others, "reference_labels": other_labels, "own": slice(0, 70), "totals": totals}
    names |= {"min_pos": same.min_pos, "max_neg": swept.max_neg, "pos": chosen.count_pos, "neg": chosen.count_neg}
    exec(of_references, names)
    want = ddtas.loss(rows, labels, others, other_labels, reference_gradient=True)
    np.testing.assert_allclose(names["reference_gradient"], want.reference_gradient, atol=1e-6 * abs(want.reference_gradient).max())


def test_the_generator_example_learns():
    torch = pytest.importorskip("torch", reason="torch is not installed: its tests do not run")
    from ddtas.torch import SoftContrastiveLoss, ThresholdGenerator

    (block,) = [block for block in blocks("docs/python.md") if "generator.step" in block]
    model = torch.nn.Module()
    model.backbone, model.head = torch.nn.Linear(6, 5), torch.nn.Linear(5, 4)
    drawn = [unit_rows(30, 6, seed) for seed in range(3)]
    loader = [(torch.tensor(rows, dtype=torch.float32), torch.tensor(labels)) for rows, labels in drawn]
    names = {"SoftContrastiveLoss": SoftContrastiveLoss, "ThresholdGenerator": ThresholdGenerator, "model": model, "loader": loader}
    exec(block, names)
    assert model.head.weight.grad.any() and names["loss_fn"].settings.lambda_pos not in (0.5, 0.7)


@pytest.mark.parametrize("document, mark", [("docs/python.md", "# before"), ("docs/python.md", "# after"), ("python/README.md", "from ddtas.torch")])
def test_the_torch_examples_train(document, mark):
    torch = pytest.importorskip("torch", reason="torch is not installed: its tests do not run")
    if mark == "# before":
        pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is not installed")
    (block,) = [block for block in blocks(document) if block.startswith(mark)]
    model = torch.nn.Linear(6, 4)
    images, labels = torch.randn(20, 6), torch.arange(20) // 5
    exec(block, {"model": model, "loader": [(images, labels)], "images": images, "labels": labels})
    assert model.weight.grad.abs().sum() > 0
