"""References larger than memory: a batch against rows in a file, of which one block at a time is read.

    pip install . && python examples/python/reference_blocks.py

The four steps of `ddtas.Part`, here of all anchors against one block. What the blocks find is put together between the steps.
A context remembers one part, so each pass over the file repeats the steps before its own.
"""

import tempfile
from pathlib import Path

import ddtas
import numpy as np

REFERENCES, BLOCK, DIM, CLASSES = 20_000, 3_000, 64, 500
# The batch is a stretch of the file: each anchor is a reference, too, and no pair of itself.
BATCH = np.arange(5_950, 6_050)


def draw(path: Path) -> np.ndarray:
    """Writes rows around a centre for each class, block by block, and returns their labels."""
    random = np.random.default_rng(1)
    labels, centres = random.integers(0, CLASSES, REFERENCES), random.normal(size=(CLASSES, DIM))
    file = np.lib.format.open_memmap(path, "w+", np.float32, (REFERENCES, DIM))
    for first in range(0, REFERENCES, BLOCK):
        block = slice(first, first + BLOCK)
        rows = centres[labels[block]] + random.normal(size=(len(labels[block]), DIM))
        file[block] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return labels


def in_blocks(path: Path, labels: np.ndarray):
    """Loss, gradient of the anchors, and the sizes of their sets, against the whole file."""
    file = np.load(path, mmap_mode="r")
    anchors, context = np.array(file[BATCH]), ddtas.Context()
    min_pos, max_neg = np.full(len(BATCH), np.inf, np.float32), np.full(len(BATCH), -np.inf, np.float32)
    probe_neg = total_pos = loss = 0
    count_pos, count_neg, gradient = np.zeros(len(BATCH), int), np.zeros(len(BATCH), int), np.zeros_like(anchors)
    for last in ("same class", "sweep", "select", "gradient"):
        sizes = count_pos.copy(), count_neg.copy()  # Over all blocks, once the third pass has counted them.
        for first in range(0, REFERENCES, BLOCK):
            block = np.array(file[first : first + BLOCK])
            known = np.where((BATCH >= first) & (BATCH < first + len(block)), BATCH - first, -1)
            there = labels[first : first + BLOCK]
            part = ddtas.Part(anchors, labels[BATCH], block, there, identity=known, total=len(BATCH), context=context)
            found = part.same_class()
            if last == "same class":
                min_pos = np.minimum(min_pos, found.min_pos)
                total_pos += found.total_pos
                continue
            swept = part.sweep(min_pos)  # The block selects nothing: no numbers of references.
            if last == "sweep":
                max_neg = np.maximum(max_neg, swept.max_neg)
                probe_neg += swept.probe_neg
                continue
            chosen = part.select(max_neg, probe_neg=probe_neg, total_pos=total_pos)
            if last == "select":
                count_pos, count_neg = count_pos + chosen.count_pos, count_neg + chosen.count_neg
                continue
            answer = part.gradient(*sizes)
            loss += answer.loss
            gradient += answer.gradient
    return loss, gradient, count_pos, count_neg


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "references.npy"
        labels = draw(path)
        loss, gradient, count_pos, count_neg = in_blocks(path, labels)
        rows = np.load(path)
    # The same with everything in memory.
    whole = ddtas.loss(rows[BATCH], labels[BATCH], rows, labels, identity=int(BATCH[0]))
    error = np.abs(gradient - whole.gradient).max() / np.abs(whole.gradient).max()
    print(f"{len(BATCH)} anchors against {REFERENCES} references in blocks of {BLOCK}")
    print(f"loss in blocks {loss:.9f}, at once {whole.loss:.9f}, {whole.active} anchors active")
    print(f"gradient within {error:.1e} of its largest entry")
    assert whole.active > 0, "the comparison needs a loss"
    assert (count_pos == whole.count_pos).all() and (count_neg == whole.count_neg).all()
    assert abs(loss - whole.loss) <= 1e-6 * whole.loss and error <= 1e-6


if __name__ == "__main__":
    main()
