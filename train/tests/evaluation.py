"""Holds `ddtas-train eval --embeddings` to other people's code: prints a line a case, exits 1 if a figure is off.

    python3 train/tests/evaluation.py --binary target/release/ddtas-train

plain    the definitions of "A Metric Learning Reality Check", query by query in numpy (below); always run
sklearn  scikit-learn's k-means and normalized_mutual_info_score, for NMI; always run
library  pytorch-metric-learning's AccuracyCalculator, on the same files; where it can be imported

Entries of the embeddings are multiples of 2^-11, so that a similarity is a multiple of 2^-22 below 1: exact in
float32 in any order of summation. So nobody's rounding can swap two neighbours, and ties are ties for everybody.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

KS = [1, 2, 4, 10, 100]
BOUND = 1e-6
# NMI depends on the starts of k-means: ours must lie in the range of scikit-learn's from this many starts, with a tolerance.
STARTS = 12
NMI_SLACK = 0.01


def unit_rows(rng: np.random.Generator, labels: np.ndarray, dim: int, noise: float) -> np.ndarray:
    centres = rng.normal(size=(max(1, labels.max() + 2), dim))
    rows = centres[labels] + noise * rng.normal(size=(len(labels), dim))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return (np.round(rows * 2**11) / 2**11).astype(np.float32)


def binary_codes(rng: np.random.Generator, labels: np.ndarray, flips: float) -> np.ndarray:
    """Codes of 16 bits, so that hundreds of rows share a few similarities."""
    codes = rng.integers(0, 2, size=(labels.max() + 1, 16))[labels]
    codes ^= rng.random(codes.shape) < flips
    return ((2 * codes - 1) / 4).astype(np.float32)


def cases() -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(11)
    made = {}

    def square(name: str, labels: np.ndarray, rows: np.ndarray) -> None:
        made[name] = {"embeddings": rows, "labels": labels.astype(np.int64)}

    equal = rng.permutation(np.repeat(np.arange(60), 10))
    square("equal classes", equal, unit_rows(rng, equal, 48, 2.0))
    ragged = rng.permutation(np.repeat(np.arange(41), np.arange(1, 42)))
    square("classes of 1 to 41", ragged, unit_rows(rng, ragged, 33, 1.5))
    skewed = rng.permutation(np.concatenate([np.zeros(700, int), np.repeat(np.arange(1, 101), 3), np.arange(200, 250)]))
    square("one class of 700, small ones, singletons", skewed, unit_rows(rng, skewed, 24, 1.2))
    ties = rng.permutation(np.repeat(np.arange(40), 12))
    square("ties", ties, binary_codes(rng, ties, 0.1))
    ignored = ragged.copy()
    ignored[rng.random(len(ignored)) < 0.2] = -1
    square("ignored labels", ignored, made["classes of 1 to 41"]["embeddings"])
    few = np.array([0, 0, 1, 1, 2])
    square("fewer rows than K", few, unit_rows(rng, few, 7, 0.5))

    queries, gallery = rng.integers(0, 50, 300), rng.integers(5, 55, 900)
    both = unit_rows(rng, np.concatenate([queries, gallery]), 40, 1.8)
    apart = {"embeddings": both[:300], "labels": queries, "references": both[300:], "reference_labels": gallery}
    made["queries in a gallery of their own"] = apart
    made["the same, some of the gallery ignored"] = apart | {
        "reference_labels": np.where(rng.random(900) < 0.3, -5, gallery)
    }
    return made


def plain(case: dict[str, np.ndarray]) -> dict[str, float]:
    """The figures query by query, from the definitions."""
    own = "references" not in case
    rows, labels = case["embeddings"].astype(float), case["labels"]
    answers, answer_labels = (rows, labels) if own else (case["references"].astype(float), case["reference_labels"])
    recall, precision, average, counted = dict.fromkeys(KS, 0), 0.0, 0.0, 0
    for i in np.flatnonzero(labels >= 0):
        others = np.flatnonzero((answer_labels >= 0) & ((np.arange(len(answers)) != i) | (not own)))
        right = answer_labels[others] == labels[i]
        r = int(right.sum())
        if r == 0:
            continue
        counted += 1
        # Most similar first; a stable sort orders ties by index.
        right = right[np.argsort(-(answers[others] @ rows[i]), kind="stable")]
        for k in KS:
            recall[k] += right[:k].any()
        precision += right[:r].mean()
        average += (right[:r] * np.cumsum(right[:r]) / np.arange(1, r + 1)).sum() / r
    figures = {f"Recall@{k}": recall[k] / counted for k in KS}
    return figures | {"R-precision": precision / counted, "MAP@R": average / counted, "queries": counted}


def library(case: dict[str, np.ndarray]) -> dict[str, float] | None:
    try:
        import torch
        from pytorch_metric_learning.distances import DotProductSimilarity
        from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
        from pytorch_metric_learning.utils.inference import CustomKNN
    except ImportError:
        return None
    kept = {}
    for values, labels in [("embeddings", "labels"), ("references", "reference_labels")]:
        if values in case:  # the library has no ignored labels
            known = case[labels] >= 0
            kept |= {values: torch.tensor(case[values][known]), labels: torch.tensor(case[labels][known])}
    calculator = AccuracyCalculator(
        include=("precision_at_1", "r_precision", "mean_average_precision_at_r"),
        k="max_bin_count",
        knn_func=CustomKNN(DotProductSimilarity(normalize_embeddings=False)),
    )
    found = calculator.get_accuracy(
        kept["embeddings"], kept["labels"], kept.get("references"), kept.get("reference_labels")
    )
    return {
        "Recall@1": found["precision_at_1"],
        "R-precision": found["r_precision"],
        "MAP@R": found["mean_average_precision_at_r"],
    }


def nmi(case: dict[str, np.ndarray]) -> tuple[float, float]:
    """Lowest and highest NMI of scikit-learn from plain k-means++ seeds, as ours are (its default tries several per seed)."""
    from sklearn.cluster import KMeans, kmeans_plusplus
    from sklearn.metrics import normalized_mutual_info_score

    known = case["labels"] >= 0
    rows, labels = case["embeddings"][known], case["labels"][known]
    count = len(set(labels))
    found = []
    for start in range(STARTS):
        seeds, _ = kmeans_plusplus(rows, count, random_state=start, n_local_trials=1)
        clusters = KMeans(count, init=seeds, n_init=1, max_iter=20).fit_predict(rows)
        found.append(normalized_mutual_info_score(labels, clusters))
    return min(found), max(found)


def ours(binary: Path, case: dict[str, np.ndarray], folder: Path) -> dict[str, float]:
    path = folder / "case.safetensors"
    save_file({name: np.ascontiguousarray(values) for name, values in case.items()}, path)
    command = [str(binary), "eval", "--embeddings", str(path), "--json", "--nmi", "--recall-at", ",".join(map(str, KS))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")
    found = json.loads(done.stdout)
    figures = {f"Recall@{k}": value for k, value in found["at"]}
    return figures | {
        "R-precision": found["r_precision"],
        "MAP@R": found["map_at_r"],
        "NMI": found["nmi"],
        "queries": found["queries"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=Path, default=Path("target/release/ddtas-train"))
    parser.add_argument("--require-library", action="store_true", help="fail where pytorch-metric-learning is missing")
    options = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for name, case in cases().items():
            got = ours(options.binary, case, Path(folder))
            low, high = nmi(case)
            within = low - NMI_SLACK <= got["NMI"] <= high + NMI_SLACK
            failed |= not within
            print(f"{name}: sklearn {'agrees' if within else 'FAILS'}, NMI {got['NMI']:.4f}, {low:.4f} to {high:.4f} there")
            # The library leaves the order of ties open.
            for source, want in [("plain", plain(case)), ("library", None if name == "ties" else library(case))]:
                if want is None:
                    missing = options.require_library and name != "ties"
                    failed |= missing
                    print(f"{name}: {source} {'MISSING' if missing else 'left out'}")
                    continue
                worst = max(want, key=lambda figure: abs(got[figure] - want[figure]))
                off = abs(got[worst] - want[worst])
                verdict = "agrees" if off <= BOUND else "FAILS"
                failed |= off > BOUND
                print(f"{name}: {source} {verdict}, worst {worst}: {got[worst]:.6f}, {want[worst]:.6f} there")
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
