"""Trains the demo model from scratch, seeded, on two CPU cores; resumes.

    python tools/demo_model/train.py --work-dir DIR --out crates/llava-next-video/demo

Two processes of one thread each work on half a batch and average their
gradients: layers this small do not keep two threads of one process busy.
"""

import argparse
import collections
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp

from batches import KIND_WEIGHTS, Words, easy_batch, pack, still_batch, video_batch
from layout import GRID, build_model, build_tokenizer, write_checkpoint
from network import Heads, answer_loss, dense_loss, media_tokens, motion_loss, naming_loss, read, vision_features

SEED = 20240
RANKS = 2
VISION_PART = 0.15  # of the run: the vision tower alone
CROWDED_FROM = 0.8  # of the rest: more stills and more shapes at once, which are learned last
TELL_APART_FROM = 0.84  # of the rest: mostly that, and asked of each shape
SETTLE_FROM = 0.965  # of the rest: clips again, lest their counts be forgotten


def sincos(model):
    """Sine-cosine position embeddings to begin with: place is known from step 0."""
    weight = model.model.vision_tower.vision_model.embeddings.position_embedding.weight
    quarter = weight.shape[1] // 4
    rates = 1.0 / 20 ** (torch.arange(quarter) / quarter)
    y, x = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    angles = [v.reshape(-1, 1) * rates for v in (x, y)]
    table = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], 1)
    with torch.no_grad():
        weight.zero_()
        weight[1:] = 0.4 * table


@torch.no_grad()
def whiten_patches(model):
    """Starts the patch embedding from the principal components of patches, each at
    unit variance.  Flat colour holds nearly all of the variance; unless edges weigh
    as much from the start, shape waits long to be learned."""
    batch = video_batch(np.random.default_rng(SEED), 256, 1)
    embeddings = model.model.vision_tower.vision_model.embeddings
    weight = embeddings.patch_embedding.weight
    side = weight.shape[-1]
    patches = torch.nn.functional.unfold(batch.pixels[:, 0], side, stride=side).transpose(1, 2).flatten(0, 1).double()
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((patches - mean).T))
    top = slice(-weight.shape[0], None)
    scale = (values[top] + 1e-4 * values.sum()).rsqrt()
    white = 0.6 * scale[:, None] * vectors[:, top].T
    weight.copy_(white.view_as(weight))
    embeddings.position_embedding.weight[1:] -= (white @ mean).to(weight.dtype)


