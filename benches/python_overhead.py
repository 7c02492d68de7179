"""Overhead of PyTorch over the Rust call: times forward and backward of the module, and the call that computes; prints a Markdown table.

    pip install '.[torch]'
    python benches/python_overhead.py --threads 1

Rows are those of python_loss.py. `call` is the call of the compiled extension as the operator makes it, on rows that are not normalised yet:
normalisation, mining, loss and gradient. `forward + backward` is `loss(rows, labels).backward()` of the module. The two take turns for several
rounds, and each figure is the median of the rounds' means. Run it once for each number of threads.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from python_loss import draw  # noqa: E402

# Length of the noise around centres of length 1, for about the share of mined negatives that is usual in the middle
# of training.
NOISE = 2.4
ROUNDS = 9


def mean_us(run, seconds: float) -> float:
    start, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - start < seconds:
        run()
        count += 1
    return 1e6 * (time.perf_counter() - start) / count


def measure(batch: int, dim: int, threads: int, seconds: float) -> dict:
    import torch

    from ddtas import _ddtas
    from ddtas.torch import SoftContrastiveLoss

    torch.set_num_threads(threads)
    loss = SoftContrastiveLoss()
    given, labels = draw(batch, dim, NOISE)
    rows = given.clone().requires_grad_()
    place = (given.data_ptr(), labels.data_ptr(), batch, dim, 0)
    numbers = (0.1, 0.1, 0.1, 0.5, 40.0, 2.0, 0.7, 0.7)

    def call() -> tuple:
        return _ddtas._loss_at(loss._engine.host, place, None, 0, "at-asms", numbers, (True, False, True))

    def step() -> None:
        rows.grad = None
        loss(rows, labels).backward()

    step()
    assert loss.statistics["active"] > 0 and call()[0] == loss(rows, labels).item()
    times = {"call": [], "step": []}
    for _ in range(ROUNDS if batch < 10_000 else 3):
        for name, run in (("call", call), ("step", step)):
            times[name].append(mean_us(run, seconds))
    middle = {name: statistics.median(values) for name, values in times.items()}
    spread = {f"{name}_spread_us": max(values) - min(values) for name, values in times.items()}
    shape = {"batch": batch, "dim": dim, "threads": threads}
    return shape | {"call_us": middle["call"], "step_us": middle["step"], "overhead_us": middle["step"] - middle["call"]} | spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=lambda text: [int(part) for part in text.split(",")], default=[80, 1024, 16384])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.2, help="time spent on each round of each figure")
    parser.add_argument("--out", type=Path, help="also write every figure to this JSON file")
    options = parser.parse_args()
    for name in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(options.threads)
    figures = [measure(batch, options.dim, options.threads, options.seconds) for batch in options.batch]
    print("| B | threads | call, us | forward + backward, us | above the call, us |\n| --- | --- | --- | --- | --- |")
    for figure in figures:
        cells = [figure["batch"], figure["threads"], *(f"{figure[name]:.1f}" for name in ("call_us", "step_us", "overhead_us"))]
        print("| " + " | ".join(str(cell) for cell in cells) + " |")
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
