"""Writes a LLaVA-NeXT-Video checkpoint whose language model is SmolLM2-135M-Instruct, from its GGUF file.

    python smollm2_checkpoint.py FILE.gguf FOLDER [--dtype float32|bfloat16|float16]

The language model is real, so that perplexity and answers mean something; the vision tower, the projector and
image_newline are tiny and random. Needs numpy.
"""

import argparse
import json
import struct
from pathlib import Path

import numpy as np

from gguf import Reader

SEED = 20250207
# The vocabulary is rounded up to this, as LLaVA's is: <image>, <video>, then unused rows.
VOCAB_MULTIPLE = 64
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
CONTROL = 3
VISION = {
    "model_type": "clip_vision_model", "hidden_act": "quick_gelu", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "num_channels": 3,
    "projection_dim": 64, "layer_norm_eps": 1e-5,
}
PINPOINTS = [[28, 56], [56, 28], [56, 56]]

LAYER = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}


def unpermuted(weight, heads):
    """Rows of q or k in Transformers' order: GGUF pairs row 2i with 2i+1 for the rotation, Transformers i with
    i + head_dim/2."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def text_config(meta, vocab):
    get = lambda key: meta["llama." + key]
    heads, size = get("attention.head_count"), get("embedding_length")
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
        "hidden_size": size, "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"), "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv"), "head_dim": size // heads,
        "max_position_embeddings": get("context_length"), "rope_theta": get("rope.freq_base"), "rope_scaling": None,
        # Stored as f32; the configuration means the decimal number.
        "rms_norm_eps": float(f"{get('attention.layer_norm_rms_epsilon'):.6g}"),
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True, "use_cache": True,
        "vocab_size": vocab, **special_ids(meta),
    }


def special_ids(meta):
    ids = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {f"{ours}_token_id": meta[f"tokenizer.ggml.{theirs}_token_id"] for ours, theirs in ids.items()}


def language_model(reader, vocab):
    """Names as Transformers saves them, and tensors."""
    meta = reader.metadata
    table = reader.tensor("token_embd.weight")
    # The mean row: it is never the likeliest token, and adds next to nothing to the sum of the softmax.
    mean = table.mean(axis=0, dtype=np.float64).astype(np.float32)
    yield "language_model.model.embed_tokens.weight", np.concatenate([table, np.tile(mean, (vocab - len(table), 1))])
    yield "language_model.model.norm.weight", reader.tensor("output_norm.weight")
    heads = {"attn_q": meta["llama.attention.head_count"], "attn_k": meta["llama.attention.head_count_kv"]}
    for layer in range(meta["llama.block_count"]):
        for theirs, ours in LAYER.items():
            weight = reader.tensor(f"blk.{layer}.{theirs}.weight")
            if theirs in heads:
                weight = unpermuted(weight, heads[theirs])
            yield f"language_model.model.layers.{layer}.{ours}.weight", weight


def vision(text_size, random):
    """A random CLIP tower, projector and image_newline, as they are initialised before training."""
    size, inner = VISION["hidden_size"], VISION["intermediate_size"]
    patch = VISION["patch_size"]
    places = (VISION["image_size"] // patch) ** 2 + 1
    noise = lambda *shape: random.standard_normal(shape, dtype=np.float32) * np.float32(0.05)
    tower = "vision_tower.vision_model."
    yield tower + "embeddings.class_embedding", noise(size)
    yield tower + "embeddings.patch_embedding.weight", noise(size, 3, patch, patch)
    yield tower + "embeddings.position_embedding.weight", noise(places, size)
    norms = ["pre_layrnorm", "post_layernorm"]
    linears = []
    for layer in range(VISION["num_hidden_layers"]):
        at = f"encoder.layers.{layer}."
        norms += [at + "layer_norm1", at + "layer_norm2"]
        linears += [(at + f"self_attn.{part}_proj", size, size) for part in ("q", "k", "v", "out")]
        linears += [(at + "mlp.fc1", inner, size), (at + "mlp.fc2", size, inner)]
    for name in norms:
        yield f"{tower}{name}.weight", np.ones(size, np.float32)
        yield f"{tower}{name}.bias", np.zeros(size, np.float32)
    linears = [(tower + name, n, k) for name, n, k in linears]
    linears += [
        ("multi_modal_projector.linear_1", text_size, size),
        ("multi_modal_projector.linear_2", text_size, text_size),
    ]
    for name, n, k in linears:
        yield name + ".weight", noise(n, k)
        yield name + ".bias", noise(n)
    yield "image_newline", noise(text_size)


def stored(values, dtype):
    """The bytes of a tensor, rounded to nearest even."""
    values = np.ascontiguousarray(values, np.float32)
    if dtype == "float32":
        return values.tobytes()
    if dtype == "float16":
        return values.astype(np.float16).tobytes()
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()


def write_safetensors(path, tensors, dtype):
    """Header first, so the sizes are gathered before the bytes are written."""
    header, offset, arrays = {"__metadata__": {"format": "pt"}}, 0, []
    width = 4 if dtype == "float32" else 2
    for name, values in tensors:
        end = offset + values.size * width
        header[name] = {"dtype": DTYPES[dtype], "shape": list(values.shape), "data_offsets": [offset, end]}
        arrays.append(values)
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for values in arrays:
            file.write(stored(values, dtype))


def tokenizer(meta):
    """tokenizer.json of the "smollm" kind: digits one by one, then GPT-2's bytes and expression."""
    if (meta["tokenizer.ggml.model"], meta["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        raise SystemExit("the file's tokenizer is not SmolLM's")
    tokens = meta["tokenizer.ggml.tokens"]
    control = [i for i, kind in enumerate(meta["tokenizer.ggml.token_type"]) if kind == CONTROL]
    special = {i: tokens[i] for i in control} | {len(tokens): "<image>", len(tokens) + 1: "<video>"}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    digits = {"type": "Digits", "individual_digits": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    file = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": text, **flags} for i, text in special.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in meta["tokenizer.ggml.merges"]],
        },
    }
    named = {f"{name[:3]}_token": tokens[i] for name, i in special_ids(meta).items()}
    named["unk_token"] = tokens[meta["tokenizer.ggml.unknown_token_id"]]
    config = {
        **named, "tokenizer_class": "GPT2Tokenizer", "add_bos_token": False, "add_prefix_space": False,
        "clean_up_tokenization_spaces": False, "model_max_length": meta["llama.context_length"],
        "padding_side": "left", "processor_class": "LlavaNextVideoProcessor",
        "added_tokens_decoder": {str(i): {"content": text, **flags} for i, text in special.items()},
    }
    return file, config, named


def chat_template(meta):
    """The model's own, with a message's content as a list of parts."""
    content = "message['content']"
    parts = (
        f"{{% if {content} is string %}}{{{{ {content} }}}}{{% else %}}{{% for part in {content} %}}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}{{ '<' + part['type'] + '>\n' }}{% endif %}"
        "{% endfor %}{% endif %}"
    )
    ours = f"{{{{'<|im_start|>' + message['role'] + '\n'}}}}{parts}{{{{'<|im_end|>' + '\n'}}}}"
    theirs = f"{{{{'<|im_start|>' + message['role'] + '\n' + {content} + '<|im_end|>' + '\n'}}}}"
    template = meta["tokenizer.chat_template"]
    if theirs not in template:
        raise SystemExit("the chat template is not the one that this script knows")
    return template.replace(theirs, ours)


def write_processor(folder, meta):
    file, config, named = tokenizer(meta)
    (folder / "tokenizer.json").write_text(json.dumps(file, ensure_ascii=False))
    save = lambda name, values: (folder / name).write_text(json.dumps(values, indent=2) + "\n")
    save("tokenizer_config.json", config)
    save("special_tokens_map.json", named)
    (folder / "chat_template.jinja").write_text(chat_template(meta))
    save("processor_config.json", {
        "image_token": "<image>", "video_token": "<video>", "num_additional_image_tokens": 1,
        "patch_size": VISION["patch_size"], "processor_class": "LlavaNextVideoProcessor",
        "vision_feature_select_strategy": "default",
    })
    side = VISION["image_size"]
    pixels = {
        "do_normalize": True, "do_rescale": True, "do_resize": True, "do_convert_rgb": True, "resample": 3,
        "rescale_factor": 1 / 255, "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711], "do_center_crop": True,
        "size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side},
        "processor_class": "LlavaNextVideoProcessor",
    }
    save("preprocessor_config.json", {
        **pixels, "do_pad": True, "image_grid_pinpoints": PINPOINTS, "image_processor_type": "LlavaNextImageProcessor",
    })
    save("video_preprocessor_config.json", {**pixels, "video_processor_type": "LlavaNextVideoVideoProcessor"})


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("gguf")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    args = parser.parse_args()
    reader = Reader(args.gguf)
    meta = reader.metadata
    if meta["general.architecture"] != "llama":
        raise SystemExit("not a llama")
    tokens = len(meta["tokenizer.ggml.tokens"])
    vocab = -(-(tokens + 2) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    text = text_config(meta, vocab)
    args.folder.mkdir(parents=True, exist_ok=True)
    save = lambda name, values: (args.folder / name).write_text(json.dumps(values, indent=2) + "\n")
    save("config.json", {
        "architectures": ["LlavaNextVideoForConditionalGeneration"], "model_type": "llava_next_video",
        "text_config": text, "vision_config": VISION, "image_token_index": tokens, "video_token_index": tokens + 1,
        "image_grid_pinpoints": PINPOINTS, "image_seq_length": 4, "video_seq_length": 1,
        "multimodal_projector_bias": True, "projector_hidden_act": "gelu", "spatial_pool_mode": "average",
        "spatial_pool_stride": 2, "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
        "tie_word_embeddings": True, "torch_dtype": args.dtype, "transformers_version": "4.53.3",
    })
    save("generation_config.json", {**special_ids(meta), "transformers_version": "4.53.3"})
    write_processor(args.folder, meta)
    random = np.random.default_rng(SEED)
    tensors = [*vision(text["hidden_size"], random), *language_model(reader, vocab)]
    write_safetensors(args.folder / "model.safetensors", tensors, args.dtype)


if __name__ == "__main__":
    main()
