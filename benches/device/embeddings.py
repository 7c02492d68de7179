"""Makes the embeddings that one run of device.sh measures everybody on.

Classes of 5: a random centre a class, noise around it. More noise brings
positives and negatives together, so that more negatives are mined; the noise
for a wanted share is found by bisection on a sample of whole classes.
"""

import argparse
from pathlib import Path

import torch
from torch.nn.functional import normalize

import tensors
from dense import mined_share

CLASS_SIZE = 5
SAMPLE = 4000
# Share of all negative pairs finally mined: late in training, in the middle, at its start.
SHARES = {"late": 0.01, "middle": 0.08, "start": 0.30}


def draw(count: int, dim: int, noise: float, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit rows and labels; the same ones for the same arguments on the same device."""
    generator = torch.Generator(device=device).manual_seed(20240 + dim)
    labels = torch.arange(count, device=device) // CLASS_SIZE
    classes = int(labels[-1]) + 1
    centres = normalize(torch.randn(classes, dim, generator=generator, device=device), dim=1)
    spread = torch.randn(count, dim, generator=generator, device=device) / dim**0.5
    return normalize(centres[labels] + noise * spread, dim=1), labels


def find_noise(share: float, dim: int, device: str) -> float:
    """Noise at which `share` of the negatives of a sample is mined; it grows with noise."""
    low, high = 0.0, 16.0
    for _ in range(16):
        middle = (low + high) / 2
        if mined_share(*draw(SAMPLE, dim, middle, device)) < share:
            low = middle
        else:
            high = middle
    return high


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=numbers, required=True, help="rows, separated by commas")
    parser.add_argument("--dim", type=numbers, required=True, help="dimensions, separated by commas")
    parser.add_argument("--out", type=Path, required=True, help="folder for BATCH-DIM-DENSITY.safetensors")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for dim in options.dim:
        for density, share in SHARES.items():
            noise = find_noise(share, dim, options.device)
            for batch in options.batch:
                embeddings, labels = draw(batch, dim, noise, options.device)
                path = options.out / f"{batch}-{dim}-{density}.safetensors"
                metadata = {"density": density, "wanted_share": str(share), "noise": f"{noise:.4f}"}
                tensors.save(path, {"embeddings": embeddings, "labels": labels}, metadata)
                print(f"{path}: noise {noise:.3f}", flush=True)


if __name__ == "__main__":
    main()
