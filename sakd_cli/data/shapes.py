"""Drawn shapes: 20 classes of small colour images that need no download.

Made for trials, tests and teaching: the classes range from plainly different (ring, cross) to hard to tell apart at
this size (hexagon and heptagon, star6 and star7), and every sample draws its own difficulty, from a large clean shape
on a quiet ground to a small faint one behind a bar, so that samples differ in how much a student has to learn from
them. Numbers reached here say nothing about photographs.
"""

from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
import torch
from numpy.typing import NDArray

from sakd_cli.config.datasets import ShapesConfig
from sakd_cli.data.dataset import Dataset, Split

F32 = np.float32
Array = NDArray[np.float32]
# Pixel coordinates x, y in units of the shape's radius, its centre at 0, 0, to how far outside the shape each lies, in
# the same units; negative inside. Near the edge, where anti-aliasing looks, it is a distance to first order.
Outline = Callable[[Array, Array], Array]

ROUND = 0.85  # radius of the disc: about the mean radius of the polygons, so that area does not tell the classes apart


def _wedge(x: Array, y: Array, count: int) -> tuple[Array, Array]:
    """Radius, and angle from the middle of the nearest of `count` equal wedges, in -pi/count .. pi/count."""
    turn = F32(2 * np.pi / count)
    angle: Array = np.arctan2(y, x)
    angle -= turn * np.round(angle / turn)
    return np.hypot(x, y), angle


def _polygon(x: Array, y: Array, *, corners: int) -> Array:
    """A regular polygon with its corners at radius 1."""
    radius, angle = _wedge(x, y, corners)
    return radius * np.cos(angle) - F32(np.cos(np.pi / corners))


def _star(x: Array, y: Array, *, points: int, waist: float) -> Array:
    """A star with its points at radius 1 and its inner corners at radius `waist`."""
    radius, angle = _wedge(x, y, points)
    half = np.pi / points
    inner = np.array([waist * np.cos(half), waist * np.sin(half)])
    along = inner - np.array([1.0, 0.0])
    normal = np.array([along[1], -along[0]]) / np.hypot(*along)
    across = (radius * np.cos(angle) - 1) * F32(normal[0])
    return across + radius * np.sin(np.abs(angle)) * F32(normal[1])


def _waves(x: Array, y: Array, count: int, radius: float, height: Callable[[Array], Array]) -> Array:
    """A circle with `count` teeth or petals: `height` makes one of a cosine around the circle."""
    distance, angle = _wedge(x, y, count)
    return distance - F32(radius) - height(np.cos(F32(count) * angle))


def _bars(x: Array, y: Array, *, bars: tuple[tuple[float, float, float, float], ...]) -> Array:
    """A union of upright rectangles, each (left, right, bottom, top)."""
    outside = np.full_like(x, np.inf)
    for left, right, bottom, top in bars:
        across = np.abs(x - F32((left + right) / 2)) - F32((right - left) / 2)
        up = np.abs(y - F32((bottom + top) / 2)) - F32((top - bottom) / 2)
        np.minimum(outside, np.maximum(across, up), out=outside)
    return outside


def _arrow(x: Array, y: Array) -> Array:
    """A triangular head, pointing right, on a shaft."""
    slope = F32(np.sqrt(0.5))
    head: Array = np.maximum((np.abs(y) + x - 1) * slope, F32(0.15) - x)
    return np.minimum(head, _bars(x, y, bars=((-0.95, 0.2, -0.24, 0.24),)))


