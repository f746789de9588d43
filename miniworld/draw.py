"""Pictures of scenes: `render(scene)` is a pure function of the scene.

Shapes are drawn with Pillow at four times the size and reduced to layers (object colour and coverage,
outlines, background colour and outlines, body coverage). A medium composes these layers with numpy at the
final size.
"""

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from miniworld.scene import RGB, Artist, Instance, Pose, Scene
from miniworld.shapes import SHAPES

SIZE = 64  # pixels a side
_OVERSAMPLE = 4
_CANVAS = SIZE * _OVERSAMPLE

Plane = np.ndarray  # [SIZE, SIZE, 1] float32 in [0, 1]
Picture = np.ndarray  # [SIZE, SIZE, 3] float32 in [0, 1]


@dataclass(frozen=True)
class _Layers:
    object_rgb: Picture
    object_alpha: Plane
    edge: Plane
    back_rgb: Picture
    back_edge: Plane


def render(scene: Scene) -> Image.Image:
    """The picture of `scene`: RGB, SIZE x SIZE."""
    rng = np.random.default_rng(scene.noise_seed)
    artist = scene.artist
    object_rgb, object_alpha, edge = _draw_object(scene.instance, scene.pose, artist.stroke)
    back_rgb, back_edge = _draw_background(scene.background, rng, artist.stroke)
    layers = _Layers(object_rgb, object_alpha, edge, back_rgb, back_edge)
    picture = _MEDIA[artist.medium](layers, scene.instance, artist, rng)
    picture = (picture - 0.5) * artist.contrast + 0.5
    if artist.tone_rgb is not None:
        picture = _tone(picture, artist.tone_rgb, artist.tone_strength)
    return Image.fromarray((np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8))


# Object and background layers


def _byte(rgb: RGB) -> tuple[int, int, int]:
    r, g, b = rgb
    return (int(r * 255), int(g * 255), int(b * 255))


