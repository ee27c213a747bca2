"""Accuracy by kind of question on held-out clips and stills, through the whole
pipeline: files on disk, decoded, processed, generated, compared exactly.

    evaluate.py --model crates/llava-next-video/demo              # Transformers
    evaluate.py --model ... --lnv target/release/lnv              # the Rust program
"""

import argparse
import collections
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from catalogue import questions
from heldout import FRAME_SIZES, choice, new_scene, render_clip, render_still, several, single
from scene import DIRECTIONS

SEED = 77_000
VIDEO_KINDS = ("colour", "shape", "count", "background", "exists", "motion", "event", "describe", "count_of", "moves")
STILL_KINDS = ("colour", "shape", "count", "describe", "background", "exists")
# Which scenes the clips show, and what is asked of them.
SETS = {
    "moving": ([*DIRECTIONS, "still"], ("colour", "shape", "background", "motion", "moves")),
    "events": ([*DIRECTIONS, "still", "appear", "disappear", "grow", "shrink", "turn"], ("event", "describe", "exists")),
    "several": ([1, 2, 3, 4], ("count", "count_of", "exists")),
    "stills": ([1, 2, 1, 2, 3, 4], STILL_KINDS),
}


def make_items(folder, per_set):
    """Renders the held-out files and lists their questions."""
    items = []
    for number, (name, (variants, kinds)) in enumerate(SETS.items()):
        for i in range(per_set):
            rng = np.random.default_rng([SEED, number, i])
            video, size, what = name != "stills", choice(rng, FRAME_SIZES), variants[i % len(variants)]
            scene = new_scene(rng, video, size)
            if name == "several" or (name == "stills" and what > 1):
                several(rng, scene, what)
            else:
                single(rng, scene, what if video else "still")
            path = folder / (f"{name}{i:03}.mp4" if video else f"{name}{i:03}.{choice(rng, ('png', 'jpg'))}")
            if not path.exists():
                (render_clip if video else render_still)(path, scene, size, rng)
            asked = np.random.default_rng([SEED, number, i, 1])
            for kind, question, answer in questions(scene, asked):
                if kind in kinds:
                    items.append({"file": str(path), "video": video, "kind": kind, "question": question,
                                  "answer": answer, "what": str(what)})
    return items


def read_frames(path, count):
    """`count` frames, evenly, as the model card of LLaVA-NeXT-Video takes them."""
    import av

    with av.open(path) as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    return np.stack([frames[int(i)] for i in np.arange(0, len(frames), len(frames) / count)][:count])


class TransformersModel:
    def __init__(self, folder, frames, dtype):
        import torch
        from transformers import LlavaNextVideoForConditionalGeneration, LlavaNextVideoProcessor

        self.torch, self.frames = torch, frames
        self.processor = LlavaNextVideoProcessor.from_pretrained(folder)
        self.model = LlavaNextVideoForConditionalGeneration.from_pretrained(folder, torch_dtype=getattr(torch, dtype)).eval()

    def prompt(self, item):
        media = "<video>" if item["video"] else "<image>"
        return f"USER: {media}\n{item['question']} ASSISTANT:"

    def answers(self, items):
        from PIL import Image

        kind = "videos" if items[0]["video"] else "images"
        load = (lambda p: read_frames(p, self.frames)) if items[0]["video"] else (lambda p: Image.open(p).convert("RGB"))
        files = {i["file"]: load(i["file"]) for i in items}
        media = [files[i["file"]] for i in items]
        inputs = self.processor(text=[self.prompt(i) for i in items], padding=True, **{kind: media})
        inputs = inputs.to(self.model.dtype)
        with self.torch.no_grad():
            out = self.model.generate(**inputs, max_new_tokens=24, do_sample=False)
        tail = out[:, inputs["input_ids"].shape[1]:]
        return [t.strip() for t in self.processor.batch_decode(tail, skip_special_tokens=True)]


class Program:
    """The Rust program: a batch of conversations at a time."""

    def __init__(self, path, model, extra):
        self.command = [path, "generate", "--format", "json", "--max-new-tokens", "24", *extra]
        if model:
            self.command += ["--model", model]

    def answers(self, items):
        def conversation(item):
            media = {"type": "video" if item["video"] else "image", "path": item["file"]}
            return [{"role": "user", "content": [media, {"type": "text", "text": item["question"]}]}]

        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump([conversation(i) for i in items], file)
            file.flush()
            done = subprocess.run([*self.command, "--conversation", file.name], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        return [t.strip() for t in json.loads(done.stdout)["texts"]]


def in_groups(items, size):
    """Neighbours of the same medium, `size` at most."""
    for video in (True, False):
        same = [i for i in items if i["video"] == video]
        for start in range(0, len(same), size):
            yield same[start:start + size]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder, for Transformers")
    parser.add_argument("--lnv", help="ask this program instead")
    parser.add_argument("--lnv-arg", action="append", default=[], help="further arguments for the program's `generate`")
    parser.add_argument("--per-set", type=int, default=240, help="files per set of scenes")
    parser.add_argument("--kinds", help="only these kinds, comma-separated")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--work-dir", default=str(Path.home() / ".cache" / "lnv-demo-heldout"))
    parser.add_argument("--show", type=int, default=3, help="wrong answers to print per kind")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    folder = Path(args.work_dir)
    folder.mkdir(parents=True, exist_ok=True)
    items = make_items(folder, args.per_set)
    if args.kinds:
        items = [i for i in items if i["kind"] in args.kinds.split(",")]
    if args.lnv:
        answerer = Program(args.lnv, args.model, args.lnv_arg)
    else:
        import torch

        torch.set_num_threads(args.threads)
        answerer = TransformersModel(args.model, args.frames, args.dtype)

    right, wrong = collections.Counter(), collections.defaultdict(list)
    total = collections.Counter()
    for group in in_groups(items, 24):
        for item, given in zip(group, answerer.answers(group)):
            key = ("clip " if item["video"] else "still ") + item["kind"]
            total[key] += 1
            if given == item["answer"]:
                right[key] += 1
            else:
                wrong[key].append({**item, "given": given})
    for key in sorted(total):
        print(f"{key:18} {right[key] / total[key]:7.1%}  ({right[key]}/{total[key]})")
        for w in wrong[key][: args.show]:
            print(f"    {Path(w['file']).name} {w['question']!r}: {w['given']!r}, expected {w['answer']!r}")
    (folder / "wrong.json").write_text(json.dumps(wrong, indent=1))


if __name__ == "__main__":
    main()
