"""Complete outputs of the slow (Pillow) and fast (torchvision) image processors."""

import torch
from transformers import LlavaNextImageProcessor, LlavaNextImageProcessorFast
from transformers.image_utils import load_image

from functions.store import write_json, write_tensors

SMALL = [[14, 28], [28, 14], [28, 28], [42, 14], [14, 42]]


def square(side, crop=None):
    crop = side if crop is None else crop
    return {"size": {"shortest_edge": side}, "crop_size": {"height": crop, "width": crop}}


CASES = [
    # name, images, options
    ("one", ["rgb-37x53.png"], {**square(14), "image_grid_pinpoints": SMALL}),
    ("several", ["rgb-100x30.png", "rgb-64x64.png", "rgb-5x90.png"], {**square(14), "image_grid_pinpoints": SMALL}),
    ("jpeg", ["photo-301x212.jpg"], {**square(14), "image_grid_pinpoints": SMALL}),
    ("height-width", ["rgb-30x100.png"], {"size": {"height": 14, "width": 16}, "crop_size": {"height": 14, "width": 14},
                                          "image_grid_pinpoints": SMALL}),
    ("crop-smaller", ["rgb-37x53.png"], {**square(14, 12), "image_grid_pinpoints": [[12, 24], [24, 24]]}),
    ("crop-odd", ["rgb-37x53.png"], {**square(14, 11), "image_grid_pinpoints": [[11, 22], [22, 22]]}),
    ("crop-larger", ["rgb-37x53.png"], {**square(12, 15), "image_grid_pinpoints": [[15, 30], [30, 15]]}),
    ("ragged-tiles", ["rgb-64x64.png"], {**square(14), "image_grid_pinpoints": [[20, 33]]}),
    ("no-normalise", ["png-rgba.png"], {**square(14), "image_grid_pinpoints": SMALL, "do_normalize": False}),
    ("no-rescale", ["jpeg-gray.jpg"], {**square(14), "image_grid_pinpoints": SMALL, "do_rescale": False, "do_normalize": False}),
    ("half", ["rgb-37x53.png"], {**square(14), "image_grid_pinpoints": SMALL, "image_mean": [0.5, 0.5, 0.5],
                                 "image_std": [0.5, 0.25, 0.5], "rescale_factor": 0.005}),
    ("no-crop", ["rgb-37x53.png"], {**square(14), "image_grid_pinpoints": [[14, 14], [14, 28]], "do_center_crop": False}),
]


def attempt(kind, images, options, tensors, prefix):
    try:
        out = kind(**options)(images, return_tensors="pt")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    tensors[f"{prefix}.pixel_values"] = out["pixel_values"]
    tensors[f"{prefix}.image_sizes"] = out["image_sizes"]
    return None


def make(folder):
    tensors, entries = {}, []
    for name, files, options in CASES:
        images = [load_image(f"media/{file}") for file in files]
        errors = {
            speed: attempt(kind, images, options, tensors, f"{name}.{speed}")
            for speed, kind in (("slow", LlavaNextImageProcessor), ("fast", LlavaNextImageProcessorFast))
        }
        entries.append({"name": name, "images": [f"media/{f}" for f in files], "options": options, "errors": errors})
    write_tensors(folder / "image_processor.safetensors", tensors)
    write_json(
        folder / "image_processor.json",
        "LlavaNextImageProcessor (slow, Pillow) and LlavaNextImageProcessorFast (torchvision), options over the class defaults. "
        "Tensors `{name}.slow.pixel_values` f32 [N,P,3,H,W], `{name}.slow.image_sizes` i64 [N,2], and `{name}.fast.*`; "
        "where `errors` holds a text, the reference raised it and there are no tensors.",
        entries=entries,
    )
