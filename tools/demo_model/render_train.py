"""Training renderer: shapes as analytic distance fields, drawn in batches
straight on the square canvas that the processor would resize a frame to."""

import numpy as np
import torch
import torch.nn.functional as F

SHAPE_NAMES = ("circle", "square", "triangle", "star")


def pixel_grid(height, width):
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    return x, y


def distance(shape, u, v, squat):
    """Signed distance (in radii) to the outline, negative inside."""
    if shape == "circle":
        return torch.sqrt(u * u + v * v) - 1
    if shape == "square":
        return torch.maximum(u.abs(), v.abs()) - 0.92
    if shape == "triangle":  # equilateral (squat 0) to as wide as high (squat 1)
        half, top, base = 0.95 + 0.05 * squat, -1.1 + 0.1 * squat, 0.55 + 0.4 * squat
        slope = (base - top) / half
        side = (slope * u.abs() - (v - top)) / torch.sqrt(1 + slope * slope)
        return torch.maximum(side, v - base)
    # star: fold the angle into one tenth of the turn, then a half plane
    outer, inner = 1.12, 0.38 + 0.14 * squat
    turn = torch.remainder(torch.atan2(u, -v) + np.pi / 5, 2 * np.pi / 5) - np.pi / 5
    rho = torch.sqrt(u * u + v * v)
    a, b = rho * torch.cos(turn), rho * torch.sin(turn).abs()
    ix, iy = inner * np.cos(np.pi / 5), inner * np.sin(np.pi / 5)
    nx, ny = iy, outer - ix
    norm = torch.sqrt(nx * nx + ny * ny)
    return ((a - outer) * nx + b * ny) / norm


def state(scenes, times):
    """Stacks every object's state: a dict of float arrays (objects, frames)."""
    rows = {k: [] for k in ("clip", "slot", "shape", "x", "y", "rx", "ry", "visible", "rgb", "angle", "squat")}
    for i, (scene, t) in enumerate(zip(scenes, times)):
        for j, o in enumerate(scene.objects):
            x, y, r, visible, rgb = o.at(t)
            ex, ey = scene.extent(1.0)
            for k, value in zip(rows, (i, j, o.shape, x, y, r * ex, r * ey, visible, rgb, o.angle, o.squat)):
                rows[k].append(value)
    return {k: (v if k == "shape" else np.array(v)) for k, v in rows.items()}


def coverage(st, index, height, width, softness):
    """Alpha of the objects `index`, which share a shape: (objects, frames, h, w)."""
    gx, gy = pixel_grid(height, width)
    as_t = lambda a: torch.from_numpy(a[index]).float()[..., None, None]
    x, y, rx, ry = (as_t(st[k]) for k in ("x", "y", "rx", "ry"))
    angle, squat = as_t(st["angle"])[:, None], as_t(st["squat"])[:, None]
    u, v = (gx - x) / rx, (gy - y) / ry
    cos, sin = torch.cos(angle), torch.sin(angle)
    u, v = u * cos + v * sin, v * cos - u * sin
    d = distance(st["shape"][index[0]], u, v, squat)
    scale = torch.sqrt(rx * width * ry * height) / softness[st["clip"][index]][:, None, None, None]
    return (0.5 - d * scale).clamp_(0, 1) * as_t(st["visible"])


def backgrounds(scenes, rng, height, width):
    """Flat, or with a slight linear gradient: (clips, 1, 3, h, w)."""
    base = torch.tensor(np.stack([s.background_rgb for s in scenes])).float()[:, None, :, None, None]
    gx, gy = pixel_grid(height, width)
    slope = torch.tensor(rng.normal(0, 0.06, (len(scenes), 2)) * (rng.random((len(scenes), 1)) < 0.4)).float()
    ramp = slope[:, 0, None, None] * (gx - 0.5) + slope[:, 1, None, None] * (gy - 0.5)
    return base + ramp[:, None, None]


def render(scenes, times, rng, height, width):
    """Frames in 0..1 (clips, frames, 3, h, w), the state, and each object's alpha."""
    st = state(scenes, times)
    frames = len(times[0])
    softness = torch.tensor(rng.choice([0.3, 1.0, 1.3, 2.0], len(scenes), p=[0.15, 0.4, 0.3, 0.15])).float()
    alpha = torch.zeros(len(st["clip"]), frames, height, width)
    shapes = np.array(st["shape"])
    for shape in SHAPE_NAMES:
        index = np.flatnonzero(shapes == shape)
        if len(index):
            alpha[index] = coverage(st, index, height, width, softness)
    image = backgrounds(scenes, rng, height, width).expand(-1, frames, -1, -1, -1).clone()
    rgb = torch.from_numpy(st["rgb"]).float()[..., None, None]
    for slot in range(max(st["slot"]) + 1):
        index = np.flatnonzero(st["slot"] == slot)
        clips = st["clip"][index]
        a = alpha[index][:, :, None]
        image[clips] = image[clips] + a * (rgb[index] - image[clips])
    return image, st, alpha


def degrade(image, rng):
    """What a camera, a codec and a resize do: blur or ringing, thin chroma, low
    resolution, block noise, grain, slight changes of exposure, 8-bit steps."""
    clips, frames, _, h, w = image.shape
    flat = image.flatten(0, 1)
    chosen = lambda p: np.repeat(rng.random(clips) < p, frames)

    pick = chosen(0.2)
    if pick.any():
        part = flat[pick]
        small = F.interpolate(part, scale_factor=float(rng.uniform(0.45, 0.8)), mode="bilinear", antialias=True)
        flat[pick] = F.interpolate(small, size=(h, w), mode="bilinear")
    pick = chosen(0.35)
    if pick.any():
        part = flat[pick]
        low = F.interpolate(F.avg_pool2d(part, 2), size=(h, w), mode="bilinear")
        luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
        flat[pick] = low + ((part - low) * luma).sum(1, keepdim=True)
    pick = chosen(0.35)
    if pick.any():
        part = flat[pick]
        soft = F.avg_pool2d(part, 3, 1, 1, count_include_pad=False)
        weight = float(rng.uniform(-0.5, 0.9))
        flat[pick] = part + weight * (soft - part)

    image = flat.view(clips, frames, 3, h, w)
    per_clip = lambda a: torch.tensor(a).float()[:, None, None, None, None]
    gain = 1 + rng.normal(0, 0.025, clips)
    image = image * per_clip(gain) + per_clip(rng.normal(0, 0.012, clips))
    pick = rng.random(clips) < 0.4
    if pick.any():
        sigma = per_clip(rng.uniform(0.003, 0.035, pick.sum()))
        image[pick] += sigma * torch.randn(int(pick.sum()), frames, 3, h, w)
    pick = rng.random(clips) < 0.3
    if pick.any():
        blocks = torch.randn(int(pick.sum()) * frames, 3, h // 6, w // 6) * 0.015
        image[pick] += F.interpolate(blocks, size=(h, w), mode="nearest").view(-1, frames, 3, h, w)
    return (image.clamp_(0, 1) * 255).round_().div_(255)
