"""Every question the model is trained on, with its exact answer.

`questions(scene, rng)` lists (kind, question, answer) for all that can be asked
of a scene.  The phrasings are the ones README.md documents.
"""

import numpy as np

from scene import COLOURS, DIRECTIONS, SHAPES

NUMBERS = ("zero", "one", "two", "three", "four")
MEDIA = {True: ("video", "clip", "footage"), False: ("image", "picture", "photo")}
THINGS = ("shape", "object", "thing", "figure")

COLOUR = (
    "What colour is {it}?", "What color is {it}?", "Which colour is {it}?", "Which color is {it}?",
    "What is the colour of {it}?", "What is the color of {it}?", "What colour does {it} have?",
    "Tell me the colour of {it}.", "Name the colour of {it}.", "{it} is what colour?",
    "What colour is {it} in the {m}?", "What color is {it} in this {m}?", "What's the colour of {it}?",
    "What's the color of {it}?",
)
SHAPE = (
    "What shape is {it}?", "Which shape is {it}?", "What is the shape of {it}?", "What shape does {it} have?",
    "What shape is it?", "Tell me the shape of {it}.", "Name the shape of {it}.", "What's the shape of {it}?",
    "What kind of shape is {it}?", "What shape is {it} in the {m}?",
)
SHAPE_ALONE = (
    "What shape is this?", "What shape do you see?", "Which shape is shown?", "What shape is shown in the {m}?",
    "What shape is in the {m}?", "Which shape is in the {m}?", "What shape can you see?", "What is the shape?",
    "Name the shape.", "Which shape do you see?", "What shape is there?", "Which shape is it?",
)
COUNT = (
    "How many shapes are there?", "How many objects are there?", "How many shapes are in the {m}?",
    "How many objects are in the {m}?", "How many shapes do you see?", "How many objects can you see?",
    "How many things are there?", "How many shapes are shown?", "How many figures are there?", "How many are there?",
    "Count the shapes.", "Count the objects in the {m}.", "What is the number of shapes?",
    "How many shapes can you see in the {m}?", "How many objects does the {m} show?", "How many things do you see?",
    "How many different shapes are visible?", "How many objects appear in the {m}?",
)
COUNT_OF = (
    "How many {them} are there?", "How many {them} are in the {m}?", "How many {them} do you see?",
    "How many {them} can you see?", "Count the {them}.", "How many {them} are shown?",
)
BACKGROUND = (
    "What colour is the background?", "What color is the background?", "Which colour is the background?",
    "Which color is the background?", "What is the background colour?", "What is the background color?",
    "What is the colour of the background?", "What is the color of the background?", "Background colour?",
    "What colour is the background of the {m}?", "What color is the background in the {m}?",
    "What colour does the background have?", "Tell me the colour of the background.", "What is the background?",
    "What's the background colour?", "What colour is behind {it}?", "Name the background colour.",
    "What colour is the backdrop?",
)
EXISTS = (
    "Is there {one}?", "Is there {one} in the {m}?", "Can you see {one}?", "Do you see {one}?",
    "Does the {m} show {one}?", "Does the {m} contain {one}?", "Is {one} visible?", "Is {one} shown?",
    "Is {one} in the {m}?", "Is there {one} in this {m}?", "Is {one} present?", "Can you see {one} in the {m}?",
    "Is there {one} anywhere?", "Do you see {one} in the {m}?",
)
MOTION = (
    "Which way does {it} move?", "Which way is {it} moving?", "Which direction does {it} move?",
    "In which direction does {it} move?", "What direction is {it} moving in?", "In what direction is {it} moving?",
    "What direction does {it} move?", "Which way does {it} go?", "Which way is {it} going?", "Where does {it} move?",
    "Where is {it} going?", "Where is {it} heading?", "Which direction is {it} moving?", "Where does {it} go?",
    "In which direction is {it} going?", "Which direction is {it} heading?", "Where does {it} move to?",
    "Which way is {it} travelling?", "In which direction does {it} travel?", "What is the direction of motion?",
    "What direction does {it} go?", "Does {it} move left, right, up or down?", "What way does {it} move?",
    "Which way does {it} move in the {m}?", "What is the direction of movement?", "Which direction does {it} go in?",
    "How does {it} move?", "How is {it} moving?",
)
EVENT = (
    "What happens?", "What happens in the {m}?", "What is happening?", "What is happening in the {m}?",
    "What happens in this {m}?", "What does {it} do?", "What happens to {it}?", "What is {it} doing?",
    "Describe what happens.", "Tell me what happens.", "What is going on?", "What does {it} do in the {m}?",
    "What happens to {it} in the {m}?", "What's happening?", "Describe what happens in the {m}.",
    "What is going on in the {m}?", "What event happens in the {m}?",
)
DESCRIBE = (
    "Describe the {m}.", "Describe this {m}.", "What is in the {m}?", "What do you see?", "What does the {m} show?",
    "What can you see in the {m}?", "Describe what you see.", "What is shown in the {m}?", "What is in this {m}?",
    "Give a description of the {m}.", "What do you see in the {m}?", "What does this {m} show?",
    "Please describe the {m}.", "Describe the scene.", "What can you see?", "What is shown?", "What's in the {m}?",
    "Can you describe the {m}?",
)
MOVES = (
    "Does {it} move?", "Is {it} moving?", "Does {it} move in the {m}?", "Is there any movement?", "Is there any motion?",
    "Is {it} in motion?", "Does anything move?",
)
MOVES_TO = ("Does {it} move {to}?", "Is {it} moving {to}?", "Does {it} go {to}?")
IS_IT = ("Is {it} {what}?", "Is it {what}?")
WHERE_FIRST = ("Where is {it} at first?", "Where is {it} at the start?", "Where does {it} start?",
               "Where is {it} in the beginning?")
