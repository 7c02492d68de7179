"""Compares runs of ddtas-train over several seeds: mean and range of Recall@1 on the test classes, or on held-out ones.

    cargo build --release
    python3 benches/study/runs.py OUT TABLE.txt [--data-root DIR [--held-out]] [--seeds 0,1,2,3,4] [--more "ARGS"]

Each line of TABLE.txt is `title: arguments of ddtas-train`; a # begins a comment. --more are arguments for every run. --held-out is for choosing settings: it
trains on the first two thirds of the training classes of DIR, measures on the other third, and does not use the test classes.

OUT gets a run folder for each line and seed, and raw.csv. Runs that are already there are not repeated, so a study can be interrupted and continued.
Prints a Markdown table, with the last lambda of runs that learn it. In raw.csv, recall_at_1_before is that of the initial weights, and active_anchors
the mean over a run's steps of the number of anchors in the loss.
"""

import argparse
import csv
import json
import re
import shlex
import statistics
import subprocess
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "target/release/ddtas-train"


def rows_of(file: Path) -> list[tuple[str, list[str]]]:
    lines = [line.split("#")[0].strip() for line in file.read_text().splitlines()]
    pairs = [line.partition(":") for line in lines if line]
    return [(title.strip(), shlex.split(arguments)) for title, _, arguments in pairs]


def held_out(root: Path, place: Path) -> list[str]:
    """Makes a folder with only the training classes of `root`; returns the arguments to train on two thirds of them."""
    classes = sorted(folder.resolve() for folder in root.iterdir() if folder.is_dir())
    classes = classes[: len(classes) // 2]
    place.mkdir(parents=True, exist_ok=True)
    for folder in classes:
        if not (place / folder.name).exists():
            (place / folder.name).symlink_to(folder)
    return ["--data-root", str(place), "--train-classes", str(len(classes) * 2 // 3)]


def run(program: Path, folder: Path, arguments: list[str]) -> list[dict]:
    """The records of a run; trains it first if the folder does not exist."""
    if not (folder / "report.html").exists():
        if folder.exists():
            raise SystemExit(f"runs.py: {folder} holds a run that was cut short: remove it and start again")
        done = subprocess.run([program, "--output", folder, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"runs.py: {' '.join(map(str, done.args))}: {done.stderr.strip()}")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def folder_of(title: str, seed: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", title) + f"-seed{seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("table", type=Path)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--seeds", type=lambda text: text.split(","), default=["0", "1", "2", "3", "4"])
    parser.add_argument("--more", type=shlex.split, default=[])
    parser.add_argument("--program", type=Path, default=PROGRAM)
    options = parser.parse_args()
    if options.held_out and not options.data_root:
        parser.error("--held-out needs --data-root DIR")

    common = ["--evaluate-every", "0", *options.more]
    if options.data_root:
        place = held_out(options.data_root, options.out / "held-out") if options.held_out else ["--data-root", str(options.data_root)]
        common += ["--dataset", "folder", *place]
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "raw.csv").open("w", newline="") as file:
        raw = csv.writer(file)
        raw.writerow(["run", "seed", "recall_at_1_before", "recall_at_1", "last_lambda", "active_anchors", "arguments"])
        print("| run | Recall@1 | least to most | last lambda |\n| --- | --- | --- | --- |", flush=True)
        for title, arguments in rows_of(options.table):
            recalls, lambdas = [], []
            for seed in options.seeds:
                given = [*common, *arguments, "--seed", seed]
                records = run(options.program, options.out / folder_of(title, seed), given)
                at_1 = [100 * record["recall"][0][1] for record in records if record["kind"] == "evaluation"]
                steps = [record for record in records if record["kind"] == "step"]
                recalls.append(at_1[-1])
                learns = "--generator" in arguments
                lambdas += [steps[-1]["lambda_neg"]] if learns else []
                active = statistics.mean(step["active"] for step in steps)
                raw.writerow([title, seed, f"{at_1[0]:.3f}", f"{at_1[-1]:.3f}", f"{lambdas[-1]:.4f}" if learns else "", f"{active:.1f}", shlex.join(arguments)])
                file.flush()
            learned = f"{min(lambdas):.2f} to {max(lambdas):.2f}" if lambdas else ""
            spread = f"{min(recalls):.1f} to {max(recalls):.1f}"
            print(f"| {title} | {statistics.mean(recalls):.2f} | {spread} | {learned} |", flush=True)


if __name__ == "__main__":
    main()