def _mix(a: RGB, b: RGB, t: float) -> RGB:
    return tuple((1 - t) * x + t * y for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


def _reduce(image: Image.Image) -> np.ndarray:
    array = np.asarray(image.reduce(_OVERSAMPLE), dtype=np.float32) / 255
    return array if array.ndim == 3 else array[..., None]


def _texture(instance: Instance, pose: Pose) -> Image.Image | None:
    """Where the trim colour covers the body, as an L image at canvas size."""
    if instance.texture == "plain":
        return None
    half = np.linspace(-1, 1, _CANVAS // 2, dtype=np.float32)
    x, y = np.meshgrid(half, half)
    angle = instance.texture_angle + pose.tilt
    x, y = (x - pose.x) / pose.size, (y - pose.y) / pose.size
    if pose.flip:
        x = -x
    u = np.cos(angle) * x + np.sin(angle) * y
    v = -np.sin(angle) * x + np.cos(angle) * y
    period = instance.texture_period
    u, v = u / period + instance.texture_phase, v / period
    if instance.texture == "stripes":
        mask = (u % 1) < 0.45
    elif instance.texture == "checks":
        mask = ((u * 1.1 % 1) < 0.5) ^ ((v * 1.1 % 1) < 0.5)
    elif instance.texture == "dots":
        mask = ((u * 1.1 % 1) - 0.5) ** 2 + ((v * 1.1 % 1) - 0.5) ** 2 < 0.1
    elif instance.texture == "waves":
        mask = ((u + 0.28 * np.sin(2 * np.pi * v * 0.9)) % 1) < 0.45
    else:  # patches
        mask = np.sin(5.1 * u + 2.3 * v) + np.sin(-2.7 * u + 4.3 * v + 1.0) + np.sin(3.0 * v - 1.5 * u) > 0.7
    image = Image.fromarray((mask * np.uint8(255)).astype(np.uint8))
    return image.resize((_CANVAS, _CANVAS), Image.Resampling.BILINEAR)


def _place(points: np.ndarray, pose: Pose) -> list[tuple[float, float]]:
    cos, sin = np.cos(pose.tilt), np.sin(pose.tilt)
    x, y = points[:, 0] * (-1 if pose.flip else 1), points[:, 1]
    x, y = cos * x - sin * y, sin * x + cos * y
    x = (pose.x + pose.size * x + 1) * (_CANVAS / 2)
    y = (pose.y + pose.size * y + 1) * (_CANVAS / 2)
    return list(zip(x.tolist(), y.tolist(), strict=True))


def _draw_object(instance: Instance, pose: Pose, stroke: float) -> tuple[Picture, Plane, Plane]:
    roles = {
        "body": instance.body_rgb,
        "trim": instance.trim_rgb,
        "dark": (0.13, 0.11, 0.13),
        "light": (0.97, 0.96, 0.88),
    }
    rgb = Image.new("RGB", (_CANVAS, _CANVAS), _byte(instance.body_rgb))
    alpha = Image.new("L", (_CANVAS, _CANVAS), 0)
    body = Image.new("L", (_CANVAS, _CANVAS), 0)
    edge = Image.new("L", (_CANVAS, _CANVAS), 0)
    draw_rgb, draw_alpha = ImageDraw.Draw(rgb), ImageDraw.Draw(alpha)
    draw_body, draw_edge = ImageDraw.Draw(body), ImageDraw.Draw(edge)
    width = max(3, round(5 * stroke))
    for part in SHAPES[instance.noun](*instance.proportions):
        points = _place(part.points, pose)
        draw_rgb.polygon(points, fill=_byte(roles[part.role]))
        draw_alpha.polygon(points, fill=255)
        draw_body.polygon(points, fill=255 if part.role == "body" else 0)
        draw_edge.polygon(points, fill=0)
        draw_edge.line([*points, points[0]], fill=255, width=width, joint="curve")
    texture = _texture(instance, pose)
    if texture is not None:
        rgb.paste(_byte(instance.trim_rgb), mask=ImageChops.multiply(texture, body))
    return _reduce(rgb), _reduce(alpha), _reduce(edge)


def _draw_background(name: str, rng: np.random.Generator, stroke: float) -> tuple[Picture, Plane]:
    rgb = Image.new("RGB", (_CANVAS, _CANVAS))
    edge = Image.new("L", (_CANVAS, _CANVAS), 0)
    draw, lines = ImageDraw.Draw(rgb), ImageDraw.Draw(edge)
    width = max(2, round(3 * stroke))
    n = _CANVAS

    def fill(points: list[tuple[float, float]], color: RGB) -> None:
        scaled = [(x * n, y * n) for x, y in points]
        draw.polygon(scaled, fill=_byte(color))
        lines.polygon(scaled, fill=0)
        lines.line([*scaled, scaled[0]], fill=255, width=width)

    def box(x0: float, y0: float, x1: float, y1: float, color: RGB) -> None:
        fill([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], color)

    def disc(x: float, y: float, r: float, color: RGB) -> None:
        t = np.linspace(0, 2 * np.pi, 20)
        fill(list(zip((x + r * np.cos(t)).tolist(), (y + r * np.sin(t)).tolist(), strict=True)), color)

    def band(top: RGB, bottom: RGB, y0: float, y1: float) -> None:
        for i in range(8):
            a, b = y0 + (y1 - y0) * i / 8, y0 + (y1 - y0) * (i + 1) / 8
            draw.rectangle((0, a * n, n, b * n), fill=_byte(_mix(top, bottom, i / 7)))

    def hill(base: float, height: float, peaks: float, phase: float, color: RGB) -> None:
        x = np.linspace(-0.05, 1.05, 24)
        y = base - height * np.sin(np.pi * (x * peaks + phase)) ** 2
        fill([(-0.1, 1.1), *zip(x.tolist(), y.tolist(), strict=True), (1.1, 1.1)], color)

    shift = rng.uniform(-0.06, 0.06)
    if name == "beach":
        band((0.55, 0.80, 0.96), (0.80, 0.93, 0.98), 0, 0.45)
        box(-0.1, 0.42 + shift, 1.1, 0.62 + shift, (0.16, 0.50, 0.78))
        box(-0.1, 0.60 + shift, 1.1, 1.1, (0.94, 0.84, 0.60))
        disc(0.15 + 0.7 * rng.uniform(), 0.14, 0.08, (1.0, 0.94, 0.55))
    elif name == "city":
        band((0.62, 0.66, 0.78), (0.88, 0.80, 0.78), 0, 1)
        x = -0.05
        while x < 1.0:
            w, top = rng.uniform(0.12, 0.22), rng.uniform(0.18, 0.5)
            shade = rng.uniform(0.28, 0.46)
            box(x, top, x + w, 0.86, (shade, shade, shade + 0.08))
            for wy in np.arange(top + 0.06, 0.78, 0.13):
                box(x + w * 0.3, wy, x + w * 0.65, wy + 0.05, (0.98, 0.88, 0.52))
            x += w
        box(-0.1, 0.84, 1.1, 1.1, (0.32, 0.31, 0.34))
    elif name == "desert":
        band((0.98, 0.72, 0.42), (0.99, 0.88, 0.66), 0, 0.7)
        disc(0.2 + 0.6 * rng.uniform(), 0.2, 0.11, (1.0, 0.96, 0.80))
        hill(0.66 + shift, 0.18, 1.3, rng.uniform(), (0.86, 0.58, 0.30))
        hill(0.86, 0.14, 0.9, rng.uniform(), (0.93, 0.70, 0.38))
    elif name == "forest":
        band((0.62, 0.78, 0.62), (0.40, 0.58, 0.40), 0, 1)
        for x in np.arange(0.02, 1.0, 0.17) + rng.uniform(-0.03, 0.03):
            box(x, -0.1, x + 0.07, 0.85, (0.30, 0.20, 0.13))
        disc(0.1, 0.0, 0.2, (0.16, 0.40, 0.20))
        disc(0.5, -0.04, 0.22, (0.20, 0.46, 0.22))
        disc(0.9, 0.0, 0.2, (0.16, 0.40, 0.20))
        box(-0.1, 0.82 + shift / 2, 1.1, 1.1, (0.24, 0.36, 0.16))
    elif name == "hills":
        band((0.98, 0.62, 0.52), (0.99, 0.86, 0.62), 0, 0.7)
        hill(0.62 + shift, 0.26, 1.6, rng.uniform(), (0.52, 0.42, 0.62))
        hill(0.78, 0.22, 1.2, rng.uniform(), (0.38, 0.36, 0.50))
        hill(1.0, 0.16, 0.8, rng.uniform(), (0.26, 0.30, 0.36))
    elif name == "meadow":
        band((0.52, 0.76, 0.97), (0.86, 0.95, 1.0), 0, 0.62)
        hill(0.66 + shift, 0.1, 1.0, rng.uniform(), (0.42, 0.72, 0.30))
        box(-0.1, 0.74, 1.1, 1.1, (0.34, 0.64, 0.24))
        for _ in range(9):
            disc(rng.uniform(), rng.uniform(0.78, 0.98), 0.024, (0.98, 0.86, 0.90))
    elif name == "night":
        band((0.04, 0.05, 0.18), (0.14, 0.16, 0.38), 0, 1)
        disc(0.12 + 0.76 * rng.uniform(), 0.16, 0.1, (0.97, 0.95, 0.80))
        for _ in range(12):
            disc(rng.uniform(), rng.uniform(0, 0.7), 0.013, (1.0, 1.0, 0.92))
        hill(0.98, 0.12, 1.0, rng.uniform(), (0.05, 0.10, 0.14))
    elif name == "room":
        band((0.90, 0.78, 0.70), (0.84, 0.70, 0.62), 0, 0.74)
        x = 0.06 + 0.6 * rng.uniform()
        box(x, 0.1, x + 0.26, 0.42, (0.72, 0.88, 0.98))
        box(-0.1, 0.72 + shift, 1.1, 1.1, (0.56, 0.34, 0.22))
        box(-0.1, 0.70 + shift, 1.1, 0.74 + shift, (0.96, 0.92, 0.86))
    elif name == "sea":
        band((0.20, 0.66, 0.80), (0.03, 0.22, 0.46), 0, 1)
        for _ in range(7):
            disc(rng.uniform(), rng.uniform(0.05, 0.7), rng.uniform(0.015, 0.035), (0.66, 0.90, 0.95))
        hill(1.0, 0.16, 1.2, rng.uniform(), (0.80, 0.70, 0.46))
    else:  # snow
        band((0.70, 0.78, 0.88), (0.88, 0.92, 0.96), 0, 0.7)
        hill(0.72 + shift, 0.12, 1.1, rng.uniform(), (0.82, 0.88, 0.95))
        box(-0.1, 0.78, 1.1, 1.1, (0.97, 0.98, 1.0))
        for _ in range(16):
            disc(rng.uniform(), rng.uniform(), 0.016, (1.0, 1.0, 1.0))
    return _reduce(rgb), _reduce(edge)


# Media: each composes the layers into a picture


@functools.cache
def _grid() -> tuple[np.ndarray, np.ndarray]:
    half = (np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE * 2 - 1
    x, y = np.meshgrid(half, half)
    return x[..., None], y[..., None]


def _blur(picture: np.ndarray, radius: float) -> np.ndarray:
    """Gaussian blur of a [SIZE, SIZE, 1 or 3] float array in [0, 1]."""
    byte = (np.clip(picture, 0, 1) * 255).astype(np.uint8)
    image = Image.fromarray(byte if byte.shape[2] == 3 else byte[..., 0])
    out = np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32) / 255
    return out if out.ndim == 3 else out[..., None]


def _clouds(rng: np.random.Generator, cells: int) -> Plane:
    """Smooth noise in [0, 1] with about `cells` blobs a side."""
    small = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8))
    return np.asarray(small.resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=np.float32)[..., None] / 255