WHERE_LAST = ("Where is {it} at the end?", "Where does {it} end?", "Where is {it} in the end?", "Where does {it} stop?")
WHERE = ("Where is {it}?", "Where is {it} in the {m}?")
TRACE = ("Trace {it} across.", "Trace {it} down.")

TO = {"left": "to the left", "right": "to the right", "up": "up", "down": "down"}
FILLER = ("a", "an", "any", "anything", "something", "one", "please", "is", "moving", "still", "n't", "not", "no", "yes")


def article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def plural(words):
    return words + "s"


def name(o):
    return f"{o.colour} {o.shape}"


def event_of(o):
    """What happens to a single shape, without its subject; None if not named."""
    if o.event == "move":
        return f"moves {TO[o.direction]}"
    return {"still": "stays still", "appear": "appears", "disappear": "disappears", "grow": "grows",
            "shrink": "shrinks", "turn": f"turns {o.turns_to}"}.get(o.event)


def place(x, y):
    """One of nine places, or None when too near to a border between two."""
    def third(value, names):
        if min(abs(value - 1 / 3), abs(value - 2 / 3)) < 0.035:
            return None
        return names[int(np.clip(value, 0, 0.999) * 3)]

    row, column = third(y, ("top", "middle", "bottom")), third(x, ("left", "middle", "right"))
    if row is None or column is None:
        return None
    if row == column == "middle":
        return "middle"
    return " ".join(w for w in (row, column) if w != "middle")


def describe(scene):
    tail = f"on {article(scene.background)} background"
    objects = sorted(scene.objects, key=lambda o: o.start[0])
    if len(objects) == 1 and scene.video:
        return f"{article(name(objects[0]))} {event_of(objects[0])} {tail}"
    if len(objects) == 2 and objects[1].start[0] - objects[0].start[0] < 0.12:
        return None
    if len(objects) <= 2:
        return " and ".join(article(name(o)) for o in objects) + " " + tail
    return None


def subject(rng, scene, o, colour=True, shape=True):
    """A way to speak of `o` that fits no other shape of the scene."""
    options = []
    alone = len(scene.objects) == 1
    if alone:
        options += ["it", "it"] + [f"the {t}" for t in THINGS]
    if shape and (alone or sum(p.shape == o.shape for p in scene.objects) == 1):
        options += [f"the {o.shape}"] * 3
    if colour and o.event != "turn":
        if alone or sum(p.colour == o.colour for p in scene.objects) == 1:
            options += [f"the {o.colour} {t}" for t in (THINGS[rng.integers(4)], "one")]
        if shape and (alone or sum(name(p) == name(o) for p in scene.objects) == 1):
            options += [f"the {name(o)}"] * 3
    return options[rng.integers(len(options))] if options else None


def one_of(rng, options):
    return options[rng.integers(len(options))]


