"""Random scenes to train on: wider than what README.md promises, so that the
promised range lies well inside."""

import numpy as np

from scene import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, Object, Scene, shade

ASPECTS = (1.0, 4 / 3, 3 / 2, 16 / 9, 3 / 4, 9 / 16)
ASPECT_WEIGHTS = (0.26, 0.24, 0.1, 0.24, 0.08, 0.08)
SINGLE_EVENTS = ("move",) * 9 + ("still",) * 3 + ("appear", "disappear", "grow", "shrink", "turn") * 2


def pick(rng, options, p=None):
    return options[rng.choice(len(options), p=p)]


def make_object(rng, background, shape=None, colour=None):
    shape = shape or pick(rng, SHAPES)
    colours = [c for c in COLOURS if c != background]
    colour = colour or pick(rng, colours)
    angle = rng.normal(0, 6)
    if shape in ("triangle", "star") and rng.random() < 0.25:
        angle = rng.uniform(0, 360)
    return Object(
        shape=shape, colour=colour, rgb=shade(colour, rng), start=(0.5, 0.5), end=(0.5, 0.5),
        radius=(0.15, 0.15), angle=float(np.radians(angle)), squat=rng.uniform(0.0, 1.0),
    )


def place_path(rng, scene, obj):
    """Moves `obj` in a random direction, mostly inside the frame."""
    obj.event, obj.direction = "move", pick(rng, tuple(DIRECTIONS))
    dx, dy = DIRECTIONS[obj.direction]
    axis = 0 if dx else 1
    ext = scene.extent(obj.radius[0])
    overlap = rng.uniform(-1.0, 1.0) if rng.random() < 0.3 else 1.0  # how much may leave the frame
    low, high = ext[axis] * overlap, 1 - ext[axis] * overlap
    span = high - low
    length = rng.uniform(min(0.22, span), span)
    a = rng.uniform(low, high - length)
    b = a + length
    if (dx or dy) < 0:
        a, b = b, a
    across = ext[1 - axis] * rng.choice([1.0, 0.5], p=[0.8, 0.2])
    c = rng.uniform(across, 1 - across) if across < 0.5 else 0.5
    drift = rng.normal(0, 0.06) * length if rng.random() < 0.5 else 0.0
    d = float(np.clip(c + drift, 0, 1))
    obj.start, obj.end = ((a, c), (b, d)) if axis == 0 else ((c, a), (d, b))
    obj.when = (rng.choice([0, rng.uniform(0, 0.25)]), rng.choice([1, rng.uniform(0.7, 1)]))
    obj.ease = rng.random() < 0.2


def place_still(rng, scene, obj):
    ext = scene.extent(max(obj.radius))
    k = 0.6 if rng.random() < 0.15 else 1.0
    p = tuple(rng.uniform(min(e * k, 0.5), max(1 - e * k, 0.5)) for e in ext)
    obj.start = obj.end = p


def add_event(rng, scene, obj, event):
    if event == "move":
        return place_path(rng, scene, obj)
    obj.event = event
    abrupt = rng.random() < 0.6
    if event in ("grow", "shrink"):
        ratio = rng.uniform(1.5, 4.0)
        big = rng.uniform(max(0.13, 0.06 * ratio), 0.42)
        obj.radius = (big / ratio, big) if event == "grow" else (big, big / ratio)
        obj.when = (rng.uniform(0, 0.3), rng.uniform(0.65, 1.0))
        obj.ease = rng.random() < 0.3
    elif event in ("appear", "disappear", "turn"):
        mid = rng.uniform(0.22, 0.78) if event == "turn" else rng.uniform(0.18, 0.7)
        if event == "disappear":
            mid = 0.88 - mid
        half = 1e-4 if abrupt else rng.uniform(0.01, 0.12)
        obj.when = (max(mid - half, 0.13), min(mid + half, 0.8))
        if obj.when[1] <= obj.when[0]:
            obj.when = (mid, mid + 1e-4)
    if event == "turn":
        choices = [c for c in COLOURS if c not in (obj.colour, scene.background)]
        obj.turns_to = pick(rng, choices)
        obj.turned_rgb = shade(obj.turns_to, rng)
    place_still(rng, scene, obj)