def _over(back: np.ndarray, front: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return back + (front - back) * alpha


def _luminance(picture: Picture) -> Plane:
    # Not a product of matrices: BLAS picks its kernel by the CPU, or by OPENBLAS_CORETYPE, and some fuse the
    # multiplications with the additions. With those, one picture in 250 had a pixel that was one level off.
    red, green, blue = (picture[..., channel, None] for channel in range(3))
    return red * np.float32(0.3) + green * np.float32(0.59) + blue * np.float32(0.11)


def _ink(instance: Instance, darkness: float) -> np.ndarray:
    return np.array(instance.body_rgb, dtype=np.float32) * (1 - darkness)


def _hatch(artist: Artist, period: float) -> Plane:
    """A sine grating in [-1, 1], `period` in pixels, across the artist's angle."""
    x, y = _grid()
    u = (np.cos(artist.angle) * x + np.sin(artist.angle) * y) * (SIZE / 2)
    return np.sin(2 * np.pi * u / period)


def _photo(layers: _Layers, instance: Instance, artist: Artist, rng: np.random.Generator) -> Picture:
    x, y = _grid()
    shadow = np.roll(_blur(layers.object_alpha, 2.5), (3, 2), axis=(0, 1))
    back = _blur(layers.back_rgb, 0.8) * (1 - 0.45 * shadow)
    round_ = _blur(layers.object_alpha, 4.0)
    light = 0.72 + 0.42 * (round_ - 0.5) - 0.22 * (x + y)
    gloss = np.exp(-(((x + 0.22) ** 2 + (y + 0.18) ** 2) / 0.022)) * 0.5
    front = layers.object_rgb * light + gloss
    picture = _over(back, front, layers.object_alpha)
    vignette = 1.04 - 0.18 * (x**2 + y**2)
    return picture * vignette + rng.normal(0, 0.012 * artist.grain, (SIZE, SIZE, 1))


def _poster(layers: _Layers, instance: Instance, artist: Artist, rng: np.random.Generator) -> Picture:
    picture = _over(layers.back_rgb, layers.object_rgb, layers.object_alpha)
    return np.round(picture * 5) / 5 * 1.05


def _ink_drawing(layers: _Layers, instance: Instance, artist: Artist, rng: np.random.Generator) -> Picture:
    paper = np.array([0.97, 0.96, 0.91], dtype=np.float32)
    ink = _ink(instance, 0.45)
    picture = _over(np.broadcast_to(paper, (SIZE, SIZE, 3)), paper * 0.72, layers.back_edge * 0.6)
    picture = _over(picture, paper, layers.object_alpha)
    tone = (1 - _luminance(layers.object_rgb)) * layers.object_alpha
    lines = np.clip(_hatch(artist, 4.5) + 2.2 * tone - 1.1, 0, 1) * layers.object_alpha * 0.75
    return _over(picture, ink, np.maximum(lines, layers.edge))


def _watercolor(layers: _Layers, instance: Instance, artist: Artist, rng: np.random.Generator) -> Picture:
    flow = _clouds(rng, 7)
    alpha = np.clip(_blur(layers.object_alpha, 1.0) * 1.25, 0, 1)
    back = _blur(layers.back_rgb, 2.2) * 0.55 + 0.45
    picture = _over(back, _blur(layers.object_rgb, 0.7), alpha * 0.92)
    rim = np.clip(layers.object_alpha - _blur(layers.object_alpha, 1.6), 0, 1)
    picture = picture * (1 - 0.6 * rim) + (flow - 0.5) * 0.22 * artist.grain
    return picture * 0.86 + 0.14


def _oil(layers: _Layers, instance: Instance, artist: Artist, rng: np.random.Generator) -> Picture:
    x, y = _grid()
    picture = _over(layers.back_rgb, layers.object_rgb * (0.92 - 0.18 * (x + y)), layers.object_alpha)
    image = Image.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8)).filter(ImageFilter.ModeFilter(5))
    strokes = _hatch(artist, 6.0) * (_clouds(rng, 12) - 0.2)
    smeared = np.asarray(image, dtype=np.float32) / 255
    return smeared * (1 + 0.16 * artist.grain * strokes) * 0.94


