"""A loss with a process group against one process: runs group_cases.py in four processes, for .ci/many.sh.

Needs a package built with the feature `emulated`.
"""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: its tests do not run")

import group_cases  # noqa: E402


def ended(process):
    """The exit code, or None after five minutes."""
    with suppress(subprocess.TimeoutExpired):
        return process.wait(timeout=300)


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """The failures that the processes reported."""
    folder = tmp_path_factory.mktemp("group")
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, Path(group_cases.__file__)]
    processes = [
        subprocess.Popen([*command, str(rank), folder / "store", folder / f"{rank}.json"], env=environment)
        for rank in range(group_cases.SIZE)
    ]
    try:
        codes = [ended(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
    files = [folder / f"{rank}.json" for rank in range(group_cases.SIZE)]
    reports = [json.loads(file.read_text()) for file in files if file.exists()]
    assert codes == [0] * group_cases.SIZE, (codes, reports)
    return {name: text for report in reports for name, text in report.items()}


@pytest.mark.parametrize("case", group_cases.CASES, ids=lambda case: case.__name__)
def test(case, wrong):
    found = [f"{name}:\n{text}" for name, text in wrong.items() if name.startswith(case.__name__ + ",")]
    assert not found, "\n".join(found)
