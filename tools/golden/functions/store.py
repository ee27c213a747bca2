"""Write JSON with one line per entry, and safetensors."""

import json
import math

from safetensors.torch import save_file


def line(value):
    return json.dumps(value, ensure_ascii=False)


def write_json(path, what, **sections):
    parts = [f' "what": {line(what)}']
    for name, value in sections.items():
        if isinstance(value, list):
            rows = ",\n".join("  " + line(entry) for entry in value)
            parts.append(f" {line(name)}: [\n{rows}\n ]")
        else:
            parts.append(f" {line(name)}: {line(value)}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def write_tensors(path, tensors):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def finite(value):
    return value if math.isfinite(value) else str(value)
