"""Who takes part: our formats and the peers, what each needs, and how one turn of each is run.

A turn is one process that loads, warms up and times its stages; its last line of output is JSON with
`vision_s`, `prefill_s` and `decode_s`, each a number or a list. Where it is a list the smallest counts,
since that is what `lnv bench` prints of its own runs: other work on a machine only ever adds time.
"""

import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
STAGES = ("vision_s", "prefill_s", "decode_s")
# How much of the tower's work a turn of llama.cpp does; it takes no more than one frame at a time.
LLAMACPP_FRAMES = 1


class Skip(Exception):
    """Why someone cannot take part, for the report."""


class Entrant:
    """One program with one weight format."""

    def __init__(self, setup, name, label, bits):
        self.setup = setup
        self.name = name
        self.label = label
        # Those of about equally many bits are compared: 16, 8 or 4.
        self.bits = bits

    @property
    def ours(self):
        return self.name.startswith("lnv")

    def prepare(self):
        """Makes what is lacking; raises Skip where that is the user's to install."""

    def command(self, output):
        """The measured command; `output` is a folder for logits and tokens, or None."""
        raise NotImplementedError

    def read(self, result):
        """The stages of one turn's JSON: seconds by name."""
        times = {}
        for stage in STAGES:
            value = result.get(stage)
            if value:
                times[stage] = min(value) if isinstance(value, list) else value
        return times

    def check(self, folder):
        """Runs what writes logits and tokens, where the measured command does not."""


class Lnv(Entrant):
    def __init__(self, setup, option, value, label, bits):
        super().__init__(setup, f"lnv-{value}", label, bits)
        self.format = [f"--{option}", value]

    def prepare(self):
        if not self.setup.lnv.exists():
            raise Skip(f"no program {self.setup.lnv}: `make build`, or name one with --lnv")

    def command(self, output):
        return [
            self.setup.lnv, "bench", "--model", self.setup.checkpoint, "--frames", str(self.setup.frames),
            "--steps", str(self.setup.steps), *self.format, "--format", "json",
        ]

    def check(self, folder):
        model = ["--model", self.setup.checkpoint, *self.format, "--inputs", self.setup.inputs / "inputs.safetensors"]
        folder.mkdir(parents=True, exist_ok=True)
        self.setup.run([self.setup.lnv, "forward", *model, "--logits-to-keep", "1", "--output", folder / "logits.safetensors"])
        out = self.setup.run([self.setup.lnv, "generate", *model, "--max-new-tokens", str(self.setup.steps), "--format", "json"])
        (folder / "greedy.json").write_text(json.dumps(json.loads(out.stdout.splitlines()[-1])["sequences"][0]))


class Python(Entrant):
    """A peer with a Python script."""

    def __init__(self, setup, name, label, bits, python, script, needs, more=()):
        super().__init__(setup, name, label, bits)
        self.python, self.script, self.needs, self.more = python, HERE / "peers" / script, needs, more
        self.model = setup.checkpoint

    def prepare(self):
        if not Path(self.python).exists():
            raise Skip(f"no Python {self.python} (benchmarks/README.md says how to install it)")
        missing = self.setup.run([self.python, "-c", f"import {self.needs}"], check=False)
        if missing.returncode:
            raise Skip(f"{self.python} lacks a package: {missing.stderr.strip().splitlines()[-1]}")

    def command(self, output):
        return [
            self.python, self.script, "--model", self.model, "--inputs", self.setup.inputs, "--threads", str(self.setup.threads),
            "--runs", str(self.setup.runs), "--steps", str(self.setup.steps), *self.more, *(["--output", output] if output else []),
        ]


class OpenVino(Python):
    def __init__(self, setup, bits):
        super().__init__(
            setup, f"openvino-int{bits}", f"OpenVINO, int{bits} weights", bits, setup.openvino_python, "openvino_peer.py", "openvino"
        )
        self.model = setup.cache / f"openvino-int{bits}"

    def prepare(self):
        super().prepare()
        if not self.model.exists():
            export = HERE / "peers" / "openvino_export.py"
            self.setup.make([self.python, export, self.setup.checkpoint, self.model, "--bits", str(self.bits)])


