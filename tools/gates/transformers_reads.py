"""Does Transformers load what `lnv quantize` writes, and agree? python transformers_reads.py LNV BASE FOLDER

LNV is the program, BASE testdata/bitsandbytes/base, FOLDER an empty place. For each format both quantise the same
checkpoint; the weights that Transformers reads must be those that it makes itself, bit for bit, and its logits of
the two must be equal; ours must be near to both.
"""

import os
import subprocess
import sys
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import bitsandbytes as bnb  # noqa: E402
import torch
import transformers
from bitsandbytes import functional
from bitsandbytes.backends.default import ops as default_backend
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, LlavaNextVideoForConditionalGeneration

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
FORMATS = {
    "nf4": (["--to", "nf4"], NF4),
    "nf4-nested": (["--to", "nf4", "--double-quant"], {**NF4, "bnb_4bit_use_double_quant": True}),
    "fp4": (["--to", "fp4"], {"load_in_4bit": True}),
    "int8": (["--to", "int8"], {"load_in_8bit": True}),
}
# bitsandbytes' native code takes wrong scales where rows are no whole blocks; its generic code does not.
GENERIC = torch.library.Library("bitsandbytes", "IMPL")


def dequantise_generically(codes, absmax, blocksize, quant_type, shape, dtype):
    table = functional.get_4bit_type(quant_type, device="cpu")
    flat = codes.view(torch.uint8).reshape(-1)
    return default_backend._dequantize_4bit_compute(flat, absmax, table, blocksize, shape, dtype)


LINEARS = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)


def load(folder, **options):
    model, report = LlavaNextVideoForConditionalGeneration.from_pretrained(
        folder, torch_dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **options
    )
    problems = {key: value for key, value in report.items() if value}
    assert not problems, (str(folder), problems)
    for module in model.modules():
        # Another result on another machine.
        module.support_avx512bf16_for_cpu = False
    return model.eval()


def values(module):
    if isinstance(module, bnb.nn.Linear8bitLt):
        return functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    return functional.dequantize_4bit(module.weight.data, module.weight.quant_state)


def run(*words):
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def apart(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def main(lnv, base, folder):
    GENERIC.impl("dequantize_4bit", dequantise_generically, "CPU", allow_override=True)
    transformers.logging.set_verbosity_error()
    inputs = load_file(base / "batch.inputs.safetensors")
    shown = inputs["attention_mask"].bool()
    for name, (options, arguments) in FORMATS.items():
        written, out = folder / name, folder / f"{name}.safetensors"
        compute = [] if name == "int8" else ["--compute-dtype", "f32"]
        run(lnv, "quantize", "--model", base, *options, *compute, "--dtype", "f32", "--output", written)
        run(lnv, "forward", "--model", written, "--inputs", base / "batch.inputs.safetensors", "--output", out)
        theirs, ours = load(base, quantization_config=BitsAndBytesConfig(**arguments)), load(written)
        compared = 0
        for path, module in theirs.named_modules():
            if isinstance(module, LINEARS):
                own = values(ours.get_submodule(path))
                equal = torch.equal(values(module), own)
                # Theirs subtracts a mean of the scales whose last bit hangs on the threads.
                near = name == "nf4-nested" and apart(own, values(module)) < 1e-6
                assert equal or near, (name, path)
                compared += 1
        with torch.no_grad():
            theirs, ours = (model(**inputs).logits[shown] for model in (theirs, ours))
        lnv_logits = load_file(out)["logits"][shown]
        figures = apart(ours, theirs), apart(lnv_logits, theirs)
        print(f"{name}: {compared} weights equal; Transformers' logits of both differ by {figures[0]:.1e}, ours by {figures[1]:.1e}")
        assert compared >= 30 and figures[0] < (1e-4 if name == "nf4-nested" else 1e-6), name
        # LLM.int8() rounds activations, and a rounding that falls otherwise is not less exact.
        assert figures[1] < (0.15 if name == "int8" else 1e-4), name


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:4]))
