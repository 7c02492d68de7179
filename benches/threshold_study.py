"""Fixed thresholds against learned ones: Recall@1 of a grid of runs.

    cargo build --release && python3 benches/threshold_study.py OUT [--data-root DIR] [options]

Without --data-root on the synthetic set. Runs that OUT already holds are not repeated, so a study may be cut short
and taken up again. Prints Markdown: mean and spread (largest less smallest) of Recall@1 over the seeds, and the last lambda.

    --fixed 0.3,0.7,0.9     runs without generator, from these lambdas
    --gamma 0,0.1,0.3       the same at lambda 0.7, over gamma
    --learned 0.3,0.7       runs with a generator, from these lambdas
    --mining none,asms      runs of the ablation, each with generator off and on
    --generator "ARGS"      the generator, as arguments of ddtas-train ("--generator head")
    --plot FILE             lambda over the steps of all runs with a generator, those of a rehearsal below 0; needs matplotlib
"""

import argparse
import json
import shlex
import statistics
import subprocess
from pathlib import Path

PROGRAM = Path(__file__).parent.parent / "target/release/ddtas-train"


def names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def run(folder: Path, arguments: list[str]) -> list[dict]:
    """The records of a run; trains it if the folder does not hold it whole."""
    metrics = folder / "metrics.jsonl"
    if not (folder / "report.html").exists():
        if folder.exists():
            raise SystemExit(f"threshold_study.py: {folder} holds a run that was cut short: remove it and start again")
        done = subprocess.run([PROGRAM, "--output", folder, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"threshold_study.py: {' '.join(map(str, done.args))}: {done.stderr.strip()}")
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def thresholds(records: list[dict]) -> list[tuple[int, float]]:
    """Step and lambda; the steps of a rehearsal end where those of the run begin, at 0."""
    rehearsed = sum(record["kind"] == "rehearsal" for record in records)
    first = {"rehearsal": -rehearsed, "step": 0}
    return [(first[r["kind"]] + r["step"], r["lambda_neg"]) for r in records if r["kind"] in first]


def plot(lines: list[tuple[str, list[tuple[int, float]]]], file: Path) -> None:
    """Lambda over steps, a colour for each kind of run."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    titles = list(dict.fromkeys(title for title, _ in lines))
    for title, points in lines:
        first = next(points_of for name, points_of in lines if name == title) is points
        label = title if first else None
        axes.plot(*zip(*points), color=f"C{titles.index(title)}", linewidth=1.2, label=label)
    axes.set_xlabel("step; below 0: the rehearsal")
    axes.set_ylabel("lambda")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=names, default=["0", "1", "2"])
    for option in ("--fixed", "--gamma", "--learned", "--mining"):
        parser.add_argument(option, type=names, default=[])
    parser.add_argument("--generator", type=shlex.split, default=["--generator", "head"])
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--more", type=shlex.split, default=[], help="arguments of every run")
    options = parser.parse_args()

    common = ["--steps", str(options.steps), "--evaluate-every", "0", *options.more]
    if options.data_root:
        common += ["--dataset", "folder", "--data-root", str(options.data_root)]
    learned = options.generator
    rows = [(f"lambda {value}", ["--lambda", value]) for value in options.fixed]
    rows += [(f"gamma {value}", ["--gamma", value]) for value in options.gamma]
    rows += [(f"from {value}: {' '.join(learned)}", ["--lambda", value, *learned]) for value in options.learned]
    for mining in options.mining:
        rows += [(f"{mining}, off", ["--mining", mining]), (f"{mining}, learned", ["--mining", mining, *learned])]

    options.out.mkdir(parents=True, exist_ok=True)
    lines = []
    print("| run | Recall@1, mean | spread | seeds | last lambda |\n| --- | --- | --- | --- | --- |", flush=True)
    for title, arguments in rows:
        recalls, lambdas = [], []
        for seed in options.seeds:
            name = "".join(c if c.isalnum() or c in ".-" else "_" for c in f"{title}-seed{seed}")
            records = run(options.out / name, [*common, *arguments, "--seed", seed])
            recalls.append(100 * [r for r in records if r["kind"] == "evaluation"][-1]["recall"][0][1])
            lambdas.append([r for r in records if r["kind"] == "step"][-1]["lambda_neg"])
            if "--generator" in arguments:
                lines.append((title, thresholds(records)))
        spread = max(recalls) - min(recalls)
        seeds = ", ".join(f"{recall:.1f}" for recall in recalls)
        last = ", ".join(f"{value:.2f}" for value in lambdas)
        print(f"| {title} | {statistics.mean(recalls):.1f} | {spread:.1f} | {seeds} | {last} |", flush=True)
    if options.plot and lines:
        plot(lines, options.plot)


if __name__ == "__main__":
    main()
