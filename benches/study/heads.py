"""Compares losses by the embedding head they train on frozen features, each with the same number of trials, chosen on held-out classes.

    python3 benches/study/heads.py FEATURES.npz OUT.csv [--batch 80] [--trials 24] [--seeds 10] [--only "LOSS;..."] [--extra]

FEATURES.npz is written by features.py. A trial is a random draw of a loss's settings (rate, threshold or margin, tolerance), trained on two thirds of the
training classes and measured on the rest, averaged over --trial-seeds seeds. Each loss's best trial is then trained on all training classes with --seeds other
seeds, and measured once on the test classes. OUT.csv keeps every run; runs that it already has are not repeated. Prints a Markdown table.
--trial-batch N uses another batch size for the trials, since those of large batches would take long.

The head is linear, 1280 to 512 dimensions, with L2 normalisation. Adam, --steps steps with five pictures of each class, and a half-cosine schedule of the rate.
--extra runs the further variants of docs/threshold-study.md. Needs ddtas, torch, numpy, pytorch-metric-learning.
"""

import argparse
import csv
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning import distances, losses, miners
from torch import Tensor, nn
from torch.nn import functional

import ddtas
from ddtas.torch import CrossBatchMemory, SoftContrastiveLoss

DIMENSIONS, PER_CLASS = 512, 5


@dataclass
class Task:
    rows: Tensor  # [pictures, views, features]
    labels: Tensor
    test_rows: Tensor
    test_labels: Tensor

    @cached_property
    def members(self) -> list[np.ndarray]:
        """The pictures of each class."""
        return [np.flatnonzero(self.labels.numpy() == label) for label in range(int(self.labels.max()) + 1)]


Draw = Callable[[np.random.Generator], dict[str, float]]
# Makes a loss module, called with (embeddings, labels), from its settings and the number of classes.
Make = Callable[[dict[str, float], int], nn.Module]


def space(**ranges: tuple[float, float]) -> Draw:
    """Draws settings uniformly, and the head's rate log-uniformly."""
    def draw(rng: np.random.Generator) -> dict[str, float]:
        drawn = {"rate": 10 ** rng.uniform(-4, -2)}
        return {name: round(value, 6) for name, value in (drawn | {name: rng.uniform(*ends) for name, ends in ranges.items()}).items()}
    return draw


class Mined(nn.Module):
    """A loss of pytorch-metric-learning and its miner."""

    def __init__(self, loss: nn.Module, miner: Callable[[Tensor, Tensor], tuple[Tensor, ...]] | None = None):
        super().__init__()
        self.loss, self.miner = loss, miner

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return self.loss(embeddings, labels, self.miner(embeddings, labels) if self.miner else None)


def contrastive(at: dict[str, float], _: int) -> nn.Module:
    return Mined(losses.ContrastiveLoss(pos_margin=at["pos_margin"], neg_margin=at["neg_margin"], distance=distances.CosineSimilarity()))


def multi_similarity(at: dict[str, float], _: int) -> nn.Module:
    return Mined(losses.MultiSimilarityLoss(base=at["base"]), miners.MultiSimilarityMiner(epsilon=at["epsilon"]))


