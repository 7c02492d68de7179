"""Compares a training step of ddtas-train with one of PyTorch, for the same network, batch and threads; prints a Markdown table.

    cargo build --release
    python3 benches/step.py --image-size 48,64
    python3 benches/step.py --image-size 96 --backbone efficientnet-lite0,resnet18
    python3 benches/step.py --image-size 48 --device cuda:0 --steps 300 --threads 16 --workers 4 --repeat

Both run the network of train/src/model (a residual network without bias in its convolutions, BatchNorm, a linear head, unit rows), or a named
backbone with that head, from random weights and with BatchNorm in training; then the DDTAS loss, its gradient and AdamW. A step of ddtas-train includes
drawing and augmenting batches; torch has one given batch. A run of one step is subtracted from ddtas-train's, as both evaluate and write checkpoints; torch
also has a step before. They take turns for several rounds, and the fastest of each counts. Needs torch, and for a named backbone the package of its reference (train/tests/backbones.py).

With --device both train there, and ddtas-train on the CPU's --threads as well, in a second table: how many times as fast is the device. PyTorch
rounds as it does by default, on a GPU to TF32 in convolutions. ddtas-train compiles its kernels there in the first step, and the run of one step that
is subtracted takes as long, so give many steps. With --repeat two runs of a seed must leave the same checkpoint, byte for byte.
"""

import argparse
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import normalize, relu

sys.path.insert(0, str(Path(__file__).parent / "device"))
sys.path.insert(0, str(Path(__file__).parents[1] / "train/tests"))
import backbones  # noqa: E402
import dense  # noqa: E402

CLASSES, PER_CLASS = 16, 5
# The defaults of ddtas-train.
WIDTH, DEPTH, STAGES, EMBEDDING_DIM = 32, 1, 3, 128
RATE, DECAY = 2e-3, 1e-2
AIMS = {"residual": 1.5, "efficientnet-lite0": 1.5, "resnet18": 1.5}
# How many times as fast as this many cores of its machine a GPU should train a network with pictures of a size.
AIM_THREADS = 16
DEVICE_AIMS = {("residual", 48): 3.0}


class Convolution(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int):
        super().__init__()
        self.convolution = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(channels_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.convolution(x))


class Block(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.first = Convolution(channels_in, channels_out, 3, stride)
        self.second = Convolution(channels_out, channels_out, 3, 1)
        projects = stride != 1 or channels_in != channels_out
        self.shortcut = Convolution(channels_in, channels_out, 1, stride) if projects else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return relu(self.second(relu(self.first(x))) + self.shortcut(x))


class Network(nn.Module):
    """The network of train/src/model/backbone/residual.rs and head.rs."""

    def __init__(self):
        super().__init__()
        self.stem = Convolution(3, WIDTH, 3, 1)
        blocks, channels = [], WIDTH
        for stage in range(STAGES):
            for block in range(DEPTH):
                blocks.append(Block(channels, WIDTH << stage, 2 if stage > 0 and block == 0 else 1))
                channels = WIDTH << stage
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, EMBEDDING_DIM)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return normalize(self.head(self.blocks(relu(self.stem(images))).mean((2, 3))))


class Named(nn.Module):
    """A named backbone, the average over the picture (for a transformer: the class token), and the head."""

    def __init__(self, name: str):
        super().__init__()
        make, self.features = backbones.NETWORKS[name]
        self.features = self.features or backbones.resnet_features
        self.backbone = make()
        if name == "efficientnet-lite0":
            # ddtas-train has no drop-connect.
            self.backbone._global_params = self.backbone._global_params._replace(drop_connect_rate=0.0)
        with torch.no_grad():
            self.head = nn.Linear(self.pooled(torch.zeros(2, 3, 96, 96)).shape[1], EMBEDDING_DIM)

    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        features = self.features(self.backbone, images)
        return features.mean((2, 3)) if features.dim() == 4 else features[:, 0]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return normalize(self.head(self.pooled(images)))


class Torch:
    """PyTorch's step, in one of its two memory layouts."""

    def __init__(self, backbone: str, size: int, layout: torch.memory_format, device: str):
        torch.manual_seed(0)
        self.device = torch.device(device)
        network = Network() if backbone == "residual" else Named(backbone)
        self.network = network.train().to(self.device, memory_format=layout)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=RATE, weight_decay=DECAY)
        self.labels = torch.arange(CLASSES).repeat_interleave(PER_CLASS).to(self.device)
        self.images = torch.randn(len(self.labels), 3, size, size).to(self.device, memory_format=layout)

    def seconds(self, steps: int) -> float:
        """Seconds of a step, after one step to warm up."""
        for step in range(steps + 1):
            if step == 1:
                self.wait()
                begin = time.perf_counter()
            self.optimizer.zero_grad()
            dense.loss(self.network(self.images), self.labels).backward()
            self.optimizer.step()
        self.wait()
        return (time.perf_counter() - begin) / steps

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def write_png(path: Path, size: int, draw: random.Random) -> None:
    lines = b"".join(b"\0" + draw.randbytes(3 * size) for _ in range(size))

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b""))


def write_pictures(root: Path, size: int) -> None:
    """Pictures of noise: classes for one batch, and two test classes, so that nearly all time is training."""
    draw = random.Random(0)
    for name in [f"a{label:02}" for label in range(CLASSES)] + ["b0", "b1"]:
        (root / name).mkdir(parents=True)
        for picture in range(PER_CLASS):
            write_png(root / name / f"{picture}.png", size, draw)


