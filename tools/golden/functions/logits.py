"""Scores after the logits processors of generate()."""

import numpy as np
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from functions.store import write_json, write_tensors

VOCAB, EOS = 24, 2
IDS = torch.tensor([[1, 5, 5, 7, 3, 9, 5, 7], [1, 1, 4, 8, 4, 8, 20, 4]])
PROMPT = 4  # length of the prompt; the rest was generated
SAMPLE = {"do_sample": True, "top_k": 0}
CASES = [
    ("none", {}),
    ("repetition-penalty", {"repetition_penalty": 1.5}),
    ("repetition-penalty-below-one", {"repetition_penalty": 0.8}),
    ("no-repeat-2", {"no_repeat_ngram_size": 2}),
    ("no-repeat-1", {"no_repeat_ngram_size": 1}),
    ("min-length", {"min_length": 9}),
    ("min-new-tokens", {"min_new_tokens": 5}),
    ("min-new-tokens-reached", {"min_new_tokens": 4}),
    ("bad-words", {"bad_words_ids": [[6], [5, 7, 11], [20, 4, 12], [3, 3]]}),
    ("sequence-bias", {"sequence_bias": [[[6], 2.5], [[7, 8], -3.0], [[20, 4, 9], 1.5]]}),
    ("suppress", {"suppress_tokens": [0, 3, 23]}),
    ("forced-eos", {"forced_eos_token_id": 2, "max_length": 9}),
    ("length-decay", {"exponential_decay_length_penalty": [2, 1.4]}),
    ("temperature", {**SAMPLE, "temperature": 0.7}),
    ("top-k", {**SAMPLE, "top_k": 5}),
    ("top-k-ties", {**SAMPLE, "top_k": 3}),
    ("top-k-beyond", {**SAMPLE, "top_k": 50}),
    ("top-p", {**SAMPLE, "top_p": 0.8}),
    ("top-p-small", {**SAMPLE, "top_p": 0.01}),
    ("min-p", {**SAMPLE, "min_p": 0.1}),
    ("typical-p", {**SAMPLE, "typical_p": 0.6}),
    ("epsilon", {**SAMPLE, "epsilon_cutoff": 0.02}),
    ("eta", {**SAMPLE, "eta_cutoff": 0.05}),
    ("renormalise", {**SAMPLE, "temperature": 1.3, "top_k": 6, "renormalize_logits": True}),
    ("chain", {"do_sample": True, "repetition_penalty": 1.2, "temperature": 0.6, "top_k": 8, "top_p": 0.9, "min_p": 0.05}),
    ("chain-beams", {"do_sample": True, "num_beams": 2, "temperature": 1.5, "top_k": 1, "top_p": 0.01, "min_p": 0.9}),
    ("chain-long", {"do_sample": True, "repetition_penalty": 1.1, "no_repeat_ngram_size": 3, "min_new_tokens": 6, "suppress_tokens": [4],
                    "temperature": 0.9, "top_k": 10, "top_p": 0.95, "typical_p": 0.9, "epsilon_cutoff": 0.001}),
]


def scores(name):
    rng = np.random.default_rng(44)
    values = torch.from_numpy(rng.normal(0, 2, size=(2, VOCAB))).float()
    if name == "top-k-ties":
        values = (values * 2).round() / 2
    return values


def tiny_model():
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))


def processed(model, given, options):
    config = GenerationConfig(eos_token_id=EOS, pad_token_id=0, bos_token_id=1, **options)
    model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device="cpu")
    processors = model._get_logits_processor(config, input_ids_seq_length=PROMPT, encoder_input_ids=IDS[:, :PROMPT], device="cpu")
    return processors(IDS, given.clone()), [type(p).__name__ for p in processors]


def make(folder):
    model, tensors, entries = tiny_model(), {}, []
    for name, options in CASES:
        given = scores(name)
        result, order = processed(model, given, options)
        tensors[f"{name}.scores"], tensors[f"{name}.processed"] = given, result
        entries.append({"name": name, "options": options, "processors": order})
    write_tensors(folder / "logits_processors.safetensors", tensors)
    write_json(
        folder / "logits_processors.json",
        "Scores f32 [2, vocab] before (`{name}.scores`) and after (`{name}.processed`, -inf where dropped) the processors generate() builds for "
        "the options, in its order. `ids`: the rows so far, of which the first `prompt` ids are the prompt.",
        ids=IDS.tolist(),
        prompt=PROMPT,
        eos=EOS,
        entries=entries,
    )
