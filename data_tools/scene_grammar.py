"""What a generated scene holds and how it is put into words: random scenes, and several captions of each.

scene = random_scene(np.random.default_rng(0))
captions(scene, np.random.default_rng(1))       # the first names everything, the others leave details out
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "crescent")
TEXTURES = ("plain", "striped", "dotted")
SIZES = ("small", "large")
COUNTS = ("one", "two", "three")
RELATIONS = ("left of", "right of", "above", "below")


class ColorShape(NamedTuple):
    """What classification asks for."""

    color: str
    shape: str

    @property
    def name(self) -> str:
        """As a class name, e.g. `red circle`."""
        return f"{self.color} {self.shape}"


# Two shapes of every colour, on a diagonal: each colour and each shape is held out equally often.
HELD_OUT = tuple(
    ColorShape(color, SHAPES[(row + step) % len(SHAPES)]) for row, color in enumerate(COLORS) for step in (0, 3)
)
SEEN = tuple(pair for color in COLORS for shape in SHAPES if (pair := ColorShape(color, shape)) not in HELD_OUT)


@dataclass(frozen=True)
class Group:
    """Shapes that are alike."""

    kind: ColorShape
    texture: str
    size: str
    count: int


@dataclass(frozen=True)
class Scene:
    """One group, or two of them in a relation."""

    groups: tuple[Group, ...]
    relation: str | None = None


def random_scene(rng: np.random.Generator, kinds: Sequence[ColorShape] = SEEN, two_groups: float = 0.6) -> Scene:
    """A scene with groups of the given kinds; with probability `two_groups` it has two of different kinds."""
    if rng.random() >= two_groups:
        return Scene((_random_group(rng, kinds, max_count=3),))
    first = _random_group(rng, kinds, max_count=2)
    second = _random_group(rng, [kind for kind in kinds if kind != first.kind], max_count=2)
    return Scene((first, second), str(rng.choice(RELATIONS)))


def captions(scene: Scene, rng: np.random.Generator, num_captions: int = 4) -> tuple[str, ...]:
    """Different wordings of one scene: the first names everything, the others leave details out."""
    wordings = {full_caption(scene): None}
    for _ in range(8 * num_captions):
        if len(wordings) == num_captions:
            break
        wordings[_loose_caption(scene, rng)] = None
    return tuple(wordings)


def _random_group(rng: np.random.Generator, kinds: Sequence[ColorShape], max_count: int) -> Group:
    kind = kinds[int(rng.integers(len(kinds)))]
    count = 1 if rng.random() < 0.5 else int(rng.integers(1, max_count + 1))
    return Group(kind, str(rng.choice(TEXTURES)), str(rng.choice(SIZES)), count)


def _phrase(group: Group, *, texture: bool = True, size: bool = True) -> str:
    words = [
        ("a" if group.count == 1 else COUNTS[group.count - 1]),
        group.size if size else "",
        group.texture if texture else "",
        group.kind.color,
        group.kind.shape if group.count == 1 else _plural(group.kind.shape),
    ]
    phrase = " ".join(word for word in words if word)
    return phrase.replace("a orange", "an orange", 1) if phrase.startswith("a orange") else phrase


def full_caption(scene: Scene) -> str:
    """The wording that names every group with all its properties, and the relation."""
    first = _phrase(scene.groups[0])
    if scene.relation is None:
        return first
    return f"{first} {scene.relation} {_phrase(scene.groups[1])}"


def _loose_caption(scene: Scene, rng: np.random.Generator) -> str:
    texture, size = bool(rng.random() < 0.5), bool(rng.random() < 0.5)
    first = _phrase(scene.groups[0], texture=texture, size=size)
    if scene.relation is None:
        there = "there is {}" if scene.groups[0].count == 1 else "there are {}"
        frames: tuple[str, ...] = ("a picture of {}", "a photo of {}.", "{} on a grey ground", there, "{}")
        return str(rng.choice(frames)).format(first)
    second = _phrase(scene.groups[1], texture=texture, size=size)
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[scene.relation]
    frames = (
        f"{first} {scene.relation} {second}",
        f"{second} {opposite} {first}",
        f"a picture of {first} and {second}",
        f"{first}, and {second} to be seen {opposite} it" if scene.groups[0].count == 1 else f"{first} with {second}",
        f"a scene with {second} and {first}",
    )
    return str(rng.choice(frames))


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")
