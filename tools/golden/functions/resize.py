"""Bicubic resizing of u8 images by Pillow and by torchvision (antialias)."""

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from functions.store import write_json, write_tensors
from media import picture

SIZES = [
    # height, width -> height, width
    (8, 8, 5, 5), (5, 5, 8, 8), (37, 53, 14, 14), (53, 37, 14, 28), (9, 40, 28, 28), (40, 9, 28, 28), (16, 16, 16, 9), (16, 16, 9, 16),
    (16, 16, 16, 16), (30, 20, 60, 40), (1, 1, 7, 7), (1, 9, 5, 20), (9, 1, 20, 5), (2, 3, 9, 4), (64, 64, 7, 7), (64, 48, 3, 50),
    (48, 64, 50, 3), (33, 31, 32, 32), (100, 30, 28, 9), (30, 100, 9, 28), (20, 20, 1, 1), (45, 61, 21, 28), (61, 45, 41, 30),
    (12, 17, 29, 13), (17, 12, 13, 29), (70, 5, 14, 14), (5, 70, 14, 14), (24, 24, 25, 25), (25, 25, 24, 24), (80, 80, 27, 53),
]


def source(index, height, width):
    rng = np.random.default_rng(500 + index)
    kind = index % 3
    if kind == 0:
        return rng.integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    if kind == 1:
        return rng.choice(np.array([0, 255], np.uint8), size=(height, width, 3))
    return picture(height, width, 600 + index)


def by_pillow(image, height, width):
    return torch.from_numpy(np.array(Image.fromarray(image).resize((width, height), Image.BICUBIC)))


def by_torch(image, height, width):
    planes = torch.from_numpy(image).permute(2, 0, 1).contiguous()
    return tv.resize(planes, [height, width], interpolation=tv.InterpolationMode.BICUBIC, antialias=True).permute(1, 2, 0)


def make(folder):
    tensors, entries = {}, []
    for index, (h, w, height, width) in enumerate(SIZES):
        image = source(index, h, w)
        tensors[f"{index}.input"] = torch.from_numpy(image)
        tensors[f"{index}.pillow"] = by_pillow(image, height, width)
        try:
            tensors[f"{index}.torch"] = by_torch(image, height, width)
        except RuntimeError:  # torch fails on some images with a side of 1
            pass
        has_torch = f"{index}.torch" in tensors
        entries.append({"index": index, "from": [h, w], "to": [height, width], "torch": has_torch})
    write_tensors(folder / "resize.safetensors", tensors)
    write_json(
        folder / "resize.json",
        "Bicubic resizes of u8 [H,W,3] images. Tensors `{index}.input`, `{index}.pillow` (Image.resize BICUBIC), "
        "`{index}.torch` (torchvision resize, bicubic, antialias, on u8; absent where `torch` is false: torch itself fails there). Sizes are [height, width].",
        entries=entries,
    )
