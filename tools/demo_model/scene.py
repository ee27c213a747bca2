"""The world of the demo model: colours, shapes, and scenes as functions of time.

A `Scene` says nothing about pixels.  Two renderers that share no drawing code
turn it into frames: `render_train.py` (analytic distance fields, straight at the
model's resolution) and `render_heldout.py` (polygons at the clip's own
resolution, then H.264).
"""

from dataclasses import dataclass, field

import numpy as np

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
BACKGROUNDS = COLOURS + ("gray",)
SHAPES = ("circle", "square", "triangle", "star")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
EVENTS = ("move", "still", "appear", "disappear", "grow", "shrink", "turn")

# Hue in degrees, saturation and value: each name covers a patch of colour space
# wide enough for the usual ways to write it down, with gaps between the names.
HSV = {
    "red": ((-7, 7), (0.80, 1.0), (0.65, 1.0)),
    "orange": ((24, 39), (0.85, 1.0), (0.90, 1.0)),
    "yellow": ((50, 62), (0.72, 1.0), (0.85, 1.0)),
    "green": ((95, 150), (0.60, 1.0), (0.42, 0.95)),
    "blue": ((208, 245), (0.65, 1.0), (0.55, 1.0)),
    "purple": ((268, 303), (0.50, 1.0), (0.45, 0.90)),
    "white": ((0, 360), (0.0, 0.04), (0.93, 1.0)),
    "black": ((0, 360), (0.0, 0.30), (0.0, 0.10)),
    "gray": ((0, 360), (0.0, 0.06), (0.36, 0.70)),
}


def shade(name, rng):
    """A random RGB shade (0..1) of the named colour."""
    (h0, h1), (s0, s1), (v0, v1) = HSV[name]
    h, s, v = rng.uniform(h0, h1), rng.uniform(s0, s1), rng.uniform(v0, v1)
    k = (np.array([5.0, 3.0, 1.0]) + h / 60.0) % 6
    return v - v * s * np.clip(np.minimum(k, 4 - k), 0, 1)


@dataclass
class Object:
    """One shape.  Positions are fractions of the frame's width and height; the
    radius is a fraction of the frame's shorter side."""

    shape: str
    colour: str
    rgb: np.ndarray
    start: tuple
    end: tuple
    radius: tuple
    event: str = "still"
    when: tuple = (0.0, 1.0)  # the part of the clip in which the change happens
    ease: bool = False
    turns_to: str = None
    turned_rgb: np.ndarray = None
    angle: float = 0.0
    squat: float = 1.0  # triangle and star proportions, see the renderers
    direction: str = None

    def progress(self, t):
        p = np.clip((t - self.when[0]) / max(self.when[1] - self.when[0], 1e-6), 0, 1)
        return p * p * (3 - 2 * p) if self.ease else p

    def at(self, times):
        """Position, radius, visibility and RGB at each of `times` (0..1)."""
        p = self.progress(np.asarray(times, dtype=np.float64))
        x = self.start[0] + (self.end[0] - self.start[0]) * p
        y = self.start[1] + (self.end[1] - self.start[1]) * p
        r = self.radius[0] * (self.radius[1] / self.radius[0]) ** p
        visible = np.ones_like(p)
        if self.event == "appear":
            visible = p
        elif self.event == "disappear":
            visible = 1 - p
        rgb = np.repeat(self.rgb[None], len(p), 0)
        if self.event == "turn":
            rgb = rgb + (self.turned_rgb - self.rgb)[None] * p[:, None]
        return x, y, r, visible, rgb


@dataclass
class Scene:
    background: str
    background_rgb: np.ndarray
    aspect: float  # width / height
    objects: list = field(default_factory=list)
    video: bool = True

    def extent(self, radius):
        """The radius as fractions of the frame's width and height."""
        return radius * min(1.0, 1 / self.aspect), radius * min(1.0, self.aspect)
