"""The configurations that are checked in."""

from checkpoints import grid

SHAPES = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]


def vision(side=28, patch=7, layers=3, hidden=32, heads=2, ffn=48, **more):
    return {
        "model_type": "clip_vision_model", "image_size": side, "patch_size": patch, "hidden_size": hidden,
        "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads, "projection_dim": 16, **more,
    }


def text(kind="llama", hidden=32, ffn=48, layers=2, heads=4, kv=4, max_pos=512, **more):
    return {
        "model_type": kind, "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "max_position_embeddings": max_pos, **more,
    }


def top(side, shapes=SHAPES, **more):
    return {"image_grid_pinpoints": grid(side, *shapes), **more}


ALL = {}


def define(name, covers, **spec):
    ALL[name] = {"name": name, "covers": covers, "layout": "hf-4.53", "dtype": "float16", "seed": 1000 + len(ALL), **spec}


define(
    "llama-default",
    "CLIP, average pooling, layer -2, vicuna template, old key layout, Prepend tokenizer; every kind of conversation",
    tokenizer="llama-prepend", template="vicuna", vision=vision(20, 5), text=text(rms_norm_eps=1e-5), top=top(20), cases="full",
)
define(
    "llama-gqa-linear-rope",
    "linear rope scaling, explicit head_dim, grouped heads, tied embeddings, Metaspace tokenizer, legacy chat_template.json",
    tokenizer="llama-metaspace-media", template="vicuna", legacy_template_file=True, dtype="bfloat16",
    vision=vision(14, 7, hidden=24, heads=3, ffn=40, hidden_act="gelu"),
    text=text(hidden=40, heads=4, kv=2, head_dim=12, tie_word_embeddings=True, rope_theta=5000.0,
              rope_scaling={"type": "linear", "factor": 2.0}),
    top=top(14, tie_word_embeddings=True), cases="usual",
)
define(
    "mistral-window",
    "Mistral with a sliding window of 7 (shorter than the sequences), [INST] template without a system role",
    tokenizer="llama-prepend", template="mistral", vision=vision(14, 7), cases="usual", system=False,
    text=text("mistral", kv=2, sliding_window=7, rope_theta=1e6, max_pos=2048, head_dim=8), top=top(14),
)
define(
    "qwen2-windows",
    "Qwen2: biases on q/k/v, sliding window from layer 1 on, tied embeddings, ByteLevel tokenizer, ChatML over several lines",
    tokenizer="qwen2", template="chatml_lines", vision=vision(14, 7), dtype="bfloat16", cases="usual",
    text=text("qwen2", layers=3, kv=2, use_sliding_window=True, sliding_window=9, max_window_layers=1, tie_word_embeddings=True),
    top=top(14, tie_word_embeddings=True),
)
define(
    "llama-yarn-max-pool",
    "yarn with an original length, max pooling with stride 3 on an odd grid (5), gelu_new projector, float32 file",
    tokenizer="llama-metaspace", template="vicuna_bos", vision=vision(15, 3, layers=2, hidden=24, ffn=32), dtype="float32",
    text=text(hidden=24, ffn=40, max_pos=256, rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
    top=top(15, [(1, 2), (2, 1), (2, 2)], spatial_pool_mode="max", spatial_pool_stride=3, projector_hidden_act="gelu_new"),
    cases="usual",
)
define(
    "llama3-rope-conv-pool",
    "llama3 rope, convolution pooler (saved as model.vision_resampler.pool), all vision layers (-1)",
    tokenizer="llama-prepend", template="vicuna", vision=vision(16, 4, layers=2), cases="usual",
    text=text(kv=1, max_pos=1024, mlp_bias=True,
              rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                            "original_max_position_embeddings": 32}),
    top=top(16, [(1, 2), (2, 1), (2, 2)], spatial_pool_mode="conv", spatial_pool_out_channels=32, vision_feature_layer=-1),
)
define(
    "longrope-layer-list",
    "longrope (short and long divisors), vision layers [-1, -2], Unigram tokenizer that cleans up spaces",
    tokenizer="unigram", template="vicuna", vision=vision(14, 7), dtype="bfloat16", cases="usual",
    text=text(max_pos=512, original_max_position_embeddings=48,
              rope_scaling={"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 3.0, 6.0, 11.0]}),
    top=top(14, vision_feature_layer=[-1, -2]),
)
define(
    "dynamic-rope-52-layout",
    "dynamic rope with sequences beyond max_position_embeddings, 4.52+ module names in the file",
    tokenizer="llama-metaspace", template="chatml", vision=vision(14, 7), cases="usual", layout="hf-4.52-modules",
    text=text(max_pos=40, rope_scaling={"rope_type": "dynamic", "factor": 2.0}), top=top(14),
)
define(
    "siglip-full",
    "SigLIP tower without a class token, strategy full, mean and deviation one half, ChatML marks in a LLaMA-like tokenizer",
    tokenizer="chatml-llama", template="chatml", cases="usual", pixels={"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    vision={"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 4, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 3, "num_attention_heads": 4, "vision_use_head": False},
    text=text(), top=top(16, [(1, 2), (2, 1), (2, 2)], vision_feature_select_strategy="full"),
)
define(
    "bf16-sharded-biases",
    "bfloat16 in several shards, attention and MLP biases, projector without bias; also run in bfloat16",
    tokenizer="llama-prepend", template="vicuna", vision=vision(14, 7, hidden=32, heads=4, ffn=48), dtype="bfloat16", shard="50KB",
    text=text(hidden=40, ffn=64, kv=2, layers=3, attention_bias=True, mlp_bias=True, hidden_act="gelu"),
    top=top(14, multimodal_projector_bias=False), cases="usual", also_bf16=True,
)

# Renamed copies: (name, source, layout, words)
COPIES = [
    ("v5-layout", "llama-gqa-linear-rope", "hf-5", "names and config.json spelling of Transformers 5 (rope_parameters, dtype)"),
    ("lmms-lab-layout", "llama-default", "lmms-lab", "tensor names of the research repository, float16"),
]
