"""Silhouettes of the object classes, as polygons in a unit frame.

A class is a function of three proportions in [0, 1] that returns its parts from back to front. The frame is
[-1, 1] x [-1, 1] with y pointing down. Every part names the role that colours it: `body` (the instance's main
colour and texture), `trim` (its second colour), `dark` and `light`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Points = np.ndarray  # [points, 2]


class Part(NamedTuple):
    """One filled polygon of an object."""

    role: str
    points: Points


def _poly(role: str, *points: tuple[float, float]) -> Part:
    return Part(role, np.array(points, dtype=np.float64))


def _rect(role: str, x0: float, y0: float, x1: float, y1: float) -> Part:
    return _poly(role, (x0, y0), (x1, y0), (x1, y1), (x0, y1))


def _oval(
    role: str, cx: float, cy: float, rx: float, ry: float, start: float = 0.0, stop: float = 360.0
) -> Part:
    angle = np.radians(np.linspace(start, stop, 30))
    return Part(role, np.stack([cx + rx * np.cos(angle), cy + ry * np.sin(angle)], axis=1))


def _arc(role: str, cx: float, cy: float, r_out: float, r_in: float, start: float, stop: float) -> Part:
    outer = _oval(role, cx, cy, r_out, r_out, start, stop).points
    inner = _oval(role, cx, cy, r_in, r_in, stop, start).points
    return Part(role, np.concatenate([outer, inner]))


def _apple(a: float, b: float, c: float) -> list[Part]:
    w, h = 0.62 + 0.14 * a, 0.62 + 0.12 * b
    t = np.linspace(0, 2 * np.pi, 40)
    r = 1 - 0.22 * np.exp(-((t - 1.5 * np.pi) ** 2) / 0.12) - 0.10 * np.exp(-((t - 0.5 * np.pi) ** 2) / 0.08)
    body = np.stack([w * r * np.cos(t), 0.15 + h * r * np.sin(t)], axis=1)
    return [
        Part("body", body),
        _poly("dark", (-0.05, -0.35), (0.03, -0.35), (0.14, -0.78 - 0.1 * c), (0.06, -0.8 - 0.1 * c)),
        _poly("trim", (0.08, -0.55), (0.3, -0.85), (0.62, -0.8), (0.45, -0.52)),
    ]


def _bottle(a: float, b: float, c: float) -> list[Part]:
    w, neck, shoulder = 0.30 + 0.14 * a, 0.10 + 0.06 * b, -0.25 + 0.2 * c
    return [
        _poly(
            "body", (-neck, -0.78), (neck, -0.78), (neck, shoulder - 0.2), (w, shoulder),
            (w, 0.92), (-w, 0.92), (-w, shoulder), (-neck, shoulder - 0.2),
        ),
        _rect("trim", -neck - 0.04, -0.95, neck + 0.04, -0.72),
        _rect("light", -w, 0.15, w, 0.55),
    ]  # fmt: skip


def _house(a: float, b: float, c: float) -> list[Part]:
    w, wall, peak = 0.58 + 0.16 * a, -0.12 + 0.16 * b, -0.75 - 0.2 * c
    return [
        _rect("body", -w, wall, w, 0.85),
        _poly("trim", (-w - 0.18, wall + 0.04), (0, peak), (w + 0.18, wall + 0.04)),
        _rect("dark", -0.14, 0.35, 0.16, 0.85),
        _rect("light", -w + 0.12, 0.12, -w + 0.38, 0.4),
        _rect("light", w - 0.38, 0.12, w - 0.12, 0.4),
    ]


def _car(a: float, b: float, c: float) -> list[Part]:
    roof, cabin, r = -0.52 - 0.12 * a, 0.42 + 0.14 * b, 0.2 + 0.06 * c
    return [
        _poly(
            "body", (-cabin - 0.15, -0.02), (-cabin + 0.08, roof), (cabin - 0.12, roof), (cabin + 0.2, -0.02)
        ),
        _poly("light", (-cabin, -0.04), (-cabin + 0.14, roof + 0.12), (-0.06, roof + 0.12), (-0.06, -0.04)),
        _poly(
            "light", (0.04, -0.04), (0.04, roof + 0.12), (cabin - 0.16, roof + 0.12), (cabin + 0.06, -0.04)
        ),
        _poly("body", (-0.95, 0.0), (0.85, 0.0), (0.97, 0.2), (0.95, 0.45), (-0.95, 0.45)),
        _oval("dark", -0.52, 0.45, r, r),
        _oval("dark", 0.52, 0.45, r, r),
        _oval("trim", -0.52, 0.45, r * 0.5, r * 0.5),
        _oval("trim", 0.52, 0.45, r * 0.5, r * 0.5),
    ]


def _fish(a: float, b: float, c: float) -> list[Part]:
    h, tail = 0.36 + 0.18 * a, 0.34 + 0.18 * b
    return [
        _poly("trim", (0.42, 0.0), (0.95, -tail), (0.8, 0.0), (0.95, tail)),
        _poly("trim", (-0.3, -h + 0.1), (0.1, -h - 0.26 - 0.1 * c), (0.35, -h + 0.14)),
        _oval("body", -0.15, 0.0, 0.72, h),
        _poly("trim", (-0.12, 0.1), (0.2, 0.32), (0.22, 0.06)),
        _oval("light", -0.56, -0.1, 0.13, 0.13),
        _oval("dark", -0.58, -0.1, 0.065, 0.065),
    ]


def _tree(a: float, b: float, c: float) -> list[Part]:
    w, trunk = 0.55 + 0.2 * a, 0.10 + 0.06 * b
    top = -0.95
    return [
        _rect("trim", -trunk, 0.4, trunk, 0.95),
        _poly("body", (-w, 0.55), (w, 0.55), (0, -0.15 - 0.1 * c)),
        _poly("body", (-w * 0.82, 0.15), (w * 0.82, 0.15), (0, -0.5 - 0.1 * c)),
        _poly("body", (-w * 0.6, -0.25), (w * 0.6, -0.25), (0, top)),
    ]


def _mushroom(a: float, b: float, c: float) -> list[Part]:
    w, cap, stem = 0.72 + 0.18 * a, 0.62 + 0.22 * b, 0.17 + 0.1 * c
    return [
        _poly("light", (-stem, 0.0), (stem, 0.0), (stem + 0.1, 0.9), (-stem - 0.1, 0.9)),
        _oval("body", 0.0, 0.1, w, cap + 0.2, 180, 360),
        _rect("trim", -w, 0.04, w, 0.16),
    ]


def _umbrella(a: float, b: float, c: float) -> list[Part]:
    w, h = 0.78 + 0.16 * a, 0.62 + 0.2 * b
    return [
        _rect("dark", -0.04, -0.1, 0.04, 0.75),
        _arc("dark", 0.16, 0.72, 0.2, 0.12, 0, 180),
        _oval("body", 0.0, 0.02, w, h, 180, 360),
        _poly("trim", (-w * 0.36, 0.02), (0, -h), (w * 0.36, 0.02)),
        _poly("dark", (-0.04, -h), (0.04, -h), (0.0, -h - 0.16 - 0.06 * c)),
    ]


def _clock(a: float, b: float, c: float) -> list[Part]:
    r = 0.62 + 0.12 * a
    hand = np.radians(20 + 140 * b)
    tip = (0.42 * np.sin(hand) * r, 0.08 - 0.5 * np.cos(hand) * r)
    bell = 0.2 + 0.08 * c
    return [
        _oval("trim", -0.5, -0.62, bell, bell),
        _oval("trim", 0.5, -0.62, bell, bell),
        _poly("trim", (-0.6, 0.95), (-0.42, 0.95), (-0.25, 0.5), (-0.4, 0.45)),
        _poly("trim", (0.6, 0.95), (0.42, 0.95), (0.25, 0.5), (0.4, 0.45)),
        _oval("body", 0.0, 0.08, r, r),
        _oval("light", 0.0, 0.08, r * 0.68, r * 0.68),
        _poly("dark", (-0.04, 0.08), (0.04, 0.08), (0.03, -0.34), (-0.03, -0.34)),
        _poly("dark", (-0.03, 0.04), (0.03, 0.12), tip),
    ]


def _mug(a: float, b: float, c: float) -> list[Part]:
    w, h = 0.48 + 0.12 * a, 0.62 + 0.16 * b
    return [
        _arc("trim", w, 0.05, 0.4, 0.24 + 0.05 * c, -95, 95),
        _rect("body", -w - 0.12, -h, w, h),
        _oval("dark", -0.06, -h, w + 0.06, 0.14),
    ]


def _hat(a: float, b: float, c: float) -> list[Part]:
    w, h = 0.42 + 0.12 * a, 0.65 + 0.2 * b
    return [
        _oval("body", 0.0, 0.55, 0.95, 0.2 + 0.06 * c),
        _poly(
            "body", (-w - 0.06, 0.55), (-w + 0.05, 0.5 - h * 1.5), (w - 0.05, 0.5 - h * 1.5), (w + 0.06, 0.55)
        ),
        _rect("trim", -w - 0.04, 0.16, w + 0.04, 0.46),
    ]


def _lamp(a: float, b: float, c: float) -> list[Part]:
    top, bottom = 0.26 + 0.12 * a, 0.62 + 0.16 * b
    return [
        _rect("trim", -0.07, 0.0, 0.07, 0.82),
        _oval("trim", 0.0, 0.84, 0.42 + 0.1 * c, 0.12),
        _poly("body", (-top, -0.9), (top, -0.9), (bottom, 0.1), (-bottom, 0.1)),
    ]


def _key(a: float, b: float, c: float) -> list[Part]:
    r = 0.34 + 0.08 * a
    return [
        _rect("trim", -0.3, -0.09, 0.95, 0.09),
        _rect("trim", 0.72, 0.05, 0.9, 0.38 + 0.12 * b),
        _rect("trim", 0.42, 0.05, 0.58, 0.3 + 0.12 * c),
        _arc("body", -0.55, 0.0, r + 0.06, r * 0.42, 0, 360),
    ]


def _boat(a: float, b: float, c: float) -> list[Part]:
    deck, mast = 0.36, -0.9
    return [
        _rect("dark", -0.05, mast, 0.04, deck),
        _poly("body", (0.08, mast + 0.05), (0.1, 0.22), (0.72 + 0.15 * a, 0.22)),
        _poly("trim", (-0.1, mast + 0.25), (-0.1, 0.22), (-0.55 - 0.18 * b, 0.22)),
        _poly("body", (-0.92, deck), (0.92, deck), (0.6, 0.82 + 0.1 * c), (-0.62, 0.82 + 0.1 * c)),
    ]


def _rocket(a: float, b: float, c: float) -> list[Part]:
    w, fin = 0.27 + 0.1 * a, 0.35 + 0.2 * b
    return [
        _poly("trim", (-w, 0.1), (-w - fin, 0.75), (-w, 0.6)),
        _poly("trim", (w, 0.1), (w + fin, 0.75), (w, 0.6)),
        _poly("light", (-w * 0.7, 0.6), (w * 0.7, 0.6), (0.0, 0.98)),
        _poly(
            "body",
            (0, -0.98),
            (w * 0.7, -0.6),
            (w, -0.2),
            (w, 0.62),
            (-w, 0.62),
            (-w, -0.2),
            (-w * 0.7, -0.6),
        ),
        _oval("light", 0.0, -0.2, 0.15 + 0.05 * c, 0.15 + 0.05 * c),
    ]


def _bird(a: float, b: float, c: float) -> list[Part]:
    h = 0.4 + 0.12 * a
    return [
        _poly("trim", (0.35, 0.0), (0.98, -0.35 - 0.15 * b), (0.9, 0.12)),
        _rect("dark", -0.1, 0.4, -0.04, 0.95),
        _rect("dark", 0.12, 0.4, 0.18, 0.95),
        _oval("body", 0.0, 0.12, 0.55, h),
        _oval("body", -0.5, -0.4, 0.3, 0.3),
        _poly("trim", (-0.76, -0.5), (-1.0, -0.34), (-0.74, -0.26)),
        _poly("trim", (-0.2, 0.0), (0.42, -0.02), (0.2, 0.34 + 0.12 * c)),
        _oval("dark", -0.56, -0.46, 0.07, 0.07),
    ]


def _cat(a: float, b: float, c: float) -> list[Part]:
    w = 0.66 + 0.14 * a
    ear = 0.35 + 0.15 * b
    return [
        _poly("trim", (-w, -0.2), (-w + 0.05, -0.55 - ear), (-0.15, -0.5)),
        _poly("trim", (w, -0.2), (w - 0.05, -0.55 - ear), (0.15, -0.5)),
        _oval("body", 0.0, 0.12, w, 0.66 + 0.08 * c),
        _oval("light", -0.28, 0.0, 0.18, 0.18),
        _oval("light", 0.28, 0.0, 0.18, 0.18),
        _oval("dark", -0.28, 0.0, 0.07, 0.14),
        _oval("dark", 0.28, 0.0, 0.07, 0.14),
        _poly("dark", (-0.1, 0.3), (0.1, 0.3), (0.0, 0.42)),
    ]


def _flower(a: float, b: float, c: float) -> list[Part]:
    r, petal = 0.4 + 0.06 * a, 0.24 + 0.06 * b
    petals = [
        _oval("body", r * np.cos(t), -0.3 + r * np.sin(t), petal, petal)
        for t in np.linspace(0, 2 * np.pi, 7)[:-1]
    ]
    return [
        _rect("dark", -0.05, 0.0, 0.05, 0.98),
        _poly("dark", (0.0, 0.8), (0.5, 0.42), (0.36, 0.78)),
        *petals,
        _oval("trim", 0.0, -0.3, 0.24 + 0.06 * c, 0.24 + 0.06 * c),
    ]


def _chair(a: float, b: float, c: float) -> list[Part]:
    w, seat = 0.46 + 0.1 * a, 0.12 + 0.1 * b
    return [
        _rect("trim", -w, seat, -w + 0.16, 0.95),
        _rect("trim", w - 0.16, seat, w, 0.95),
        _rect("body", -w, -0.95 + 0.12 * c, w * 0.9, seat - 0.12),
        _rect("trim", -w - 0.08, seat - 0.06, w + 0.1, seat + 0.16),
    ]


def _guitar(a: float, b: float, c: float) -> list[Part]:
    low, up = 0.44 + 0.08 * a, 0.3 + 0.08 * b
    return [
        _rect("trim", -0.07, -0.82, 0.07, 0.1),
        _rect("dark", -0.14, -0.98, 0.14, -0.74),
        _oval("body", 0.0, 0.08, up, 0.3),
        _oval("body", 0.0, 0.52, low, 0.42),
        _oval("dark", 0.0, 0.3, 0.13 + 0.04 * c, 0.13 + 0.04 * c),
    ]


def _teapot(a: float, b: float, c: float) -> list[Part]:
    w, h = 0.5 + 0.08 * a, 0.46 + 0.1 * b
    return [
        _poly("trim", (-w + 0.1, 0.4), (-0.98, -0.3 - 0.15 * c), (-0.82, -0.35 - 0.15 * c), (-w + 0.15, 0.0)),
        _arc("trim", w, 0.12, 0.38, 0.24, -90, 90),
        _oval("body", 0.0, 0.2, w + 0.08, h + 0.06),
        _oval("trim", 0.0, -0.28, 0.34, 0.12),
        _oval("trim", 0.0, -0.45, 0.1, 0.1),
    ]


def _cactus(a: float, b: float, c: float) -> list[Part]:
    w = 0.2 + 0.07 * a
    left, right = -0.05 - 0.3 * b, 0.1 - 0.3 * c
    return [
        _rect("body", -0.62, left, -0.4, 0.32),
        _rect("body", -0.62, 0.14, -0.1, 0.36),
        _rect("body", 0.4, right, 0.62, 0.18),
        _rect("body", 0.1, 0.0, 0.62, 0.22),
        _oval("body", 0.0, -0.6, w, 0.3, 180, 360),
        _rect("body", -w, -0.6, w, 0.6),
        _poly("trim", (-0.48, 0.55), (0.48, 0.55), (0.36, 0.98), (-0.36, 0.98)),
    ]


def _balloon(a: float, b: float, c: float) -> list[Part]:
    r = 0.58 + 0.14 * a
    basket = 0.2 + 0.08 * b
    return [
        _poly("dark", (-r * 0.7, 0.1), (-basket, 0.68), (basket, 0.68), (r * 0.7, 0.1), (0.0, 0.2)),
        _oval("body", 0.0, -0.28, r, 0.66),
        _oval("trim", 0.0, -0.28, r * (0.28 + 0.16 * c), 0.66),
        _rect("light", -basket, 0.66, basket, 0.96),
    ]


def _butterfly(a: float, b: float, c: float) -> list[Part]:
    up, low = 0.42 + 0.08 * a, 0.3 + 0.08 * b
    wings = []
    for side in (-1, 1):
        wings.append(_oval("trim", side * 0.42, 0.42, low, 0.34))
        wings.append(_oval("body", side * 0.5, -0.25, up, 0.48 + 0.08 * c))
    return [
        *wings,
        _oval("dark", 0.0, 0.05, 0.09, 0.6),
        _poly("dark", (-0.03, -0.5), (-0.3, -0.92), (-0.24, -0.94), (0.03, -0.52)),
        _poly("dark", (0.03, -0.5), (0.3, -0.92), (0.24, -0.94), (-0.03, -0.52)),
    ]


SHAPES: dict[str, Callable[[float, float, float], list[Part]]] = {
    "apple": _apple, "balloon": _balloon, "bird": _bird, "boat": _boat, "bottle": _bottle,
    "butterfly": _butterfly, "cactus": _cactus, "car": _car, "cat": _cat, "chair": _chair, "clock": _clock,
    "fish": _fish, "flower": _flower, "guitar": _guitar, "hat": _hat, "house": _house, "key": _key,
    "lamp": _lamp, "mug": _mug, "mushroom": _mushroom, "rocket": _rocket, "teapot": _teapot, "tree": _tree,
    "umbrella": _umbrella,
}  # fmt: skip
