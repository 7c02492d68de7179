"""Joins the figures of one run of device.sh: OUT/results.json, OUT/kernels.csv, OUT/table.md and OUT/plot.svg.

    python3 benches/device/report.py FOLDER OUT

FOLDER contains for every BATCH-DIM-DENSITY the files .ddtas.json (bench/benches/resident.rs: rows and gradient stay on
the GPU, as for the peers), .host.json (`ddtas-bench throughput --json`: with copies) and .peers.json (baselines.py); for
f32 also .ddtas-tf32.json and .host-tf32.json, measured with --tf32. The peers multiply f32 in TF32. If ncu was there,
.kernels.csv (and .kernels-tf32.csv) is its table of the launches of several losses.
"""

import csv
import json
import math
import statistics
import sys
from functools import partial
from pathlib import Path

PEERS = {"gemms": "two GEMMs", "dense": "dense torch", "compiled": "compiled torch", "metric-learning": "metric-learning"}
# Kinds of products of ddtas, by the suffix in file names.
PRODUCTS = {"": "exact", "-tf32": "TF32"}
COLOURS = ["#d62728", "#ff7f0e", "#7f7f7f", "#1f77b4", "#2ca02c", "#9467bd"]
# Unit prefixes of ncu's times, in milliseconds.
MILLISECONDS = {"n": 1e-6, "u": 1e-3, "m": 1.0, "s": 1e3}
BF16, TF32 = ("bf16", "exact"), ("f32", "TF32")


def kernel_times(path: Path) -> dict[str, float]:
    """Milliseconds of each kernel in a loss, from ncu's table: medians over the losses, which begin with order_tiles and end
    with the gradient. What is launched before, between or after (cuBLAS, a loss cut off) does not count."""
    losses: list[dict[str, float]] = []
    loss = None
    for row in csv.DictReader(line for line in path.read_text().splitlines() if line.startswith('"')):
        name = row["Kernel Name"]
        if name.startswith("order_tiles"):
            loss = {}
        if loss is None or row["Metric Name"] != "gpu__time_duration.sum":
            continue
        # A kernel may be launched more than once.
        loss[name] = loss.get(name, 0.0) + float(row["Metric Value"].replace(",", "")) * MILLISECONDS[row["Metric Unit"][0]]
        if name.startswith("gradient"):
            losses.append(loss)
            loss = None
    names = dict.fromkeys(name for loss in losses for name in loss)
    return {name: statistics.median(loss.get(name, 0.0) for loss in losses) for name in names}


def read(folder: Path) -> list[dict]:
    """One entry for each file of embeddings and kind of products: its size, ddtas's figures, the peers' figures by name."""
    entries = []
    for path in folder.glob("*.peers.json"):
        name = path.name.removesuffix(".peers.json")
        batch, dim, density = name.split("-", 2)
        peers = {row["name"]: row for row in json.loads(path.read_text())}
        size = {"batch": int(batch), "dim": int(dim), "density": density}
        for end, products in PRODUCTS.items():
            if (figures := folder / f"{name}.ddtas{end}.json").exists():
                (ours,) = json.loads(figures.read_text())
                (host,) = json.loads((folder / f"{name}.host{end}.json").read_text())
                entry = size | {"products": products, "ddtas": ours, "ddtas_from_host": host, "peers": peers}
                if (launches := folder / f"{name}.kernels{end}.csv").exists():
                    try:
                        entry["kernels"] = kernel_times(launches)
                    except (KeyError, IndexError, ValueError) as error:
                        print(f"{launches.name} is not ncu's table: {error!r}", file=sys.stderr)
                entries.append(entry)
    return sorted(entries, key=lambda entry: (entry["dim"], entry["density"], entry["batch"], entry["products"]))


def our_time(entry: dict) -> float | None:
    return entry.get("ddtas", {}).get("time_ms")


def peer_time(entry: dict, name: str) -> float | None:
    return entry.get("peers", {}).get(name, {}).get("time_ms")


def pass_time(entry: dict, *passes: str) -> float | None:
    """Milliseconds of the kernels whose names begin so; none unless there is one for each."""
    times = [[time for name, time in entry.get("kernels", {}).items() if name.startswith(one)] for one in passes]
    return sum(map(sum, times)) if all(times) else None


def ratio(over: float | None, under: float | None) -> float | None:
    return over / under if over and under else None


