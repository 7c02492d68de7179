"""Times the loss of a process group, forward and backward: 2 processes with one thread each, and 1 process with two threads.

    python benches/python_ranks.py [--batches 1280,5120] [--dim 512] [--repeats 9] [--share 0.08] [--two-networks]

With --two-networks as many references, of a second network, get their gradient too. Prints a line of JSON for each batch size: milliseconds (medians; the two alternate), and the bytes that a process gathers in a step.
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


def step(loss, rows, labels, references) -> float:
    more = {} if references is None else {"ref_emb": references, "ref_labels": labels}
    start = time.perf_counter()
    loss(rows, labels, **more).backward()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1280,5120")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--share", type=float, default=0.08, help="of the negatives that are mined")
    parser.add_argument("--two-networks", action="store_true", help="compare with references that get a gradient")
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
    many = SoftContrastiveLoss(group=dist.group.WORLD, threads=1, gather_references=options.two_networks)
    one = SoftContrastiveLoss(threads=2)
    for batch in map(int, options.batches.split(",")):
        rows, labels = draw(batch, options.dim, float(os.environ["NOISE"]))
        own = slice(rank * batch // 2, (rank + 1) * batch // 2)
        mine, whole = (side.clone().requires_grad_() for side in (rows[own], rows))
        own_references = all_references = None
        if options.two_networks:
            # Other rows of the same classes: half-way between two of each.
            others = rows + rows.roll(1, 0)
            own_references, all_references = (side.clone().requires_grad_() for side in (others[own], others))
        times = {"two_processes_ms": [], "one_process_ms": []}
        for turn in range(options.repeats + 1):
            before = many.ranks.gathered_bytes
            dist.barrier()
            of_many = step(many, mine, labels[own], own_references)
            gathered = many.ranks.gathered_bytes - before
            dist.barrier()
            # Meanwhile the other process waits in the barrier.
            of_one = step(one, whole, labels, all_references) if rank == 0 else 0.0
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
