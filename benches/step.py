"""Compares a training step of ddtas-train with one of PyTorch, for the same network, batch and threads; prints a Markdown table.

    cargo build --release
    python3 benches/step.py --image-size 48,64
    python3 benches/step.py --image-size 96 --backbone efficientnet-lite0,resnet18

Both run the network of train/src/model (a residual network without bias in its convolutions, BatchNorm, a linear head, unit rows), or a named
backbone with that head, from random weights and with BatchNorm in training; then the DDTAS loss, its gradient and AdamW. A step of ddtas-train includes
drawing and augmenting batches; torch has one given batch. A run of one step is subtracted from ddtas-train's, as both evaluate and write checkpoints; torch
also has a step before. They take turns for several rounds, and the fastest of each counts. Needs torch, and for a named backbone the package of its reference (train/tests/backbones.py).
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

    def __init__(self, backbone: str, size: int, layout: torch.memory_format):
        torch.manual_seed(0)
        network = Network() if backbone == "residual" else Named(backbone)
        self.network = network.train().to(memory_format=layout)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=RATE, weight_decay=DECAY)
        self.labels = torch.arange(CLASSES).repeat_interleave(PER_CLASS)
        self.images = torch.randn(len(self.labels), 3, size, size).contiguous(memory_format=layout)

    def seconds(self, steps: int) -> float:
        """Seconds of a step, after one step to warm up."""
        for step in range(steps + 1):
            if step == 1:
                begin = time.perf_counter()
            self.optimizer.zero_grad()
            dense.loss(self.network(self.images), self.labels).backward()
            self.optimizer.step()
        return (time.perf_counter() - begin) / steps


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


def ours(backbone: str, size: int, steps: int, options: argparse.Namespace) -> float:
    """Seconds of training of ddtas-train, from its report."""
    with tempfile.TemporaryDirectory() as folder:
        pictures, run = Path(folder) / "pictures", Path(folder) / "run"
        write_pictures(pictures, size)
        command = [str(options.binary), "--device", "cpu", "--image-size", str(size), "--steps", str(steps), "--evaluate-every", "0"]
        command += ["--dataset", "folder", "--data-root", str(pictures), "--train-classes", str(CLASSES)]
        command += ["--classes-per-batch", str(CLASSES), "--images-per-class", str(PER_CLASS), "--output", str(run)]
        command += ["--backbone", backbone, "--width", str(WIDTH), "--depth", str(DEPTH), "--embedding-dim", str(EMBEDDING_DIM)]
        environment = os.environ | {"RAYON_NUM_THREADS": str(options.threads)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(done.stderr.strip() or f"{options.binary} failed")
        return json.loads((run / "report.json").read_text())["training_seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=lambda text: [int(part) for part in text.split(",")], default=[48, 64])
    parser.add_argument("--backbone", type=lambda text: text.split(","), default=["residual"])
    parser.add_argument("--steps", type=int, default=10, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--binary", type=Path, default=Path("target/release/ddtas-train"))
    parser.add_argument("--out", type=Path, help="also write every round to this JSON file")
    options = parser.parse_args()
    if not options.binary.is_file():
        sys.exit(f"there is no {options.binary}: cargo build --release")
    torch.set_num_threads(options.threads)
    rounds = []
    print("| backbone | image size | ddtas-train, ms a step | PyTorch, ms | PyTorch channels last, ms | ddtas / the faster PyTorch | aim |")
    print("|" + " --- |" * 7)
    for backbone, size in [(backbone, size) for backbone in options.backbone for size in options.image_size]:
        plain, last = (Torch(backbone, size, layout) for layout in (torch.contiguous_format, torch.channels_last))
        best = [float("inf")] * 4
        for _ in range(options.rounds):
            times = {"ddtas_one_step_s": ours(backbone, size, 1, options), "ddtas_s": ours(backbone, size, 1 + options.steps, options)}
            times |= {"torch_s": plain.seconds(options.steps), "torch_channels_last_s": last.seconds(options.steps)}
            rounds.append({"backbone": backbone, "image_size": size, "steps": options.steps, "threads": options.threads} | times)
            best = [min(old, 1e3 * new) for old, new in zip(best, times.values())]
        figures = [(best[1] - best[0]) / options.steps, *best[2:]]
        ratio = figures[0] / min(figures[1:])
        aim = AIMS.get(backbone, 4.0)
        verdict = f"{aim}" + ("" if ratio <= aim else " MISSED")
        print(f"| {backbone} | {size} | " + " | ".join(f"{value:.0f}" for value in figures) + f" | {ratio:.2f} | {verdict} |", flush=True)
        if options.out:
            options.out.write_text(json.dumps(rounds, indent=1) + "\n")


if __name__ == "__main__":
    main()
