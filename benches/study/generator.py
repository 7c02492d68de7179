"""Trains heads on frozen features with a fixed loss threshold and with one that a generator learns from there.

    python3 benches/study/generator.py FEATURES.npz OUT.csv [--mining at-asms] [--steps 200] [--seeds 5]

FEATURES.npz is written by features.py; the head and its training are those of heads.py, with a rate of 0.001 and batches of 80. OUT.csv keeps every run,
and the threshold at its end. Prints a Markdown table. Needs ddtas, torch, numpy, pytorch-metric-learning.
"""

import argparse
import csv
import statistics
from functools import partial
from pathlib import Path

import torch

from ddtas.torch import SoftContrastiveLoss, ThresholdGenerator
from heads import load, train

RATE, BATCH = 1e-3, 80
STARTS = (0.3, 0.5, 0.7, 0.9)
GENERATORS = {
    "fixed": None,
    "learned": {},
    "learned, `virtual_rate=0.1`": {"virtual_rate": 0.1},
    "learned, `lambda_rate=0.003`": {"lambda_rate": 0.003},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--mining", default="at-asms")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    _, task = load(options.features)
    rows, cells = [], {}
    for name, settings in GENERATORS.items():
        for start in STARTS:
            runs = []
            for seed in range(100, 100 + options.seeds):
                torch.manual_seed(seed)
                loss = SoftContrastiveLoss(lambda_pos=start, lambda_neg=start, mining=options.mining, threads=1)
                generate = None if settings is None else partial(ThresholdGenerator, loss, **settings)
                recall, map_at_r = train(task, loss, RATE, seed, BATCH, options.steps, generate)
                runs.append((recall, loss.settings.lambda_pos))
                rows.append((name, start, seed, f"{recall:.4f}", f"{map_at_r:.4f}", f"{runs[-1][1]:.4f}"))
            recalls, ends = zip(*runs)
            text = f"{statistics.mean(recalls):.1f} ({min(recalls):.1f} to {max(recalls):.1f})"
            cells[name, start] = text if settings is None else f"{text} [{min(ends):.2f} to {max(ends):.2f}]"
    with options.out.open("w", newline="") as lines:
        csv.writer(lines).writerows([("lambda", "start", "seed", "recall", "map_at_r", "end"), *rows])
    print("| lambda |" + "".join(f" from {start} |" for start in STARTS) + "\n|" + " --- |" * (1 + len(STARTS)))
    for name in GENERATORS:
        print(f"| {name} |" + "".join(f" {cells[name, start]} |" for start in STARTS))


if __name__ == "__main__":
    main()
