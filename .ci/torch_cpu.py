"""Installs torch from PyPI for runs on the CPU: a 0.5 GB download instead of 2 GB and more.

    python .ci/torch_cpu.py [VERSION]

PyPI has torch for Linux only with CUDA, and that build needs CUDA's libraries to start, even without a GPU. A run on
the CPU calls none of them except the runtime's registration of kernels. So this installs torch without dependencies,
the packages that it imports, and the CUDA runtime, and replaces the other libraries by stand-ins with only the
symbols that torch links to. Needs gcc and readelf; must be run with the Python of a virtual environment.
"""

import re
import subprocess
import sys
import sysconfig
import tempfile
from collections import defaultdict
from pathlib import Path

# Each torch with the version of the CUDA runtime in its metadata; the first is installed unless another is named.
TORCH = {"2.15.0": "13.2.86", "2.11.0": "13.0.96"}
IMPORTED = ["filelock", "typing-extensions", "sympy", "networkx", "jinja2", "fsspec", "numpy"]


def pip(*arguments: str) -> None:
    # Compiling a thousand modules that are never imported takes longer than the download.
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    # pip gives up a download that is cut off.
    for _ in range(2):
        if subprocess.run([*command, *arguments]).returncode == 0:
            return
    subprocess.run([*command, *arguments], check=True)


def readelf(flag: str, path: Path) -> str:
    return subprocess.run(["readelf", "-W", flag, path], check=True, capture_output=True, text=True).stdout


def stand_in(path: Path, version: str | None, names: set[str]) -> None:
    """Builds a library with functions of these names that return 1, an error code, if they are called."""
    source = "".join(f"int {name}(void) {{ return 1; }}\n" for name in sorted(names))
    with tempfile.NamedTemporaryFile("w", suffix=".map") as script:
        command = ["gcc", "-shared", "-nostdlib", "-fno-builtin", "-w", f"-Wl,-soname,{path.name}"]
        if version:
            script.write(f"{version} {{ global: *; }};")
            script.flush()
            command.append(f"-Wl,--version-script={script.name}")
        subprocess.run([*command, "-o", path, "-x", "c", "-"], input=source, text=True, check=True)


def main() -> None:
    if sys.prefix == sys.base_prefix:
        sys.exit("this changes torch's libraries: run it with the Python of a virtual environment")
    # In this order: after torch, pip would complain of missing dependencies.
    pip(*IMPORTED)
    torch = sys.argv[1] if len(sys.argv) > 1 else next(iter(TORCH))
    pip("--no-deps", f"torch=={torch}", f"nvidia-cuda-runtime=={TORCH[torch]}")

    site = Path(sysconfig.get_path("purelib"))
    target = site / "nvidia/cu13/lib"
    missing: dict[str, str | None] = {}
    by_version: dict[str, set[str]] = defaultdict(set)
    unversioned: set[str] = set()
    for library in (site / "torch/lib").glob("*.so*"):
        for name in re.findall(r"NEEDED.*\[(lib(?:cu|nv|nccl)\S+)\]", readelf("-d", library)):
            # The driver's library belongs to the machine, and is loaded only if it exists.
            if name != "libcuda.so.1" and not (target / name).exists():
                missing.setdefault(name, None)
        wanted = ""
        for line in readelf("-V", library).splitlines():
            if file := re.search(r"File: (\S+)", line):
                wanted = file[1]
            elif (version := re.search(r"Name: (\S+)", line)) and wanted in missing:
                missing[wanted] = version[1]
        symbols = readelf("--dyn-syms", library)
        unversioned.update(re.findall(r"UND (\w+)$", symbols, re.MULTILINE))
        for name, version in re.findall(r"UND (\w+)@(\S+)", symbols):
            by_version[version].add(name)
    for name, version in missing.items():
        stem = name.removeprefix("lib").partition(".")[0].lower()
        names = by_version[version] if version else {n for n in unversioned if n.lower().startswith(stem)}
        stand_in(target / name, version, names)

    check = "import torch; assert (torch.ones(2, 3) @ torch.ones(3, 2)).sum() == 12; print('torch', torch.__version__)"
    subprocess.run([sys.executable, "-c", check], check=True)


if __name__ == "__main__":
    main()
