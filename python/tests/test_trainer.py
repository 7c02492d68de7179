"""The loss in place of pytorch-metric-learning's loss and miner, in that library's trainer."""

import logging

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: its tests do not run")
pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is not installed: its trainer does not run")

import ddtas  # noqa: E402
from ddtas.torch import CrossBatchMemory, SoftContrastiveLoss  # noqa: E402
from pytorch_metric_learning import distances, samplers, testers, trainers  # noqa: E402
from pytorch_metric_learning.utils import inference  # noqa: E402
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator  # noqa: E402
from test_docs import blocks  # noqa: E402

CLASSES, DIM, WIDTH = 12, 24, 8


def drawn(classes, seed):
    """Classes that differ in six directions, under noise in all 24."""
    random = np.random.default_rng(seed)
    centres = np.zeros((len(classes), DIM))
    centres[:, :6] = 2.5 * np.random.default_rng(99).normal(size=(2 * CLASSES, 6))[classes]
    labels = np.repeat(np.arange(len(classes)), 20)
    rows = centres[labels] + 1.5 * random.normal(size=(len(labels), DIM))
    return torch.tensor(rows, dtype=torch.float32), torch.tensor(labels)


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("PML").setLevel(logging.WARNING)
    torch.manual_seed(0)
    np.random.seed(0)  # samplers of pytorch-metric-learning draw from it
    # Batches of 48 rows are too small for several threads.
    torch.set_num_threads(1)


def recall(network, rows, labels):
    with torch.no_grad():
        embeddings = torch.nn.functional.normalize(network(rows), dim=1)
    return ddtas.recall_at_k(embeddings, labels, (1,))[1]


@pytest.mark.parametrize("make", [SoftContrastiveLoss, lambda: CrossBatchMemory(SoftContrastiveLoss(), WIDTH, 128)], ids=["loss", "memory"])
def test_metric_loss_only_trains_with_it(make):
    rows, labels = drawn(np.arange(CLASSES), seed=1)
    unseen = drawn(np.arange(CLASSES, 2 * CLASSES), seed=2)
    network = torch.nn.Sequential(torch.nn.Linear(DIM, 32), torch.nn.ReLU(), torch.nn.Linear(32, WIDTH))
    losses = []
    trainer = trainers.MetricLossOnly(
        models={"trunk": network},
        optimizers={"trunk_optimizer": torch.optim.Adam(network.parameters(), lr=3e-3)},
        batch_size=48,
        loss_funcs={"metric_loss": make()},
        dataset=torch.utils.data.TensorDataset(rows, labels),
        sampler=samplers.MPerClassSampler(labels, m=4, batch_size=48, length_before_new_iter=len(labels)),
        dataloader_num_workers=0,
        data_device=torch.device("cpu"),
        end_of_iteration_hook=lambda trainer: losses.append(trainer.losses["metric_loss"].item()),
    )
    before = recall(network, *unseen)
    trainer.train(num_epochs=25)
    after = recall(network, *unseen)
    print(f"loss {np.mean(losses[:5]):.3f} to {np.mean(losses[-5:]):.3f}, Recall@1 on unseen classes {before:.3f} to {after:.3f}")
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert after > before + 0.05


def test_the_documented_calculator_gives_testers_their_own_figures():
    (block,) = [block for block in blocks("docs/python.md") if "class Accuracy:" in block]
    names = {}
    exec(block, names)
    rows, labels = drawn(np.arange(CLASSES), seed=1)
    queries, query_labels = drawn(np.arange(CLASSES), seed=2)
    sets = {name: torch.utils.data.TensorDataset(*given) for name, given in (("train", (rows, labels)), ("val", (queries, query_labels)))}
    network = torch.nn.Linear(DIM, WIDTH)

    def figures(calculator, galleries):
        tester = testers.GlobalEmbeddingSpaceTester(
            accuracy_calculator=calculator, batch_size=64, dataloader_num_workers=0, data_device=torch.device("cpu")
        )
        return tester.test(sets, 0, network, splits_to_eval=[("val", list(galleries))])

    search = inference.CustomKNN(distances.CosineSimilarity())
    metrics = names["Accuracy"]().get_curr_metrics()
    theirs = AccuracyCalculator(include=metrics, knn_func=search, kmeans_func=lambda *_: None, device=torch.device("cpu"))
    for galleries in (["train"], ["val"], ["val", "train"]):
        (want,), (got,) = (figures(calculator, galleries).values() for calculator in (theirs, names["Accuracy"]()))
        assert got == pytest.approx(want, abs=1e-5) and 0.1 < got["precision_at_1_level0"] < 0.95


def test_two_streams_train_with_the_documented_trainer():
    (block,) = [block for block in blocks("docs/python.md") if block.startswith("class TwoStream(")]
    names = {"trainers": trainers, "torch": torch}
    exec(block, names)
    rows, labels = drawn(np.arange(CLASSES), seed=1)

    def trained(kind):
        network = torch.nn.Linear(DIM, WIDTH)
        losses = []
        kind(
            models={"trunk": network},
            optimizers={"trunk_optimizer": torch.optim.Adam(network.parameters(), lr=3e-3)},
            batch_size=48,
            loss_funcs={"metric_loss": SoftContrastiveLoss()},
            dataset=torch.utils.data.TensorDataset(rows, rows + 0.1, labels),
            dataloader_num_workers=0,
            data_device=torch.device("cpu"),
            end_of_iteration_hook=lambda trainer: losses.append(trainer.losses["metric_loss"].item()),
        ).train(num_epochs=20)
        return losses

    losses = trained(names["TwoStream"])
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    with pytest.raises(ValueError, match="TwoStreamMetricLoss makes pairs without one"):
        trained(trainers.TwoStreamMetricLoss)
