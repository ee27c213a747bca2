"""Exports a checkpoint for OpenVINO with int8 or int4 weights (groups of 128), as optimum-intel does it.

    python benchmarks/peers/openvino_export.py CHECKPOINT FOLDER --bits 8|4

Needs optimum-intel, nncf, openvino and transformers 4.57.6, the last one that it can export this model with.
Takes several minutes and about 10 GB.
"""

import argparse
import shutil
from pathlib import Path

from optimum.intel import OVModelForVisualCausalLM, OVWeightQuantizationConfig


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bits", type=int, choices=[8, 4], required=True)
    options = parser.parse_args()
    more = {"group_size": 128, "ratio": 1.0, "sym": False} if options.bits == 4 else {}
    quantization = OVWeightQuantizationConfig(bits=options.bits, **more)
    model = OVModelForVisualCausalLM.from_pretrained(
        options.checkpoint, export=True, compile=False, quantization_config=quantization
    )
    # Renamed when complete: what was interrupted does not look usable.
    part = options.folder.with_name(options.folder.name + ".part")
    model.save_pretrained(part)
    if options.folder.exists():
        shutil.rmtree(options.folder)
    part.rename(options.folder)


if __name__ == "__main__":
    main()
