"""Writes resize.json, pixels.json and frames.json beside this file: what Transformers 4.53.3, Pillow 11.3.0 and
torchvision return, as FNV-1a hashes of the bytes. The pictures come from the generator `picture`, which the Rust tests repeat.

    python testdata/processor/make.py
"""

import json
import pathlib
import random
import warnings

import numpy as np
import PIL
import torch
import transformers
from PIL import Image
from torchvision.transforms.v2 import functional as F
from torchvision.transforms import InterpolationMode
from transformers import LlavaNextImageProcessor, LlavaNextImageProcessorFast
from transformers.models.llava_next_video.image_processing_llava_next_video import LlavaNextVideoImageProcessor
from transformers.models.llava_next_video.video_processing_llava_next_video import LlavaNextVideoVideoProcessor

assert transformers.__version__ == "4.53.3" and PIL.__version__ == "11.3.0"
warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
HERE = pathlib.Path(__file__).parent


def picture(seed, height, width):
    """Noise from a 32-bit linear congruential generator: byte = state >> 24."""
    count = height * width * 3
    a, c = 1664525, 1013904223
    out = np.empty(count, np.uint8)
    state = seed & 0xFFFFFFFF
    for i in range(count):
        state = (state * a + c) & 0xFFFFFFFF
        out[i] = state >> 24
    return out.reshape(height, width, 3)


def fnv(array):
    value = 0xCBF29CE484222325
    for byte in np.ascontiguousarray(array).tobytes():
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return f"{value:016x}"


def resize_cases():
    rng = random.Random(5)
    filters = {0: Image.NEAREST, 1: Image.LANCZOS, 2: Image.BILINEAR, 3: Image.BICUBIC, 4: Image.BOX, 5: Image.HAMMING}
    torch_filters = {0: InterpolationMode.NEAREST_EXACT, 2: InterpolationMode.BILINEAR, 3: InterpolationMode.BICUBIC}
    sizes = [(1, 1, 7, 7), (3, 5, 3, 5), (20, 30, 20, 11), (20, 30, 9, 30), (1, 90, 13, 90), (64, 48, 33, 25)]
    for _ in range(26):
        sizes.append(tuple(rng.randint(1, 90) for _ in range(4)))
    cases = []
    for seed, (h, w, th, tw) in enumerate(sizes):
        source = picture(seed, h, w)
        for number in [3, 3, 0, 1, 2, 4, 5] if seed % 4 == 0 else [3]:
            out = np.array(Image.fromarray(source).resize((tw, th), filters[number]))
            cases.append(["pillow", number, seed, h, w, th, tw, fnv(out)])
            if number in torch_filters:
                chw = torch.from_numpy(source).permute(2, 0, 1).contiguous()
                out = F.resize(chw, [th, tw], interpolation=torch_filters[number], antialias=True)
                cases.append(["torchvision", number, seed, h, w, th, tw, fnv(out.permute(1, 2, 0).numpy())])
    return cases


def grid(tile):
    return [[tile, 2 * tile], [2 * tile, tile], [2 * tile, 2 * tile], [3 * tile, tile], [tile, 3 * tile]]


def settings_variants():
    base = {"size": {"shortest_edge": 20}, "crop_size": {"height": 20, "width": 20}, "image_grid_pinpoints": grid(20)}
    yield base
    yield {**base, "size": {"height": 20, "width": 20}}
    yield {**base, "do_rescale": False}
    yield {**base, "do_normalize": False}
    yield {**base, "do_rescale": False, "do_normalize": False}
    yield {**base, "rescale_factor": 1 / 127.5, "image_mean": [0.5, 0.4, 1.0], "image_std": [0.5, 0.25, 0.3]}
    yield {**base, "crop_size": {"height": 17, "width": 17}}
    yield {**base, "crop_size": {"height": 13, "width": 10}}
    yield {**base, "crop_size": {"height": 25, "width": 25}}
    yield {**base, "do_resize": False}
    yield {**base, "resample": 2}
    yield {**base, "image_grid_pinpoints": [[30, 50], [50, 30]]}


def image_cases():
    cases = []
    for settings in settings_variants():
        for seed, (h, w) in enumerate([(20, 20), (31, 47), (64, 23), (7, 90), (40, 40)]):
            source = picture(100 + seed, h, w)
            for kind, cls in [("pillow", LlavaNextImageProcessor), ("torchvision", LlavaNextImageProcessorFast)]:
                out = cls(**settings)(Image.fromarray(source), return_tensors="pt")["pixel_values"][0].float()
                cases.append([kind, settings, 100 + seed, h, w, list(out.shape), fnv(out.numpy())])
    return cases


def video_cases():
    cases = []
    for settings in settings_variants():
        settings = {k: v for k, v in settings.items() if k != "image_grid_pinpoints"}
        for seed, (h, w) in enumerate([(20, 20), (31, 47), (64, 23), (24, 43)]):
            if not settings.get("do_resize", True) and (h, w) != (31, 47):
                continue
            source = np.stack([picture(200 + 10 * seed + i, h, w) for i in range(2)])
            for kind, cls in [("pillow", LlavaNextVideoImageProcessor), ("torchvision", LlavaNextVideoVideoProcessor)]:
                out = cls(**settings)([source], return_tensors="pt")["pixel_values_videos"][0].float()
                cases.append([kind, settings, 200 + 10 * seed, h, w, list(out.shape), fnv(out.numpy())])
    return cases


def video_sizes():
    """The size after the short side is resized, before the crop."""
    cases = []
    for h, w in [(240, 426), (720, 1280), (360, 640), (426, 240), (4, 20), (337, 336), (1079, 1921)]:
        processor = LlavaNextVideoVideoProcessor(size={"shortest_edge": 336}, do_center_crop=False)
        out = processor([np.zeros((1, h, w, 3), np.uint8)], return_tensors="pt")["pixel_values_videos"]
        cases.append([h, w, out.shape[-2], out.shape[-1]])
    return cases


def write(name, value):
    text = ",\n".join(json.dumps(case) for case in value["cases"])
    head = json.dumps({k: v for k, v in value.items() if k != "cases"})[:-1]
    (HERE / name).write_text(f'{head}, "cases": [\n{text}\n]}}\n')


write("resize.json", {"what": "[arithmetic, filter, seed, h, w, to_h, to_w, fnv]", "cases": resize_cases()})
write("images.json", {"what": "[arithmetic, settings, seed, h, w, shape, fnv of f32]", "cases": image_cases()})
write("videos.json", {"what": "[arithmetic, settings, seed of frame 0, h, w, shape, fnv of f32], 2 frames", "cases": video_cases()})
write("video_sizes.json", {"what": "[h, w, resized h, resized w] for shortest_edge 336", "cases": video_sizes()})
