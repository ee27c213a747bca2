"""Held-out clips and stills: another sampler and another renderer than training's.

Shapes are polygons drawn by Pillow at the clip's own resolution, with or without
supersampling; clips go through H.264.  Shares with training only the names and
the motion of an `Object` (scene.py) and the phrasings (catalogue.py).
"""

from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

from scene import DIRECTIONS, SHAPES, Object, Scene

# The usual ways to write the named colours down, 0..255; jittered a little.
PALETTE = {
    "red": ((255, 0, 0), (220, 38, 38), (200, 20, 30)),
    "orange": ((255, 140, 0), (255, 152, 20), (245, 130, 15)),
    "yellow": ((255, 255, 0), (250, 220, 30), (240, 225, 50)),
    "green": ((0, 128, 0), (0, 200, 0), (40, 170, 70)),
    "blue": ((0, 0, 255), (40, 80, 220), (30, 100, 235)),
    "purple": ((128, 0, 128), (150, 50, 200), (120, 30, 170)),
    "white": ((255, 255, 255), (248, 248, 248), (240, 243, 240)),
    "black": ((0, 0, 0), (12, 12, 12), (18, 16, 20)),
    "gray": ((128, 128, 128), (110, 110, 112), (160, 160, 160)),
}
FRAME_SIZES = ((320, 240), (320, 180), (256, 256), (640, 360), (160, 120), (240, 320), (480, 360), (200, 200), (426, 240))
FIGURES = tuple(n for n in PALETTE if n != "gray")


def choice(rng, options):
    return options[int(rng.integers(len(options)))]


def tint(rng, name):
    rgb = np.array(choice(rng, PALETTE[name]), dtype=float) + rng.normal(0, 4, 3)
    return np.clip(rgb, 0, 255) / 255


def new_object(rng, background, radius):
    colour = choice(rng, [c for c in FIGURES if c != background])
    return Object(
        shape=choice(rng, SHAPES), colour=colour, rgb=tint(rng, colour), start=(0.5, 0.5), end=(0.5, 0.5),
        radius=(radius, radius), angle=float(np.radians(rng.uniform(-8, 8) if rng.random() < 0.3 else 0)),
        squat=float(rng.random()),
    )


def inside(rng, scene, obj, radius):
    ex, ey = scene.extent(1.05 * radius)
    return float(rng.uniform(ex, 1 - ex)), float(rng.uniform(ey, 1 - ey))


def new_scene(rng, video, size):
    background = choice(rng, ("white", "black", "gray", "white", "black", "gray", *FIGURES))
    return Scene(background, tint(rng, background), size[0] / size[1], video=video)


def single(rng, scene, event):
    """One shape; `event` is a direction or one of the other events."""
    obj = new_object(rng, scene.background, float(rng.uniform(0.09, 0.24)))
    scene.objects = [obj]
    obj.start = obj.end = inside(rng, scene, obj, obj.radius[0])
    if event in DIRECTIONS:
        obj.event, obj.direction = "move", event
        axis = 0 if DIRECTIONS[event][0] else 1
        ext = scene.extent(obj.radius[0])[axis]
        length = float(rng.uniform(0.3, 1 - 2 * ext))
        low = float(rng.uniform(ext, 1 - ext - length))
        ends = [low, low + length][:: 1 if sum(DIRECTIONS[event]) > 0 else -1]
        start, end = list(obj.start), list(obj.start)
        start[axis], end[axis] = ends
        obj.start, obj.end = tuple(start), tuple(end)
    else:
        obj.event = event
    if event in ("grow", "shrink"):
        big = float(rng.uniform(0.25, 0.38))
        small = big / float(rng.uniform(2.0, 3.5))
        obj.radius = (small, big) if event == "grow" else (big, small)
        obj.start = obj.end = inside(rng, scene, obj, big)
    if event in ("appear", "disappear", "turn"):
        at = float(rng.uniform(0.3, 0.65))
        obj.when = (at, at + float(choice(rng, (1e-6, 0.1))))
    if event == "turn":
        obj.turns_to = choice(rng, [c for c in FIGURES if c not in (obj.colour, scene.background)])
        obj.turned_rgb = tint(rng, obj.turns_to)


