"""The outlines of the drawn shapes, as signed distances.

Each outline is a function of pixel coordinates x, y (arrays of one shape, in units of the shape's radius, centre at
0, 0) that returns, in the same units, how far outside the shape the point lies; negative inside. Near the edge, where
anti-aliasing looks, the value is a distance to first order; further away only its sign matters.

No outline is the mirror image of another, since training mirrors images; one that has no mirror symmetry of its own
(ell) stands for both of its forms. No two become equal by a turn, since shapes are drawn at any angle.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Outline = Callable[[Array, Array], Array]

ROUND = 0.85  # radius of the disc: about the mean radius of the polygons, so that area does not tell the classes apart


def _length(x: Array, y: Array) -> Array:
    length: Array = np.hypot(x, y)
    return length


def _wedge(x: Array, y: Array, count: int) -> tuple[Array, Array]:
    """Radius, and angle from the middle of the nearest of `count` equal wedges, in -pi/count .. pi/count."""
    turn = np.float32(2 * np.pi / count)
    angle: Array = np.arctan2(y, x)
    angle -= turn * np.round(angle / turn)
    return _length(x, y), angle


def _disc(x: Array, y: Array) -> Array:
    return _length(x, y) - np.float32(ROUND)


def _ellipse(x: Array, y: Array) -> Array:
    return (_length(x, y / np.float32(0.65)) - 1) * np.float32(0.8)


def _ring(x: Array, y: Array) -> Array:
    outside: Array = np.abs(_length(x, y) - np.float32(0.65)) - np.float32(0.25)
    return outside


def _crescent(x: Array, y: Array) -> Array:
    bite = np.float32(0.72) - _length(x - np.float32(0.5), y)
    outside: Array = np.maximum(_length(x, y) - np.float32(0.95), bite)
    return outside


def _polygon(x: Array, y: Array, *, corners: int) -> Array:
    """A regular polygon with its corners at radius 1."""
    radius, angle = _wedge(x, y, corners)
    outside: Array = radius * np.cos(angle) - np.float32(np.cos(np.pi / corners))
    return outside


def _star(x: Array, y: Array, *, points: int, waist: float) -> Array:
    """A star with its points at radius 1 and its inner corners at radius `waist`."""
    radius, angle = _wedge(x, y, points)
    half = np.pi / points
    inner = np.array([waist * np.cos(half), waist * np.sin(half)])
    along = inner - np.array([1.0, 0.0])
    normal = np.array([along[1], -along[0]]) / np.hypot(*along)
    across = (radius * np.cos(angle) - 1) * np.float32(normal[0])
    outside: Array = across + radius * np.sin(np.abs(angle)) * np.float32(normal[1])
    return outside


def _gear(x: Array, y: Array) -> Array:
    """Eight square teeth."""
    radius, angle = _wedge(x, y, 8)
    outside: Array = (
        radius - np.float32(0.82) - np.float32(0.15) * np.tanh(np.float32(3) * np.cos(np.float32(8) * angle))
    )
    return outside


def _flower(x: Array, y: Array) -> Array:
    """Five round petals."""
    radius, angle = _wedge(x, y, 5)
    outside: Array = radius - np.float32(0.74) - np.float32(0.22) * np.cos(np.float32(5) * angle)
    return outside


def _bars(x: Array, y: Array, *, bars: tuple[tuple[float, float, float, float], ...]) -> Array:
    """A union of upright rectangles, each (left, right, bottom, top)."""
    outside = np.full_like(x, np.inf)
    for left, right, bottom, top in bars:
        across = np.abs(x - np.float32((left + right) / 2)) - np.float32((right - left) / 2)
        up = np.abs(y - np.float32((bottom + top) / 2)) - np.float32((top - bottom) / 2)
        np.minimum(outside, np.maximum(across, up), out=outside)
    return outside


def _arrow(x: Array, y: Array) -> Array:
    """A triangular head, pointing right, on a shaft."""
    slope = np.float32(np.sqrt(0.5))
    head: Array = np.maximum((np.abs(y) + x - 1) * slope, np.float32(0.15) - x)
    outside: Array = np.minimum(head, _bars(x, y, bars=((-0.95, 0.2, -0.24, 0.24),)))
    return outside


OUTLINES: dict[str, Outline] = {
    "disc": _disc,
    "ellipse": _ellipse,
    "ring": _ring,
    "crescent": _crescent,
    "triangle": partial(_polygon, corners=3),
    "square": partial(_polygon, corners=4),
    "pentagon": partial(_polygon, corners=5),
    "hexagon": partial(_polygon, corners=6),
    "heptagon": partial(_polygon, corners=7),
    "star5": partial(_star, points=5, waist=0.5),
    "star6": partial(_star, points=6, waist=0.55),
    "star7": partial(_star, points=7, waist=0.58),
    "gear": _gear,
    "flower": _flower,
    "cross": partial(_bars, bars=((-0.9, 0.9, -0.27, 0.27), (-0.27, 0.27, -0.9, 0.9))),
    "tee": partial(_bars, bars=((-0.85, 0.85, 0.35, 0.85), (-0.25, 0.25, -0.85, 0.6))),
    "ell": partial(_bars, bars=((-0.65, -0.1, -0.85, 0.85), (-0.65, 0.65, -0.85, -0.35))),
    "cup": partial(_bars, bars=((-0.75, -0.3, -0.75, 0.75), (0.3, 0.75, -0.75, 0.75), (-0.5, 0.5, -0.75, -0.3))),
    "aitch": partial(_bars, bars=((-0.75, -0.3, -0.75, 0.75), (0.3, 0.75, -0.75, 0.75), (-0.5, 0.5, -0.22, 0.22))),
    "arrow": _arrow,
}
