#!/usr/bin/env python3
"""Run this project and its peers in turn, and write a dated table of medians, ratios and agreement.

    python3 benchmarks/run.py [--only lnv,transformers] [--rounds 3]

Needs nothing but the standard library itself; README.md says what each peer needs. Who is not installed is
skipped by name. What is made once (checkpoint, inputs, reference outputs, exports) is kept in the cache.
"""

import argparse
import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import compare
import machine
import report
from entrants import Skip, everyone, exact, reference

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
# A turn that takes longer is stuck; waiting for a lock in --prefix counts.
TURN_LIMIT_S = 3600


def say(text):
    print(text, file=sys.stderr, flush=True)


class Failed(Exception):
    """A command ended badly: its status, and the last line of what it said."""

    def __init__(self, command, done):
        lines = done.stderr.strip().splitlines() or done.stdout.strip().splitlines() or ["nothing was said"]
        super().__init__(f"{Path(str(command[0])).name} ended with status {done.returncode}: {lines[-1][:300]}")
        self.status = done.returncode


class Setup:
    """Where everything lies, how much is measured, and how commands are run."""

    def __init__(self, options):
        self.cache = options.cache.expanduser().absolute()
        self.checkpoint, self.inputs, self.reference = (self.cache / name for name in ("checkpoint", "inputs", "reference"))
        self.lnv = (options.lnv or default_lnv()).absolute()
        self.llamacpp = (options.llamacpp or self.cache / "llamacpp" / "llamacpp-bench").absolute()
        # Not resolved: a virtual environment's python is a link, and works by where the link lies.
        self.transformers_python = (options.transformers_python or self.cache / "transformers" / "bin" / "python").absolute()
        self.openvino_python = (options.openvino_python or self.cache / "openvino" / "bin" / "python").absolute()
        self.threads, self.runs, self.steps, self.ubatch = options.threads, options.runs, options.steps, options.ubatch
        self.frames = 8
        self.prefix = shlex.split(options.prefix)
        self.environment = dict(os.environ)
        for name in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            self.environment[name] = str(self.threads)
        # Nothing is to be downloaded.
        self.environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}

    def run(self, command, check=True):
        """Runs a command after the prefix: its output, and as `memory` the peak of the largest process."""
        command = [str(part) for part in command]
        with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
            process = subprocess.Popen(
                [*self.prefix, *command], stdout=stdout, stderr=stderr, env=self.environment, cwd=REPOSITORY, start_new_session=True
            )
            # The whole group: a prefix such as flock has the program as its child.
            stop = threading.Timer(TURN_LIMIT_S, os.killpg, (process.pid, signal.SIGKILL))
            stop.start()
            try:
                # Not process.wait(), which does not tell the memory.
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
            finally:
                stop.cancel()
            process.returncode = os.waitstatus_to_exitcode(status)
            for file in (stdout, stderr):
                file.seek(0)
            done = subprocess.CompletedProcess(command, process.returncode, stdout.read(), stderr.read())
        done.memory = usage.ru_maxrss * 1024
        if check and done.returncode:
            raise Failed(command, done)
        return done

    def make(self, command):
        """Runs something that is done once and may take minutes; it talks to stderr itself."""
        say("making: " + self.shown(command))
        if subprocess.run([str(part) for part in command], stdout=sys.stderr, env=self.environment).returncode:
            raise Skip(f"could not be made ready: {self.shown(command)}")

    def shown(self, command):
        """A command as the report gives it, with names for this machine's paths."""
        names = [
            (str(self.lnv), "lnv"), (str(self.transformers_python), "$TRANSFORMERS_PYTHON"), (str(self.openvino_python), "$OPENVINO_PYTHON"),
            (str(self.llamacpp), "llamacpp-bench"), (f"{REPOSITORY}/", ""), (str(self.cache), "$CACHE"),
        ]
        text = shlex.join(str(part) for part in command)
        for path, name in names:
            text = text.replace(path, name)
        return text


def default_lnv():
    target = os.environ.get("CARGO_TARGET_DIR") or REPOSITORY / "target"
    return Path(target) / "release" / "lnv"


