"""Trains heads on frozen features with a fixed loss threshold and with one that a generator learns from there.

    python3 benches/study/generator.py FEATURES.npz OUT.csv [--mining at-asms] [--steps 200] [--seeds 5] [--only "ROW;..."]

FEATURES.npz is written by features.py; the head and its training are those of heads.py, with a rate of 0.001 and batches of 80. OUT.csv keeps every run,
and the threshold at its end. Prints a Markdown table. Needs ddtas, torch, numpy, pytorch-metric-learning.
"""

import argparse
import csv
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ddtas.torch import SoftContrastiveLoss, ThresholdGenerator
from heads import Task, draw_batch, load, train

RATE, BATCH = 1e-3, 80
STARTS = (0.3, 0.5, 0.7, 0.9)


class FreshMeta:
    """A generator whose meta batch is drawn anew in each step."""

    def __init__(self, generator: ThresholdGenerator, task: Task, seed: int) -> None:
        self.generator, self.task, self.rng = generator, task, np.random.default_rng(1000 + seed)

    def step(self, rows: Tensor, labels: Tensor) -> None:
        self.generator.step(rows, labels, draw_batch(self.task, self.rng, BATCH))


# Settings of the generator, and whether its meta batch is drawn anew.
GENERATORS = {
    "fixed": None,
    "recent, 1": ({"virtual_rate": 1.0}, False),
    "recent, 0.3": ({"virtual_rate": 0.3}, False),
    "recent, 0.1": ({"virtual_rate": 0.1}, False),
    "fresh, 1": ({"virtual_rate": 1.0}, True),
    "fresh, 0.1": ({"virtual_rate": 0.1}, True),
}


def maker(name: str, loss: SoftContrastiveLoss, task: Task, seed: int) -> Callable[[nn.Module], ThresholdGenerator | FreshMeta] | None:
    """Makes the generator of a row of the table for a head."""
    if GENERATORS[name] is None:
        return None
    settings, fresh = GENERATORS[name]
    make = partial(ThresholdGenerator, loss, **settings)
    return (lambda head: FreshMeta(make(head), task, seed)) if fresh else make


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--mining", default="at-asms")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", type=lambda text: text.split(";"), default=list(GENERATORS), help="rows of the table, ';' between them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    _, task = load(options.features)
    rows, cells = [], {}
    for name in options.only:
        for start in STARTS:
            runs = []
            for seed in range(100, 100 + options.seeds):
                torch.manual_seed(seed)
                loss = SoftContrastiveLoss(lambda_pos=start, lambda_neg=start, mining=options.mining, threads=1)
                recall, map_at_r = train(task, loss, RATE, seed, BATCH, options.steps, maker(name, loss, task, seed))
                runs.append((recall, loss.settings.lambda_pos))
                rows.append((name, start, seed, f"{recall:.4f}", f"{map_at_r:.4f}", f"{runs[-1][1]:.4f}"))
            recalls, ends = zip(*runs)
            text = f"{statistics.mean(recalls):.1f} ({min(recalls):.1f} to {max(recalls):.1f})"
            cells[name, start] = text if GENERATORS[name] is None else f"{text} [{min(ends):.2f} to {max(ends):.2f}]"
    with options.out.open("w", newline="") as lines:
        csv.writer(lines).writerows([("lambda", "start", "seed", "recall", "map_at_r", "end"), *rows])
    print("| meta batch, `virtual_rate` |" + "".join(f" from {start} |" for start in STARTS) + "\n|" + " --- |" * (1 + len(STARTS)))
    for name in options.only:
        print(f"| {name} |" + "".join(f" {cells[name, start]} |" for start in STARTS))


if __name__ == "__main__":
    main()