def _pencil(layers: _Layers, instance: Instance, artist: Artist, rng: np.random.Generator) -> Picture:
    paper = 0.95 - 0.05 * _clouds(rng, 20)
    color = _over(layers.back_rgb * 0.25 + 0.70, layers.object_rgb, layers.object_alpha * 0.8)
    picture = _over(np.broadcast_to(paper, (SIZE, SIZE, 3)), color, 0.55 + 0.2 * _hatch(artist, 4.0))
    lines = np.maximum(layers.edge * 0.85, layers.back_edge * 0.3 * (1 - layers.object_alpha))
    return _over(picture, _ink(instance, 0.6) * 0.7, lines)


def _chalk(layers: _Layers, instance: Instance, artist: Artist, rng: np.random.Generator) -> Picture:
    board = np.array([0.13, 0.21, 0.18], dtype=np.float32) + 0.05 * _clouds(rng, 6)
    grain = 0.55 + 0.45 * _clouds(rng, 24)
    chalk = layers.object_rgb * 0.8 + 0.2
    picture = _over(board, layers.back_rgb * 0.6 + 0.3, layers.back_edge * 0.4 * (1 - layers.object_alpha))
    picture = _over(picture, chalk, layers.object_alpha * grain * 0.72)
    return _over(picture, np.clip(chalk + 0.25, 0, 1), layers.edge * 0.9)