def ours(backbone: str, size: int, steps: int, device: str, options: argparse.Namespace) -> tuple[float, bytes]:
    """Seconds of training of ddtas-train, from its report, and its last checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        pictures, run = Path(folder) / "pictures", Path(folder) / "run"
        write_pictures(pictures, size)
        command = [str(options.binary), "--device", device, "--image-size", str(size), "--steps", str(steps), "--evaluate-every", "0"]
        command += ["--dataset", "folder", "--data-root", str(pictures), "--train-classes", str(CLASSES), "--workers", str(options.workers)]
        command += ["--classes-per-batch", str(CLASSES), "--images-per-class", str(PER_CLASS), "--output", str(run)]
        command += ["--backbone", backbone, "--width", str(WIDTH), "--depth", str(DEPTH), "--embedding-dim", str(EMBEDDING_DIM)]
        environment = os.environ | {"RAYON_NUM_THREADS": str(options.threads)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(done.stderr.strip() or f"{options.binary} failed")
        seconds = json.loads((run / "report.json").read_text())["training_seconds"]
        return seconds, (run / "last.safetensors").read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=lambda text: [int(part) for part in text.split(",")], default=[48, 64])
    parser.add_argument("--backbone", type=lambda text: text.split(","), default=["residual"])
    parser.add_argument("--steps", type=int, default=10, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1, help="threads of ddtas-train that load pictures")
    parser.add_argument("--device", help="train on this one, cuda:0, and by ddtas-train on the CPU as well")
    parser.add_argument("--repeat", action="store_true", help="also compare the checkpoints of two runs")
    parser.add_argument("--binary", type=Path, default=Path("target/release/ddtas-train"))
    parser.add_argument("--out", type=Path, help="also write every round to this JSON file")
    options = parser.parse_args()
    if not options.binary.is_file():
        sys.exit(f"there is no {options.binary}: cargo build --release")
    torch.set_num_threads(options.threads)
    device = options.device or "cpu"
    rounds, beside = [], []
    print("| backbone | image size | ddtas-train, ms a step | PyTorch, ms | PyTorch channels last, ms | ddtas / the faster PyTorch | aim |")
    print("|" + " --- |" * 7)
    for backbone, size in [(backbone, size) for backbone in options.backbone for size in options.image_size]:
        plain, last = (Torch(backbone, size, layout, device) for layout in (torch.contiguous_format, torch.channels_last))
        best = {}
        for _ in range(options.rounds):
            times = {"torch_s": plain.seconds(options.steps), "torch_channels_last_s": last.seconds(options.steps)}
            for name, where in [("ddtas", device)] + [("ddtas_cpu", "cpu")] * (options.device is not None):
                steps = [1, 1 + options.steps]
                times[f"{name}_one_step_s"], times[f"{name}_s"] = (ours(backbone, size, count, where, options)[0] for count in steps)
            setting = {"backbone": backbone, "image_size": size, "steps": options.steps, "threads": options.threads, "device": device}
            rounds.append(setting | times)
            best = {name: min(best.get(name, new), new) for name, new in times.items()}
        step = {name: (best[f"{name}_s"] - best[f"{name}_one_step_s"]) / options.steps for name in ("ddtas", "ddtas_cpu") if f"{name}_s" in best}
        figures = [1e3 * seconds for seconds in (step["ddtas"], best["torch_s"], best["torch_channels_last_s"])]
        ratio = figures[0] / min(figures[1:])
        aim = AIMS.get(backbone, 4.0)
        verdict = f"{aim}" + ("" if ratio <= aim else " MISSED") if device == "cpu" else "-"
        print(f"| {backbone} | {size} | " + " | ".join(f"{value:.1f}" for value in figures) + f" | {ratio:.2f} | {verdict} |", flush=True)
        if options.device:
            images = [CLASSES * PER_CLASS / seconds for seconds in (step["ddtas"], min(figures[1:]) / 1e3, step["ddtas_cpu"])]
            aim = DEVICE_AIMS.get((backbone, size)) if options.threads == AIM_THREADS else None
            verdict = "-" if aim is None else f"{aim}" + ("" if images[0] >= aim * images[2] else " MISSED")
            cells = [f"{value:.0f}" for value in images] + [f"{images[0] / images[2]:.2f}", verdict]
            beside.append(f"| {backbone} | {size} | " + " | ".join(cells) + " |")
        if options.out:
            options.out.write_text(json.dumps(rounds, indent=1) + "\n")
    if beside:
        cores = f"{options.threads} threads of the CPU"
        print(f"\n| backbone | image size | ddtas-train, images/s on {device} | PyTorch there | ddtas-train on {cores} | {device} / CPU | aim |")
        print("|" + " --- |" * 7, *beside, sep="\n")
    if options.repeat:
        for backbone in options.backbone:
            first, second = (ours(backbone, options.image_size[0], 1 + options.steps, device, options)[1] for _ in range(2))
            print(f"\n{backbone}: two runs of {1 + options.steps} steps leave " + ("the same bytes" if first == second else "OTHER BYTES"))
            if first != second:
                sys.exit("runs on this device do not repeat")


if __name__ == "__main__":
    main()
