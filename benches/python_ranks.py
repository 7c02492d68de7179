"""Times the loss of a process group, forward and backward: 2 processes with one thread each, and 1 process with two threads.

    python benches/python_ranks.py [--batches 1280,5120] [--dim 512] [--repeats 9] [--share 0.08]

Prints a line of JSON for each batch size: milliseconds (medians; the two alternate), and the bytes that a process gathers in a step.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import torch.distributed as dist
from ddtas.torch import SoftContrastiveLoss
from python_loss import calibrate, draw


def step(loss, rows, labels) -> float:
    start = time.perf_counter()
    loss(rows, labels).backward()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1280,5120")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--share", type=float, default=0.08, help="of the negatives that are mined")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            again = [sys.executable, *sys.argv]
            noise = calibrate(options.dim, options.share)
            here = os.environ | {"STORE": f"{folder}/store", "NOISE": str(noise)}
            both = [subprocess.Popen(again, env=here | {"RANK": str(rank)}) for rank in range(2)]
            sys.exit(max(process.wait() for process in both))
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{os.environ['STORE']}", rank=rank, world_size=2)
    many, one = SoftContrastiveLoss(group=dist.group.WORLD, threads=1), SoftContrastiveLoss(threads=2)
    for batch in map(int, options.batches.split(",")):
        rows, labels = draw(batch, options.dim, float(os.environ["NOISE"]))
        own = slice(rank * batch // 2, (rank + 1) * batch // 2)
        mine, whole = (side.clone().requires_grad_() for side in (rows[own], rows))
        times = {"two_processes_ms": [], "one_process_ms": []}
        for turn in range(options.repeats + 1):
            before = many.ranks.gathered_bytes
            dist.barrier()
            of_many = step(many, mine, labels[own])
            gathered = many.ranks.gathered_bytes - before
            dist.barrier()
            # Meanwhile the other process waits in the barrier.
            of_one = step(one, whole, labels) if rank == 0 else 0.0
            dist.barrier()
            if turn:
                times["two_processes_ms"].append(of_many)
                times["one_process_ms"].append(of_one)
        if rank == 0:
            medians = {name: round(statistics.median(found), 3) for name, found in times.items()}
            share = many.statistics["negatives"] / batch**2
            print(json.dumps({"batch": batch, "dim": options.dim, **medians, "gathered_bytes": gathered, "mined_share": round(share, 4)}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
