"""Write a checkpoint with the 7B's dimensions, four text layers and seeded random weights, about 2.8 GB.

    python benchmarks/make_checkpoint.py FOLDER [--text-layers N] [--seed N]

Speed does not depend on what the weights say, and four layers measure what one layer costs; the rest of the
7B is more of the same. Everything else is complete, so that Transformers, optimum-intel and `lnv` open it as
they would a published one: configuration, generation configuration, processors, chat template, a tokenizer
(bytes and made-up words; nothing of LLaMA's vocabulary).

Needs torch and Transformers 4.53.3 (the reference). Peak memory about 6 GB.
"""

import argparse
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import (
    GenerationConfig,
    LlamaTokenizerFast,
    LlavaNextImageProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
)
from transformers.modeling_utils import no_init_weights

WORDS = 32000
VIDEO, IMAGE, PAD = WORDS, WORDS + 1, WORDS + 2
VOCABULARY = 32064
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>\\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def tokenizer():
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁"]
    pieces += [f"▁w{i}" for i in range(WORDS - len(pieces))]
    backend = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made = LlamaTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", padding_side="left", model_max_length=4096, legacy=True,
    )
    made.add_tokens([AddedToken(t, special=True, normalized=False) for t in ("<video>", "<image>")])
    made.add_special_tokens({"pad_token": AddedToken("<pad>", special=True, normalized=False)})
    ids = made.convert_tokens_to_ids(["<video>", "<image>", "<pad>"])
    assert ids == [VIDEO, IMAGE, PAD], ids
    return made


def configuration(text_layers):
    return LlavaNextVideoConfig(
        text_config={
            "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": text_layers,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": VOCABULARY, "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD, "torch_dtype": "bfloat16",
        },
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768, "hidden_act": "quick_gelu",
        },
        image_token_index=IMAGE, video_token_index=VIDEO, image_grid_pinpoints=PINPOINTS, torch_dtype="bfloat16",
        # What a text, an image and a video of eight frames take; optimum-intel reads them.
        image_seq_length=576, video_seq_length=288, tie_word_embeddings=False,
    )


def fill(model, seed):
    """Norms as if untrained, everything else normal; each tensor from its own seed, so order does not matter."""
    with torch.no_grad():
        for number, (name, tensor) in enumerate(model.named_parameters()):
            if "norm" in name:
                tensor.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            generator = torch.Generator().manual_seed(seed * 100_003 + number)
            tensor.normal_(0.0, 0.02, generator=generator)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text-layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    folder = options.folder
    if (folder / "config.json").exists():
        print(f"{folder} has a checkpoint already", file=sys.stderr)
        return
    torch.set_default_dtype(torch.bfloat16)
    with no_init_weights():
        model = LlavaNextVideoForConditionalGeneration(configuration(options.text_layers))
    fill(model, options.seed)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=PAD)
    sides = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    processor = LlavaNextVideoProcessor(
        video_processor=LlavaNextVideoVideoProcessor(**sides),
        image_processor=LlavaNextImageProcessor(image_grid_pinpoints=PINPOINTS, **sides),
        tokenizer=tokenizer(), chat_template=TEMPLATE, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    # config.json is written last: what was interrupted does not look complete.
    model.save_pretrained(folder.with_name(folder.name + ".part"), max_shard_size="5GB")
    for file in sorted(folder.with_name(folder.name + ".part").iterdir(), key=lambda f: f.name == "config.json"):
        file.rename(folder / file.name)
    folder.with_name(folder.name + ".part").rmdir()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{folder}: {parameters / 1e9:.2f} G parameters", file=sys.stderr)


if __name__ == "__main__":
    main()
