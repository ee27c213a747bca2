"""Times OpenVINO's stages on what openvino_export.py wrote, with the runtime alone and its default settings.

Of the prompt only the last position's logits are computed, as OpenVINO GenAI arranges it: the exported decoder
would compute all of them, a sixth more work with four layers.
"""

import time

# Loading counts from here.
START = time.perf_counter()

# ruff: noqa: E402
import numpy as np
import openvino as ov
from openvino import opset13 as ops
from safetensors.numpy import load_file
from timing import arguments, finish, measure


def keep_last_position(model):
    """Puts a slice of the last position before the output matrix; says whether it found the place."""
    result = next(r for r in model.get_results() if "logits" in r.input_value(0).get_names())
    node = result.input_value(0).get_node()
    while node.get_type_name() != "MatMul":
        if len(node.inputs()) != 1 and node.get_type_name() not in ("Add", "Multiply", "Divide"):
            return False
        node = node.input_value(0).get_node()
    last = ops.slice(
        node.input_value(0), ops.constant(np.array([-1])), ops.constant(np.array([np.iinfo(np.int64).max])),
        ops.constant(np.array([1])), ops.constant(np.array([1])),
    )
    node.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()
    return True


class Stages:
    def __init__(self, folder, inputs, threads):
        core = ov.Core()
        config = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}

        def compiled(model):
            return core.compile_model(model, "CPU", config)

        def part(name):
            return compiled(folder / f"openvino_{name}.xml").create_infer_request()

        self.tower, self.pooler = part("vision_embeddings_model"), part("vision_resampler_model")
        self.projector, self.text = part("multi_modal_projector_model"), part("text_embeddings_model")
        decoder = core.read_model(folder / "openvino_language_model.xml")
        self.sliced = keep_last_position(decoder)
        decoder = compiled(decoder)
        self.precision = decoder.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        self.group = decoder.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE")
        self.cache_type = decoder.get_property("KV_CACHE_PRECISION").get_type_name()
        self.names = {name for port in decoder.inputs for name in port.get_names()}
        self.decoder = decoder.create_infer_request()
        self.ids = inputs["input_ids"]
        self.pixels = inputs["pixel_values_videos"][0]

    @staticmethod
    def call(request, value):
        request.infer([value], share_inputs=True)
        return request.get_output_tensor(0).data

    def vision(self):
        features = self.call(self.projector, self.call(self.pooler, self.call(self.tower, self.pixels)))
        return features.reshape(-1, features.shape[-1])

    def decode(self, embeds, past):
        count = embeds.shape[1]
        inputs = {
            "inputs_embeds": embeds, "attention_mask": np.ones((1, past + count), np.int64),
            "position_ids": np.arange(past, past + count)[None], "beam_idx": np.zeros(1, np.int32),
        }
        self.decoder.infer({k: v for k, v in inputs.items() if k in self.names}, share_inputs=True)
        return self.decoder.get_tensor("logits").data[0, -1].astype(np.float32), past + count

    def prefill(self, features):
        embeds = self.call(self.text, self.ids).copy()
        # The placeholders' id stands between the text's.
        embeds[0, np.flatnonzero(self.ids[0] == self.placeholder)] = features
        self.decoder.reset_state()
        return self.decode(embeds, 0)

    def step(self, token, past):
        return self.decode(self.call(self.text, np.array([[token]])), past)


def main():
    parser = arguments(__doc__.splitlines()[0])
    options = parser.parse_args()
    inputs = load_file(options.inputs / "inputs.safetensors")
    stages = Stages(options.model, inputs, options.threads)
    stages.placeholder = np.bincount(inputs["input_ids"][0]).argmax()
    load_s = time.perf_counter() - START
    seconds, logits, greedy = measure(stages, options.runs, options.steps)
    finish(
        options, seconds, logits, greedy, load_s=load_s, prefill_tokens=inputs["input_ids"].shape[1],
        versions={"openvino": ov.__version__},
        notes=[
            f"precision {stages.precision}, activations in groups of {stages.group}, cache {stages.cache_type}",
            "logits of the last position only" if stages.sliced else "logits of all positions: no place for a slice found",
        ],
    )


if __name__ == "__main__":
    main()
