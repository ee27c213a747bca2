"""Small pictures and clips, and the pixels the reference reads from them."""

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers.image_utils import load_image
from transformers.video_utils import load_video


def picture(height, width, seed, noise=12.0):
    """Smooth colour waves, a disc, a sharp bar and some noise: u8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    fy, fx = y / max(height, 2), x / max(width, 2)
    waves = rng.uniform(1, 4, size=(3, 2))
    phase = rng.uniform(0, 6.28, size=3)
    planes = [127 + 100 * np.sin(6.28 * (waves[c, 0] * fy + waves[c, 1] * fx) + phase[c]) for c in range(3)]
    image = np.stack(planes, axis=-1)
    cy, cx = rng.uniform(0.3, 0.7, size=2)
    disc = (fy - cy) ** 2 + (fx - cx) ** 2 < 0.04
    image[disc] = rng.uniform(0, 255, size=3)
    image[:, width // 3 : width // 3 + max(1, width // 20)] = [250, 5, 5]
    return np.clip(image + rng.normal(0, noise, size=image.shape), 0, 255).astype(np.uint8)


def rgb(height, width, seed, noise=12.0):
    return Image.fromarray(picture(height, width, seed, noise))


def with_alpha(height, width, seed):
    image = rgb(height, width, seed).convert("RGBA")
    alpha = np.linspace(0, 255, width).astype(np.uint8)[None].repeat(height, axis=0)
    image.putalpha(Image.fromarray(alpha))
    return image


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def deep_gray(height, width):
    return Image.fromarray((np.arange(height * width, dtype=np.uint32) * 37 % 65536).astype(np.uint16).reshape(height, width))


def images():
    """(file name, picture, save options, words)"""
    smooth = {"noise": 4.0}
    yield "rgb-37x53.png", rgb(37, 53, 1), {}, "RGB PNG, height 37, width 53"
    yield "rgb-100x30.png", rgb(100, 30, 2), {}, "tall and narrow"
    yield "rgb-30x100.png", rgb(30, 100, 3), {}, "wide and low"
    yield "rgb-64x64.png", rgb(64, 64, 4), {}, "square"
    yield "rgb-5x90.png", rgb(5, 90, 5), {}, "very wide: unpadding keeps no or few rows"
    yield "rgb-1x1.png", rgb(1, 1, 6), {}, "one pixel"
    yield "rgb-2x4.png", rgb(2, 4, 15), {}, "eight pixels"
    yield "photo-301x212.jpg", rgb(301, 212, 7, **smooth), {"quality": 85, "subsampling": "4:2:0"}, "JPEG 4:2:0, height 301, width 212"
    yield "jpeg-444.jpg", rgb(45, 61, 8, **smooth), {"quality": 92, "subsampling": "4:4:4"}, "JPEG 4:4:4"
    yield "jpeg-422.jpg", rgb(45, 61, 9, **smooth), {"quality": 80, "subsampling": "4:2:2"}, "JPEG 4:2:2"
    yield "jpeg-420-odd.jpg", rgb(45, 61, 10, **smooth), {"quality": 75, "subsampling": "4:2:0"}, "JPEG 4:2:0 with odd sides"
    yield "jpeg-gray.jpg", rgb(45, 61, 11, **smooth).convert("L"), {"quality": 85}, "grayscale JPEG"
    yield "jpeg-progressive.jpg", rgb(70, 52, 12, **smooth), {"quality": 85, "progressive": True}, "progressive JPEG"
    yield "jpeg-optimised.jpg", rgb(33, 49, 13, **smooth), {"quality": 60, "optimize": True, "restart_marker_blocks": 4}, "optimised tables, restart markers"
    yield "jpeg-cmyk.jpg", rgb(40, 48, 14, **smooth).convert("CMYK"), {"quality": 90}, "CMYK JPEG (Adobe, inverted)"
    for orientation in range(2, 9):
        options = {"quality": 85, "exif": exif(orientation)}
        yield f"jpeg-exif{orientation}.jpg", rgb(30, 44, 20 + orientation, **smooth), options, f"EXIF orientation {orientation}"
    yield "png-exif6.png", rgb(20, 31, 30), {"exif": exif(6)}, "PNG with EXIF orientation 6"
    yield "webp-lossy.webp", rgb(50, 41, 31, **smooth), {"quality": 80}, "lossy WebP"
    yield "webp-lossless.webp", rgb(24, 41, 32), {"lossless": True}, "lossless WebP"
    yield "webp-alpha.webp", with_alpha(26, 35, 33), {"lossless": True, "exact": True}, "lossless WebP with alpha"
    yield "gif.gif", rgb(39, 57, 34).quantize(64), {}, "GIF, 64 colours"
    second = rgb(30, 30, 35).quantize(32)
    yield "gif-animated.gif", rgb(30, 30, 36).quantize(32), {"save_all": True, "append_images": [second], "duration": 100}, "animated GIF, the first frame counts"
    yield "gif-transparent.gif", rgb(30, 28, 37).quantize(16), {"transparency": 3}, "GIF with a transparent index"
    yield "bmp.bmp", rgb(27, 33, 38), {}, "24-bit BMP"
    yield "png-palette.png", rgb(41, 29, 39).quantize(32), {}, "palette PNG"
    yield "png-palette-trns.png", rgb(41, 29, 40).quantize(32), {"transparency": 5}, "palette PNG with a transparent index"
    yield "png-rgba.png", with_alpha(31, 47, 41), {}, "RGBA PNG: alpha is dropped"
    yield "png-la.png", with_alpha(31, 47, 42).convert("LA"), {}, "gray with alpha"
    yield "png-gray.png", rgb(31, 47, 43).convert("L"), {}, "gray PNG"
    yield "png-1bit.png", rgb(31, 47, 44).convert("1"), {}, "1-bit PNG"
    yield "png-gray16.png", deep_gray(21, 34), {}, "16-bit gray PNG"
    yield "tiff-lzw.tiff", rgb(22, 31, 45), {"compression": "tiff_lzw"}, "TIFF, LZW"


def write_images(folder):
    entries, pixels = [], {}
    for name, image, options, what in images():
        path = folder / name
        image.save(path, **options)
        try:
            pixels[name] = torch.from_numpy(np.array(load_image(str(path))))
        except Exception as error:  # a file the reference cannot read is still of use: it says what it says
            what += f" (the reference raises {type(error).__name__}: {error})"
        with Image.open(path) as again:
            entries.append({"path": f"media/{name}", "format": again.format, "mode": again.mode, "size": list(again.size), "what": what})
    save_file(pixels, folder / "images.safetensors")
    return entries


def clip_frames(height, width, count, seed):
    rng = np.random.default_rng(seed)
    background = picture(height, width, seed, noise=3.0).astype(np.float64)
    colour = rng.uniform(0, 255, size=3)
    y, x = np.mgrid[0:height, 0:width]
    for i in range(count):
        frame = np.roll(background, i, axis=1) * (0.7 + 0.3 * np.cos(i / 5.0))
        cy, cx = height * (0.5 + 0.3 * np.sin(i / 4.0)), width * (i + 1) / (count + 1)
        frame[(y - cy) ** 2 + (x - cx) ** 2 < (height / 6) ** 2] = colour
        yield np.clip(frame, 0, 255).astype(np.uint8)


CLIPS = [
    # name, height, width, frames, fps, options, colour tags, words
    ("clip-64x48.mp4", 48, 64, 24, Fraction(12), {"bf": "3"}, {}, "B-frames, untagged"),
    ("clip-bt709.mp4", 48, 64, 30, Fraction(30000, 1001), {"bf": "2"}, {"colorspace": 1, "range": 1}, "tagged BT.709, limited range"),
    ("clip-bt601.mp4", 48, 64, 20, Fraction(25), {"bf": "2"}, {"colorspace": 6, "range": 1}, "tagged SMPTE 170M, limited range"),
    ("clip-full.mp4", 48, 64, 20, Fraction(25), {"bf": "0"}, {"colorspace": 1, "range": 2}, "tagged BT.709, full range"),
    ("clip-odd-70x46.mp4", 46, 70, 40, Fraction(10), {"bf": "3", "g": "10"}, {}, "sides not multiples of 16"),
    ("clip-tall-34x90.mp4", 90, 34, 9, Fraction(3), {"bf": "1"}, {}, "tall, few frames"),
    ("clip-one-frame.mp4", 32, 40, 1, Fraction(5), {}, {}, "a single frame"),
    ("clip-444.mp4", 40, 56, 8, Fraction(8), {"format": "yuv444p"}, {}, "4:4:4 chroma"),
]


def write_clip(path, height, width, count, fps, options, tags, seed):
    options = dict(options)
    pixel_format = options.pop("format", "yuv420p")
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        container.metadata.clear()
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.options = {"crf": "24", "preset": "slow", "threads": "1", **options}
        if tags:
            stream.codec_context.colorspace = tags["colorspace"]
            stream.codec_context.color_range = tags["range"]
        for rgb_frame in clip_frames(height, width, count, seed):
            frame = av.VideoFrame.from_ndarray(rgb_frame, format="rgb24")
            target = {"dst_colorspace": tags["colorspace"], "dst_color_range": tags["range"]} if tags else {}
            frame = frame.reformat(format=pixel_format, **target)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def sample_indices(total, count=6):
    count = min(total, count)
    return [i * total // count for i in range(count)]


def write_videos(folder, encode):
    entries, pixels = [], {}
    for seed, (name, height, width, count, fps, options, tags, what) in enumerate(CLIPS):
        path = folder / name
        if encode or not path.exists():
            write_clip(path, height, width, count, fps, options, tags, 100 + seed)
        frames, metadata = load_video(str(path))
        assert frames.shape == (count, height, width, 3), (name, frames.shape)
        samples = sample_indices(count)
        pixels[name] = torch.from_numpy(np.ascontiguousarray(frames[samples]))
        entries.append({
            "path": f"media/{name}", "what": what, "width": width, "height": height, "frames": count,
            "fps": [fps.numerator, fps.denominator], "reported_fps": metadata.fps, "samples": samples,
        })
    save_file(pixels, folder / "videos.safetensors")
    return entries


def make(root: Path, encode=False):
    """encode: also encode the clips again (their bytes depend on the x264 in PyAV)."""
    folder = root / "media"
    folder.mkdir(parents=True, exist_ok=True)
    index = {"images": write_images(folder), "videos": write_videos(folder, encode)}
    (folder / "media.json").write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n")