class LlamaCpp(Entrant):
    def __init__(self, setup, name, label, bits):
        super().__init__(setup, name, label, bits)
        self.folder = setup.cache / "gguf"

    def prepare(self):
        if not self.setup.llamacpp.exists():
            raise Skip(f"no program {self.setup.llamacpp}: benchmarks/peers/llamacpp/build.sh {self.setup.llamacpp.parent}")
        if not (self.folder / "mmproj-f16.gguf").exists():
            self.convert()

    def convert(self):
        if not Path(self.setup.openvino_python).exists():
            raise Skip(f"no Python {self.setup.openvino_python} with gguf to convert the checkpoint")
        script = HERE / "peers" / "llamacpp" / "convert.py"
        self.setup.make([self.setup.openvino_python, script, self.setup.checkpoint, self.folder])


class LlamaCppText(LlamaCpp):
    def __init__(self, setup, kind, bits):
        super().__init__(setup, f"llamacpp-{kind}", f"llama.cpp, {kind}", bits)
        self.kind = kind
        self.model = self.folder / f"text-{kind}.gguf"

    def prepare(self):
        super().prepare()
        if not self.model.exists():
            part = self.model.with_suffix(".part")
            # Needed for quantising only: it may have been deleted to save space.
            source = self.folder / "text-bf16.gguf"
            if not source.exists():
                self.convert()
            self.setup.make([self.setup.llamacpp, "quantize", source, part, self.kind, str(self.setup.threads)])
            part.rename(self.model)

    def command(self, output):
        logits = output / "logits.f32" if output else "/dev/null"
        embeds = self.setup.reference / "embeds.f32"
        counts = [self.setup.threads, self.setup.runs, self.setup.steps, self.setup.ubatch]
        return [self.setup.llamacpp, "text", self.model, embeds, *map(str, counts), logits]


class LlamaCppVision(LlamaCpp):
    def __init__(self, setup):
        super().__init__(setup, "llamacpp-vision", "llama.cpp, vision tower in f16", 16)

    def command(self, output):
        counts = [LLAMACPP_FRAMES, 336, self.setup.threads, self.setup.runs]
        features = output / "features.f32" if output else "/dev/null"
        return [self.setup.llamacpp, "vision", self.folder / "mmproj-f16.gguf", self.setup.inputs / "pixels.f32", *map(str, counts), features]

    def read(self, result):
        scale = self.setup.frames / result["vision_frames"]
        return {"vision_s": min(result["vision_s"]) * scale}


def everyone(setup):
    """In the order of a round: ours between the peers."""
    transformers = Python(
        setup, "transformers-bf16", "Transformers, bf16, SDPA", 16, setup.transformers_python, "transformers_peer.py", "transformers, torch"
    )
    return [
        Lnv(setup, "dtype", "bf16", "ours, bf16", 16), transformers,
        Lnv(setup, "quantize", "q8", "ours, q8", 8), OpenVino(setup, 8), LlamaCppText(setup, "q8_0", 8),
        Lnv(setup, "quantize", "q4", "ours, q4", 4), OpenVino(setup, 4), LlamaCppText(setup, "q4_0", 4),
        Lnv(setup, "quantize", "nf4", "ours, nf4", 4), LlamaCppText(setup, "q4_k_m", 4),
        LlamaCppVision(setup),
    ]


def reference(setup):
    """Transformers in f32: what logits and tokens are compared with."""
    return Python(
        setup, "reference", "Transformers, f32", 32, setup.transformers_python, "transformers_peer.py", "transformers, torch",
        ("--dtype", "float32"),
    )


def exact(setup):
    """Ours in f32, which is compared but not timed."""
    return Lnv(setup, "dtype", "f32", "ours, f32", 32)
