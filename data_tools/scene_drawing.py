"""Draws a generated scene: smooth edges, textures, a grey and slightly noisy ground."""

import io
import math

import numpy as np
from PIL import Image, ImageDraw

from data_tools.scene_grammar import Group, Scene

SIDE = 40  # pixels of a scene
_SCALE = 3  # drawn so many times larger, then averaged down: smooth edges

RGB = {
    "red": (214, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (250, 225, 40),
    "green": (40, 160, 60),
    "cyan": (60, 205, 215),
    "blue": (40, 75, 205),
    "purple": (125, 45, 165),
    "pink": (245, 130, 190),
}


def render(scene: Scene, rng: np.random.Generator, side: int = SIDE) -> Image.Image:
    """The scene as an RGB picture on a grey, slightly noisy ground; places vary within the relation."""
    big = side * _SCALE
    grey = int(rng.integers(20, 75)) if rng.random() < 0.5 else int(rng.integers(185, 240))
    canvas = Image.new("RGB", (big, big), (grey, grey, grey))
    for group, box in zip(scene.groups, _areas(scene.relation, rng), strict=True):
        for center, radius in _places(group, box, rng):
            _draw(canvas, group, (center[0] * big, center[1] * big), radius * big, float(rng.uniform(-0.25, 0.25)))
    pixels = np.asarray(canvas.resize((side, side), Image.Resampling.BOX), dtype=np.int16)
    noisy = pixels + rng.integers(-6, 7, pixels.shape, dtype=np.int16)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def scene_jpeg(scene: Scene, rng: np.random.Generator) -> bytes:
    """The picture as JPEG bytes."""
    buffer = io.BytesIO()
    # No chroma subsampling: colours of shapes a few pixels wide must survive.
    render(scene, rng).save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


def _areas(relation: str | None, rng: np.random.Generator) -> list[tuple[float, float, float, float]]:
    """Boxes (x0, y0, x1, y1) in [0, 1] for the groups, in the order they are named."""
    if relation is None:
        return [(0.0, 0.0, 1.0, 1.0)]
    cut = float(rng.uniform(0.46, 0.54))
    low, high = (0.0, 0.0, cut, 1.0), (cut, 0.0, 1.0, 1.0)
    if relation in ("above", "below"):
        low, high = (0.0, 0.0, 1.0, cut), (0.0, cut, 1.0, 1.0)
    return [low, high] if relation in ("left of", "above") else [high, low]


def _places(
    group: Group, box: tuple[float, float, float, float], rng: np.random.Generator
) -> list[tuple[tuple[float, float], float]]:
    """Center and radius of each shape: the box is cut along its longer side into one cell a shape."""
    x0, y0, x1, y1 = box
    wide = (x1 - x0) > (y1 - y0) or ((x1 - x0) == (y1 - y0) and rng.random() < 0.5)
    places = []
    for index in range(group.count):
        low, high = index / group.count, (index + 1) / group.count
        cell = (
            (x0 + (x1 - x0) * low, y0, x0 + (x1 - x0) * high, y1)
            if wide
            else (x0, y0 + (y1 - y0) * low, x1, y0 + (y1 - y0) * high)
        )
        radius = (0.19 if group.size == "small" else 0.3) * float(rng.uniform(0.9, 1.1))
        # Two or three shapes share a box and are drawn smaller; small stays smaller than large.
        radius *= {1: 1.0, 2: 0.78, 3: 0.6}[group.count] * (1.0 if box == (0.0, 0.0, 1.0, 1.0) else 0.75)
        x = _within(cell[0], cell[2], radius, rng)
        places.append(((x, _within(cell[1], cell[3], radius, rng)), radius))
    return places


def _within(low: float, high: float, radius: float, rng: np.random.Generator) -> float:
    middle, slack = (low + high) / 2, max((high - low) / 2 - radius, 0.0)
    return middle + float(rng.uniform(-slack, slack))


def _draw(canvas: Image.Image, group: Group, center: tuple[float, float], radius: float, tilt: float) -> None:
    mask = Image.new("L", canvas.size, 0)
    _draw_mask(ImageDraw.Draw(mask), group.kind.shape, center, radius, tilt)
    color = RGB[group.kind.color]
    canvas.paste(color, mask=mask)
    if group.texture == "plain":
        return
    pattern = Image.new("L", canvas.size, 0)
    _draw_pattern(ImageDraw.Draw(pattern), group.texture, center, radius)
    dark = tuple(int(channel * 0.45) for channel in color)
    canvas.paste(dark, mask=Image.fromarray(np.minimum(np.asarray(mask), np.asarray(pattern))))


def _draw_mask(draw: ImageDraw.ImageDraw, shape: str, center: tuple[float, float], radius: float, tilt: float) -> None:
    x, y = center
    disc = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(disc, fill=255)
    elif shape == "ring":
        draw.ellipse(disc, fill=255)
        draw.ellipse((x - radius * 0.5, y - radius * 0.5, x + radius * 0.5, y + radius * 0.5), fill=0)
    elif shape == "crescent":
        draw.ellipse(disc, fill=255)
        draw.ellipse((x - radius * 0.3, y - radius * 0.9, x + radius * 1.5, y + radius * 0.9), fill=0)
    else:
        draw.polygon([_turned(point, center, radius, tilt) for point in _OUTLINES[shape]], fill=255)


def _draw_pattern(draw: ImageDraw.ImageDraw, texture: str, center: tuple[float, float], radius: float) -> None:
    x, y = center
    step = 4.2 * _SCALE
    steps = range(-math.ceil(radius / step) - 1, math.ceil(radius / step) + 2)
    if texture == "striped":
        for i in steps:
            draw.rectangle((x - radius, y + i * step, x + radius, y + i * step + step * 0.45), fill=255)
        return
    dot = step * 0.26
    for i in steps:
        for j in steps:
            cx, cy = x + i * step, y + j * step
            draw.ellipse((cx - dot, cy - dot, cx + dot, cy + dot), fill=255)


def _turned(point: tuple[float, float], center: tuple[float, float], radius: float, tilt: float) -> tuple[float, float]:
    cos, sin = math.cos(tilt), math.sin(tilt)
    x, y = point[0] * radius, point[1] * radius
    return center[0] + x * cos - y * sin, center[1] + x * sin + y * cos


def _star() -> list[tuple[float, float]]:
    radii = (1.1, 0.45)
    return [(radii[i % 2] * math.sin(math.pi * i / 5), -radii[i % 2] * math.cos(math.pi * i / 5)) for i in range(10)]


_OUTLINES = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0.0, -1.05), (1.0, 0.8), (-1.0, 0.8)],
    "star": _star(),
    "diamond": [(0.0, -1.15), (0.7, 0.0), (0.0, 1.15), (-0.7, 0.0)],
    "cross": [
        (-0.32, -1),
        (0.32, -1),
        (0.32, -0.32),
        (1, -0.32),
        (1, 0.32),
        (0.32, 0.32),
        (0.32, 1),
        (-0.32, 1),
        (-0.32, 0.32),
        (-1, 0.32),
        (-1, -0.32),
        (-0.32, -0.32),
    ],
}
