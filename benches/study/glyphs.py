"""Draws a set of pictures for the study: characters in five faces of a typeface, in random scenes.

    python3 benches/study/glyphs.py OUT [--classes 600] [--seed 0]

OUT/<code point>/<0 to 9>.jpg, 64 x 64 pixels. A class is a character, drawn twice in each of five faces of DejaVu (sans, bold, oblique, serif, mono; they
come with matplotlib), rotated by up to 30 degrees, sheared, at 0.45 to 0.85 of the frame, in a random colour, on a gradient with noise and strokes of other
characters. `ddtas-train --dataset folder` trains on half of the classes. Needs matplotlib and pillow.
"""

import argparse
import math
import random
from pathlib import Path

import numpy as np
from matplotlib import get_data_path
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

FACES = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSansMono"]
SIDE, DRAWN = 64, 128


def characters(faces: list[Path]) -> list[str]:
    """Letters and signs that all faces have; of those with the same shape, such as a capital and a small letter, only one."""
    shared = set.intersection(*(set(FT2Font(str(face)).get_charmap()) for face in faces))
    seen, kept = set(), []
    font = ImageFont.truetype(str(faces[0]), 40)
    for code in sorted(shared):
        character = chr(code)
        mask = font.getmask(character)
        if not character.isprintable() or character.isspace() or mask.getbbox() is None:
            continue
        # Only the shape counts: characters that differ in size or position would be the same class to a network.
        shape = Image.frombytes("L", mask.size, bytes(mask)).crop(mask.getbbox()).resize((16, 16))
        key = (np.asarray(shape) > 127).tobytes()
        if key not in seen:
            seen.add(key)
            kept.append(character)
    return kept


def colour(draw: random.Random) -> tuple[int, int, int]:
    return tuple(draw.randrange(256) for _ in range(3))


def glyph(character: str, face: Path, draw: random.Random) -> Image.Image:
    """A mask of DRAWN x DRAWN pixels."""
    font = ImageFont.truetype(str(face), 160)
    left, top, right, bottom = font.getbbox(character)
    mask = Image.new("L", (right - left + 8, bottom - top + 8))
    ImageDraw.Draw(mask).text((4 - left, 4 - top), character, fill=255, font=font)
    angle, shear = math.radians(draw.uniform(-30, 30)), draw.uniform(-0.25, 0.25)
    scale = max(mask.size) / (DRAWN * draw.uniform(0.45, 0.85))
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    across, down = cos + shear * sin, -sin + shear * cos
    x, y = (DRAWN / 2 + draw.uniform(-8, 8) for _ in range(2))
    place = (across, down, mask.width / 2 - across * x - down * y, sin, cos, mask.height / 2 - sin * x - cos * y)
    return mask.transform((DRAWN, DRAWN), Image.Transform.AFFINE, place, Image.Resampling.BILINEAR)


def picture(character: str, face: Path, others: list[str], draw: random.Random) -> Image.Image:
    noise = np.random.default_rng(draw.randrange(2**32))
    first, second, ink = (np.array(colour(draw), float) for _ in range(3))
    while np.abs((first + second) / 2 - ink).mean() < 60:
        ink = np.array(colour(draw), float)
    slope = np.linspace(0, 1, DRAWN)[:, None] if draw.random() < 0.5 else np.linspace(0, 1, DRAWN)[None]
    ground = first + (second - first) * np.broadcast_to(slope, (DRAWN, DRAWN))[..., None]
    coarse = Image.fromarray(noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((DRAWN, DRAWN), Image.Resampling.BICUBIC)
    ground = ground + (np.asarray(coarse, float) - 128) * 0.4
    for other in draw.sample(others, 2):
        ghost = np.asarray(glyph(other, face, draw), float)[..., None] / 255
        ground = ground + ghost * draw.uniform(-50, 50)
    mask = np.asarray(glyph(character, face, draw), float)[..., None] / 255
    pixels = ground + (ink - ground) * mask + noise.normal(0, 6, (DRAWN, DRAWN, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BOX)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--classes", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    faces = [Path(get_data_path()) / "fonts/ttf" / f"{face}.ttf" for face in FACES]
    draw = random.Random(options.seed)
    every = characters(faces)
    if len(every) < options.classes:
        raise SystemExit(f"glyphs.py: --classes {options.classes}: the faces share {len(every)} characters that differ")
    for character in draw.sample(every, options.classes):
        folder = options.out / f"{ord(character):04x}"
        folder.mkdir(parents=True)
        for number in range(2 * len(faces)):
            picture(character, faces[number // 2], every, draw).save(folder / f"{number}.jpg", quality=90)


if __name__ == "__main__":
    main()
