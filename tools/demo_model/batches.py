"""Training batches: rendered clips or stills with several questions each.

The questions of a clip share one sequence, so that its frames are read once, but
each sees only the frames and itself (block mask, positions restarting after the
frames): exactly as if it were asked alone.
"""

import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from catalogue import questions
from layout import BOS, EOS, GRID, MEAN, SIDE, STD, UNK
from render_train import degrade, render
from scene_train import radius_of, random_scene, sample_times

QUESTIONS = 9
MASK = 6  # cells along a patch in the figure-ground target
# Words whose loss leaves a question clear; at times replaced by <unk>, so that a
# word outside the vocabulary does no harm.
DROPPABLE = set("the a an in this video clip footage image picture photo please can you see there do tell me".split())
SIZES = ((240, 320), (256, 256), (360, 640), (320, 240), (180, 320), (200, 300), (640, 360), (300, 280), (96, 96), (150, 200))
KIND_WEIGHTS = {
    "motion": 2.0, "event": 2.0, "colour": 1.3, "shape": 1.2, "count": 1.5, "count_of": 1.1, "background": 0.6,
    "exists": 1.4, "describe": 1.0, "moves": 0.5, "where": 0.5, "trace": 0.5,
}


@dataclass
class Batch:
    pixels: torch.Tensor  # (clips, frames or tiles, 3, SIDE, SIDE), normalised
    scenes: list
    times: list
    state: dict
    patch_cover: torch.Tensor  # (objects, frames, GRID, GRID), of frames or base tiles
    mask: torch.Tensor  # (clips, frames, GRID, GRID, MASK * MASK) figure against ground
    video: bool
    size: tuple = None  # (height, width) of a still


def normalise(image):
    return (image - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def patches_of(alpha, cells):
    return F.avg_pool2d(alpha, alpha.shape[-1] // cells)


def patches(alpha):
    return patches_of(alpha, GRID)


def figure_mask(state, alpha, clips):
    """How much of each cell of each patch is covered by any shape."""
    covered = torch.zeros(clips, *alpha.shape[1:])
    for i, clip in enumerate(state["clip"]):
        covered[clip] = torch.maximum(covered[clip], alpha[i])
    cells = patches_of(covered, GRID * MASK)
    cells = cells.unflatten(-1, (GRID, MASK)).unflatten(-3, (GRID, MASK))
    return cells.transpose(-3, -2).flatten(-2)


def easy_batch(rng, clips):
    """One large shape, drawn cleanly: where learning to tell shapes begins."""
    scenes = [random_scene(rng, video=False, count=1) for _ in range(clips)]
    for scene in scenes:
        scene.objects[0].radius = radius_of(rng, 0.18, 0.38)
        scene.aspect = 1 + 0.3 * (scene.aspect - 1)
    times = [np.zeros(1)] * clips
    image, state, alpha = render(scenes, times, rng, SIDE, SIDE)
    return Batch(normalise(image), scenes, times, state, patches(alpha), figure_mask(state, alpha, clips), True)


def video_batch(rng, clips, frames, **kw):
    scenes = [random_scene(rng, video=True, **kw) for _ in range(clips)]
    shared = sample_times(rng, frames)
    times = [shared] * clips
    image, state, alpha = render(scenes, times, rng, SIDE, SIDE)
    return Batch(normalise(degrade(image, rng)), scenes, times, state, patches(alpha), figure_mask(state, alpha, clips), True)


def still_batch(rng, clips, **kw):
    """Stills of one size: the squeezed base tile and the two tiles of the padded image."""
    height, width = SIZES[rng.integers(len(SIZES))]
    scenes = [random_scene(rng, video=False, aspect=width / height, **kw) for _ in range(clips)]
    times = [np.zeros(1)] * clips
    across = width >= height
    long = min(2 * SIDE, max(1, round(SIDE * max(width / height, height / width))))
    h, w = (SIDE, long) if across else (long, SIDE)
    state = rng.bit_generator.state
    image, _, _ = render(scenes, times, rng, h, w)
    rng.bit_generator.state = state  # the same softness and gradient again
    base, st, alpha = render(scenes, times, rng, SIDE, SIDE)
    pad = (2 * SIDE - long) // 2
    tiles = torch.zeros(clips, 3, SIDE, 2 * SIDE) if across else torch.zeros(clips, 3, 2 * SIDE, SIDE)
    state = rng.bit_generator.state
    image = degrade(image, rng)[:, 0]
    rng.bit_generator.state = state
    base = degrade(base, rng)
    if across:
        tiles[..., pad:pad + long] = image
        tiles = torch.stack(tiles.split(SIDE, -1), 1)
    else:
        tiles[..., pad:pad + long, :] = image
        tiles = torch.stack(tiles.split(SIDE, -2), 1)
    pixels = normalise(torch.cat([base, tiles], 1))
    return Batch(pixels, scenes, times, st, patches(alpha), figure_mask(st, alpha, clips), False, (height, width))


class Words:
    """The tokenizer's vocabulary, applied to one training prompt at a time."""

    def __init__(self, tokenizer):
        self.vocab = tokenizer.get_vocab()
        self.prefix = [BOS, self.vocab["user"], self.vocab[":"]]

    def ids(self, text):
        return [self.vocab.get(w, UNK) for w in re.findall(r"\w+|[^\w\s]+", text.lower())]

    def prompt(self, question, rng):
        if rng.random() < 0.2:
            question = question.rstrip("?.")
        words = re.findall(r"\w+|[^\w\s]+", question.lower())
        if rng.random() < 0.15:
            words = [w if w not in DROPPABLE or rng.random() > 0.25 else "<unk>" for w in words]
        if rng.random() < 0.03:
            words = ["please", ","] + words
        return [self.vocab.get(w, UNK) for w in words] + [self.vocab["assistant"], self.vocab[":"]]


@dataclass
class Packed:
    ids: torch.Tensor  # (clips, length) of the questions' part
    labels: torch.Tensor
    weights: torch.Tensor
    segment: torch.Tensor  # question number, -1 on padding
    offset: torch.Tensor  # position within the question
    kinds: list  # per clip, per question


def choose(rng, asked, scene, weights, count):
    w = np.array([weights[k] * (0.35 if k == "count" and len(scene.objects) == 1 else 1.0) for k, _, _ in asked])
    count = min(count, len(asked))
    return [asked[i] for i in rng.choice(len(asked), count, replace=False, p=w / w.sum())]


def pack(batch, words, rng, weights, each=False):
    rows, kinds = [], []
    for scene, times in zip(batch.scenes, batch.times):
        asked = questions(scene, rng, times, each)
        chosen = choose(rng, asked, scene, weights, QUESTIONS + 2 if each else QUESTIONS)
        row = {k: [] for k in ("ids", "labels", "weights", "segment", "offset")}
        for number, (_, question, answer) in enumerate(chosen):
            q, a = words.prompt(question, rng), words.ids(answer) + [EOS]
            ids = q + a[:-1]
            row["ids"] += ids
            row["labels"] += [-100] * (len(q) - 1) + a
            row["weights"] += [len(a) ** -0.5] * len(ids)
            row["segment"] += [number] * len(ids)
            row["offset"] += list(range(len(ids)))
        rows.append(row)
        kinds.append([k for k, _, _ in chosen])
    longest = max(len(r["ids"]) for r in rows)
    fill = {"ids": 0, "labels": -100, "weights": 0.0, "segment": -1, "offset": 0}
    stack = {k: torch.tensor([r[k] + [fill[k]] * (longest - len(r[k])) for r in rows]) for k in fill}
    return Packed(kinds=kinds, **stack)
