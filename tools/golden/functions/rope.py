"""Inverse frequencies and attention scaling of every rope type."""

import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from functions.store import write_json


def shape(head_dim=16, theta=10000.0, max_pos=4096, **more):
    return {"head_dim": head_dim, "rope_theta": theta, "max_position_embeddings": max_pos, **more}


SHORT, LONG = [1.0, 1.05, 1.1, 1.2, 1.5, 2.0, 2.5, 3.0], [1.0, 2.0, 4.0, 8.0, 12.0, 20.0, 40.0, 64.0]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
CASES = [
    (shape(), None),
    (shape(128, 1e6), None),
    (shape(6, 500.0), None),
    (shape(64, 5e6), None),
    (shape(), {"rope_type": "linear", "factor": 2.0}),
    (shape(128), {"type": "linear", "factor": 2.5}),
    (shape(max_pos=128), {"rope_type": "dynamic", "factor": 2.0}),
    (shape(32, max_pos=40), {"type": "dynamic", "factor": 4.0}),
    (shape(max_pos=128), {"rope_type": "yarn", "factor": 4.0}),
    (shape(64, 1e6, 32768), {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}),
    (shape(128, 1e4, 4096), {"type": "yarn", "factor": 16.0, "beta_fast": 16.0, "beta_slow": 2.0}),
    (shape(64, 1e4, 4096), {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25}),
    (shape(64, 1e4, 4096), {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.8}),
    (shape(64, 1e4, 4096), {"rope_type": "yarn", "factor": 1.0}),
    (shape(128, 5e5, 131072), LLAMA3),
    (shape(16, 1e4, 1024), {**LLAMA3, "original_max_position_embeddings": 64, "factor": 4.0}),
    (shape(max_pos=4096), {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "factor": 4.0}),
    (shape(max_pos=4096), {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "attention_factor": 1.5, "factor": 2.0}),
    (shape(max_pos=4096, original_max_position_embeddings=512), {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}),
]
LENGTHS = {"dynamic": [None, 1, 100, 128, 129, 200, 1000], "longrope": [None, 100, 512, 513, 4096, 4097]}


def entry(fields, scaling, length):
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, **fields, rope_scaling=None if scaling is None else dict(scaling))
    kind = "default" if scaling is None else scaling.get("rope_type", scaling.get("type"))
    # the model passes the length as an integer tensor
    seq_len = None if length is None else torch.tensor(length)
    inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=seq_len)
    return {**fields, "rope_scaling": scaling, "seq_len": length, "attention_scaling": float(factor), "inv_freq": inv_freq.tolist()}


def make(folder):
    entries = []
    for fields, scaling in CASES:
        kind = None if scaling is None else scaling.get("rope_type", scaling.get("type"))
        entries += [entry(fields, scaling, length) for length in LENGTHS.get(kind, [None])]
    write_json(
        folder / "rope.json",
        "ROPE_INIT_FUNCTIONS of 4.53.3: text config fields, rope_scaling as in config.json, the sequence length given (null: none, as when "
        "the model is built), the attention scaling and the inverse frequencies (f32).",
        entries=entries,
    )
