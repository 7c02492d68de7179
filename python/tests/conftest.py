"""Makes `formula` importable and says once where the package under test comes from."""

import hashlib
import os
import sys
from pathlib import Path

import ddtas

sys.path.insert(0, str(Path(__file__).parent))

# torch looks up compiled code by the graph alone, so a changed operator needs another cache folder.
_sources = b"".join(path.read_bytes() for path in sorted((Path(ddtas.__file__).parent / "torch").glob("*.py")))
_compiled = Path(__file__).parents[2] / "target/inductor" / hashlib.sha256(_sources).hexdigest()[:16]
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(_compiled)


def pytest_report_header() -> str:
    return f"ddtas {ddtas.__version__}, cuda: {ddtas.has_cuda}, {Path(ddtas.__file__).parent}"
