"""Times Transformers' stages: bf16 with SDPA attention; with --dtype float32 it writes what others are compared with.

Calls the model's parts, not `generate`, so that nothing but arithmetic is timed; of the prompt only the last
position's logits are asked for.
"""

import time

# Loading counts from here: nobody runs a model without these imports.
START = time.perf_counter()

# ruff: noqa: E402
import torch
import transformers
from safetensors.torch import load_file
from timing import arguments, finish, measure
from transformers import LlavaNextVideoForConditionalGeneration


class Stages:
    def __init__(self, model, inputs):
        self.model = model
        self.ids = inputs["input_ids"]
        self.pixels = inputs["pixel_values_videos"].to(model.dtype)
        self.mask = (self.ids == model.config.video_token_index).unsqueeze(-1)

    def vision(self):
        config = self.model.config
        features = self.model.model.get_video_features(
            self.pixels,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
        )
        return torch.cat([feature.flatten(0, 1) for feature in features])

    def merge(self, features):
        embeds = self.model.get_input_embeddings()(self.ids)
        return embeds.masked_scatter(self.mask.expand_as(embeds), features.to(embeds.dtype))

    def prefill(self, features):
        out = self.model(inputs_embeds=self.merge(features), use_cache=True, logits_to_keep=1)
        return out.logits[0, -1].float().numpy(), out.past_key_values

    def step(self, token, cache):
        out = self.model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1].float().numpy(), out.past_key_values


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = LlavaNextVideoForConditionalGeneration.from_pretrained(
        options.model, torch_dtype=getattr(torch, options.dtype), attn_implementation="sdpa"
    ).eval()
    load_s = time.perf_counter() - START
    stages = Stages(model, load_file(options.inputs / "inputs.safetensors"))
    with torch.inference_mode():
        seconds, logits, greedy = measure(stages, options.runs, options.steps)
        if options.output:
            # The decoder's input, for a program that only has a decoder; and a frame's features without pooling.
            options.output.mkdir(parents=True, exist_ok=True)
            stages.merge(stages.vision())[0].float().numpy().tofile(options.output / "embeds.f32")
            tower = model.model.vision_tower(stages.pixels[0, :1], output_hidden_states=True)
            features = model.model.multi_modal_projector(tower.hidden_states[-2][:, 1:])
            features[0].float().numpy().tofile(options.output / "features.f32")
    finish(
        options, seconds, logits, greedy, load_s=load_s, prefill_tokens=stages.ids.shape[1],
        versions={"transformers": transformers.__version__, "torch": torch.__version__},
    )


if __name__ == "__main__":
    main()
