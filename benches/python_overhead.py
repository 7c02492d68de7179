"""Overhead of PyTorch over the Rust call: times forward and backward of the modules, and the call that computes; prints a Markdown table.

    pip install '.[torch]'
    python benches/python_overhead.py --threads 1
    python benches/python_overhead.py --device cuda

Rows are those of python_loss.py. `call` is the call of the compiled extension as the operator makes it. For `loss` it takes rows that are not
normalised yet: normalisation, mining, loss and gradient. For `memory`, a CrossBatchMemory of B rows, which the batch fills, it takes unit rows:
mining, loss and gradient. `forward + backward` is `module(rows, labels).backward()`. The two take turns for several rounds, and each figure is
the median of the rounds' means. On a GPU a round issues its calls without waiting, and ends when all have run. Run it once for each number of
threads. `--device emulated` tries the way of a GPU in a package with the emulated device.
"""

import argparse
import json
import os
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "python/tests")]
from python_loss import draw  # noqa: E402

# Length of the noise around centres of length 1, for about the share of mined negatives that is usual in the middle
# of training.
NOISE = 2.4
ROUNDS = 9
MOST_CALLS = 1000
NUMBERS = (0.1, 0.1, 0.1, 0.5, 40.0, 2.0, 0.7, 0.7)


def compiled_call(engine, rows, labels, references, normalize: bool):
    """The call of the compiled extension with the operator's arguments, a function that returns its loss, and tensors that must live as
    long as both, as those given must."""
    import torch

    from ddtas import _ddtas
    from ddtas.torch import operator

    on_gpu = engine.uses_gpu(rows)
    identity = torch.arange(len(rows) if references else 0, dtype=torch.int32 if on_gpu else torch.int64, device=rows.device)
    sides = [(rows, labels), *references]
    if not on_gpu:
        places = [(side.data_ptr(), of.data_ptr(), *side.shape, 0) for side, of in sides] + [None] * (2 - len(sides))
        flags, known = (normalize, False, normalize), identity.data_ptr()
        call = lambda: _ddtas._loss_at(engine.host, *places, known, "at-asms", NUMBERS, flags)  # noqa: E731
        return call, lambda: call()[0].item(), identity
    gpu, place = engine.on_gpu(rows)
    value, gradient, _, written = outputs = operator._empty_outputs(rows, None, False)
    targets = [operator.target_of(*side, to) for side, to in zip(sides, (gradient, None))]
    output, known = (written.data_ptr(), value.data_ptr()), identity.data_ptr()
    enqueue = lambda: gpu.enqueue_loss(place, targets, known, 0, "at-asms", NUMBERS, True, output, normalize)  # noqa: E731
    return enqueue, lambda: (enqueue(), value.item())[1], (identity, outputs)


def measure(kind: str, batch: int, dim: int, threads: int, device: str, seconds: float) -> dict:
    import torch

    from ddtas.torch import CrossBatchMemory, SoftContrastiveLoss

    torch.set_num_threads(threads)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    given, labels = (side.to("cuda" if device == "cuda" else "cpu") for side in draw(batch, dim, NOISE))
    rows = given.clone().requires_grad_()
    loss = SoftContrastiveLoss()
    module = loss if kind == "loss" else CrossBatchMemory(loss, dim, batch).to(rows.device)

    def step() -> None:
        rows.grad = None
        module(rows, labels).backward()

    step()
    compared, references = (given, []) if kind == "loss" else (loss.unit_rows(given)[0], [(module.embedding_memory, module.label_memory)])
    call, value, held = compiled_call(loss._engine, compared, labels, references, kind == "loss")
    assert loss.statistics["active"] > 0 and value() == module(rows, labels).item()

    def mean_us(run, count: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(count):
            run()
        wait()
        return 1e6 * (time.perf_counter() - start) / count

    runs = {"call": call, "step": step}
    counts = {name: max(1, min(MOST_CALLS, int(1e6 * seconds / mean_us(run, 3)))) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS if batch < 10_000 else 3):
        for name, run in runs.items():
            times[name].append(mean_us(run, counts[name]))
    middle = {name: statistics.median(values) for name, values in times.items()}
    spread = {f"{name}_spread_us": max(values) - min(values) for name, values in times.items()}
    del held
    shape = {"module": kind, "batch": batch, "dim": dim, "threads": threads, "device": device}
    return shape | {"call_us": middle["call"], "step_us": middle["step"], "overhead_us": middle["step"] - middle["call"]} | spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=lambda text: [int(part) for part in text.split(",")], default=[80, 1024, 16384])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--device", choices=["cpu", "cuda", "emulated"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.2, help="time spent on each round of each figure")
    parser.add_argument("--out", type=Path, help="also write every figure to this JSON file")
    options = parser.parse_args()
    for name in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(options.threads)
    if options.device == "emulated":
        from emulated import emulated_gpu as place
    else:
        place = nullcontext
    with place():
        figures = [
            measure(kind, batch, options.dim, options.threads, options.device, options.seconds)
            for kind in ("loss", "memory")
            for batch in options.batch
        ]
    print("| module | B | threads | call, us | forward + backward, us | above the call, us |\n| --- | --- | --- | --- | --- | --- |")
    for figure in figures:
        cells = [*(figure[name] for name in ("module", "batch", "threads"))]
        cells += [f"{figure[name]:.1f}" for name in ("call_us", "step_us", "overhead_us")]
        print("| " + " | ".join(str(cell) for cell in cells) + " |")
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
