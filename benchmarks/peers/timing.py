"""What the Python peers share: how a stage is timed, and what is printed."""

import argparse
import json
import time
from pathlib import Path


def arguments(description):
    """The arguments that every peer takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint, or what was made of it")
    parser.add_argument("--inputs", type=Path, required=True, help="folder that make_inputs.py wrote")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--runs", type=int, default=3, help="of each stage, after one that does not count")
    parser.add_argument("--steps", type=int, default=16, help="decode steps in a run")
    parser.add_argument("--output", type=Path, help="folder for logits and greedy tokens, to compare with")
    return parser


def measure(stages, runs, steps):
    """Seconds of each stage.

    `stages` has `vision()` -> features, `prefill(features)` -> (logits of the last position, state) and
    `step(token, state)` -> (logits, state); logits are numpy vectors. The first run warms up and does not count.
    """
    seconds = {"vision_s": [], "prefill_s": [], "decode_s": []}

    def timed(key, run, function, *arguments):
        start = time.perf_counter()
        result = function(*arguments)
        if run > 0:
            seconds[key].append(time.perf_counter() - start)
        return result

    first = None
    for run in range(runs + 1):
        features = timed("vision_s", run, stages.vision)
        logits, state = timed("prefill_s", run, stages.prefill, features)
        if first is None:
            first = logits.copy()
        greedy = []
        for _ in range(steps):
            greedy.append(int(logits.argmax()))
            logits, state = timed("decode_s", run, stages.step, greedy[-1], state)
    return seconds, first, greedy


def finish(options, seconds, logits, greedy, **facts):
    """Writes the logits where asked to, and prints one JSON object."""
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        logits.astype("float32").tofile(options.output / "logits.f32")
        (options.output / "greedy.json").write_text(json.dumps(greedy))
    print(json.dumps({**seconds, "greedy": greedy, **facts}))
