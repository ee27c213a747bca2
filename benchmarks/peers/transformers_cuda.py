"""Times Transformers' stages on a GPU: the 7B with random weights in bf16, 32 frames.

Calls the model's parts, not `generate`, so that nothing but arithmetic is timed; of the prompt only the last
position's logits are asked for. Weights are drawn on the GPU, so no file is needed. Prints one JSON object; with
`--compile` also decoding with a static cache under torch.compile, which takes a minute to begin.
"""

import argparse
import json
import statistics
import time

import torch
import transformers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration


def config():
    text = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32064,
        max_position_embeddings=32768, rms_norm_eps=1e-5,
    )
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768,
    )
    return LlavaNextVideoConfig(vision_config=vision, text_config=text, image_token_index=32001, video_token_index=32000)


def build(attention):
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = LlavaNextVideoForConditionalGeneration._from_config(config(), attn_implementation=attention)
    model = model.to_empty(device="cuda").eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(0, 0.02)
        if "norm" in name and name.endswith("weight"):
            parameter.data.fill_(1)
    # Buffers are not drawn: they are what their modules compute.
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            inverse = 1.0 / (10000.0 ** (torch.arange(0, 128, 2, device="cuda").float() / 128))
            module.inv_freq = inverse
            if hasattr(module, "original_inv_freq"):
                module.original_inv_freq = inverse
        if hasattr(module, "position_ids") and module.position_ids is not None:
            module.position_ids = torch.arange(module.position_ids.shape[-1], device="cuda")[None]
    torch.set_default_dtype(torch.float32)
    return model


def median(function, runs):
    times = []
    for run in range(runs + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        if run >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def decode(model, embeds, runs):
    """Seconds of a step that extends a prompt, the token's choice and its way to the host included."""
    out = model.model.language_model(inputs_embeds=embeds, use_cache=True)
    state = {"cache": out.past_key_values, "token": torch.full((embeds.shape[0], 1), 5, device="cuda")}
    del out

    def step():
        hidden = model.model.language_model(
            input_ids=state["token"], past_key_values=state["cache"], use_cache=True
        ).last_hidden_state
        state["token"] = model.lm_head(hidden[:, -1:]).argmax(-1)
        state["token"].tolist()

    return median(step, runs)


def decode_compiled(model, length, runs):
    """The same with a static cache, the decoder compiled with CUDA graphs."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config.text_config, max_cache_len=length + 256)
    embeds = torch.randn(1, length, 4096, dtype=torch.bfloat16, device="cuda") * 0.02
    position = torch.arange(length, device="cuda")
    model.model.language_model(inputs_embeds=embeds, past_key_values=cache, cache_position=position, use_cache=True)

    def one(token, position):
        hidden = model.model.language_model(
            input_ids=token, past_key_values=cache, cache_position=position, position_ids=position[None], use_cache=True
        ).last_hidden_state
        return model.lm_head(hidden[:, -1:]).argmax(-1)

    compiled = torch.compile(one, mode="reduce-overhead", fullgraph=False)
    state = {"token": torch.full((1, 1), 5, device="cuda"), "at": length}

    def step():
        out = compiled(state["token"], torch.tensor([state["at"]], device="cuda"))
        state["token"] = out.clone()
        state["at"] += 1
        state["token"].tolist()

    return median(step, runs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--text-tokens", type=int, default=60)
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--context", type=int, default=1024, help="prompt tokens of each row that decodes")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--save", help="folder for the checkpoint, 14 GB, for others to load")
    options = parser.parse_args()
    start = time.perf_counter()
    model = build(options.attention)
    result = {
        "transformers": transformers.__version__, "torch": torch.__version__, "attention": options.attention,
        "gpu": torch.cuda.get_device_name(), "build_s": time.perf_counter() - start,
    }
    tokens = options.frames * 144 + options.text_tokens
    with torch.inference_mode():
        side = 8192
        a = torch.randn(side, side, dtype=torch.bfloat16, device="cuda")
        b = torch.randn(side, side, dtype=torch.bfloat16, device="cuda")
        result["matmul_tflops"] = 2 * side**3 / median(lambda: a @ b, 9) / 1e12
        del a, b
        pixels = torch.randn(1, options.frames, 3, 336, 336, dtype=torch.bfloat16, device="cuda")

        def vision():
            return model.model.get_video_features(
                pixels, vision_feature_layer=-2, vision_feature_select_strategy="default"
            )

        result["vision_s"] = median(vision, options.runs)
        embeds = torch.randn(1, tokens, 4096, dtype=torch.bfloat16, device="cuda") * 0.02

        def prefill():
            out = model.model.language_model(inputs_embeds=embeds, use_cache=True)
            model.lm_head(out.last_hidden_state[:, -1:])

        result["prefill_tokens"] = tokens
        result["prefill_s"] = median(prefill, options.runs)
        result["decode_s"] = {}
        for batch in map(int, options.batches.split(",")):
            length = tokens if batch == 1 else options.context
            rows = torch.randn(batch, length, 4096, dtype=torch.bfloat16, device="cuda") * 0.02
            result["decode_s"][batch] = decode(model, rows, 20)
            torch.cuda.empty_cache()
        print(json.dumps(result), flush=True)
        if options.save:
            model.save_pretrained(options.save, max_shard_size="5GB")
        if options.compile:
            result["decode_compiled_s"] = decode_compiled(model, tokens, 20)
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
