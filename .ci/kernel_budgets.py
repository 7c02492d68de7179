"""Checks the compiled kernels against kernels/budgets.tsv: registers, shared memory, spills, tensor cores.

    python3 .ci/kernel_budgets.py FOLDER              check; FOLDER contains *.ptxas.txt and *.fatbin
    python3 .ci/kernel_budgets.py FOLDER --table      print the registers of every kernel on each target
    python3 .ci/kernel_budgets.py FOLDER --write      set budgets.tsv and the table of docs/kernels.md to the values found

The budget of a kernel is the maximum over all targets, with registers rounded up to a multiple of 8, as the hardware
allocates them. Spilled registers, stack memory, and an assembler note that it serialises wgmma instructions are
errors in any case.
"""

import argparse
import fnmatch
import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = ROOT / "kernels/budgets.tsv"
DOCUMENT = ROOT / "docs/kernels.md"
TARGETS = ["sm_80", "sm_89", "sm_90a", "sm_100", "sm_120"]
# The machine instruction of each kind of tensor-core operation. mma.sync is HMMA on all targets;
# wgmma exists on sm_90a only.
INSTRUCTION = {"mma": "HMMA", "wgmma": "HGMMA"}
HEADER = "# kernel\tregisters\tstatic shared bytes\ttensor cores: -, mma or wgmma (sm_90a)\n"
MARKS = ("<!-- budgets -->", "<!-- end of budgets -->")


@dataclass
class Usage:
    """Resources and instructions of one kernel on one target, from ptxas and the disassembly."""

    registers: int = 0
    shared: int = 0
    stack: int = 0
    spilled: int = 0
    instructions: set[str] = field(default_factory=set)


def files_of_kernels(folder: Path, suffix: str) -> list[Path]:
    """The files of current sources; files of sources that were renamed since may be in the folder, too."""
    return [path for source in sorted((ROOT / "kernels").rglob("*.cu")) if (path := folder / (source.stem + suffix)).exists()]


def read_reports(folder: Path) -> dict[str, dict[str, Usage]]:
    """Usage by kernel and target, from the assembler's reports."""
    usage: dict[str, dict[str, Usage]] = defaultdict(dict)
    for report in files_of_kernels(folder, ".ptxas.txt"):
        current = Usage()
        for line in report.read_text().splitlines():
            # Also the information messages C75xx: the assembler serialises wgmma instructions.
            if "warning" in line.lower() or re.search(r"\bC75\d\d\b|Potential Performance Loss", line):
                sys.exit(f"{report.name}: {line}")
            if entry := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
                current = usage[entry[1]][entry[2]] = Usage()
            elif spills := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", line):
                current.stack = int(spills[1])
                current.spilled += int(spills[2]) + int(spills[3])
            elif registers := re.search(r"Used (\d+) registers", line):
                current.registers = int(registers[1])
                if shared := re.search(r"(\d+) bytes smem", line):
                    current.shared = int(shared[1])
    return usage


def read_instructions(folder: Path, usage: dict[str, dict[str, Usage]]) -> None:
    """Adds the tensor-core instructions in the machine code, and USETMAXREG, with which warps exchange registers."""
    for image in files_of_kernels(folder, ".fatbin"):
        listing = subprocess.run(["cuobjdump", "-sass", image], check=True, capture_output=True, text=True).stdout
        target, current = "", Usage()
        for line in listing.splitlines():
            if line.startswith("arch = "):
                target = line.removeprefix("arch = ").strip()
            elif function := re.match(r"\s*Function : (\w+)", line):
                current = usage[function[1]].setdefault(target, Usage())
            # HFMA2.MMA is ordinary arithmetic, so the names must be followed by a dot.
            elif found := re.search(r"\b(HMMA|HGMMA|USETMAXREG)\.", line):
                current.instructions.add(found[1])


def read_budgets() -> dict[str, tuple[int, int, str]]:
    rows = [line.split("\t") for line in BUDGETS.read_text().splitlines() if line and not line.startswith("#")]
    return {kernel: (int(registers), int(shared), tensor) for kernel, registers, shared, tensor in rows}