POLYGONS = ("triangle", "square", "pentagon", "hexagon", "heptagon")
# No outline is the mirror image of another, since training mirrors images; one that has no mirror symmetry of its own
# (ell) stands for both of its forms. No two become equal by a turn, since shapes are drawn at any angle.
OUTLINES: dict[str, Outline] = {
    "disc": lambda x, y: np.hypot(x, y) - F32(ROUND),
    "ellipse": lambda x, y: (np.hypot(x, y / F32(0.65)) - 1) * F32(0.8),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - F32(0.65)) - F32(0.25),
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - F32(0.95), F32(0.72) - np.hypot(x - F32(0.5), y)),
    **{name: partial(_polygon, corners=corners) for corners, name in enumerate(POLYGONS, start=3)},
    "star5": partial(_star, points=5, waist=0.5),
    "star6": partial(_star, points=6, waist=0.55),
    "star7": partial(_star, points=7, waist=0.58),
    "gear": lambda x, y: _waves(x, y, 8, 0.82, lambda wave: F32(0.15) * np.tanh(F32(3) * wave)),
    "flower": lambda x, y: _waves(x, y, 5, 0.74, lambda wave: F32(0.22) * wave),
    "cross": partial(_bars, bars=((-0.9, 0.9, -0.27, 0.27), (-0.27, 0.27, -0.9, 0.9))),
    "tee": partial(_bars, bars=((-0.85, 0.85, 0.35, 0.85), (-0.25, 0.25, -0.85, 0.6))),
    "ell": partial(_bars, bars=((-0.65, -0.1, -0.85, 0.85), (-0.65, 0.65, -0.85, -0.35))),
    "cup": partial(_bars, bars=((-0.75, -0.3, -0.75, 0.75), (0.3, 0.75, -0.75, 0.75), (-0.5, 0.5, -0.75, -0.3))),
    "aitch": partial(_bars, bars=((-0.75, -0.3, -0.75, 0.75), (0.3, 0.75, -0.75, 0.75), (-0.5, 0.5, -0.22, 0.22))),
    "arrow": _arrow,
}

CLASSES = tuple(OUTLINES)
SIZE = 32  # units, height and width of an image: pixels where it is drawn in its own size
CHUNK = 128  # images drawn together: the work arrays (0.5 MB a plane at 32 pixels) stay in the processor's cache
SQUEEZE = 0.06  # of a shape's height or width, at most

# Of the 10,000 training images of seed 0, pixels / 255.
MEAN = (0.3871, 0.3860, 0.3846)
STD = (0.1966, 0.1960, 0.1974)

# Numbers of the two drawing streams; a third split would take 2.
TRAIN, TEST = 0, 1


def load_shapes(config: ShapesConfig) -> Dataset:
    """Draw both splits; the test images come from a stream of their own."""
    train, test = (
        draw_shapes(count, config.seed, stream, config.size)
        for count, stream in ((config.train, TRAIN), (config.test, TEST))
    )
    return Dataset(config.name, CLASSES, MEAN, STD, padding=config.size // 8, flip=True, train=train, test=test)


@lru_cache(maxsize=2)  # both splits: the next run of a series has them
def draw_shapes(count: int, seed: int, stream: int = TRAIN, size: int = SIZE) -> Split:
    """`count` images in random order, all classes equally often to within one.

    About 0.1 ms an image of 32 pixels on one core.
    size  pixels, height and width
    """
    rng = np.random.Generator(np.random.PCG64([seed, stream]))
    labels = rng.permutation(np.arange(count) % len(CLASSES))
    images = np.empty((count, 3, size, size), dtype=np.uint8)
    for number, outline in enumerate(OUTLINES.values()):
        rows = np.flatnonzero(labels == number)
        for first in range(0, len(rows), CHUNK):
            some = rows[first : first + CHUNK]
            images[some] = _draw(rng, outline, len(some), size)
    return Split(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))


def _draw(rng: np.random.Generator, outline: Outline, count: int, size: int) -> NDArray[np.uint8]:
    """`count` images of one shape, [count, 3, size, size]."""
    # One number per image, so that hard images are small, faint, noisy and covered all at once; squared, so that
    # half of the images are easier than a quarter of the way and a short training has something to begin with.
    hard = _uniform(rng, count, 0, 1) ** 2
    radius = _uniform(rng, count, 12, 14.5) - 5 * hard  # units
    room = np.maximum(15.5 - radius, 0) * 0.9
    centre_x, centre_y = _uniform(rng, count, -1, 1) * room, _uniform(rng, count, -1, 1) * room
    ground = _uniform(rng, (count, 3), 0.1, 0.5)
    paint = ground + (0.45 - 0.27 * hard)[:, None] * _uniform(rng, ground.shape, 0.6, 1.2)  # lighter by about so much

    across, down = _grid(size, centre_x, centre_y)
    canvas = ground[:, :, None] + _texture(rng, across, down, 0.03 + 0.07 * hard)
    canvas = _clutter(rng, canvas, size, hard)
    inside = _cover(outline, rng, across, down, radius)
    shade = _texture(rng, across, down, 0.02 + 0.04 * hard)
    canvas += inside[:, None] * (paint[:, :, None] + shade - canvas)
    canvas = _occlude(rng, canvas, across, down, radius, hard)
    noise = rng.standard_normal(canvas.shape, dtype=np.float32)
    canvas += noise * (0.01 + 0.07 * hard)[:, None, None]
    np.clip(canvas, 0, 1, out=canvas)
    return (canvas * 255 + np.float32(0.5)).astype(np.uint8).reshape(count, 3, size, size)


