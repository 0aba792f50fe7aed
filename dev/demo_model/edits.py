"""Edits of drawn scenes: a picture, an instruction, and the picture as it should be afterwards.

Nothing but what the instruction names differs between the two, so a pixel tells whether an edit
left alone what nobody asked to change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from dev.demo_model.scenes import (
    BACKGROUNDS,
    COLOURS,
    Scene,
    Thing,
    close,
    held_out,
    random_scene,
    with_article,
)


@dataclass(frozen=True)
class Edit:
    """One edit.

    Attributes:
        kind: one of ``KINDS``, or "bring".
        thing: that is changed, removed or added, as it is where it is to be seen; None for the
            background.
        other: the second picture, that the thing is brought from.
    """

    kind: str
    before: Scene
    after: Scene
    thing: Thing | None
    instruction: str
    other: Scene | None = None


def random_edit(random: Random, kind: str, test: bool = False) -> Edit:
    """An edit for training, or with `test` one of a scene that training never sees.

    Training sees no held-out combination, before or after.
    """
    while True:
        scene = random_scene(random, test, count=None if kind in ("colour", "background") else 2)
        edit = KINDS[kind](random, scene)
        if edit is not None and (
            test or not any(held_out(t, edit.after.background) for t in edit.after.things)
        ):
            return edit


def random_bringing(random: Random, test: bool = False) -> Edit:
    """A thing of a second picture goes into the first, to where it is on its own."""
    while True:
        scene = random_scene(random, test, count=2)
        new = random.choice(scene.things)
        grounds = [
            b
            for b in BACKGROUNDS
            if b != scene.background and not close(b, new.colour) and not close(b, new.second)
        ]
        ground = random.choice(grounds)
        if not _only_one(new, scene) or (held_out(new, ground) and not test):
            continue
        before = replace(scene, things=tuple(t for t in scene.things if t is not new))
        other = replace(scene, things=(new,), background=ground)
        words = f"add the {new.shape} from the second picture"
        return Edit("bring", before, scene, new, words, other)


def _colour(random: Random, scene: Scene) -> Edit | None:
    old = random.choice(scene.things)
    colours = [
        c
        for c in COLOURS
        if c != old.colour and not close(c, scene.background) and not close(c, old.second)
    ]
    if not colours or not _only_one(old, scene):
        return None
    new = replace(old, colour=random.choice(colours))
    after = replace(scene, things=tuple(new if t is old else t for t in scene.things))
    return Edit("colour", scene, after, new, f"make the {_name(old)} {new.colour}")


def _remove(random: Random, scene: Scene) -> Edit | None:
    old = random.choice(scene.things)
    if not _only_one(old, scene):
        return None
    after = replace(scene, things=tuple(t for t in scene.things if t is not old))
    return Edit("remove", scene, after, old, f"remove the {_name(old)}")


def _add(random: Random, scene: Scene) -> Edit | None:
    new = random.choice(scene.things)
    if new.texture != "plain":  # whose second colour no instruction names
        return None
    before = replace(scene, things=tuple(t for t in scene.things if t is not new))
    return Edit("add", before, scene, new, f"add {new.words()}")


def _background(random: Random, scene: Scene) -> Edit | None:
    seen = {c for thing in scene.things for c in (thing.colour, thing.second)}
    grounds = [
        b
        for b in BACKGROUNDS
        if b != scene.background and not any(close(b, colour) for colour in seen)
    ]
    if not grounds:
        return None
    after = replace(scene, background=random.choice(grounds))
    ground = with_article(after.background)
    return Edit("background", scene, after, None, f"put everything on {ground} background")


KINDS: dict[str, Callable[[Random, Scene], Edit | None]] = {
    "colour": _colour,
    "remove": _remove,
    "add": _add,
    "background": _background,
}


def _name(thing: Thing) -> str:
    return f"{thing.colour} {thing.shape}"


def _only_one(thing: Thing, scene: Scene) -> bool:
    return sum(_name(each) == _name(thing) for each in scene.things) == 1
