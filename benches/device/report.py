"""Joins the figures of one run of device.sh: OUT/results.json, OUT/table.md and OUT/plot.svg.

    python3 benches/device/report.py FOLDER OUT

FOLDER contains for every BATCH-DIM-DENSITY the files .ddtas.json (bench/benches/resident.rs: rows and gradient stay on
the GPU, as for the peers), .host.json (`ddtas-bench throughput --json`: with copies) and .peers.json (baselines.py); for
f32 also .ddtas-tf32.json and .host-tf32.json, measured with --tf32. The peers multiply f32 in TF32.
"""

import json
import math
import sys
from functools import partial
from pathlib import Path

PEERS = {"gemms": "two GEMMs", "dense": "dense torch", "compiled": "compiled torch", "metric-learning": "metric-learning"}
# Kinds of products of ddtas, by the suffix in file names.
PRODUCTS = {"": "exact", "-tf32": "TF32"}
COLOURS = ["#d62728", "#ff7f0e", "#7f7f7f", "#1f77b4", "#2ca02c", "#9467bd"]
# Densities (8 % mined, and under 0.5 %), and the time aimed at as a multiple of two GEMMs.
AIMS = [("middle", 1.0), ("0.004", 0.5)]
AIM_BATCH, AIM_DIM, AIM_COMPILED = 16384, 512, 5.0


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
                entries.append(size | {"products": products, "ddtas": ours, "ddtas_from_host": host, "peers": peers})
    return sorted(entries, key=lambda entry: (entry["dim"], entry["density"], entry["batch"], entry["products"]))


def peer_time(entry: dict, name: str) -> float | None:
    return entry["peers"].get(name, {}).get("time_ms")


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


def aims(entries: list[dict]) -> str:
    """The aims, met or not; an aim without a measurement is not met."""
    lines = ["", "## Aims", ""]
    at = {(entry["density"], entry["products"]): entry for entry in entries
          if (entry["batch"], entry["dim"]) == (AIM_BATCH, AIM_DIM)}
    kinds = sorted({entry["products"] for entry in entries})
    for density, most, products in [(*aim, kind) for aim in AIMS for kind in kinds]:
        entry = at.get((density, products))
        got = ratio(entry["ddtas"]["time_ms"], peer_time(entry, "gemms")) if entry else None
        met = "met" if got is not None and got <= most else "NOT met"
        lines.append(f"- B = {AIM_BATCH}, D = {AIM_DIM}, {density}, {products}: {cell(got)} of two GEMMs (aim {most}): {met}")
        got = ratio(peer_time(entry, "compiled"), entry["ddtas"]["time_ms"]) if entry else None
        met = "met" if got is not None and got >= AIM_COMPILED else "NOT met"
        lines.append(f"- same, compiled torch / ddtas: {cell(got)} (aim {AIM_COMPILED}): {met}")
    largest = max((entry["batch"] for entry in entries), default=0)
    lines.append(f"- B = 262144 on one GPU: {'met' if largest >= 262144 else 'NOT met'} (largest B that ran: {largest})")
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
    text = table(entries) + aims(entries)
    (out / "table.md").write_text(text)
    (out / "plot.svg").write_text(plot(entries))
    print(text)


if __name__ == "__main__":
    main()
