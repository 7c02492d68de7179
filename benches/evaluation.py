"""Times `ddtas-train eval` on a test set of SOP's size, and faiss's exhaustive search for comparison, if faiss is installed.

    cargo build --release --bin ddtas-train
    python3 benches/evaluation.py --out results.json

Rows are random: 60,502 rows of unit length in 11,316 classes of 2 to 12, each class with a random centre and noise around it.
Needs numpy and safetensors.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

# Smallest and largest class.
SIZES = (2, 12)


def labels_of(rows: int, classes: int, rng: np.random.Generator) -> np.ndarray:
    """Labels of `rows` rows in classes of 2 to 12, sorted by class as in SOP's own list."""
    sizes = np.full(classes, SIZES[0])
    while (missing := rows - sizes.sum()) > 0:
        open_ = np.flatnonzero(sizes < SIZES[1])
        sizes[rng.choice(open_, min(missing, len(open_)), replace=False)] += 1
    return np.repeat(np.arange(classes), sizes)


def draw(path: Path, rows: int, classes: int, dim: int, noise: float) -> None:
    rng = np.random.default_rng(0)
    labels = labels_of(rows, classes, rng)
    centres = rng.standard_normal((classes, dim), dtype=np.float32)
    values = centres[labels] + noise * rng.standard_normal((rows, dim), dtype=np.float32)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    save_file({"embeddings": values, "labels": labels.astype(np.int64)}, path)


def run(options: argparse.Namespace, path: Path) -> dict:
    command = [str(options.binary), "eval", "--embeddings", str(path), "--recall-at", "1,10,100,1000", "--json"]
    command += ["--nmi"] if options.nmi else []
    environment = os.environ | {"RAYON_NUM_THREADS": str(options.threads)}
    begin = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    answer = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit("ddtas-train eval failed")
    wall = time.perf_counter() - begin
    return json.loads(answer) | {"wall_seconds": wall, "peak_bytes": 1024 * usage.ru_maxrss}


def faiss_seconds(values: np.ndarray, threads: int) -> float | None:
    """Seconds to find the 1,001 nearest rows of every row, including itself, by inner products; 4,096 queries at a time."""
    try:
        import faiss
    except ImportError:
        return None
    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatIP(values.shape[1])
    index.add(values)
    begin = time.perf_counter()
    for start in range(0, len(values), 4096):
        index.search(values[start : start + 4096], 1001)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=60_502)
    parser.add_argument("--classes", type=int, default=11_316)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--noise", type=float, default=3.0, help="length of the noise over that of a class centre")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--nmi", action="store_true", help="cluster as well")
    parser.add_argument("--faiss", action="store_true", help="also time faiss")
    parser.add_argument("--binary", type=Path, default=Path("target/release/ddtas-train"))
    parser.add_argument("--keep", type=Path, help="a folder for the embeddings, drawn only if they are not there yet")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = (options.keep or Path(scratch)) / f"rows-{options.rows}-{options.dim}.safetensors"
        if not path.is_file():
            draw(path, options.rows, options.classes, options.dim, options.noise)
        result = run(options, path)
        if options.faiss:
            from safetensors.numpy import load_file

            result["faiss_search_seconds"] = faiss_seconds(load_file(path)["embeddings"], options.threads)
    text = json.dumps(result | {"threads": options.threads}, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
