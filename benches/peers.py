"""Compares ddtas on the CPU with other implementations, on the same embeddings, in one run; prints one Markdown table.

    cargo build --release -p ddtas-bench
    python3 benches/peers.py --batch 80,1280 --out results.json

loop             the formula anchor by anchor, like the authors' code (small B only)
metric-learning  MultiSimilarityMiner and MultiSimilarityLoss, the closest in pytorch-metric-learning
dense            the same loss in dense torch, forward and backward (benches/device/dense.py)
gemms            only S = E E^T and dE = S E: a lower bound for a loss that is not fused

They take turns for several rounds, and the ratios are between the fastest calls of each: on a shared machine, slower calls
depend on other users. The medians are in --out.

Needs torch and numpy; pytorch-metric-learning if it is to be measured.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import softplus

sys.path.insert(0, str(Path(__file__).parent / "device"))
import dense  # noqa: E402
import tensors  # noqa: E402

# Largest batches of the loop and of pytorch-metric-learning; beyond them a step takes seconds.
LOOP_MOST, LIBRARY_MOST = 320, 2560
FEWEST = 5
# Seconds after which calls are not repeated, even if there were fewer than FEWEST.
LONGEST = 15.0


def settings_of(metadata: dict[str, str]) -> dict:
    stated = {name: float(metadata[name]) for name in dense.SETTINGS if name != "adaptive"}
    return stated | {"adaptive": metadata["adaptive"] == "true"}


def authors_loop(embeddings: torch.Tensor, labels: torch.Tensor, settings: dict) -> torch.Tensor:
    """SPEC 1-4 as in the authors' code: rows of S one by one, sets by boolean indexing."""
    similarity = embeddings @ embeddings.T
    gamma = settings["gamma"]
    rows, probe, total = [], 0, 0
    for i in range(len(labels)):
        same = labels == labels[i]
        pos = similarity[i][same & (similarity[i] < 1 - 1e-6)]
        neg = similarity[i][~same]
        rows.append((pos, neg))
        total += len(pos)
        if len(pos):
            probe += int((neg > pos.min() - gamma * settings["probe_neg_ratio"]).sum())
    rho = probe / max(total, 1)
    t = settings["tolerance"] / (1 + 2.718281828459045**-rho) if settings["adaptive"] and rho > 1 else 0.0
    terms = [embeddings.sum() * 0]
    for pos, neg in rows:
        if not len(pos) or not len(neg):
            continue
        kept_pos = pos[pos < neg.max() + gamma * (1 + t)]
        kept_neg = neg[neg > pos.min() - gamma * settings["neg_ratio"] * (1 - t)]
        if len(kept_pos) and len(kept_neg):
            terms.append(2 / settings["beta"] * softplus(-settings["beta"] * (kept_pos - settings["lam_pos"])).mean())
            terms.append(2 / settings["alpha"] * softplus(settings["alpha"] * (kept_neg - settings["lam_neg"])).mean())
    return torch.stack(terms).sum() / len(labels)


def metric_learning(embeddings: torch.Tensor, labels: torch.Tensor, _: dict) -> torch.Tensor:
    from pytorch_metric_learning import losses, miners

    return losses.MultiSimilarityLoss()(embeddings, labels, miners.MultiSimilarityMiner()(embeddings, labels))


def forward_backward(loss: Callable, embeddings: torch.Tensor, labels: torch.Tensor, settings: dict) -> Callable[[], float]:
    leaf = embeddings.clone().requires_grad_()

    def step() -> float:
        leaf.grad = None
        value = loss(leaf, labels, settings)
        value.backward()
        return value.item()

    return step


def gemms(embeddings: torch.Tensor, *_) -> Callable[[], None]:
    similarity = torch.empty(len(embeddings), len(embeddings))
    gradient = torch.empty_like(embeddings)

    def step() -> None:
        torch.mm(embeddings, embeddings.T, out=similarity)
        torch.mm(similarity, embeddings, out=gradient)

    return step


PEERS = {
    "loop": lambda *given: forward_backward(authors_loop, *given),
    "metric-learning": lambda *given: forward_backward(metric_learning, *given),
    "dense": lambda *given: forward_backward(dense.loss, *given),
    "gemms": gemms,
}


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure_peer(name: str, path: Path, seconds: float, threads: int) -> dict:
    """Measures a peer. Runs in its own process, so that the peak of memory is that of this peer."""
    torch.set_num_threads(threads)
    loaded, metadata = tensors.load(path)
    embeddings, labels = loaded["embeddings"], loaded["labels"]
    (embeddings[:8] @ embeddings[:8].T).sum()  # starts MKL before memory is counted
    before = peak_bytes()
    step = PEERS[name](embeddings, labels, settings_of(metadata))
    begin = time.perf_counter()
    value = step()
    if time.perf_counter() - begin < LONGEST / FEWEST:
        step()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < FEWEST or time.perf_counter() - begin < seconds:
        if times and time.perf_counter() - begin > LONGEST:
            break
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    # Minus the gradient, which is the result.
    extra = max(0, peak_bytes() - before - 4 * embeddings.numel())
    return {"time_ms": statistics.median(times), "time_best_ms": min(times), "peak_extra_bytes": extra, "loss": value}


