"""All cases of one checkpoint folder."""

import json
import re
from pathlib import Path

from safetensors.torch import save_file

import checkpoints
import forward
import generation
import inputs as case_inputs
import layouts
import weights
from versions import installed


def token_ids(processor):
    tokenizer = processor.tokenizer
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")}
    return {"image": processor.image_token_id, "video": processor.video_token_id, **ids}


def generations(model, witnesses, processor, inputs, names):
    if not names:
        return []
    greedy = generation.run(model, inputs, generation.VARIANTS["greedy"])
    rows = greedy.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    return [generation.generate(model, witnesses, processor, inputs, name, rows) for name in names]


def write_case(folder, runners, case):
    model, witnesses, half, processor = runners
    inputs, notes = case_inputs.make(processor, model.config, case)
    tensors, loss = forward.outputs(model, inputs, case["tensors"])
    if half is not None:
        tensors.update(forward.bf16_logits(half, inputs, case["tensors"]))
    lengths = forward.feature_lengths(model, inputs)
    name = case["name"]
    save_file(inputs, folder / f"{name}.inputs.safetensors")
    save_file(tensors, folder / f"{name}.outputs.safetensors")
    return {
        "name": name,
        "kind": "ids" if case["labels"] else "conversation",
        "batched": case["batched"],
        "conversations": case["conversations"],
        "template_kwargs": case["template_kwargs"],
        "processor_kwargs": case["processor_kwargs"],
        "rendered": case_inputs.rendered(processor, case),
        "input_ids": inputs["input_ids"].tolist(),
        "attention_mask": inputs["attention_mask"].tolist(),
        "image_lengths": lengths["image"],
        "video_lengths": lengths["video"],
        "inputs": f"{folder.name}/{name}.inputs.safetensors",
        "outputs": f"{folder.name}/{name}.outputs.safetensors",
        "loss": loss,
        "generate": generations(model, witnesses, processor, inputs, case["generate"]),
        "notes": case["notes"] + notes,
    }


def compact(value):
    """JSON with lists of numbers on one line."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    return re.sub(r"\[\s+((?:-?[\d.e+-]+,?\s*)+)\]", lambda m: "[" + " ".join(m.group(1).split()) + "]", text) + "\n"


def drop_stale(folder):
    for pattern in ("*.inputs.safetensors", "*.outputs.safetensors"):
        for path in folder.glob(pattern):
            path.unlink()


def write(folder, spec, cases):
    """Write every case; the current directory must be the folder that media paths are relative to."""
    folder = Path(folder)
    drop_stale(folder)
    model, processor = checkpoints.load(folder)
    witnesses = [
        checkpoints.load(folder, attention="sdpa")[0].double(),
        weights.jitter(checkpoints.load(folder, attention="sdpa")[0]),
    ]
    half = checkpoints.load(folder, checkpoints.DTYPES["bfloat16"])[0] if spec.get("also_bf16") else None
    runners = (model, witnesses, half, processor)
    described = {
        "format": 1,
        "name": spec["name"],
        "reference": installed(),
        "layout": spec["layout"],
        "outputs_from": None,
        "covers": spec["covers"],
        "notes": spec.get("notes", []),
        "token_ids": token_ids(processor),
        "cases": [write_case(folder, runners, case) for case in cases],
    }
    (folder / "cases.json").write_text(compact(described))
    return described


def write_robust(folder, spec, cases, rename=True, attempts=20):
    """Save the checkpoint and write its cases; where two tokens come too close to each other, take other weights."""
    for attempt in range(attempts):
        seeded = {**spec, "seed": spec["seed"] + 100_000 * attempt}
        checkpoints.save(seeded, folder)
        if rename and spec["layout"] != "hf-4.53":
            layouts.rename_tensors(folder, spec["layout"])
        try:
            return write(folder, seeded, cases)
        except generation.NotRobust as close:
            print(f"  other weights: {close}", flush=True)
    raise RuntimeError(f"{spec['name']}: no weights with clear decisions in {attempts} attempts")
