"""One fresh random configuration with cases: python tools/golden/random_case.py --seed N --out DIR

DIR gets the same form as testdata/golden: DIR/media/ and DIR/random-N/ (paths in cases.json are relative to DIR).
"""

import argparse
import os
from fractions import Fraction
from pathlib import Path

import versions

versions.require_pinned()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

import layouts  # noqa: E402
import media  # noqa: E402
import write_cases  # noqa: E402
from checkpoints import grid  # noqa: E402
from conversations import SYSTEM, assistant, case, image, text, user, video  # noqa: E402
from corpus import LINES  # noqa: E402


class Draw:
    """Random choices as plain Python values."""

    def __init__(self, seed):
        self.rng = np.random.default_rng([77, seed])

    def one(self, options):
        return options[int(self.rng.integers(len(options)))]

    def between(self, low, high):
        return int(self.rng.integers(low, high + 1))

    def chance(self, share):
        return bool(self.rng.random() < share)

    def real(self, low, high):
        return round(float(self.rng.uniform(low, high)), 3)


def rope(draw, head_dim, max_pos):
    """(rope_scaling, further text fields)"""
    kind = draw.one(["none", "linear", "dynamic", "yarn", "llama3", "longrope"])
    factor = draw.real(1.5, 6.0)
    if kind == "none":
        return None, {}
    if kind == "linear":
        return {draw.one(["type", "rope_type"]): "linear", "factor": factor}, {}
    if kind == "dynamic":
        return {"rope_type": "dynamic", "factor": factor}, {"max_position_embeddings": draw.between(24, 90)}
    if kind == "yarn":
        scaling = {"rope_type": "yarn", "factor": factor, "beta_fast": draw.real(8, 40), "beta_slow": draw.real(0.5, 2)}
        return scaling | ({"original_max_position_embeddings": draw.between(16, 128)} if draw.chance(0.5) else {}), {}
    if kind == "llama3":
        low = draw.real(0.5, 2.0)
        return {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": low + draw.real(1, 4),
                "original_max_position_embeddings": draw.between(16, 128)}, {}
    short = [draw.real(1, 1.5) for _ in range(head_dim // 2)]
    long = [draw.real(1, 20) for _ in range(head_dim // 2)]
    return {"rope_type": "longrope", "short_factor": short, "long_factor": long}, {"original_max_position_embeddings": draw.between(24, 120)}


def text_config(draw):
    kind = draw.one(["llama", "llama", "mistral", "qwen2"])
    kv, groups, layers = draw.between(1, 3), draw.between(1, 3), draw.between(1, 3)
    head_dim = 2 * draw.between(3, 8)
    hidden = kv * groups * head_dim  # Qwen2 knows no head_dim of its own
    if kind != "qwen2" and draw.chance(0.4):
        hidden = 8 * draw.between(3, 7)
    scaling, more = rope(draw, head_dim, 512)
    fields = {
        "model_type": kind, "hidden_size": hidden, "intermediate_size": 8 * draw.between(3, 10), "num_hidden_layers": layers,
        "num_attention_heads": kv * groups, "num_key_value_heads": kv, "max_position_embeddings": 512,
        "rope_theta": draw.one([500.0, 10000.0, 1e6]), "rms_norm_eps": draw.one([1e-5, 1e-6]), "tie_word_embeddings": draw.chance(0.3),
        "hidden_act": draw.one(["silu", "silu", "gelu", "gelu_pytorch_tanh"]), **more,
    }
    if scaling is not None:
        fields["rope_scaling"] = scaling
    if kind != "qwen2":
        fields["head_dim"] = head_dim
    if kind == "llama":
        fields |= {"attention_bias": draw.chance(0.3), "mlp_bias": draw.chance(0.3)}
    if kind == "mistral":
        fields["sliding_window"] = draw.one([None, draw.between(3, 40)])
    if kind == "qwen2" and draw.chance(0.6):
        fields |= {"use_sliding_window": True, "sliding_window": draw.between(3, 40), "max_window_layers": draw.between(0, layers)}
    return fields


def vision_config(draw):
    patch, side = draw.between(2, 7), draw.between(2, 5)
    heads = draw.between(1, 4)
    fields = {
        "image_size": patch * side, "patch_size": patch, "hidden_size": 4 * heads * draw.between(1, 3), "num_attention_heads": heads,
        "intermediate_size": 8 * draw.between(2, 8), "num_hidden_layers": draw.between(2, 4),
    }
    if draw.chance(0.2):
        return {"model_type": "siglip_vision_model", "vision_use_head": draw.chance(0.5), **fields}
    activation = draw.one(["quick_gelu", "quick_gelu", "gelu"])
    return {"model_type": "clip_vision_model", "projection_dim": 16, "hidden_act": activation, **fields}


def top_config(draw, vision, tied):
    side = vision["image_size"] // vision["patch_size"]
    shapes = [(h, w) for h in range(1, 4) for w in range(1, 4) if 1 < h * w <= 4]
    picked = [shapes[i] for i in draw.rng.permutation(len(shapes))[: draw.between(1, len(shapes))]]
    mode = draw.one(["average", "average", "max", "conv"])
    layers = vision["num_hidden_layers"]
    single = draw.between(-layers, -1)
    several = [draw.between(-layers, -1) for _ in range(draw.between(1, 3))]
    top = {
        "image_grid_pinpoints": grid(vision["image_size"], *picked),
        "spatial_pool_mode": mode,
        "spatial_pool_stride": draw.between(1, min(3, side)),
        "vision_feature_layer": several if mode != "conv" and draw.chance(0.3) else single,
        "vision_feature_select_strategy": "full" if vision["model_type"].startswith("siglip") else "default",
        "multimodal_projector_bias": draw.chance(0.8),
        "projector_hidden_act": draw.one(["gelu", "gelu", "gelu_new", "silu"]),
        "tie_word_embeddings": tied,
    }
    return top | ({"spatial_pool_out_channels": vision["hidden_size"]} if mode == "conv" else {})


def random_spec(draw, seed):
    vision, words = vision_config(draw), text_config(draw)
    tokenizer = "qwen2" if words["model_type"] == "qwen2" else draw.one(
        ["llama-prepend", "llama-metaspace", "llama-metaspace-media", "chatml-llama", "unigram"])
    families = {"qwen2": ["chatml", "chatml_lines"], "chatml-llama": ["chatml", "chatml_lines"]}
    layout = draw.one(["hf-4.53", "hf-4.53", "hf-4.52-modules", "hf-5", "lmms-lab"])
    top = top_config(draw, vision, words["tie_word_embeddings"])
    if layout == "lmms-lab" and top["spatial_pool_mode"] == "conv":
        layout = "hf-4.53"
    return {
        "name": f"random-{seed}", "covers": f"random configuration of seed {seed}", "seed": 500_000 + seed, "layout": layout,
        "vision": vision, "text": words, "top": top, "tokenizer": tokenizer,
        "template": draw.one(families.get(tokenizer, ["vicuna", "mistral", "vicuna_bos"])),
        "legacy_template_file": draw.chance(0.3),
        "dtype": draw.one(["float32", "float16", "bfloat16"]),
        "shard": draw.one(["1GB", "40KB"]) if layout == "hf-4.53" else "1GB",
        "pixels": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if draw.chance(0.3) else {},
        "vocab_multiple": draw.one([1, 16, 64]),
    }


def write_media(draw, seed):
    """Fresh pictures and clips: (image names, video names)."""
    folder = Path("media")
    folder.mkdir(parents=True, exist_ok=True)
    images, videos = [], []
    for i in range(5):
        height, width = draw.between(4, 150), draw.between(4, 150)
        name, options = draw.one([(f"random-{seed}-{i}.png", {}), (f"random-{seed}-{i}.jpg", {"quality": draw.between(50, 95)})])
        media.rgb(height, width, 9000 + 10 * seed + i, noise=draw.real(0, 20)).save(folder / name, **options)
        images.append(name)
    for i in range(3):
        name = f"random-{seed}-{i}.mp4"
        tags = draw.one([{}, {}, {"colorspace": 1, "range": 1}, {"colorspace": 6, "range": 1}, {"colorspace": 1, "range": 2}])
        media.write_clip(folder / name, 2 * draw.between(9, 50), 2 * draw.between(9, 50), draw.between(4, 30),
                         Fraction(draw.between(4, 30)), {"bf": str(draw.between(0, 3))}, tags, 9000 + 10 * seed + i)
        videos.append(name)
    return images, videos


def words(draw):
    parts = draw.one(LINES).split(" ")
    start = draw.between(0, max(0, len(parts) - 2))
    return " ".join(parts[start : start + draw.between(1, 8)])


def random_user(draw, images, videos):
    parts = [text(words(draw))]
    if draw.chance(0.5):
        parts += [image(draw.one(images)) for _ in range(draw.between(1, 2))]
    if draw.chance(0.35):
        parts += [video(draw.one(videos)) for _ in range(draw.between(1, 2))]
    return user(*[parts[i] for i in draw.rng.permutation(len(parts))])


def random_conversation(draw, images, videos, system):
    turns = [SYSTEM] if system and draw.chance(0.2) else []
    for _ in range(draw.between(0, 1)):
        turns += [random_user(draw, images, videos), assistant(words(draw))]
    return turns + [random_user(draw, images, videos)]


def random_cases(draw, spec, images, videos):
    system = spec["template"] != "mistral"
    one = [user(image(images[0]), text(words(draw)))]
    clip = [user(video(videos[0]), text(words(draw)))]
    frames = {"num_frames": draw.between(1, 4)}
    cases = [
        case("text", [user(text(words(draw)))], generate=["greedy", "beam3"], tensors=["logits", "attentions", "logits_keep_3"]),
        case("image", one, generate=["greedy", "greedy-eos", "beam3"], tensors=["vision_hidden_states"]),
        case("video", clip, processor=frames, generate=["greedy", "beam3"]),
        case("labels", one, [user(text(words(draw)))], labels=True),
    ]
    for i in range(3):
        rows = [random_conversation(draw, images, videos, system) for _ in range(draw.between(1, 3))]
        penalty = draw.one(["greedy-penalty", "greedy-no-repeat", "beam2-penalty", "beam4-early", "beam3-eos"])
        cases.append(case(f"mixed-{i}", *rows, processor=frames, generate=["greedy", "beam3", penalty]))
    return cases


def make(seed, out):
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(out)
    draw = Draw(seed)
    spec = random_spec(draw, seed)
    images, videos = write_media(draw, seed)
    folder = Path(spec["name"])
    write_cases.write_robust(folder, spec, random_cases(draw, spec, images, videos), rename=False)
    if spec["layout"] != "hf-4.53":
        layouts.rename_tensors(folder, spec["layout"])
    if spec["layout"] == "hf-5":
        layouts.spell_config_as_5x(folder)
    return spec


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    spec = make(arguments.seed, arguments.out)
    print(spec["name"], spec["text"]["model_type"], spec["vision"]["model_type"], spec["layout"], spec["template"])


if __name__ == "__main__":
    main()
