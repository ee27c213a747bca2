"""Generation with the reference: token ids, scores, texts."""

import torch

from forward import reset_rope

VARIANTS = {
    "greedy": {"max_new_tokens": 16},
    "greedy-eos": {"max_new_tokens": 16, "eos_token_id": "picked"},
    "greedy-penalty": {"max_new_tokens": 16, "repetition_penalty": 1.3},
    "greedy-no-repeat": {"max_new_tokens": 16, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
    "beam3": {"max_new_tokens": 10, "num_beams": 3, "num_return_sequences": 2},
    "beam3-eos": {"max_new_tokens": 12, "num_beams": 3, "num_return_sequences": 3, "eos_token_id": "picked-two"},
    "beam4-early": {"max_new_tokens": 12, "num_beams": 4, "num_return_sequences": 1, "eos_token_id": "picked", "early_stopping": True,
                    "length_penalty": 0.5},
    "beam2-penalty": {"max_new_tokens": 10, "num_beams": 2, "repetition_penalty": 1.2, "length_penalty": 2.0},
}


@torch.no_grad()
def merged_embeddings(model, inputs):
    """Embeddings with media merged in (so that beams repeat whole rows; the reference repeats pixel tensors wrongly)."""
    reset_rope(model)
    media = {k: v for k, v in inputs.items() if k not in ("attention_mask", "labels")}
    return model.model(**media, output_hidden_states=True, use_cache=False).hidden_states[0]


def model_inputs(model, inputs, beams):
    plain = {k: v for k, v in inputs.items() if k != "labels"}
    if beams == 1 or not ({"pixel_values", "pixel_values_videos"} & plain.keys()):
        return plain
    embeddings = merged_embeddings(model, inputs)
    return {"input_ids": plain["input_ids"], "attention_mask": plain["attention_mask"], "inputs_embeds": embeddings}


def in_dtype(inputs, dtype):
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


@torch.no_grad()
def run(model, inputs, kwargs):
    inputs = in_dtype(inputs, model.dtype)
    prepared = model_inputs(model, inputs, kwargs.get("num_beams", 1))
    reset_rope(model)
    return model.generate(**prepared, do_sample=False, return_dict_in_generate=True, output_scores=True, **kwargs)


def picked_eos(greedy_rows, count):
    """Tokens that end some rows of the greedy output early."""
    first = greedy_rows[0]
    late = [t for i, t in enumerate(first) if i >= 4 and t not in first[:4]]
    second = greedy_rows[-1]
    other = [t for i, t in enumerate(second) if i >= 7 and t not in second[:7]]
    picked = (late[:1] or first[-1:]) + (other[:1] or second[-1:])
    return picked[0] if count == 1 else sorted(set(picked))


def resolved(kwargs, greedy_rows):
    counts = {"picked": 1, "picked-two": 2}
    eos = kwargs.get("eos_token_id")
    return {**kwargs, "eos_token_id": picked_eos(greedy_rows, counts[eos])} if eos in counts else dict(kwargs)


def margin(out, new_ids, ends):
    """Smallest gap between the two best scores, over steps of rows that have not finished."""
    gaps = []
    for row, ids in enumerate(new_ids):
        for step, token in enumerate(ids):
            best = out.scores[step][row].topk(2).values
            gaps.append((best[0] - best[1]).item())
            if token in ends:
                break
    return min(gaps)


def texts(processor, sequences, prompt):
    new = sequences[:, prompt:]
    decode = processor.batch_decode
    return {
        "text": decode(new),
        "text_skip": decode(new, skip_special_tokens=True),
        "text_skip_clean": decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=True),
        "full_text_skip": decode(sequences, skip_special_tokens=True),
    }


class NotRobust(Exception):
    pass


def generate(model, witnesses, processor, inputs, name, greedy_rows):
    """One GENERATION entry; raises NotRobust when a witness (float64, other attention, jittered weights) decides otherwise."""
    kwargs = resolved(VARIANTS[name], greedy_rows)
    out = run(model, inputs, kwargs)
    prompt = inputs["input_ids"].shape[1]
    for witness in witnesses:
        if not torch.equal(out.sequences, run(witness, inputs, kwargs).sequences):
            raise NotRobust(name)
    new_ids = out.sequences[:, prompt:].tolist()
    beams = kwargs.get("num_beams", 1) > 1
    ends = kwargs.get("eos_token_id", model.generation_config.eos_token_id)
    ends = ends if isinstance(ends, list) else [ends]
    gap = None if beams else margin(out, new_ids, ends)
    if gap is not None and gap < 1e-3:
        raise NotRobust(f"{name} (margin {gap})")
    return {
        "name": name,
        "kwargs": {"do_sample": False, **kwargs},
        "new_ids": new_ids,
        "sequences_scores": out.sequences_scores.tolist() if beams else None,
        "margin": gap,
        **texts(processor, out.sequences, prompt),
    }