def radius_of(rng, small=0.07, big=0.3):
    r = float(np.exp(rng.uniform(np.log(small), np.log(big))))
    return (r, r)


def add_several(rng, scene, count):
    """Places `count` shapes apart from each other; all still, or all moving
    together, or one moving away from the others."""
    style = rng.random()
    for attempt in range(200):
        scene.objects = []
        shift = np.zeros(2)
        if style < 0.35 and scene.video:
            shift = rng.uniform(-0.4, 0.4, 2)
        top = {2: 0.24, 3: 0.2, 4: 0.17, 5: 0.15}[count]
        same = radius_of(rng, 0.07, top) if rng.random() < 0.4 else None
        for _ in range(count):
            obj = make_object(rng, scene.background)
            if scene.objects and rng.random() < 0.2:
                obj.colour = scene.objects[0].colour
                obj.rgb = shade(obj.colour, rng)
            if scene.objects and rng.random() < 0.2:
                obj.shape = scene.objects[0].shape
            obj.radius = same or radius_of(rng, 0.07, top)
            ex, ey = scene.extent(obj.radius[0])
            low = np.array([ex, ey]) - np.minimum(shift, 0)
            high = 1 - np.array([ex, ey]) - np.maximum(shift, 0)
            if (high < low).any():
                break
            obj.start = tuple(rng.uniform(low, high))
            obj.end = tuple(np.array(obj.start) + shift)
            if shift.any():
                obj.event = "drift"
            if not far_apart(scene, obj):
                break
            scene.objects.append(obj)
        if len(scene.objects) < count:
            continue
        if scene.video and 0.35 <= style < 0.6:
            mover = scene.objects[rng.integers(count)]
            place_path(rng, scene, mover)
            if not stays_clear(scene, mover):
                continue
        return
    scene.objects = scene.objects[:1]


def unit(scene):
    """Frame fractions -> units of the shorter side."""
    return np.array([max(scene.aspect, 1.0), max(1 / scene.aspect, 1.0)])


def far_apart(scene, obj):
    k = unit(scene)
    return all(
        np.linalg.norm((np.array(o.start) - obj.start) * k) > 1.2 * (o.radius[0] + obj.radius[0]) + 0.03
        for o in scene.objects
    )


def stays_clear(scene, mover):
    k = unit(scene)
    path = np.linspace(mover.start, mover.end, 12)
    return all(
        (np.linalg.norm((path - o.start) * k, axis=1) > 1.2 * (o.radius[0] + mover.radius[0]) + 0.03).all()
        for o in scene.objects
        if o is not mover
    )


# How many shapes: (clips, stills), in most of training and towards its end.
COUNTS = {
    False: ((0.66, 0.12, 0.11, 0.11), (0.34, 0.3, 0.18, 0.18)),
    True: ((0.4, 0.16, 0.21, 0.23), (0.15, 0.41, 0.22, 0.22)),
}


def random_scene(rng, video=True, aspect=None, event=None, count=None, crowded=False):
    aspect = aspect or pick(rng, ASPECTS, ASPECT_WEIGHTS) * float(np.exp(rng.normal(0, 0.02)))
    if rng.random() < 0.5:
        background = pick(rng, ("white", "black", "gray"))
    else:
        background = pick(rng, BACKGROUNDS)
    scene = Scene(background, shade(background, rng), aspect, video=video)
    if count is None:
        count = pick(rng, (1, 2, 3, 4), COUNTS[crowded][0 if video else 1])
    if count > 1:
        add_several(rng, scene, count)
    else:
        obj = make_object(rng, background)
        obj.radius = radius_of(rng)
        scene.objects = [obj]
        add_event(rng, scene, obj, (event or pick(rng, SINGLE_EVENTS)) if video else "still")
    return scene


def sample_times(rng, frames):
    """When the frames are taken: as `arange(0, total, total / n)` takes them, or
    evenly from the first to the last, or shifted a little."""
    if rng.random() < 0.75:
        return np.arange(frames) / frames
    if rng.random() < 0.6:
        return np.linspace(0, 1, frames)
    return (np.arange(frames) + rng.uniform(0, 1)) / frames
