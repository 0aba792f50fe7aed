"""Procedurally drawn scenes: the small world that the demo model, its LoRAs and the study live in.

One to three things on a background. A thing has a shape, a colour, a texture, a size and a place,
and its caption may name each of them. Everything is drawn from signed distances, so a scene has an
exact picture and an exact depth map at any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np

# Values 0 to 1, far apart from each other also under the shading.
COLOURS = {
    "red": (0.86, 0.12, 0.14),
    "orange": (0.98, 0.52, 0.08),
    "yellow": (0.98, 0.88, 0.20),
    "green": (0.14, 0.64, 0.24),
    "cyan": (0.20, 0.78, 0.84),
    "blue": (0.14, 0.28, 0.86),
    "purple": (0.52, 0.18, 0.70),
    "pink": (0.97, 0.58, 0.76),
}
BACKGROUNDS = {
    **COLOURS,
    "white": (0.95, 0.95, 0.95),
    "grey": (0.5, 0.5, 0.5),
    "black": (0.06,) * 3,
}
# How much of a scene's things these backgrounds would hide: neighbours on the colour wheel.
TOO_CLOSE = ({"red", "orange"}, {"orange", "yellow"}, {"blue", "purple"}, {"pink", "red"},
             {"cyan", "blue"}, {"pink", "white"}, {"pink", "purple"})  # fmt: skip
TEXTURES = ("plain", "striped", "dotted")
SIZES = {"small": (0.12, 0.145), "big": (0.2, 0.235)}  # radius over the picture's side
ALONE = {"small": (0.13, 0.17), "big": (0.25, 0.31)}
PLACES = {  # x, y over the side
    "on the left": (0.27, 0.5),
    "on the right": (0.73, 0.5),
    "in the middle": (0.5, 0.5),
    "at the top": (0.5, 0.27),
    "at the bottom": (0.5, 0.73),
}
ROWS = (("on the left", "on the right"), ("at the top", "at the bottom"))
THREE = {"on the left": (0.2, 0.5), "in the middle": (0.5, 0.5), "on the right": (0.8, 0.5)}
LIGHT = (-0.6, -0.8)  # where the light comes from, x and y
RIM = 0.3  # how far in from its outline a thing rises, in radii

Grid = np.ndarray


def _circle(u: Grid, v: Grid) -> Grid:
    return np.hypot(u, v) - 1


def _square(u: Grid, v: Grid) -> Grid:
    return np.maximum(abs(u), abs(v)) - 0.84


def _triangle(u: Grid, v: Grid) -> Grid:
    v = 0.15 - v
    return np.maximum(abs(u) * 0.866 + v * 0.5, -v) - 0.55


def _ring(u: Grid, v: Grid) -> Grid:
    return abs(np.hypot(u, v) - 0.72) - 0.27


def _cross(u: Grid, v: Grid) -> Grid:
    a, b = abs(u), abs(v)
    return np.minimum(np.maximum(a - 1, b - 0.34), np.maximum(b - 1, a - 0.34))


def _star(u: Grid, v: Grid) -> Grid:
    sector = math.pi / 5
    angle = np.arctan2(u, -v) % (2 * sector)
    angle = np.minimum(angle, 2 * sector - angle)
    radius, outer, inner = np.hypot(u, v), 1.1, 0.5
    dx, dy = inner * math.cos(sector) - outer, inner * math.sin(sector)
    x, y = radius * np.cos(angle) - outer, radius * np.sin(angle)
    return (y * -dx + x * dy) / math.hypot(dx, dy)


# Distances to the outline in units of the thing's radius, below 0 inside; y points down.
SHAPES: dict[str, Callable[[Grid, Grid], Grid]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "ring": _ring,
    "cross": _cross,
    "star": _star,
}


@dataclass(frozen=True)
class Thing:
    """One thing: what its caption names, and where exactly it is."""

    shape: str
    colour: str
    texture: str
    size: str
    place: str
    x: float
    y: float
    radius: float
    angle: float
    nearness: float
    second: str

    def words(self, *, size: bool = True, place: bool = True) -> str:
        """Its part of a caption."""
        texture = "" if self.texture == "plain" else self.texture
        words = [self.size if size else "", self.colour, texture, self.shape]
        return with_article(" ".join(w for w in [*words, self.place if place else ""] if w))


@dataclass(frozen=True)
class Scene:
    """Things on a background, and what it is called."""

    things: tuple[Thing, ...]
    background: str
    slope: tuple[float, float]
    caption: str


def held_out(thing: Thing, background: str) -> bool:
    """Whether this colour and shape on this background is kept for tests: one in eight is."""
    order = list(COLOURS).index(thing.colour) * 7 + list(SHAPES).index(thing.shape) * 3
    return (order + list(BACKGROUNDS).index(background)) % 8 == 0


def random_thing(
    random: Random,
    background: str,
    place: str,
    at: tuple[float, float],
    sizes: dict[str, tuple[float, float]],
) -> Thing:
    """A thing of any kind near `at` that can be told from the background."""
    size = random.choice(list(sizes))
    colour = random.choice([c for c in COLOURS if not close(c, background)])
    others = [c for c in BACKGROUNDS if not close(c, colour) and not close(c, background)]
    return Thing(
        shape=random.choice(list(SHAPES)),
        colour=colour,
        texture=random.choices(TEXTURES, (3, 1, 1))[0],
        size=size,
        place=place,
        x=at[0] + random.uniform(-0.035, 0.035),
        y=at[1] + random.uniform(-0.035, 0.035),
        radius=random.uniform(*sizes[size]),
        angle=random.uniform(-0.35, 0.35),
        nearness=random.uniform(0.35, 0.8),
        second=random.choice(others),
    )


def random_scene(random: Random, test: bool = False, count: int | None = None) -> Scene:
    """A scene for training, or with `test` one of the combinations that training never sees."""
    while True:
        count_now = count or random.choices((1, 2, 3), (4, 5, 1))[0]
        background = random.choice(list(BACKGROUNDS))
        if count_now == 1:
            place = random.choice(list(PLACES))
            things = [random_thing(random, background, place, PLACES[place], ALONE)]
        elif count_now == 2:
            row = random.choice(ROWS)
            things = [random_thing(random, background, p, PLACES[p], SIZES) for p in row]
        else:
            small = {"small": SIZES["small"]}
            things = [random_thing(random, background, p, at, small) for p, at in THREE.items()]
        if any(held_out(t, background) != test for t in things):
            continue
        slope = random.uniform(-0.12, 0.12), random.uniform(-0.12, 0.12)
        return Scene(tuple(things), background, slope, caption(random, things, background))


def caption(random: Random, things: Sequence[Thing], background: str) -> str:
    """What a person might call it: the size, the place or the background may go unsaid."""
    say_place = random.random() < 0.85
    if random.random() < 0.06:  # so that things without properties mean something too
        parts = [f"a thing {t.place}" if say_place else "a thing" for t in things]
    else:
        parts = [t.words(size=random.random() < 0.6, place=say_place) for t in things]
    text = " and ".join(parts)
    return f"{text} on {with_article(background)} background" if random.random() < 0.92 else text


def full_caption(scene: Scene) -> str:
    """Everything said."""
    words = " and ".join(t.words() for t in scene.things)
    return f"{words} on {with_article(scene.background)} background"


def with_article(words: str) -> str:
    """With an "a" or "an" before it."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def close(one: str, other: str) -> bool:
    """Whether one colour hides on the other."""
    return one == other or {one, other} in TOO_CLOSE


