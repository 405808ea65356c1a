"""Photograph-like images made at test time: shapes drawn on textures, as JPEGs of many sizes."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIDES = ((400, 500), (375, 500), (500, 333), (60, 900), (700, 45), (240, 240), (37, 41), (768, 512))
"""Heights and widths in pixels, taken in turn; very wide, very tall and small ones among them."""


def draw_image(generator: np.random.Generator, height: int, width: int) -> Image.Image:
    """Draw polygons and ellipses on a smooth texture with some noise, (height, width)."""
    coarse = generator.integers(0, 256, (height // 24 + 2, width // 24 + 2, 3), np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noise = generator.normal(0, 6, (height, width, 1))
    image = Image.fromarray(np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(8):
        corners = (generator.random((3, 2)) * (width, height)).astype(int)
        colour = tuple(generator.integers(0, 256, 3).tolist())
        (left, top), (right, bottom) = corners[:2].min(0), corners[:2].max(0)
        if generator.random() < 0.5:
            pen.ellipse((int(left), int(top), int(right), int(bottom)), fill=colour)
        else:
            pen.polygon([(int(x), int(y)) for x, y in corners], fill=colour)
    return image


def write_jpegs(
    root: Path, counts: dict[str, int], *, sides: tuple[tuple[int, int], ...] = SIDES, classes: int = 3
) -> Path:
    """Write root/<split>/class_<c>/<i>.jpg, with quality, chroma subsampling and progressive coding in turn."""
    for part, count in counts.items():
        generator = np.random.default_rng(len(part))
        for i in range(count):
            folder = root / part / f"class_{i % classes}"
            folder.mkdir(parents=True, exist_ok=True)
            draw_image(generator, *sides[i % len(sides)]).save(
                folder / f"{i:04}.jpg",
                quality=(75, 90, 96)[i % 3],
                subsampling=(2, 2, 0, 1)[i % 4],
                progressive=i % 5 == 4,
            )
    return root
