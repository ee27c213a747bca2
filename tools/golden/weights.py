"""Seeded random weights, lively enough that outputs depend on every input."""

import zlib

import numpy as np
import torch


def normal(seed, name, shape):
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return rng.standard_normal(shape)


def scale_of(name, shape):
    """(mean, deviation) for a parameter."""
    if name.endswith("bias"):
        return 0.0, 0.1
    if "norm" in name or "layrnorm" in name:
        return 1.0, 0.15
    if name.endswith(("embed_tokens.weight", "lm_head.weight", "image_newline", "class_embedding")):
        return 0.0, 0.5
    if "position_embedding" in name or name.endswith("probe"):
        return 0.0, 0.3
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else shape[0]
    gain = 1.6 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
    return 0.0, gain / np.sqrt(fan_in)


def fill(model, seed, dtype):
    """Set every parameter; the values are exact in `dtype`."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean, deviation = scale_of(name, tuple(parameter.shape))
            values = torch.from_numpy(mean + deviation * normal(seed, name, tuple(parameter.shape)))
            parameter.copy_(values.to(dtype).to(parameter.dtype))
    model.tie_weights()


def jitter(model, seed=0, relative=1e-5):
    """Move every parameter a little: decisions that survive this do not hang on rounding."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.from_numpy(normal(seed, "jitter " + name, tuple(parameter.shape)))
            parameter.mul_((1 + relative * noise).to(parameter.dtype))
    return model