@dataclass(frozen=True)
class Drawn:
    """A drawn scene: picture (side, side, 3), depth (side, side; 1 is near) and each thing's mask,
    (things, side, side), all 0 to 1, float32."""

    picture: np.ndarray
    depth: np.ndarray
    masks: np.ndarray


def draw(scene: Scene, side: int) -> Drawn:
    """The scene at `side` x `side` pixels."""
    line = (np.arange(side, dtype=np.float32) + 0.5) / side
    y, x = line[:, None], line[None, :]
    light = 1 + scene.slope[0] * (x - 0.5) * 2 + scene.slope[1] * (y - 0.5) * 2
    picture = np.asarray(BACKGROUNDS[scene.background], np.float32) * light[..., None]
    depth = np.broadcast_to(0.08 + 0.12 * y, (side, side)).astype(np.float32)
    masks = []
    for thing in sorted(scene.things, key=lambda t: t.nearness):
        cover, surface, height = _draw_thing(thing, x, y, side)
        picture = picture * (1 - cover[..., None]) + surface * cover[..., None]
        depth = depth * (1 - cover) + (thing.nearness + 0.2 * height) * cover
        masks.append(cover)
    return Drawn(
        picture.clip(0, 1).astype(np.float32),
        depth.clip(0, 1).astype(np.float32),
        np.stack(masks).astype(np.float32),
    )


