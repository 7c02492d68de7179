"""Writes MAT-files with SciPy and prints what SciPy reads, for tests/mat.rs.

    python3 train/tests/mat/scipy_files.py write DIR    makes NAME.mat, NAME_compressed.mat and NAME.json for every case
    python3 train/tests/mat/scipy_files.py read FILE    prints what FILE holds, as JSON

The first command made the .mat and .json files beside this script. Needs numpy and scipy.
"""

import json
import sys
from pathlib import Path

import numpy as np
import scipy.sparse
from scipy.io import loadmat, savemat


def annotations(count: int, name: str) -> np.ndarray:
    """A struct array like those of Stanford Cars."""
    fields = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", name]
    records = np.zeros((1, count), dtype=[(field, "O") for field in fields])
    for i in range(count):
        records[0, i] = (*(np.array([[v]], np.uint16) for v in (1 + i, 2, 300 + i, 200)), np.uint8(1 + i % 196), f"{i + 1:05}.jpg")
    return records


def cell(*values) -> np.ndarray:
    cells = np.empty((1, len(values)), dtype=object)
    for i, value in enumerate(values):
        cells[0, i] = value
    return cells


def cases() -> dict[str, dict]:
    rng = np.random.default_rng(0)
    kinds = "int8 uint8 int16 uint16 int32 uint32 int64 uint64 float32 float64".split()
    numbers = {}
    for kind in kinds:
        info = np.finfo(kind) if kind.startswith("float") else np.iinfo(kind)
        numbers[kind] = np.array([[info.min, 0, 1], [3, 7, info.max]], dtype=kind)
    shapes = {f"s{i}": rng.integers(0, 200, shape).astype(float) for i, shape in enumerate([(0, 0), (1, 1), (3, 5), (2, 3, 4), (0, 3)])}
    nested = {"outer": {"inner": {"leaf": np.arange(3.0), "name": "deep"}, "cells": cell("a", np.eye(2), cell("b"))}}
    return {
        "annotations": {"annotations": annotations(7, "fname"), "class_names": cell("AM General Hummer SUV 2000", "Ram C/V 2012")},
        "numbers": numbers | {"logical": np.array([[True, False, True]])},
        "shapes": shapes,
        "text": {"plain": "words", "empty": "", "accents": "Citroën à côté"},
        "nested": nested,
    }


def plain(value) -> dict:
    """A value of loadmat in the form that tests/mat.rs compares with."""
    flat = value.flatten(order="F")
    if value.dtype.names:
        values = [plain(record[field]) for record in flat for field in value.dtype.names]
        return {"fields": list(value.dtype.names), "values": values}
    if value.dtype.kind == "O":
        return {"cells": [plain(each) for each in flat]}
    if value.dtype.kind == "U":
        return {"text": "".join(flat)}
    return {"numbers": [repr(float(each)) for each in flat]}


def read(path: Path) -> dict:
    # chars_as_strings would strip blanks at the end of a row.
    loaded = loadmat(path, chars_as_strings=False)
    return {name: plain(value) for name, value in loaded.items() if not name.startswith("__")}


def main() -> None:
    action, path = sys.argv[1], Path(sys.argv[2])
    if action == "read":
        print(json.dumps(read(path)))
        return
    path.mkdir(parents=True, exist_ok=True)
    for name, variables in cases().items():
        for compressed in (False, True):
            file = path / f"{name}{'_compressed' if compressed else ''}.mat"
            savemat(file, variables, do_compression=compressed)
        (path / f"{name}.json").write_text(json.dumps(read(file)) + "\n")
    # Variables that are refused, by name.
    refused = {"complex": np.array([1 + 2j]), "sparse": scipy.sparse.csc_matrix(np.eye(3)), "block": np.array(["one", "two"])}
    for name, value in refused.items():
        savemat(path / f"refused_{name}.mat", {name: value})


if __name__ == "__main__":
    main()
