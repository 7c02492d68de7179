"""Makes `formula` importable and says once where the package under test comes from."""

import sys
from pathlib import Path

import ddtas

sys.path.insert(0, str(Path(__file__).parent))


def pytest_report_header() -> str:
    return f"ddtas {ddtas.__version__}, cuda: {ddtas.has_cuda}, {Path(ddtas.__file__).parent}"
