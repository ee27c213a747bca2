"""Other spellings of a saved checkpoint: the same values under the names other releases use."""

import json
import re
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

RULES = {
    # Module names of Transformers 4.52 and later, as a plain state dict has them.
    "hf-4.52-modules": [
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^(vision_tower|multi_modal_projector|image_newline|vision_resampler)", r"model.\1"),
    ],
    # As 5.x saves: the vision model's own level is gone.
    "hf-5": [(r"^vision_tower\.vision_model\.", "vision_tower.")],
    # The research repository.
    "lmms-lab": [
        (r"^language_model\.model\.", "model."),
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^vision_tower\.vision_model\.", "model.vision_tower.vision_tower.vision_model."),
        (r"^multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
        (r"^multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
        (r"^image_newline", "model.image_newline"),
    ],
}


def rename(name, layout):
    for pattern, replacement in RULES[layout]:
        renamed = re.sub(pattern, replacement, name)
        if renamed != name:
            return renamed
    return name


def rename_tensors(folder, layout):
    """Rename in a single-file checkpoint."""
    path = Path(folder) / "model.safetensors"
    with safe_open(path, "pt") as stored:
        metadata = stored.metadata()
    tensors = {rename(name, layout): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata)


def spell_config_as_5x(folder):
    """`dtype` for `torch_dtype`, `rope_parameters` for `rope_theta` and `rope_scaling`."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        if "torch_dtype" in part:
            part["dtype"] = part.pop("torch_dtype")
    text = config["text_config"]
    scaling = text.pop("rope_scaling", None) or {"rope_type": "default"}
    scaling.pop("type", None)
    text["rope_parameters"] = {"rope_theta": text.pop("rope_theta"), **scaling}
    config["transformers_version"] = "5.0.0"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def copy_checkpoint(source, target):
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    for path in Path(source).iterdir():
        if path.name != "cases.json" and not re.search(r"\.(in|out)puts\.safetensors$", path.name):
            shutil.copy(path, target / path.name)
