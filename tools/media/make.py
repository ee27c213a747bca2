"""Makes testdata/media: small clips and pictures, and what PyAV and Pillow decode them to.

    python tools/media/make.py

Refuses other versions than those below. expected.json holds, for every clip, the 64-bit FNV-1a hash of each
frame of a whole decode (`frame.to_ndarray(format="rgb24")`, turned where the file asks for it), and for every
picture that of `transformers.image_utils.load_image`.
"""

import json
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import PIL
from PIL import Image
from transformers.image_utils import load_image

WANTED = {"av": "18.1.0", "PIL": "11.3.0"}
HERE = Path(__file__).resolve().parents[2] / "testdata" / "media"


def check_versions():
    have = {"av": av.__version__, "PIL": PIL.__version__}
    if have != WANTED:
        raise SystemExit(f"these versions are needed: {WANTED}, but here are {have}")


def fnv(data: bytes) -> str:
    value = 0xCBF29CE484222325
    for byte in data:
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return f"{value:016x}"


def scene(i, h, w):
    """Something that moves, with detail that the codecs have to work on."""
    y, x = np.mgrid[0:h, 0:w].astype(float)
    rng = np.random.default_rng(i)
    base = np.stack(
        [
            127 + 100 * np.sin((x + 3 * i) / 6),
            127 + 100 * np.cos((y - 2 * i) / 5),
            127 + 100 * np.sin((x + y + 5 * i) / 9),
        ],
        -1,
    )
    base[(i * 2) % h : (i * 2) % h + 8, (i * 3) % w : (i * 3) % w + 8] = 255
    return (base + rng.normal(0, 6, base.shape)).clip(0, 255).astype(np.uint8)


