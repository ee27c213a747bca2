"""One forward of the reference, as named tensors."""

import torch

LONG = 24 * 1024  # bytes of logits above which only the tail is kept, unless all are wanted
TAIL = 8


def reset_rope(model):
    """Rotary state as after loading ("dynamic" and "longrope" change it)."""
    rotary = model.model.language_model.rotary_emb
    inv_freq, rotary.attention_scaling = rotary.rope_init_fn(rotary.config, torch.device("cpu"))
    rotary.register_buffer("inv_freq", inv_freq, persistent=False)
    rotary.original_inv_freq = rotary.inv_freq
    rotary.max_seq_len_cached = rotary.original_max_seq_len


@torch.no_grad()
def run(model, inputs, **options):
    reset_rope(model)
    return model(**inputs, use_cache=False, return_dict=True, **options)


def logits_tensors(logits, whole, suffix=""):
    logits = logits.float()
    if not whole and logits.numel() * 4 > LONG and logits.shape[1] > TAIL:
        return {f"logits_tail{suffix}": logits[:, -TAIL:]}
    return {f"logits{suffix}": logits}


def feature_lengths(model, inputs):
    """Features per image and per video."""
    lengths = {"image": [], "video": []}
    with torch.no_grad():
        if "pixel_values" in inputs:
            features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
            lengths["image"] = [len(f) for f in features]
        if "pixel_values_videos" in inputs:
            features = model.get_video_features(inputs["pixel_values_videos"])
            lengths["video"] = [f.shape[0] * f.shape[1] for f in features]
    return lengths


def vision_states(model, inputs):
    from transformers.models.llava_next_video.modeling_llava_next_video import image_size_to_num_patches

    config = model.config
    count = image_size_to_num_patches(inputs["image_sizes"][0], config.image_grid_pinpoints, config.vision_config.image_size)
    with torch.no_grad():
        states = model.model.vision_tower(inputs["pixel_values"][0, :count], output_hidden_states=True).hidden_states
    return {f"vision_hidden_states.{i}": state for i, state in enumerate(states)}


def outputs(model, inputs, wanted=()):
    """(tensors, loss)"""
    out = run(model, inputs, output_hidden_states=True, output_attentions="attentions" in wanted)
    tensors = logits_tensors(out.logits, "logits" in wanted)
    if "loss_only" not in wanted:
        tensors.update({f"hidden_states.{i}": state for i, state in enumerate(out.hidden_states)})
    for name in ("image_hidden_states", "video_hidden_states"):
        if getattr(out, name) is not None and "loss_only" not in wanted:
            tensors[name] = getattr(out, name)
    if out.loss is not None:
        tensors["loss"] = out.loss
    if "attentions" in wanted:
        tensors.update({f"attentions.{i}": weights for i, weights in enumerate(out.attentions)})
    if "logits_keep_3" in wanted:
        tensors["logits_keep_3"] = run(model, inputs, logits_to_keep=3).logits
    if "vision_hidden_states" in wanted:
        tensors.update(vision_states(model, inputs))
    for name, tensor in tensors.items():
        assert torch.isfinite(tensor).all(), name
    return {name: tensor.float().contiguous() for name, tensor in tensors.items()}, None if out.loss is None else out.loss.item()


def bf16_logits(model, inputs, wanted=()):
    tensors = logits_tensors(run(model, inputs).logits, "logits" in wanted, "_bf16")
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
