"""Write tiny checkpoints the way Hugging Face saves them, and load them back."""

import json
from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    LlavaNextImageProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
)

from templates import NAMED
from tiny_tokenizers import KINDS
from weights import fill

# 4.53.3 names the LLaMA tokenizers only; the Qwen2 and Unigram configurations need their own kind.
LlavaNextVideoProcessor.tokenizer_class = "AutoTokenizer"

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def grid(side, *shapes):
    """Pinpoints (height, width) in tiles."""
    return [[h * side, w * side] for h, w in shapes]


def round_up(value, multiple):
    return -(-value // multiple) * multiple


def model_config(spec, tokenizer):
    text = dict(spec["text"])
    text["vocab_size"] = round_up(len(tokenizer), spec.get("vocab_multiple", 16))
    for key in ("bos", "eos", "pad"):
        text[f"{key}_token_id"] = getattr(tokenizer, f"{key}_token_id")
    return LlavaNextVideoConfig(
        vision_config=dict(spec["vision"]),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        **spec["top"],
    )


def has_class_token(spec):
    """Whether the vision tower has a class token."""
    return spec["vision"].get("model_type", "clip_vision_model") == "clip_vision_model"


def processor(spec, tokenizer):
    side = spec["vision"]["image_size"]
    common = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}, **spec.get("pixels", {})}
    return LlavaNextVideoProcessor(
        video_processor=LlavaNextVideoVideoProcessor(**common),
        image_processor=LlavaNextImageProcessor(image_grid_pinpoints=spec["top"]["image_grid_pinpoints"], **common),
        tokenizer=tokenizer,
        chat_template=NAMED[spec["template"]],
        patch_size=spec["vision"]["patch_size"],
        vision_feature_select_strategy=spec["top"].get("vision_feature_select_strategy", "default"),
        num_additional_image_tokens=1 if has_class_token(spec) else 0,
    )


def save_processor(made, spec, folder):
    made.save_pretrained(folder)
    if spec.get("legacy_template_file"):
        (folder / "chat_template.jinja").unlink()
        legacy = {"chat_template": NAMED[spec["template"]]}
        (folder / "chat_template.json").write_text(json.dumps(legacy, indent=2) + "\n")


def save(spec, folder):
    """Make and save the checkpoint of one configuration."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = KINDS[spec["tokenizer"]]()
    dtype = DTYPES[spec["dtype"]]
    model = LlavaNextVideoForConditionalGeneration(model_config(spec, tokenizer))
    fill(model, spec["seed"], dtype)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        **spec.get("generation", {}),
    )
    for stale in folder.glob("model*"):
        stale.unlink()
    model.to(dtype).save_pretrained(folder, max_shard_size=spec.get("shard", "1GB"))
    save_processor(processor(spec, tokenizer), spec, folder)


def load(folder, dtype=torch.float32, attention="eager"):
    """The model and its processor."""
    model, report = LlavaNextVideoForConditionalGeneration.from_pretrained(
        folder, torch_dtype=dtype, attn_implementation=attention, output_loading_info=True
    )
    problems = {key: value for key, value in report.items() if value}
    assert not problems, (str(folder), problems)
    return model.eval(), LlavaNextVideoProcessor.from_pretrained(folder)