def tensor_cores(by_target: dict[str, Usage]) -> str:
    """The kind of tensor-core operation in the machine code."""
    if "HGMMA" in by_target["sm_90a"].instructions:
        return "wgmma"
    return "mma" if "HMMA" in by_target["sm_80"].instructions else "-"


def most(by_target: dict[str, Usage], field: str) -> int:
    return max(getattr(usage, field) for usage in by_target.values())


def check(usage: dict[str, dict[str, Usage]]) -> list[str]:
    """The problems found, one line each."""
    problems = []
    budgets = read_budgets()
    for pattern in budgets:
        if not fnmatch.filter(usage, pattern):
            problems.append(f"{pattern} has a budget and no kernel")
    for kernel, by_target in sorted(usage.items()):
        pattern = next((p for p in budgets if fnmatch.fnmatch(kernel, p)), None)
        if pattern is None:
            problems.append(f"{kernel} has no budget: add it to kernels/budgets.tsv")
            continue
        registers, shared, tensor = budgets[pattern]
        for target in TARGETS:
            if target not in by_target:
                problems.append(f"{kernel} is missing for {target}")
                continue
            got = by_target[target]
            where = f"{kernel} on {target}"
            if got.spilled:
                problems.append(f"{where} spills {got.spilled} bytes of registers")
            if got.stack:
                problems.append(f"{where} keeps {got.stack} bytes on the stack: an array indexed at run time?")
            if got.registers > registers:
                problems.append(f"{where} takes {got.registers} registers, budget {registers}")
            # Otherwise warps would wait forever for registers that the block was not given.
            if "USETMAXREG" in got.instructions and got.registers != registers:
                problems.append(f"{where} takes {got.registers} registers, and its warps share out {registers} a thread")
            if got.shared > shared:
                problems.append(f"{where} takes {got.shared} bytes of shared memory, budget {shared}")
            wanted = INSTRUCTION.get(tensor) if tensor != "wgmma" or target == "sm_90a" else None
            if wanted and wanted not in got.instructions:
                problems.append(f"{where} holds no {wanted}")
    return problems


def table(usage: dict[str, dict[str, Usage]]) -> str:
    lines = [
        "| kernel | registers (" + ", ".join(TARGETS) + ") | tensor cores |",
        "| --- | --- | --- |",
    ]
    for kernel, by_target in sorted(usage.items()):
        registers = ", ".join(str(by_target[target].registers) for target in TARGETS)
        lines.append(f"| `{kernel}` | {registers} | {tensor_cores(by_target)} |")
    return "\n".join(lines)


def write(usage: dict[str, dict[str, Usage]]) -> None:
    rows = [
        f"{kernel}\t{-(-most(by_target, 'registers') // 8) * 8}"
        f"\t{most(by_target, 'shared')}\t{tensor_cores(by_target)}\n"
        for kernel, by_target in sorted(usage.items())
    ]
    BUDGETS.write_text(HEADER + "".join(rows))
    DOCUMENT.write_text(with_table(DOCUMENT.read_text()))


def with_table(document: str) -> str:
    """The document with its table of budgets replaced."""
    lines = ["| kernel | registers, at most | tensor cores |", "| --- | --- | --- |"]
    for kernel, (registers, _, tensor) in read_budgets().items():
        lines.append(f"| `{kernel}` | {registers} | {tensor} |")
    start, end = (document.index(mark) for mark in MARKS)
    return document[: start + len(MARKS[0])] + "\n" + "\n".join(lines) + "\n" + document[end:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    usage = read_reports(options.folder)
    if not usage:
        sys.exit(f"{options.folder} holds no assembler report")
    read_instructions(options.folder, usage)
    if options.write:
        write(usage)
    if options.table:
        print(table(usage))
    problems = check(usage)
    document = DOCUMENT.read_text()
    if with_table(document) != document:
        problems.append("docs/kernels.md shows other budgets than kernels/budgets.tsv: run this with --write")
    for problem in problems:
        print(problem, file=sys.stderr)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