def _uniform(rng: np.random.Generator, shape: int | tuple[int, ...], low: float, high: float) -> Array:
    return np.float32(low) + np.float32(high - low) * rng.random(shape, dtype=np.float32)


def _grid(size: int, centre_x: Array, centre_y: Array) -> tuple[Array, Array]:
    """Units of each pixel's middle from its image's own centre, [count, pixels] across and down."""
    line = (np.arange(size, dtype=np.float32) - np.float32((size - 1) / 2)) * np.float32(SIZE / size)
    down, across = np.repeat(line, size), np.tile(line, size)
    return across - centre_x[:, None], down - centre_y[:, None]


def _texture(rng: np.random.Generator, across: Array, down: Array, strength: Array) -> Array:
    """Waves of a drawn direction, length and phase, tinted: [count, 3, pixels], amplitude `strength` [count]."""
    count = len(across)
    angle, pitch = _uniform(rng, count, 0, 2 * np.pi), _uniform(rng, count, 0.15, 1.2)  # radians, radians per unit
    phase = _uniform(rng, count, 0, 2 * np.pi)
    wave: Array = np.sin(
        (np.cos(angle) * pitch)[:, None] * across + (np.sin(angle) * pitch)[:, None] * down + phase[:, None]
    )
    tint = _uniform(rng, (count, 3), -1, 1) * strength[:, None]
    return tint[:, :, None] * wave[:, None]


def _cover(outline: Outline, rng: np.random.Generator, across: Array, down: Array, radius: Array) -> Array:
    """How much of each pixel lies inside the shape, turned and slightly squeezed at random: [count, pixels], 0 .. 1."""
    count = len(radius)
    angle = _uniform(rng, count, 0, 2 * np.pi)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    stretch = _uniform(rng, count, 1 - SQUEEZE, 1 + SQUEEZE)[:, None]
    wide, high = radius[:, None] / stretch, radius[:, None] * stretch
    x: Array = (cos * across + sin * down) / wide
    y: Array = (cos * down - sin * across) / high
    outside = outline(x, y)
    return np.clip(np.float32(0.5) - outside * radius[:, None], 0, 1)


def _clutter(rng: np.random.Generator, canvas: Array, size: int, hard: Array) -> Array:
    """Up to two straight bars of other colours right across the image, behind the shape; the harder the likelier."""
    count = len(hard)
    middle = np.zeros(count, dtype=np.float32)
    across, down = _grid(size, middle, middle)
    for _ in range(2):
        there = rng.random(count, dtype=np.float32) < np.float32(0.4) * hard
        half = _uniform(rng, count, 0.7, 1.8)  # of the bar's width, units
        angle, offset = _uniform(rng, count, 0, 2 * np.pi), _uniform(rng, count, -14, 14)
        away = np.abs(np.cos(angle)[:, None] * across + np.sin(angle)[:, None] * down - offset[:, None])
        cover = np.clip(np.float32(0.5) + half[:, None] - away, 0, 1) * there[:, None]
        colour = _uniform(rng, (count, 3), 0, 1)
        canvas += cover[:, None] * (colour[:, :, None] - canvas)
    return canvas


def _occlude(rng: np.random.Generator, canvas: Array, across: Array, down: Array, radius: Array, hard: Array) -> Array:
    """A disc of another colour over a part of the shape's edge, in up to half of the images."""
    count = len(hard)
    angle = _uniform(rng, count, 0, 2 * np.pi)
    away = radius * _uniform(rng, count, 0.6, 1.0)
    reach = np.hypot(across - (away * np.cos(angle))[:, None], down - (away * np.sin(angle))[:, None])
    size = radius * _uniform(rng, count, 0.2, 0.4)
    there = rng.random(count, dtype=np.float32) < np.float32(0.5) * hard
    cover = np.clip(np.float32(0.5) + size[:, None] - reach, 0, 1) * there[:, None]
    colour = _uniform(rng, (count, 3), 0, 1)
    canvas += cover[:, None] * (colour[:, :, None] - canvas)
    return canvas