def clip(name, codec, n=75, h=48, w=64, fmt="yuv420p", rate=25, options=None, times=None, tags=None, container=None):
    path = HERE / name
    with av.open(str(path), "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = w, h, fmt
        ctx = stream.codec_context
        ctx.thread_count = 1
        for key, value in (tags or {}).items():
            setattr(ctx, key, value)
        if times:
            ctx.time_base = Fraction(1, 1000)
        for i in range(n):
            frame = av.VideoFrame.from_ndarray(scene(i, h, w), format="rgb24")
            frame = frame.reformat(
                format=fmt,
                dst_colorspace="ITU709" if (tags or {}).get("colorspace") == 1 else None,
                dst_color_range="JPEG" if (tags or {}).get("color_range") == 2 else None,
            )
            frame.pts = times[i] if times else i
            frame.time_base = Fraction(1, 1000) if times else Fraction(1, rate)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def turn(path, name, matrix):
    """Writes a display matrix into the track header."""
    data = bytearray(path.read_bytes())
    at = data.find(b"tkhd") + 4 + 40
    a, b, c, d = matrix
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (HERE / name).write_bytes(data)


def cut(path, name, duration, start):
    """Changes the edit list: movie ticks (ms), track ticks."""
    data = bytearray(path.read_bytes())
    at = data.find(b"elst") + 12
    old = struct.unpack(">IiI", data[at : at + 12])
    data[at : at + 12] = struct.pack(">IiI", duration or old[0], old[1] if start is None else start, old[2])
    (HERE / name).write_bytes(data)


def videos():
    x264 = {"preset": "medium", "crf": "30", "threads": "1"}
    b = {**x264, "x264-params": "keyint=20:bframes=3:b-pyramid=2:scenecut=0"}
    clip("h264.mp4", "libx264", options=b)
    clip("h264.mkv", "libx264", options=b)
    clip("h264.ts", "libx264", options=b)
    clip("h264.avi", "libx264", options=b)
    clip("h264.h264", "libx264", options=b, n=40)
    clip("h264-fragmented.mp4", "libx264", options=b)  # rewritten below
    clip("h264-open.mp4", "libx264", options={**x264, "x264-params": "open-gop=1:keyint=20:bframes=4:ref=4:b-adapt=0:scenecut=0"})
    clip("h264-open.mkv", "libx264", options={**x264, "x264-params": "open-gop=1:keyint=16:bframes=3:ref=6:scenecut=0"})
    clip("h264-refresh.mp4", "libx264", options={**x264, "x264-params": "intra-refresh=1:keyint=20"})
    clip("h264-interlaced.mp4", "libx264", h=64, options={**x264, "x264-params": "tff=1:keyint=20"})
    times = [i * 40 + (i // 10) * 300 + (i % 3) * 7 for i in range(60)]
    clip("h264-vfr.mp4", "libx264", n=60, options=b, times=times)
    clip("h264-vfr.mkv", "libx264", n=60, options=b, times=times)
    clip("h264-odd-444.mp4", "libx264", n=12, h=47, w=61, fmt="yuv444p", options=x264)
    clip("h264-one.mp4", "libx264", n=1, options=x264)
    clip("h264-10bit.mp4", "libx264", n=12, fmt="yuv420p10le", options=x264)
    clip("h264-10bit-422.mp4", "libx264", n=12, fmt="yuv422p10le", options=x264)
    clip("h264-bt709.mp4", "libx264", n=12, options=x264, tags={"colorspace": 1})
    clip("h264-full.mp4", "libx264", n=12, options=x264, tags={"color_range": 2})
    clip("h264-bt2020-10bit.mp4", "libx264", n=12, fmt="yuv420p10le", options=x264, tags={"colorspace": 9})
    clip("hevc-open.mp4", "libx265", options={"crf": "32", "x265-params": "log-level=none:open-gop=1:keyint=20:bframes=4:pools=1:scenecut=0"})
    clip("hevc.mkv", "libx265", options={"crf": "32", "x265-params": "log-level=none:open-gop=0:keyint=20:bframes=4:pools=1:scenecut=0"})
    clip("vp9.webm", "libvpx-vp9", options={"g": "25", "b": "60k", "auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "4"})
    clip("vp9-odd.webm", "libvpx-vp9", n=12, h=46, w=61, options={"b": "60k", "cpu-used": "4"})
    clip("vp8.webm", "libvpx", options={"g": "25", "b": "60k", "auto-alt-ref": "1", "lag-in-frames": "16"})
    clip("av1.mp4", "libsvtav1", h=64, options={"g": "25", "crf": "45", "preset": "8", "svtav1-params": "lp=1"})
    clip("av1.mkv", "libsvtav1", h=64, options={"g": "25", "crf": "45", "preset": "8", "svtav1-params": "lp=1"})
    clip("mpeg2.ts", "mpeg2video", options={"g": "15", "bf": "2", "b": "200k"})
    clip("mpeg4.mp4", "mpeg4", options={"g": "15", "bf": "2", "b": "200k"})
    clip("mpeg4.avi", "mpeg4", options={"g": "15", "b": "200k"})
    clip("mjpeg.mov", "mjpeg", n=12, fmt="yuvj420p")
    clip("gif.gif", "gif", n=10, fmt="rgb8", rate=10)
    base = HERE / "h264.mp4"
    one = 1 << 16
    turn(base, "h264-turned-90.mp4", (0, one, -one, 0))
    turn(base, "h264-turned-180.mp4", (-one, 0, 0, -one))
    turn(base, "h264-turned-270.mp4", (0, -one, one, 0))
    cut(base, "h264-cut-start.mp4", None, 12800)
    cut(base, "h264-cut-end.mp4", 2000, None)
    cut(base, "h264-cut-across.mp4", 1530, 8000)
    with av.open(str(HERE / "h264-fragmented.mp4"), "w", options={"movflags": "frag_keyframe+empty_moov"}) as out:
        with av.open(str(base)) as source:
            to = out.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = to
                    out.mux(packet)


ROTATIONS = {"h264-turned-90.mp4": 3, "h264-turned-180.mp4": 2, "h264-turned-270.mp4": 1}


def pictures():
    def noisy(h, w):
        return scene(3, h, w)

    for h, w in [(61, 45), (64, 64), (1, 1), (17, 33)]:
        im = Image.fromarray(noisy(h, w))
        for sampling, tag in [(0, "444"), (1, "422"), (2, "420")]:
            im.save(HERE / f"{tag}-{h}x{w}.jpg", subsampling=sampling, quality=60)
        im.save(HERE / f"progressive-{h}x{w}.jpg", subsampling=2, progressive=True, quality=40)
    im = Image.fromarray(noisy(40, 51))
    im.convert("CMYK").save(HERE / "cmyk.jpg")
    im.convert("L").save(HERE / "grey.jpg")
    for n in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = n
        im.save(HERE / f"exif-{n}.jpg", exif=exif, quality=50)
    exif = Image.Exif()
    exif[0x0112] = 6
    im.save(HERE / "exif-6.png", exif=exif)
    im.save(HERE / "exif-6.webp", exif=exif)
    alpha = Image.fromarray(np.dstack([noisy(40, 51), noisy(40, 51)[..., 0]]))
    alpha.save(HERE / "alpha.png")
    alpha.save(HERE / "alpha.webp")
    im.save(HERE / "lossy.webp", quality=60)
    im.save(HERE / "lossless.webp", lossless=True)
    im.convert("P").save(HERE / "palette.png", transparency=7)
    im.convert("1").save(HERE / "one-bit.png")
    im.convert("LA").save(HERE / "grey-alpha.png")
    im.convert("L").save(HERE / "grey-transparent.png", transparency=3)
    im.save(HERE / "rgb.bmp")
    im.convert("P").save(HERE / "palette.bmp")
    im.save(HERE / "palette.gif")
    frames = [Image.fromarray(scene(i, 24, 30)) for i in range(3)]
    frames[0].save(HERE / "animated.gif", save_all=True, append_images=frames[1:])
    frames[0].save(HERE / "animated.webp", save_all=True, append_images=frames[1:])
    deep = np.random.default_rng(1).integers(0, 65536, (9, 11, 4))
    png(HERE / "grey-16.png", deep[..., 0] % 600, 0)
    png(HERE / "rgb-16.png", deep[..., :3], 2)
    png(HERE / "grey-alpha-16.png", deep[..., :2], 4)
    png(HERE / "rgba-16.png", deep, 6)
    small_gif(HERE / "smaller-than-canvas.gif", None)
    small_gif(HERE / "smaller-than-canvas-transparent.gif", 2)


def png(path, array, kind):
    """A PNG of 16 bits a channel."""

    def chunk(tag, data):
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, kind, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


def small_gif(path, transparent):
    """A first frame that covers a part of the canvas."""
    data = b"GIF89a" + struct.pack("<HHBBB", 9, 8, 0x81, 2, 0) + bytes(range(40, 52))
    if transparent is not None:
        data += b"\x21\xf9\x04" + struct.pack("<BHB", 1, 0, transparent) + b"\0"
    data += b"\x2c" + struct.pack("<HHHHB", 2, 3, 4, 3, 0)
    bits = []

    def put(value):
        bits.extend(value >> i & 1 for i in range(3))

    put(4)
    for i, value in enumerate([0, 1, 2, 3] * 3):
        put(value)
        if i % 2:
            put(4)
    put(5)
    bits += [0] * (-len(bits) % 8)
    packed = bytes(sum(bits[i + j] << j for j in range(8)) for i in range(0, len(bits), 8))
    path.write_bytes(data + b"\x02" + bytes([len(packed)]) + packed + b"\0;")


def main():
    check_versions()
    HERE.mkdir(parents=True, exist_ok=True)
    for old in HERE.iterdir():
        old.unlink()
    pictures()
    names = sorted(path.name for path in HERE.iterdir())
    images = {}
    for name in names:
        pixels = np.asarray(load_image(str(HERE / name)))
        images[name] = {"height": pixels.shape[0], "width": pixels.shape[1], "fnv": fnv(pixels.tobytes())}
    videos()
    clips = {}
    for path in sorted(HERE.iterdir()):
        if path.name in images:
            continue
        with av.open(str(path)) as source:
            frames = [frame.to_ndarray(format="rgb24") for frame in source.decode(video=0)]
        frames = [np.ascontiguousarray(np.rot90(frame, ROTATIONS.get(path.name, 0))) for frame in frames]
        clips[path.name] = {
            "height": frames[0].shape[0],
            "width": frames[0].shape[1],
            "fnv": [fnv(frame.tobytes()) for frame in frames],
        }
    text = json.dumps({"images": images, "clips": clips}, indent=1)
    (HERE / "expected.json").write_text(text + "\n")
    print(len(images), "pictures,", len(clips), "clips,", sum(p.stat().st_size for p in HERE.iterdir()), "bytes")


main()
