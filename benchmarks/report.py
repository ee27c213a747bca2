"""The markdown of a run: tables of medians, ratios within rounds, shares of limits, agreement, commands."""

import statistics

from entrants import STAGES

TITLES = {"vision_s": "vision", "prefill_s": "prefill", "decode_s": "decode step", "first_s": "first token", "load_s": "loading"}


def seconds(value):
    return f"{value * 1000:.1f} ms" if value < 0.2 else f"{value:.2f} s"


def spread(values, show):
    """The median, and the extremes where there is more than one."""
    if not values:
        return "-"
    middle = show(statistics.median(values))
    return middle if len(values) == 1 else f"**{middle}** ({show(min(values))} - {show(max(values))})"


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


class Turns:
    """What every entrant did in every round: `rounds[i][name]` has seconds by stage, and `result`, the JSON."""

    def __init__(self, rounds):
        self.rounds = rounds
        self.names = list(dict.fromkeys(name for turns in rounds for name in turns))

    def values(self, name, key):
        return [turns[name][key] for turns in self.rounds if key in turns.get(name, {})]

    def facts(self, name, key):
        """A number of the JSON, over the rounds."""
        found = (turns[name]["result"].get(key) for turns in self.rounds if name in turns)
        return [value for value in found if isinstance(value, (int, float))]

    def ratios(self, ours, peer, key):
        """How many times as fast ours is, in each round in which both have the stage."""
        pairs = ((turns.get(ours, {}), turns.get(peer, {})) for turns in self.rounds)
        return [theirs[key] / mine[key] for mine, theirs in pairs if key in mine and key in theirs]


def stages(turns, entrants):
    rows = []
    work = needed(turns)
    for entrant in entrants:
        row = [entrant.label]
        for key in (*STAGES[:2], "first_s", "decode_s", "load_s"):
            text = spread(turns.values(entrant.name, key), seconds)
            if key in work and text != "-":
                text += f", {work[key] / statistics.median(turns.values(entrant.name, key)):.0f} GFLOP/s"
            row.append(text)
        memory = turns.values(entrant.name, "memory")
        row.append(f"{max(memory) / 1e9:.1f} GB" if memory else "-")
        rows.append(row)
    return table(["", "vision", "prefill", "first token (both)", "decode step", "loading", "peak memory"], rows)


def needed(turns):
    """Giga-operations that the task needs, as `lnv bench` counts them; none without a run of it."""
    for name in turns.names:
        if name.startswith("lnv"):
            result = next(r[name]["result"] for r in turns.rounds if name in r)
            pairs = (("vision_s", "vision_gflops"), ("prefill_s", "prefill_gflops"))
            return {stage: result[stage] * result[rate] for stage, rate in pairs if rate in result}
    return {}


def ratios(turns, entrants):
    rows = []
    for mine in (e for e in entrants if e.ours):
        for peer in (e for e in entrants if not e.ours and e.bits == mine.bits):
            cells = [spread(turns.ratios(mine.name, peer.name, key), "{:.2f}".format) for key in (*STAGES[:2], "first_s", "decode_s")]
            if any(cell != "-" for cell in cells):
                rows.append([mine.label, peer.label, *cells])
    return table(["ours", "peer", "vision", "prefill", "first token", "decode step"], rows)


def shares(turns, entrants):
    rows = []
    percent = "{:.0%}".format
    for entrant in (e for e in entrants if e.ours):
        name = entrant.name
        row = [entrant.label, spread(turns.facts(name, "peak_gflops"), "{:.0f}".format), spread(turns.facts(name, "bandwidth_gbs"), "{:.1f}".format)]
        row += [spread(turns.facts(name, f"{TITLES[stage].split()[0]}_share"), percent) for stage in STAGES]
        rows.append(row)
    return table(["", "peak, G operations/s", "read, GB/s", "vision", "prefill", "decode step"], rows)


def agreement(checks, labels):
    rows = []
    for name, c in checks.items():
        verdict = {None: "not required", True: "yes", False: "**NO**"}[c["ok"]]
        first = "same" if c["first"] else "different"
        rows.append([labels[name], f"{c['cosine']:.6f}", f"{c['difference']:.1e}", first, f"{c['same']} of {c['of']}", verdict])
    return table(["", "cosine of logits", "largest difference", "first token", "greedy tokens", "agrees"], rows)


def bullets(lines):
    return "\n".join(f"- {line}" for line in lines)


def markdown(run):
    """`run` has what run.py gathered: see its `gather`."""
    turns, entrants, setup = Turns(run["rounds"]), run["entrants"], run["setup"]
    labels = {entrant.name: entrant.label for entrant in entrants} | {"lnv-f32": "ours, f32"}
    parts = [
        f"# Benchmark of {run['date']}",
        f"{setup.frames} frames of noise and a prompt of {run['tokens']} tokens; the 7B's dimensions with {run['layers']} text layers and random "
        f"weights. Rounds: {len(run['rounds'])}; in each everyone takes a turn. A turn is one process with {setup.runs} runs after a warm-up, of "
        "which the best counts. A figure is the **median** over the rounds, then the smallest and the largest. `benchmarks/README.md` says "
        "what the stages are and how to read this.",
        "## Machine",
        table(["", ""], [list(pair) for pair in run["machine"]]),
        "## Versions",
        bullets(run["versions"]),
        "## Stages",
        stages(turns, entrants),
        "GFLOP/s is the work that the task needs, as `lnv bench` counts it, by the median time; work done beyond that does not count. "
        "\"First token\" is vision and prefill without loading. llama.cpp's tower has a turn of its own, whose time stands with each of its decoders.",
        "## How many times as fast as the peers",
        "Time of the peer by ours, in each round; above 1 ours is faster. Formats of about equally many bits.",
        ratios(turns, entrants),
        "## Shares of what the machine can do",
        "The limits are measured by each turn of `lnv bench` itself: the peak of the arithmetic in use, and the read bandwidth.",
        shares(turns, entrants),
    ]
    if run["checks"]:
        lead = next(iter(run["checks"].values()))["lead"]
        parts += [
            "## Agreement with Transformers in f32",
            f"The last prompt position's logits, and the tokens that follow greedily. Differences are shares of the largest logit; the "
            f"reference's best leads its second by {lead:.1e}. With random weights, quantised formats may well choose another token.",
            agreement(run["checks"], labels),
        ]
    if run["notes"]:
        parts += ["## Settings that the peers chose", bullets(run["notes"])]
    if run["skipped"]:
        parts += ["## Not in this run", bullets(f"{name}: {why}" for name, why in run["skipped"].items())]
    parts += ["## Commands", f"`{run['command']}` ran, in turn:", "```\n" + "\n".join(run["commands"]) + "\n```"]
    return "\n\n".join(parts) + "\n"