def at_asms(gamma: float) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """AT-ASMS as a miner for losses of pytorch-metric-learning, with the defaults of its other settings."""
    def mine(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        similarity = embeddings.detach() @ embeddings.detach().T
        same = labels[:, None] == labels
        positive = same & (similarity < 1 - 1e-6) & ~torch.eye(len(labels), dtype=torch.bool)
        hardest_positive = similarity.masked_fill(~positive, torch.inf).amin(1, keepdim=True)
        hardest_negative = similarity.masked_fill(same, -torch.inf).amax(1, keepdim=True)
        def negatives_above(tolerance: float | Tensor) -> Tensor:
            return ~same & (similarity > hardest_positive - tolerance)
        hard = negatives_above(0.1 * gamma).sum() / positive.sum()
        shift = 0.5 * torch.sigmoid(hard) if hard > 1 else 0.0
        positives, negatives = positive & (similarity < hardest_negative + gamma * (1 + shift)), negatives_above(0.1 * gamma * (1 - shift))
        active = positives.any(1, keepdim=True) & negatives.any(1, keepdim=True)
        return *torch.where(positives & active), *torch.where(negatives & active)
    return mine


def multi_similarity_at_asms(at: dict[str, float], _: int) -> nn.Module:
    return Mined(losses.MultiSimilarityLoss(base=at["base"]), at_asms(at["gamma"]))


def proxy_anchor(at: dict[str, float], classes: int) -> nn.Module:
    return Mined(losses.ProxyAnchorLoss(classes, DIMENSIONS, margin=at["margin"], alpha=at["alpha"]))


def soft_contrastive(**fixed: object) -> Make:
    def make(at: dict[str, float], _: int) -> nn.Module:
        given: dict = {"lambda_pos": at["lambda"], "lambda_neg": at.get("lambda_neg", at["lambda"]), "gamma": at["gamma"]}
        given |= {name: at[name] for name in ("alpha", "beta", "negative_ratio") if name in at}
        memory = fixed.get("memory")
        loss = SoftContrastiveLoss(**given, **{name: value for name, value in fixed.items() if name != "memory"}, threads=1)
        return CrossBatchMemory(loss, DIMENSIONS, int(memory)) if memory else loss
    return make


USUAL = space(**{"lambda": (0.3, 0.95), "gamma": (0.02, 0.4)})
LOSSES: dict[str, tuple[Draw, Make]] = {
    "contrastive": (space(pos_margin=(0.7, 1.0), neg_margin=(0.2, 0.7)), contrastive),
    "multi-similarity": (space(base=(0.3, 0.9), epsilon=(0.02, 0.4)), multi_similarity),
    "proxy-anchor": (space(margin=(0.0, 0.3), alpha=(16, 64)), proxy_anchor),
    "ddtas, mining none": (USUAL, soft_contrastive(mining="none")),
    "ddtas, symmetric": (USUAL, soft_contrastive(mining="symmetric")),
    "ddtas, asms": (USUAL, soft_contrastive(mining="asms")),
    "ddtas, at-asms": (USUAL, soft_contrastive(mining="at-asms")),
}
# Further variants: memory, two thresholds, steepness, the ratio of the tolerances, and multi-similarity with AT-ASMS.
EXTRA: dict[str, tuple[Draw, Make]] = {
    "ddtas, memory 1024": (USUAL, soft_contrastive(memory=1024)),
    "ddtas, two thresholds": (space(**{"lambda": (0.3, 0.95), "lambda_neg": (0.3, 0.95), "gamma": (0.02, 0.4)}), soft_contrastive()),
    "ddtas, beta": (space(**{"lambda": (0.3, 0.95), "gamma": (0.02, 0.4), "beta": (2, 20)}), soft_contrastive()),
    "ddtas, alpha": (space(**{"lambda": (0.3, 0.95), "gamma": (0.02, 0.4), "alpha": (10, 80)}), soft_contrastive()),
    "ddtas, ratio": (space(**{"lambda": (0.3, 0.95), "gamma": (0.02, 0.4), "negative_ratio": (0.1, 2)}), soft_contrastive()),
    "multi-similarity, at-asms": (space(base=(0.3, 0.9), gamma=(0.02, 0.4)), multi_similarity_at_asms),
}
# Default settings, without tuning; the rate is the same for all.
DEFAULTS: dict[str, dict[str, float]] = {
    "contrastive": {"pos_margin": 1.0, "neg_margin": 0.5},
    "multi-similarity": {"base": 0.5, "epsilon": 0.1},
    "proxy-anchor": {"margin": 0.1, "alpha": 32},
    **{name: {"lambda": 0.7, "gamma": 0.1} for name in LOSSES if name.startswith("ddtas")},
}


def draw_batch(task: Task, rng: np.random.Generator, batch: int) -> tuple[Tensor, Tensor]:
    """Rows and labels of PER_CLASS pictures of each of some classes."""
    drawn = rng.choice(len(task.members), batch // PER_CLASS, replace=False)
    pictures = np.concatenate([rng.choice(task.members[label], PER_CLASS, replace=False) for label in drawn])
    return task.rows[pictures, rng.integers(task.rows.shape[1], size=len(pictures))].float(), task.labels[pictures]


def train(
    task: Task, loss: nn.Module, rate: float, seed: int, batch: int, steps: int, generate: Callable[[nn.Module], Any] | None = None
) -> tuple[float, float]:
    """Trains a head and returns Recall@1 and MAP@R of the test rows, in per cent. `generate` makes a threshold generator for the head."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    head = nn.Linear(task.rows.shape[2], DIMENSIONS)
    generator = generate(head) if generate else None
    groups = [{"params": head.parameters(), "lr": rate}]
    if proxies := list(loss.parameters()):
        groups.append({"params": proxies, "lr": 100 * rate})
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
    for _ in range(steps):
        rows, labels = draw_batch(task, rng, batch)
        if generator:
            generator.step(rows, labels)
        loss_now = loss(functional.normalize(head(rows)), labels)
        optimizer.zero_grad()
        loss_now.backward()
        optimizer.step()
        schedule.step()
    with torch.inference_mode():
        embedded = functional.normalize(head(task.test_rows.float())).numpy()
    result = ddtas.evaluate(embedded, task.test_labels.numpy(), ks=(1,))
    return 100 * result.recall[1], 100 * result.map_at_r


class Runs:
    """The runs in a file, by their settings."""

    def __init__(self, file: Path):
        self.file, self.known = file, {}
        if file.exists():
            with file.open() as lines:
                self.known = {row["run"]: (float(row["recall"]), float(row["map_at_r"])) for row in csv.DictReader(lines)}
        else:
            file.write_text("run,recall,map_at_r\n")

    def get(self, given: dict, compute: Callable[[], tuple[float, float]]) -> tuple[float, float]:
        key = json.dumps(given, sort_keys=True)
        if key not in self.known:
            self.known[key] = compute()
            with self.file.open("a", newline="") as lines:
                csv.writer(lines).writerow([key, *(f"{value:.4f}" for value in self.known[key])])
        return self.known[key]


def load(file: Path) -> tuple[Task, Task]:
    """The task with the last third of the training classes as test, and the whole task."""
    kept = np.load(file)
    rows, test = (torch.from_numpy(kept[name]) for name in ("train", "test"))
    # Features are scaled to the same magnitude, so that rates are comparable between sets.
    scale = rows.float().square().mean().sqrt()
    rows, test = (rows / scale).half(), (test / scale).half()
    labels, test_labels = (torch.from_numpy(kept[f"{name}_labels"]) for name in ("train", "test"))
    inside = labels < (int(labels.max()) + 1) * 2 // 3
    return Task(rows[inside], labels[inside], rows[~inside][:, 0], labels[~inside]), Task(rows, labels, test[:, 0], test_labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch", type=int, default=80)
    parser.add_argument("--trial-batch", type=int)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--trial-seeds", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--only", type=lambda text: text.split(";"), default=None, help="losses by name, ';' between them")
    parser.add_argument("--extra", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    held_out, whole = load(options.features)
    runs = Runs(options.out)

    def run(name: str, part: str, task: Task, make: Make, at: dict[str, float], seed: int) -> tuple[float, float]:
        batch = options.trial_batch if options.trial_batch and task is held_out else options.batch
        given = {"loss": name, "part": part, "seed": seed, "batch": batch, "steps": options.steps, **at}
        def compute() -> tuple[float, float]:
            torch.manual_seed(seed)
            return train(task, make(at, int(task.labels.max()) + 1), at["rate"], seed, batch, options.steps)
        return runs.get(given, compute)

    def tested(name: str, make: Make, at: dict[str, float]) -> list[tuple[float, float]]:
        return [run(name, "test", whole, make, at, 100 + seed) for seed in range(options.seeds)]

    print("| loss | held out | Recall@1 | least to most | MAP@R | settings |\n| --- | --- | --- | --- | --- | --- |", flush=True)
    def row(name: str, chosen: str, results: list[tuple[float, float]], at: dict[str, float]) -> None:
        recalls, maps = zip(*results)
        settings = ", ".join(f"{key} {value:.3g}" for key, value in at.items())
        print(f"| {name} | {chosen} | {statistics.mean(recalls):.2f} | {min(recalls):.2f} to {max(recalls):.2f} | {statistics.mean(maps):.2f} | {settings} |", flush=True)

    for name, (draw, make) in (EXTRA if options.extra else LOSSES).items():
        if options.only and name not in options.only:
            continue
        rng = np.random.default_rng(12345)
        scores = []
        for _ in range(options.trials):
            at = draw(rng)
            results = [run(name, "held out", held_out, make, at, seed) for seed in range(options.trial_seeds)]
            scores.append((statistics.mean(recall for recall, _ in results), at))
        best, at = max(scores, key=lambda score: score[0])
        row(name, f"{best:.2f}", tested(name, make, at), at)
        if name in DEFAULTS:
            at = {"rate": 1e-3, **DEFAULTS[name]}
            row(f"{name}, untuned", "", tested(name, make, at), at)


if __name__ == "__main__":
    main()
