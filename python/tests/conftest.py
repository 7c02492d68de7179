"""Makes `formula` importable and says once where the package under test comes from."""

import contextlib
import hashlib
import os
import sys
from importlib import metadata
from pathlib import Path

import ddtas

sys.path.insert(0, str(Path(__file__).parent))

# torch looks up compiled code by the graph alone, so a changed operator needs another cache folder. So has each torch, as two may run.
_sources = b"".join(path.read_bytes() for path in sorted((Path(ddtas.__file__).parent / "torch").glob("*.py")))
with contextlib.suppress(metadata.PackageNotFoundError):
    _sources += metadata.version("torch").encode()
_compiled = Path(__file__).parents[2] / "target/inductor" / hashlib.sha256(_sources).hexdigest()[:16]
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(_compiled)


def pytest_report_header() -> str:
    return f"ddtas {ddtas.__version__}, cuda: {ddtas.has_cuda}, {Path(ddtas.__file__).parent}"
