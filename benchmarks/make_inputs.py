"""Write the inputs that every program gets: the clip of noise and the prompt of `lnv bench`.

    python benchmarks/make_inputs.py CHECKPOINT FOLDER [--frames N]

`inputs.safetensors` has what a processor would return (input_ids, attention_mask, pixel_values_videos), for
Transformers and `lnv`; `pixels.f32` the pixels alone, for llama.cpp. Needs numpy and safetensors.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

TEXT_TOKENS = 40


def noise(count):
    """The generator of crates/lnv-cli/src/bench.rs: x -> 1664525 x + 1013904223 modulo 2^32, from 1; its n-th value directly."""
    powers = np.cumprod(np.full(count, 1_664_525, dtype=np.uint32), dtype=np.uint32)
    sums = np.cumsum(np.concatenate([[np.uint32(1)], powers[:-1]]), dtype=np.uint32)
    state = powers + np.uint32(1_013_904_223) * sums
    return (state >> np.uint32(8)).astype(np.float32) / np.float32(1 << 23) - np.float32(1)


def prompt(config, frames):
    """Twenty made-up text tokens, the frames' placeholders, twenty more."""
    vision = config["vision_config"]
    side = vision["image_size"] // vision["patch_size"] // config["spatial_pool_stride"]
    words = min(config["text_config"]["vocab_size"], config["image_token_index"], config["video_token_index"])
    text = [i * 7 % words for i in range(TEXT_TOKENS)]
    return text[:20] + [config["video_token_index"]] * (frames * side * side) + text[20:]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--frames", type=int, default=8)
    options = parser.parse_args()
    config = json.loads((options.checkpoint / "config.json").read_text())
    side = config["vision_config"]["image_size"]
    pixels = noise(options.frames * 3 * side * side).reshape(1, options.frames, 3, side, side)
    ids = np.array([prompt(config, options.frames)], dtype=np.int64)
    options.folder.mkdir(parents=True, exist_ok=True)
    pixels.tofile(options.folder / "pixels.f32")
    tensors = {"input_ids": ids, "attention_mask": np.ones_like(ids), "pixel_values_videos": pixels}
    save_file(tensors, options.folder / "inputs.safetensors")


if __name__ == "__main__":
    main()
