"""Processor outputs of a case, as the reference makes them, with the decisions of the behaviour specification."""

import copy

import torch


def conversations_of(case):
    copied = copy.deepcopy(case["conversations"])
    return copied if case["batched"] else copied[0]


def rendered(processor, case):
    texts = processor.apply_chat_template(conversations_of(case), tokenize=False, **case["template_kwargs"])
    return texts if isinstance(texts, list) else [texts]


def run_processor(processor, case):
    out = processor.apply_chat_template(
        conversations_of(case), tokenize=True, return_dict=True, return_tensors="pt",
        **case["template_kwargs"], **case["processor_kwargs"],
    )
    return {key: value for key, value in out.items()}


def frame_tokens(config):
    """Tokens per frame as the model's pooler makes them."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    return (side // config.spatial_pool_stride) ** 2


def counted_frame_tokens(config):
    """Tokens per frame as the processor of 4.53.3 counts them."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    return side * side // 4


def repeat_video_tokens(row, mask, video_id, wrong, right):
    """Replace each run of video tokens (a multiple of `wrong` long) by one with `right` for each `wrong`."""
    ids, i = [], 0
    kept = [token for token, seen in zip(row, mask) if seen]
    while i < len(kept):
        run = i
        while run < len(kept) and kept[run] == video_id:
            run += 1
        if run == i:
            ids.append(kept[i])
            i += 1
        else:
            ids += [video_id] * ((run - i) // wrong * right)
            i = run
    return ids


def recount_videos(processor, config, out):
    """Decision 12: the count of video placeholders follows the model's pooling."""
    wrong, right = counted_frame_tokens(config), frame_tokens(config)
    if wrong == right or "pixel_values_videos" not in out:
        return out, False
    rows = zip(out["input_ids"].tolist(), out["attention_mask"].tolist())
    ids = [repeat_video_tokens(row, mask, config.video_token_id, wrong, right) for row, mask in rows]
    padded = processor.tokenizer.pad({"input_ids": ids}, padding=True, return_tensors="pt")
    return {**out, "input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"]}, True


def right_padded_with_labels(out, pad_id, media_ids):
    """Move padding to the right; labels are the ids, -100 at padding, at placeholders and at the first third of a row."""
    ids, mask = out["input_ids"], out["attention_mask"]
    new_ids, new_mask = torch.full_like(ids, pad_id), torch.zeros_like(mask)
    labels = torch.full_like(ids, -100)
    for row in range(ids.shape[0]):
        kept = ids[row][mask[row] == 1]
        new_ids[row, : len(kept)], new_mask[row, : len(kept)] = kept, 1
        labels[row, len(kept) // 3 : len(kept)] = kept[len(kept) // 3 :]
    for media in media_ids:
        labels[new_ids == media] = -100
    return {**out, "input_ids": new_ids, "attention_mask": new_mask, "labels": labels}


def make(processor, config, case):
    """(tensors, notes)"""
    out, recounted = recount_videos(processor, config, run_processor(processor, case))
    notes = []
    if recounted:
        notes.append("Video placeholders are counted by (side // stride)^2 per frame (decision 12); 4.53.3 itself counts "
                     "patches // 4 and cannot run this configuration.")
    if case["labels"]:
        out = right_padded_with_labels(out, processor.tokenizer.pad_token_id, [config.image_token_id, config.video_token_id])
    out["input_ids"], out["attention_mask"] = out["input_ids"].contiguous(), out["attention_mask"].contiguous()
    return {key: value.contiguous() for key, value in out.items()}, notes
