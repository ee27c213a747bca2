"""Refuse to make golden data with other library versions than the ones the goldens are pinned to."""

import sys
from importlib.metadata import version

PINNED = {
    "transformers": "4.53.3",
    "pillow": "11.3.0",
    "tokenizers": "0.21.4",
    "torch": "2.15.0",
    "torchvision": "0.29.2",
    "av": "18.1.0",
    "numpy": "2.4.6",
    "safetensors": "0.8.0",
}


def installed():
    return {name: version(name).split("+")[0] for name in PINNED}


def require_pinned():
    wrong = [f"{name} is {have}, not {PINNED[name]}" for name, have in installed().items() if have != PINNED[name]]
    if wrong:
        sys.exit("Golden data are only made with the pinned versions: " + "; ".join(wrong) + ".")
