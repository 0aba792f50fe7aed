"""Pixel rules that say whether a picture shows what a scene's caption asks for.

No model judges: a thing's colour is the palette colour nearest to most of its pixels, its shape
the drawn shape that overlaps it best, turned up to a quarter of a right angle either way. Of a
striped or dotted thing the caption names one colour of two, and doesn't say which is the larger
part: at least a third of its pixels have to show it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from scipy import ndimage

from dev.demo_model.edits import Edit
from dev.demo_model.scenes import BACKGROUNDS, PLACES, SHAPES, Scene, Thing, draw

DIFFERENT = 0.16  # in any channel, from the background: belongs to a thing
GONE = 0.1  # of a thing may still be seen where it was removed
TEXTURED = 1 / 3  # of a striped or dotted thing has to show the colour that is asked for
GRID = 40  # side of the normalised silhouettes
ANGLES = np.linspace(-0.4, 0.4, 9)


@dataclass(frozen=True)
class Verdict:
    """On one thing of a scene."""

    colour: bool
    shape: bool
    place: bool

    @property
    def right(self) -> bool:
        return self.colour and self.shape


def judge(picture: np.ndarray, scene: Scene) -> list[Verdict]:
    """What is right of each thing in a picture, (side, side, 3) from 0 to 1, of `scene`."""
    background = _background(picture)
    different = np.abs(picture - background).max(axis=2) > DIFFERENT
    return [
        _judge(picture, different & _window(scene, thing, len(picture)), thing)
        for thing in scene.things
    ]


def right(picture: np.ndarray, scene: Scene) -> bool:
    """Whether colour and shape of every thing and the background's colour are right."""
    centre = _background(picture)[0, 0]
    ground = nearest(centre[None], BACKGROUNDS)[0] == scene.background
    return bool(ground) and all(verdict.right for verdict in judge(picture, scene))


def nearest(colours: np.ndarray, palette: dict[str, tuple[float, float, float]]) -> list[str]:
    """(n, 3) -> the palette's name for each, whatever its brightness within the shading's range."""
    names = list(palette)
    wanted = np.array([palette[n] for n in names])
    shades = np.stack([wanted * s for s in (0.75, 0.9, 1.0, 1.15)]).clip(0, 1)
    distance = np.abs(colours[:, None, None] - shades[None]).sum(-1).min(1)
    return [names[i] for i in distance.argmin(1)]


def _background(picture: np.ndarray) -> np.ndarray:
    """The background continued behind the things: a plane through the border's usual pixels."""
    side = len(picture)
    line = np.linspace(-1, 1, side)
    y, x = np.meshgrid(line, line, indexing="ij")
    border = np.ones((side, side), bool)
    width = max(side // 16, 2)
    border[width:-width, width:-width] = False
    usual = np.median(picture[border], axis=0)
    border &= np.abs(picture - usual).max(axis=2) < 0.25
    design = np.stack([np.ones_like(x), x, y], axis=-1)
    if border.sum() < 8:
        return np.broadcast_to(usual, picture.shape)
    plane, *_ = np.linalg.lstsq(design[border], picture[border], rcond=None)
    return design @ plane


def _window(scene: Scene, thing: Thing, side: int) -> np.ndarray:
    """The part of the picture that is nearer to this thing's place than to another's."""
    line = (np.arange(side) + 0.5) / side
    y, x = np.meshgrid(line, line, indexing="ij")
    distances = [np.hypot(x - t.x, y - t.y) for t in scene.things]
    return np.argmin(distances, axis=0) == scene.things.index(thing)


def _judge(picture: np.ndarray, mask: np.ndarray, thing: Thing) -> Verdict:
    labels, count = ndimage.label(mask)
    if not count:
        return Verdict(False, False, False)
    sizes = ndimage.sum(mask, labels, range(1, count + 1))
    mask = np.isin(labels, 1 + np.flatnonzero(sizes >= 0.15 * sizes.max()))
    if mask.sum() < 30:
        return Verdict(False, False, False)
    inside = ndimage.binary_erosion(mask, iterations=max(len(mask) // 128, 1))
    inside = inside if inside.sum() >= 20 else mask
    names = nearest(picture[inside], BACKGROUNDS)
    y, x = (axis.mean() / len(mask) for axis in np.nonzero(mask))
    px, py = PLACES[thing.place]
    most = max(set(names), key=names.count) == thing.colour
    third = names.count(thing.colour) >= TEXTURED * len(names)
    return Verdict(
        most or (thing.texture != "plain" and third),
        shape_of(mask) == thing.shape,
        bool(np.hypot(x - px, y - py) < 0.16),
    )


def shape_of(mask: np.ndarray) -> str:
    """The drawn shape that overlaps a silhouette best."""
    seen = _normalised(mask)
    overlaps = {
        name: max((seen & t).sum() / (seen | t).sum() for t in turned)
        for name, turned in _silhouettes().items()
    }
    return max(overlaps, key=lambda name: overlaps[name])


@cache
def _silhouettes() -> dict[str, list[np.ndarray]]:
    line = np.linspace(-1.3, 1.3, 128)
    v, u = np.meshgrid(line, line, indexing="ij")
    turned = {}
    for name, distance in SHAPES.items():
        turned[name] = [
            _normalised(distance(u * np.cos(a) + v * np.sin(a), v * np.cos(a) - u * np.sin(a)) < 0)
            for a in ANGLES
        ]
    return turned


def _normalised(mask: np.ndarray) -> np.ndarray:
    """A silhouette of any place and size in a GRID x GRID window around its middle."""
    y, x = np.nonzero(mask)
    # The spread about the middle, not the area: a ring's hole tells it from a circle.
    scale = np.sqrt(y.var() + x.var()) * 2.4 / GRID
    line = (np.arange(GRID) + 0.5 - GRID / 2) * scale * 1.1
    rows, columns = np.meshgrid(line + y.mean(), line + x.mean(), indexing="ij")
    return ndimage.map_coordinates(mask.astype(np.float32), (rows, columns), order=1) > 0.5


def silhouette(picture: np.ndarray) -> np.ndarray:
    """Where a picture, (side, side, 3) from 0 to 1, shows a thing and not its background: bool."""
    different = np.abs(picture - _background(picture)).max(axis=2) > DIFFERENT
    return ndimage.binary_opening(different)


def asked_for(picture: np.ndarray, edit: Edit) -> bool:
    """Whether what an edit's instruction asks for is there, whatever else has changed."""
    if edit.thing is None:
        ground = nearest(_background(picture)[:1, 0], BACKGROUNDS)[0]
        return ground == edit.after.background
    if edit.kind == "remove":
        different = np.abs(picture - _background(picture)).max(axis=2) > DIFFERENT
        was = draw(replace(edit.before, things=(edit.thing,)), len(picture)).masks[0] > 0.5
        return bool((different & was).sum() < GONE * was.sum())
    verdict = judge(picture, edit.after)[edit.after.things.index(edit.thing)]
    return verdict.right and (verdict.place or edit.kind == "colour")


def unchanged(edit: Edit, side: int) -> np.ndarray:
    """(side, side) bool: what an edit should leave as it is, some pixels from what it changes."""
    before, after = (draw(scene, side).picture for scene in (edit.before, edit.after))
    changed = np.abs(before - after).max(axis=2) > 1 / 255
    return ~ndimage.binary_dilation(changed, iterations=max(side // 42, 1))