def joined(rounds: list[dict]) -> dict:
    """Combines the rounds of one peer: the median of medians, the fastest of the fastest."""
    failed = [entry for entry in rounds if "reason" in entry]
    if failed:
        return failed[0]
    return rounds[0] | {
        "time_ms": statistics.median(entry["time_ms"] for entry in rounds),
        "time_best_ms": min(entry["time_best_ms"] for entry in rounds),
        "peak_extra_bytes": max(entry["peak_extra_bytes"] for entry in rounds),
    }


def run_peer(name: str, path: Path, options: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, "--peer", name, "--file", str(path)]
    command += ["--seconds", str(options.seconds), "--threads", str(options.threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"reason": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:160]}
    return json.loads(done.stdout)


def run_ours(path: Path, options: argparse.Namespace, *arguments: str) -> dict:
    command = [str(options.binary), "throughput", "--json", "--backend", "cpu", "--seconds", str(options.seconds), *arguments]
    command += ["--save-embeddings" if arguments else "--embeddings", str(path)]
    environment = os.environ | {"RAYON_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stderr.strip() or f"{options.binary} failed")
    return json.loads(done.stdout)[0]


def table(entries: list[dict]) -> str:
    titles = ["B", "density", "mined, %", "ddtas, ms", "two GEMMs, ms", "dense, ms", "metric-learning, ms", "loop, ms",
              "ddtas / two GEMMs", "dense / ddtas", "ddtas extra, MB", "dense extra, MB"]
    lines = ["| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)]

    def cell(value: float | None, digits: int = 2) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    for entry in entries:
        ours, peers = entry["ddtas"], entry["peers"]
        times = {name: peers.get(name, {}).get("time_best_ms") for name in PEERS}
        dense_bytes = peers.get("dense", {}).get("peak_extra_bytes")
        cells = [str(ours["batch"]), ours["density"], cell(100 * ours["mined_share"]), cell(ours["time_best_ms"], 3)]
        cells += [cell(times[name], 3) for name in ("gemms", "dense", "metric-learning", "loop")]
        cells.append(cell(ours["time_best_ms"] / times["gemms"] if times["gemms"] else None))
        cells.append(cell(times["dense"] / ours["time_best_ms"] if times["dense"] else None))
        cells.append(cell(ours["peak_extra_bytes"] / 1e6))
        cells.append(cell(dense_bytes / 1e6 if dense_bytes is not None else None))
        lines.append("| " + " | ".join(cells) + " |")
    reasons = sorted({f"{name} at B = {entry['ddtas']['batch']}: {peer['reason']}"
                      for entry in entries for name, peer in entry["peers"].items() if "reason" in peer})
    return "\n".join(lines + [""] + [f"- not measured: {reason}" for reason in reasons])


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=numbers, default=[80, 1280, 5120], help="rows, separated by commas")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--density", type=lambda text: text.split(","), default=["late", "middle", "start", "all"])
    parser.add_argument("--binary", type=Path, default=Path("target/release/ddtas-bench"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.3, help="time spent on each figure in a round")
    parser.add_argument("--rounds", type=int, default=3, help="turns of ddtas and of the peers that are quick")
    parser.add_argument("--peers", type=lambda text: text.split(","), default=list(PEERS), help="which to measure, separated by commas")
    parser.add_argument("--out", type=Path, help="also write every figure to this JSON file")
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        print(json.dumps(measure_peer(options.peer, options.file, options.seconds, options.threads)))
        return
    if not options.binary.is_file():
        sys.exit(f"there is no {options.binary}: cargo build --release -p ddtas-bench")
    entries = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "embeddings.safetensors"
        for batch in options.batch:
            for density in options.density:
                run_ours(path, argparse.Namespace(**vars(options) | {"seconds": 0.0}),
                         "--batch", str(batch), "--dim", str(options.dim), "--density", density)
                too_many = {"loop": LOOP_MOST, "metric-learning": LIBRARY_MOST}
                names = [name for name in options.peers if batch <= too_many.get(name, batch)]
                rounds: dict[str, list[dict]] = {name: [] for name in ["ddtas", *names]}
                for turn in range(options.rounds):
                    rounds["ddtas"].append(run_ours(path, options))
                    for name in names:
                        if turn == 0 or name not in too_many:
                            rounds[name].append(run_peer(name, path, options))
                entries.append({"ddtas": joined(rounds.pop("ddtas")), "peers": {name: joined(turns) for name, turns in rounds.items()}})
                print(f"{batch} {density} done", file=sys.stderr, flush=True)
                if options.out:
                    options.out.write_text(json.dumps(entries, indent=1) + "\n")
    print(table(entries))


if __name__ == "__main__":
    main()
