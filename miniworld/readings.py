"""What a picture of the mini world can be read for: the gate asks, the supervised backbone learns."""

from miniworld.scene import BACKGROUNDS, CLASSES, COLORS, MEDIA, TEXTURES, Scene

READINGS: dict[str, tuple[str, ...]] = {
    "noun": CLASSES,
    "color": tuple(COLORS),
    "trim": tuple(COLORS),
    "texture": TEXTURES,
    "background": BACKGROUNDS,
    "medium": MEDIA,
}


def true_readings(scene: Scene) -> dict[str, int]:
    """The index of each reading's true value."""
    instance = scene.instance
    truth = {
        "noun": instance.noun,
        "color": instance.color,
        "trim": instance.trim,
        "texture": instance.texture,
        "background": scene.background,
        "medium": scene.artist.medium,
    }
    return {name: values.index(truth[name]) for name, values in READINGS.items()}