def scale_initial_weights(model):
    """Wider than the default 0.02, which suits far larger layers."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.7 / math.sqrt(module.in_features))
    for stack, names in ((model.model.language_model.layers, ("o_proj", "down_proj")),
                         (model.model.vision_tower.vision_model.encoder.layers, ("out_proj", "fc2"))):
        for name, module in stack.named_modules():
            if name.split(".")[-1] in names:
                module.weight.data.mul_(0.4)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.5)


@torch.no_grad()
def whiten_projector(model):
    """Starts the projector from decorrelated inputs of unit variance, so that the
    few directions with most variance do not drown the others."""
    torch.manual_seed(SEED)
    batch = video_batch(np.random.default_rng(SEED), 32, 4)
    features = model.model.vision_resampler(vision_features(model, batch.pixels.flatten(0, 1))).flatten(0, 1).double()
    mean = features.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((features - mean).T))
    scale = (values + 0.01 * values.mean()).rsqrt()
    white = vectors @ torch.diag(scale) @ vectors.T
    layer = model.model.multi_modal_projector.linear_1
    fresh = torch.randn(layer.weight.shape, dtype=torch.double) / math.sqrt(layer.in_features)
    layer.weight.copy_(fresh @ white)
    layer.bias.copy_(-(layer.weight.double() @ mean))


def joint_part(done):
    return (done - VISION_PART) / (1 - VISION_PART)


def learning_rate(done, step, peak):
    if done < VISION_PART:
        return 1.5 * peak * min(1, (step + 1) / 50)
    part = joint_part(done)
    cool = min(1.0, max(0.02, (1 - part) / 0.25))
    return peak * min(1.0, part / 0.02 + 0.02) * cool


def frames_per_clip(done, rng):
    """The curriculum: direction on two frames, then more; 0 is a batch of stills."""
    part = joint_part(done)
    stills = 0.2 if part < CROWDED_FROM else 0.65 if TELL_APART_FROM < part < SETTLE_FROM else 0.35
    if rng.random() < stills:
        return 0
    if part < 0.1:
        return 2
    if part < 0.22:
        return int(rng.choice([2, 3, 4, 6]))
    if part < 0.72:  # short clips are cheap, and teach all but motion as well as long ones
        return int(rng.choice([2, 4, 8, 12, 16], p=[0.4, 0.25, 0.25, 0.05, 0.05]))
    return int(rng.choice([2, 4, 6, 8, 12, 16], p=[0.1, 0.16, 0.14, 0.46, 0.08, 0.06]))


def clips_per_rank(frames):
    return {0: 14, 2: 24, 3: 22, 4: 20, 6: 15, 8: 13, 12: 9, 16: 7}[frames]


class Average:
    """Averages the ranks' gradients through shared memory.  Two buffers in turn, so
    that one barrier a step is enough."""

    def __init__(self, size):
        self.buffers = torch.zeros(2, RANKS, size).share_memory_()
        self.done = torch.zeros(2).share_memory_()  # progress, set by rank 0 for the step after next
        self.barrier = mp.Barrier(RANKS)

    def __call__(self, params, rank, turn, done):
        flat = self.buffers[turn % 2]
        if rank == 0:
            self.done[(turn + 1) % 2] = done
        at = 0
        for p in params:
            flat[rank, at:at + p.numel()] = 0 if p.grad is None else p.grad.flatten()
            at += p.numel()
        self.barrier.wait()
        mean, at = flat.mean(0), 0
        for p in params:
            p.grad = mean[at:at + p.numel()].view_as(p)
            at += p.numel()


class Trainer:
    def __init__(self, args, rank):
        self.args, self.rank = args, rank
        self.dir = Path(args.work_dir)
        self.dir.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(SEED)
        tokenizer = build_tokenizer()
        self.words = Words(tokenizer)
        self.model = build_model(tokenizer.get_vocab_size()).train()
        # Backwards through so few tokens, plain matrix products beat the fused attention.
        self.model.model.vision_tower.vision_model.config._attn_implementation = "eager"
        scale_initial_weights(self.model)
        sincos(self.model)
        whiten_patches(self.model)
        config = self.model.config
        self.heads = Heads(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.params = [*self.model.parameters(), *self.heads.parameters()]
        self.optimiser = torch.optim.AdamW([
            {"params": [p for p in self.params if p.ndim > 1], "weight_decay": 0.03},
            {"params": [p for p in self.params if p.ndim <= 1], "weight_decay": 0.0},
        ], betas=(0.9, 0.98))
        self.step, self.seconds, self.done, self.joint = 0, 0.0, 0.0, False
        self.accuracy = {k: 0.0 for k in KIND_WEIGHTS}
        self.state_file = self.dir / "state.pt"
        if self.state_file.exists():
            self.load()

    def load(self):
        state = torch.load(self.state_file, weights_only=False)
        for name in ("model", "heads", "optimiser"):
            getattr(self, name).load_state_dict(state[name])
        for name in ("step", "seconds", "joint", "accuracy"):
            setattr(self, name, state[name])
        self.done = self.progress()  # not the saved one: --minutes may be another now
        if self.rank == 0:
            print(f"resumed at step {self.step}", flush=True)

    def save(self):
        state = {n: getattr(self, n).state_dict() for n in ("model", "heads", "optimiser")}
        state |= {n: getattr(self, n) for n in ("step", "seconds", "joint", "accuracy")}
        temporary = self.state_file.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.state_file)

    def progress(self):
        if self.args.steps:
            return self.step / self.args.steps
        return self.seconds / (60 * self.args.minutes)

    def kind_weights(self):
        """Ask more of what is still answered wrong."""
        fade = 0.1 if self.done > 0.6 else 1.0
        extra = {"trace": fade, "where": fade}
        return {k: w * (0.25 + (1 - self.accuracy[k])) * extra.get(k, 1.0) for k, w in KIND_WEIGHTS.items()}

    def vision_step(self, rng):
        if rng.random() < 1 - 0.8 * self.done / VISION_PART:
            batch = easy_batch(rng, 24)
        else:
            several = {} if rng.random() < 0.5 else {"count": int(rng.integers(2, 5))}
            batch = video_batch(rng, 24, 1, **several)
        with torch.autocast("cpu", torch.bfloat16):
            features = vision_features(self.model, batch.pixels.flatten(0, 1))
            loss, parts = dense_loss(self.heads, features, batch)
        return {"dense": loss}, parts

    def joint_step(self, rng, frames):
        clips = clips_per_rank(frames)
        crowded = joint_part(self.done) > CROWDED_FROM
        if frames:
            batch = video_batch(rng, clips, frames, crowded=crowded)
        else:
            batch = still_batch(rng, clips, crowded=crowded)
        packed = pack(batch, self.words, rng, self.kind_weights(), joint_part(self.done) > TELL_APART_FROM)
        with torch.autocast("cpu", torch.bfloat16):
            features = vision_features(self.model, batch.pixels.flatten(0, 1))
            media = media_tokens(self.model, features, batch)
            prefix, hidden = read(self.model, media, packed, self.words.prefix)
            losses = {"dense": self.args.dense * dense_loss(self.heads, features, batch)[0]}
            losses["naming"] = self.args.naming * naming_loss(self.model, self.words, media, batch)
            if frames:
                losses["motion"] = self.args.motion * motion_loss(self.heads, prefix, batch)
            losses["answer"], results = answer_loss(self.model, hidden, packed)
        return losses, results

    def one_step(self, average):
        shared = np.random.default_rng([SEED, self.step])
        rng = np.random.default_rng([SEED, self.step, self.rank])
        torch.manual_seed(SEED + self.step * RANKS + self.rank)
        if self.done < VISION_PART:
            losses, results = self.vision_step(rng)
        else:
            if not self.joint:
                whiten_projector(self.model)
                self.joint = True
            losses, results = self.joint_step(rng, frames_per_clip(self.done, shared))
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.done, self.step, self.args.rate)
        self.optimiser.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        average(self.params, self.rank, self.step, self.progress())
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimiser.step()
        self.step += 1
        for kind, right in results if self.joint else ():
            self.accuracy[kind] += 0.01 * (right - self.accuracy[kind])
        return losses, results

    def run(self, average):
        begun = saved = time.time()
        begun -= self.seconds
        log = collections.defaultdict(list)
        while self.done < 1:
            losses, results = self.one_step(average)
            self.done = average.done[self.step % 2].item()
            self.seconds = time.time() - begun
            for name, value in losses.items():
                log[name].append(value.item())
            for kind, right in results:
                log["ok " + kind].append(right)
            if self.rank:
                continue
            if self.step % 50 == 0:
                parts = [f"{k.removeprefix('ok ')} {np.mean(v):.3f}" for k, v in sorted(log.items())]
                print(f"{self.step} {self.seconds:.0f}s {self.done:.3f} " + " ".join(parts), flush=True)
                log.clear()
            if time.time() - saved > 180:
                self.save()
                saved = time.time()
        if self.rank == 0:
            self.save()


def work(rank, args, average):
    torch.set_num_threads(1)
    trainer = Trainer(args, rank)
    trainer.run(average)
    if rank == 0:
        print(json.dumps({"seconds": round(trainer.seconds), "on fresh training clips": trainer.accuracy}, indent=2))
        if args.out:
            write_checkpoint(trainer.model, args.out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", default=str(Path.home() / ".cache" / "lnv-demo-train"))
    parser.add_argument("--out", help="where to write the finished checkpoint")
    parser.add_argument("--minutes", type=float, default=115, help="training time, over which the schedule is spread")
    parser.add_argument("--steps", type=int, help="spread the schedule over this many steps instead")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--dense", type=float, default=0.3, help="weight of the vision tower's extra losses")
    parser.add_argument("--motion", type=float, default=0.5, help="weight of the language model's extra losses")
    parser.add_argument("--naming", type=float, default=0.15, help="weight of drawing tokens towards words")
    args = parser.parse_args()
    mp.set_start_method("spawn")
    size = sum(p.numel() for p in Trainer(args, 1).params)
    mp.spawn(work, (args, Average(size)), RANKS)


if __name__ == "__main__":
    main()
