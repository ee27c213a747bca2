"""How far logits and greedy tokens lie from the reference's. The standard library is enough for one row."""

import array
import json
import math

# Where ours must agree with Transformers in f32: the largest difference as a share of the largest logit, and
# the cosine. Ours in f32 differs by rounding only; bf16 is held to what bf16 costs the reference itself.
BOUNDS = {"lnv-f32": (1e-4, 0.999999), "lnv-bf16": (0.05, 0.999)}


def read_logits(folder):
    """The last position's logits, as a program wrote them: bare, or `logits` in a safetensors file."""
    values = array.array("f")
    if (folder / "logits.f32").exists():
        values.frombytes((folder / "logits.f32").read_bytes())
        return values
    data = (folder / "logits.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    start, end = json.loads(data[8 : 8 + length])["logits"]["data_offsets"]
    values.frombytes(data[8 + length + start : 8 + length + end])
    return values


def agreement(name, folder, reference):
    """Cosine, largest relative difference, first token and matching greedy tokens; `ok` is None where nothing is required."""
    ours, theirs = read_logits(folder), read_logits(reference)
    if len(ours) != len(theirs):
        raise SystemExit(f"{name} has {len(ours)} logits, the reference {len(theirs)}: not the same checkpoint; empty the cache")
    product = math.fsum(a * b for a, b in zip(ours, theirs))
    norms = math.sqrt(math.fsum(a * a for a in ours) * math.fsum(b * b for b in theirs))
    largest = max(abs(b) for b in theirs)
    difference = max(abs(a - b) for a, b in zip(ours, theirs)) / largest
    best, second = sorted(theirs, reverse=True)[:2]
    tokens, expected = (json.loads((f / "greedy.json").read_text()) for f in (folder, reference))
    same = next((i for i, (a, b) in enumerate(zip(tokens, expected)) if a != b), min(len(tokens), len(expected)))
    out = {
        "cosine": product / norms, "difference": difference, "first": tokens[0] == expected[0],
        "same": same, "of": len(expected), "lead": (best - second) / largest, "ok": None,
    }
    if name in BOUNDS:
        most, least = BOUNDS[name]
        out["ok"] = difference <= most and out["cosine"] >= least and out["first"]
        if name == "lnv-f32":
            out["ok"] = out["ok"] and same == len(expected)
    return out
