"""Make the golden data: python tools/golden/make.py [--only NAME ...]"""

import argparse
import importlib
import json
import os
from pathlib import Path

import versions

versions.require_pinned()

import torch  # noqa: E402
import transformers  # noqa: E402

import checkpoints  # noqa: E402
import configs  # noqa: E402
import conversations  # noqa: E402
import layouts  # noqa: E402
import media  # noqa: E402
import write_cases  # noqa: E402

ROOT = Path(__file__).resolve().parents[2] / "testdata" / "golden"


def configuration(spec):
    write_cases.write_robust(Path(spec["name"]), spec, conversations.SETS[spec["cases"]]())


def renamed_copy(name, source, layout, covers):
    folder = Path(name)
    layouts.copy_checkpoint(source, folder)
    layouts.rename_tensors(folder, layout)
    if layout == "hf-5":
        layouts.spell_config_as_5x(folder)
    described = json.loads((Path(source) / "cases.json").read_text())
    described.update(name=name, layout=layout, outputs_from=source, covers=covers)
    described["notes"] = ["The cases are those of " + source + ": the same weights under other names."]
    (folder / "cases.json").write_text(write_cases.compact(described))


FUNCTIONS = ["anyres", "resize", "image_processor", "video_processor", "frames", "rope", "templates_", "decode", "logits", "errors"]


def functions():
    folder = Path("functions")
    folder.mkdir(exist_ok=True)
    for name in FUNCTIONS:
        importlib.import_module(f"functions.{name}").make(folder)


def jobs():
    yield "media", lambda: media.make(Path("."))
    for name, spec in configs.ALL.items():
        yield name, lambda spec=spec: configuration(spec)
    for copy in configs.COPIES:
        yield copy[0], lambda copy=copy: renamed_copy(*copy)
    yield "functions", functions


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="names of sections or configurations")
    only = parser.parse_args().only
    known = dict(jobs())
    for name in only or known:
        if name not in known:
            parser.error(f"{name} is not one of: {', '.join(known)}")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    ROOT.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    for name in only or known:
        print(name, flush=True)
        known[name]()


if __name__ == "__main__":
    main()