def shape_map(scene: Scene, side: int) -> np.ndarray:
    """(side, side) bytes: 0 where the background is seen, else 1 + the shape's place in SHAPES."""
    line = (np.arange(side, dtype=np.float32) + 0.5) / side
    shapes = np.zeros((side, side), np.uint8)
    for thing in sorted(scene.things, key=lambda t: t.nearness):
        cover, *_ = _draw_thing(thing, line[None, :], line[:, None], side)
        shapes[cover > 0.5] = 1 + list(SHAPES).index(thing.shape)
    return shapes


def _draw_thing(thing: Thing, x: Grid, y: Grid, side: int) -> tuple[Grid, Grid, Grid]:
    """Its coverage, its shaded colours and its height over its own plane (0 to 1)."""
    cos, sin = math.cos(thing.angle), math.sin(thing.angle)
    dx, dy = (x - thing.x) / thing.radius, (y - thing.y) / thing.radius
    u, v = dx * cos + dy * sin, dy * cos - dx * sin
    distance = SHAPES[thing.shape](u, v)
    pixels = distance * thing.radius * side
    cover = (0.5 - pixels).clip(0, 1)
    height = np.sqrt((-distance / RIM).clip(0, 1))
    grain = thing.radius * side  # pixels to a unit
    # Its rim rises: bright where that faces the light, dark on the other side.
    rise_y, rise_x = np.gradient((-distance / RIM).clip(0, 1), 1 / grain)
    shade = 0.95 - 0.16 * RIM * (rise_x * LIGHT[0] + rise_y * LIGHT[1])
    base = np.asarray(COLOURS[thing.colour], np.float32)
    second = np.asarray(BACKGROUNDS[thing.second], np.float32)
    if thing.texture == "striped":
        part = (0.5 + (np.sin(u * 2 * math.pi * 1.7) - 0.35) * grain / 12).clip(0, 1)
    elif thing.texture == "dotted":
        a, b = (u * 1.8) % 1 - 0.5, (v * 1.8) % 1 - 0.5
        part = (0.5 + (0.27 - np.hypot(a, b)) * grain / 1.8).clip(0, 1)
    else:
        part = np.zeros_like(u)
    surface = (base * (1 - part[..., None]) + second * part[..., None]) * shade[..., None]
    return cover, surface, height


def alone(thing: Thing) -> Scene:
    """The thing by itself, upright and large on white-ish grey: a subject's portrait."""
    portrait = replace(thing, x=0.5, y=0.5, radius=0.34, angle=0.0, nearness=0.6)
    return Scene((portrait,), "white", (0.0, 0.0), "")


def subject_caption(scene: Scene) -> str:
    """A caption that leaves to the subject's portrait what the first thing looks like."""
    first, *others = scene.things
    parts = [f"this thing {first.place}", *(t.words(size=False) for t in others)]
    return " and ".join(parts) + f" on {with_article(scene.background)} background"
