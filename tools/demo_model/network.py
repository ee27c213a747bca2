"""The forward pass in training: the Transformers modules, driven so that a clip's
frames are read once for all of its questions, and heads that exist only to
train (what is in each patch; where the shape is; how it has moved so far)."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llava_next_video.modeling_llava_next_video import unpad_image

from batches import MASK
from layout import GRID
from scene import BACKGROUNDS, COLOURS, SHAPES

OUTCOMES = ("left", "right", "up", "down", "still", "appear", "disappear", "grow", "shrink", "turn")


def vision_features(model, pixels):
    """Hidden state -2 without its class token: (images, patches, hidden)."""
    tower = model.model.vision_tower.vision_model
    x = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer in tower.encoder.layers[:-1]:
        x = layer(x, None, None)[0]
    return x[:, 1:]


def media_tokens(model, features, batch):
    """The media part of the sequence, as the model itself arranges it."""
    clips, per = batch.pixels.shape[:2]
    if batch.video:
        tokens = model.model.multi_modal_projector(model.model.vision_resampler(features))
        return tokens.reshape(clips, -1, tokens.shape[-1])
    tokens = model.model.multi_modal_projector(features).view(clips, per, GRID, GRID, -1)
    axis = 2 if batch.size[1] >= batch.size[0] else 1  # side by side, or one above the other
    grid = torch.cat([tokens[:, 1], tokens[:, 2]], axis)
    hidden = grid.shape[-1]
    h, w = grid.shape[1:3]
    flat = grid.permute(0, 3, 1, 2).reshape(-1, h, w)
    grid = unpad_image(flat, batch.size)
    grid = grid.reshape(clips, hidden, *grid.shape[1:]).permute(0, 2, 3, 1)
    newline = model.model.image_newline.expand(clips, grid.shape[1], 1, hidden).to(grid.dtype)
    grid = torch.cat([grid, newline], 2)
    return torch.cat([tokens[:, 0].flatten(1, 2), grid.flatten(1, 2)], 1)


def block_mask(segment, prefix):
    """Each question sees the prefix and its own past; the prefix sees its past."""
    clips, tail = segment.shape
    total = prefix + tail
    group = torch.cat([torch.full((clips, prefix), -2), segment], 1)
    same = group[:, :, None] == group[:, None, :]
    same |= (group == -2)[:, None, :]
    return (same & torch.ones(total, total, dtype=torch.bool).tril())[:, None]


def read(model, media, packed, prefix_ids):
    """The language model's last hidden states: of the prefix, of the questions."""
    embed = model.get_input_embeddings()
    start = embed(torch.tensor(prefix_ids)).expand(len(media), -1, -1)
    prefix = start.shape[1] + media.shape[1]
    inputs = torch.cat([start.to(media.dtype), media, embed(packed.ids).to(media.dtype)], 1)
    positions = torch.cat([torch.arange(prefix).expand(len(media), -1), prefix + packed.offset], 1)
    out = model.model.language_model(
        inputs_embeds=inputs, attention_mask=block_mask(packed.segment, prefix), position_ids=positions, use_cache=False
    ).last_hidden_state
    return out[:, len(prefix_ids):prefix], out[:, prefix:]


class Heads(nn.Module):
    """Training-only predictions; not part of the checkpoint."""

    SPLIT = (len(SHAPES) + 1, len(COLOURS) + 1, len(BACKGROUNDS), 4, 5, 4, MASK * MASK)

    def __init__(self, vision, text):
        super().__init__()
        self.patch = nn.Sequential(nn.LayerNorm(vision), nn.Linear(vision, sum(self.SPLIT)))
        self.frame = nn.Linear(text, 8)
        self.outcome = nn.Linear(text, len(OUTCOMES))


def owners(batch, cover, least=0.1):
    """Shape and colour (from 1; 0 is none) of the object that covers most of each cell
    in each frame.  `cover` is (objects, frames, rows, columns)."""
    clips = len(batch.scenes)
    shape = torch.zeros(clips, *cover.shape[1:], dtype=torch.long)
    colour, best = torch.zeros_like(shape), torch.full(shape.shape, least)
    for i, clip in enumerate(batch.state["clip"]):
        o = batch.scenes[clip].objects[batch.state["slot"][i]]
        mine = cover[i] > best[clip]
        best[clip] = torch.where(mine, cover[i], best[clip])
        shape[clip][mine] = SHAPES.index(o.shape) + 1
        named = torch.full((cover.shape[1],), COLOURS.index(o.colour) + 1)
        if o.event == "turn":
            named[torch.from_numpy(o.progress(batch.times[clip])) > 0.5] = COLOURS.index(o.turns_to) + 1
        colour[clip] = torch.where(mine, named[:, None, None], colour[clip])
    return shape, colour


def patch_targets(batch):
    """Per frame and patch: the owner's offset and size; per frame: how many shapes,
    and where the last of them is."""
    st, cover = batch.state, batch.patch_cover
    clips, frames = len(batch.scenes), cover.shape[1]
    best = torch.full((clips, frames, GRID, GRID), 0.1)
    offset = torch.zeros(clips, frames, GRID, GRID, 4)
    count = torch.zeros(clips, frames, dtype=torch.long)
    where = torch.zeros(clips, frames, 4)
    centre = (torch.arange(GRID) + 0.5) / GRID
    for i, clip in enumerate(st["clip"]):
        mine = cover[i] > best[clip]
        best[clip] = torch.where(mine, cover[i], best[clip])
        x, y, rx, ry = (torch.from_numpy(st[k][i]).float() for k in ("x", "y", "rx", "ry"))
        own = torch.stack([
            ((x[:, None, None] - centre[None, None, :]) * 4).expand(-1, GRID, -1),
            ((y[:, None, None] - centre[None, :, None]) * 4).expand(-1, -1, GRID),
            (rx * 6)[:, None, None].expand(-1, GRID, GRID),
            (ry * 6)[:, None, None].expand(-1, GRID, GRID),
        ], -1)
        offset[clip] = torch.where(mine[..., None], own, offset[clip])
        seen = torch.from_numpy(st["visible"][i] > 0.5)
        count[clip] += seen
        where[clip] = torch.where(seen[:, None], torch.stack([x * 2 - 1, y * 2 - 1, rx * 3, ry * 3], -1), where[clip])
    return offset, count, where


