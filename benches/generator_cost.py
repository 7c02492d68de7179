"""Cost of the threshold generator: seconds of a training step without it, with that of the head, and with that of the whole network.

    cargo build --release && python3 benches/generator_cost.py [--steps 40] [--rounds 3]

Runs `ddtas-train` on the synthetic set at its defaults (batch 16 x 5, meta batch 5 x 2), each setting in turn, so that other load
on the machine affects all alike, and prints the median of the rounds as a Markdown table.
"""

import argparse
import re
import statistics
import subprocess
import tempfile
from pathlib import Path

PROGRAM = Path(__file__).parent.parent / "target/release/ddtas-train"
GENERATORS = {
    "off": ["--generator", "off"],
    "head": ["--generator", "head"],
    "head, recent features": ["--generator", "head", "--meta", "recent"],
    "full": ["--generator", "full"],
}


def seconds_a_step(arguments: list[str], steps: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [PROGRAM, "--steps", str(steps), "--evaluate-every", "0", "--output", f"{folder}/run", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"generator_cost.py: {done.stderr.strip()}")
    # The summary has whole seconds, which is too coarse; the progress lines have images per second.
    paces = [float(pace) for pace in re.findall(r"([\d.]+) images/s", done.stderr)]
    return 80 / statistics.median(paces[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    times = {name: [] for name in GENERATORS}
    for _ in range(options.rounds):
        for name, arguments in GENERATORS.items():
            times[name].append(seconds_a_step(arguments, options.steps))
    off = statistics.median(times["off"])
    print("| generator | seconds a step, median | rounds | over off |\n| --- | --- | --- | --- |")
    for name, seconds in times.items():
        rounds = ", ".join(f"{value:.3f}" for value in seconds)
        print(f"| {name} | {statistics.median(seconds):.3f} | {rounds} | {statistics.median(seconds) / off:.2f} |")


if __name__ == "__main__":
    main()