def chosen(entrants, only):
    """Those whose name begins with one of the words of --only."""
    if not only:
        return entrants
    words = only.split(",")
    for word in words:
        if not any(e.name.startswith(word) for e in entrants):
            raise SystemExit(f"--only {word}: nobody of that name; there are {', '.join(e.name for e in entrants)}")
    return [e for e in entrants if any(e.name.startswith(word) for word in words)]


def make_ready(setup, entrants, skipped):
    """Checkpoint, inputs, reference outputs, and what each entrant makes of them; returns those who are ready."""
    judge = reference(setup)
    if not (setup.checkpoint / "config.json").exists():
        judge.prepare()
        setup.make([setup.transformers_python, HERE / "make_checkpoint.py", setup.checkpoint])
    if not (setup.inputs / "inputs.safetensors").exists():
        judge.prepare()
        setup.make([setup.transformers_python, HERE / "make_inputs.py", setup.checkpoint, setup.inputs, "--frames", str(setup.frames)])
    if not (setup.reference / "greedy.json").exists():
        judge.prepare()
        say("making: the reference's outputs, Transformers in f32")
        command = judge.command(setup.reference)
        command[command.index("--runs") + 1] = "0"
        setup.run(command)
    ready = []
    for entrant in entrants:
        try:
            entrant.prepare()
            ready.append(entrant)
        except (Skip, Failed) as why:
            skip(skipped, entrant, why)
    return ready


def skip(skipped, entrant, why):
    say(f"skipping {entrant.name}: {why}")
    skipped[entrant.name] = str(why)


def turn(setup, entrant, output):
    """One turn: seconds by stage, peak memory, and the JSON."""
    done = setup.run(entrant.command(output))
    result = json.loads(done.stdout.strip().splitlines()[-1])
    times = entrant.read(result)
    if "load_s" in result:
        times["load_s"] = result["load_s"]
    if output and "greedy" in result:
        (output / "greedy.json").write_text(json.dumps(result["greedy"]))
    return {**times, "memory": done.memory, "result": result}


def first_tokens(turns):
    """Vision and prefill together; llama.cpp's tower is timed by itself and belongs to each of its decoders."""
    tower = turns.get("llamacpp-vision", {}).get("vision_s")
    for name, times in turns.items():
        if name.startswith("llamacpp-") and tower and "prefill_s" in times:
            times["vision_s"] = tower
        if "vision_s" in times and "prefill_s" in times:
            times["first_s"] = times["vision_s"] + times["prefill_s"]


def measure(setup, entrants, rounds, outputs, skipped):
    """The rounds; who fails leaves."""
    all_turns = []
    for number in range(rounds):
        turns = {}
        # Every other round backwards, so that nobody always follows the same neighbour.
        for entrant in list(entrants)[:: -1 if number % 2 else 1]:
            try:
                output = outputs / entrant.name
                output.mkdir(parents=True, exist_ok=True)
                turns[entrant.name] = turn(setup, entrant, output)
            except Failed as why:
                skip(skipped, entrant, why)
                entrants.remove(entrant)
                continue
            times = turns[entrant.name]
            told = ", ".join(f"{report.TITLES[k]} {report.seconds(v)}" for k, v in times.items() if k in report.TITLES)
            say(f"round {number + 1}, {entrant.name}: {told}")
        first_tokens(turns)
        all_turns.append({e.name: turns[e.name] for e in entrants if e.name in turns})
    return all_turns


def check(setup, entrants, outputs, skipped):
    """Agreement with the reference, by name."""
    checks = {}
    ours = [exact(setup)] if any(e.ours for e in entrants) else []
    for entrant in [*ours, *entrants]:
        folder = outputs / entrant.name
        try:
            entrant.check(folder)
        except Failed as why:
            skip(skipped, entrant, f"cannot be compared: {why}")
        if (folder / "greedy.json").exists():
            checks[entrant.name] = compare.agreement(entrant.name, folder, setup.reference)
            say(f"{entrant.name}: {checks[entrant.name]}")
    return checks


