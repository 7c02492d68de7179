"""Reads a run's event files with TensorBoard's reader, and compares every number with metrics.jsonl.

Usage: event_files.py RUN_FOLDER
"""

import json
import pathlib
import struct
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def figures(run):
    """Lists of (step, value) by tag, from metrics.jsonl."""
    wanted = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        group = {"step": "train", "evaluation": "test"}[record.pop("kind")]
        step = record.pop("step")
        for name, value in record.items():
            if isinstance(value, list) and value and isinstance(value[0], list):
                found = [(f"{name}@{k}", figure) for k, figure in value]
            elif isinstance(value, list):
                found = [(f"{name}/{index}", figure) for index, figure in enumerate(value)]
            else:
                found = [(name, value)]
            for tag, figure in found:
                if figure is not None:
                    wanted.setdefault(f"{group}/{tag}", []).append((step, single(figure)))
    return wanted


def single(figure):
    """The number rounded to single precision, as in event files."""
    return struct.unpack("<f", struct.pack("<f", figure))[0]


def main():
    run = pathlib.Path(sys.argv[1])
    accumulator = EventAccumulator(str(run), size_guidance={"scalars": 0})
    accumulator.Reload()
    wanted = figures(run)
    assert len(wanted) > 10 and all(wanted.values()), wanted.keys()
    got = {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }
    assert got.keys() == wanted.keys(), got.keys() ^ wanted.keys()
    for tag, values in wanted.items():
        assert got[tag] == values, f"{tag}: {got[tag][:5]} ... instead of {values[:5]} ..."
    files = len(list(run.glob("events.out.tfevents.*")))
    print(f"{sum(map(len, got.values()))} figures of {len(got)} tags in {files} event files agree with metrics.jsonl")


if __name__ == "__main__":
    main()