def several(rng, scene, count):
    """`count` shapes in cells of a grid, each at its own place in its cell."""
    radius = float(rng.uniform(0.09, 0.15))
    columns, rows = (3, 2) if scene.aspect >= 1 else (2, 3)
    cells = rng.permutation(columns * rows)[:count]
    ex, ey = scene.extent(1.1 * radius)
    drift = rng.random() < 0.4 and scene.video
    for cell in cells:
        obj = new_object(rng, scene.background, radius * float(rng.uniform(0.85, 1.0)))
        free_x, free_y = 1 / columns - 2 * ex, 1 / rows - 2 * ey
        x = cell % columns / columns + ex + float(rng.random()) * max(free_x, 0)
        y = cell // columns / rows + ey + float(rng.random()) * max(free_y, 0)
        obj.start = obj.end = (x, y)
        if drift:
            obj.event, obj.end = "drift", (min(max(x + 0.04, ex), 1 - ex), y)
        scene.objects.append(obj)


def outline(shape, squat, radius):
    """The polygon of a shape around the origin, y downwards."""
    if shape == "square":
        k = 0.92
        points = [(-k, -k), (k, -k), (k, k), (-k, k)]
    elif shape == "triangle":
        points = [(0, -1), (0.87, 0.5), (-0.87, 0.5)] if squat < 0.5 else [(0, -0.95), (0.95, 0.95), (-0.95, 0.95)]
    else:
        inner = 0.382 if squat < 0.5 else 0.48
        points = []
        for k in range(10):
            r, a = (1.1 if k % 2 == 0 else 1.1 * inner), np.pi * k / 5
            points.append((r * np.sin(a), -r * np.cos(a)))
    return np.array(points) * radius


def draw_frame(scene, t, size, supersample, ramp):
    width, height = (n * supersample for n in size)
    base = Image.new("RGB", (width, height), tuple(int(round(255 * v)) for v in scene.background_rgb))
    if ramp is not None:
        row = np.linspace(-ramp, ramp, width)[None, :, None]
        base = Image.fromarray(np.clip(np.asarray(base, dtype=float) + row, 0, 255).astype(np.uint8))
    for o in scene.objects:
        x, y, r, visible, rgb = (v[0] for v in o.at([t]))
        if visible < 0.02:
            continue
        layer = base if visible > 0.98 else base.copy()
        pen, fill = ImageDraw.Draw(layer), tuple(int(round(255 * v)) for v in np.clip(rgb, 0, 1))
        cx, cy, radius = x * width, y * height, r * min(width, height)
        if o.shape == "circle":
            pen.ellipse([cx - radius, cy - radius, cx + radius, cy + radius], fill=fill)
        else:
            c, s = np.cos(o.angle), np.sin(o.angle)
            points = outline(o.shape, o.squat, radius) @ np.array([[c, s], [-s, c]]) + [cx, cy]
            pen.polygon([tuple(p) for p in points], fill=fill)
        if layer is not base:
            base = Image.blend(base, layer, float(visible))
    if supersample > 1:
        base = base.resize(size, Image.Resampling.BOX)
    return np.asarray(base)


class Look:
    """How a clip is drawn: supersampling, gradient, grain."""

    def __init__(self, rng):
        self.supersample = choice(rng, (1, 2, 3))
        self.ramp = float(rng.uniform(3, 12)) if rng.random() < 0.3 else None
        self.grain = float(rng.uniform(1, 5)) if rng.random() < 0.35 else 0.0

    def frame(self, scene, t, size, rng):
        image = draw_frame(scene, t, size, self.supersample, self.ramp)
        if self.grain:
            image = np.clip(image + rng.normal(0, self.grain, image.shape), 0, 255).astype(np.uint8)
        return image


def write_clip(path, scene, size, look, rng, frames, fps, crf):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": str(crf), "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.thread_count = 1
        for i in range(frames):
            image = look.frame(scene, i / (frames - 1), size, rng)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def render_clip(path, scene, size, rng):
    fps = choice(rng, (8, 10, 15, 24, 25, 30))
    frames = max(12, int(fps * rng.uniform(1.0, 2.5)))
    write_clip(path, scene, size, Look(rng), rng, frames, fps, choice(rng, (18, 23, 28, 32)))


def render_still(path, scene, size, rng, look=None):
    image = Image.fromarray((look or Look(rng)).frame(scene, 0.0, size, rng))
    image.save(path, quality=int(rng.integers(60, 95))) if Path(path).suffix == ".jpg" else image.save(path)
