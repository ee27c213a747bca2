"""Frame sampling."""

import numpy as np
import torch
from transformers import LlavaNextVideoVideoProcessor
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

from functions.store import write_json

COUNTED = [(100, 8), (10, 4), (17, 7), (61, 7), (243, 8), (243, 32), (300, 8), (8, 8), (7, 3), (24, 3), (24, 4), (1, 1), (5, 1), (30, 7),
           (4, 8), (0, 4)]
BY_FPS = [(300, 30.0, 1), (8, 4.0, 3), (243, 29.97002997002997, 2), (40, 10.0, 1), (40, 10.0, 3), (24, 12.0, 5), (100, 25.0, 30),
          (9, 3.0, 2), (10, 30.0, 1), (91, 23.976023976023978, 0.5)]


def processor_indices(total, num_frames=None, fps=None, meta_fps=None):
    video = torch.arange(max(total, 0)).reshape(-1, 1, 1, 1)
    metadata = None if meta_fps is None else {"fps": meta_fps}
    try:
        chosen = LlavaNextVideoVideoProcessor().sample_frames(video, metadata=metadata, num_frames=num_frames, fps=fps)
        return {"reference": chosen.flatten().tolist()}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def integer(total, count):
    return [i * total // count for i in range(count)] if 0 < count <= total else None


def pairs():
    rng = np.random.default_rng(42)
    random = [(int(t), int(n)) for t, n in zip(rng.integers(2, 400, 150), rng.integers(1, 64, 150)) if n <= t]
    return COUNTED + random


def counted(total, count):
    return {"total": total, "num_frames": count, "indices": integer(total, count), **processor_indices(total, num_frames=count)}


def by_fps(total, meta_fps, fps):
    count = int(total / meta_fps * fps)
    entry = {"total": total, "video_fps": meta_fps, "fps": fps, "num_frames": count, "indices": integer(total, count)}
    return {**entry, **processor_indices(total, fps=fps, meta_fps=meta_fps)}


def load_video_entry(total, count):
    metadata = VideoMetadata(total_num_frames=total, fps=25.0, duration=total / 25.0, video_backend="pyav")
    try:
        return {"total": total, "num_frames": count, "reference": default_sample_indices_fn(metadata, num_frames=count).tolist()}
    except Exception as error:
        return {"total": total, "num_frames": count, "error": f"{type(error).__name__}: {error}"}


def make(folder):
    entries = [counted(*pair) for pair in pairs()]
    rates = [by_fps(*triple) for triple in BY_FPS]
    for entry in entries + rates:
        kept = entry.get("reference")
        assert kept is None or len(kept) != entry["num_frames"] or kept == entry["indices"], entry
    write_json(
        folder / "frames.json",
        "Frame sampling. `by_count` and `by_fps`: `indices` is the decided answer (floor(i * total / n), null = an error), `reference` what "
        "sample_frames of 4.53.3 took (it differs only where its float arange overshoots), `error` what it raised. `load_video`: "
        "4.53.3's load_video(num_frames=), which truncates the step; the decision (12.6) is the integer formula.",
        by_count=entries,
        by_fps=rates,
        load_video=[load_video_entry(*pair) for pair in COUNTED[:12]],
    )
