"""What the reference raises in situations a user can get into."""

import copy

import numpy as np
import torch
from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration
from transformers.image_utils import load_image
from transformers.video_utils import load_video

import checkpoints
from functions.store import write_json

CHECKPOINT = "llama-default"
USER = [{"role": "user", "content": [{"type": "text", "text": "Who?"}]}]


def situations(model, processor):
    """(words, call)"""
    picture, clip = load_image("media/rgb-37x53.png"), load_video("media/clip-64x48.mp4")[0]
    image_prompt, video_prompt = "USER: <image>\nWho? ASSISTANT:", "USER: <video>\nWho? ASSISTANT:"
    inputs = processor(text=image_prompt, images=picture, return_tensors="pt")
    ids = inputs["input_ids"]

    def config(**fields):
        return LlavaNextVideoConfig(**{"text_config": model.config.text_config, "vision_config": model.config.vision_config, **fields})

    yield "prompt as long as max_length", lambda: model.generate(**inputs, max_length=ids.shape[1])
    yield "several greedy sequences", lambda: model.generate(**inputs, max_new_tokens=2, num_return_sequences=2, do_sample=False)
    yield "more sequences than beams", lambda: model.generate(**inputs, max_new_tokens=2, num_beams=2, num_return_sequences=3)
    yield "fewer image tokens than features", lambda: model(**{**inputs, "input_ids": ids[:, :-20], "attention_mask": None})
    yield "placeholder removed", lambda: model(**{**inputs, "input_ids": ids.masked_fill(ids == model.config.image_token_id, 5)})
    yield "ids and embeddings", lambda: model(input_ids=ids, inputs_embeds=torch.zeros(1, 3, 32))
    yield "neither ids nor embeddings", lambda: model()
    yield "pixels with embeddings", lambda: model(inputs_embeds=torch.zeros(1, 3, 32), pixel_values=inputs["pixel_values"])
    yield "pixel values of rank 3", lambda: model(**{**inputs, "pixel_values": inputs["pixel_values"][0, 0]})
    yield "wrong tile size", lambda: model(**{**inputs, "pixel_values": torch.zeros(1, 5, 3, 24, 24)})
    yield "unknown strategy", lambda: config(vision_feature_select_strategy="cls")
    yield "unknown pool mode", lambda: LlavaNextVideoForConditionalGeneration(config(spatial_pool_mode="mean"))
    yield "unknown rope type", lambda: LlavaNextVideoForConditionalGeneration(
        config(text_config={**model.config.text_config.to_dict(), "rope_scaling": {"rope_type": "magic", "factor": 2.0}}))
    yield "linear rope without factor", lambda: config(
        text_config={**model.config.text_config.to_dict(), "rope_scaling": {"rope_type": "linear"}})
    yield "num_frames and fps", lambda: processor(text=video_prompt, videos=clip, num_frames=2, fps=1, do_sample_frames=True)
    yield "more frames than there are", lambda: processor(text=video_prompt, videos=clip, num_frames=25, do_sample_frames=True)
    yield "fps without metadata", lambda: processor(text=video_prompt, videos=clip, fps=1, do_sample_frames=True)
    yield "text is not a string", lambda: processor(text=7)
    yield "rows of different length without padding", lambda: processor(text=["a", "a b c"], return_tensors="pt")
    yield "truncation cuts placeholders", lambda: processor(text=image_prompt, images=picture, truncation=True, max_length=20)
    yield "too few images", lambda: processor(text=image_prompt + image_prompt, images=picture)
    yield "continue and generation prompt", lambda: processor.apply_chat_template(
        copy.deepcopy(USER), continue_final_message=True, add_generation_prompt=True)
    yield "missing image file", lambda: processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "path": "media/none.png"}]}], tokenize=True, return_dict=True)
    yield "four-channel array", lambda: processor.image_processor(np.zeros((8, 8, 4), np.uint8))


def outcome(call):
    try:
        with torch.no_grad():
            call()
    except BaseException as error:  # StopIteration and the like too
        return {"type": type(error).__name__, "message": str(error)}
    return {"type": None, "message": None}


def make(folder):
    model, processor = checkpoints.load(CHECKPOINT)
    write_json(
        folder / "errors.json",
        "What 4.53.3 raises for the llama-default checkpoint: type and message (null: nothing is raised). For orientation: the project's "
        "errors need not use the same words, and section 12 of the specification decides differently for some.",
        entries=[{"situation": words, **outcome(call)} for words, call in situations(model, processor)],
    )
