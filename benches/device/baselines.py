"""Times the implementations that ddtas is compared with, on the rows of `ddtas-bench throughput --save-embeddings`; prints one JSON array.

gemms            only S = E E^T and dE = S E: a lower bound for a loss that is not fused
dense            the same loss in eager torch, forward and backward
compiled         the same with torch.compile
metric-learning  pytorch-metric-learning's multi-similarity loss with its miner

A time is null, with the reason, if the rows do not fit the device.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import dense
import tensors

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from peers import metric_learning, settings_of  # noqa: E402

TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# Largest S of `gemms` in one piece (8 GiB in bf16); a larger one is computed in stripes of rows.
STRIPE_ELEMENTS = 1 << 32


def measure(step: Callable[[], object], seconds: float, device: str) -> tuple[float, float]:
    """Median and spread (90th - 10th percentile) in milliseconds, after warming up."""
    for _ in range(3):
        step()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - begin < seconds and len(times) < 200):
        if device == "cpu":
            start = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - start))
        else:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    times.sort()
    return statistics.median(times), times[len(times) * 9 // 10] - times[len(times) // 10]


def gemms(embeddings: torch.Tensor) -> Callable[[], object]:
    count = len(embeddings)
    stripe = max(1, min(count, STRIPE_ELEMENTS // count))
    similarity = torch.empty(stripe, count, dtype=embeddings.dtype, device=embeddings.device)
    gradient = torch.empty_like(embeddings)

    def step() -> None:
        for start in range(0, count, stripe):
            rows = embeddings[start : start + stripe]
            product = similarity[: len(rows)]
            torch.mm(rows, embeddings.T, out=product)
            torch.mm(product, embeddings, out=gradient[start : start + stripe])

    return step


def forward_backward(loss: Callable[[torch.Tensor], torch.Tensor], embeddings: torch.Tensor) -> Callable[[], object]:
    """Unlike that of peers.py, does not read the loss's value, which on a GPU would add to the time."""
    leaf = embeddings.clone().requires_grad_()

    def step() -> None:
        leaf.grad = None
        loss(leaf).backward()

    return step


def peers(embeddings: torch.Tensor, labels: torch.Tensor, settings: dict) -> dict[str, Callable[[], Callable[[], object]]]:
    """Name and maker of each step; a maker may fail for lack of memory or of a package."""
    compiled = torch.compile(dense.loss, dynamic=False)
    return {
        "gemms": lambda: gemms(embeddings),
        "dense": lambda: forward_backward(lambda e: dense.loss(e, labels, settings), embeddings),
        "compiled": lambda: forward_backward(lambda e: compiled(e, labels, settings), embeddings),
        "metric-learning": lambda: forward_backward(lambda e: metric_learning(e, labels, settings), embeddings.float()),
    }


def run(path: Path, dtype: str, options: argparse.Namespace) -> list[dict]:
    loaded, metadata = tensors.load(path)
    embeddings = loaded["embeddings"].to(options.device, TYPES[dtype])
    labels = loaded["labels"].to(options.device)
    count, dim = embeddings.shape
    rows = []
    for name, make in peers(embeddings, labels, settings_of(metadata)).items():
        if name not in options.peers:
            continue
        row = {"name": name, "batch": count, "dim": dim, "dtype": dtype, "density": metadata["density"]}
        row |= {"time_ms": None, "time_spread_ms": None, "tflops": None, "peak_extra_bytes": None}
        try:
            if options.device != "cpu":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            row["time_ms"], row["time_spread_ms"] = measure(make(), options.seconds, options.device)
            # Counts only the operations of the two products, for every peer.
            row["tflops"] = 4 * count * count * dim / row["time_ms"] / 1e9
            if options.device != "cpu":
                row["peak_extra_bytes"] = torch.cuda.max_memory_allocated() - before
        except (RuntimeError, ImportError) as error:  # torch.OutOfMemoryError is a RuntimeError
            row["reason"] = str(error).splitlines()[0][:160]
        print(f"{name} {path.stem} {dtype}: {row['time_ms']} ms {row.get('reason', '')}", file=sys.stderr, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="files of rows")
    parser.add_argument("--dtype", choices=TYPES, default="bf16")
    parser.add_argument("--peers", type=lambda text: text.split(","), default=["gemms", "dense", "compiled", "metric-learning"])
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each figure")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    # A dense loss of f32 rows uses TF32 like ddtas's fast path, if the GPU has it.
    torch.backends.cuda.matmul.allow_tf32 = True
    print(json.dumps([row for path in options.files for row in run(path, options.dtype, options)], indent=1))


if __name__ == "__main__":
    main()
