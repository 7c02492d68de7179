"""Images per second of ddtas's loader and of a torch DataLoader with PIL, on the same cores and the same pictures.

    cargo build --release && cargo bench --no-run --bench loader
    python3 benches/loader.py --out results.json

Both decode 500 x 350 JPEGs (4:2:0, quality 90), crop at random, resize to 224 x 224, mirror half, vary brightness, contrast
and saturation, and normalise; a second row is without changes of colour. Each runs in its own process, in turns.
Torch uses torchvision's usual transforms in worker processes, with batches of 80. Needs torch, torchvision and pillow.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BATCH = 80
SIZE = 224
WARM_UP = 4


def make_pictures(folder: Path, classes: int, per_class: int) -> int:
    """Writes drawn cars at 500 x 350 as JPEGs like a camera's; returns their mean size in bytes."""
    from PIL import Image

    drawn = folder.with_name("drawn")
    command = ["target/release/make-fixture", "--dataset", "cars196", "--layout", "class-folders"]
    command += ["--classes", str(classes), "--images-per-class", str(per_class), "--picture-width", "500"]
    subprocess.run([*command, "--out", str(drawn)], check=True, stdout=subprocess.DEVNULL)
    sizes = []
    for file in sorted(drawn.rglob("*.jpg")):
        picture = folder / file.relative_to(drawn)
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).save(picture, quality=90, subsampling="4:2:0")
        sizes.append(picture.stat().st_size)
    return round(statistics.mean(sizes))


def torch_rate(folder: Path, workers: int, batches: int, jitter: float) -> float:
    import torch
    from torchvision import datasets, transforms

    torch.set_num_threads(1)
    colour = [transforms.ColorJitter(jitter, jitter, jitter)] if jitter else []
    transform = transforms.Compose([
        transforms.RandomResizedCrop(SIZE, scale=(0.4, 1.0)),
        transforms.RandomHorizontalFlip(),
        *colour,
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ])
    dataset = datasets.ImageFolder(folder, transform)
    sampler = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=BATCH * (batches + WARM_UP))
    loader = torch.utils.data.DataLoader(dataset, BATCH, sampler=sampler, num_workers=workers)
    images, begun = 0, 0.0
    for i, (pixels, _) in enumerate(loader):
        if i == WARM_UP - 1:
            begun = time.perf_counter()
        elif i >= WARM_UP:
            images += len(pixels)
    return images / (time.perf_counter() - begun)


def measure(arguments: argparse.Namespace, folder: Path, name: str, jitter: float) -> dict:
    common = ["--workers", str(arguments.workers), "--batches", str(arguments.batches), "--jitter", str(jitter)]
    if name == "ddtas":
        command = ["cargo", "bench", "--quiet", "--bench", "loader", "--", "--data-root", str(folder), *common]
    else:
        command = [sys.executable, __file__, "--measure", str(folder), *common]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="threads or processes of each side")
    parser.add_argument("--batches", type=int, default=40, help="batches of 80 in each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side")
    parser.add_argument("--classes", type=int, default=64)
    parser.add_argument("--per-class", type=int, default=10)
    parser.add_argument("--pictures", type=Path, help="folder to keep the pictures in, or to find them in")
    parser.add_argument("--prepare", action="store_true", help="make the pictures and stop")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--jitter", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        rate = torch_rate(arguments.measure, arguments.workers, arguments.batches, arguments.jitter)
        print(json.dumps({"images_per_second": rate, "workers": arguments.workers, "jitter": arguments.jitter}))
        return
    with tempfile.TemporaryDirectory() as place:
        folder = arguments.pictures or Path(place) / "pictures"
        if not folder.exists():
            print(f"pictures of {make_pictures(folder, arguments.classes, arguments.per_class)} bytes", file=sys.stderr)
        if arguments.prepare:
            return
        rows = []
        for jitter in (0.2, 0.0):
            for _ in range(arguments.rounds):
                for name in ("torch", "ddtas"):
                    rows.append({"name": name} | measure(arguments, folder, name, jitter))
    print(f"| {arguments.workers} workers | torch DataLoader, images/s | ddtas, images/s | ratio | decode, ms | crop to normalise, ms |")
    print("| --- | --- | --- | --- | --- | --- |")
    for jitter in (0.2, 0.0):
        def median(name: str, key: str) -> float:
            return statistics.median(row[key] for row in rows if row["name"] == name and row["jitter"] == jitter)

        theirs, ours = median("torch", "images_per_second"), median("ddtas", "images_per_second")
        stages = f"{median('ddtas', 'decode_ms'):.2f} | {median('ddtas', 'crop_resize_augment_ms'):.2f}"
        label = "colours varied" if jitter else "colours left alone"
        print(f"| {label} | {theirs:.0f} | {ours:.0f} | {ours / theirs:.2f} | {stages} |")
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
