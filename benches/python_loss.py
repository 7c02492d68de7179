"""Compares the Python loss with pytorch-metric-learning's, forward and backward on the CPU; prints one Markdown table.

    pip install '.[torch]' pytorch-metric-learning
    python benches/python_loss.py --batch 80,320 --out results.json

ddtas            ddtas.torch.SoftContrastiveLoss(), which includes mining
metric-learning  MultiSimilarityLoss() with MultiSimilarityMiner(), the closest in pytorch-metric-learning

Rows are a centre for each class of five and noise around it, as in `ddtas-bench throughput`. The noise is found by bisection on 2,000 rows, so
that ddtas mines the share of negatives that is usual in the middle of training (8 %). Each figure is measured in its own process. `peak` is the growth
of the process's memory beyond embeddings and gradient, after a first step on 16 rows; it includes code loaded later. `--out` keeps the
figures of earlier runs that are not measured again.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

CLASS_SIZE = 5
CALIBRATION_ROWS = 2000
# Fewest steps of a figure, unless they take longer than ENOUGH_SECONDS in all.
FEWEST, ENOUGH_SECONDS = 3, 30.0


def draw(batch: int, dim: int, noise: float):
    """Rows as a network outputs them before normalisation, and labels."""
    import torch

    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    labels = torch.arange(batch) // CLASS_SIZE
    centres = torch.nn.functional.normalize(normal(int(labels[-1]) + 1, dim), dim=1)
    rows = centres[labels] + noise * torch.nn.functional.normalize(normal(batch, dim), dim=1)
    return 3 * rows, labels


def mined_share(dim: int, noise: float) -> float:
    import torch

    import ddtas

    rows, labels = draw(CALIBRATION_ROWS, dim, noise)
    output = ddtas.loss(torch.nn.functional.normalize(rows, dim=1), labels)
    return output.mined[1] / (CALIBRATION_ROWS * (CALIBRATION_ROWS - CLASS_SIZE))


def calibrate(dim: int, share: float) -> float:
    low, high = 0.0, 20.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if mined_share(dim, middle) < share else (low, middle)
    return (low + high) / 2


def ours():
    from ddtas.torch import SoftContrastiveLoss

    return SoftContrastiveLoss()


def metric_learning():
    from pytorch_metric_learning import losses, miners

    loss, miner = losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner()
    return lambda rows, labels: loss(rows, labels, miner(rows, labels))


PEERS = {"ddtas": ours, "metric-learning": metric_learning}


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(peer: str, batch: int, options: argparse.Namespace) -> dict:
    import torch

    torch.set_num_threads(options.threads)
    loss = PEERS[peer]()
    rows, labels = draw(batch, options.dim, options.noise)
    rows.requires_grad_()
    small = rows[:16].detach().requires_grad_()
    loss(small, labels[:16]).backward()
    before = peak_bytes()

    def step() -> float:
        rows.grad = None
        start = time.perf_counter()
        loss(rows, labels).backward()
        return 1e3 * (time.perf_counter() - start)

    times = [step()]
    # A step that takes seconds is its own warm-up.
    if times[0] < 1e3:
        times = []
    spent = sum(times) / 1e3
    while spent < options.seconds or (len(times) < FEWEST and spent < ENOUGH_SECONDS):
        times.append(step())
        spent += times[-1] / 1e3
    times.sort()
    return {
        "peer": peer,
        "batch": batch,
        "dim": options.dim,
        "threads": options.threads,
        "noise": options.noise,
        "repeats": len(times),
        "time_ms": statistics.median(times),
        "time_fastest_ms": times[0],
        "time_spread_ms": times[len(times) * 9 // 10] - times[len(times) // 10],
        "peak_extra_bytes": max(0, peak_bytes() - before - 4 * rows.numel()),
    }


def run(peer: str, batch: int, options: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, "--peer", peer, "--batch", str(batch), "--dim", str(options.dim)]
    command += ["--seconds", str(options.seconds), "--threads", str(options.threads), "--noise", str(options.noise)]
    threads = {name: str(options.threads) for name in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:160]
        return {"peer": peer, "batch": batch, "reason": reason}
    return json.loads(done.stdout)


def table(rows: list[dict]) -> str:
    titles = ["B", "ddtas, ms", "metric-learning, ms", "times faster", "ddtas peak, MB", "metric-learning peak, MB"]
    lines = ["| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)]
    for batch in sorted({row["batch"] for row in rows}):
        both = [next((row for row in rows if (row["batch"], row["peer"]) == (batch, peer)), {}) for peer in PEERS]
        times = [row.get("time_ms") for row in both]
        cells = [str(batch)] + ["-" if value is None else f"{value:.2f}" for value in times]
        cells.append("-" if None in times else f"{times[1] / times[0]:.1f}")
        cells += ["-" if "peak_extra_bytes" not in row else f"{row['peak_extra_bytes'] / 1e6:.1f}" for row in both]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [f"\n- not measured: {row['peer']} at B = {row['batch']}: {row['reason']}" for row in rows if "reason" in row]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--batch", type=numbers, default=[80, 320, 1280, 5120, 10240], help="rows, separated by commas")
    parser.add_argument("--peers", type=lambda text: text.split(","), default=list(PEERS))
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--share", type=float, default=0.08, help="negatives that ddtas mines, of all")
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each figure")
    parser.add_argument("--out", type=Path, help="also write every figure to this JSON file")
    parser.add_argument("--noise", type=float, help="length of the noise over that of a centre; found if left out")
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        print(json.dumps(measure(options.peer, options.batch[0], options)))
        return
    if unknown := set(options.peers) - set(PEERS):
        sys.exit(f"--peers {','.join(unknown)}: known are {', '.join(PEERS)}")
    if options.noise is None:
        options.noise = calibrate(options.dim, options.share)
    rows = json.loads(options.out.read_text()) if options.out and options.out.is_file() else []
    for batch in options.batch:
        for peer in options.peers:
            rows = [row for row in rows if (row["batch"], row["peer"]) != (batch, peer)]
            rows.append(run(peer, batch, options))
            print(f"{peer} {batch}: {rows[-1].get('time_ms', rows[-1].get('reason'))}", file=sys.stderr, flush=True)
            if options.out:
                options.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