def cell(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def table(entries: list[dict]) -> str:
    titles = ["D", "density", "B", "products", "mined, %", "ddtas, ms", "TFLOP/s", "of two GEMMs", "with copies, ms"]
    titles += [f"{PEERS[name]}, ms" for name in PEERS] + ["compiled / ddtas", "ddtas extra, MB", "dense extra, MB"]
    # Errors of 128 anchors compared with float64, as a share of the rounding error allowed (bench/benches/resident.rs).
    titles += ["m+ and m- off", "terms off", "gradient off"]
    lines = ["| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)]
    for entry in entries:
        ours, batch, dim = entry["ddtas"], entry["batch"], entry["dim"]
        time = ours["time_ms"]
        dense_bytes = entry["peers"].get("dense", {}).get("peak_extra_bytes")
        cells = [str(dim), entry["density"], str(batch), entry["products"], cell(100 * ours["mined_share"])]
        # Counts the operations of the loss that is not fused, though fewer may have been computed.
        tflops = 4 * batch * batch * dim / time / 1e9
        cells += [cell(time, 3), cell(tflops, 1), cell(ratio(time, peer_time(entry, "gemms")))]
        cells.append(cell(entry["ddtas_from_host"]["time_ms"], 3))
        cells += [cell(peer_time(entry, name), 3) for name in PEERS]
        cells += [cell(ratio(peer_time(entry, "compiled"), time)), cell(ours["peak_extra_bytes"] / 1e6, 1)]
        cells += [cell(dense_bytes / 1e6 if dense_bytes else None, 1)]
        cells += [cell((ours.get("compared") or {}).get(name)) for name in ("thresholds", "terms", "gradient")]
        lines.append("| " + " | ".join(cells) + " |")
    reasons = sorted({f"{row['name']} at B = {row['batch']}: {row['reason']}"
                      for entry in entries for row in entry["peers"].values() if row.get("reason")})
    return "\n".join(lines + [""] + [f"- not measured: {reason}" for reason in reasons]) + "\n"


def kernels(entries: list[dict]) -> tuple[str, str]:
    """The times of the kernels, for table.md and as CSV."""
    lines, rows = [], []
    for entry in entries:
        ours = entry["ddtas"]
        shape = [str(entry["batch"]), str(entry["dim"]), entry["density"], ours.get("dtype", "-"), entry["products"]]
        if times := entry.get("kernels"):
            lines.append(f"- {', '.join(shape)}: {', '.join(f'{name} {1e3 * time:.1f}' for name, time in times.items())}")
            rows += [",".join([*shape, name, f"{time:.6f}"]) for name, time in times.items()]
    head = ["", "## Kernels", "", "us of one loss, each kernel alone under ncu with empty caches; in a loss their starts overlap.", ""]
    csv_head = "batch,dim,density,dtype,products,kernel,time_ms"
    return "\n".join([*head, *lines, ""] if lines else []), "\n".join([csv_head, *rows, ""] if rows else [])


def judged(what: str, got: float | None, aim: float, unit: str = "", *, least: bool = False) -> str:
    """One line. A figure that is absent or no number is neither met nor missed."""
    beside = f"(aim: at {'least' if least else 'most'} {aim:.4g}{unit})"
    if got is None or not 0 < got < math.inf:
        return f"- {what}: - {beside}: not measured"
    met = got >= aim if least else got <= aim
    return f"- {what}: {got:.4g}{unit} {beside}: {'met' if met else 'NOT met'}"


def aims(entries: list[dict]) -> str:
    """Every aim of the loss on a GPU, judged from this run alone."""

    def at(batch: int, dim: int = 512, density: str = "middle", rows: tuple[str, str] = BF16) -> dict:
        """The figures of a shape, none if it was not measured."""
        return next((entry for entry in entries
                     if (entry["batch"], entry["dim"], entry["density"]) == (batch, dim, density)
                     and (entry["ddtas"].get("dtype"), entry["products"]) == rows), {})

    lines = ["", "## Aims", "", "bf16, 512 dimensions and `middle` unless a line says otherwise.", ""]
    for batch, density, rows, aim in [(16384, "middle", BF16, 1.0), (16384, "0.004", BF16, 0.5), (16384, "start", BF16, 1.5),
                                      (16384, "middle", TF32, 1.0), (65536, "middle", BF16, 1.0)]:
        entry = at(batch, density=density, rows=rows)
        what = f"B = {batch}, {density}, {'f32 in TF32' if rows == TF32 else 'bf16'}, of two GEMMs"
        lines.append(judged(what, ratio(our_time(entry), peer_time(entry, "gemms")), aim))
    entry = at(65536)
    lines.append(judged("B = 65536, compiled torch / ddtas", ratio(peer_time(entry, "compiled"), our_time(entry)), 4.0, least=True))
    shapes = {(entry["dim"], entry["density"]) for entry in entries}
    growths = [ratio(our_time(at(262144, *shape)), our_time(at(65536, *shape))) for shape in shapes]
    growth = max(filter(None, growths), default=None)
    lines.append(judged("B = 262144 / B = 65536, the largest of every D and density measured", growth, 16.5))
    lines += [judged(f"B = {batch}", our_time(at(batch)), aim, " ms") for batch, aim in [(1024, 0.10), (80, 0.06)]]
    lines.append(judged("B = 16384, D = 128 / D = 512", ratio(our_time(at(16384, 128)), our_time(at(16384))), 1 / 3))
    for batch, dim, scale in [(16384, 512, 1.0), (65536, 512, 16.0), (16384, 128, 1 / 3)]:
        for name, aim in [("sweep", 0.22), ("select", 0.08), ("gradient", 0.50)]:
            lines.append(judged(f"B = {batch}, D = {dim}, {name}", pass_time(at(batch, dim), name), scale * aim, " ms"))
    small = pass_time(at(16384), "order", "prepare", "same_class", "weigh")
    lines.append(judged("B = 16384, order, prepare, same_class and weigh", small, 0.060, " ms"))
    lines.append(judged("B = 262144, order", pass_time(at(262144), "order"), 0.100, " ms"))
    return "\n".join(lines) + "\n"


def plot(entries: list[dict]) -> str:
    """Log-log plot of time against B, with a panel for each D and density."""
    panels = sorted({(entry["dim"], entry["density"]) for entry in entries})
    times = [entry["ddtas"]["time_ms"] for entry in entries]
    times += [time for entry in entries for name in PEERS if (time := peer_time(entry, name))]
    batches = sorted({entry["batch"] for entry in entries})
    low, high = math.floor(math.log10(min(times))), math.ceil(math.log10(max(times)))
    width, height, columns = 320, 240, 3
    span = max(math.log2(batches[-1] / batches[0]), 1)
    rows = math.ceil(len(panels) / columns)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{columns * width}" height="{rows * height + 24}" '
             'font-family="sans-serif" font-size="10"><rect width="100%" height="100%" fill="white"/>']
    kinds = sorted({entry["products"] for entry in entries})

    def ours(entry: dict, kind: str) -> float | None:
        return entry["ddtas"]["time_ms"] if entry["products"] == kind else None

    def peer(entry: dict, name: str) -> float | None:
        return peer_time(entry, name) if entry["products"] == kinds[0] else None

    series = {f"ddtas, {kind}": partial(ours, kind=kind) for kind in kinds}
    series |= {label: partial(peer, name=name) for name, label in PEERS.items()}
    for index, (dim, density) in enumerate(panels):
        left, top = index % columns * width + 44, index // columns * height + 20
        inner_width, inner_height = width - 60, height - 56

        def place(batch: int, time: float) -> tuple[float, float]:
            across = math.log2(batch / batches[0]) / span
            up = (math.log10(time) - low) / max(high - low, 1)
            return left + across * inner_width, top + (1 - up) * inner_height

        parts.append(f'<text x="{left}" y="{top - 6}" font-weight="bold">D = {dim}, {density}: ms against B</text>')
        for power in range(low, high + 1):
            _, y = place(batches[0], 10.0**power)
            parts.append(f'<path d="M{left} {y:.1f}h{inner_width}" stroke="#ddd"/>')
            parts.append(f'<text x="{left - 4}" y="{y + 3:.1f}" text-anchor="end">{10.0**power:g}</text>')
        for batch in batches:
            x, _ = place(batch, 1.0)
            parts.append(f'<text x="{x:.1f}" y="{top + inner_height + 12}" text-anchor="middle">{batch}</text>')
        here = [entry for entry in entries if (entry["dim"], entry["density"]) == (dim, density)]
        for colour, value in zip(COLOURS, series.values()):
            points = " ".join("{:.1f},{:.1f}".format(*place(e["batch"], t)) for e in here if (t := value(e)))
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
    for index, (colour, label) in enumerate(zip(COLOURS, series)):
        parts.append(f'<text x="{44 + 130 * index}" y="{rows * height + 14}" fill="{colour}">{label}</text>')
    return "\n".join(parts) + "\n</svg>\n"


def main() -> None:
    folder, out = map(Path, sys.argv[1:])
    entries = read(folder)
    if not entries:
        sys.exit(f"{folder} holds no figures")
    (out / "results.json").write_text(json.dumps(entries, indent=1) + "\n")
    of_kernels, rows = kernels(entries)
    if rows:
        (out / "kernels.csv").write_text(rows)
    text = table(entries) + of_kernels + aims(entries)
    (out / "table.md").write_text(text)
    (out / "plot.svg").write_text(plot(entries))
    print(text)


if __name__ == "__main__":
    main()
