"""Complete outputs of the torchvision video processor."""

import numpy as np
import torch
from transformers import LlavaNextVideoVideoProcessor
from transformers.models.llava_next_video.image_processing_llava_next_video import LlavaNextVideoImageProcessor

from functions.image_processor import square
from functions.store import write_json, write_tensors
from media import picture

CASES = [
    # name, clips as (frames, height, width), options of the processor, options of the call
    ("wide", [(2, 23, 37)], square(14), {}),
    ("tall", [(2, 41, 19)], square(14), {}),
    ("upscaled", [(1, 9, 13)], square(20), {}),
    ("same-size", [(2, 14, 14)], square(14), {}),
    ("two-sizes", [(2, 20, 30), (2, 31, 17)], square(14), {}),
    ("crop-difference-3", [(1, 28, 34)], square(14), {}),
    ("crop-difference-7", [(1, 20, 30)], square(14), {}),
    ("crop-smaller", [(1, 26, 38)], square(16, 13), {}),
    ("crop-larger", [(1, 20, 24)], square(10, 15), {}),
    ("sampled", [(7, 12, 16)], square(8), {"do_sample_frames": True, "num_frames": 3}),
    ("sampled-fps", [(9, 12, 16)], square(8), {"do_sample_frames": True, "fps": 2, "video_metadata": [[{"fps": 4.5}]]}),
    ("not-sampled", [(3, 12, 16)], square(8), {"num_frames": 2}),
    ("gray", [(2, 12, 16, 1)], square(8), {}),
    ("half-alpha", [(1, 12, 16, 4)], square(8), {}),
    ("no-normalise", [(1, 12, 16)], {**square(8), "do_normalize": False}, {}),
    ("no-crop", [(1, 12, 16)], {**square(8), "do_center_crop": False}, {}),
    ("height-width", [(1, 12, 16)], {"size": {"height": 9, "width": 8}, "crop_size": {"height": 8, "width": 8}}, {}),
    ("half", [(1, 12, 16)], {**square(8), "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, {}),
]


def clip(shape, seed):
    frames, height, width, *channels = shape
    video = np.stack([picture(height, width, seed + i, noise=30) for i in range(frames)])
    if channels == [1]:
        return video[..., :1].copy()
    if channels == [4]:
        alpha = np.random.default_rng(seed).integers(0, 256, size=video.shape[:3] + (1,), dtype=np.uint8)
        return np.concatenate([video, alpha], axis=-1)
    return video


def as_given(frames):
    """Arrays; with four channels, which arrays cannot have in 4.53.3, a channels-first tensor."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2) if frames.shape[-1] == 4 else frames.copy()


def slow_output(clips, options):
    """The deprecated Pillow processor, where the input suits it."""
    if any(c.shape[-1] != 3 for c in clips):
        return None
    try:
        return LlavaNextVideoImageProcessor(**options)([list(c) for c in clips], return_tensors="pt")["pixel_values_videos"]
    except Exception:
        return None


def make(folder):
    tensors, entries = {}, []
    for number, (name, shapes, options, call) in enumerate(CASES):
        clips = [clip(shape, 700 + 20 * number + 10 * i) for i, shape in enumerate(shapes)]
        for i, frames in enumerate(clips):
            tensors[f"{name}.input.{i}"] = torch.from_numpy(frames)
        error = None
        try:
            out = LlavaNextVideoVideoProcessor(**options)([as_given(c) for c in clips], return_tensors="pt", **call)
            tensors[f"{name}.pixel_values_videos"] = out["pixel_values_videos"].float()
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        slow = None if call else slow_output(clips, options)
        if slow is not None:
            tensors[f"{name}.slow"] = slow
        entries.append({"name": name, "clips": len(clips), "options": options, "call": call, "error": error})
    write_tensors(folder / "video_processor.safetensors", tensors)
    write_json(
        folder / "video_processor.json",
        "LlavaNextVideoVideoProcessor on numpy clips (four channels: on channels-first tensors). Tensors `{name}.input.{i}` u8 [F,H,W,C] in, `{name}.pixel_values_videos` f32 "
        "[V,F,3,h,w] out; `{name}.slow`: the deprecated Pillow processor's output on the same frames. `error`: what the reference raised.",
        entries=entries,
    )