def versions(setup, rounds):
    """Of ours with its commit, and of each peer as it says itself."""
    git = subprocess.run(
        ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=10"], capture_output=True, text=True, check=False
    )
    lines = []
    if setup.lnv.exists():
        lines.append(f"{setup.run([setup.lnv, '--version']).stdout.strip()}, repository at {git.stdout.strip() or 'an unknown commit'}")
    peers = {}
    for turns in rounds:
        for times in turns.values():
            peers |= times["result"].get("versions", {})
    lines += [f"{name} {version}" for name, version in peers.items()]
    version = setup.llamacpp.parent / "version"
    if version.exists() and any(name.startswith("llamacpp") for turns in rounds for name in turns):
        lines.append(f"llama.cpp as in {version.read_text().strip()}, native flags")
    return lines


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    where = os.environ.get
    path = lambda name: Path(where(name)) if where(name) else None  # noqa: E731
    parser.add_argument("--only", help="those whose names begin with these, separated by commas: lnv, lnv-q8, transformers, openvino, llamacpp")
    parser.add_argument("--rounds", type=int, default=3, help="turns of everyone [3]")
    parser.add_argument("--runs", type=int, default=3, help="runs in a turn [3, as `lnv bench` does]")
    parser.add_argument("--steps", type=int, default=16, help="decode steps in a run [16]")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="for everyone [all cores]")
    parser.add_argument("--ubatch", type=int, default=512, help="llama.cpp's physical batch [512, its default]")
    parser.add_argument("--prefix", default="", help="put before each measured command, such as 'flock FILE' where others use the machine")
    parser.add_argument("--no-check", action="store_true", help="do not compare outputs")
    parser.add_argument("--output", type=Path, help="the table [benchmarks/results/YYYY-MM-DD.md]; - prints it")
    parser.add_argument("--raw", type=Path, help="also write every turn's figures as JSON")
    parser.add_argument("--cache", type=Path, default=path("LNV_BENCH_CACHE") or Path("~/.cache/lnv-bench"), help="[$LNV_BENCH_CACHE or ~/.cache/lnv-bench]")
    parser.add_argument("--lnv", type=Path, default=path("LNV_BENCH_LNV"), help="the program [the release build of this checkout]")
    parser.add_argument("--transformers-python", type=Path, default=path("LNV_BENCH_TRANSFORMERS_PYTHON"), help="[CACHE/transformers/bin/python]")
    parser.add_argument("--openvino-python", type=Path, default=path("LNV_BENCH_OPENVINO_PYTHON"), help="[CACHE/openvino/bin/python]")
    parser.add_argument("--llamacpp", type=Path, default=path("LNV_BENCH_LLAMACPP"), help="[CACHE/llamacpp/llamacpp-bench]")
    return parser.parse_args()


def main():
    options = parse()
    # Stopped from outside, the command that runs is stopped too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    setup = Setup(options)
    facts = machine.facts(setup.threads)
    date = datetime.date.today().isoformat()
    skipped = {}
    try:
        entrants = make_ready(setup, chosen(everyone(setup), options.only), skipped)
    except (Skip, Failed) as why:
        raise SystemExit(f"cannot begin: {why}") from None
    with tempfile.TemporaryDirectory(prefix="lnv-bench-") as outputs:
        outputs = Path(outputs)
        rounds = measure(setup, entrants, options.rounds, outputs, skipped)
        checks = {} if options.no_check else check(setup, entrants, outputs, skipped)
    config = json.loads((setup.checkpoint / "config.json").read_text())
    results = [times["result"] for turns in rounds for times in turns.values()]
    text = report.markdown({
        "date": date, "setup": setup, "rounds": rounds, "entrants": entrants, "checks": checks, "skipped": skipped, "machine": facts,
        "tokens": next((r["prefill_tokens"] for r in results if "prefill_tokens" in r), "?"), "layers": config["text_config"]["num_hidden_layers"],
        "versions": versions(setup, rounds),
        "notes": [f"{e.label}: {note}" for e in entrants for note in rounds[0].get(e.name, {}).get("result", {}).get("notes", [])],
        "command": setup.shown(["python3", *sys.argv]), "commands": [setup.shown(e.command(None)) for e in entrants],
    })
    if options.raw:
        options.raw.write_text(json.dumps({"rounds": rounds, "checks": checks, "machine": facts, "skipped": skipped}, indent=1))
    if str(options.output) == "-":
        print(text)
    else:
        target = options.output or HERE / "results" / f"{date}.md"
        target.parent.mkdir(exist_ok=True)
        target.write_text(text)
        say(f"wrote {target}")
    wrong = [name for name, c in checks.items() if c["ok"] is False]
    if wrong:
        raise SystemExit(f"does not agree with the reference: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