class Asker:
    """Collects the questions about one scene."""

    def __init__(self, scene, rng):
        self.scene, self.rng, self.out = scene, rng, []

    def ask(self, kind, phrasings, answer, **slots):
        if answer is None or any(v is None for v in slots.values()):
            return
        media = one_of(self.rng, MEDIA[self.scene.video])
        self.out.append((kind, one_of(self.rng, phrasings).format(m=media, **slots), answer))

    def subject(self, o, **kw):
        return subject(self.rng, self.scene, o, **kw)

    def about(self, o):
        alone, turned = len(self.scene.objects) == 1, o.event == "turn"
        if not turned:
            self.ask("colour", COLOUR, o.colour, it=self.subject(o, colour=False))
        phrasings = SHAPE + SHAPE_ALONE if alone else SHAPE[:4]
        self.ask("shape", phrasings, o.shape, it=self.subject(o, shape=False))

    def changes(self, o):
        alone = len(self.scene.objects) == 1
        if o.event in ("move", "still"):
            answer = o.direction if o.event == "move" else "it stays still"
            if alone or o.event == "move":
                self.ask("motion", MOTION, answer, it=self.subject(o))
        if alone:
            self.ask("event", EVENT, f"it {event_of(o)}", it=self.subject(o))
            if o.event in ("move", "still"):
                self.ask("moves", MOVES, "yes" if o.event == "move" else "no", it=self.subject(o))
            if o.event == "move":
                asked = o.direction if self.rng.random() < 0.5 else one_of(self.rng, tuple(DIRECTIONS))
                self.ask("moves", MOVES_TO, "yes" if asked == o.direction else "no", it=self.subject(o), to=TO[asked])

    def counts(self):
        objects = self.scene.objects
        self.ask("count", COUNT, NUMBERS[len(objects)])
        stable = [o for o in objects if o.event != "turn"]
        if len(stable) == len(objects):
            ref = one_of(self.rng, objects)
            colour, shape = ref.colour, ref.shape
            if self.rng.random() < 0.35:
                colour, shape = one_of(self.rng, COLOURS), one_of(self.rng, SHAPES)
            if self.rng.random() < 0.6:
                them, n = plural(shape), sum(o.shape == shape for o in objects)
            else:
                them, n = f"{colour} {plural(one_of(self.rng, THINGS))}", sum(o.colour == colour for o in objects)
            self.ask("count_of", COUNT_OF, NUMBERS[n], them=them)

    def existence(self):
        rng, objects = self.rng, self.scene.objects
        if any(o.event == "turn" for o in objects):
            shape = objects[0].shape if rng.random() < 0.5 else one_of(rng, SHAPES)
            return self.ask("exists", EXISTS, yes_no(shape == objects[0].shape), one=article(shape))
        ref = one_of(rng, objects)
        colour, shape = ref.colour, ref.shape
        if rng.random() < 0.55:  # change one thing or both
            if rng.random() < 0.7:
                colour = one_of(rng, COLOURS)
            if rng.random() < 0.7:
                shape = one_of(rng, SHAPES)
        form = rng.random()
        if form < 0.5:
            one, truth = article(f"{colour} {shape}"), any((o.colour, o.shape) == (colour, shape) for o in objects)
        elif form < 0.75:
            one, truth = article(shape), any(o.shape == shape for o in objects)
        else:
            thing = one_of(rng, (article(f"{colour} {one_of(rng, THINGS)}"), f"anything {colour}", f"something {colour}"))
            one, truth = thing, any(o.colour == colour for o in objects)
        self.ask("exists", EXISTS, yes_no(truth), one=one)
        if len(objects) == 1 and rng.random() < 0.4:
            what, truth = (colour, colour == ref.colour) if rng.random() < 0.5 else (article(shape), shape == ref.shape)
            self.ask("exists", IS_IT, yes_no(truth), it=one_of(rng, ("it", "the shape", "the object")), what=what)

    def places(self, o, times):
        if o.event not in ("move", "still"):
            return
        x, y, *_ = o.at(times)
        it = self.subject(o)
        if not self.scene.video:
            return self.ask("where", WHERE, place(x[0], y[0]), it=it)
        self.ask("where", WHERE_FIRST, place(x[0], y[0]), it=it)
        self.ask("where", WHERE_LAST, place(x[-1], y[-1]), it=it)
        eighth = lambda values: " ".join(f"c{int(v)}" for v in np.clip(values, 0, 0.999) * 8)
        across = self.rng.random() < 0.5
        self.ask("trace", TRACE[:1] if across else TRACE[1:], eighth(x if across else y), it=it)


def yes_no(truth):
    return "yes" if truth else "no"


def questions(scene, rng, times=(0.0,), each=False):
    """`each`: colour and shape of every object that can be named, not of one of them."""
    asker = Asker(scene, rng)
    some = scene.objects if len(scene.objects) == 1 else [one_of(rng, scene.objects)]
    for o in scene.objects if each else some:
        asker.about(o)
    for o in some:
        asker.places(o, times)
    if scene.video:
        movers = [o for o in scene.objects if o.event == "move"] or some
        asker.changes(movers[0])
    it = asker.subject(some[0], colour=False) if len(scene.objects) == 1 else "the shapes"
    asker.ask("background", BACKGROUND, scene.background, it=it)
    for _ in range(2 if each else 1):
        asker.counts()
        asker.existence()
    asker.ask("describe", DESCRIBE, describe(scene))
    return asker.out


def all_text():
    """Every word of the catalogue, for the tokenizer."""
    groups = (COLOUR, SHAPE, SHAPE_ALONE, COUNT, COUNT_OF, BACKGROUND, EXISTS, MOTION, EVENT, DESCRIBE, MOVES,
              MOVES_TO, IS_IT, WHERE_FIRST, WHERE_LAST, WHERE, TRACE, TO.values(), FILLER, COLOURS, SHAPES, NUMBERS,
              THINGS, MEDIA[True], MEDIA[False], DIRECTIONS)
    text = [t for group in groups for t in group]
    text += [plural(w) for w in SHAPES + THINGS + COLOURS]
    text += ["gray grey background on and top middle bottom the user assistant 's : , . ? !"]
    text += ["moves stays still appears disappears grows shrinks turns"]
    text += [" ".join(f"c{i}" for i in range(8)), "five six seven eight nine ten pink cyan brown rectangle"]
    return [t.replace("{", " ").replace("}", " ") for t in text]
