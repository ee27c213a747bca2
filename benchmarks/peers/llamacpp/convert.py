"""Writes a checkpoint's decoder and vision tower as two GGUF files for llama.cpp: text-bf16.gguf, mmproj-f16.gguf.

    python benchmarks/peers/llamacpp/convert.py CHECKPOINT FOLDER

llama.cpp's own converter knows no LLaVA-NeXT-Video, so this is ours; the names and the order of the rotary
columns are its format's. It writes no vocabulary: the driver passes embeddings and token ids. Only the Llama
decoder and the CLIP tower of make_checkpoint.py are handled. Needs gguf, numpy, torch and safetensors.
"""

import argparse
import json
from pathlib import Path

import gguf
import torch
from safetensors import safe_open

TEXT_LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}
VISION_LAYER = {
    "layer_norm1": "ln1", "layer_norm2": "ln2", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.out_proj": "attn_out", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down",
}


class Tensors:
    """A checkpoint's tensors by name, whatever prefix its layout has."""

    def __init__(self, folder):
        self.files = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = safe_open(path, "pt")
            self.files.update({self.plain(name): (file, name) for name in file.keys()})

    @staticmethod
    def plain(name):
        for prefix in ("model.language_model.", "language_model.model.", "language_model.", "model."):
            name = name.removeprefix(prefix)
        return name

    def get(self, name):
        file, stored = self.files[name]
        return file.get_tensor(stored)


def add_bf16(writer, name, tensor):
    data = tensor.to(torch.bfloat16).contiguous()
    writer.add_tensor(
        name, data.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16,
    )


def add(writer, name, tensor, matrix):
    """Matrices in `matrix` type, vectors in f32, as llama.cpp's own converter does."""
    if tensor.dim() < 2:
        writer.add_tensor(name, tensor.float().numpy())
    elif matrix == "bf16":
        add_bf16(writer, name, tensor)
    else:
        writer.add_tensor(name, tensor.to(torch.float16).numpy())


def interleave(weight, heads):
    """Rotary pairs side by side, as this architecture of llama.cpp has them, instead of half a head apart."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_text(config, tensors, path):
    text = config["text_config"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(text["vocab_size"])
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(text["num_key_value_heads"])
    writer.add_rope_dimension_count(text["head_dim"])
    writer.add_rope_freq_base(text["rope_theta"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")
    add(writer, "token_embd.weight", tensors.get("embed_tokens.weight"), "bf16")
    for layer in range(text["num_hidden_layers"]):
        for ours, theirs in TEXT_LAYER.items():
            weight = tensors.get(f"layers.{layer}.{ours}.weight")
            if theirs == "attn_q":
                weight = interleave(weight, text["num_attention_heads"])
            if theirs == "attn_k":
                weight = interleave(weight, text["num_key_value_heads"])
            add(writer, f"blk.{layer}.{theirs}.weight", weight, "bf16")
    add(writer, "output_norm.weight", tensors.get("norm.weight"), "bf16")
    add(writer, "output.weight", tensors.get("lm_head.weight"), "bf16")
    finish(writer)


def write_vision(config, tensors, path):
    vision = config["vision_config"]
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    # Neither flag: quick_gelu, CLIP's.
    writer.add_bool("clip.use_gelu", False)
    writer.add_uint32("clip.vision.image_size", vision["image_size"])
    writer.add_uint32("clip.vision.patch_size", vision["patch_size"])
    writer.add_uint32("clip.vision.embedding_length", vision["hidden_size"])
    writer.add_uint32("clip.vision.feed_forward_length", vision["intermediate_size"])
    writer.add_uint32("clip.vision.projection_dim", vision["projection_dim"])
    writer.add_uint32("clip.vision.attention.head_count", vision["num_attention_heads"])
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", vision["layer_norm_eps"])
    # It stops before the last layer by itself.
    writer.add_uint32("clip.vision.block_count", vision["num_hidden_layers"])
    writer.add_array("clip.vision.image_mean", [0.0, 0.0, 0.0])
    writer.add_array("clip.vision.image_std", [1.0, 1.0, 1.0])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    base = "vision_tower.vision_model"
    writer.add_tensor("v.class_embd", tensors.get(f"{base}.embeddings.class_embedding").float().numpy())
    # A convolution: it has no bf16 one.
    writer.add_tensor("v.patch_embd.weight", tensors.get(f"{base}.embeddings.patch_embedding.weight").to(torch.float16).numpy())
    writer.add_tensor("v.position_embd.weight", tensors.get(f"{base}.embeddings.position_embedding.weight").float().numpy())
    for kind in ("weight", "bias"):
        add(writer, f"v.pre_ln.{kind}", tensors.get(f"{base}.pre_layrnorm.{kind}"), "f16")
        for layer in range(vision["num_hidden_layers"]):
            for ours, theirs in VISION_LAYER.items():
                add(writer, f"v.blk.{layer}.{theirs}.{kind}", tensors.get(f"{base}.encoder.layers.{layer}.{ours}.{kind}"), "f16")
        add(writer, f"mm.0.{kind}", tensors.get(f"multi_modal_projector.linear_1.{kind}"), "f16")
        add(writer, f"mm.2.{kind}", tensors.get(f"multi_modal_projector.linear_2.{kind}"), "f16")
    finish(writer)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((options.checkpoint / "config.json").read_text())
    tensors = Tensors(options.checkpoint)
    for write, name in ((write_text, "text-bf16.gguf"), (write_vision, "mmproj-f16.gguf")):
        part = options.folder / f"{name}.part"
        write(config, tensors, part)
        part.rename(options.folder / name)


if __name__ == "__main__":
    main()
