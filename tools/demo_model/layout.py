"""The checkpoint's plain Hugging Face layout: configs, processors, tokenizer."""

import json
import re
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

from catalogue import all_text

SIDE, PATCH = 96, 12
GRID = SIDE // PATCH
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<video>", "<image>")
PAD, BOS, EOS, UNK, VIDEO, IMAGE = range(6)
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]

# The template of the vicuna family: media first, then the text.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' ' }}{% endfor %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def build_tokenizer():
    words = sorted({w for text in all_text() for w in re.findall(r"\w+|[^\w\s]+", text.lower())})
    vocab = {w: i for i, w in enumerate([*SPECIAL, *words])}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tok.normalizer = normalizers.Lowercase()
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    tok.add_special_tokens(list(SPECIAL))
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    return tok


def build_config(vocab_size):
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=5, num_attention_heads=4, image_size=SIDE,
        patch_size=PATCH, projection_dim=128, hidden_act="quick_gelu",
    )
    text = LlamaConfig(
        vocab_size=vocab_size, hidden_size=192, intermediate_size=512, num_hidden_layers=5, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=2048, rms_norm_eps=1e-5, bos_token_id=BOS, eos_token_id=EOS,
        pad_token_id=PAD, tie_word_embeddings=False, head_dim=32,
    )
    return LlavaNextVideoConfig(
        vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_index=IMAGE, video_token_index=VIDEO,
        projector_hidden_act="gelu", vision_feature_select_strategy="default", vision_feature_layer=-2,
        image_grid_pinpoints=PINPOINTS, tie_word_embeddings=False, spatial_pool_mode="average", spatial_pool_stride=2,
        image_seq_length=GRID * GRID, video_seq_length=GRID * GRID // 4, pad_token_id=PAD, bos_token_id=BOS,
        eos_token_id=EOS,
    )


def build_model(vocab_size):
    return LlavaNextVideoForConditionalGeneration(build_config(vocab_size))


def write_json(path, value):
    Path(path).write_text(json.dumps(value, indent=2) + "\n")


def write_processors(out):
    common = {
        "do_normalize": True, "do_rescale": True, "do_resize": True, "do_convert_rgb": True, "image_mean": MEAN,
        "image_std": STD, "resample": 3, "rescale_factor": 1 / 255, "processor_class": "LlavaNextVideoProcessor",
    }
    square = {"height": SIDE, "width": SIDE}
    write_json(out / "preprocessor_config.json", {
        **common, "image_processor_type": "LlavaNextImageProcessor", "do_center_crop": True, "do_pad": True,
        "crop_size": square, "size": {"shortest_edge": SIDE}, "image_grid_pinpoints": PINPOINTS,
    })
    # The whole frame squeezed to a square, not its middle: nothing that happens
    # at the sides of a wide clip is cut off.
    write_json(out / "video_preprocessor_config.json", {
        **common, "video_processor_type": "LlavaNextVideoVideoProcessor", "do_center_crop": False,
        "do_sample_frames": False, "size": square, "crop_size": square,
    })
    write_json(out / "processor_config.json", {
        "image_token": "<image>", "video_token": "<video>", "num_additional_image_tokens": 1, "patch_size": PATCH,
        "processor_class": "LlavaNextVideoProcessor", "vision_feature_select_strategy": "default",
    })
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def write_tokenizer(out):
    build_tokenizer().save(str(out / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    added = {
        str(i): {"content": s, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        for i, s in enumerate(SPECIAL)
    }
    write_json(out / "tokenizer_config.json", {
        **names, "added_tokens_decoder": added, "add_bos_token": True, "add_eos_token": False,
        "clean_up_tokenization_spaces": False, "model_max_length": 2048, "padding_side": "left",
        "processor_class": "LlavaNextVideoProcessor", "tokenizer_class": "LlamaTokenizerFast", "legacy": False,
        "extra_special_tokens": {"image_token": "<image>", "video_token": "<video>"}, "image_token": "<image>",
        "video_token": "<video>",
    })
    write_json(out / "special_tokens_map.json", {**names, "image_token": "<image>", "video_token": "<video>"})


def write_checkpoint(model, out):
    """Everything `from_pretrained` needs, weights in bfloat16."""
    import copy

    import torch

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    model = copy.deepcopy(model).to(torch.bfloat16)
    model.generation_config.update(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=40)
    model.save_pretrained(out, safe_serialization=True)
    write_processors(out)
    write_tokenizer(out)
