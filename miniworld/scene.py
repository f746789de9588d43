"""What a picture of the mini world shows, as frozen records drawn from a random generator.

    Scene = Instance (what) x Pose (where in the frame) x background x Artist (how it is drawn)

An Instance is an object's identity: class, colours, texture and proportions. An Artist is a style: a medium,
its parameters and, for some, a palette the picture is pulled toward. The generator is always an argument.
"""

from dataclasses import dataclass

import numpy as np

from miniworld.shapes import SHAPES

CLASSES = tuple(sorted(SHAPES))
BACKGROUNDS = ("beach", "city", "desert", "forest", "hills", "meadow", "night", "room", "sea", "snow")
MEDIA = (
    "chalk drawing", "ink drawing", "neon sign", "oil painting", "pencil sketch",
    "photo", "pixel art", "poster", "watercolor", "woodcut",
)  # fmt: skip
TEXTURES = ("plain", "stripes", "dots", "checks", "waves", "patches")

RGB = tuple[float, float, float]

COLORS: dict[str, RGB] = {
    "red": (0.84, 0.13, 0.14), "orange": (0.96, 0.53, 0.10), "yellow": (0.97, 0.85, 0.20),
    "green": (0.22, 0.62, 0.24), "teal": (0.12, 0.68, 0.66), "blue": (0.17, 0.33, 0.84),
    "purple": (0.50, 0.22, 0.70), "pink": (0.96, 0.50, 0.70), "brown": (0.48, 0.29, 0.15),
    "white": (0.95, 0.94, 0.90),
}  # fmt: skip

# Palettes an artist may pull a picture toward: shadow, middle and light colours.
TONES: dict[str, tuple[RGB, RGB, RGB]] = {
    "warm": ((0.25, 0.05, 0.08), (0.85, 0.40, 0.18), (1.00, 0.92, 0.70)),
    "cold": ((0.04, 0.08, 0.25), (0.22, 0.48, 0.75), (0.88, 0.97, 1.00)),
    "rosy": ((0.22, 0.05, 0.20), (0.85, 0.38, 0.58), (1.00, 0.90, 0.93)),
    "mossy": ((0.04, 0.14, 0.08), (0.36, 0.56, 0.24), (0.93, 0.97, 0.78)),
    "violet": ((0.10, 0.03, 0.25), (0.48, 0.32, 0.74), (0.93, 0.88, 1.00)),
    "sepia": ((0.16, 0.10, 0.06), (0.58, 0.42, 0.27), (0.97, 0.92, 0.82)),
}


@dataclass(frozen=True)
class Instance:
    """One individual object: everything that makes it this one and no other of its class."""

    noun: str
    color: str
    trim: str
    texture: str
    body_rgb: RGB
    trim_rgb: RGB
    proportions: tuple[float, float, float]
    texture_angle: float  # radians
    texture_period: float  # in units of the frame's half width
    texture_phase: float


@dataclass(frozen=True)
class Artist:
    """One way of drawing: a medium, its parameters and an optional palette."""

    medium: str
    tone: str | None
    tone_rgb: tuple[RGB, RGB, RGB] | None
    tone_strength: float
    stroke: float  # width of outlines, 0.6 to 1.6 of the medium's usual
    angle: float  # radians, of hatching and brush marks
    grain: float  # 0.5 to 1.5 of the medium's usual
    contrast: float


@dataclass(frozen=True)
class Pose:
    """Where the object sits: centre and half size in units of the frame's half width, tilt in radians."""

    x: float
    y: float
    size: float
    tilt: float
    flip: bool


@dataclass(frozen=True)
class Scene:
    """Everything one picture shows; `noise_seed` fixes its grain."""

    instance: Instance
    pose: Pose
    background: str
    artist: Artist
    noise_seed: int


def _jitter(rgb: RGB, rng: np.random.Generator, amount: float) -> RGB:
    r, g, b = np.clip(np.array(rgb) + rng.uniform(-amount, amount, 3), 0.0, 1.0)
    return (round(float(r), 4), round(float(g), 4), round(float(b), 4))


def draw_instance(rng: np.random.Generator, noun: str | None = None) -> Instance:
    """An individual of `noun` (of any class when None), with colours near two different named ones."""
    noun = noun or CLASSES[rng.integers(len(CLASSES))]
    color, trim = rng.choice(list(COLORS), size=2, replace=False)
    a, b, c = rng.uniform(0, 1, 3)
    return Instance(
        noun=noun,
        color=str(color),
        trim=str(trim),
        texture=TEXTURES[rng.integers(len(TEXTURES))],
        body_rgb=_jitter(COLORS[color], rng, 0.06),
        trim_rgb=_jitter(COLORS[trim], rng, 0.06),
        proportions=(float(a), float(b), float(c)),
        texture_angle=float(rng.uniform(0, np.pi)),
        texture_period=float(rng.uniform(0.30, 0.52)),
        texture_phase=float(rng.uniform(0, 1)),
    )


def draw_artist(rng: np.random.Generator, *, medium: str | None = None, toned: float = 0.3) -> Artist:
    """A style in `medium` (any when None); with probability `toned` it has a palette of its own."""
    medium = medium or MEDIA[rng.integers(len(MEDIA))]
    tone = list(TONES)[rng.integers(len(TONES))] if rng.uniform() < toned else None
    shadow, middle, light = TONES[tone] if tone else TONES["sepia"]
    tone_rgb = (_jitter(shadow, rng, 0.06), _jitter(middle, rng, 0.08), _jitter(light, rng, 0.06))
    return Artist(
        medium=medium,
        tone=tone,
        tone_rgb=tone_rgb if tone else None,
        tone_strength=float(rng.uniform(0.55, 0.8)) if tone else 0.0,
        stroke=float(rng.uniform(0.7, 1.5)),
        angle=float(rng.uniform(0, np.pi)),
        grain=float(rng.uniform(0.5, 1.5)),
        contrast=float(rng.uniform(0.9, 1.12)),
    )


def draw_pose(rng: np.random.Generator, *, ordinary: bool = False) -> Pose:
    """A pose near the middle of the frame; now and then far away or close up, unless `ordinary`."""
    scale = rng.uniform()
    size = rng.uniform(0.64, 0.80)
    if not ordinary and scale < 0.07:
        size = rng.uniform(0.32, 0.48)
    elif not ordinary and scale > 0.95:
        size = rng.uniform(0.95, 1.15)
    return Pose(
        x=float(rng.uniform(-0.10, 0.10)),
        y=float(rng.uniform(-0.04, 0.10)),
        size=float(size),
        tilt=float(rng.normal(0, 0.07)),
        flip=bool(rng.integers(2)),
    )


def draw_scene(
    rng: np.random.Generator,
    *,
    instance: Instance | None = None,
    artist: Artist | None = None,
    background: str | None = None,
    ordinary_pose: bool = False,
) -> Scene:
    """A scene with what is given held fixed and the rest drawn."""
    return Scene(
        instance=instance or draw_instance(rng),
        pose=draw_pose(rng, ordinary=ordinary_pose),
        background=background or BACKGROUNDS[rng.integers(len(BACKGROUNDS))],
        artist=artist or draw_artist(rng),
        noise_seed=int(rng.integers(2**31)),
    )
