"""Resolution choice, grid, resize and padding targets, unpadding, token counts."""

import numpy as np
import torch
from transformers import LlavaNextImageProcessor, LlavaNextVideoProcessor
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension
from transformers.models.llava_next_video.modeling_llava_next_video import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

from functions.store import write_json

GRIDS = [
    # (tile side, patch size, pinpoints)
    (336, 14, [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]),
    (336, 14, [[672, 336], [336, 672], [672, 672], [336, 1008], [1008, 336]]),
    (336, 14, [[672, 336]]),
    (336, 14, [[336 * h, 336 * w] for h in range(1, 7) for w in range(1, 7) if 1 < h * w <= 6]),
    (384, 14, [[384, 768], [768, 384], [768, 768], [1152, 384], [384, 1152]]),
    (224, 14, [[224, 448], [448, 224], [448, 448]]),
    (28, 7, [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]),
    (15, 3, [[15, 30], [30, 15], [30, 30]]),
    (16, 4, [[16, 16], [16, 32], [48, 48]]),
]
TABLE = [
    (480, 640), (640, 480), (336, 336), (100, 100), (1, 1), (337, 336), (1080, 1920), (720, 1280), (1920, 1080), (899, 1024),
    (672, 672), (1365, 2048), (300, 100), (500, 30), (10, 2000), (2000, 10), (503, 316), (400, 601), (503, 400), (1, 5000), (5000, 1),
    (335, 337), (4032, 3024), (3024, 4032), (671, 673), (336, 1008), (1009, 335), (7, 3), (13, 16), (427, 640), (640, 427),
]


def random_sizes(rng, count):
    small = rng.integers(1, 200, size=(count, 2))
    large = np.exp(rng.uniform(np.log(20), np.log(6000), size=(count, 2))).astype(int)
    return [tuple(int(v) for v in pair) for pair in np.concatenate([small, large])]


def counter(side, patch, pinpoints):
    """The processor's own count, as an object without tokenizer or templates."""
    made = LlavaNextVideoProcessor.__new__(LlavaNextVideoProcessor)
    made.patch_size, made.num_additional_image_tokens = patch, 1
    made.image_processor = LlavaNextImageProcessor(image_grid_pinpoints=pinpoints)
    return lambda h, w: made._get_number_of_features(h, w, side, side) - 1


def entry(index, size, count):
    side, patch, pinpoints = GRIDS[index]
    h, w = size
    best = select_best_resolution(size, pinpoints)
    grid = get_anyres_image_grid_shape(size, pinpoints, side)
    g = side // patch
    kept = unpad_image(torch.zeros(1, grid[0] * g, grid[1] * g), torch.tensor(size)).shape[1:]
    resized = get_patch_output_size(np.zeros((h, w, 1), np.bool_), best, ChannelDimension.LAST)
    top, left = (best[0] - resized[0]) // 2, (best[1] - resized[1]) // 2
    features = g * g + kept[0] * kept[1] + kept[0]
    assert features == count(h, w), (index, size)
    return [index, h, w, *best, *grid, image_size_to_num_patches(size, pinpoints, side), *resized, top, left, *kept, features]


def make(folder):
    rng = np.random.default_rng(41)
    entries = []
    for index, (side, patch, pinpoints) in enumerate(GRIDS):
        count = counter(side, patch, pinpoints)
        sizes = TABLE + random_sizes(rng, 25)
        entries += [entry(index, size, count) for size in sizes]
    write_json(
        folder / "anyres.json",
        "AnyRes geometry. `grids`: image (tile) size, patch size, pinpoints. `entries`: one row per image size; columns in `columns`. "
        "The token count is the model's own, equal to the processor's with strategy default and num_additional_image_tokens 1.",
        grids=[{"image_size": s, "patch_size": p, "pinpoints": points} for s, p, points in GRIDS],
        columns=["grid", "height", "width", "best_height", "best_width", "grid_height", "grid_width", "tiles", "resized_height",
                 "resized_width", "pad_top", "pad_left", "unpadded_rows", "unpadded_columns", "tokens"],
        entries=entries,
    )
