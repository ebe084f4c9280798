"""Generated scenes with captions: something to learn from and to be measured on, offline, in seconds.

    source = scene_source(12_000, seed=0)                       # a Source for build_shards
    write_class_folder(folder, classes=SEEN, per_class=10, seed=1)

A scene holds one or two groups of coloured, textured shapes: each has a size, a count, a texture, a colour
and a shape, two groups stand in a spatial relation. Every scene has several captions that say the same in
other words and leave out different things. Some colour-shape pairs are held out: both parts are seen in
training, the pair never is.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_tools.scene_drawing import scene_jpeg
from data_tools.scene_grammar import (
    HELD_OUT,
    SEEN,
    SIZES,
    TEXTURES,
    ColorShape,
    Group,
    Scene,
    captions,
    full_caption,
    random_scene,
)
from vlkit.contracts import Progress
from vlkit.data.records import ImageRef, Record, Source

__all__ = ["HELD_OUT", "SEEN", "scene_source", "write_class_folder"]


def scene_source(num_scenes: int, seed: int, *, distinct: bool = False, progress: Progress | None = None) -> Source:
    """Scenes of the seen kinds with captions, images held as JPEG bytes.

    Args:
        num_scenes: how many.
        seed: decides everything.
        distinct: no two scenes share their full caption, and each keeps only that one, as a retrieval
            gallery needs it.
        progress: called with (scenes done, all scenes).
    """
    rng = np.random.default_rng([seed, 1])
    records: list[Record] = []
    for scene in _scenes(num_scenes, rng, distinct):
        texts = captions(scene, rng)
        image = ImageRef(data=scene_jpeg(scene, rng))
        records.append(Record(f"scene-{len(records):06d}.jpg", image, texts[:1] if distinct else texts))
        if progress is not None:
            progress(len(records), num_scenes)
    return Source(tuple(records), format="scenes", root=Path())


def write_class_folder(folder: Path, kinds: Sequence[ColorShape], per_class: int, seed: int) -> None:
    """Pictures of single shapes in one folder a kind (`red_circle/000.jpg`), as `vlkit classify` finds them."""
    for row, kind in enumerate(kinds):
        rng = np.random.default_rng([seed, 2, row])
        target = folder / kind.name.replace(" ", "_")
        target.mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            group = Group(kind, str(rng.choice(TEXTURES)), str(rng.choice(SIZES)), 1)
            (target / f"{number:03d}.jpg").write_bytes(scene_jpeg(Scene((group,)), rng))


def _scenes(num_scenes: int, rng: np.random.Generator, distinct: bool) -> Iterator[Scene]:
    seen: set[str] = set()
    made = 0
    while made < num_scenes:
        scene = random_scene(rng)
        text = full_caption(scene)
        if distinct and text in seen:
            continue
        seen.add(text)
        made += 1
        yield scene