def dense_loss(heads, features, batch):
    """What the vision tower should know of each patch of a frame (or base tile)."""
    clips, per = batch.pixels.shape[:2]
    features = features.view(clips, per, GRID, GRID, -1)
    if not batch.video:
        features = features[:, :1]
    out = heads.patch(features).float().split(heads.SPLIT, -1)
    shape, colour = owners(batch, batch.patch_cover)
    offset, count, where = patch_targets(batch)
    own = shape > 0
    background = torch.tensor([BACKGROUNDS.index(s.background) for s in batch.scenes])
    background = background[:, None, None, None].expand_as(shape)
    ce = lambda logits, target, mask: F.cross_entropy(logits[mask], target[mask]) if mask.any() else logits.sum() * 0
    loss = 2 * ce(out[0], shape, own) + 0.5 * ce(out[0], shape, ~own)
    loss = loss + ce(out[1], colour, own) + 0.2 * ce(out[1], colour, ~own)
    loss = loss + 0.4 * F.cross_entropy(out[2].flatten(0, -2), background.flatten())
    near = lambda guess, target: F.smooth_l1_loss(guess, target, beta=0.1) if len(target) else guess.sum()
    loss = loss + 2 * near(out[3][own], offset[own])
    loss = loss + 0.5 * F.cross_entropy(out[4].flatten(0, -2), count[..., None, None].expand_as(shape).flatten())
    single = count == 1
    target = where[single][:, None, None].expand(-1, GRID, GRID, -1)
    loss = loss + 2 * near(out[5][single], target)
    # Figure and ground within the patch: edges, whatever their colours, are what
    # shape is made of; without this, shape waits long on a plateau.
    loss = loss + 2 * F.binary_cross_entropy_with_logits(out[6], batch.mask)
    right = (out[0].argmax(-1) == shape)[own].float().mean().item()
    return loss, [("patch shape", right)]


def naming_loss(model, words, media, batch):
    """Draws each media token towards the word embeddings of the colour and shape it
    shows, so that a word of a question finds its object by likeness."""
    grid = GRID // 2 if batch.video else GRID  # pooled frames, or the base tile
    frames = len(batch.times[0])
    tokens = media[:, :frames * grid * grid].float().view(len(media), frames, grid, grid, -1)
    cover = F.avg_pool2d(batch.patch_cover, GRID // grid)
    shape, colour = owners(batch, cover)
    own = shape > 0
    tokens = F.normalize(tokens[own], dim=-1)
    embed = model.get_input_embeddings().weight
    loss = 0.0
    for names, target in ((SHAPES, shape), (COLOURS, colour)):
        table = F.normalize(embed[[words.vocab[n] for n in names]].float(), dim=-1)
        loss = loss + F.cross_entropy(10 * tokens @ table.T, target[own] - 1)
    return loss


def motion_loss(heads, hidden, batch):
    """What the language model should know at the end of each frame of a clip with
    one shape: where it is, how far it has come; and at the very end, what happened."""
    rows = [i for i, s in enumerate(batch.scenes) if len(s.objects) == 1]
    if not rows:
        return hidden.sum() * 0
    frames = len(batch.times[0])
    ends = hidden[rows].view(len(rows), frames, -1, hidden.shape[-1])[:, :, -1]
    targets, outcomes = [], []
    for i in rows:
        o = batch.scenes[i].objects[0]
        x, y, r, visible, _ = o.at(batch.times[i])
        first = int((visible > 0.5).argmax())
        since = np.stack([(x - x[first]) * 4, (y - y[first]) * 4, np.log(r / r[first])]) * (visible > 0.5)
        row = np.concatenate([np.stack([x * 2 - 1, y * 2 - 1, r * 4, visible, visible[0] - visible]), since])
        targets.append(torch.from_numpy(row.T).float())
        outcomes.append(OUTCOMES.index(o.direction or o.event))
    loss = F.smooth_l1_loss(heads.frame(ends).float(), torch.stack(targets), beta=0.1) * 3
    return loss + 0.5 * F.cross_entropy(heads.outcome(ends[:, -1]).float(), torch.tensor(outcomes))


def answer_loss(model, hidden, packed):
    """Loss on the answers, and for each question whether every token came out right."""
    at = packed.labels >= 0
    logits = model.lm_head(hidden[at]).float()
    labels, weights = packed.labels[at], packed.weights[at]
    loss = (F.cross_entropy(logits, labels, reduction="none") * weights).sum() / weights.sum()
    wrong = torch.zeros_like(packed.labels, dtype=torch.bool)
    wrong[at] = logits.argmax(-1) != labels
    results = []
    for clip, kinds in enumerate(packed.kinds):
        bad = set(packed.segment[clip][wrong[clip]].tolist())
        results += [(kind, n not in bad) for n, kind in enumerate(kinds)]
    return loss, results
