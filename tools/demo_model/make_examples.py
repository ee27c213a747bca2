"""Writes the small example clips and stills of testdata/demo/ with their
questions and answers, drawn by the held-out renderer.

    make_examples.py --out testdata/demo
"""

import argparse
import json
from pathlib import Path

import numpy as np

from heldout import Look, PALETTE, render_still, write_clip
from scene import Object, Scene

MOVES, HAPPENS, COUNT = "Which way does it move?", "What happens?", "How many shapes are there?"


def rgb(name, shade=1):
    return np.array(PALETTE[name][shade], dtype=float) / 255


def thing(colour, shape, start, end=None, radius=0.16, **more):
    radius = radius if isinstance(radius, tuple) else (radius, radius)
    return Object(shape=shape, colour=colour, rgb=rgb(colour), start=start, end=end or start, radius=radius, **more)


def world(background, *objects, size=(320, 240), video=True):
    return Scene(background, rgb(background), size[0] / size[1], list(objects), video), size


CLIPS = {
    "left.mp4": (
        world("white", thing("red", "circle", (0.82, 0.45), (0.18, 0.5), event="move", direction="left")),
        {MOVES: "left", HAPPENS: "it moves to the left", "What colour is it?": "red",
         "Describe the video.": "a red circle moves to the left on a white background"},
    ),
    "up.mp4": (
        world("blue", thing("orange", "square", (0.6, 0.8), (0.6, 0.2), radius=0.14, event="move", direction="up"),
              size=(426, 240)),
        {"In which direction does the square move?": "up", "What shape is it?": "square",
         "What colour is the background?": "blue"},
    ),
    "appears.mp4": (
        world("gray", thing("purple", "star", (0.35, 0.4), radius=0.2, event="appear", when=(0.5, 0.501))),
        {HAPPENS: "it appears", "What shape is it?": "star"},
    ),
    "turns.mp4": (
        world("black", thing("yellow", "triangle", (0.6, 0.55), radius=0.22, event="turn", when=(0.45, 0.55),
                             turns_to="green", turned_rgb=rgb("green")), size=(240, 240)),
        {HAPPENS: "it turns green", "What colour is the background?": "black"},
    ),
    "grows.mp4": (
        world("white", thing("green", "circle", (0.5, 0.5), radius=(0.1, 0.3), event="grow")),
        {HAPPENS: "it grows", "What colour is the circle?": "green"},
    ),
    "three.mp4": (
        world("white", thing("purple", "triangle", (0.2, 0.3)), thing("blue", "circle", (0.55, 0.7)),
              thing("red", "square", (0.82, 0.25), radius=0.13)),
        {COUNT: "three", "Is there a purple triangle?": "yes", "Is there a yellow star?": "no"},
    ),
}
STILLS = {
    "circle.png": (
        world("white", thing("red", "circle", (0.4, 0.5), radius=0.25), video=False),
        {"What colour is it?": "red", "What shape is it?": "circle",
         "Describe the image.": "a red circle on a white background"},
    ),
    "pair.jpg": (
        world("white", thing("red", "circle", (0.27, 0.5), radius=0.2), thing("blue", "square", (0.74, 0.52), radius=0.19),
              size=(426, 240), video=False),
        {COUNT: "two", "Describe the image.": "a red circle and a blue square on a white background"},
    ),
    "four.png": (
        world("black", thing("yellow", "star", (0.25, 0.27)), thing("white", "triangle", (0.75, 0.26)),
              thing("green", "square", (0.24, 0.76)), thing("orange", "circle", (0.74, 0.75)), size=(240, 240), video=False),
        {COUNT: "four", "Is there a yellow star?": "yes", "What colour is the triangle?": "white"},
    ),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    out = Path(parser.parse_args().out)
    out.mkdir(parents=True, exist_ok=True)
    listing = []
    for name, ((scene, size), asked) in {**CLIPS, **STILLS}.items():
        rng = np.random.default_rng(len(listing))
        look = Look(rng)
        look.supersample, look.ramp, look.grain = 3, None, 0.0
        if scene.video:
            write_clip(out / name, scene, size, look, rng, frames=32, fps=16, crf=25)
        else:
            render_still(out / name, scene, size, rng, look)
        listing += [{"file": name, "question": q, "answer": a} for q, a in asked.items()]
    (out / "answers.json").write_text(json.dumps(listing, indent=1) + "\n")


if __name__ == "__main__":
    main()
