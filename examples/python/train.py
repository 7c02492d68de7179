"""Trains an image-retrieval network on one device or several, and measures it on classes it never saw.

    ddtas-train splits --dataset cub200 --data-root DIR >splits.tsv
    torchrun --nproc-per-node 4 examples/python/train.py splits.tsv --backbone timm:resnet50 --output run
    python examples/python/train.py splits.tsv --backbone timm:resnet50 --output run --resume    # on any number of devices

Every process has a share of each batch, and the loss is that of the whole batch: mining sees the rows of all processes.
A line of splits.tsv has a class, a split (train, test, gallery) and a path, separated by tabs. Needs pillow, and
torchvision or timm for a backbone of theirs. Flags have the names of ddtas-train's; with --resume give those of the run again.
"""

import argparse
import os
import random
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from ddtas.torch import CrossBatchMemory, SoftContrastiveLoss, ThresholdGenerator, evaluate
from PIL import Image
from torch import nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset


class Network(nn.Module):
    """Backbone, average + maximum over the map, head."""

    def __init__(self, backbone: str, dim: int, size: int) -> None:
        super().__init__()
        library, _, name = backbone.partition(":")
        if library == "timm":
            import timm

            self.backbone = timm.create_model(name, pretrained=True, num_classes=0, global_pool="")
        elif library == "torchvision":
            from torchvision.models import get_model

            whole = get_model(name, weights="DEFAULT")
            self.backbone = getattr(whole, "features", None) or nn.Sequential(*list(whole.children())[:-2])
        else:
            widths = (3, 16, 32, 64)
            steps = [(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in zip(widths, widths[1:])]
            self.backbone = nn.Sequential(*(layer for step in steps for layer in step))
        with torch.no_grad():
            width = self.backbone.eval()(torch.zeros(1, 3, size, size)).shape[1]
        self.head = nn.Linear(width, dim)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        features = self.backbone(pictures)
        return self.head(features.mean((2, 3)) + features.amax((2, 3)))


class Pictures(Dataset):
    """One split. A picture that trains is asked for by (step, place in the batch, index): the draw depends on nothing else."""

    def __init__(self, lines: list[list[str]], split: str, options: argparse.Namespace) -> None:
        # Queries and gallery have one numbering of their classes.
        names = sorted({line[0] for line in lines if (line[1] == "train") == (split == "train")})
        classes, lines = {name: label for label, name in enumerate(names)}, [line for line in lines if line[1] == split]
        self.labels, self.paths = [classes[line[0]] for line in lines], [line[2] for line in lines]
        self.size, self.seed = options.image_size, options.seed

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index):
        size = self.size
        picture = Image.open(self.paths[index if isinstance(index, int) else index[2]]).convert("RGB")
        width, height = picture.size
        if isinstance(index, int):
            side = min(width, height)
            left, top = (width - side) // 2, (height - side) // 2
        else:
            draw = random.Random(f"{self.seed} {index[0]} {index[1]}")
            index, side = index[2], round(min(width, height) * draw.uniform(0.5, 1.0))
            left, top = draw.randint(0, width - side), draw.randint(0, height - side)
            if draw.random() < 0.5:
                picture, left = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), width - side - left
        picture = picture.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
        return (pixels - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / 0.225, self.labels[index]


class Batches:
    """P classes and K pictures of each, a batch a step, of which this process has its share."""

    def __init__(self, labels: list[int], options: argparse.Namespace, first: int, rank: int, ranks: int) -> None:
        self.options, self.first, self.rank, self.ranks = options, first, rank, ranks
        self.by_class = [[] for _ in range(max(labels) + 1)]
        for index, label in enumerate(labels):
            self.by_class[label].append(index)

    def __len__(self) -> int:
        return self.options.steps - self.first

    def __iter__(self):
        for step in range(self.first, self.options.steps):
            # Drawn alike in every process, then shared out: no picture is lost or taken twice.
            draw, batch = random.Random(f"{self.options.seed} {step}"), []
            for label in draw.sample(range(len(self.by_class)), self.options.classes_per_batch):
                pictures = self.by_class[label]
                batch += draw.sample(pictures, min(self.options.images_per_class, len(pictures)))
            places = range(len(batch) * self.rank // self.ranks, len(batch) * (self.rank + 1) // self.ranks)
            yield [(step, place, batch[place]) for place in places]


@torch.no_grad()
def embed(network: nn.Module, pictures: Pictures, options, device, rank: int, ranks: int):
    """Unit rows and labels of all pictures, in rank 0; each process embeds every `ranks`-th."""
    network.eval()
    own = range(rank, len(pictures), ranks)
    rows = torch.zeros(len(pictures), options.embedding_dim, device=device)
    loader = DataLoader(pictures, 100, sampler=own, num_workers=options.workers)
    parts = [normalize(network(batch.to(device)).float(), dim=1) for batch, _ in loader]
    if parts:
        rows[rank::ranks] = torch.cat(parts)
    if ranks > 1:
        dist.reduce(rows, 0)  # The others' rows are zeros here.
    return rows, torch.tensor(pictures.labels, device=device)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written, and every default."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("splits", type=Path, help="The lines that `ddtas-train splits` prints, in a file.")
    parser.add_argument("--output", type=Path, default="run", help="Folder of the checkpoint.")
    backbone_help = "tiny (random weights), or a pretrained convolutional one: timm:NAME or torchvision:NAME."
    parser.add_argument("--backbone", default="tiny", help=backbone_help)
    parser.add_argument("--image-size", type=int, default=224, help="Side of the pictures that the network sees, in pixels.")
    parser.add_argument("--embedding-dim", type=int, default=512, help="Dimensions of an embedding.")
    parser.add_argument("--classes-per-batch", type=int, help="Classes in a batch, over all processes; 16 if not given, or all.")
    parser.add_argument("--images-per-class", type=int, default=5, help="Pictures of each class in a batch.")
    parser.add_argument("--steps", type=int, default=1000, help="Steps of the run.")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="Learning rate of AdamW, constant.")
    norm_help = "What BatchNorm does: keeps its statistics, uses those of the process's pictures, or of all (GPUs only)."
    parser.add_argument("--batch-norm", choices=["frozen", "trainable", "synchronised"], default="frozen", help=norm_help)
    parser.add_argument("--memory-size", type=int, default=0, help="Rows of earlier batches to compare with; 0 for none.")
    lambda_help = "Loss threshold; the first one if it is learned."
    parser.add_argument("--lambda", dest="threshold", metavar="LAMBDA", type=float, default=0.7, help=lambda_help)
    generator_help = "Whether the threshold is learned, by a virtual step of the embedding head."
    parser.add_argument("--generator", choices=["off", "head"], default="off", help=generator_help)
    parser.add_argument("--amp", action="store_true", help="Run the network in bfloat16 where torch's autocast does.")
    parser.add_argument("--checkpoint-every", type=int, default=200, help="Steps between two checkpoints.")
    parser.add_argument("--workers", type=int, default=4, help="Processes that read pictures, for each training process.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of weights, batches and augmentation.")
    parser.add_argument("--resume", action="store_true", help="Resume from the checkpoint in --output.")
    options = parser.parse_args()

    lines = [line.rstrip("\n").split("\t") for line in options.splits.open()]
    classes = len({line[0] for line in lines if line[1] == "train"})
    if options.classes_per_batch is None:
        options.classes_per_batch = min(16, classes)
    for flag, count in (("classes-per-batch", options.classes_per_batch), ("images-per-class", options.images_per_class)):
        if count < 2:
            raise SystemExit(f"train.py: --{flag} {count} is out of range: 2 or more, or there is no pair to mine")
    if options.classes_per_batch > classes:
        asked = f"train.py: --classes-per-batch {options.classes_per_batch} asks for more"
        raise SystemExit(f"{asked} than the {classes} training classes there are: give at most that")

    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ranks > 1:
        gpu = device.type == "cuda"
        dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    say = print if rank == 0 else lambda *_, **__: None

    torch.manual_seed(options.seed)
    network = Network(options.backbone, options.embedding_dim, options.image_size).to(device)
    if options.batch_norm == "synchronised":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    loss_fn = pair_loss = SoftContrastiveLoss(lambda_pos=options.threshold, lambda_neg=options.threshold, group="world", uneven=True)
    if options.memory_size:
        loss_fn = CrossBatchMemory(loss_fn, options.embedding_dim, options.memory_size)
    generator, seen = None, {}
    if options.generator == "head":
        generator = ThresholdGenerator(pair_loss, network.head)
        network.head.register_forward_pre_hook(lambda _, inputs: seen.update(features=inputs[0]))
    optimizer = torch.optim.AdamW(network.parameters(), options.learning_rate)
    checkpoint, first = options.output / "checkpoint.pt", 0
    if options.resume:
        state = torch.load(checkpoint, map_location=device)
        network.load_state_dict(state["network"])
        loss_fn.load_state_dict(state["loss"])
        optimizer.load_state_dict(state["optimizer"])
        if generator:
            generator.load_state_dict(state["generator"])
        first = state["step"]

    train = Pictures(lines, "train", options)
    batches = Batches(train.labels, options, first, rank, ranks)
    parallel = DistributedDataParallel(network) if ranks > 1 else network
    loader = DataLoader(train, batch_sampler=batches, num_workers=options.workers)
    for step, (pictures, labels) in enumerate(loader, first + 1):
        network.train()
        if options.batch_norm == "frozen":
            for layer in network.modules():
                if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                    layer.eval()
        with torch.autocast(device.type, torch.bfloat16) if options.amp else nullcontext():
            rows = parallel(pictures.to(device))
            if generator:
                generator.step(seen["features"], labels.to(device))
        loss = loss_fn(rows, labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == options.steps:
            learned = f", lambda {pair_loss.settings.lambda_pos:.4f}" if generator else ""
            say(f"step {step}, loss {loss.item():.6f}{learned}", flush=True)
        if rank == 0 and (step % options.checkpoint_every == 0 or step == options.steps):
            options.output.mkdir(parents=True, exist_ok=True)
            state = {"network": network.state_dict(), "loss": loss_fn.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"generator": generator.state_dict()} if generator else {}
            torch.save(state | {"step": step}, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)  # Whole, or the one before.

    test, gallery = (Pictures(lines, split, options) for split in ("test", "gallery"))
    rows = embed(network, test, options, device, rank, ranks)
    others = embed(network, gallery, options, device, rank, ranks) if len(gallery) else ()
    if ranks > 1:
        # Together, as NCCL wants it, and before rank 0 is busy for longer than NCCL waits.
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        found = evaluate(*rows, *others)
        recall = ", ".join(f"R@{k} {100 * share:.1f}" for k, share in found.recall.items())
        rest = f"R-precision {100 * found.r_precision:.1f}, MAP@R {100 * found.map_at_r:.1f}"
        say(f"{len(test)} queries, in per cent: {recall}, {rest}")


if __name__ == "__main__":
    main()