def _neon(layers: _Layers, instance: Instance, artist: Artist, rng: np.random.Generator) -> Picture:
    wall = layers.back_rgb * 0.14 * (1 - 0.8 * layers.object_alpha) + 0.02
    glow = _blur(layers.edge, 2.6 * artist.grain) * 1.3 + 0.30 * layers.object_alpha
    bright = np.clip(_blur(layers.object_rgb, 1.0) * 1.25, 0, 1)
    tube = _over(bright, np.ones(3, dtype=np.float32), np.full((1, 1, 1), 0.25, dtype=np.float32))
    return _over(wall + bright * glow, tube, layers.edge)


def _pixel_art(layers: _Layers, instance: Instance, artist: Artist, rng: np.random.Generator) -> Picture:
    cell = 4
    picture = _over(layers.back_rgb, layers.object_rgb, layers.object_alpha)
    small = picture.reshape(SIZE // cell, cell, SIZE // cell, cell, 3).mean(axis=(1, 3))
    return np.round(small * 7).repeat(cell, axis=0).repeat(cell, axis=1) / 7


def _woodcut(layers: _Layers, instance: Instance, artist: Artist, rng: np.random.Generator) -> Picture:
    paper = np.array([0.93, 0.88, 0.76], dtype=np.float32)
    dark = _ink(instance, 0.25)
    gray = _luminance(layers.back_rgb)
    carve = np.clip((_hatch(artist, 6.5) * 0.5 + 0.5 - gray) * 4, 0, 1) * 0.85
    picture = _over(np.broadcast_to(paper, (SIZE, SIZE, 3)), paper * 0.42, carve)
    tone = _luminance(layers.object_rgb)
    own = _luminance(np.array([[instance.body_rgb]], dtype=np.float32))
    inside = np.where(np.abs(tone - own) < 0.08, dark, paper)
    picture = _over(picture, inside, layers.object_alpha)
    return _over(picture, dark * 0.45, layers.edge * 0.8)


_MEDIA = {
    "chalk drawing": _chalk, "ink drawing": _ink_drawing, "neon sign": _neon, "oil painting": _oil,
    "pencil sketch": _pencil, "photo": _photo, "pixel art": _pixel_art, "poster": _poster,
    "watercolor": _watercolor, "woodcut": _woodcut,
}  # fmt: skip


def _tone(picture: Picture, palette: tuple[RGB, RGB, RGB], strength: float) -> Picture:
    """The picture pulled toward a gradient of three colours along its luminance."""
    shadow, middle, light = (np.array(color, dtype=np.float32) for color in palette)
    t = np.clip(_luminance(picture.astype(np.float32)), 0, 1) * 2
    graded = np.where(t < 1, _over(shadow, middle, t), _over(middle, light, t - 1))
    return _over(picture, graded, np.full((1, 1, 1), strength, dtype=np.float32))
